"""Studies in Optuna's storage: opened, checked, recovered after a kill, warmed by what is known, drawn.

Everything is written after every slot, so the same study name goes on where a process was killed: the trial is given
out again under a new number, with its values, its notes (run ids) and the scores it had.
"""

import contextlib
import datetime
import fcntl
import logging
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from octofold import plots
from octofold.config import build
from octofold.errors import UserError, preview
from octofold.recipe import Recipe
from octofold.track import provenance
from octofold.tune import place
from octofold.tune.space import Knob
from octofold.tune.trials import NOT_BASE, Plan, Record, winner

HEARTBEAT_S, GRACE_S = 60, 180
RETRIES = 5
"""How often a trial is given out again after its process died; more, and the trial itself is what kills."""
PAST, SO_FAR = "past_s", "so_far_s"
"""User attributes of a trial: seconds it took before it was given out again, and since (told after each slot)."""
HINTS = 5
"""How many of an earlier study's best trials are tried again where their scores cannot be taken over."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's notes on what is experimental, and scipy's on ties in small samples, from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def open_storage(url: str) -> RDBStorage:
    """Open or create Optuna's tables, with heartbeat and retry.

    Args:
        url: SQLAlchemy's, ``sqlite:////folder/optuna.db`` or ``postgresql://user@host/name``.

    Raises:
        UserError: the URL makes no sense, its driver is missing, nothing answers, or MLflow keeps its runs there. Never
            shows the password.
    """
    try:
        address = make_url(url)
    except ArgumentError:
        raise UserError("storage", expected="sqlite:////folder/file.db or postgresql://…", got="no such URL") from None
    kind = address.get_backend_name()
    engine: dict[str, Any] = {"connect_args": {"timeout": 60}} if kind == "sqlite" else {"pool_pre_ping": True}
    if kind == "postgresql":
        engine["connect_args"] = {"connect_timeout": 5}
    try:
        with quiet(), _one_at_a_time(Path(address.database) if kind == "sqlite" and address.database else None):
            if place.has_runs(address, engine):  # by whatever name of its host or path
                raise place.taken()
            return RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
    except (SQLAlchemyError, OptunaError, ImportError, RuntimeError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise UserError(
            f"storage {address.render_as_string(hide_password=True)}",
            expected="a database that answers",
            got=reason.replace(address.password, "***") if address.password else reason,
            fix="check host, port, user and that the database exists (sqlite: that its folder can be written)",
        ) from None


@contextlib.contextmanager
def _one_at_a_time(database: Path | None) -> Iterator[None]:
    """Two processes that both find an empty sqlite file would both make its tables."""
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_suffix(".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_study(name: str, storage: RDBStorage, plan: Plan) -> Study:
    """Open the study of this name, or create it; the base recipe is its first trial.

    Raises:
        UserError: a study of this name was made with another space, base recipe, manifest, slots or objectives.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=["maximize" if up else "minimize" for up in plan.higher_is_better],
        load_if_exists=True,
    )
    now, before = plan.describe(), _renewed(study.user_attrs.get("plan"))
    if before is None:
        study.set_user_attr("token", uuid.uuid4().hex)
        study.set_user_attr("plan", now)
    elif before != now:
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        old, new = (_narrow(source, changed[0], before, now) for source in (before, now))
        raise UserError(
            f"study '{name}' exists with another {preview(changed)}",
            expected=f"{changed[0]}: {old}",
            got=new,
            fix=f"give --study another name; `warm_start: [study:{name}]` takes over what it found",
        )
    recover(study)
    base = [trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get("base")]
    if all(trial.state == TrialState.FAIL for trial in base):
        study.enqueue_trial(plan.space.values_of(plan.space.base), user_attrs={"base": True})
    return study


def tags_of(study: Study) -> dict[str, str]:
    """Return the tags that tell a study's runs from those of an earlier study of its name."""
    token = study.user_attrs.get("token")  # studies begun before there were tokens have none
    return {"study": study.study_name, **({"study.token": token} if token else {})}


