"""The tune command: a study over `training`, told to MLflow as a parent run, a run per trial and a run per slot.

A trial's run is found again through the trial's notes and a slot's by its tags, so what was killed goes on in the runs
it had. Nothing of a trial is registered: only the recipe that wins is worth training as a member.
"""

import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octofold import compute
from octofold.commands import Tune
from octofold.compute import Devices, device_setup
from octofold.config import build, read_yaml
from octofold.data import manifest
from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import ROOT, existing, write_text
from octofold.metrics import METRICS, fingerprint
from octofold.nets.models import read_card
from octofold.nets.tasks import make_task
from octofold.recipe import Model, Recipe
from octofold.track import tracking
from octofold.train import checkpoint, harden, origin, training
from octofold.tune import place, space, studies, trials, tuning
from octofold.tune.speed import inference_ms
from octofold.tune.trials import Attempt, Plan, Record, Verdict
from octofold.workers import Job

log = logging.getLogger("octofold")
LIVE_S = 1.0
"""Epochs that take longer are told to MLflow as they end; of a head that trains in milliseconds, only the last is."""

MOST = 64
"""Workers offered to a Ray cluster when nobody says how many; those it has no room for find the budget spent."""


class _Enough(Exception):
    """The last epoch is validated, and this its score: a trial needs neither weights on disk nor predictions."""


def tune(config: Tune) -> dict[str, Any]:
    """Search, confirm, and write the recipes found.

    Returns:
        ``run_id``, ``study``, ``recipe`` (the YAML to train next), ``verdict`` in words, and the headline metrics.

    Raises:
        UserError: a space, storage, study or recipe that makes no sense, or a base recipe that does not train.
    """
    table = manifest.read(config.manifest)
    plan = plan_of(config, table)
    name = name_of(config, table)
    tracking.client()  # unreachable? then say so before a trial is given out; and the storage can see whose tables are
    storage = studies.open_storage(place.address(config.storage))
    study = studies.open_study(name, storage, plan)
    for known in config.warm_start:
        _warm(study, plan, storage, known)
    tags = studies.tags_of(study) | {"manifest_hash": table.hash, "member": plan.space.base.member}
    tags |= fingerprint(plan.space.base.metric)
    before = tracking.find_runs(table.competition, studies.tags_of(study) | {"entry": "tune"})
    resume = before[-1].id if before else None
    with tracking.run("tune", config, table.competition, name, tags, resume_id=resume) as parent:
        parent.log_dataset(table.table, table.competition, "training", str(table.file))
        count = config.parallel or _bearable(config)
        if config.executor == "local" and count == 1:
            limit = _search(config, table, plan, study, parent, 0)
        else:
            settings = config.model_dump(mode="json") | {"manifest": str(table.file)}
            jobs = [Job(f"{name} worker {worker}", (settings, parent.id, worker)) for worker in range(count)]
            limit = compute.map_jobs(work, jobs, config.executor, config.parallel, title="workers")[jobs[0].key]
        log.info("study %s: budget spent (%s)", name, limit)
        sweep = _sweep(config, table, plan, study, parent)
        return {"run_id": parent.id, "study": name, **sweep.conclude(parent)}


def _bearable(config: Tune) -> int:
    """How many workers to start: on Ray as many as there are trials, since the cluster runs only those that fit."""
    if config.executor == "local":
        return compute.bearable(torch.cuda.device_count())
    return min(config.trials or MOST, MOST)


def work(settings: dict[str, Any], parent_id: str, worker: int) -> str:
    """Run trials of a study that the main process opened, in a process of one's own; return which limit ended it."""
    config = Tune.model_validate(settings)
    table = manifest.read(config.manifest)
    plan = plan_of(config, table)
    study = studies.open_study(name_of(config, table), studies.open_storage(place.address(config.storage)), plan)
    return _search(config, table, plan, study, parent_id, worker)


def _search(config: Tune, table: Manifest, plan: Plan, study: Any, parent: tracking.Run | str, worker: int) -> str:
    sweep = _sweep(config, table, plan, study, parent)
    budget = tuning.Budget(config.trials, config.hours, config.slots)
    how = config.sampler, config.pruner, config.prune_p, config.seed, worker
    return tuning.search(study, plan, sweep.slot, budget, sweep.around, *how)


