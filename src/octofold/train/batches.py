"""Training batches: each a pure function of (seed, phase, epoch, step), whoever asks, in whatever order.

Rows are drawn per epoch, cut into steps, the steps into micro-batches, those into blocks of a few images. A block has
a seed of its own, so threads may prepare steps out of order, and processes may share a step, with the same pixels.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from octofold import recipe
from octofold.data.images import PixelCache
from octofold.nets import augment
from octofold.nets.tasks import one_hot

BLOCK = 8
"""Images that share an augmentation seed; a process takes whole blocks."""
AT_ONCE = 4
"""Steps prepared one after the other where no thread does it: each finds the caches warm, and takes a tenth less."""
Ints = npt.NDArray[np.int64]


class MicroBatch(NamedTuple):
    """What goes through the network at once.

    Attributes:
        inputs: ``(B, 3, S, S)`` uint8, channels last in memory; or ``(B, F)`` float32 features.
        target: ``(B,)`` int64, or ``(B, P, 2)`` float32 in unit coordinates of the (augmented) square.
        rows: ``(B,)`` their rows in the manifest.
        share: weight of this micro-batch's mean loss in the step's loss; over all processes they sum to 1.
    """

    inputs: torch.Tensor
    target: torch.Tensor
    rows: Ints
    share: float


def seed_of(*numbers: int) -> int:
    """Mix whole numbers >= 0 into one 32-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass
