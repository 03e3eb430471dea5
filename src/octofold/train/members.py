"""Members: a recipe over folds and seeds, one parent run, one child run and one registered version per slot.

Whatever is interrupted goes on: a run is found again by its tags (recipe, manifest, slot), and each step of filling a
slot may be repeated without leaving a second trace. Commands on several machines share a member's slots (`leases`).
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from octofold import compute, plots
from octofold.commands import Train
from octofold.compute import Devices, device_setup
from octofold.config import dump, flatten
from octofold.data import manifest
from octofold.data.manifest import Manifest
from octofold.errors import Handover, UserError, preview
from octofold.files import ROOT, read_json
from octofold.infer import serving
from octofold.metrics import fingerprint
from octofold.nets import gallery
from octofold.nets.models import read_card
from octofold.nets.tasks import make_task
from octofold.predictions import Predictions, average, concatenate
from octofold.recipe import Recipe
from octofold.track import leases, promotion, registry, tracking, versions
from octofold.track.leases import Lessee
from octofold.track.outage import patiently
from octofold.track.provenance import outlive
from octofold.track.tracking import RunInfo
from octofold.train import checkpoint, harden, interrupt, origin, training
from octofold.workers import Job

log = logging.getLogger("octofold")
Filled = tuple[dict[str, Predictions], str]  # a slot's OOF by views, its registered name and version
WAIT_S = 10.0
"""Between two looks at slots that other commands hold, seconds (or a sixth of the lease, if that is less)."""


@dataclass(frozen=True)
class Call:
    """One `train` command: what it trains, and as whom it holds slots."""

    config: Train
    recipe: Recipe
    table: Manifest
    devices: Devices
    lessee: Lessee
    tags: dict[str, str]
    """What every run of the member carries."""

    @property
    def parent_id(self) -> str:
        """The member's parent run."""
        return self.lessee.parent_id


def train(config: Train) -> dict[str, Any]:
    """Train, track and register every slot of a member.

    Returns:
        ``run_id`` of the parent, ``member``, ``slots`` with their registered versions, and the headline metrics.

    Raises:
        UserError: an unfinished slot of another recipe, manifest or code; a diverging loss; a missing file.
    """
    table = manifest.read(config.manifest)
    recipe = Recipe(**{name: getattr(config, name) for name in Recipe.model_fields})
    folds = manifest.check_folds(table, config.folds)
    jobs = [(fold, seed) for seed in config.seeds for fold in folds]
    tags = _tags(recipe, table)
    devices = device_setup(recipe.runtime.device, recipe.runtime.threads)
    if not devices.is_main:
        _accompany(recipe, table, devices)
    for smell in recipe.smells():
        log.warning("%s: %s", recipe.member, smell)
    runs = [] if config.restart else tracking.find_runs(table.competition, tags)
    for fold, seed in jobs:
        _check_slot(config, recipe, table, runs, fold, seed)
    interrupt.clear([_member_folder(table, recipe), *(_folder(table, recipe, *job) for job in jobs)])
    known, is_new = None, True
    if not config.restart:
        known, is_new = leases.sole_run(table.competition, recipe.member, tags | {"entry": "train"})
    with (
        tracking.run("train", None, table.competition, recipe.member, tags, resume_id=known) as parent,
        leases.lessee(parent.id, config.lease_min * 60) as lessee,
    ):
        # The calls of a member share this run, and a param never changes: which slots the last one scored, tags say.
        settings = flatten(config).items()
        parent.log_params({f"cfg.{key}": value for key, value in settings if key not in ("folds", "seeds")})
        parent.log_text(dump(config), "config.yaml")
        parent.log_dataset(table.table, table.competition, "training", str(table.file))
        if is_new:
            for name, figure in gallery.draw(recipe, table).items():
                parent.log_figure(figure, f"augment/{name}.png")
        filled = _fill_all(Call(config, recipe, table, devices, lessee, tags), jobs)
        devices.from_main(None)  # nothing more for the processes that accompany
        parts: dict[int, list[dict[str, Predictions]]] = {}
        for (_, seed), (oof, _) in filled.items():
            parts.setdefault(seed, []).append(oof)
        slots = [version for _, version in filled.values()]
        metrics = _score(recipe, table, parts, parent)
        _log_latest(parent, metrics)
        parent.set_tags({"folds": ",".join(map(str, folds)), "seeds": ",".join(map(str, config.seeds))})
        if config.stage:
            promotion.promote(
                parent, table.competition, recipe.member, config.stage,
                manifest_hash=table.hash, all_folds=table.folds, filled=[version for version in slots if version],
            )  # fmt: skip
    return {"run_id": parent.id, "member": recipe.member, "slots": slots, **metrics}


