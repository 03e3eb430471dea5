"""What trials say: the interval holds what it promises, and noise is not called a finding."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from octofold import config
from octofold.recipe import Phase, Recipe
from octofold.tune import trials
from octofold.tune.trials import Record


def scores(values: np.ndarray) -> dict[str, list[float]]:
    """(folds, seeds) numbers as a trial keeps them."""
    return {f"f{fold}.s{seed}": [float(value)] for (fold, seed), value in np.ndenumerate(values)}


def record(number: int, mean: float, outcome: str = "full", cost: float = 0.0) -> Record:
    return Record(number, {}, {"f0.s0": [mean, cost]}, outcome, number == 0)


def test_the_winner_ran_all_its_slots() -> None:
    told = [record(0, 0.8), record(1, 0.99, "pruned"), record(2, 0.9), record(3, 0.9)]
    assert trials.winner(told) == told[2]
    assert trials.winner(told, higher_is_better=False) == told[0]
    assert trials.winner(told[1:2]) is None


def test_the_pareto_front_is_what_nobody_beats() -> None:
    told = [record(0, 0.8, cost=5), record(1, 0.9, cost=9), record(2, 0.85, cost=9), record(3, 0.8, cost=5)]
    assert [found.number for found in trials.pareto(told, (True, False))] == [1, 0]


def test_equal_recipes_are_not_separable_and_better_ones_are() -> None:
    draw = np.random.default_rng(0)
    folds = draw.normal(0.9, 0.02, (5, 1))
    base = folds + draw.normal(0, 0.003, (5, 3))
    same = trials.compare(scores(base), scores(base), True, 5, 0.95)
    assert (same.gain, same.is_separable) == (0.0, False)
    better = trials.compare(scores(base), scores(base + 0.03 + draw.normal(0, 0.003, (5, 3))), True, 5, 0.95)
    assert better.is_separable
    assert better.low < 0.03 < better.high
    assert "better than the base recipe" in better.sentence
    worse = trials.compare(scores(base + 0.03 + draw.normal(0, 0.003, (5, 3))), scores(base), True, 5, 0.95)
    assert not worse.is_separable
    assert "not separable" in worse.sentence or "worse" in worse.sentence
    losses = trials.compare(scores(base + 0.03 + draw.normal(0, 0.003, (5, 3))), scores(base), False, 5, 0.95)
    assert losses.is_separable


def test_one_slot_proves_nothing() -> None:
    one = trials.compare({"f0.s1": [0.5]}, {"f0.s1": [0.9]}, True, 5, 0.95)
    assert one.high == float("inf")
    assert not one.is_separable


@pytest.mark.parametrize("rows", [(20, 20, 20), (19, 20, 21)])
def test_one_more_row_right_in_each_fold_is_no_finding(rows: tuple[int, ...]) -> None:
    sizes = np.array(rows)[:, None]
    fold = np.repeat(np.arange(3), rows)
    base = scores((sizes - 2) / sizes)
    told = {gain: scores((sizes - 2 + gain) / sizes) for gain in (0, 1, 2)}
    step = trials.grain_of("accuracy", fold, (0, 1, 2))
    assert step == pytest.approx(0.05, rel=0.01)
    assert [trials.compare(base, told[gain], True, 3, 0.95, step).is_separable for gain in told] == [False, False, True]
    one = trials.compare(base, told[1], True, 3, 0.95, step)
    assert one.low < 0 < one.gain < one.high < 0.2


@pytest.mark.parametrize("base", [{"f0.s1": [0.9], "f1.s1": [0.85]}, {"f0.s1": [0.9], "f1.s1": [0.9]}])
def test_equal_gains_without_a_grain_have_no_interval(base: dict[str, list[float]]) -> None:
    best = {slot: [value + 0.05] for slot, (value,) in base.items()}
    assert trials.grain_of("log_loss", np.arange(2), (0, 1)) == 0
    verdict = trials.compare(base, best, True, 5, 0.95)
    assert (verdict.low, verdict.is_separable) == (-float("inf"), False)
    assert verdict.sentence.endswith("gain +0.0500, no interval from gains that are all the same")


def test_a_grain_takes_nothing_from_what_is_seen() -> None:
    draw = np.random.default_rng(0)
    base, best = (scores(draw.normal(mean, 0.02, (5, 3))) for mean in (0.8, 0.9))
    plain, grained = (trials.compare(base, best, True, 5, 0.95, step) for step in (0.0, 1 / 200))
    assert plain == grained


def test_the_interval_covers_when_folds_share_their_rows() -> None:
    """Differences correlated as fold models' are (1 / folds): the plain t interval would miss far more often."""
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        shared = draw.normal(0, np.sqrt(0.2 / 0.8))  # correlation 0.2 between the differences
        difference = 0.01 * (shared + draw.normal(0, 1, (5, 2)))
        verdict = trials.compare(scores(np.zeros((5, 2))), scores(difference), True, 5, 0.0)
        hits += verdict.low <= 0 <= verdict.high
    assert hits / 400 > 0.92


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(member="m", phases=[Phase(name="probe", train="head", lr=1e-3)])])
def test_a_recipe_is_written_so_that_train_reads_it(recipe: Recipe, tmp_path: Path) -> None:
    text = trials.recipe_text(recipe, "tuned", ["oof/accuracy 0.9 (one seed)", "study x"])
    assert text.startswith("# oof/accuracy")
    read = config.build(Recipe, yaml.safe_load(text), "best.yaml")
    assert read == recipe.model_copy(update={"member": "tuned"})
