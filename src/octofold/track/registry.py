"""Registry: what fills a slot. Registered names are ``<competition>.<member>.f<fold>.s<seed>``, versions retrainings.

An alias (`staging`, `production`) says which version stands where; MLflow's legacy stage mirrors it. People may move
either by hand in MLflow's UI: a tag keeps what `promote` last set, so the one that differs from it is the newer will.
"""

import logging
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from octofold.errors import UserError, preview
from octofold.files import ROOT, read_json, sha256_json
from octofold.predictions import Predictions
from octofold.track import tracking, versions
from octofold.track.outage import patiently
from octofold.track.provenance import git_tags

log = logging.getLogger("octofold")
LEGACY = {"staging": "Staging", "production": "Production", "archived": "Archived"}
_NAME = re.compile(r"^(?P<competition>[\w-]+)\.(?P<member>[\w-]+)\.f(?P<fold>\d+)\.s(?P<seed>\d+)$")
_NOT_HOW = {"folds", "seeds", "runtime", "member", "tta"}


@dataclass(frozen=True)
class Slot:
    """A registered version that fills one (member, fold, seed)."""

    competition: str
    member: str
    fold: int
    seed: int
    name: str
    version: int
    run_id: str
    manifest_hash: str
    classes_hash: str
    model_sha: str
    recipe_hash: str = ""
    source: str = field(default="", repr=False)
    stage: str = field(default="None", repr=False)
    """MLflow's legacy stage of this version."""


def slot_name(competition: str, member: str, fold: int, seed: int) -> str:
    """Return the registered name of a slot."""
    return f"{competition}.{member}.f{fold}.s{seed}"


def marker(stage: str) -> str:
    """Return the registered model's tag that keeps the version `promote` last put in `stage` ("" = none)."""
    return f"octofold.{stage}"


# ---- writing --------------------------------------------------------------------------------------------------------


def register_slot(run: tracking.Run, folder: Path | str, extra: Mapping[str, str] | None = None) -> Slot:
    """Upload a checkpoint folder as the run's ``model/`` and register it; doing it twice gives the same version.

    The version is made last, after the upload was checked file by file, and with all its tags in one call: a cut at
    any moment leaves either a whole version or none.

    Args:
        run: the slot's run.
        folder: holds ``model.safetensors`` and ``model.json``, directly or in a subfolder (an MLflow model).
        extra: more tags.

    Raises:
        UserError: not a checkpoint folder, or the store kept something else than was sent.
    """
    folder = Path(folder)
    card = _card(find_checkpoint(folder))
    name = slot_name(card.competition, card.member, card.fold, card.seed)
    api = tracking.client()
    if (there := _registered(name, run.id, card.model_sha)) is not None:
        return there
    run.log_artifacts(folder, "model")
    _check_upload(run.id, folder)
    tags = {
        **{"competition": card.competition, "member": card.member, "fold": str(card.fold), "seed": str(card.seed)},
        **{"manifest_hash": card.manifest_hash, "classes_hash": classes_hash(card), "model_sha": card.model_sha},
        **{"recipe_hash": recipe_hash(card.recipe), "git.commit": git_tags()["git.commit"], **(extra or {})},
    }
    versions.ensure_registered(name, {key: tags[key] for key in ("competition", "member", "fold", "seed")})

    source = f"{run.artifact_uri.rstrip('/')}/model"

    def create() -> Slot:  # asks first, as a lost answer to the last try must not make a second version
        return _registered(name, run.id, card.model_sha) or _slot(
            api.create_model_version(name, source, run_id=run.id, tags=tags, await_creation_for=0)
        )

    return patiently(create)


def _registered(name: str, run_id: str, model_sha: str) -> Slot | None:
    made = [version for version in versions.versions_of([name], f"run_id = '{run_id}'")]
    return next((_slot(version) for version in made if version.tags.get("model_sha") == model_sha), None)


def _card(folder: Path) -> SimpleNamespace:
    """The checkpoint's card, read without importing torch: a worker that only registers is light."""
    return SimpleNamespace(**read_json(folder / "model.json", "a checkpoint folder's model.json"))


