"""The lineup: a stage's fold models with their OOF, aligned, and what they say of the test images, cached."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from octofold import predictions, registry
from octofold.errors import UserError, preview
from octofold.files import ROOT, atomic, sha256_json
from octofold.images import PixelCache, PixelSpec, open_cache
from octofold.inference import predict_rows
from octofold.manifest import Manifest
from octofold.predictions import Predictions
from octofold.recipe import Model
from octofold.registry import Slot

if TYPE_CHECKING:
    from octofold.models import ModelCard, Net

Array = npt.NDArray[Any]
log = logging.getLogger("octofold")
BATCH = 32


@dataclass(frozen=True)
class Lineup:
    """Members over the same training rows.

    Attributes:
        slots: member name -> its fold models, sorted by fold and seed.
        oof: ``(M, N, K)`` or ``(M, N, P, 2)`` float32, each member's out-of-fold predictions, seeds averaged.
        per_seed: one array like `oof` for each seed that every member has on every fold; empty if there is only one.
        rows: the N training samples that every member predicted without having trained on them.
        views: row of `tta.VIEWS` all was predicted with.
        left_out: manifest rows that some member has no such prediction for.
    """

    slots: dict[str, list[Slot]]
    oof: Array
    per_seed: list[Array]
    rows: Manifest
    views: str
    left_out: int = 0

    @property
    def names(self) -> list[str]:
        """Members in the order of `oof`."""
        return list(self.slots)

    @property
    def pins(self) -> list[dict[str, Any]]:
        """Name, version and sha256 of every model used."""
        return [
            {
                "member": slot.member,
                "fold": slot.fold,
                "seed": slot.seed,
                "name": slot.name,
                "version": slot.version,
                "run_id": slot.run_id,
                "sha256": slot.model_sha,
                "manifest_hash": slot.manifest_hash,
            }
            for slots in self.slots.values()
            for slot in slots
        ]


def gather(
    competition: str, stage: str, members: Sequence[str], manifest: Manifest, views: str, mixed: bool = False
) -> Lineup:
    """Take every member in a stage, with OOF made in the same views as the test predictions will be.

    Args:
        competition: name of the problem.
        stage: ``staging`` or ``production``.
        members: only these; empty = all.
        manifest: the training data the blend is fitted on.
        views: row of `tta.VIEWS`; OOF not stored in these views is predicted now.
        mixed: let members of other data versions in, on the rows that each predicted without having trained on them.

    Raises:
        UserError: nothing in the stage, or members of another manifest, class order or fold set.
    """
    found = registry.resolve(competition, stage, list(members) or None)
    if not found:
        raise UserError(
            f"stage '{stage}' of {competition}",
            expected="at least one member",
            got="none",
            fix=f"python entrypoints/promote.py --competition {competition} --member NAME --stage {stage}",
        )
    slots = {name: sorted(found[name], key=lambda slot: (slot.fold, slot.seed)) for name in sorted(found)}
    for name, own in slots.items():
        odd = [slot for slot in own if slot.manifest_hash != manifest.hash]
        if odd and not mixed:
            raise UserError(
                f"member '{name}' ({odd[0].name} version {odd[0].version})",
                expected=f"trained on manifest {manifest.hash[:12]} ({manifest.file})",
                got=f"manifest {odd[0].manifest_hash[:12]}",
                fix=f"train it again on this manifest, leave it out by --members, or allow it by --mixed "
                f"(members: {preview(slots, 9)})",
            )
    whole = {name: _member_oof(own, manifest, views, mixed) for name, own in slots.items()}
    shared = set(manifest.sample_ids.tolist())
    for oof in whole.values():
        shared &= set(oof.sample_ids.tolist())
    if len(shared) < len(manifest.table) and not mixed:
        name, oof = min(whole.items(), key=lambda item: len(item[1].sample_ids))
        raise UserError(
            f"member '{name}'",
            expected=f"OOF for all {len(manifest.table)} samples",
            got=f"{len(oof.sample_ids)}: folds {sorted({slot.fold for slot in slots[name]})} of {manifest.folds}",
            fix="train the missing folds, leave the member out by --members, or blend on shared rows by --mixed",
        )
    if not shared:
        raise UserError("mixed members", expected="samples that all of them predicted out-of-fold", got="none")
    rows = manifest.take(np.array([name in shared for name in manifest.sample_ids.tolist()]))
    aligned = [whole[name].reorder(manifest.classes).take(rows.sample_ids).values for name in slots]
    left_out = len(manifest.table) - len(rows.table)
    return Lineup(slots, np.stack(aligned), _per_seed(slots, rows, views, mixed), rows, views, left_out)


def _member_oof(slots: Sequence[Slot], manifest: Manifest, views: str, mixed: bool) -> Predictions:
    """Average seeds within each fold, then join folds."""
    parts = []
    for fold in sorted({slot.fold for slot in slots}):
        seeds = [slot_oof(slot, manifest, views, mixed) for slot in slots if slot.fold == fold]
        parts.append(predictions.average(seeds))
    return predictions.concatenate([replace(part, seed=None) for part in parts])


def _per_seed(slots: dict[str, list[Slot]], rows: Manifest, views: str, mixed: bool) -> list[Array]:
    """OOF of each seed that all members have on the same folds, as far as it can be had without predicting again."""
    seeds = set.intersection(*({slot.seed for slot in own} for own in slots.values()))
    found = []
    for seed in sorted(seeds) if len(seeds) > 1 else []:
        chosen = {name: [slot for slot in own if slot.seed == seed] for name, own in slots.items()}
        if any({s.fold for s in chosen[name]} != {s.fold for s in slots[name]} for name in slots):
            continue
        whole = [_member_oof(own, rows, views, mixed).reorder(rows.classes).take(rows.sample_ids).values
                 for own in chosen.values()]
        found.append(np.stack(whole))
    return found if len(found) > 1 else []


def slot_oof(slot: Slot, manifest: Manifest, views: str, mixed: bool = False) -> Predictions:
    """Return a fold model's predictions of the rows held out of it, stored by train or made now.

    Raises:
        UserError: the slot's data is not the manifest's, so nobody knows which rows were held out.
    """
    stored = registry.oof(slot, views)
    if stored is not None:
        if stored.views != views or stored.fold is None:
            raise UserError(f"OOF of {slot.name}", expected=f"out-of-fold, views {views}", got=stored.views)
        return stored
    if slot.manifest_hash != manifest.hash and mixed:
        raise UserError(
            f"OOF of {slot.name} version {slot.version}",
            expected=f"stored with views {views}, as its manifest is not at hand",
            got="none",
            fix="choose the views it was trained with (--tta), or leave the member out",
        )
    held = manifest.take(manifest.fold == slot.fold)
    log.info("%s: no stored OOF with views %s, predicting its %d held-out rows", slot.name, views, len(held.table))
    return replace(predict(slot, held, views), fold=held.fold)


def predict(slot: Slot, images: Manifest, views: str) -> Predictions:
    """Predict a manifest's images with one fold model, from the cache if the same weights did so before.

    The cache is keyed by weights, images and views, under ``data/<competition>/cache/predictions``.
    """
    key = sha256_json([slot.model_sha, sorted(images.sample_ids.tolist()), views])
    file = ROOT / "data" / images.competition / "cache" / "predictions" / f"{key[:32]}.parquet"
    if file.exists():
        return Predictions.load(file).take(images.sample_ids)
    net, card, pixels = _open(slot, images)
    values = predict_rows(net, card, squares(pixels, slot.name), pixels.frames, views)
    said = {
        name: Predictions(
            sample_ids=images.sample_ids,
            values=part,
            classes=card.classes,
            manifest_hash=card.manifest_hash,
            member=slot.member,
            model_sha=card.model_sha,
            views=name,
            seed=slot.seed,
        )
        for name, part in values.items()
    }
    said[views].save(file)
    return said[views]


def embed(slot: Slot, images: Manifest) -> Array:
    """Return the pooled features ``(N, F)`` float32 of one fold model's trunk, upright view, cached like `predict`."""
    import torch

    key = sha256_json([slot.model_sha, sorted(images.sample_ids.tolist()), "features"])
    file = ROOT / "data" / images.competition / "cache" / "predictions" / f"{key[:32]}.npz"
    if file.exists():
        stored = np.load(file)
        place = {name: row for row, name in enumerate(stored["ids"].tolist())}
        return np.asarray(stored["features"][[place[name] for name in images.sample_ids.tolist()]])
    net, _, pixels = _open(slot, images)
    with torch.inference_mode():
        parts = [
            net.features(torch.from_numpy(batch).permute(0, 3, 1, 2)).float().numpy()
            for batch in squares(pixels, f"{slot.name} features")
        ]
    found = np.concatenate(parts)
    with atomic(file) as temporary:
        np.savez(temporary, ids=images.sample_ids, features=found)
    return found