def _sweep(config: Tune, table: Manifest, plan: Plan, study: Any, parent: tracking.Run | str) -> "Sweep":
    runtime = plan.space.base.runtime
    devices = device_setup(runtime.device, runtime.threads)
    return Sweep(config, table, plan, study, parent, name_of(config, table), devices)


def name_of(config: Tune, table: Manifest) -> str:
    """Return the study's name."""
    return config.study or f"{table.competition}.{config.config.stem}"


def plan_of(config: Tune, table: Manifest) -> Plan:
    """Check the command's settings against the manifest and make the study's plan.

    Raises:
        UserError: a recipe, space, fold, view or metric that does not fit.
    """
    base = _recipe_of(config.recipe)
    if base.overfit:
        expected = "0, since nothing is searched on rows trained on"
        raise UserError("recipe.overfit", expected=expected, got=str(base.overfit))
    task = make_task(table.task, table.classes, table.info.get("swap"))
    task.check_views(config.views)
    metric = training.metric_of(base, task)
    objectives = tuple(dict.fromkeys(config.objectives))
    if objectives[0] != "score":
        raise UserError("objectives", expected="score first", got=", ".join(objectives))
    return Plan(
        space=space.read(config.space, base, f"{config.config}: space"),
        slots=tuple((fold, seed) for seed in config.seeds for fold in manifest.check_folds(table, config.folds)),
        folds=len(table.folds),
        objectives=objectives,
        higher_is_better=tuple(METRICS[metric].higher_is_better if name == "score" else False for name in objectives),
        context={"manifest": table.hash, "metric": metric, "views": config.views} | fingerprint(base.metric),
    )


def _recipe_of(source: Path | str | dict[str, Any]) -> Recipe:
    if isinstance(source, dict):
        return build(Recipe, source, "recipe")
    path = existing(source, "a recipe (YAML)")
    return build(Recipe, read_yaml(path), path)


def _warm(study: Any, plan: Plan, storage: Any, known: str | dict[str, Any]) -> None:
    if isinstance(known, str) and known.startswith("study:"):
        imported, queued = studies.take_over(study, plan, known.removeprefix("study:"), storage)
        log.info("%s: %d trials taken over, %d queued", known, imported, queued)
    elif isinstance(known, dict):
        fields = [knob.field for knob in plan.space.knobs]
        if unknown := [name for name in known if name not in fields]:
            raise UserError("warm_start", expected=f"searched fields: {', '.join(fields)}", got=preview(unknown))
        studies.try_early(study, plan, plan.space.recipe(known))
    else:
        studies.try_early(study, plan, _recipe_of(known))


