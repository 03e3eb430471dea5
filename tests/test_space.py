"""The search space: what is written is what is searched, and what makes no sense is refused before the first trial."""

import random
from typing import Any

import pytest

from octofold.errors import UserError
from octofold.recipe import Recipe
from octofold.tune import space

BASE = Recipe()


def at_random(draw: random.Random) -> Any:
    """A stand-in for the search engine: any value the knob allows."""

    def suggest(knob: space.Knob) -> Any:
        if knob.kind == "choice":
            return draw.choice(knob.choices)
        value = draw.uniform(knob.low, knob.high)
        return round(value) if knob.kind == "int" else value

    return suggest


WRITTEN = {
    "optim.lr": {"low": "1e-5", "high": "1e-2", "log": True},
    "optim.name": {"choices": ["adamw", "sgd"]},
    "optim.momentum": {"low": 0.0, "high": 0.95, "when": {"optim.name": ["sgd"]}},
    "optim.clip_norm": {"choices": [None, 1.0, "5"]},
    "phases.0.epochs": {"low": 5, "high": 20},
    "phases.0.step_epochs": {"choices": [[], [3, 6]]},
    "model.highpass": {"choices": [True, False]},
    "batch_size": {"low": 16, "high": 64, "step": 16},
}


def test_every_sample_is_a_valid_recipe_and_reads_back_as_itself() -> None:
    built = space.read(WRITTEN, BASE)
    for seed in range(30):
        values = built.sample(at_random(random.Random(seed)))
        values["batch_size"] = 16 * round(values["batch_size"] / 16)
        recipe = built.recipe(values)
        assert built.values_of(recipe) == values
        assert ("optim.momentum" in values) == (recipe.optim.name == "sgd")
        assert recipe.loss == BASE.loss


def test_texts_become_numbers_as_the_recipe_reads_them() -> None:
    built = space.read(WRITTEN, BASE)
    by_field = {knob.field: knob for knob in built.knobs}
    assert (by_field["optim.lr"].low, by_field["optim.lr"].high) == (1e-5, 1e-2)
    assert by_field["optim.clip_norm"].choices == (None, 1.0, 5.0)
    assert by_field["phases.0.epochs"].kind == "int"


def test_a_condition_may_be_written_before_what_it_asks_about() -> None:
    turned = dict(reversed(WRITTEN.items()))
    assert space.read(turned, BASE).describe() == space.read(WRITTEN, BASE).describe()


def test_the_base_recipe_lies_inside() -> None:
    built = space.read(WRITTEN, BASE)
    assert built.recipe(built.values_of(BASE)) == BASE


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({}, "nothing to search"),
        ({"optim.lr": {"low": 1e-2, "high": 1e-5}}, "low < high"),
        ({"optim.lr": {"low": 1e-3, "high": 1e-3}}, "low < high"),
        ({"optim.lr": {"low": 0, "high": 1, "log": True}}, "low > 0"),
        ({"optim.lr": {"low": -1, "high": 1}}, "the recipe refuses -1"),
        ({"optim.lr": {"high": 1}}, "low and high"),
        ({"optim.lr": {"low": 1e-5, "high": float("inf")}}, "finite"),
        ({"phases.0.epochs": {"low": 5, "high": 40, "step": 0.5}}, "a whole step"),
        ({"phases.0.epochs": {"low": 5, "high": 40, "step": 2.5}}, "a whole step"),
        ({"optim.lr": {"low": 1e-5, "high": 1, "choices": [1]}}, "got:      both"),
        ({"optim.lr": {"lo": 1e-5, "high": 1}}, "no such setting"),
        ({"optim.learn_rate": {"low": 0, "high": 1}}, "optim has: name, lr, weight_decay"),
        ({"optimizer.lr": {"low": 0, "high": 1}}, "recipe has: member, model"),
        ({"optim": {"choices": [1]}}, "one of its fields: name, lr"),
        ({"optim.name": {"low": 1, "high": 2}}, "choices"),
        ({"optim.name": {"choices": ["adamw", "lion"]}}, "the recipe refuses 'lion'"),
        ({"optim.name": {"choices": []}}, "at least 1 item"),
        ({"phases.3.lr": {"low": 1e-5, "high": 1}}, "phases.0"),
        ({"phases.lr": {"low": 1e-5, "high": 1}}, "phases.0"),
        ({"metric": {"choices": ["accuracy", "log_loss"]}}, "yardstick"),
        ({"seeds": {"choices": [[0], [1]]}}, "yardstick"),
        ({"overfit": {"choices": [0, 1]}}, "yardstick"),
        ({"classes": {"choices": [[], ["ash"]]}}, "yardstick"),
        ({"select": {"choices": ["best", "last"]}}, "yardstick"),
        ({"tta": {"choices": ["geo8", "none"]}}, "yardstick"),
        ({"runtime.threads": {"choices": [None, 1]}}, "yardstick"),
        ({"optim.lr": {"low": 0.1, "high": 1}}, "the base recipe is the first trial"),
        ({"phases.0.lr": {"low": 0.1, "high": 1}}, "None in the recipe"),
        ({"optim.lr": {"low": 1e-5, "high": 1, "when": {"optim.nam": "sgd"}}}, "no such setting"),
        ({"optim.lr": {"low": 1e-5, "high": 1, "when": {"optim.name": "lion"}}}, "refuses 'lion'"),
        (
            {
                "optim.lr": {"low": 1e-5, "high": 1, "when": {"batch_size": 32}},
                "batch_size": {"low": 8, "high": 64, "when": {"optim.lr": 1e-3}},
            },
            "a circle",
        ),
    ],
)
def test_nonsense_is_refused_with_the_words_that_help(ranges: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        space.read(ranges, BASE, "configs/tune/x.yaml")
    assert words in str(caught.value)


def test_a_recipe_with_fewer_phases_lies_outside() -> None:
    two = Recipe.model_validate({"phases": [{"name": "a"}, {"name": "b"}]})
    built = space.read({"phases.1.epochs": {"low": 1, "high": 50}}, two)
    with pytest.raises(UserError, match=r"phases\.1\.epochs"):
        built.values_of(BASE)
