"""The lineup: a stage's fold models with their OOF, aligned, and what they say of the test images, cached."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octofold import predictions
from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import ROOT, sha256_json
from octofold.infer import ensemble
from octofold.infer.combining import Blend
from octofold.infer.inference import predict_manifest
from octofold.metrics import accuracy, point_mse
from octofold.nets.models import read_card
from octofold.predictions import Predictions
from octofold.track import registry
from octofold.track.registry import Slot

Array = npt.NDArray[Any]
log = logging.getLogger("octofold")


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
        experts: for each of the **last** members that were trained on two classes only, the indices of the two. They
            have no vote; blends gate them (`blending.fit`).
    """

    slots: dict[str, list[Slot]]
    oof: Array
    per_seed: list[Array]
    rows: Manifest
    views: str
    left_out: int = 0
    experts: tuple[tuple[int, int], ...] = ()

    @property
    def voters(self) -> int:
        """How many members, the first, know all classes."""
        return len(self.slots) - len(self.experts)

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
    if not mixed:
        _check_versions(slots, manifest)
    pairs = {name: pair for name, own in slots.items() if (pair := _pair(own[0], manifest)) is not None}
    if len(pairs) == len(slots):
        raise UserError(
            f"stage '{stage}' of {competition}", expected="a member that knows all classes",
            got=f"pair experts alone: {preview(pairs, 9)}", fix="promote one trained without `classes`",
        )  # fmt: skip
    slots = {name: slots[name] for name in sorted(slots, key=lambda name: (name in pairs, name))}
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
    experts = tuple(pairs[name] for name in slots if name in pairs)
    per_seed = _per_seed(slots, manifest, rows.sample_ids, views, mixed)
    return Lineup(slots, np.stack(aligned), per_seed, rows, views, left_out, experts)


def _check_versions(slots: dict[str, list[Slot]], manifest: Manifest) -> None:
    for name, own in slots.items():
        odd = [slot for slot in own if slot.manifest_hash != manifest.hash]
        if odd:
            raise UserError(
                f"member '{name}' ({odd[0].name} version {odd[0].version})",
                expected=f"trained on manifest {manifest.hash[:12]} ({manifest.file})",
                got=f"manifest {odd[0].manifest_hash[:12]}",
                fix=f"train it again on this manifest, leave it out by --members, or allow it by --mixed "
                f"(members: {preview(slots, 9)})",
            )


def _pair(slot: Slot, manifest: Manifest) -> tuple[int, int] | None:
    """The two classes a member was trained on, if its recipe narrowed it to two.

    Raises:
        UserError: it was narrowed to more: nobody knows when it should speak; or to a class that is no more.
    """
    card = read_card(registry.fetch(slot))
    wanted = [name for name in card.recipe.get("classes", []) if name in card.classes]
    if not wanted or len(wanted) == len(card.classes):
        return None
    if len(wanted) != 2:
        raise UserError(
            f"member '{slot.member}'", expected="a member of all classes, or an expert for two of them",
            got=f"one of {len(wanted)}: {preview(wanted)}", fix="leave it out by --members",
        )  # fmt: skip
    gone = [name for name in wanted if name not in manifest.classes]
    if gone:
        raise UserError(
            f"member '{slot.member}'", expected="an expert for two classes of this manifest",
            got=f"'{gone[0]}', which it lacks: {preview(manifest.classes)}", fix="leave it out by --members",
        )  # fmt: skip
    a, b = (manifest.classes.index(name) for name in wanted)
    return min(a, b), max(a, b)


def _member_oof(slots: Sequence[Slot], manifest: Manifest, views: str, mixed: bool) -> Predictions:
    """Average seeds within each fold, then join folds."""
    parts = []
    for fold in sorted({slot.fold for slot in slots}):
        seeds = [slot_oof(slot, manifest, views, mixed) for slot in slots if slot.fold == fold]
        parts.append(predictions.average(seeds))
    return predictions.concatenate([replace(part, seed=None) for part in parts])


