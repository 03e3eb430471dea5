"""Preparing: labelled images become a manifest with folds, and everything odd about them a list with names.

What is wrong with single images is decided here: unreadable ones are left out, exact copies become one sample, the
same image under two labels is left out (or stops everything), oddities are kept. All of it is reported by file name.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from octofold import checks, folds, neighbours, sources
from octofold.commands import Prepare
from octofold.errors import UserError, preview
from octofold.files import ROOT, atomic, existing, write_json
from octofold.manifest import Manifest

Ints = npt.NDArray[np.int64]


@dataclass
class Prepared:
    """What prepare found and made.

    Attributes:
        manifest: the training samples, with folds.
        test: the test samples, if any.
        problems: ``set, file, sample_id, kind, detail, action``, one row per finding.
        looks: of the manifest's rows, in its order (for pictures).
        pairs: ``(P, 2)`` near-duplicate rows of the manifest.
        summary: numbers worth showing.
    """

    manifest: Manifest
    test: Manifest | None
    problems: pd.DataFrame
    looks: pd.DataFrame
    pairs: Ints
    summary: dict[str, Any] = field(default_factory=dict)


def prepare(config: Prepare) -> Prepared:
    """Read, look, group and fold; writes nothing.

    Raises:
        UserError: whatever in the user's files cannot be read one way only; the message names it.
    """
    source = read_source(config)
    found: list[dict[str, str]] = []
    looks = checks.look(source.table["file"].tolist(), source.images, "look at train")
    table = pd.concat([source.table, looks.table.drop(columns="file")], axis=1)
    given = _given_folds(config, source)
    if given is not None:
        table["fold"] = given
    rows = settle(table, source, config.conflicts, found)
    table = table.iloc[rows].reset_index(drop=True)
    if table.empty:
        raise UserError(source.images, expected="readable images", got=f"none of {len(looks.table)}")
    phash, tiny = looks.phash[rows], looks.tiny[rows]
    pairs = neighbours.near_pairs(phash, tiny)
    table["group"] = make_groups(table, config.group, pairs, source)
    labels = table["label"].to_numpy(str) if "label" in table else None
    groups = np.where(table["group"] == "", table["sample_id"], table["group"]).astype(str)
    if given is None:
        table["fold"] = folds.assign(groups, labels, config.folds, config.seed)
    _check_crossing(config, groups, table["fold"].to_numpy(np.int64), found)
    _report_pairs(table, pairs, found)
    columns = ["sample_id", "path", *(["label"] if labels is not None else _points(source)), "group", "fold"]
    table = table.rename(columns={"file": "path"})
    extra = [name for name in source.table.columns if name not in (*columns, "file", "name")]
    info = {**source.info, "seed": config.seed, "group": config.group}
    manifest = Manifest(
        table[[*columns, "width", "height", *extra]], config.task, source.names, config.competition, source.images, info
    )
    test, test_marks = read_test(config, source, found)
    if test is not None:
        manifest.info.update(test.info)
        _report_shared(table, (phash, tiny), test, test_marks, found)
    problems = pd.DataFrame(found, columns=["set", "file", "sample_id", "kind", "detail", "action"])
    looks_kept = table[["sample_id", "path", "brightness", "contrast", "sharpness", "odd", "width", "height"]]
    return Prepared(manifest, test, problems, looks_kept, pairs, _summary(manifest, test, problems, groups))


def check(config: Prepare) -> None:
    """Refuse what can be seen to be wrong before any work or run is begun.

    Raises:
        UserError: no images named, or a path that is not there.
    """
    if config.images is None and not config.builtin:
        raise UserError(
            "prepare", expected="--images FOLDER (with --labels CSV, or class folders), or --builtin digits"
        )
    if config.sample_submission is not None and config.test_images is None:
        raise UserError("--sample_submission", expected="--test_images as well", got="none")
    if config.task == "keypoints" and config.labels is None:
        raise UserError("prepare", expected="--labels CSV with <point>_x, <point>_y columns", got="no --labels")
    for name in ("images", "labels", "classes", "test_images", "sample_submission", "folds_file", "decisions"):
        if (path := getattr(config, name)) is not None:
            existing(path, f"what --{name} names")


def read_source(config: Prepare) -> sources.Source:
    """The labelled images the flags name."""
    if config.images is None:
        raise UserError(
            "prepare", expected="--images FOLDER (with --labels CSV, or class folders), or --builtin digits"
        )
    if config.labels is not None:
        source = sources.from_csv(config.labels, config.images, config.image_column, config.label_column, config.task)
    else:
        source = sources.from_class_folders(config.images)
    if config.classes is not None and config.task == "classify":
        source = sources.fix_classes(source, config.classes)
    if config.task == "classify" and len(source.names) < 2:
        raise UserError(config.labels or config.images, expected="at least two classes", got=preview(source.names))
    return source


def _points(source: sources.Source) -> list[str]:
    return [f"{name}_{axis}" for name in source.names for axis in "xy"]


def _given_folds(config: Prepare, source: sources.Source) -> Ints | None:
    """``(N,)`` the fold of each row by the user's folds file, or None."""
    if config.folds_file is None:
        return None
    table = sources.read_table(config.folds_file, "folds (CSV image,label,fold)")
    sources.column(table, "fold", config.folds_file, "folds_file")
    name = config.image_column if config.image_column in table else "image"
    known = dict(zip(source.table["name"], source.table["file"], strict=True)) | {
        file: file for file in source.table["file"]
    }
    table = table.assign(file=sources.column(table, name, config.folds_file, "image_column").map(known))
    if config.label_column in table and "label" in source.table:
        table["label"] = sources.as_labels(table[config.label_column], str(source.info["label_type"]))
    labels = source.table["label"].tolist() if "label" in source.table else None
    return folds.from_file(table.dropna(subset=["file"]), source.table["file"].tolist(), labels, config.folds_file)


