"""Replay: what a journal's decisions make of a manifest's table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from octofold.data.journal import Entry, Journal, in_memory
from octofold.errors import preview


@dataclass(frozen=True)
class Replayed:
    """What a journal did to a table.

    Attributes:
        table: the new table; the old one is untouched.
        report: a row per decided sample: ``sample_id, action, before, after, outcome, note, reviewer, time, entry``.
            outcome: applied | already | confirmed | gone | conflict | unknown class.
        damaged: lines of the journal that could not be read.
    """

    table: pd.DataFrame
    report: pd.DataFrame
    damaged: list[tuple[int, str]]

    def summary(self) -> str:
        """Say in one line what was done and what was not."""
        pairs = list(zip(self.report["outcome"], self.report["action"], strict=True))
        parts = [f"{pairs.count(pair)} {pair[1]} {pair[0]}" for pair in sorted(set(pairs))]
        if self.damaged:
            lines = preview([f"line {number}: {what}" for number, what in self.damaged])
            parts.append(f"{len(self.damaged)} damaged lines left out ({lines})")
        return ", ".join(parts) or "no decisions"


_COLUMNS = ["sample_id", "action", "before", "after", "outcome", "note", "reviewer", "time", "entry"]


def replay(
    journal: "Journal | Sequence[Entry]",
    table: pd.DataFrame,
    classes: Sequence[str] | None = None,
    same_as: Mapping[str, str] | None = None,
) -> Replayed:
    """Apply the standing decisions to a manifest's table; pure, and twice is once.

    A relabel or a drop judged the image, so it holds even where the raw label has changed since, and so does a keep
    of what a relabel made. Another keep judged the label: if that is no longer there, it is a conflict and the sample
    should be looked at again.

    Args:
        journal: a `Journal`, or entries in order.
        table: with columns `sample_id` (unique) and, for classes, `label`. Other columns travel along.
        classes: the names a relabel may use; None = those in `table`.
        same_as: ``{journal's sample_id: sample_id here}`` of images that were re-encoded since and matched by
            near-duplicate search; said in the note.

    Returns:
        the new table (dropped rows gone, order kept, index renumbered) and what became of each decision.
    """
    if not isinstance(journal, Journal):
        journal = in_memory(journal)
    new = table.copy()
    place = {name: row for row, name in enumerate(table["sample_id"].astype(str))}
    names = set(classes if classes is not None else table["label"] if "label" in table else ())
    labels = table["label"].astype(str).tolist() if "label" in table else [""] * len(table)
    dropped: set[int] = set()
    rows = []
    for sample_id, entry in journal.decisions().items():
        here = sample_id if sample_id in place else (same_as or {}).get(sample_id, sample_id)
        row = place.get(here)
        before = labels[row] if row is not None else entry.label
        outcome, after, note = _judge(entry, journal.relabel_of(entry), before, row is not None, names)
        if here != sample_id:
            note = f"re-encoded since, matched from {sample_id}; {note}".rstrip("; ")
        if row is not None:  # the later decision wins where two ids have become one image
            (dropped.add if entry.action == "drop" else dropped.discard)(row)
        if row is not None and entry.action != "drop":
            labels[row] = after
        rows.append([here, entry.action, before, after, outcome, note, entry.reviewer, entry.time, entry.entry])
    if "label" in new:
        new["label"] = pd.Series(labels, index=new.index, dtype=new["label"].dtype)
    keep = np.array([row not in dropped for row in range(len(new))], dtype=bool)  # a bare [] would pick columns
    return Replayed(new[keep].reset_index(drop=True), pd.DataFrame(rows, columns=_COLUMNS), list(journal.damaged))


def _judge(entry: Entry, relabel: Entry | None, before: str, is_here: bool, classes: set[str]) -> tuple[str, str, str]:
    """``(outcome, label after, note)`` of one decision, which comes to `relabel`, on a sample now labelled `before`."""
    if not is_here:
        done = entry.action == "drop"
        return ("already" if done else "gone"), "", "" if done else "no image with this content any more"
    if entry.action == "drop":
        return "applied", "", ""
    judged = relabel or entry
    moved = f"judged as '{judged.label}', labelled '{before}' now"
    moved = "" if before in (judged.label, judged.target) else moved
    if relabel is None:
        return ("conflict", before, f"{moved}: look again") if moved else ("confirmed", before, "")
    if relabel.target not in classes:
        return "unknown class", before, f"'{relabel.target}' is none of {preview(sorted(classes), 8)}"
    if entry.action == "keep":
        note = f"of the relabel to '{relabel.target}'"
        return "confirmed", relabel.target, f"{note}; {moved}" if moved else note
    return ("already" if before == relabel.target else "applied"), relabel.target, moved
