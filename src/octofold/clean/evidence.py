"""Evidence: what speaks against each label, in numbers to rank by and in words to read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octofold.clean import suspicion
from octofold.data.manifest import Manifest

Array = npt.NDArray[Any]
FAR = 10.0  # a point this many times its usual error from where the models see it is flagged

KINDS = {
    "model": "the models prefer another class",
    "neighbours": "similar images have another label",
    "duplicate": "nearly the same image has another label",
    "members": "members or seeds disagree",
    "confident": "confident learning counts it as another class",
    "odd": "unlike the other images of its class",
    "points": "a point lies far from where the models see it",
    "stale": "decided before, but its label has changed since",
}
"""What can make an image suspicious; the page filters by these."""


class Evidence:
    """Scores and reasons per sample while they are gathered."""

    def __init__(self, score: Array) -> None:
        self.score = score
        self.flagged = np.zeros(len(score), bool)
        self.belief: Array | None = None
        self.kinds: list[list[str]] = [[] for _ in score]
        self.reasons: list[list[str]] = [[] for _ in score]
        self.guessed_points: dict[str, Array] = {}

    def add(self, row: int, kind: str, text: str, flag: bool = True, first: bool = False) -> None:
        """Put one reason down; `flag` says that it alone makes the image worth a look."""
        self.flagged[row] |= flag
        if kind not in self.kinds[row]:
            self.kinds[row].insert(0 if first else len(self.kinds[row]), kind)
        self.reasons[row].insert(0 if first else len(self.reasons[row]), text)


class Near(NamedTuple):
    """Neighbours of the samples that have a vector; `place` leads from their rows to the manifest's."""

    place: npt.NDArray[np.int64]  # (M,) manifest row
    unit: Array  # (M, F)
    rows: npt.NDArray[np.int64]  # (M, k) manifest rows
    similarity: Array  # (M, k)


def of_classes(manifest: Manifest, members: Mapping[str, Array], near: Near | None, notes: list[str]) -> Evidence:
    """Weigh class labels. `members` are ``(N, K)`` each, NaN where silent; what is worth saying goes to `notes`."""
    label = manifest.target
    probs = mean(list(members.values()))
    shares = None
    if near is not None:
        shares = np.full((len(label), len(manifest.classes)), np.nan)
        local = np.searchsorted(near.place, near.rows)
        shares[near.place] = suspicion.votes(local, near.similarity, label[near.place], len(manifest.classes))
    belief, score = suspicion.combine(probs, shares, label)
    evidence = Evidence(score)
    evidence.belief = belief
    if probs is not None:
        _say_models(evidence, manifest, members, probs, label, notes)
    if shares is not None and near is not None:
        _say_neighbours(evidence, manifest, near, shares, label)
        _say_odd(evidence, near, label)
    evidence.flagged |= evidence.score > 0.5
    return evidence


def _say_models(
    evidence: Evidence, manifest: Manifest, members: Mapping[str, Array], probs: Array, label: Array, notes: list[str]
) -> None:
    heard = np.flatnonzero(np.isfinite(probs).all(axis=1))
    if not len(heard):
        return
    best = probs[heard].argmax(axis=1)
    joint, confident = suspicion.confident_joint(probs[heard], label[heard])
    wrong = int(joint.sum() - np.trace(joint))
    pairs = joint - np.diag(np.diag(joint))
    notes.append(f"confident learning counts {wrong} labels that look wrong ({wrong / len(heard):.1%})")
    if wrong:
        given, found = np.unravel_index(int(pairs.argmax()), pairs.shape)
        name = f"labelled '{manifest.classes[given]}', look like '{manifest.classes[found]}'"
        notes.append(f"most often: {int(pairs.max())} {name}")
    stack = np.stack(list(members.values()))[:, heard]
    for place, row in enumerate(heard.tolist()):
        sure = confident[place] not in (-1, label[row])
        if best[place] != label[row]:
            said, mine = manifest.classes[best[place]], probs[row, label[row]]
            text = f"models: {said} {probs[row, best[place]]:.0%}, label {mine:.0%}{' (confident)' if sure else ''}"
            evidence.add(row, "model", text, flag=False)
        if sure:
            evidence.kinds[row].append("confident")
        voices = stack[:, place][np.isfinite(stack[:, place]).all(axis=1)]
        others = int((voices.argmax(axis=1) != label[row]).sum())
        if 0 < others < len(voices):
            gap = float(suspicion.disagreement(voices[:, None])[0])
            text = f"{others} of {len(voices)} members and seeds are against the label (disagreement {gap:.2f})"
            evidence.add(row, "members", text, flag=False)


