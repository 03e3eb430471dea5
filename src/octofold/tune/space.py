"""The search space: ranges over recipe fields, read from YAML and checked before the first trial.

    optim.lr:           {low: 1e-5, high: 1e-2, log: true}
    optim.name:         {choices: [adamw, sgd]}
    optim.momentum:     {low: 0.5, high: 0.95, when: {optim.name: sgd}}
    phases.0.epochs:    {low: 5, high: 40, step: 5}

Any recipe field can be searched; a phase is addressed by its place. Knows nothing of the search engine.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Union, get_args, get_origin

from pydantic import Field

from octofold.config import Section, build
from octofold.errors import UserError
from octofold.recipe import Recipe

FIXED = ("member", "metric", "folds", "seeds", "overfit", "classes", "select", "tta", "runtime")
"""Fields that say what is measured, or how fast: searching them would pick a kinder yardstick, not a better recipe."""

Values = dict[str, Any]


class Range(Section):
    """One searched field as written in the YAML: `choices`, or `low` and `high`."""

    low: float | None = Field(None, description="smallest value")
    high: float | None = Field(None, description="largest value")
    step: float | None = Field(None, gt=0, description="grid distance from low")
    log: bool = Field(False, description="search the logarithm")
    choices: list[Any] | None = Field(None, min_length=1, description="the values to choose from")
    when: dict[str, Any] = Field({}, description="search only if these fields have this value, or one of a list")


@dataclass(frozen=True)
class Knob:
    """A searched field, checked against the recipe's schema.

    Attributes:
        field: dotted name, ``optim.lr`` or ``phases.0.lr``.
        kind: ``int``, ``float`` or ``choice``.
        choices: text, number, bool or None each; a list or mapping is kept as its JSON text (`decode` undoes it).
        when: field -> values under which this one is searched; otherwise the base recipe's value stays.
    """

    field: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def holds(self, value: Any) -> bool:
        """Tell whether a recipe value can be expressed by this knob."""
        if self.kind == "choice":
            return encode(value) in self.choices
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-6

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"one of {', '.join(map(str, self.choices))}"
        return f"{self.low:g} to {self.high:g}" + (f" in steps of {self.step:g}" if self.step else "")


@dataclass(frozen=True)
class Space:
    """Knobs over a base recipe, each after those its condition asks about."""

    base: Recipe
    knobs: tuple[Knob, ...]

    def sample(self, suggest: Callable[[Knob], Any]) -> Values:
        """Ask `suggest` for every knob whose condition holds; return ``{field: value}``."""
        values: Values = {}
        plain = self.base.model_dump(mode="json")
        for knob in self.knobs:
            if all(values.get(name, _get(plain, name)) in allowed for name, allowed in knob.when):
                values[knob.field] = suggest(knob)
        return values

    def recipe(self, values: Values) -> Recipe:
        """Return the base recipe with `values` put in.

        Raises:
            UserError: the recipe refuses the combination.
        """
        plain = self.base.model_dump(mode="json")
        for field, value in values.items():
            _put(plain, field, decode(value))
        return build(Recipe, plain, "tried recipe")

    def values_of(self, recipe: Recipe) -> Values:
        """Return what the knobs would have to say for `recipe`; its other fields are not looked at.

        Raises:
            UserError: a field's value lies outside its range; the message names it.
        """
        plain = recipe.model_dump(mode="json")

        def ask(knob: Knob) -> Any:
            try:
                value = _get(plain, knob.field)
            except (KeyError, IndexError, TypeError):
                raise UserError(f"space.{knob.field}", expected=str(knob), got="no such field in the recipe") from None
            if not knob.holds(value):
                raise UserError(f"space.{knob.field}", expected=str(knob), got=f"{value!r} in the recipe")
            return encode(value)

        return self.sample(ask)

    def describe(self) -> dict[str, Any]:
        """Return plain JSON that is equal exactly for equal spaces, whatever the order in the YAML."""
        return {knob.field: json.loads(json.dumps(vars(knob) | {"field": ""})) for knob in self.knobs}


def read(ranges: Mapping[str, Any], base: Recipe, source: object = "space") -> Space:
    """Check ranges against the recipe's schema.

    Args:
        ranges: dotted field -> mapping with the keys of `Range`.
        base: the recipe they vary; each of its searched values must lie inside, since it is the first trial.
        source: what to call it in errors.

    Raises:
        UserError: no range, an unknown or forbidden field, a range upside down, a bound or choice the recipe refuses,
            conditions in a circle, or a base value outside its range.
    """
    if not ranges:
        raise UserError(source, expected="space: ranges over recipe fields", got="nothing to search")
    knobs = [_knob(field, spec, base, source) for field, spec in ranges.items()]
    space = Space(base, _in_order(knobs, source))
    try:
        space.values_of(base)
    except UserError as error:
        raise UserError(
            f"{source}: the base recipe is the first trial, but it lies outside",
            got=str(error).replace("\n", "\n  "),
            fix="widen the range, or set the field in the base recipe",
        ) from None
    return space


def encode(value: Any) -> Any:
    """Make a choice storable: lists and mappings as JSON text, the rest as it is."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value


def decode(value: Any) -> Any:
    """Undo `encode`; a file called ``[old].pth`` stays itself."""
    try:
        return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value
    except json.JSONDecodeError:
        return value