def classes_hash(card: Any) -> str:
    """Return the sha256 of task and class order: fold models that differ in it cannot be averaged."""
    return sha256_json([card.task, list(card.classes)])


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Return the sha256 of what in a recipe changes the weights: not its name, folds, seeds, views or runtime."""
    return sha256_json({key: value for key, value in recipe.items() if key not in _NOT_HOW})


def _check_upload(run_id: str, folder: Path) -> None:
    sent = {f"model/{path.relative_to(folder).as_posix()}": path.stat().st_size
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip
    kept = tracking.list_artifacts(run_id, "model")
    wrong = [name for name, size in sent.items() if kept.get(name) != size]
    if wrong:
        raise UserError(
            f"upload of run {run_id}",
            expected=f"{len(sent)} files, as sent",
            got=f"missing or cut: {preview(wrong)}",
            fix="run the same command again; nothing was registered",
        )


# ---- reading --------------------------------------------------------------------------------------------------------


def slots(competition: str, members: Sequence[str] | None = None) -> dict[str, dict[str, list[Slot]]]:
    """Return every registered version, ``{member: {slot name: versions, oldest first}}``."""
    found: dict[str, dict[str, list[Slot]]] = {}
    for model in models(competition, members):
        match = _NAME.match(model.name)
        assert match is not None  # `models` lets no other through
        found.setdefault(match["member"], {})[model.name] = []
    names = [name for group in found.values() for name in group]
    for slot in sorted(map(_slot, versions.versions_of(names)), key=lambda slot: slot.version):
        found[slot.member][slot.name].append(slot)
    return found


def newest(competition: str, members: Sequence[str] | None = None) -> dict[str, list[Slot]]:
    """Return the latest version of each slot, ``{member: slots by fold and seed}``: one listing, as `resolve`."""
    found: dict[str, list[Slot]] = {}
    for model in models(competition, members):
        if (slot := newest_of(model)) is not None:
            found.setdefault(slot.member, []).append(slot)
    return {member: sorted(found[member], key=lambda slot: (slot.fold, slot.seed)) for member in sorted(found)}


def newest_of(model: Any) -> Slot | None:
    """Return the latest version of a registered model; None if every version was deleted."""
    latest = max(model.latest_versions, key=lambda version: int(version.version), default=None)  # one per legacy stage
    return None if latest is None else _slot(latest)


def newest_on(listed: Sequence[Any], manifest_hash: str | None) -> list[Slot | None]:
    """Return the latest version of each registered model, of those trained on this manifest where there are any.

    `worth` trains a member on the manifest before too, and may do so after it was trained on the one at hand.
    """
    found = [newest_of(model) for model in listed]
    odd = [slot.name for slot in found if slot and manifest_hash and slot.manifest_hash != manifest_hash]
    there = sorted(map(_slot, versions.versions_of(odd)), key=lambda slot: slot.version) if odd else []
    fitting = {slot.name: slot for slot in there if slot.manifest_hash == manifest_hash}
    return [slot and fitting.get(slot.name, slot) for slot in found]


def resolve(competition: str, stage: str, members: Sequence[str] | None = None) -> dict[str, list[Slot]]:
    """Return the slots that stand in `stage`, ``{member: slots by fold and seed}``.

    Costs one registry listing, whatever the number of versions, unless somebody moved things by hand.

    Raises:
        UserError: a slot with two candidates, a version that is gone, or a member asked for that has none here.
    """
    chosen: dict[str, int] = {}
    emptied: dict[str, int] = {}  # `promote` filled them, and now nobody stands there
    known: dict[tuple[str, int], Any] = {}
    for model in models(competition, members):
        latest = {version.current_stage: version for version in model.latest_versions}
        known |= {(model.name, int(version.version)): version for version in model.latest_versions}
        wanted = choose(model, stage, latest)
        if wanted is not None:
            chosen[model.name] = wanted
        elif (record := _number(model.tags.get(marker(stage)))) is not None:
            emptied[model.name] = record
    missing = [name for name, version in (emptied | chosen).items() if (name, version) not in known]
    known |= {(version.name, int(version.version)): version for version in versions.versions_of(missing)}
    for name, version in (emptied | chosen).items():
        if (name, version) not in known:  # MLflow deletes an alias with its version: only the record tells
            raise UserError(
                f"alias {stage} of {name}",
                expected=f"version {version}",
                got="deleted",
                fix=f"promote again; if the slot shall stay empty, delete the registered model's tag {marker(stage)}",
            )
    found: dict[str, list[Slot]] = {}
    for name, version in chosen.items():
        slot = _slot(known[name, version])
        found.setdefault(slot.member, []).append(slot)
    absent = [member for member in members or () if member not in found]
    if absent:
        raise UserError(
            f"member '{absent[0]}' of {competition}",
            expected=f"registered fold models in {stage}",
            got=f"none ({stage} holds: {preview(found) or 'nothing'})",
            fix=f"python entrypoints/promote.py --competition {competition} --member {absent[0]} --stage {stage}",
        )
    return {member: sorted(found[member], key=lambda slot: (slot.fold, slot.seed)) for member in sorted(found)}


def choose(model: Any, stage: str, latest: Mapping[str, Any]) -> int | None:
    """Decide which version of a registered model stands in `stage`, from alias, legacy stage and `promote`'s record.

    Args:
        model: MLflow's registered model.
        stage: ``staging`` or ``production``.
        latest: its highest version in each legacy stage.

    Raises:
        UserError: alias and legacy stage were both moved by hand, to different versions.
    """
    record = _number(model.tags.get(marker(stage)))
    alias = _number(model.aliases.get(stage))
    mirror = latest.get(LEGACY[stage])
    staged = int(mirror.version) if mirror is not None else None
    higher = latest.get(LEGACY["production"])
    if stage == "staging" and staged is None and alias is not None and higher and int(higher.version) == alias:
        staged = alias  # one version in both: MLflow has room for one legacy stage only, and shows Production
    if alias == staged or not versions.has_stages():
        return alias
    if alias == record:
        log.info("%s: %s is %s, set by hand as MLflow stage", model.name, stage, staged or "nobody")
        return staged
    if staged == record:
        return alias
    raise UserError(
        f"{model.name}, {stage}",
        expected="alias and stage on one version",
        got=f"alias on version {alias or 'none'}, MLflow stage on version {staged or 'none'}",
        fix=f"set one of them right in MLflow's UI, or: promote --competition {model.name.split('.')[0]} "
        f"--member {model.name.split('.')[1]} --stage {stage}",
    )


def fetch(slot: Slot) -> Path:
    """Return a local checkpoint folder of a registered version; downloads are kept by the weights' sha256.

    Raises:
        UserError: the version was deleted, or its files are gone or not those registered.
    """
    where = f"{slot.name} version {slot.version}"
    kept = ROOT / "mlruns" / "cache" / kept_as(versions.existing_version(slot.name, slot.version))
    if (kept / "model.json").exists():
        return kept
    folder = find_checkpoint(tracking.fetch_uri(slot.source, where), where)
    sha = getattr(_card(folder), "model_sha", "")
    if slot.model_sha and sha != slot.model_sha:
        raise UserError(
            where,
            expected=f"weights with sha256 {slot.model_sha[:12]}",
            got=f"model.json of {sha[:12] or 'none'}",
            fix="the stored model was replaced; train the slot again or promote another version",
        )
    if not slot.source.startswith(("mlflow-artifacts:", "http", "s3:", "gs:")):
        return folder
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        whole = Path(shutil.copytree(folder, Path(scratch) / "model"))
        if not kept.exists():
            whole.rename(kept)
    return kept


def kept_as(version: Any) -> str:
    """Return the folder name a version's download is kept by.

    MLflow's UI registers without tags: then nobody knows the weights' sha256 before they are here.
    """
    return version.tags.get("model_sha") or sha256_json([version.name, int(version.version), version.source])


def oof(slot: Slot, views: str) -> Predictions | None:
    """Return the slot's stored out-of-fold predictions in these views, or None if train did not store them.

    Raises:
        UserError: the run is gone or the file is damaged.
    """
    tracking.get_run(slot.run_id)
    path = f"oof/{views}.parquet"
    if path not in tracking.list_artifacts(slot.run_id, "oof"):
        return None
    return Predictions.load(tracking.download(slot.run_id, path))


def find_checkpoint(folder: Path, what: str = "") -> Path:
    """Return the folder inside `folder` (or itself) that holds ``model.json`` and ``model.safetensors``.

    Raises:
        UserError: none does.
    """
    for card in sorted(folder.rglob("model.json"), key=lambda path: len(path.parts)):
        if (card.parent / "model.safetensors").exists():
            return card.parent
    raise UserError(what or folder, expected="a checkpoint folder (model.json, model.safetensors)", got="no such files")


def models(competition: str, members: Sequence[str] | None) -> list[Any]:
    """Return MLflow's registered models of a competition's slots: aliases, tags, the latest version of each stage."""
    listed = versions.registered_models(f"{competition}." + (f"{members[0]}." if members and len(members) == 1 else ""))
    parsed = [(model, _NAME.match(model.name)) for model in listed]
    wanted = None if members is None else set(members)
    return [
        model
        for model, match in parsed
        if match and match["competition"] == competition and (wanted is None or match["member"] in wanted)
    ]


def _slot(version: Any) -> Slot:
    match = _NAME.match(version.name)
    if match is None:
        raise UserError(f"registered model '{version.name}'", expected="<competition>.<member>.f<fold>.s<seed>")
    tags = version.tags
    return Slot(
        competition=match["competition"],
        member=match["member"],
        fold=int(match["fold"]),
        seed=int(match["seed"]),
        name=version.name,
        version=int(version.version),
        run_id=version.run_id or "",
        manifest_hash=tags.get("manifest_hash", ""),
        classes_hash=tags.get("classes_hash", ""),
        model_sha=tags.get("model_sha", ""),
        recipe_hash=tags.get("recipe_hash", ""),
        source=version.source,
        stage=version.current_stage,
    )


def _number(text: Any) -> int | None:
    return int(text) if text not in (None, "") else None