def _say_neighbours(evidence: Evidence, manifest: Manifest, near: Near, shares: Array, label: Array) -> None:
    for place, row in enumerate(near.place.tolist()):
        around = label[near.rows[place]]
        best = int(shares[row].argmax())
        if best != label[row]:
            count = int((around == best).sum())
            text = f"{count} of the {len(around)} nearest images are {manifest.classes[best]}"
            evidence.add(row, "neighbours", text, flag=False)
        twins = np.flatnonzero((near.similarity[place] >= suspicion.TWIN) & (around != label[row]))
        if len(twins):
            twin = near.rows[place][twins[0]]
            name = manifest.table["path"].iloc[twin]
            text = f"nearly the same image as {name}, labelled {manifest.classes[label[twin]]}"
            evidence.add(row, "duplicate", text)


def _say_odd(evidence: Evidence, near: Near, label: Array) -> None:
    narrow = suspicion.normalise(near.unit, 32)
    odd = suspicion.isolated(narrow, label[near.place])
    stray = suspicion.stray(narrow, label[near.place])
    evidence.score[near.place] += suspicion.ODD_WEIGHT * np.clip(odd / 10, 0, 1)
    for place in np.flatnonzero((odd >= suspicion.ODD) | (stray & (odd >= suspicion.ODD / 2))).tolist():
        how = f"isolation forest: {odd[place]:.0f} deviations" + (", alone by DBSCAN" if stray[place] else "")
        evidence.add(int(near.place[place]), "odd", f"unlike its class ({how})", flag=bool(stray[place]))


def of_points(manifest: Manifest, members: Mapping[str, Array], near: Near | None, notes: list[str]) -> Evidence:
    """Weigh points. `members` are ``(N, P, 2)`` each, in pixels, NaN where silent."""
    truth, guess = manifest.target.astype(np.float64), mean(list(members.values()))
    evidence = Evidence(np.zeros(len(truth)))
    if guess is not None:
        error = np.nan_to_num(suspicion.point_errors(truth, guess))
        worst = error.max(axis=1, initial=0)
        evidence.score = worst / (worst + FAR)
        for row in np.flatnonzero(worst >= FAR / 2).tolist():
            point = int(error[row].argmax())
            apart = float(np.linalg.norm(guess[row, point] - truth[row, point]))
            text = f"{manifest.classes[point]} is {apart:.0f} px from where the models see it"
            evidence.add(row, "points", f"{text}, {worst[row]:.0f} times the usual", flag=bool(worst[row] >= FAR))
        spoken = np.asarray(np.isfinite(guess).all(axis=(1, 2)))
        evidence.guessed_points = {
            one: guess[row] for row, one in enumerate(manifest.sample_ids.tolist()) if spoken[row]
        }
    if near is not None:
        _say_odd(evidence, near, np.zeros(len(truth), np.int64))
    return evidence


def mean(members: list[Array]) -> Array | None:
    """Mean over the members that have spoken, NaN where none has."""
    if not members:
        return None
    stack = np.stack(members)
    spoken = np.isfinite(stack)
    count = spoken.sum(axis=0)
    return np.where(count > 0, np.where(spoken, stack, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