def _knob(field: str, spec: Any, base: Recipe, source: object) -> Knob:
    where = f"{source}: {field}"
    if field.split(".")[0] in FIXED:
        raise UserError(where, expected="a field of the recipe that is not the yardstick", got="says what is measured")
    kind = _kind(field, base, source)
    limits = build(Range, spec if isinstance(spec, dict) else {"choices": spec}, where)
    when = tuple((name, _condition(name, wanted, base, source)) for name, wanted in sorted(limits.when.items()))
    if limits.choices is not None:
        if limits.low is not None or limits.high is not None:
            raise UserError(where, expected="choices, or low and high", got="both")
        choices = tuple(encode(_accepted(field, value, base, where)) for value in limits.choices)
        return Knob(field, "choice", choices=tuple(dict.fromkeys(choices)), when=when)
    if kind not in ("int", "float"):
        raise UserError(where, expected=f"choices: [...] (the field is {kind})", got="no choices")
    if limits.low is None or limits.high is None:
        raise UserError(where, expected="low and high, or choices", got=f"low {limits.low}, high {limits.high}")
    if not (isfinite(limits.low) and isfinite(limits.high)):
        raise UserError(where, expected="low and high that are finite", got=f"low {limits.low:g}, high {limits.high:g}")
    if kind == "int" and limits.step and limits.step != int(limits.step):
        raise UserError(where, expected="a whole step (the field is int)", got=f"step {limits.step:g}")
    if not limits.low < limits.high:
        raise UserError(where, expected="low < high", got=f"low {limits.low:g}, high {limits.high:g}")
    if limits.log and (limits.low <= 0 or limits.step):
        raise UserError(where, expected="low > 0 and no step with log: true", got=f"low {limits.low:g}")
    low, high = (_accepted(field, bound, base, where) for bound in (limits.low, limits.high))
    if kind == "int":
        low, high = int(low), int(high)
    return Knob(field, kind, low, high, limits.step, limits.log, when=when)


def _accepted(field: str, value: Any, base: Recipe, where: str) -> Any:
    """The value as the recipe's schema reads it (``'1e-3'`` becomes 0.001), or a refusal naming the field."""
    plain = base.model_dump(mode="json")
    _put(plain, field, value)
    try:
        return _get(build(Recipe, plain, where).model_dump(mode="json"), field)
    except UserError as error:
        raise UserError(f"{where}: the recipe refuses {value!r}", got=str(error)) from None


def _condition(name: str, wanted: Any, base: Recipe, source: object) -> tuple[Any, ...]:
    _kind(name, base, source)
    return tuple(
        encode(_accepted(name, value, base, f"{source}: when"))
        for value in (wanted if isinstance(wanted, list) else [wanted])
    )


def _in_order(knobs: list[Knob], source: object) -> tuple[Knob, ...]:
    """Sort so that a condition is decided before it is asked about; otherwise as written."""
    waiting = list(knobs)
    done: list[Knob] = []
    while waiting:
        names = {knob.field for knob in waiting}
        ready = [knob for knob in waiting if not names & {name for name, _ in knob.when}]
        if not ready:
            raise UserError(source, expected="conditions that end somewhere", got=f"a circle: {', '.join(names)}")
        done += ready
        waiting = [knob for knob in waiting if knob not in ready]
    return tuple(done)


def _kind(field: str, base: Recipe, source: object) -> str:
    """``int``, ``float`` or another word for the type of a recipe field."""
    kind: Any = Recipe
    value: Any = base
    for place, name in enumerate(field.split(".")):
        so_far = ".".join(field.split(".")[:place])
        if isinstance(value, list):
            if not name.isdigit() or int(name) >= len(value):
                numbers = ", ".join(f"{so_far}.{i}" for i in range(len(value)))
                raise UserError(f"{source}: {field}", expected=numbers, got=f"{so_far}.{name}")
            kind, value = type(value[int(name)]), value[int(name)]
            continue
        if not isinstance(value, Section) or name not in type(value).model_fields:
            valid = ", ".join(type(value).model_fields) if isinstance(value, Section) else "nothing further"
            raise UserError(
                f"{source}: {field}: no such setting", expected=f"{so_far or 'recipe'} has: {valid}", got=name
            )
        kind, value = type(value).model_fields[name].annotation, getattr(value, name)
    if isinstance(value, Section):
        raise UserError(
            f"{source}: {field}", expected="one of its fields: " + ", ".join(type(value).model_fields), got="a group"
        )
    options = get_args(kind) if get_origin(kind) is Union or "|" in str(kind) else (kind,)
    for name, numeric in (("float", float), ("int", int)):
        if numeric in options:
            return name
    return "text" if str in options or "Literal" in str(kind) else str(getattr(kind, "__name__", kind))


def _get(plain: Any, field: str) -> Any:
    for name in field.split("."):
        plain = plain[int(name)] if isinstance(plain, list) else plain[name]
    return plain


def _put(plain: Any, field: str, value: Any) -> None:
    *path, last = field.split(".")
    for name in path:
        plain = plain[int(name)] if isinstance(plain, list) else plain[name]
    plain[int(last) if isinstance(plain, list) else last] = copy.deepcopy(value)