def _accompany(recipe: Recipe, table: Manifest, devices: Devices) -> NoReturn:
    """In the other processes of an `accelerate launch`: train the slots that the main one says, speak to nobody."""
    while (job := devices.from_main(None)) is not None:
        if not job:
            continue  # the main process waits for other machines
        fold, seed = job
        folder, start = _folder(table, recipe, fold, seed), origin.find(recipe, fold, seed)
        training.train_slot(recipe, table, fold, seed, folder, lambda *_: None, devices, start)
    raise SystemExit(0)


def _fill_all(call: Call, jobs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Filled]:
    """Fill every slot that nobody else fills; then wait for the others to fill theirs, or to fall silent."""
    _fill_side_by_side(call, jobs)
    filled: dict[tuple[int, int], Filled] = {}
    told = ""
    while left := [job for job in jobs if job not in filled]:
        found = {job: one for job in left if (one := _fill(call, *job)) is not None}
        filled |= found
        if found or len(filled) == len(jobs):
            continue
        held = call.lessee.holders([_slot(*job) for job in left])
        if (text := preview([f"{slot} by {owner}" for slot, owner in held.items()], 10)) != told:
            log.info("%s: held elsewhere: %s; waiting (Ctrl-C leaves them to it)", call.recipe.member, text)
        told = text
        call.devices.from_main(())
        time.sleep(min(WAIT_S, call.config.lease_min * 60 / leases.BEATS))
    return {job: filled[job] for job in jobs}


def _fill_side_by_side(call: Call, jobs: Sequence[tuple[int, int]]) -> None:
    """Fill the slots that are not filled yet in several processes, here or on a cluster, if that was asked for."""
    config, recipe = call.config, call.recipe
    if config.executor == "local" and (config.parallel or compute.bearable(torch.cuda.device_count())) == 1:
        return
    if call.devices.world > 1 or recipe.overfit:
        return  # an `accelerate launch` shares each slot instead; an overfitting probe is one slot
    todo = [job for job in jobs if _filled(_runs(call, *job)) is None]
    settings = config.model_dump(mode="json") | {"manifest": str(call.table.file)}
    named = [
        Job(f"{recipe.member} f{fold} s{seed}", (settings, fold, seed, call.parent_id, call.lessee.owner))
        for fold, seed in todo
    ]
    compute.map_jobs(fill_job, named, config.executor, config.parallel, recipe.runtime.threads, title="slots")


def fill_job(settings: dict[str, Any], fold: int, seed: int, parent_id: str, owner: str) -> str:
    """Fill one slot in a process of its own; return its registered name and version, or "" if another command has it.

    Bears being begun again.
    """
    config = Train.model_validate(settings)
    table = manifest.read(config.manifest)
    recipe = Recipe(**{name: getattr(config, name) for name in Recipe.model_fields})
    devices = device_setup(recipe.runtime.device, recipe.runtime.threads)
    call = Call(config, recipe, table, devices, Lessee(parent_id, owner), _tags(recipe, table))
    filled = _fill(call, fold, seed)
    return filled[1] if filled else ""


def _tags(recipe: Recipe, table: Manifest) -> dict[str, str]:
    return {
        "member": recipe.member,
        "recipe_hash": checkpoint.recipe_hash(recipe),
        "manifest_hash": table.hash,
        **fingerprint(recipe.metric),
        **checkpoint.swap_tag(table),
        **checkpoint.fingerprints(recipe),
    }


def _member_folder(table: Manifest, recipe: Recipe) -> Path:
    return ROOT / "mlruns" / "work" / table.competition / recipe.member


def _folder(table: Manifest, recipe: Recipe, fold: int, seed: int) -> Path:
    return _member_folder(table, recipe) / _slot(fold, seed)


def _slot(fold: int, seed: int) -> str:
    return f"f{fold}.s{seed}"


