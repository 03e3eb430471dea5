"""The search: trials are scored slot by slot, stopped when hopeless, and the winner is scored again on fresh seeds.

After each slot (fold, seed) the pruner may stop a trial; it then returns what the slots done say it would have scored,
and can no longer win. A new sampler is made for each trial, seeded by how many came before, so that a study which was
killed goes on with the proposals it would have made anyway.
"""

import datetime
import logging
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from scipy import stats

from octofold.errors import UserError, known
from octofold.files import sha256_json
from octofold.track import provenance
from octofold.tune import studies
from octofold.tune.space import Knob
from octofold.tune.trials import Attempt, Plan, Record, Slot, winner

log = logging.getLogger("octofold")

HOPELESS = 5
"""Failures in a row, none finished before, after which the study stops."""

TWINS = 50
"""Proposals in a row that were tried before, after which a study without a number of trials stops."""

WAIT_S = 5.0
"""Between two looks at trials that others run when the budget is spent, seconds."""

Objective = Callable[[Attempt, int, int], Sequence[float]]
"""``objective(attempt, fold, seed)`` -> one number per `Plan.objectives`, measured on the fold held out."""
Around = Callable[[Attempt], AbstractContextManager[Any]]
"""Entered before a trial's first slot and left after its last, whatever happens: where its run opens and closes."""


class PairedPruner(BasePruner):
    """Stops a trial that is worse than the best full one, slot by slot: by Wilcoxon's signed ranks and in the mean.

    Optuna's own holds the mean of the slots done against the best trial's over all of its slots, and so keeps what is
    hopeless where the first folds are the easy ones.
    """

    def __init__(self, p: float) -> None:
        self.p = p

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Tell whether to stop, from the trial's scores so far by their place in the plan."""
        higher = study.direction == StudyDirection.MAXIMIZE
        best = winner(studies.records(study), higher)
        if best is None or len(trial.intermediate_values) < 2:
            return False
        theirs = [scores[0] for scores in best.scores.values()]
        gains = np.array([value - theirs[step] for step, value in trial.intermediate_values.items()])
        gains = gains if higher else -gains
        p = stats.wilcoxon(gains, alternative="less", zero_method="zsplit").pvalue
        return bool(p < self.p and gains.mean() < 0)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "gp": lambda seed: GPSampler(seed=seed, warn_independent_sampling=False),
    "tpe": lambda seed: TPESampler(seed=seed),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
PRUNERS: dict[str, Callable[[float], BasePruner]] = {
    "wilcoxon": PairedPruner,
    "median": lambda p: MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    "none": lambda p: NopPruner(),
}


@dataclass(frozen=True)
class Budget:
    """When to stop starting trials: at the first limit reached. All count the whole study, not this process.

    Attributes:
        trials: to reach; what was given out again or imported does not count twice.
        hours: of trial time, over all workers.
        slots: trained; a trial starts only if all its slots still fit.
    """

    trials: int | None = None
    hours: float | None = None
    slots: int | None = None

    def spent(self, study: Study, per_trial: int) -> str:
        """Return which limit is reached, or an empty text while there is room for another trial."""
        started = studies.counted(study)
        hours = studies.time_of(study) / 3600
        slots = sum(len(trial.user_attrs.get("scores", {})) for trial in studies.trained(study))
        if self.trials is not None and len(started) >= self.trials:
            return f"{len(started)} trials"
        if self.hours is not None and hours >= self.hours:
            return f"{hours:.2f} hours of trials"
        if self.slots is not None and slots + per_trial > self.slots:
            return f"{slots} slots, and a trial takes {per_trial}"
        if self.trials is None and studies.twins_in_a_row(study) >= TWINS:
            return f"the last {TWINS} proposals were tried before: the space holds nothing new"
        return ""


class _Failed(Exception):
    """A trial that came to nothing; the study goes on."""


class _Surplus(Exception):
    """Several workers started the last trial at once; this one is too many."""


