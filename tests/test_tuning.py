"""Studies on toy objectives: what wins, what it costs, and that no kill loses or doubles anything."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest

import servers
from octofold.errors import UserError
from octofold.recipe import Recipe
from octofold.track import provenance
from octofold.tune import place, space, studies, trials, tuning
from octofold.tune.trials import Attempt, Plan
from octofold.tune.tuning import Budget

RANGES = {
    "optim.lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "optim.weight_decay": {"low": 0.0, "high": 0.2},
    "augment.preset": {"choices": ["baseline", "none"]},
}
FOLDS = tuple((fold, 0) for fold in range(5))


def plan(ranges: dict[str, Any] = RANGES, **changes: Any) -> Plan:
    return Plan(space.read(ranges, Recipe()), **({"slots": FOLDS, "context": {"manifest": "m1"}} | changes))


def truth(values: dict[str, Any], fold: int, seed: int) -> float:
    """Accuracy-like: best at lr 1e-2 and decay 0.1 without augmentation; folds differ in level, seeds in noise."""
    far = 0.1 * (np.log10(values["optim.lr"]) + 2) ** 2 + 3 * (values["optim.weight_decay"] - 0.1) ** 2
    noise = np.random.default_rng([fold, seed, int(1e6 * values["optim.lr"])]).normal(0, 0.004)
    return float(0.9 - far - 0.02 * (values["augment.preset"] == "baseline") + 0.01 * fold + noise)


def objective(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
    return [truth(attempt.values, fold, seed)]


def begin(folder: Path, what: Plan, name: str = "toy", url: str = "") -> Any:
    return studies.open_study(name, studies.open_storage(url or f"sqlite:///{folder}/optuna.db"), what)


def told(study: Any) -> list[tuple[str, str]]:
    """What a study knows, without the numbers under which it was told."""
    return [(json.dumps(record.values, sort_keys=True), record.outcome) for record in studies.records(study)]


@pytest.mark.slow
def test_a_search_finds_the_optimum_and_only_full_trials_can_win(tmp_path: Path) -> None:
    what = plan()
    study = begin(tmp_path, what)
    assert tuning.search(study, what, objective, Budget(trials=30)) == "30 trials"
    done = studies.records(study)
    assert done[0].is_base
    assert what.space.recipe(done[0].values) == Recipe()
    pruned = [record for record in done if record.outcome == "pruned"]
    assert pruned
    assert all(3 <= len(record.scores) < 5 for record in pruned)
    best = trials.winner(done)
    assert best is not None
    assert best.outcome == "full"
    assert best.means[0] == max(record.means[0] for record in done if record.outcome == "full")
    assert truth(best.values, 0, 0) > truth(done[0].values, 0, 0) + 0.05
    by_number = {trial.number: trial for trial in study.get_trials()}
    for record in done:
        leader = record if record.outcome == "full" else trials.winner(done[: done.index(record)])
        assert leader is not None
        ahead = np.mean([leader.scores[slot][0] - record.scores[slot][0] for slot in record.scores])
        assert by_number[record.number].value == pytest.approx(leader.means[0] - ahead)
    assert study.best_trial.number == best.number
    assert set(studies.figures(study, what)) == {"history", "slice", "parallel", "timeline", "importance"}


@pytest.mark.parametrize("sampler", sorted(tuning.SAMPLERS))
def test_every_sampler_repeats_itself_and_resumes_as_if_never_stopped(sampler: str, tmp_path: Path) -> None:
    what = plan(slots=FOLDS[:2])
    whole = begin(tmp_path, what, "whole")
    tuning.search(whole, what, objective, Budget(trials=6), sampler=sampler)
    for count in (2, 6):
        parts = begin(tmp_path, what, "parts")
        tuning.search(parts, what, objective, Budget(trials=count), sampler=sampler)
    assert told(parts) == told(whole)
    assert len(told(whole)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("pruner", sorted(tuning.PRUNERS))
def test_every_pruner_runs_and_none_runs_all_slots(pruner: str, tmp_path: Path) -> None:
    what = plan()
    study = begin(tmp_path, what)
    tuning.search(study, what, objective, Budget(trials=10), sampler="random", pruner=pruner)
    counts = {len(record.scores) for record in studies.records(study)}
    assert (counts == {5}) == (pruner == "none")


@pytest.mark.slow
def test_which_folds_come_first_does_not_decide_who_is_stopped(tmp_path: Path) -> None:
    """Folds differ in level by far more than recipes do; the sampler is told nothing of that either."""
    levels = np.array([0.06, 0.06, 0.03, -0.06, -0.09])
    found = []
    for name, offsets in (("easy first", levels), ("hard first", levels[::-1])):
        what = plan()
        study = begin(tmp_path, what, name)

        def shifted(attempt: Attempt, fold: int, seed: int, offsets: Any = offsets) -> Sequence[float]:
            return [truth(attempt.values, fold, seed) + offsets[fold]]

        tuning.search(study, what, shifted, Budget(trials=15), sampler="random")
        values = [trial.value for trial in study.get_trials(deepcopy=False)]
        found.append(([(record.outcome, len(record.scores)) for record in studies.records(study)], values))
    assert found[0][0] == found[1][0]
    assert sum(outcome == "pruned" for outcome, _ in found[0][0]) > 5
    assert found[0][1] == pytest.approx(found[1][1])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_pruner_holds_a_trial_against_the_best_full_one(tmp_path: Path, sign: int) -> None:
    """Of the base recipe's successors the second leads on the first folds, the third trails the first on each."""
    what = plan({"optim.lr": RANGES["optim.lr"]}, higher_is_better=(sign > 0,))
    study = begin(tmp_path, what)
    scores = {1: [0.80, 0.79, 0.78, 0.5, 0.5], 2: [0.9, 0.9, 0.7, 0.4, 0.4], 3: [0.79, 0.78, 0.77, 0.9, 0.9]}

    def listed(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        return [sign * scores.get(attempt.number, [0.7, 0.7, 0.7, 0.3, 0.3])[fold]]

    tuning.search(study, what, listed, Budget(trials=4), sampler="random")
    found = [(record.outcome, len(record.scores)) for record in studies.records(study)]
    assert found == [("full", 5), ("full", 5), ("full", 5), ("pruned", 3)]


def test_budgets_count_the_study(tmp_path: Path) -> None:
    what = plan()
    study = begin(tmp_path, what)
    assert "slots" in tuning.search(study, what, objective, Budget(slots=12), sampler="random", pruner="none")
    assert [len(record.scores) for record in studies.records(study)] == [5, 5]
    assert "trials" in tuning.search(study, what, objective, Budget(trials=3, slots=99), sampler="random")
    assert "hours" in tuning.search(study, what, objective, Budget(hours=0.0), sampler="random")
    assert len(studies.records(study)) == 3


def test_time_before_an_interruption_counts(tmp_path: Path) -> None:
    what = plan(slots=FOLDS[:1])

    def interrupted(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        time.sleep(0.3)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tuning.search(begin(tmp_path, what), what, interrupted, Budget(trials=1))
    study = begin(tmp_path, what)
    tuning.search(study, what, objective, Budget(trials=1))
    assert len(studies.counted(study)) == 1
    assert 0.6 <= studies.time_of(study) < 30


def test_a_space_with_nothing_new_ends_a_study_without_a_number_of_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TWINS", 3)
    what = plan({"augment.preset": {"choices": ["baseline", "none"]}}, slots=FOLDS[:1])
    study = begin(tmp_path, what)
    limit = tuning.search(study, what, lambda *_: [0.5], Budget(slots=99), sampler="random", pruner="none")
    assert "nothing new" in limit
    assert len(studies.trained(study)) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_a_trial_of_the_dead_at_the_end_of_the_budget_is_given_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(tuning, "WAIT_S", 0.1)
    what = plan(slots=FOLDS[:1])
    study = begin(tmp_path, what)
    tuning.search(study, what, objective, Budget(trials=1))
    with warnings.catch_warnings(action="ignore"):  # Optuna's, that a heartbeat needs its own loop
        theirs = study.ask()
    with subprocess.Popen(["sleep", "1"]) as other:
        owner = {"pid": str(other.pid), "pid.started": str(psutil.Process(other.pid).create_time())}
        theirs.set_user_attr("owner", provenance.identity() | (owner if place == "here" else {"host": "elsewhere"}))
        if place == "elsewhere":
            study._storage.record_heartbeat(theirs._trial_id)
            with sqlite3.connect(tmp_path / "optuna.db") as base:
                base.execute("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
        reaper = threading.Thread(target=other.wait)
        reaper.start()
        assert tuning.search(study, what, objective, Budget(trials=2)) == "2 trials"
        assert place == "elsewhere" or other.poll() == 0, "it waited for the other as long as that lived"
        reaper.join()
    assert len(studies.records(study)) == 2


def test_the_same_values_are_not_trained_twice(tmp_path: Path) -> None:
    what = plan({"augment.preset": {"choices": ["baseline", "none"]}})
    asked: list[str] = []

    def counting(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        asked.append(attempt.recipe.augment.preset)
        return [0.5]

    study = begin(tmp_path, what)
    tuning.search(study, what, counting, Budget(trials=8), sampler="random")
    assert sorted(asked) == ["baseline"] * 5 + ["none"] * 5
    assert len(studies.records(study)) == 8


def test_minimised_and_conditional(tmp_path: Path) -> None:
    ranges = {
        "optim.name": {"choices": ["adamw", "sgd"]},
        "optim.momentum": {"low": 0.1, "high": 0.9, "when": {"optim.name": "sgd"}},
    }
    what = plan(ranges, higher_is_better=(False,))
    study = begin(tmp_path, what)

    def loss(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        return [abs(attempt.recipe.optim.momentum - 0.3) if attempt.recipe.optim.name == "sgd" else 1.0]

    tuning.search(study, what, loss, Budget(trials=15))
    done = studies.records(study)
    assert all(("optim.momentum" in record.values) == (record.values["optim.name"] == "sgd") for record in done)
    best = trials.winner(done, higher_is_better=False)
    assert best is not None
    assert best.means[0] == min(record.means[0] for record in done if record.outcome == "full") < 0.3


@pytest.mark.slow
def test_two_objectives_give_the_recipes_nobody_beats(tmp_path: Path) -> None:
    what = plan(objectives=("score", "inference_ms"), higher_is_better=(True, False))
    study = begin(tmp_path, what)

    def both(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        return [truth(attempt.values, fold, 0), 10 * attempt.values["optim.weight_decay"]]

    tuning.search(study, what, both, Budget(trials=12))
    done = studies.records(study)
    assert all(len(record.scores) == 5 for record in done)
    front = trials.pareto(done, what.higher_is_better)
    theirs = {trial.number for trial in study.best_trials}
    assert {record.number for record in front} == theirs
    assert "pareto" in studies.figures(study, what)


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_failing_trial_is_told_and_the_search_goes_on(tmp_path: Path) -> None:
    what = plan()
    study = begin(tmp_path, what)
    outcomes: list[str] = []

    @contextmanager
    def around(attempt: Attempt) -> Iterator[None]:
        try:
            yield
        finally:
            outcomes.append(attempt.outcome)

    def fragile(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        if attempt.number == 2:
            raise RuntimeError("out of memory")
        return [float("nan") if attempt.number == 3 else 0.5 + attempt.number / 100]

    tuning.search(study, what, fragile, Budget(trials=5), around, sampler="random", pruner="none")
    assert outcomes == ["full", "full", "failed", "failed", "full"]
    errors = {trial.number: trial.user_attrs.get("error", "") for trial in study.get_trials()}
    assert errors[2] == "RuntimeError: out of memory"
    assert "not a number" in errors[3]
    assert [record.number for record in studies.records(study)] == [0, 1, 4]


def test_a_base_recipe_that_fails_stops_the_study_and_is_tried_again(tmp_path: Path) -> None:
    what = plan()

    def broken(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        raise UserError("photo.jpg", expected="an image", got="a poem")

    with pytest.raises(UserError, match="a poem"):
        tuning.search(begin(tmp_path, what), what, broken, Budget(trials=5))
    study = begin(tmp_path, what)
    tuning.search(study, what, objective, Budget(trials=3))
    assert studies.records(study)[0].is_base


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("postgresql://a:b@db/mlflow", "postgresql+psycopg://c@db/mlflow", True),
        ("postgresql://a@db/mlflow", "postgresql://a@db/studies", False),
        ("sqlite:////x/mlflow.db", "sqlite:////x/mlflow.db", True),
        ("sqlite:////x/../x/mlflow.db", "sqlite:////x/mlflow.db", True),
        ("sqlite:///mlruns/mlflow.db", f"sqlite:///{Path.cwd()}/mlruns/mlflow.db", True),
        ("sqlite:////x/optuna.db", "http://127.0.0.1:5000", False),
        ("no url", "no url", False),
    ],
)
def test_a_study_does_not_share_mlflows_database(one: str, other: str, same: bool) -> None:
    assert place.same_database(one, other) is same


def test_nor_one_that_holds_mlflows_tables_under_another_name(tmp_path: Path, empty_store: Path) -> None:
    (tmp_path / "other.db").symlink_to(empty_store)
    before = empty_store.read_bytes()
    with pytest.raises(UserError, match="that MLflow keeps its runs in"):
        studies.open_storage(f"sqlite:///{tmp_path}/other.db")
    assert empty_store.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranges": {"optim.lr": {"low": 1e-4, "high": 1e-2}}}, "another space"),
        ({"context": {"manifest": "m2"}}, "manifest: 'm1'"),
        ({"slots": FOLDS[:3]}, "slots"),
    ],
)
def test_a_study_of_that_name_with_another_plan_is_refused(changes: Any, words: str, tmp_path: Path) -> None:
    begin(tmp_path, plan())
    with pytest.raises(UserError) as caught:
        begin(tmp_path, plan(**changes))
    assert words in str(caught.value)
    assert "--study" in str(caught.value)


def test_a_recipe_field_that_newer_code_added_does_not_lock_a_study_out(tmp_path: Path) -> None:
    what = plan()
    study = begin(tmp_path, what)
    older = study.user_attrs["plan"]
    del older["base"]["optim"]["momentum"]
    study.set_user_attr("plan", older)
    assert begin(tmp_path, what).study_name == study.study_name


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://octo:s3cret-word@127.0.0.1:1/studies",
        "sqlite:////proc/nowhere/optuna.db",
        "nosuchdb://octo:s3cret-word@host/x",
        "no url s3cret-word",
    ],
)
def test_a_storage_out_of_reach_is_told_without_the_password(url: str) -> None:
    with pytest.raises(UserError) as caught:
        studies.open_storage(url)
    assert "storage" in str(caught.value)
    assert "s3cret-word" not in str(caught.value)


# ---- kills ----------------------------------------------------------------------------------------------------------

WORKER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job begun in the background ignores it
import test_tuning as t
folder, name, journal = Path({folder!r}), {name!r}, Path({folder!r}) / "journal"
what = t.plan()
def slot(attempt, fold, seed):
    with journal.open("a") as file:
        file.write(f"{{attempt.values['optim.lr']:.9f}} {{fold}}\\n")
    if os.environ.get("DIE") == f"{{attempt.number}}.{{fold}}":
        os.kill(os.getpid(), signal.{signal})
    return t.objective(attempt, fold, seed)
study = t.begin(folder, what, name, os.environ["URL"])
t.tuning.search(study, what, slot, t.Budget(trials=7), pruner="none", worker=int(os.environ["WORKER"]))
"""


def work(
    folder: Path, name: str, how: str = "SIGKILL", die: str = "", worker: int = 0, url: str = ""
) -> subprocess.Popen[bytes]:
    text = WORKER.format(tests=str(Path(__file__).parent), folder=str(folder), name=name, signal=how)
    environment = os.environ | {"DIE": die, "WORKER": str(worker), "URL": url, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", text], env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_killed_study_goes_on_with_no_trial_lost_or_doubled(how: str, tmp_path: Path) -> None:
    what = plan()
    whole = begin(tmp_path, what, "whole")
    tuning.search(whole, what, objective, Budget(trials=7), pruner="none")
    killed = work(tmp_path, "parts", how, die="3.2")
    assert killed.wait() in (-signal.SIGKILL, -signal.SIGINT)
    parts = begin(tmp_path, what, "parts")
    asked: list[int] = []

    def slot(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        asked.append(fold)
        return objective(attempt, fold, seed)

    tuning.search(parts, what, slot, Budget(trials=7), pruner="none")
    assert asked[:3] == [2, 3, 4]  # the folds it had done are not done again
    assert told(parts) == told(whole)
    started = (tmp_path / "journal").read_text().split("\n")[:-1]
    assert len(started) == len(set(started)) == 18


@pytest.mark.slow
def test_several_workers_share_a_study_and_stop_together(tmp_path: Path) -> None:
    what = plan()
    begin(tmp_path, what, "shared")
    workers = [work(tmp_path, "shared", worker=number) for number in range(3)]
    for worker in workers:
        assert worker.wait() == 0
    study = begin(tmp_path, what, "shared")
    assert len(studies.records(study)) == 7
    assert sum(record.is_base for record in studies.records(study)) == 1
    assert len((tmp_path / "journal").read_text().split("\n")[:-1]) == 35


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.skipif(servers.binaries() is None, reason="needs PostgreSQL's server (apt-get install postgresql)")
def test_postgresql_keeps_a_study_as_sqlite_does(tmp_path: Path) -> None:
    what = plan()
    whole = begin(tmp_path, what, "whole")
    tuning.search(whole, what, objective, Budget(trials=7), pruner="none")
    with servers.postgres() as url:
        assert work(tmp_path, "parts", "SIGKILL", die="3.2", url=url).wait() == -signal.SIGKILL
        assert work(tmp_path, "parts", url=url).wait() == 0
        storage = studies.open_storage(url)
        assert told(studies.open_study("parts", storage, what)) == told(whole)
        storage.engine.dispose()
    started = (tmp_path / "journal").read_text().split("\n")[:-1]
    assert len(started) == 36  # 35 slots, and the one that was cut short


# ---- what is known, and what is believed ----------------------------------------------------------------------------


def test_earlier_studies_and_good_recipes_warm_a_study(tmp_path: Path) -> None:
    storage = studies.open_storage(f"sqlite:///{tmp_path}/optuna.db")
    before = plan({"optim.lr": RANGES["optim.lr"]})
    old = studies.open_study("old", storage, before)

    def with_defaults(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        values = {"optim.weight_decay": 0.01, "augment.preset": "baseline"} | attempt.values
        return [truth(values, fold, seed)]

    tuning.search(old, before, with_defaults, Budget(trials=8), pruner="none")
    what = plan()
    warm = studies.open_study("warm", storage, what)
    assert studies.take_over(warm, what, "old", storage) == (8, 0)
    assert studies.take_over(warm, what, "old", storage) == (0, 0)
    assert studies.counted(warm) == []  # what is known costs nothing
    good = Recipe.model_validate({"optim": {"lr": 0.01, "weight_decay": 0.1}, "augment": {"preset": "none"}})
    studies.try_early(warm, what, good)
    tuning.search(warm, what, objective, Budget(trials=2), pruner="none")
    assert what.space.recipe(studies.records(warm)[-1].values) == good
    elsewhere = plan(context={"manifest": "m2"})
    hinted = studies.open_study("hinted", storage, elsewhere)
    assert studies.take_over(hinted, elsewhere, "old", storage) == (0, 5)
    with pytest.raises(UserError, match="old"):
        studies.take_over(warm, what, "older", storage)
    with pytest.raises(UserError, match="optim.lr"):
        studies.try_early(warm, what, Recipe.model_validate({"optim": {"lr": 0.9}}))


def test_confirmation_trains_each_fresh_slot_once(tmp_path: Path) -> None:
    what = plan()
    study = begin(tmp_path, what)
    tuning.search(study, what, objective, Budget(trials=3), sampler="random", pruner="none")
    fresh = [(fold, seed) for seed in (1, 2) for fold in range(5)]
    asked: list[tuple[int, int]] = []

    def slot(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        if len(asked) == 4:
            asked.append((-1, -1))
            raise KeyboardInterrupt
        asked.append((fold, seed))
        return objective(attempt, fold, seed)

    chosen = studies.records(study)[:1]
    with pytest.raises(KeyboardInterrupt):
        tuning.confirm(study, what, slot, chosen, fresh)
    found = tuning.confirm(begin(tmp_path, what), what, slot, chosen, fresh)
    assert asked == [*fresh[:4], (-1, -1), *fresh[4:]]
    assert set(found[0]) == {f"f{fold}.s{seed}" for fold, seed in fresh}


def test_what_is_known_is_told_once(tmp_path: Path) -> None:
    storage = studies.open_storage(f"sqlite:///{tmp_path}/optuna.db")
    before = plan(slots=FOLDS[:1])
    old = studies.open_study("old", storage, before)
    tuning.search(old, before, objective, Budget(trials=3), sampler="random")
    what = plan(slots=FOLDS[:1], context={"manifest": "m2"})
    study = studies.open_study("new", storage, what)
    assert studies.take_over(study, what, "old", storage) == (0, 3)
    tuning.search(study, what, objective, Budget(trials=2), sampler="random")
    tuning.search(old, before, objective, Budget(trials=8), sampler="random")
    assert studies.take_over(study, what, "old", storage) == (0, 0)
    optuna.create_study(study_name="foreign", storage=storage)
    with pytest.raises(UserError, match="a study that tune made"):
        studies.take_over(study, what, "foreign", storage)


def test_a_queued_recipe_survives_a_worker_that_came_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = plan(slots=FOLDS[:1])
    study = begin(tmp_path, what)
    good = Recipe.model_validate({"optim": {"lr": 0.01}})
    studies.try_early(study, what, good)

    def while_another_sees_room(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        if not study.get_trials(deepcopy=False)[1].state.is_finished():
            with monkeypatch.context() as patch:
                limits = iter(["", "done", "done"])
                patch.setattr(Budget, "spent", lambda *_: next(limits))
                tuning.search(begin(tmp_path, what), what, objective, Budget(trials=1), worker=1)
        return [0.5]

    tuning.search(study, what, while_another_sees_room, Budget(trials=1), sampler="random")
    assert len(studies.counted(study)) == 1
    tuning.search(study, what, objective, Budget(trials=2), sampler="random")
    assert what.space.recipe(studies.records(study)[-1].values) == good


def test_the_base_recipe_runs_all_its_slots_however_bad_it_is(tmp_path: Path) -> None:
    storage = studies.open_storage(f"sqlite:///{tmp_path}/optuna.db")
    ranges = {"optim.lr": RANGES["optim.lr"]}
    scored = {0.02: 0.9, 1e-4: 0.5}

    def level(attempt: Attempt, fold: int, seed: int) -> Sequence[float]:
        return [scored.get(attempt.values["optim.lr"], 0.8) + fold / 100]

    plans = {lr: Plan(space.read(ranges, Recipe.model_validate({"optim": {"lr": lr}})), FOLDS) for lr in scored}
    good = studies.open_study("good", storage, plans[0.02])
    tuning.search(good, plans[0.02], level, Budget(trials=2), sampler="random")
    study = studies.open_study("bad", storage, plans[1e-4])
    assert studies.take_over(study, plans[1e-4], "good", storage)[0] > 0
    tuning.search(study, plans[1e-4], level, Budget(trials=1), sampler="random")
    (base,) = [record for record in studies.records(study) if record.is_base]
    assert (base.outcome, len(base.scores)) == ("full", 5)