def _check_slot(config: Train, recipe: Recipe, table: Manifest, runs: list[RunInfo], fold: int, seed: int) -> None:
    """Refuse, before any run is opened, what would end badly: other settings than begun with, a start that saw OOF."""
    folder = _folder(table, recipe, fold, seed)
    if config.restart and folder.exists():
        shutil.rmtree(folder)
    mine = [run for run in runs if _slot_tags(fold, seed).items() <= run.tags.items()]
    mine = origin.same(mine, recipe, fold, seed)
    if (done := _filled(mine)) is not None:  # whatever lies in the folder: another machine has filled it meanwhile
        kept = [Path(name).stem for name in tracking.list_artifacts(done.id, "oof")]
        return _check_views(recipe, done.tags["registered"], kept)
    start = origin.find(recipe, fold, seed)
    origin.check(recipe, table, fold, start)
    if (folder / "identity.json").exists():
        checkpoint.claim(folder, checkpoint.identity(recipe, table, fold, seed, start))
    if (folder / "done.json").exists():  # trained, and stopped before it was registered
        _check_views(recipe, f"f{fold}.s{seed}", read_json(folder / "done.json")["views"])


def _check_views(recipe: Recipe, trained: str, kept: Iterable[str]) -> None:
    """Refuse a trained slot whose OOF lacks the views of this recipe: `tta` does not make it another training."""
    if recipe.tta not in kept:
        raise UserError(
            f"member '{recipe.member}', {trained}: already trained",
            expected=f"its OOF in views {recipe.tta} (tta)",
            got=f"OOF in views: {preview(sorted(kept)) or 'none'}",
            fix="ask for --tta with one of those, or train it anew with --restart true",
        )


def _slot_tags(fold: int, seed: int) -> dict[str, str]:
    return {"entry": "train.slot", "fold": str(fold), "seed": str(seed)}


def _runs(call: Call, fold: int, seed: int) -> list[RunInfo]:
    """The slot's runs, newest first; if all shall be trained anew, only those of this very call."""
    tags = call.tags | _slot_tags(fold, seed)
    found = origin.same(tracking.find_runs(call.table.competition, tags), call.recipe, fold, seed)
    return [run for run in found if not call.config.restart or run.tags.get("mlflow.parentRunId") == call.parent_id]


def _closed(runs: Sequence[RunInfo]) -> RunInfo | None:
    """The run that filled the slot: a run is closed as finished after its model was registered, not before."""
    return runs[0] if runs and runs[0].status == "FINISHED" and "registered" in runs[0].tags else None


def _filled(runs: Sequence[RunInfo]) -> RunInfo | None:
    """The run that filled the slot, if the version it registered is still there."""
    run = _closed(runs)
    return run if run is not None and versions.is_there(run.tags["registered"], run.id) else None


def _fill(call: Call, fold: int, seed: int) -> Filled | None:
    """Fill one slot, unless it is filled; None if another command is about it."""
    folder, slot = _folder(call.table, call.recipe, fold, seed), _slot(fold, seed)
    runs = _runs(call, fold, seed)
    if (done := _filled(runs)) is None:
        if not call.lessee.claim(slot):
            return None
        runs = _runs(call, fold, seed)  # another command may have filled it before it let go
        done = _filled(runs)
    if done is not None:
        log.info("fold %d seed %d: already trained (%s)", fold, seed, done.tags["registered"])
        oof = _stored_oof(done.id)
        _check_views(call.recipe, done.tags["registered"], oof)
        _discard(folder)
        return oof, done.tags["registered"]
    if (closed := _closed(runs)) is not None:
        log.warning("fold %d seed %d: %s was deleted, so it is trained again", fold, seed, closed.tags["registered"])
    resume = runs[0].id if runs and (folder.exists() or runs[0].status != "FINISHED") else None
    if resume and runs[0].status == "RUNNING":
        outlive(runs[0].tags)
    try:
        filled = _train(call, fold, seed, resume)
    except Handover as news:
        log.warning("%s: %s", call.recipe.member, news)
        return None
    _discard(folder)
    return filled


def _train(call: Call, fold: int, seed: int, resume: str | None) -> Filled:
    """Train a slot whose lease is ours and register it, in a run of its own or the one it was begun in.

    Raises:
        Handover: we were silent for so long that another command goes on with it.
    """
    recipe, table, lessee, parent_id = call.recipe, call.table, call.lessee, call.parent_id
    folder, name = _folder(table, recipe, fold, seed), f"{recipe.member} f{fold} s{seed}"
    mine = call.tags | _slot_tags(fold, seed)
    with tracking.run("train.slot", call.config, table.competition, name, mine, parent_id, resume) as run:
        seen = run.metric_steps("train/loss") if resume else set()

        def report(epoch: int, metrics: dict[str, float]) -> None:
            if call.devices.world == 1:  # else the processes that accompany would wait for us in the next step
                lessee.check(_slot(fold, seed), at_once=False)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            log.info("%s epoch %d: %s", name, epoch, shown)
            if epoch not in seen:
                run.log_metrics(metrics, step=epoch)

        call.devices.from_main((fold, seed))
        start = origin.find(recipe, fold, seed)
        if start is not None:
            run.set_tags({origin.SHA: origin.sha256(start)})
        result = training.train_slot(recipe, table, fold, seed, folder, report, call.devices, start)
        lessee.check(_slot(fold, seed))
        for extra in ("profile", "tensorboard"):
            if (folder / extra).is_dir():
                run.log_artifacts(folder / extra, extra)
        version = "" if recipe.overfit else _register(run, result, fold, seed, call.tags["recipe_hash"])
        if resume and parent_id != tracking.get_run(run.id).tags.get("mlflow.parentRunId"):
            run.set_tags({"mlflow.parentRunId": parent_id})
    return result.oof, version


