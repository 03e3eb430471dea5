"""Promotion: a member's slots move to a stage, behind a gate, with an audit trail and a way back.

Before anything moves, the run that promotes gets ``promotion.json``: what each slot was and what it shall be. So a
promotion that was cut can be finished by the same command, or undone by ``--rollback``, to exactly what was before.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any

from octofold.errors import UserError, preview, redact
from octofold.track import registry, tracking, versions
from octofold.track.registry import Slot, marker
from octofold.track.standing import Move, Place, mirror, new_stages, place_of, places_of, plan, undone
from octofold.track.store import uri

log = logging.getLogger("octofold")
STATE = "promotion.state"
"""Tag of an audited run: ``started``, ``done``, ``unchanged``, ``superseded`` by the one that finished it, or
``rolled_back``."""
AUDIT = "promotion.json"
UNDONE = "rollback.json"


def promote(
    run: tracking.Run,
    competition: str,
    member: str,
    stage: str,
    *,
    manifest_hash: str | None,
    all_folds: Sequence[int] | None,
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    filled: Sequence[str] | None = None,
    force: bool = False,
) -> list[Move]:
    """Move the latest version of each of a member's slots to `stage`, or just these versions; say what it replaced.

    The latest is that of the manifest at hand, where there is one.

    Args:
        run: the MLflow run that keeps the audit trail.
        competition: name of the problem.
        member: recipe name; empty = every member.
        stage: ``staging`` or ``production``.
        manifest_hash: of the manifest at hand; None = there is none.
        all_folds: its folds; None = there is no manifest.
        folds: only these.
        seeds: only these.
        filled: exactly these versions, ``<registered name>/<version>``, and no other slot; None = the latest ones.
        force: go through the gate although folds are missing or data differ.

    Raises:
        UserError: no such member, or the gate stays shut.
    """
    latest = newest(competition, member, manifest_hash)
    if not latest:
        raise UserError(
            f"member '{member}' of {competition}" if member else f"competition '{competition}'",
            expected="registered fold models",
            got=f"none in {redact(uri())}; members there: {preview(registry.newest(competition)) or 'none'}",
            fix="train it first, or set MLFLOW_TRACKING_URI to the store it was trained in",
        )
    known = cache(partial(_versions, competition, latest))
    given = latest if filled is None else _exactly(latest, filled, stage, known)
    chosen = [
        (slot, place)
        for slot, place in given
        if (folds is None or slot.fold in folds) and (seeds is None or slot.seed in seeds)
    ]
    others = _standing(latest, {slot.name for slot, _ in chosen}, stage, known)
    for name in sorted({slot.member for slot, _ in latest}):
        if not (mine := [slot for slot, _ in chosen if slot.member == name]):
            raise UserError(f"member '{name}'", expected="slots among those folds and seeds", got="none")
        mine += [slot for slot in others if slot.member == name]
        check(name, mine, stage, manifest_hash, all_folds, seeds, force)
    moves = [plan(slot, stage, place) for slot, place in chosen]
    moves, unfinished = _since_unfinished(competition, stage, moves)
    _begin(run, stage, moves)
    for run_id in unfinished:  # only now: cut in between, there would be no way back to what was before
        tracking.client().set_tag(run_id, STATE, "superseded")
    _apply(moves, [place for _, place in chosen])
    for slot, _ in chosen:
        versions.set_version_tags(slot.name, slot.version, {f"promotion.{stage}": run.id})
    run.set_tags({STATE: "done" if any(move.before != move.after for move in moves) else "unchanged"})
    return moves


def newest(competition: str, member: str, manifest_hash: str | None = None) -> list[tuple[Slot, Place]]:
    """Return the latest version of each of a member's slots (empty = every member's), and where its versions stand.

    Of a slot trained on the manifest of this hash and on others, the latest of those on this one.
    """
    listed = registry.models(competition, [member] if member else None)
    slots = registry.newest_on(listed, manifest_hash)
    return [(slot, place_of(model)) for model, slot in zip(listed, slots, strict=True) if slot is not None]


def _exactly(
    latest: Sequence[tuple[Slot, Place]], filled: Sequence[str], stage: str, known: Callable[[], dict[str, Slot]]
) -> list[tuple[Slot, Place]]:
    """Return the versions named, with their places.

    Raises:
        UserError: no such version.
    """
    slots = known()
    if absent := [version for version in filled if version not in slots]:
        raise UserError(
            f"promotion to {stage}", expected="registered versions", got=f"nothing registered as {preview(absent)}"
        )
    places = {slot.name: place for slot, place in latest}
    return [(slots[version], places[slots[version].name]) for version in filled]


def _standing(
    latest: Sequence[tuple[Slot, Place]], chosen: set[str], stage: str, known: Callable[[], dict[str, Slot]]
) -> list[Slot]:
    """Return what stands in `stage` in the slots that do not move.

    It will be bagged with those that do: the gate looks at both.
    """
    rest = {slot.name: place.aliases.get(stage) for slot, place in latest if slot.name not in chosen}
    names = [f"{name}/{version}" for name, version in sorted(rest.items()) if version is not None]
    slots = known() if names else {}
    return [slots[name] for name in names if name in slots]


def _versions(competition: str, latest: Sequence[tuple[Slot, Place]]) -> dict[str, Slot]:
    """Every version of these members' slots, by ``<registered name>/<version>``."""
    known = registry.slots(competition, sorted({slot.member for slot, _ in latest}))
    return {f"{slot.name}/{slot.version}": slot for named in known.values() for one in named.values() for slot in one}