def _renewed(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """A stored plan with the recipe fields that were added since, at their defaults."""
    if plan is None:
        return None
    try:
        base = build(Recipe, plan["base"], "stored plan")
    except UserError:  # a field of it is gone
        return plan
    return plan | {"base": base.model_dump(mode="json", exclude=NOT_BASE)}


def _narrow(source: dict[str, Any], key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """The part of `source` that tells the two apart, as short text."""
    if not (isinstance(before.get(key), dict) and isinstance(now.get(key), dict)):
        return repr(source.get(key))[:160]
    names = sorted({*before[key], *now[key]})
    return ", ".join(f"{n}: {source[key].get(n)}" for n in names if before[key].get(n) != now[key].get(n))[:160]


def recover(study: Study) -> None:
    """Give out again the trials whose process on this machine is gone, or elsewhere has been silent for long."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if provenance.is_orphan(trial.user_attrs.get("owner", {})):
            with contextlib.suppress(ValueError):  # another worker was quicker
                study.tell(trial.number, state=TrialState.FAIL)
                give_out_again(study, trial.number, RETRIES)
    with quiet():
        optuna.storages.fail_stale_trials(study)


def at_work(study: Study) -> list[int]:
    """Return the numbers of the trials that other processes run; those that `recover` would give out are none."""
    me, now = provenance.identity(), datetime.datetime.now()
    return [
        trial.number
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        # Killed before it wrote its name, a worker leaves a trial that looks just begun: for a while.
        if (trial.user_attrs["owner"] != me if "owner" in trial.user_attrs else _age_s(trial, now) < GRACE_S)
    ]


def _age_s(trial: FrozenTrial, now: datetime.datetime) -> float:
    return (now - trial.datetime_start).total_seconds() if trial.datetime_start else 0.0


def time_of(study: Study) -> float:
    """Return the seconds that the counted trials took, and those before an interruption that were told (`PAST`)."""
    took = [trial.duration.total_seconds() if trial.duration else 0.0 for trial in counted(study)]
    return sum(took) + sum(float(trial.user_attrs.get(PAST, 0.0)) for trial in counted(study))


def twins_in_a_row(study: Study) -> int:
    """Return how many of the last finished trials repeated the values of an earlier one."""
    done = [trial for trial in counted(study) if trial.state == TrialState.COMPLETE]
    return next((n for n, trial in enumerate(reversed(done)) if "same_as" not in trial.user_attrs), len(done))


def give_out_again(study: Study, number: int, most: int | None = None) -> None:
    """Queue a trial anew, with values, notes and scores, unless that was done or was done `most` times before."""
    trials = study.get_trials(deepcopy=False)
    if number not in _superseded(trials):
        with quiet():
            RetryHeartbeatStaleTrialCallback(max_retry=most)(study, trials[number])


def _superseded(trials: Sequence[FrozenTrial]) -> set[int]:
    """Numbers of trials that were given out again under a later number."""
    with quiet():
        return {number for trial in trials for number in RetryHeartbeatStaleTrialCallback.retry_history(trial)}


def counted(study: Study) -> list[FrozenTrial]:
    """Return the trials that use up the budget: started, not given out again, not imported, not surplus."""
    trials = study.get_trials(deepcopy=False)
    gone = _superseded(trials)
    return [
        trial
        for trial in trials
        if trial.number not in gone
        and trial.state != TrialState.WAITING
        and not {"from", "surplus"} & trial.user_attrs.keys()
    ]


def trained(study: Study) -> list[FrozenTrial]:
    """Return the counted trials that trained their slots themselves, twins of earlier ones left out."""
    return [trial for trial in counted(study) if "same_as" not in trial.user_attrs]


def records(study: Study) -> list[Record]:
    """Return the finished trials, in order."""
    return [
        Record(
            trial.number,
            dict(trial.params),
            trial.user_attrs["scores"],
            trial.user_attrs["outcome"],
            bool(trial.user_attrs.get("base")),
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


def distribution(knob: Knob) -> BaseDistribution:
    """Return a knob as Optuna's distribution."""
    if knob.kind == "choice":
        return CategoricalDistribution(knob.choices)
    if knob.kind == "int":
        return IntDistribution(int(knob.low), int(knob.high), log=knob.log, step=int(knob.step or 1))
    return FloatDistribution(knob.low, knob.high, log=knob.log, step=knob.step)


# ---- what is known already ------------------------------------------------------------------------------------------


def try_early(study: Study, plan: Plan, recipe: Recipe) -> None:
    """Queue a recipe to be tried before the sampler chooses, once.

    Raises:
        UserError: a searched field of it lies outside its range.
    """
    study.enqueue_trial(plan.space.values_of(recipe), skip_if_exists=True)


def take_over(study: Study, plan: Plan, name: str, storage: RDBStorage) -> tuple[int, int]:
    """Warm a study with another of the same storage.

    A full trial whose recipe this plan would score on the same terms is imported with its scores, for nothing. If
    there is none, the best `HINTS` trials are queued to be scored again, as far as the space can say them. That is done
    once: a study that was killed shall not be told more than one that was not.

    Returns:
        how many trials were imported, and how many queued.

    Raises:
        UserError: no study of that name, or not one of ours.
    """
    if study.user_attrs.get(f"warm.{name}"):
        return 0, 0
    try:
        other = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        names = optuna.get_all_study_names(storage)
        raise UserError(f"warm_start: study:{name}", expected=f"one of {preview(names, 10)}", got=name) from None
    theirs, ours = _renewed(other.user_attrs.get("plan")), plan.describe()
    if theirs is None:
        raise UserError(f"warm_start: study:{name}", expected="a study that tune made", got="somebody else's")
    same_terms = all(theirs.get(key) == ours[key] for key in ours if key not in ("space", "base"))
    known = {str(record.values) for record in records(study)}
    imported, hints = 0, []
    for record in _best_first(records(other), plan):
        recipe = build(Recipe, theirs["base"], f"study {name}")
        recipe = type(plan.space)(recipe, plan.space.knobs).recipe(record.values)
        try:
            values = plan.space.values_of(recipe)
        except UserError:
            continue  # it lies outside our space
        ours_says = plan.space.recipe(values).model_dump(exclude=NOT_BASE)
        says_all = ours_says == recipe.model_dump(exclude=NOT_BASE)
        if same_terms and says_all and str(values) not in known:
            study.add_trial(_imported(plan, values, record, name))
            imported += 1
        elif not (same_terms and says_all):
            hints.append(values)
    for values in hints[:HINTS] if not imported else []:
        study.enqueue_trial(values, skip_if_exists=True)
    study.set_user_attr(f"warm.{name}", True)
    return imported, 0 if imported else min(HINTS, len(hints))


def _best_first(trials: Sequence[Record], plan: Plan) -> list[Record]:
    sign = -1 if plan.higher_is_better[0] else 1
    return sorted((record for record in trials if record.outcome == "full"), key=lambda record: sign * record.means[0])


def _imported(plan: Plan, values: dict[str, Any], record: Record, name: str) -> FrozenTrial:
    steps = {step: scores[0] for step, scores in enumerate(record.scores.values())}
    by_field = {knob.field: distribution(knob) for knob in plan.space.knobs}
    return create_trial(
        state=TrialState.COMPLETE,
        values=record.means,
        params=values,
        distributions={field: by_field[field] for field in values},
        intermediate_values=steps if len(plan.objectives) == 1 else None,
        user_attrs={"scores": record.scores, "outcome": "full", "from": f"{name} trial {record.number}"},
    )


# ---- pictures -------------------------------------------------------------------------------------------------------


def figures(study: Study, plan: Plan) -> dict[str, Any]:
    """Draw history, slices, parallel coordinates, timeline, importances (from four trials on), and a Pareto front."""
    import optuna.visualization.matplotlib as draw

    logging.getLogger("matplotlib.category").setLevel(logging.WARNING)  # choices that are numbers are meant as such
    done = records(study)
    if not done:
        return {}
    name = plan.objectives[0]
    several = len(plan.objectives) > 1
    score = (lambda trial: trial.values[0]) if several else None
    drawn: dict[str, Any] = {}
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tight layout, too few points: seen in the picture
        drawn["history"] = draw.plot_optimization_history(study, target=score, target_name=name)
        drawn["slice"] = draw.plot_slice(study, target=score, target_name=name)
        drawn["parallel"] = draw.plot_parallel_coordinate(study, target=score, target_name=name)
        drawn["timeline"] = draw.plot_timeline(study)
        if len({tuple(record.means) for record in done}) >= 4:
            drawn["importance"] = draw.plot_param_importances(study, target=score, target_name=name)
        if several:
            drawn["pareto"] = draw.plot_pareto_front(study, target_names=list(plan.objectives))
    best = winner(done, plan.higher_is_better[0])
    found: dict[str, Any] = {}
    for key, axes in drawn.items():
        figure = np.ravel(axes)[0].figure
        width = 3 + 1.6 * len(plan.space.knobs) if key == "parallel" else figure.get_size_inches()[0]
        figure.set_size_inches(max(8.0, width), max(4.5, figure.get_size_inches()[1]))
        if key == "history" and best is not None:
            np.ravel(axes)[0].set_title(
                f"{study.study_name}: best full trial {best.number}, {name} {best.means[0]:.4f}"
            )
        plots.forget(figure)
        found[key] = figure
    return found