def settle(table: pd.DataFrame, source: sources.Source, conflicts: str, found: list[dict[str, str]]) -> Ints:
    """Decide which rows stay: readable, each content once, no content under two labels. Findings go to `found`.

    Raises:
        UserError: `conflicts` is ``refuse`` and there are some; copies in two folds of a folds file.
    """
    for row in table[(table["odd"] != "") & (table["problem"] == "")].itertuples():
        _note(found, "train", row, str(row.odd), "", "kept")
    for row in table[table["problem"] != ""].itertuples():
        _note(found, "train", row, "unreadable", str(row.problem), "left out")
    good = table[table["problem"] == ""]
    targets = ["label"] if "label" in table else _points(source)
    copies = good[good["sample_id"].duplicated(keep=False)]
    distinct = copies.drop_duplicates(["sample_id", *targets])
    torn = set(distinct["sample_id"][distinct["sample_id"].duplicated()])
    if torn and conflicts == "refuse":
        files = copies["file"][copies["sample_id"].isin(torn)]
        raise UserError(
            "labels", expected="one label per image content", got=f"{len(torn)} images under two: {preview(files)}",
            fix="mend the labels, or --conflicts drop",
        )  # fmt: skip
    for name, same in copies.groupby("sample_id", sort=False):
        paths = same["file"].tolist()
        for row in same.itertuples() if name in torn else same.iloc[1:].itertuples():
            detail = f"same bytes as {paths[0] if row.file != paths[0] else paths[1]}"
            if name in torn:
                said = f"; labels {preview(sorted(set(same['label'])))}" if "label" in same else ""
                _note(found, "train", row, "two labels", detail + said, "left out")
            else:
                _note(found, "train", row, "copy", detail, "merged")
        if "fold" in same and same["fold"].nunique() > 1:
            raise UserError(
                "folds file", expected="copies of an image in one fold", got=f"several for {preview(files)}"
            )
    kept = ~good["sample_id"].isin(torn) & ~good["sample_id"].duplicated()
    return good.index[kept].to_numpy(np.int64)


def _note(found: list[dict[str, str]], where: str, row: Any, kind: str, detail: str, action: str) -> None:
    file = getattr(row, "file", None) or row.path
    found.append({"set": where, "file": str(file), "sample_id": str(row.sample_id), "kind": kind} | {
        "detail": detail, "action": action})  # fmt: skip


def make_groups(table: pd.DataFrame, group: str, pairs: Ints, source: sources.Source) -> list[str]:
    """Name each row's group; '' where it stands alone.

    Raises:
        UserError: no such column.
    """
    if group == "none":
        return [""] * len(table)
    if group == "auto":
        return neighbours.group_names(neighbours.components(len(table), pairs), table["sample_id"].tolist())
    name = group if group in source.table else f"user_{group}"
    values = sources.column(table, name if name in source.table else group, "labels", "group")
    return values.astype(str).str.strip().tolist()


def _check_crossing(config: Prepare, groups: npt.NDArray[np.str_], fold: Ints, found: list[dict[str, str]]) -> None:
    crossing = folds.crossing(groups, fold)
    if crossing and config.group not in ("auto", "none"):
        raise UserError(
            config.folds_file,
            expected=f"each '{config.group}' in one fold",
            got=f"{len(crossing)} in several: {preview(crossing)}",
            fix="mend the folds file, or --group none to use it as it is",
        )
    for name in crossing:
        row = {"set": "train", "file": "", "sample_id": name.removeprefix("near-"), "kind": "group crosses folds"}
        found.append(row | {"detail": name, "action": "kept: the folds file says so"})


def _report_pairs(table: pd.DataFrame, pairs: Ints, found: list[dict[str, str]]) -> None:
    files = table["file"].tolist()
    labels = table["label"].tolist() if "label" in table else [""] * len(table)
    for one, other in pairs.tolist():
        differ = labels[one] != labels[other]
        kind = "near-duplicate, other label" if differ else "near-duplicate"
        _note(found, "train", table.iloc[other], kind, f"looks like {files[one]}", "kept")


