"""Standing: where the versions of a slot stand, what a promotion makes of that, and what undoing it restores."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from octofold.track import versions
from octofold.track.registry import LEGACY, Slot, marker

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where the versions of one registered model stand: all that a promotion may change.

    Attributes:
        aliases: version by alias (`staging`, `production`), of those that are set.
        records: what `promote` last set, by stage.
        stages: legacy stage by version, of the latest version in each stage but "None". Where somebody put two in one,
            the lower stays as it is: nobody resolves to it.
    """

    aliases: dict[str, int] = field(default_factory=dict)
    records: dict[str, str] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Move:
    """One slot's step: from `before` to `after`, putting `version` in the stage in place of `replaced`."""

    name: str
    member: str
    version: int | None
    replaced: int | None
    before: Place
    after: Place

    def __str__(self) -> str:
        new, old = (f"version {number}" if number else "nothing" for number in (self.version, self.replaced))
        return f"{self.name}: {new} replaces {old}" if new != old else f"{self.name}: {new} stays"


def plan(slot: Slot, stage: str, before: Place) -> Move:
    """Return what the slot's registered model shall look like after `slot.version` moved to `stage`."""
    version, own = str(slot.version), LEGACY[stage]
    aliases = {**before.aliases, stage: slot.version}
    records = {**before.records, stage: version}
    stages = {name: ("Archived" if kept == own else kept) for name, kept in before.stages.items()}
    staged = before.aliases.get("staging")
    if stage == "production" and staged == slot.version:
        del aliases["staging"]  # it moves on
        records["staging"] = ""
    elif stage == "production" and _is_shown(before, str(staged), "staging"):
        stages[str(staged)] = LEGACY["staging"]  # if it was in both: shown as Production so far
    if not (stage == "staging" and before.stages.get(version) == LEGACY["production"]):
        stages[version] = own
    else:
        stages[version] = LEGACY["production"]  # one version in both: MLflow has room for one legacy stage
    return Move(
        slot.name, slot.member, slot.version, before.aliases.get(stage), before, Place(aliases, records, stages)
    )


def undone(move: Move, now: Place, stage: str) -> Move:
    """Return what takes a promotion to `stage` back; what somebody put in the other stage since stays there.

    Args:
        move: the promotion's step.
        now: where things stand; after a cut it is neither the step's `before` nor its `after`.
        stage: what was promoted to.
    """
    other = "production" if stage == "staging" else "staging"
    then = (_standing(move.before, other), _standing(move.after, other))
    if all(value in pair for value, *pair in zip(_standing(now, other), *then, strict=True)):
        after = move.before
    else:
        numbers = {*move.before.stages, *move.after.stages, *now.stages}
        stages = {number: _shown(number, move.before, stage, now, other) for number in sorted(numbers, key=int)}
        after = Place(
            _mixed(move.before.aliases, now.aliases, other),
            _mixed(move.before.records, now.records, other),
            {number: shown for number, shown in stages.items() if shown != "None"},
        )
    return Move(move.name, move.member, move.replaced, move.version, before=move.after, after=after)


def new_stages(move: Move, now: Place) -> dict[int, str]:
    """Return the legacy stages that a move changes and that are not so yet, by version, in the order to write them."""
    was, wanted = move.before.stages, move.after.stages
    order = sorted(set(was) | set(wanted), key=lambda number: (wanted.get(number, ""), int(number)))
    new = {number: wanted.get(number, "None") for number in order}
    return {int(n): stage for n, stage in new.items() if was.get(n, "None") != stage != now.stages.get(n, "None")}


def mirror(place: Place, stage: str) -> int | None:
    """Return the version that MLflow's legacy stages show in `stage`, as `registry.choose` reads them."""
    return max((int(number) for number in place.stages if _is_shown(place, number, stage)), default=None)


def _is_shown(place: Place, number: str, stage: str) -> bool:
    """Tell whether the legacy stages show a version in `stage`; one that is in both is shown as Production."""
    if place.stages.get(number) == LEGACY[stage]:
        return True
    is_both = stage == "staging" and place.stages.get(number) == LEGACY["production"]
    return is_both and LEGACY[stage] not in place.stages.values() and place.aliases.get(stage) == int(number)


def _shown(number: str, own: Place, stage: str, now: Place, other: str) -> str:
    """The legacy stage of a version when `stage` comes back as it was in `own`, while `other` stays as it is `now`."""
    stands = [where for where, place in ((stage, own), (other, now)) if _is_shown(place, number, where)]
    if stands:
        return LEGACY["production" if "production" in stands else "staging"]
    live = (LEGACY["production"], LEGACY["staging"])
    was, shown = own.stages.get(number, "None"), now.stages.get(number, "None")
    if was not in live:
        return was
    return shown if shown not in live else LEGACY["archived"]  # a newer one has taken its place since


def _standing(place: Place, stage: str) -> tuple[int | None, str, int | None]:
    return place.aliases.get(stage), place.records.get(stage, ""), mirror(place, stage)


def _mixed(own: Mapping[str, T], now: Mapping[str, T], other: str) -> dict[str, T]:
    kept = {name: value for name, value in own.items() if name != other}
    return kept | ({other: now[other]} if other in now else {})


def places_of(names: Sequence[str]) -> list[Place]:
    """Read where things stand, for each registered model asked for: one listing."""
    listed = {model.name: model for model in versions.registered_models(os.path.commonprefix(list(names)))}
    return [place_of(listed.get(name) or versions.registered_model(name)) for name in names]


def place_of(model: Any) -> Place:
    """Return where the versions of MLflow's registered model stand."""
    return Place(
        aliases={alias: int(version) for alias, version in model.aliases.items() if alias in LEGACY},
        records={stage: model.tags[marker(stage)] for stage in LEGACY if marker(stage) in model.tags},
        stages={str(v.version): v.current_stage for v in model.latest_versions if v.current_stage != "None"},
    )