def _per_seed(
    slots: dict[str, list[Slot]], manifest: Manifest, shared: npt.NDArray[np.str_], views: str, mixed: bool
) -> list[Array]:
    """OOF of the shared rows, of each seed that all members have on the same folds, as far as it can be had cheaply."""
    seeds = set.intersection(*({slot.seed for slot in own} for own in slots.values()))
    found = []
    for seed in sorted(seeds) if len(seeds) > 1 else []:
        chosen = {name: [slot for slot in own if slot.seed == seed] for name, own in slots.items()}
        if any({s.fold for s in chosen[name]} != {s.fold for s in slots[name]} for name in slots):
            continue
        whole = [
            _member_oof(own, manifest, views, mixed).reorder(manifest.classes).take(shared).values
            for own in chosen.values()
        ]
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
    return replace(predict([slot], held, views)[0], fold=held.fold)


def held_rows(lineup: Lineup, slot: Slot) -> npt.NDArray[np.bool_]:
    """Rows ``(N,)`` held out of a fold model; where it has another manifest, with other folds, its stored OOF says."""
    stored = None if slot.manifest_hash == lineup.rows.hash else registry.oof(slot, lineup.views)
    if stored is None:
        return np.asarray(lineup.rows.fold == slot.fold)
    return np.isin(lineup.rows.sample_ids, stored.sample_ids)


def predict(slots: Sequence[Slot], images: Manifest, views: str) -> list[Predictions]:
    """Predict a manifest's images with each fold model, from the cache where the same weights did so before.

    The cache is keyed by weights, images and views, under ``data/<competition>/cache/predictions``. What it lacks is
    predicted in one pass over the images per data version.
    """
    ids = sorted(images.sample_ids.tolist())

    def file(slot: Slot, name: str) -> Path:
        return cache_of(images) / f"{sha256_json([slot.model_sha, ids, name])[:32]}.parquet"

    missing = [slot for slot in slots if not file(slot, views).exists()]
    for version in sorted({slot.manifest_hash for slot in missing}):
        some = [slot for slot in missing if slot.manifest_hash == version]
        crew = ensemble.load_bag([registry.fetch(slot) for slot in some])
        for slot, voice in zip(some, crew.voices, strict=True):
            check_weights(slot, voice.card.model_sha)
        for slot, said in zip(some, predict_manifest(crew, images, views), strict=True):
            for name, values in said.items():
                values.save(file(slot, name))
    return [Predictions.load(file(slot, views)).take(images.sample_ids) for slot in slots]


def cache_of(images: Manifest) -> Path:
    """Where predictions and features of these images are kept."""
    return ROOT / "data" / images.competition / "cache" / "predictions"


def check_weights(slot: Slot, sha: str) -> None:
    """Refuse weights that are not the ones registered."""
    if sha != slot.model_sha:
        raise UserError(
            f"{slot.name} version {slot.version}",
            expected=f"weights with sha256 {slot.model_sha[:12]}",
            got=sha[:12],
            fix="the stored model was replaced; train the slot again or promote another version",
        )


@dataclass(frozen=True)
class Spoken:
    """What the models say of the test images.

    Attributes:
        votes: ``(S, T, …)`` of every fold model.
        members: ``(M, T, …)`` bagged.
        final: ``(T, …)`` blended.
        shares: per member, of its fold models.
    """

    votes: Array
    members: Array
    final: Array
    shares: list[npt.NDArray[np.float64]]


def speak(lineup: Lineup, blend: Blend, test: Manifest, bag: str) -> Spoken:
    """Predict the test images by every fold model, bag them, blend them."""
    said = votes(lineup, test)
    parts = shares(lineup, bag, blend.params.get("per_fold"))
    members = bagged(said, parts)
    return Spoken(said, members, blend.apply(members), parts)


def votes(lineup: Lineup, test: Manifest, views: str = "") -> Array:
    """Return what each fold model, in the order of `pins`, says of test images: ``(S, T, K)`` or ``(S, T, P, 2)``."""
    slots = [slot for own in lineup.slots.values() for slot in own]
    said = predict(slots, test, views or lineup.views)
    return np.stack([one.reorder(lineup.rows.classes).values for one in said])