def check(
    member: str,
    slots: Sequence[Slot],
    stage: str,
    manifest_hash: str | None,
    all_folds: Sequence[int] | None,
    seeds: Sequence[int] | None,
    force: bool,
) -> None:
    """The gate: every fold with every seed, trained on the data at hand, by one recipe.

    Raises:
        UserError: something is missing or differs, and `force` is not set.
    """
    wrong = []
    there = {(slot.fold, slot.seed) for slot in slots}
    every_seed = sorted(set(seeds) if seeds is not None else {seed for _, seed in there})
    needed = {(fold, seed) for fold in all_folds or sorted({fold for fold, _ in there}) for seed in every_seed or [0]}
    if missing := sorted(needed - there):
        named = preview([f"fold {fold} seed {seed}" for fold, seed in missing])
        wrong.append((f"all {len(needed)} slots trained", f"missing: {named}", "train the missing ones"))
    if manifest_hash is None:
        wrong.append(
            ("a manifest to compare with", "none", f"run prepare, so that data/…/manifest.csv of {member} is there")
        )
    odd = [slot for slot in slots if manifest_hash is not None and slot.manifest_hash != manifest_hash]
    if odd:
        got = f"{odd[0].name} version {odd[0].version} from manifest {odd[0].manifest_hash[:12] or 'unknown'}"
        wrong.append((f"manifest {(manifest_hash or '')[:12]}", got, "train it again on the manifest at hand"))
    if len({slot.classes_hash for slot in slots}) > 1:
        wrong.append(("one class order", "slots that differ in it", "train the member again"))
    if len({slot.recipe_hash for slot in slots}) > 1:
        wrong.append(("one recipe", "slots trained by different recipes", "train the rest again, or rename the member"))
    if wrong and not force:
        raise UserError(
            f"gate of {stage}: member '{member}'",
            expected="; ".join(expected for expected, _, _ in wrong),
            got="; ".join(got for _, got, _ in wrong),
            fix=f"{wrong[0][2]}, or promote all the same with --force",
        )
    for expected, got, _ in wrong:
        log.warning("--force: member '%s': expected %s, got %s", member, expected, got)


def rollback(run: tracking.Run, competition: str, member: str, stage: str) -> list[Move]:
    """Undo the last promotion to `stage` (of `member`, or whichever was last), exactly; again undoes the one before.

    What somebody put in the other stage since stays there.

    Raises:
        UserError: nothing to undo, or somebody moved things since by hand.
    """
    done = _audits(competition, stage, ("started", "done"))
    entries = [(info, _moves_of(info.id)) for info in done]
    fitting = [(info, moves) for info, moves in entries if not member or member in {move.member for move in moves}]
    if not fitting:
        raise UserError(
            f"rollback of {stage}",
            expected=f"an earlier promotion of {member or 'any member'} in {competition}",
            got="none that is not rolled back already",
        )
    info, moves = fitting[0]
    mine = [move for move in moves if not member or move.member == member]
    places = places_of([move.name for move in mine])
    cut = {move.name for move in mine} if info.tags[STATE] == "started" else _begun_to_undo(competition, info.id)
    for move, now in zip(mine, places, strict=True):
        _check_unmoved(move, now, stage, info.id, was_cut=move.name in cut)
    back = [undone(move, now, stage) for move, now in zip(mine, places, strict=True)]
    _check_there(back, places)
    run.log_dict({"rolled_back": info.id, "moves": [asdict(move) for move in back]}, UNDONE)
    run.set_tags({"rollback.of": info.id, "rollback.stage": stage})
    _apply(back, places)
    rest = [move for move in moves if move not in mine]
    api = tracking.client()
    if rest:  # a partial rollback leaves the other members' way back open
        api.log_dict(info.id, {"stage": stage, "moves": [asdict(move) for move in rest]}, AUDIT)
    else:
        api.set_tag(info.id, STATE, "rolled_back")
    return back


