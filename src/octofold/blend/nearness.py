"""Nearness: test images beside training images in the embedding of a member, and the training images each is like."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from octofold.blend.lineup import Lineup, cache_of, check_weights, held_rows
from octofold.blend.shift import Distance, measure, pooled
from octofold.data.images import PixelCache, PixelSpec, open_cache
from octofold.data.manifest import Manifest
from octofold.files import atomic, sha256_json
from octofold.recipe import Model
from octofold.track import registry
from octofold.track.registry import Slot

Array = npt.NDArray[Any]
BATCH = 32


class Near(NamedTuple):
    """Test against train, and for each test image the training images it is most like, with their similarity."""

    distance: Distance
    images: list[list[tuple[str, float]]]


def compare(lineup: Lineup, weights: Array, test: Manifest, enough: int = 600) -> Near | None:
    """Compare test with training images in the embedding of the member that weighs most.

    One fold model after another speaks, until `enough` held-out rows were compared.
    """
    name = lineup.names[int(np.argmax(weights))]
    parts, seen = [], 0
    for slot in lineup.slots[name]:
        if slot.seed != lineup.slots[name][0].seed:
            continue
        held = held_rows(lineup, slot)
        if not held.any() or held.all():
            continue
        parts.append(measure(embed(slot, lineup.rows), held, embed(slot, test)))
        seen += int(held.sum())
        if seen >= enough:
            break
    if not parts:
        return None
    paths = lineup.rows.table["path"].to_numpy(str)
    near = [
        [(str(paths[row]), float(score)) for row, score in zip(rows, scores, strict=True)]
        for rows, scores in zip(parts[0].nearest, parts[0].similarity, strict=True)
    ]
    return Near(pooled(parts), near)


def embed(slot: Slot, images: Manifest) -> Array:
    """Return the pooled features ``(N, F)`` float32 of one fold model's trunk, upright view, cached like `predict`."""
    import torch

    from octofold.nets.models import read_model

    key = sha256_json([slot.model_sha, sorted(images.sample_ids.tolist()), "features"])
    file = cache_of(images) / f"{key[:32]}.npz"
    if file.exists():
        stored = np.load(file)
        place = {name: row for row, name in enumerate(stored["ids"].tolist())}
        return np.asarray(stored["features"][[place[name] for name in images.sample_ids.tolist()]])
    net, card = read_model(registry.fetch(slot))
    check_weights(slot, card.model_sha)
    pixels = open_cache(images, PixelSpec.of(Model.model_validate(card.recipe["model"])))
    with torch.inference_mode():
        parts = [
            net.features(torch.from_numpy(batch).permute(0, 3, 1, 2)).float().numpy()
            for batch in squares(pixels, f"{slot.name} features")
        ]
    found = np.concatenate(parts)
    with atomic(file) as temporary:
        np.savez(temporary, ids=images.sample_ids, features=found)
    return found


def squares(pixels: PixelCache, title: str) -> Iterator[npt.NDArray[np.uint8]]:
    """Batches ``(B, S, S, 3)`` of the cached photos' centre squares, with a bar on stderr."""
    for start in tqdm(range(0, len(pixels), BATCH), desc=title, unit="batch", leave=False, disable=None):
        yield np.stack([pixels.square(row) for row in range(start, min(start + BATCH, len(pixels)))])