def _open(slot: Slot, images: Manifest) -> tuple["Net", "ModelCard", PixelCache]:
    from octofold.models import read_model

    net, card = read_model(registry.fetch(slot))
    if card.model_sha != slot.model_sha:
        raise UserError(
            f"{slot.name} version {slot.version}",
            expected=f"weights with sha256 {slot.model_sha[:12]}",
            got=card.model_sha[:12],
            fix="the stored model was replaced; train the slot again or promote another version",
        )
    return net, card, open_cache(images, PixelSpec.of(Model.model_validate(card.recipe["model"])))


def squares(pixels: PixelCache, title: str) -> Iterator[npt.NDArray[np.uint8]]:
    """Batches ``(B, S, S, 3)`` of the cached photos' centre squares, with a bar on stderr."""
    for start in tqdm(range(0, len(pixels), BATCH), desc=title, unit="batch", leave=False, disable=None):
        yield np.stack([pixels.square(row) for row in range(start, min(start + BATCH, len(pixels)))])


def test_manifest(manifest: Manifest, path: Path | None = None) -> Manifest | None:
    """Read the ``test.csv`` beside a manifest, if prepare wrote one."""
    from octofold.manifest import read

    file = path or (manifest.file.parent / "test.csv" if manifest.file else None)
    return read(file) if file is not None and file.exists() else None
