"""The desk: what the review page shows and what it writes, free of any web framework."""

import getpass
import io
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from octofold.clean.cleaning import Item, Queue, is_stale, undecided
from octofold.clean.evidence import KINDS
from octofold.data.decoding import open_image, to_rgb, upright
from octofold.data.journal import Entry, Journal
from octofold.data.manifest import Manifest
from octofold.errors import UserError
from octofold.files import read_json

SIDES = {"big": 1400, "thumb": 220}  # longest side of what is served, px
MOST_ACTS = 200  # in one request


class Desk:
    """A queue, a manifest and a journal on one table.

    Args:
        queue: in order of review.
        manifest: whose images are served, and no others.
        journal: where acts go.
        reviewer: name used where the page sends none.
    """

    def __init__(self, queue: Queue, manifest: Manifest, journal: Journal, reviewer: str) -> None:
        self.queue, self.manifest, self.journal, self.reviewer = queue, manifest, journal, reviewer
        self.hash = manifest.hash
        self.rank = {item.sample_id: number for number, item in enumerate(queue.items)}
        table = manifest.table
        labels = table["label"].astype(str) if "label" in table else [""] * len(table)
        self.label = dict(zip(manifest.sample_ids.tolist(), labels, strict=True))
        self.path = dict(zip(manifest.sample_ids.tolist(), table["path"].astype(str), strict=True))
        self.points: dict[str, Any] = {}
        if manifest.task == "keypoints":
            self.points = dict(zip(manifest.sample_ids.tolist(), manifest.target, strict=True))
        # about 20 MB of big pictures, 30 MB of thumbs
        self._kept = {name: lru_cache(size)(self._image) for name, size in (("big", 100), ("thumb", 3000))}

    def state(self) -> dict[str, Any]:
        """What the page needs once: names, counts, notes, and this reviewer's last acts for undo."""
        self.journal.refresh()
        left = undecided(self.journal, self.manifest)
        items = self.queue.items
        kinds = Counter(kind for item in items for kind in item.kinds)
        labels = Counter(item.label for item in items)
        return {
            "competition": self.manifest.competition,
            "task": self.manifest.task,
            "classes": list(self.manifest.classes),
            "manifest_hash": self.hash,
            "reviewer": self.reviewer,
            "notes": self.queue.notes,
            "total": len(items),
            "flagged": self.queue.flagged,
            "done": [self.rank[one] for one in self.rank if one not in left],
            "flags": [number for number, item in enumerate(items) if item.flagged],
            "kinds": {kind: [text, kinds[kind]] for kind, text in KINDS.items() if kinds[kind]},
            "labels": {name: labels[name] for name in self.manifest.classes if labels[name]},
            "seq": len(self.journal.touched),
            "damaged": [number for number, _ in self.journal.damaged],
            "journal": str(self.journal.path),
        }

    def chosen(self, label: str, kind: str) -> list[int]:
        """Ranks of the items with this label and this kind of suspicion; empty means any."""
        return [
            number
            for number, item in enumerate(self.queue.items)
            if label in ("", item.label) and (not kind or kind in item.kinds or (kind == "flagged" and item.flagged))
        ]

    def describe(self, number: int) -> dict[str, Any]:
        """One item as the page gets it; every text is shown as text there."""
        item: Item = self.queue.items[number]
        shown: dict[str, Any] = {
            "rank": number,
            "id": item.sample_id,
            "name": item.path,
            "label": item.label,
            "score": round(item.score, 3),
            "flagged": item.flagged,
            "reasons": item.reasons,
            "guesses": item.guesses,
            "neighbours": [
                {"id": one, "label": self.label[one], "name": self.path[one], "similarity": similarity}
                for one, similarity in item.neighbours
            ],
            "standing": self._standing(item.sample_id),
        }
        if self.manifest.task == "keypoints":
            shown["points"] = self._points(item.sample_id)
        return shown

    def _points(self, sample_id: str) -> dict[str, Any] | None:
        """Given and guessed points as shares of the photo's width and height, to be drawn over it."""
        try:
            width, height = upright(open_image(self.file(sample_id), sample_id)).size
        except UserError:
            return None
        guessed = self.queue.guessed_points.get(sample_id)

        def shares(points: Any) -> list[list[float] | None]:
            pairs = [((x + 0.5) / width, (y + 0.5) / height) for x, y in points.tolist()]
            return [None if x != x or y != y else [round(x, 5), round(y, 5)] for x, y in pairs]

        names, given = list(self.manifest.classes), shares(self.points[sample_id])
        return {"names": names, "given": given, "guessed": None if guessed is None else shares(guessed)}

    def changes(self, since: int) -> list[dict[str, Any]]:
        """Where the samples stand that the journal has touched since its `seq` was `since`."""
        touched = dict.fromkeys(self.journal.touched[since:])
        return [
            {"id": one, "rank": self.rank[one], "standing": self._standing(one)} for one in touched if one in self.rank
        ]

    def _standing(self, sample_id: str) -> dict[str, Any] | None:
        """What the page shows of a sample's acts: its decision (or its skip, where there is none).

        ``entry`` is the latest act, a skip too: what the next one must have seen. ``decided`` is whether the
        decision speaks of the label the image has now.
        """
        latest, decision = self.journal.standing(sample_id), self.journal.decision(sample_id)
        if latest is None:
            return None
        is_old = (
            decision is not None
            and self.manifest.task == "classify"
            and is_stale(self.journal, decision, self.label[sample_id])
        )
        return {**_facts(decision or latest), "entry": latest.entry, "decided": decision is not None and not is_old}

    def mine(self, reviewer: str, most: int = 100) -> list[tuple[int, str, str]]:
        """``(rank, sample_id, entry)`` of a reviewer's latest standing acts, oldest first: for undo."""
        found = []
        for entry in reversed(self.journal.entries):
            standing = self.journal.standing(entry.sample_id)
            if entry.reviewer == reviewer and standing is entry and entry.sample_id in self.rank:
                found.append((self.rank[entry.sample_id], entry.sample_id, entry.entry))
                if len(found) == most:
                    break
        return found[::-1]

    def act(self, body: Any) -> dict[str, Any]:
        """Write the acts a page sent, and tell it what stands now.

        Raises:
            ValueError: not a list of acts on this manifest's samples.
            UserError: the journal cannot be written.
        """
        if not isinstance(body, dict) or not isinstance(body.get("acts"), list) or len(body["acts"]) > MOST_ACTS:
            raise ValueError(f"expected acts, at most {MOST_ACTS}")
        reviewer = body.get("reviewer") or self.reviewer
        entries = [self._entry(one, reviewer) for one in body["acts"]]
        written, refused = self.journal.append(entries)
        since = body.get("since", 0)
        return {
            "written": [entry.entry for entry in written],
            "refused": [
                {
                    "id": entry.sample_id,
                    "entry": entry.entry,
                    "standing": self._standing(entry.sample_id),
                    "rival": now and _facts(now),
                }
                for entry, now in refused
            ],
            **self.news(since if isinstance(since, int) and since >= 0 else 0),
        }

    def news(self, since: int) -> dict[str, Any]:
        """What other tabs and reviewers did, and whether the manifest on disk is still the one shown."""
        return {"changes": self.changes(since), "seq": len(self.journal.touched), "moved_on": self._moved_on()}

    def _entry(self, act: Any, reviewer: Any) -> Entry:
        if not isinstance(act, dict) or not isinstance(act.get("id"), str) or act["id"] not in self.path:
            raise ValueError("no such sample in this manifest")
        sample_id, action, target = act["id"], act.get("action", ""), act.get("target") or ""
        if action == "relabel" and (target not in self.manifest.classes or self.manifest.task != "classify"):
            raise ValueError(f"no such class: {str(target)[:80]!r}")
        if action == "relabel" and target == self.label[sample_id]:
            raise ValueError("a relabel to the label it has: that is a keep")
        return Entry(
            sample_id=sample_id,
            action=action,
            label=self.label[sample_id],
            target=target,
            undoes=act.get("undoes") or "",
            after=act.get("after") or "",
            reviewer=reviewer,
            manifest_hash=self.hash,
            path=self.path[sample_id][:1000],
            entry=act.get("entry", ""),
        )

    def _moved_on(self) -> bool:
        """Whether prepare has written another manifest over the one under review."""
        if self.manifest.file is None:
            return False
        try:
            return bool(read_json(self.manifest.file.with_suffix(".json")).get("hash", self.hash) != self.hash)
        except UserError:
            return True

    def file(self, sample_id: str) -> Path:
        """Path of a sample's image, links followed; it must lie inside the manifest's image folder.

        Raises:
            UserError: unknown id, or a path that leaves the folder.
        """
        if sample_id not in self.path:
            raise UserError("image", expected="a sample of this manifest", got=sample_id[:80])
        folder = self.manifest.images.resolve()
        path = Path(folder / self.path[sample_id]).resolve()
        if not path.is_relative_to(folder):
            raise UserError(self.path[sample_id], expected=f"a file inside {folder}", got=str(path))
        return path

    def image(self, sample_id: str, size: str) -> bytes:
        """A sample's picture, upright and in RGB, as JPEG (PNG when tiny); `size` is a key of `SIDES`.

        Raises:
            UserError: unknown id, deleted or replaced meanwhile, unreadable, or a path that leaves the image folder.
        """
        return self._kept[size](sample_id, SIDES[size])

    def _image(self, sample_id: str, side: int) -> bytes:
        path = self.file(sample_id)
        image = open_image(path, sample_id)
        image.draft(None, (side, side))
        picture = Image.fromarray(to_rgb(upright(image, path), path))
        picture.thumbnail((side, side), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        if max(picture.size) < 64:
            picture.save(buffer, "PNG")  # tiny scans: no artefacts
        else:
            picture.save(buffer, "JPEG", quality=88)
        return buffer.getvalue()


def _facts(entry: Entry) -> dict[str, str]:
    return {name: getattr(entry, name) for name in ("entry", "action", "target", "label", "reviewer", "time")}


def login() -> str:
    """The name of who is logged in, or "" where the system knows none (a container)."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def progress(journal: Journal, queue: Queue, manifest: Manifest) -> Mapping[str, int]:
    """Count what was decided: ``decided, left, flagged_left, keep, relabel, drop``."""
    journal.refresh()
    left = undecided(journal, manifest)
    ids = {item.sample_id for item in queue.items}
    decisions = [entry for one, entry in journal.decisions().items() if one in ids - left]
    counts = {action: sum(entry.action == action for entry in decisions) for action in ("keep", "relabel", "drop")}
    flagged = sum(item.flagged and item.sample_id in left for item in queue.items)
    return {"decided": len(decisions), "left": len(ids & left), "flagged_left": flagged, **counts}