def _discard(folder: Path) -> None:
    """Remove a slot's work; two commands in one project folder may both be about it."""
    rubbish = folder.with_name(f".{folder.name}.done")
    shutil.rmtree(rubbish, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.replace(rubbish)
    shutil.rmtree(rubbish, ignore_errors=True)


def _register(run: tracking.Run, result: training.SlotResult, fold: int, seed: int, recipe_hash: str) -> str:
    """Log a finished slot's artifacts and metrics, and register its model; repeating it changes nothing."""
    card = read_card(result.model_folder)
    log_once(run, result.metrics, 0)
    run.log_params({f"runtime.{key}": card.info[key] for key in ("precision", "channels_last", "compile", "threads")})
    folder = result.model_folder.parent
    run.log_artifacts(folder / "oof", "oof")
    run.log_artifact(folder / "history.csv")
    marks = result.history.index[result.history["phase"] != result.history["phase"].shift()].tolist()[1:]
    run.log_figure(
        plots.curves(result.history.drop(columns="phase"), marks=marks, title=f"fold {fold} seed {seed}"), "curves.png"
    )
    slot = registry.register_slot(run, serving.pack_slot(result.model_folder, folder), {"recipe_hash": recipe_hash})
    version = f"{slot.name}/{slot.version}"
    run.set_tags({"registered": version, "model_sha": card.model_sha})
    return version


def log_once(run: tracking.Run, metrics: Mapping[str, float], step: int) -> None:
    """Log metrics that the run does not have at this step yet."""
    new = {key: value for key, value in metrics.items() if step not in run.metric_steps(key)}
    if new:
        run.log_metrics(new, step=step)


def _log_latest(parent: tracking.Run, metrics: Mapping[str, float]) -> None:
    """Log a member's score where it is not the one MLflow shows: a call with other folds or seeds scores anew."""
    have = patiently(lambda: tracking.get_run(parent.id)).metrics
    same = {key for key in metrics if key in have and np.array_equal(have[key], metrics[key], equal_nan=True)}
    new = {key: value for key, value in metrics.items() if key not in same}
    if new:
        parent.log_metrics(new, max((step for key in new for step in parent.metric_steps(key)), default=-1) + 1)


def _stored_oof(run_id: str) -> dict[str, Predictions]:
    folder = tracking.download(run_id, "oof")
    return {path.stem: Predictions.load(path) for path in sorted(folder.glob("*.parquet"))}


def _score(
    recipe: Recipe, table: Manifest, parts: dict[int, list[dict[str, Predictions]]], parent: tracking.Run
) -> dict[str, float]:
    """Score the member on the held-out rows of all folds trained that the recipe is for, seeds averaged."""
    task = make_task(table.task, table.classes, table.info.get("swap"))
    metric = training.metric_of(recipe, task)
    place = {name: row for row, name in enumerate(table.sample_ids.tolist())}
    metrics: dict[str, float] = {}
    wanted = harden.wanted_rows(recipe.classes, table.target, table.classes)  # a pair expert's slots count these too
    common = set.intersection(*(set(oof) for slots in parts.values() for oof in slots))  # some were told other views
    for views in sorted(common):
        whole = average([concatenate([oof[views] for oof in slots]) for slots in parts.values()])
        rows = np.array([place[name] for name in whole.sample_ids.tolist()])
        values, truth = whole.values[wanted[rows]], table.target[rows[wanted[rows]]]
        for name in dict.fromkeys([metric, task.default_metric]):
            metrics[f"oof.{views}/{name}"] = task.score(values, truth, name)
    for name in dict.fromkeys([metric, task.default_metric]):
        metrics[f"oof/{name}"] = metrics[f"oof.{recipe.tta}/{name}"]
    return metrics