class Order:
    """Which rows a step trains on.

    Attributes:
        rows: ``(n,)`` rows of the manifest in the training folds.
        seed: of the slot.
        batch_size: images per micro-batch; the last of a short step may have one more.
        accumulate: micro-batches per step.
        draw: ``(n,)`` probabilities of a weighted sampler, or None: each row once per epoch.
    """

    rows: Ints
    seed: int
    batch_size: int
    accumulate: int = 1
    draw: npt.NDArray[np.float64] | None = None
    _last: tuple[tuple[int, int], Ints] | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps per epoch. The ragged end of an epoch is left out (each epoch has another one), so that
        every step has the same shape; fewer rows than a step make one smaller step."""
        return max(1, len(self.rows) // (self.batch_size * self.accumulate))

    def step(self, phase: int, epoch: int, step: int) -> list[Ints]:
        """Rows of each micro-batch of one step. One row left over joins the last: BatchNorm cannot normalise it."""
        order = self._epoch(phase, epoch)
        size = self.batch_size * self.accumulate
        taken = order[step * size : (step + 1) * size]
        cuts = list(range(self.batch_size, len(taken), self.batch_size))
        if self.batch_size > 1 and cuts and cuts[-1] == len(taken) - 1:
            cuts.pop()
        return np.split(taken, cuts)

    def _epoch(self, phase: int, epoch: int) -> Ints:
        """The rows of an epoch in the order they are drawn; the last epoch asked for is remembered."""
        if (last := self._last) is not None and last[0] == (phase, epoch):
            return last[1]
        generator = np.random.default_rng([self.seed, phase, epoch])
        if self.draw is None:
            order = generator.permutation(self.rows)
        else:
            order = generator.choice(self.rows, len(self.rows), p=self.draw)
        self._last = ((phase, epoch), order)
        return order


@dataclass
class Pixels:
    """Augmented images of the cache with their targets.

    Attributes:
        cache: decoded photos.
        target: ``(N,)`` int64, or ``(N, P, 2)`` points in original pixels; of the whole manifest.
        preset: which row of `augment.PRESETS` an image goes through: one name, or one per row of the manifest.
        swap: key points' mirror twins, as `augment.make` takes them.
    """

    cache: PixelCache
    target: npt.NDArray[Any]
    preset: str | Sequence[str]
    swap: Sequence[int] | None = None
    _own: threading.local = field(default_factory=threading.local)

    def block(self, rows: Ints, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
        """Load and augment a few rows: ``(B, S, S, 3)`` uint8 and their targets, a pure function of `seed`."""
        size = self.cache.spec.size
        names = [self.preset if isinstance(self.preset, str) else self.preset[row] for row in rows.tolist()]
        transforms = {name: self._transform(name, seed) for name in sorted(set(names))}
        images = np.empty((len(rows), size, size, 3), np.uint8)
        target = np.empty((len(rows), *self.target.shape[1:]), self.target.dtype)
        for place, (row, name) in enumerate(zip(rows.tolist(), names, strict=True)):
            if self.target.ndim == 1:
                target[place] = self.target[row]
                plain = name == "none"
                images[place] = self.cache.square(row) if plain else augment.run(transforms[name], self.cache[row])[0]
            else:
                images[place], target[place] = augment.run(transforms[name], self.cache[row], self._points(row))
        return images, target

    def _points(self, row: int) -> npt.NDArray[Any]:
        """A sample's points in unit coordinates of its cached image (which may be larger than its centre square)."""
        height, width = map(int, self.cache.shapes[row])
        size = self.cache.spec.size
        corner = np.array([(width - size) // 2, (height - size) // 2])
        unit = self.cache.frames[row].to_unit(self.target[row])
        return np.asarray((unit * size + corner) / (width, height))

    def _transform(self, name: str, seed: int) -> Any:
        """This thread's own copy of a preset, seeded (albumentations keeps its dice inside)."""
        made: dict[str, Any] = self._own.__dict__.setdefault("made", {})
        if name not in made:
            made[name] = augment.make(name, self.cache.spec.size, self.target.ndim > 1, self.swap)
        augment.reseed(made[name], seed)
        return made[name]


@dataclass
class Features:
    """Cached features of a frozen trunk instead of pixels.

    Attributes:
        values: ``(N, F)`` float32, of the whole manifest; or ``(R, N, F)``, replica ``epoch % R`` in each epoch.
        target: ``(N,)`` int64, or ``(N, P, 2)`` float32 in unit coordinates.
    """

    values: npt.NDArray[np.float32]
    target: npt.NDArray[Any]


def within_square(target: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return targets with points outside the unit square as NaN, as `augment.run` gives them; classes as they are."""
    if target.ndim == 1:
        return target
    return np.where(augment.outside(target)[..., None], np.float32(np.nan), target)


class Batches:
    """The training batches of one phase, for one process of `world`."""

    def __init__(
        self,
        order: Order,
        source: Pixels | Features,
        device: torch.device,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        weigh: Callable[[Ints], float] = len,
        mix: recipe.Augment | None = None,
        classes: int = 0,
    ) -> None:
        """Make the batches of one process.

        Args:
            order: which rows.
            source: where their inputs come from.
            device: where they go.
            workers: threads that prepare steps ahead; 0 = prepare a few when the first is asked for.
            rank: of this process.
            world: number of processes.
            weigh: what rows count in the mean of the loss: their number, the sum of their class weights, or how many
                of their points are visible (perhaps none).
            mix: mixup and cutmix, within blocks; None = off.
            classes: number of classes; needed to mix targets.
        """
        self.order, self.source, self.device, self.workers = order, source, device, workers
        self.rank, self.world, self.weigh, self.mix, self.classes = rank, world, weigh, mix, classes

    def load(self, phase: int, epoch: int, step: int) -> list[MicroBatch]:
        """Make this process's part of one step."""
        micro = self.order.step(phase, epoch, step)
        whole = sum(float(self.weigh(rows)) for rows in micro)
        made = []
        for number, rows in enumerate(micro):
            starts = range(self.rank * BLOCK, len(rows), self.world * BLOCK)
            blocks = [(start // BLOCK, rows[start : start + BLOCK]) for start in starts]
            if blocks:
                mine = np.concatenate([block for _, block in blocks])
                inputs, target = self._inputs(blocks, [self.order.seed, phase, epoch, step, number])
                made.append(MicroBatch(inputs, target, mine, float(self.weigh(mine)) / (whole or 1.0)))
        return made

    def _inputs(self, blocks: list[tuple[int, Ints]], seed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.source, Features):
            rows = np.concatenate([block for _, block in blocks])
            values = self.source.values
            replica = values[seed[2] % len(values)] if values.ndim == 3 else values
            return torch.from_numpy(replica[rows]), torch.from_numpy(self.source.target[rows])
        parts = [self.source.block(rows, seed_of(*seed, number)) for number, rows in blocks]
        if self.mix is None:
            images = torch.from_numpy(np.concatenate([images for images, _ in parts])).permute(0, 3, 1, 2)
            return images, torch.from_numpy(np.concatenate([target for _, target in parts]))
        mixed = [self._mixed(*part, seed) for part in parts]
        return torch.cat([images for images, _ in mixed]), torch.cat([shares for _, shares in mixed])

    def _mixed(
        self, images: npt.NDArray[np.uint8], target: npt.NDArray[Any], seed: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a block with itself; the dice are the micro-batch's, so all its blocks are mixed alike."""
        assert self.mix is not None
        shares = one_hot(torch.from_numpy(target), self.classes)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return augment.mix(pixels, shares, self.mix, np.random.default_rng(seed))

    def stream(self, phase: int, epoch: int, start: int = 0) -> Iterator[list[MicroBatch]]:
        """Give the steps of an epoch from `start` on, on the device; threads stay a few steps ahead if asked."""
        steps = range(start, self.order.steps)
        if not self.workers:
            for first in range(0, len(steps), AT_ONCE):
                for micro in [self.load(phase, epoch, step) for step in steps[first : first + AT_ONCE]]:
                    yield self._sent(micro)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            ahead = deque(pool.submit(self.load, phase, epoch, step) for step in steps[: 2 * self.workers])
            for step in steps:
                ready = ahead.popleft().result()
                if step + len(ahead) + 1 < self.order.steps:
                    ahead.append(pool.submit(self.load, phase, epoch, step + len(ahead) + 1))
                yield self._sent(ready)

    def _sent(self, micro: list[MicroBatch]) -> list[MicroBatch]:
        if self.device.type == "cpu":
            return micro
        pin = self.device.type == "cuda"
        return [
            batch._replace(
                inputs=(batch.inputs.pin_memory() if pin else batch.inputs).to(self.device, non_blocking=True),
                target=(batch.target.pin_memory() if pin else batch.target).to(self.device, non_blocking=True),
            )
            for batch in micro
        ]