@dataclass
class Sweep:
    """One process's work at a study: what surrounds a trial, what scores a slot, what is made of it in the end."""

    config: Tune
    table: Manifest
    plan: Plan
    study: Any
    parent: tracking.Run | str
    name: str
    devices: Devices
    runs: dict[tuple[str, int], tracking.Run] = field(default_factory=dict)
    again: set[tuple[str, int]] = field(default_factory=set)
    speeds: dict[Model, float] = field(default_factory=dict)

    # ---- a trial ----------------------------------------------------------------------------------------------------

    @contextmanager
    def around(self, attempt: Attempt) -> Iterator[None]:
        """Open the trial's run, or the one it had before it was killed, and close it with what came out."""
        me = attempt.purpose, attempt.number
        known = None
        if "key" in attempt.notes:
            self.again.add(me)
            known = self._find("tune.trial", self._tags(attempt))
        else:  # kept before the run is made, so that the run is found whatever happens next
            attempt.note("key", str(attempt.number))
        tags, title = self._tags(attempt), f"{attempt.purpose} {attempt.notes['key']}"
        resume = known.id if known else None
        with tracking.run("tune.trial", None, self.table.competition, title, tags, self.parent, resume) as run:
            run.log_params({f"cfg.{name}": space.decode(value) for name, value in attempt.values.items()})
            self.runs[me] = run
            try:
                yield
            finally:
                run.set_tags({"outcome": attempt.outcome, "pruned": str(attempt.outcome == "pruned").lower()})
            self._tell_outcome(attempt, run)

    def _tell_outcome(self, attempt: Attempt, run: tracking.Run) -> None:
        means = dict(zip(self.plan.objectives, attempt.means, strict=True))
        run.log_metrics(means)
        recipe = self.plan.space.recipe(attempt.values)
        run.log_text(trials.recipe_text(recipe, recipe.member, []), "recipe.yaml")

    def _tags(self, attempt: Attempt) -> dict[str, str]:
        return studies.tags_of(self.study) | {
            "trial": attempt.notes.get("key", ""),
            "purpose": attempt.purpose,
            "is_base": str(attempt.is_base).lower(),
            "manifest_hash": self.table.hash,
        }

    def _find(self, entry: str, tags: dict[str, str]) -> tracking.RunInfo | None:
        found = tracking.find_runs(self.table.competition, tags | {"entry": entry})
        return found[0] if found else None

    # ---- a slot -----------------------------------------------------------------------------------------------------

    def slot(self, attempt: Attempt, fold: int, seed: int) -> list[float]:
        """Train one slot of a trial in a run of its own; return the objectives."""
        tags = self._tags(attempt) | {"fold": str(fold), "seed": str(seed)}
        me = attempt.purpose, attempt.number
        known = self._find("tune.slot", tags) if me in self.again else None
        if known and known.status == "FINISHED" and set(self.plan.objectives) <= known.metrics.keys():
            return [known.metrics[name] for name in self.plan.objectives]
        title = f"{attempt.purpose} {attempt.notes['key']} f{fold} s{seed}"
        resume = known.id if known else None
        with tracking.run("tune.slot", None, self.table.competition, title, tags, self.runs[me], resume) as run:
            run.log_params({f"cfg.{name}": space.decode(value) for name, value in attempt.values.items()})
            seen = run.metric_steps("train/loss") if resume else set()
            score = self._train(attempt, fold, seed, run, seen)
            values = {"score": score}
            if "inference_ms" in self.plan.objectives:
                values["inference_ms"] = self._speed(attempt.recipe.model)
            run.log_metrics(values)
        return [values[name] for name in self.plan.objectives]

    def _train(self, attempt: Attempt, fold: int, seed: int, run: tracking.Run, seen: set[int]) -> float:
        views, metric = self.config.views, self.plan.context["metric"]
        changes = {"tta": views} | ({"select": "last"} if views == "none" else {})  # a maximum over epochs flatters
        recipe = attempt.recipe.model_copy(update=changes)
        start = origin.find(recipe, fold, seed)
        origin.check(recipe, self.table, fold, start)
        folder = self._folder(attempt, recipe, fold, seed, start)
        last = sum(phase.epochs for phase in recipe.phases) - 1
        is_short = views == "none" and recipe.average.kind != "swa"  # whose weights are made only at the very end
        clock = time.monotonic()

        def report(epoch: int, metrics: dict[str, float]) -> None:
            nonlocal clock
            if epoch not in seen and (epoch == last or time.monotonic() - clock > LIVE_S):
                run.log_metrics(metrics, step=epoch)
                clock = time.monotonic()
            if is_short and epoch == last:
                raise _Enough(metrics[f"valid/{metric}"])

        try:
            result = training.train_slot(recipe, self.table, fold, seed, folder, report, self.devices, start)
            if views == "none":  # ended early, or averaged: as the others, by what the last validation said
                score = float(read_card(result.model_folder).info[f"valid/{metric}"])
            else:
                score = result.metrics[f"oof.{views}/{metric}"]
        except _Enough as enough:
            score = float(enough.args[0])
        except KeyboardInterrupt:
            raise
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)
        return score

    def _folder(self, attempt: Attempt, recipe: Recipe, fold: int, seed: int, start: Path | None) -> Path:
        """Where a slot keeps its checkpoint; a broken-off training of other code or settings is thrown away."""
        work = ROOT / "mlruns" / "work" / self.table.competition / f"tune.{_safe(self.name)}"
        folder = work / f"{attempt.purpose}{attempt.notes['key']}.f{fold}.s{seed}"
        try:
            if folder.exists():
                checkpoint.claim(folder, checkpoint.identity(recipe, self.table, fold, seed, start))
        except UserError:
            shutil.rmtree(folder)
        return folder

    def _speed(self, model: Model) -> float:
        if model not in self.speeds:
            self.speeds[model] = inference_ms(model, self.table, self.devices)
        return self.speeds[model]

    # ---- the end ----------------------------------------------------------------------------------------------------

    def conclude(self, parent: tracking.Run) -> dict[str, Any]:
        """Confirm the winner, write recipes, table and pictures; return the headline."""
        records = studies.records(self.study)
        best = trials.winner(records, self.plan.higher_is_better[0])
        base = next((record for record in records if record.is_base), None)
        if best is None or base is None:
            raise UserError(f"study '{self.name}'", expected="a trial that ran all its slots", got="none yet")
        verdict = self._verdict(base, best)
        sentence = verdict.sentence if verdict else self._unconfirmed(base, best, len(records))
        folder = self.config.out or ROOT / "runs" / "tune" / _safe(self.name)
        found = {"best": best}
        if len(self.plan.objectives) > 1:
            front = trials.pareto(records, self.plan.higher_is_better)
            found |= {f"pareto-{number}": record for number, record in enumerate(front)}
        paths = {name: self._write(folder / f"{name}.yaml", record, sentence, parent) for name, record in found.items()}
        for path in paths.values():
            parent.log_artifact(path, "recipes")
        parent.log_text(trials.table(records, self.plan), "trials.csv")
        parent.log_text(sentence + "\n", "verdict.txt")
        for name, figure in studies.figures(self.study, self.plan).items():
            parent.log_figure(figure, f"plots/{name}.png")
        headline = self._headline(records, base, best, verdict)
        parent.log_metrics({key: float(value) for key, value in headline.items()})
        told = parent.metric_steps("trial/score")
        for record in records:
            if record.number not in told:
                means = dict(zip(self.plan.objectives, record.means, strict=True))
                parent.log_metrics({f"trial/{name}": mean for name, mean in means.items()}, step=record.number)
        parent.set_tags({"verdict": sentence})
        log.info("%s", sentence)
        pareto = {"pareto": [paths[name] for name in paths if name != "best"]} if len(paths) > 1 else {}
        return {"recipe": paths["best"], "verdict": sentence, **pareto, **headline}

    def _verdict(self, base: Record, best: Record) -> Verdict | None:
        if best.is_base or best.values == base.values or not self.config.confirm_seeds:
            return None
        folds = list(dict.fromkeys(fold for fold, _ in self.plan.slots))
        first = max(seed for _, seed in self.plan.slots) + 1
        fresh = [(fold, seed) for seed in range(first, first + self.config.confirm_seeds) for fold in folds]
        found = tuning.confirm(self.study, self.plan, self.slot, [base, best], fresh, self.around)
        wanted = harden.wanted_rows(self.plan.space.base.classes, self.table.target, self.table.classes)
        grain = trials.grain_of(self.plan.context["metric"], self.table.fold[wanted], folds)
        up = self.plan.higher_is_better[0]
        return trials.compare(found[base.number], found[best.number], up, self.plan.folds, best.means[0], grain)

    def _unconfirmed(self, base: Record, best: Record, count: int) -> str:
        if best.values == base.values:
            return f"none of {count} trials beat the base recipe ({base.means[0]:.4f}), which therefore stays"
        return (
            f"not confirmed on fresh seeds: {best.means[0]:.4f} in the search, where the best of {count} flatters, "
            f"against {base.means[0]:.4f} of the base recipe"
        )

    def _headline(
        self, records: list[Record], base: Record, best: Record, verdict: Verdict | None
    ) -> dict[str, float | int]:
        headline: dict[str, float | int] = {
            "trials": len(records),
            "trials.pruned": sum(record.outcome == "pruned" for record in records),
            "slots": sum(len(trial.user_attrs.get("scores", {})) for trial in studies.trained(self.study)),
            "search/base": base.means[0],
            "search/best": best.means[0],
        }
        if verdict:
            numbers = verdict._asdict()
            headline |= {f"confirm/{key}": numbers[key] for key in ("base", "best", "gain", "low", "high", "noise")}
        return {key: value for key, value in headline.items() if np.isfinite(value)}

    def _write(self, path: Path, record: Record, sentence: str, parent: tracking.Run) -> Path:
        recipe = self.plan.space.recipe(record.values)
        member = f"{recipe.member[:53]}_tuned" if not record.is_base else recipe.member
        scores = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(self.plan.objectives, record.means, strict=True))
        claims = [
            f"Trial {record.number} of study {self.name}, manifest {self.table.hash[:12]}, run {parent.id}.",
            f"In the search: {scores} ({self.plan.context['metric']} over {len(record.scores)} slots).",
            sentence[0].upper() + sentence[1:] + "." if path.stem == "best" else "Nobody beats it in both at once.",
            f"  python entrypoints/train.py --manifest {self.config.manifest} --config {path}",
        ]
        return write_text(path, trials.recipe_text(recipe, member, claims))


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