def _begun_to_undo(competition: str, run_id: str) -> set[str]:
    """Return the registered models that an earlier rollback of this promotion was about: it was cut, maybe half way."""
    found = tracking.find_runs(competition, {"rollback.of": run_id})
    stored = [json.loads(tracking.download(info.id, UNDONE).read_text(encoding="utf-8")) for info in found]
    return {move["name"] for entry in stored for move in entry["moves"]}


def _check_unmoved(move: Move, now: Place, stage: str, run_id: str, *, was_cut: bool) -> None:
    """Refuse to undo a move after which somebody moved the alias, or the legacy stage, to another version.

    What is as it was before is fine if the promotion, or a rollback of it, was cut. Else it was moved: a version that
    went from staging on to production leaves staging as empty as it was before.

    Raises:
        UserError: moved since.
    """
    alias, staged = now.aliases.get(stage), mirror(now, stage)
    is_whole = alias == move.after.aliases.get(stage) and now.records.get(stage, "") == move.after.records[stage]
    mirrors = [mirror(move.after, stage)] + ([] if is_whole else [mirror(move.before, stage), None])
    aliases = [move.after.aliases.get(stage)] + ([move.before.aliases.get(stage)] if was_cut else [])
    odd = None
    if alias not in aliases:
        odd = f"version {alias or 'none'}"
    elif versions.has_stages() and staged not in mirrors:
        odd = f"MLflow stage on version {staged or 'none'}"
    if odd:
        raise UserError(
            f"{move.name}, {stage}",
            expected=f"version {move.version}, as promoted by run {run_id}",
            got=f"{odd}, moved since",
            fix="promote or move it by hand; a rollback would undo somebody else's choice",
        )


def _apply(moves: Sequence[Move], places: Sequence[Place]) -> None:
    """Write what a move changes and is not so yet: alias first (the truth), then the mirror, then the record of both.

    Args:
        moves: what shall be.
        places: what is now, as just read; after a cut it is neither a move's `before` nor its `after`.
    """
    for move, now in zip(moves, places, strict=True):
        to = move.after
        for alias in sorted(set(now.aliases) | set(to.aliases)):
            if now.aliases.get(alias) != to.aliases.get(alias):
                versions.set_alias(move.name, alias, to.aliases.get(alias))
        for version, wanted in new_stages(move, now).items():
            versions.set_stage(move.name, version, wanted)
        for stage in sorted(set(now.records) | set(to.records)):
            if now.records.get(stage, "") != to.records.get(stage, "") and versions.has_stages():
                versions.set_model_tag(move.name, marker(stage), to.records.get(stage, ""))
        log.info("%s", move)


def _check_there(moves: Sequence[Move], places: Sequence[Place]) -> None:
    """Refuse, before anything moves, what would end half way: a version to be moved was deleted since.

    Raises:
        UserError: deleted.
    """
    known = {(version.name, int(version.version)) for version in versions.versions_of([move.name for move in moves])}
    needed = [
        (move.name, version)
        for move, now in zip(moves, places, strict=True)
        for version in sorted({*move.after.aliases.values(), *new_stages(move, now)})
    ]
    if gone := [f"{name} version {version}" for name, version in needed if (name, version) not in known]:
        raise UserError(
            "rollback",
            expected="every version that it brings back",
            got=f"deleted: {preview(gone)}; nothing was moved",
            fix="promote another version, or train and promote again",
        )


def _begin(run: tracking.Run, stage: str, moves: Sequence[Move]) -> None:
    """Write the audit entry before anything moves."""
    run.log_dict({"stage": stage, "moves": [asdict(move) for move in moves]}, AUDIT)
    run.set_tags({
        "promotion.stage": stage,
        "promotion.members": ", ".join(sorted({move.member for move in moves})),
        STATE: "started",
    })  # fmt: skip


def _audits(competition: str, stage: str, states: Sequence[str]) -> list[tracking.RunInfo]:
    found = tracking.find_runs(competition, {"promotion.stage": stage})
    return [info for info in found if info.tags.get(STATE) in states]


def _moves_of(run_id: str) -> list[Move]:
    stored: Any = json.loads(tracking.download(run_id, AUDIT).read_text(encoding="utf-8"))
    return [
        Move(**{**move, "before": Place(**move["before"]), "after": Place(**move["after"])}) for move in stored["moves"]
    ]


def _since_unfinished(competition: str, stage: str, moves: list[Move]) -> tuple[list[Move], list[str]]:
    """A promotion that was cut half way is finished now: its "before" is the one to come back to; and its runs."""
    was: dict[str, Move] = {}
    runs = []
    for info in _audits(competition, stage, ("started",)):
        earlier = _moves_of(info.id)
        if {move.name for move in earlier} <= {move.name for move in moves}:
            was |= {move.name: move for move in earlier}
            runs.append(info.id)
    return [
        Move(m.name, m.member, m.version, was[m.name].replaced, was[m.name].before, m.after) if m.name in was else m
        for m in moves
    ], runs