def search(
    study: Study,
    plan: Plan,
    objective: Objective,
    budget: Budget,
    around: Around = lambda attempt: nullcontext(),
    sampler: str = "gp",
    pruner: str = "wilcoxon",
    prune_p: float = 0.13,
    seed: int = 0,
    worker: int = 0,
) -> str:
    """Run trials until the budget is spent; return which limit that was. Any number of processes may do so at once.

    Args:
        study: from `studies.open_study`.
        plan: the same plan.
        objective: scores one slot; an exception or a score that is not finite fails the trial, and the study goes on.
        budget: when to stop.
        around: surroundings of a trial; if they break, the search stops and the trial is kept for the next time.
        sampler: row of `SAMPLERS`.
        pruner: row of `PRUNERS`; with several objectives there is none.
        prune_p: Wilcoxon's one-sided p below which a trial is stopped. With n slots the smallest possible is 2**-n:
            0.13 can stop after three.
        seed: of the sampler.
        worker: number of this process among several at one study, so that they do not propose the same.

    Raises:
        UserError: the base recipe failed, or the first `HOPELESS` trials all did; names the last error.
    """
    make_sampler, make_pruner = SAMPLERS[known("sampler", sampler, SAMPLERS)], PRUNERS[known("pruner", pruner, PRUNERS)]
    failures: list[Attempt] = []

    def one(trial: Trial) -> Sequence[float]:
        _leave_if_surplus(study, trial, budget)
        attempt = _attempt_of(plan, trial)
        try:
            with around(attempt):
                _score(study, plan, trial, attempt, objective)
        except _Failed:
            trial.set_user_attr("error", attempt.error)
            failures.append(attempt)
            raise
        except BaseException:  # Ctrl-C, or the surroundings broke: not the recipe's fault, so it is kept
            _tell_time(trial)
            studies.give_out_again(study, trial.number)
            raise
        failures.clear()
        scored = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(plan.objectives, attempt.means, strict=True))
        log.info("trial %d: %s (%s, %d slots)", attempt.number, scored, attempt.outcome, len(attempt.scores))
        return _told(study, plan, attempt)

    while not (limit := _over(study, plan, budget)):
        with studies.quiet():
            study.pruner = make_pruner(prune_p) if len(plan.objectives) == 1 else NopPruner()
            study.sampler = make_sampler(_seed(study, seed, worker))
            study.optimize(one, n_trials=1, catch=(_Failed, _Surplus))
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if failures and not finished and (failures[-1].is_base or len(failures) >= HOPELESS):
            raise UserError(
                f"study '{study.study_name}'",
                expected="the base recipe to train" if failures[-1].is_base else "a trial that finishes",
                got=failures[-1].error,
                fix="mend the cause and give the same command; the study is kept",
            )
    return limit


def _over(study: Study, plan: Plan, budget: Budget) -> str:
    """Return which limit is reached once nobody is at a trial any more; until then another's may come back to us."""
    told: list[int] = []
    while limit := budget.spent(study, len(plan.slots)):
        studies.recover(study)
        others = studies.at_work(study)
        if not others and budget.spent(study, len(plan.slots)):
            return limit
        if others and others != told:
            log.info("budget spent; waiting for trials that others run: %s", ", ".join(map(str, others)))
        told = others
        time.sleep(WAIT_S if others else 0)
    return ""


def _tell_time(trial: Trial) -> None:
    if trial.datetime_start is not None:
        taken = datetime.datetime.now() - trial.datetime_start
        trial.set_user_attr(studies.SO_FAR, taken.total_seconds())


def _seed(study: Study, seed: int, worker: int) -> int:
    started = studies.counted(study)
    alone = all(trial.state != TrialState.RUNNING for trial in started)
    return int(sha256_json([seed, len(started), worker, 0 if alone else os.getpid()])[:8], 16)


def _leave_if_surplus(study: Study, trial: Trial, budget: Budget) -> None:
    """Of several workers that saw room for one more trial at once, only the first may run it."""
    rank = sum(other.number <= trial.number for other in studies.counted(study))
    if budget.trials is not None and rank > budget.trials:
        if {"fixed_params", "retry_history"} & study.get_trials(deepcopy=False)[trial.number].system_attrs.keys():
            studies.give_out_again(study, trial.number)  # somebody asked for it: it waits for a larger budget
        else:
            trial.set_user_attr("surplus", True)
        raise _Surplus


def _attempt_of(plan: Plan, trial: Trial) -> Attempt:
    def suggest(knob: Knob) -> Any:
        if knob.kind == "choice":
            return trial.suggest_categorical(knob.field, knob.choices)
        if knob.kind == "int":
            return trial.suggest_int(knob.field, int(knob.low), int(knob.high), step=int(knob.step or 1), log=knob.log)
        return trial.suggest_float(knob.field, knob.low, knob.high, step=knob.step, log=knob.log)

    def keep(key: str, value: str) -> None:
        trial.set_user_attr("notes", {**trial.user_attrs.get("notes", {}), key: value})

    trial.set_user_attr("owner", provenance.identity())
    kept = trial.user_attrs
    trial.set_user_attr(studies.PAST, kept.get(studies.PAST, 0.0) + kept.get(studies.SO_FAR, 0.0))
    return Attempt(
        number=trial.number,
        purpose="trial",
        values=plan.space.sample(suggest),
        recipe=plan.space.base,
        is_base=bool(kept.get("base")),
        notes=dict(kept.get("notes", {})),
        scores=dict(kept.get("scores", {})),
        keep_note=keep,
    )


