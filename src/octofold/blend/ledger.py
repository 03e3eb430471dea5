"""The ledger: a parquet beside a submission that leads each row back to members, models, weights, data and code."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold.data.manifest import Manifest
from octofold.errors import UserError, preview
from octofold.files import atomic, existing
from octofold.infer.combining import Blend

Array = npt.NDArray[Any]
NAME = "ledger.parquet"


@dataclass(frozen=True)
class Ledger:
    """What is known of a submission.

    Attributes:
        rows: one per test sample: ``sample_id``, ``names`` (JSON), and for classes ``label, top1..3, p1..3,
            vote.<member>, p.<member>``, for points ``off_px.<member>`` (mean distance of its points from the
            blend's); then ``disagreement`` (share of the voters' fold models that put another class first, or their
            mean distance in px), ``views_spread``, ``nearest`` (JSON of training ``[path, similarity]``).
        about: run id, competition, classes, models (name, version, run, sha256), weights, method, views, manifest
            hash, git commit, estimate.
    """

    rows: pd.DataFrame
    about: dict[str, Any]

    def save(self, folder: Path | str) -> Path:
        """Write ``ledger.parquet`` in a folder, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pandas(self.rows, preserve_index=False)
        header = {
            **(table.schema.metadata or {}),
            b"octofold.blend.ledger": json.dumps(self.about, default=str).encode(),
        }
        path = Path(folder) / NAME
        with atomic(path) as temporary:
            pq.write_table(table.replace_schema_metadata(header), temporary)
        return path

    def row(self, image: str) -> dict[str, Any]:
        """Find one row by file name (as the submission writes it), by sample id, or by file name less its ending.

        Raises:
            UserError: no such row, or several.
        """
        listed = [json.loads(names) for names in self.rows["names"]]
        ids = self.rows["sample_id"].tolist()
        found = [place for place, names in enumerate(listed) if image in (ids[place], *names)]
        if not found:
            found = [place for place, names in enumerate(listed) if image in [Path(name).stem for name in names]]
        if len(found) != 1:
            some = preview([listed[place][0] for place in found or range(min(3, len(listed)))])
            wanted = f"one row of the submission, {'one of' if found else 'such as'} {some}"
            raise UserError(f"image '{image}'", expected=wanted, got=f"{len(found)}" if found else "none")
        return {str(key): value for key, value in self.rows.iloc[found[0]].items()}