def read_test(
    config: Prepare, source: sources.Source, found: list[dict[str, str]]
) -> tuple[Manifest | None, tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]]:
    """The test manifest (one row per content; `names` lists every id that shares it), with hashes per row.

    Raises:
        UserError: see `sources.from_test`; a test image that cannot be read.
    """
    nothing = (np.zeros(0, np.uint64), np.zeros((0, 3), np.uint8))
    if config.test_images is None:
        return None, nothing
    rows, info = sources.from_test(
        config.test_images,
        config.sample_submission,
        config.image_column,
        config.label_column,
        source.names,
        config.task,
    )
    folder = existing(config.test_images, "test images").resolve()
    looks = checks.look(rows["file"].tolist(), folder, "look at test")
    table = looks.table.assign(name=rows["name"])
    broken = table[table["problem"] != ""]
    if len(broken):
        listed = preview(broken["file"] + ": " + broken["problem"])
        raise UserError(folder, expected="test images that can be read", got=f"{len(broken)} cannot: {listed}",
                        fix="replace the files, or take their rows out of the sample submission")  # fmt: skip
    for row in table[table["odd"] != ""].itertuples():
        _note(found, "test", row, str(row.odd), "", "kept")
    names: dict[str, list[str]] = {}
    for name, sample in zip(table["name"], table["sample_id"], strict=True):
        names.setdefault(sample, []).append(name)
    first = ~table["sample_id"].duplicated()
    for row in table[~first].itertuples():
        _note(found, "test", row, "copy", f"same bytes as {names[str(row.sample_id)][0]}", "predicted once")
    kept = table[first].reset_index(drop=True).rename(columns={"file": "path"})
    kept["names"] = [json.dumps(names[name], ensure_ascii=False) for name in kept["sample_id"]]
    info = {**source.info, **info}
    test = Manifest(
        kept[["sample_id", "path", "names", "width", "height"]],
        config.task, source.names, config.competition, folder, info,
    )  # fmt: skip
    return test, (looks.phash[first.to_numpy()], looks.tiny[first.to_numpy()])


def _report_shared(table: pd.DataFrame, mine: Any, test: Manifest, theirs: Any, found: list[dict[str, str]]) -> None:
    """Copies and near-duplicates across train and test: no error, but the score on them says little."""
    place = {name: path for name, path in zip(test.table["sample_id"], test.table["path"], strict=True)}
    for row in table[table["sample_id"].isin(place)].itertuples():
        _note(found, "train", row, "copy in test", f"same bytes as {place[str(row.sample_id)]}", "kept")
    pairs = neighbours.near_pairs(np.concatenate([mine[0], theirs[0]]), np.concatenate([mine[1], theirs[1]]))
    across = pairs[(pairs[:, 0] < len(table)) & (pairs[:, 1] >= len(table))]
    for one, other in across.tolist():
        twin = test.table.iloc[other - len(table)]
        if table["sample_id"].iat[one] != twin["sample_id"]:
            _note(found, "train", table.iloc[one], "near-duplicate in test", f"looks like {twin['path']}", "kept")


def _summary(
    manifest: Manifest, test: Manifest | None, problems: pd.DataFrame, groups: npt.NDArray[np.str_]
) -> dict[str, Any]:
    sizes = pd.Series(groups).value_counts()
    summary: dict[str, Any] = {
        "samples": len(manifest.table),
        "class_count": len(manifest.classes),
        "folds": len(manifest.folds),
        "groups": len(sizes),
        "largest_group": int(sizes.max()),
        "test_samples": 0 if test is None else len(test.table),
        "problems": (problems["set"] + ": " + problems["kind"]).value_counts().to_dict(),
    }  # fmt: skip
    if "label" in manifest.table:
        counts = pd.crosstab(manifest.table["label"], manifest.table["fold"]).reindex(list(manifest.classes))
        thin = [str(name) for name in counts.index[(counts.fillna(0) == 0).any(axis=1)]]
        summary["classes_missing_in_a_fold"] = thin
    return summary


def write(prepared: Prepared, config: Prepare) -> dict[str, Path]:
    """Write manifest, test manifest, classes and findings; each file whole or not at all."""
    out = (config.out or ROOT / "data" / config.competition).absolute()
    if config.sample_submission is not None and prepared.test is not None:
        kept, given = out / "sample_submission.csv", existing(config.sample_submission, "the sample submission")
        if kept.resolve() != given.resolve():
            with atomic(kept) as temporary:
                shutil.copyfile(given, temporary)
        for manifest in (prepared.manifest, prepared.test):
            manifest.info["sample_submission"] = kept.name  # beside the manifest
    paths = {"classes": write_json(out / "classes.json", list(prepared.manifest.classes))}
    if prepared.test is not None:
        paths["test"] = prepared.test.save(out / "test.csv")
    with atomic(out / "problems.csv") as temporary:
        prepared.problems.to_csv(temporary, index=False)
    paths["problems"] = out / "problems.csv"
    paths["report"] = write_json(out / "report.json", prepared.summary)
    paths["manifest"] = prepared.manifest.save(out / "manifest.csv")
    return paths