def _score(study: Study, plan: Plan, trial: Trial, attempt: Attempt, objective: Objective) -> None:
    """Run the slots that are not done yet, and set the attempt's outcome."""
    twin = next((record for record in studies.records(study) if record.values == attempt.values), None)
    if twin is not None:  # the same recipe on the same slots: the same numbers, for nothing
        trial.set_user_attr("same_as", twin.number)
        attempt.scores, attempt.outcome = dict(twin.scores), twin.outcome
    else:
        try:
            attempt.outcome = _run_slots(plan, trial, attempt, objective)
        except Exception as error:  # one recipe's trouble must not end the search; it is told, kept and counted
            attempt.outcome = "failed"
            attempt.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            log.warning("trial %d failed: %s", attempt.number, attempt.error)
            log.debug("%s", traceback.format_exc())
            raise _Failed(attempt.error) from error
    trial.set_user_attr("scores", attempt.scores)
    trial.set_user_attr("outcome", attempt.outcome)


def _run_slots(plan: Plan, trial: Trial, attempt: Attempt, objective: Objective) -> str:
    attempt.recipe = plan.space.recipe(attempt.values)
    for step, (fold, seed) in enumerate(plan.slots):
        key = f"f{fold}.s{seed}"
        if key not in attempt.scores:
            attempt.scores[key] = _finite(objective(attempt, fold, seed))
            trial.set_user_attr("scores", attempt.scores)
            _tell_time(trial)
        if len(plan.objectives) == 1:
            trial.report(attempt.scores[key][0], step)
            # The base recipe is the yardstick: without all its slots nothing could be said of the winner.
            if step + 1 < len(plan.slots) and not attempt.is_base and trial.should_prune():
                return "pruned"
    return "full"


def _told(study: Study, plan: Plan, attempt: Attempt) -> list[float]:
    """What the sampler learns: the means; of a pruned trial the best full one's and the gain over it on the slots done.

    The mean of a few slots would say as much of their folds as of the recipe, and could pass for the study's best.
    """
    best = winner(studies.records(study), plan.higher_is_better[0])
    if attempt.outcome != "pruned" or best is None:
        return attempt.means
    gains = [score - best.scores[key][0] for key, (score,) in attempt.scores.items()]
    return [best.means[0] + float(np.mean(gains))]


def _finite(scores: Sequence[float]) -> list[float]:
    found = [float(score) for score in scores]
    if not all(isfinite(score) for score in found):
        raise ValueError(f"the score is not a number: {found}")
    return found


def confirm(
    study: Study,
    plan: Plan,
    objective: Objective,
    chosen: Sequence[Record],
    slots: Sequence[Slot],
    around: Around = lambda attempt: nullcontext(),
) -> dict[int, dict[str, list[float]]]:
    """Score finished trials on slots that did not choose them; what was scored before a kill is not scored again.

    Returns:
        trial number -> ``f0.s1`` -> scores.
    """
    found: dict[int, dict[str, list[float]]] = {}
    for record in chosen:
        place = f"confirm.{record.number}"
        kept: dict[str, Any] = {"notes": {}, "scores": {}, **study.user_attrs.get(place, {})}

        def keep(key: str, value: str, place: str = place, kept: dict[str, Any] = kept) -> None:
            kept["notes"][key] = value
            study.set_user_attr(place, kept)

        attempt = Attempt(
            number=record.number,
            purpose="confirm",
            values=record.values,
            recipe=plan.space.recipe(record.values),
            is_base=record.is_base,
            notes=kept["notes"],
            scores=kept["scores"],
            keep_note=keep,
        )
        keys = [f"f{fold}.s{seed}" for fold, seed in slots]
        if not set(keys) <= kept["scores"].keys():
            attempt.outcome = "interrupted"
            with around(attempt):
                for key, (fold, seed) in zip(keys, slots, strict=True):
                    if key not in kept["scores"]:
                        kept["scores"][key] = _finite(objective(attempt, fold, seed))
                        study.set_user_attr(place, kept)
                attempt.outcome = "full"
        found[record.number] = {key: kept["scores"][key] for key in keys}
    return found