def load(submission: Path | str) -> Ledger:
    """Read the ledger beside a submission (or in a folder, or the parquet itself).

    Raises:
        UserError: there is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = existing(submission, "a submission that blend wrote")
    path = path / NAME if path.is_dir() else path if path.suffix == ".parquet" else path.with_name(NAME)
    path = existing(path, "the ledger beside the submission", "give the submission where blend wrote it (runs/blend/…)")
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[b"octofold.blend.ledger"])
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise UserError(path, expected="a ledger written by blend", got=str(error)) from error
    return Ledger(table.to_pandas(), about)


def build(
    test: Manifest,
    final: Array,
    members: Mapping[str, Array],
    votes: Array,
    nested: Mapping[int, Array],
    nearest: Sequence[Sequence[tuple[str, float]]],
    about: dict[str, Any],
) -> Ledger:
    """Put a ledger together.

    Args:
        test: T test samples.
        final: ``(T, K)`` probabilities or ``(T, P, 2)`` points, as submitted.
        members: each member's bagged ``(T, …)``.
        votes: ``(S, T, …)`` of every fold model.
        nested: number of views -> the mean over so many views ``(T, …)`` of the plain mean of members; of these the
            spread of the views is told.
        nearest: per test row, training images with their similarity; may be empty.
        about: see `Ledger`.
    """
    listed = test.table["names"] if "names" in test.table else test.table["path"].map(lambda name: json.dumps([name]))
    columns: dict[str, Any] = {"sample_id": test.sample_ids.astype(object), "names": listed.astype(str).to_numpy()}
    filled = (
        _points(final, members, votes, nested) if final.ndim == 3 else _classes(test, final, members, votes, nested)
    )
    near = [json.dumps([[name, round(float(score), 4)] for name, score in row]) for row in nearest]
    columns |= filled | {"nearest": near or ["[]"] * len(final)}
    constant = {"run_id": about.get("run_id", ""), "manifest_hash": about.get("manifest_hash", "")}
    return Ledger(pd.DataFrame(columns).assign(**constant), about)


def _classes(
    test: Manifest, final: Array, members: Mapping[str, Array], votes: Array, nested: Mapping[int, Array]
) -> dict[str, Any]:
    classes, every = np.array(test.classes, dtype=object), np.arange(len(final))
    order = np.argsort(-final, axis=1, kind="stable")[:, :3]
    best = order[:, 0]
    columns: dict[str, Any] = {"label": classes[best]}
    for place in range(order.shape[1]):
        columns |= {f"top{place + 1}": classes[order[:, place]], f"p{place + 1}": final[every, order[:, place]]}
    for name, values in members.items():
        columns |= {f"vote.{name}": classes[values.argmax(axis=1)], f"p.{name}": values[every, best]}
    columns["disagreement"] = (votes.argmax(axis=2) != best).mean(axis=0).astype(np.float32)
    blocks, share = view_blocks({count: values[every, best] for count, values in nested.items()})
    return columns | {"views_spread": _spread(blocks, share)}


def _points(final: Array, members: Mapping[str, Array], votes: Array, nested: Mapping[int, Array]) -> dict[str, Any]:
    def off(values: Array) -> Array:  # mean distance of the points, px
        found: Array = np.linalg.norm(values - final, axis=-1).mean(axis=-1)
        return found

    columns: dict[str, Any] = {f"off_px.{name}": off(values) for name, values in members.items()}
    columns["disagreement"] = off(votes).mean(axis=0)
    blocks, share = view_blocks({count: values.reshape(len(final), -1) for count, values in nested.items()})
    return columns | {"views_spread": _spread(blocks, share[:, None]).mean(axis=1)}


def view_blocks(nested: Mapping[int, Array]) -> tuple[Array, Array]:
    """Take running means apart: the mean over views 1, 2, 3-4 and 5-8, and each block's share.

    Args:
        nested: number of views -> ``(T, …)`` mean over the first so many.

    Returns:
        ``(B, T, …)`` block means, and ``(B, 1)`` shares that sum to 1.
    """
    counts = sorted(nested)
    blocks, sizes, before = [], [], 0
    for count in counts:
        earlier = nested[before] * before if before else 0.0
        blocks.append((nested[count] * count - earlier) / (count - before))
        sizes.append(count - before)
        before = count
    return np.stack(blocks), np.array(sizes)[:, None] / max(counts[-1], 1)


def _spread(blocks: Array, share: Array) -> Array:
    mean = (blocks * share).sum(axis=0)
    found: Array = np.sqrt((share * (blocks - mean) ** 2).sum(axis=0)).astype(np.float32)
    return found


def differences(one: Ledger, other: Ledger) -> pd.DataFrame:
    """The rows on which two submissions differ, and who changed them.

    Returns:
        ``names, from, to, p_from, p_to, who``: the members whose own vote changed, or ``weights`` where none did; new
        and missing members are told with ``+`` and ``-``. A member that neither blend heard on the row is not named.

    Raises:
        UserError: submissions of other test images, or of points.
    """
    if "label" not in one.rows or "label" not in other.rows:
        raise UserError("compare", expected="two submissions of classes", got="points")
    mine, theirs = one.rows.set_index("sample_id"), other.rows.set_index("sample_id")
    odd = set(mine.index) ^ set(theirs.index)
    if odd:
        raise UserError("compare", expected="the same test images", got=f"{len(odd)} that only one has")
    theirs = theirs.loc[mine.index]
    changed = mine.index[(mine["label"] != theirs["label"]).to_numpy()]
    votes = [sorted(name[5:] for name in table.columns if name.startswith("vote.")) for table in (mine, theirs)]
    shared = [name for name in votes[0] if name in votes[1]]
    lines = []
    for sample_id in changed:
        a, b = mine.loc[sample_id], theirs.loc[sample_id]
        heard = [
            [name for name in names if _is_heard(book.about, name, {a["label"], b["label"]})]
            for book, names in zip((one, other), votes, strict=True)
        ]
        who = [name for name in shared if a[f"vote.{name}"] != b[f"vote.{name}"] and name in heard[0] + heard[1]]
        who += [f"+{name}" for name in heard[1] if name not in shared and b[f"vote.{name}"] == b["label"]]
        who += [f"-{name}" for name in heard[0] if name not in shared and a[f"vote.{name}"] == a["label"]]
        lines.append(
            {
                "names": ", ".join(json.loads(a["names"])),
                "from": a["label"],
                "to": b["label"],
                "p_from": float(a["p1"]),
                "p_to": float(b["p1"]),
                "who": ", ".join(who) or "weights",
            }
        )
    return pd.DataFrame(lines, columns=["names", "from", "to", "p_from", "p_to", "who"])


def _is_heard(about: Mapping[str, Any], name: str, labels: set[str]) -> bool:
    """Whether a member can have moved a row between these two classes: in the rule, or in a gate of this pair.

    A ledger from before `about` named the classes does not say whose gates these are: they may be of any pair.
    """
    if "blend" not in about:
        return True
    blend, place = Blend.from_dict(about["blend"]), list(about["weights"]).index(name)
    is_voter = place < blend.params.get("voters", len(blend.weights))
    if is_voter and (blend.weights[place] > 0 or not replace(blend, params={}).is_mean):
        return True
    classes = about.get("classes")
    return any(
        place < len(gate["coef"]) and (classes is None or {classes[gate["a"]], classes[gate["b"]]} == labels)
        for gate in blend.params.get("experts", ())
    )