def shares(lineup: Lineup, bag: str, per_fold: dict[str, list[float]] | None = None) -> list[npt.NDArray[np.float64]]:
    """Return each member's shares of its fold models, in slot order, each summing to 1.

    Args:
        lineup: the members.
        bag: ``equal``, or ``oof_acc``: by each fold model's score on its own held-out rows (original 000).
        per_fold: members' weights for each fold, of `blending.lr_mse_per_fold`: a fold model then counts by its
            fold's weight. The blend's weights are the mean over folds, so only the shares carry the difference.
    """
    found = []
    for place, slots in enumerate(lineup.slots.values()):
        raw = np.array([_own_score(lineup, place, slot) if bag == "oof_acc" else 1.0 for slot in slots])
        if per_fold and place < lineup.voters:
            mean = np.mean(list(per_fold.values()), axis=0).tolist()  # where a fold has no rows here
            raw = raw * np.array([per_fold.get(str(slot.fold), mean)[place] for slot in slots])
        found.append(raw / raw.sum() if raw.sum() > 0 else np.full(len(slots), 1 / len(slots)))
    return found


def _own_score(lineup: Lineup, member: int, slot: Slot) -> float:
    rows = held_rows(lineup, slot)
    if not rows.any():
        return 0.0
    values, target = lineup.oof[member][rows], lineup.rows.target[rows]
    if sum(other.fold == slot.fold for other in lineup.slots[slot.member]) > 1:  # `oof` is the seeds' average
        own = slot_oof(slot, lineup.rows, lineup.views).reorder(lineup.rows.classes)
        values = own.take(lineup.rows.sample_ids[rows]).values
    return point_mse(values, target) ** -1 if values.ndim == 3 else accuracy(values, target)


def bagged(said: Array, parts: Sequence[Array]) -> Array:
    """Average fold models within each member: ``(S, T, …)`` votes and shares to ``(M, T, …)``."""
    start, found = 0, []
    for share in parts:
        own = said[start : start + len(share)]
        found.append(np.tensordot(share, own.astype(np.float64), axes=1))
        start += len(share)
    return np.stack(found).astype(np.float32)


def by_fold(lineup: Lineup, said: Array) -> list[Array]:
    """Take fold models apart again: for each fold all members have, ``(M, T, …)``, seeds averaged as in the OOF.

    Members of other data versions may have no fold number in common. Their numbers mean nothing to each other, and no
    test image was trained on: then the members' first folds speak together, their second, as far as all have one.
    """
    slots = [(place, slot.fold) for place, own in enumerate(lineup.slots.values()) for slot in own]
    folds = [sorted({slot.fold for slot in own}) for own in lineup.slots.values()]
    shared = sorted(set.intersection(*map(set, folds)))
    teams = zip(*([shared] * len(folds) if shared else folds), strict=False)
    return [
        np.stack(
            [np.mean([said[row] for row, slot in enumerate(slots) if slot == one], axis=0) for one in enumerate(team)]
        )
        for team in teams
    ]


def signed(lineup: Lineup, test: Manifest, values: Array, name: str = "blend") -> Predictions:
    """Put a name to blended values ``(T, …)`` of the test images."""
    return replace(_signed(lineup, test, values, name), extra={"members": lineup.names})


def signed_oof(lineup: Lineup, values: Array, name: str = "blend") -> Predictions:
    """Put a name to cross-fitted values ``(N, …)`` of the training rows."""
    return replace(_signed(lineup, lineup.rows, values, name), fold=lineup.rows.fold)


def _signed(lineup: Lineup, rows: Manifest, values: Array, name: str) -> Predictions:
    shas = [slot.model_sha for own in lineup.slots.values() for slot in own]
    return Predictions(
        sample_ids=rows.sample_ids,
        values=values,
        classes=lineup.rows.classes,
        manifest_hash=lineup.rows.hash,
        member=name,
        model_sha=predictions.bag_sha(shas),
        views=lineup.views,
    )


def test_set(manifest: Manifest) -> Manifest | None:
    """Read the ``test.csv`` beside a manifest, if prepare wrote one."""
    from octofold.data.manifest import read

    file = manifest.file.parent / "test.csv" if manifest.file else None
    return read(file) if file is not None and file.exists() else None
