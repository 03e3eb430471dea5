"""Preparing: labelled images become a manifest with folds, and everything odd about them a list with names.

What is wrong with single images is decided here: unreadable ones are left out, exact copies become one sample, the
same image under two labels is left out (or stops everything), oddities are kept. All of it is reported by file name.
Raw data stays raw: decisions of a review are replayed on it, and make a new version of the manifest.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import ks_2samp

from octofold.commands import Prepare
from octofold.config import log
from octofold.data import journal
from octofold.data.manifest import Manifest
from octofold.data.replay import replay
from octofold.errors import UserError, preview
from octofold.files import ROOT, atomic, existing, write_json
from octofold.nets import landmarks
from octofold.prepare import checks, folds, kinship, lineage, neighbours, questions, sources
from octofold.prepare.findings import Findings, report_alike, report_outside, report_pairs, report_shared, settle
from octofold.prepare.grouping import Grouping
from octofold.prepare.lineage import Fingerprints

Ints = npt.NDArray[np.int64]


@dataclass
class Prepared:
    """What prepare found and made.

    Attributes:
        manifest: the training samples, with folds.
        test: the test samples, if any.
        problems: ``set, file, sample_id, kind, detail, action``, one row per finding.
        looks, test_looks: of the manifest's rows (of test's), in order: path, brightness, contrast, sharpness, odd …
        prints: fingerprints of the manifest's rows.
        pairs: ``(P, 2)`` near-duplicate rows of the manifest. twins: those that only the embedding shows.
        grouping: how ``--group auto`` chose, or None.
        decided: what became of each decision, or None. changes: how the manifest differs from the one before, or None.
        summary: numbers worth showing.
    """

    manifest: Manifest
    test: Manifest | None
    problems: pd.DataFrame
    looks: pd.DataFrame
    test_looks: pd.DataFrame
    prints: Fingerprints
    pairs: Ints
    twins: Ints
    grouping: Grouping | None = None
    decided: pd.DataFrame | None = None
    changes: pd.DataFrame | None = None
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Before:
    """The manifest before, which of its images have been re-encoded since, and all that ever were: old id to new."""

    manifest: Manifest | None
    folder: Path
    fresh: dict[str, str] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)


def folder_of(config: Prepare) -> Path:
    """Where prepare writes."""
    return (config.out or ROOT / "data" / config.competition).absolute()


def prepare(config: Prepare, found: Findings | None = None) -> Prepared:
    """Read, look, decide, group and fold; writes nothing but the cache of embeddings.

    Args:
        config: the flags.
        found: what was found before, on the way here.

    Raises:
        UserError: whatever in the user's files cannot be read one way only; the message names it.
    """
    source = read_source(config)
    found = found or Findings()
    old = lineage.find_previous(config.previous, folder_of(config), config.decisions is not None)
    if old is not None and config.folds_file is None:
        lineage.check_folds(old, config.folds if "folds" in config.model_fields_set else None, config.holdout)
    if old is not None and config.decisions is None:
        lineage.check_decisions(old)
    before = _Before(old, old.file.parent if old and old.file else folder_of(config))
    said = journal.read(config.decisions) if config.decisions is not None else None
    table, prints = _samples(config, source, said, found)
    if old is not None:
        judged = said.decisions() if said is not None else {}
        before.fresh = lineage.re_encoded(old, prints, before.folder, judged)
        before.same = {name: before.fresh.get(now, now) for name, now in old.info.get("re_encoded", {}).items()}
        before.same |= before.fresh
        for row in table[table["sample_id"].isin(before.fresh.values())].itertuples():
            found.add("train", row, "re-encoded", "looks like an image of the manifest before", "keeps its fold")
    table, decided = _replay(said, source, table, before, found)
    prints = _select(prints, table["sample_id"])
    pairs = neighbours.near_pairs(prints.phash, prints.tiny)
    test, test_looks, test_prints = questions.read_test(config, source, found)
    rows = kinship.Rows(table["sample_id"].tolist(), [source.images / name for name in table["file"]], prints)
    other = kinship.Rows(test.sample_ids.tolist(), test.paths, test_prints) if test is not None else None
    sides, folder = table[["width", "height"]].min(axis=1).to_numpy(), folder_of(config) / "cache"
    twins, similarity = kinship.twins(rows, other, sides, folder, pairs) if config.twins else kinship.NO_TWINS
    chosen = _group(config, source, table, (rows, other), (pairs, twins), before)
    _fold(config, table, before, found)
    report_pairs(table, pairs, found)
    report_alike(table, test.table if test else None, twins, similarity, found)
    info = source.info | {"seed": config.seed, "group": config.group}
    info |= lineage.applied(config.decisions, decided, table)
    if (swap := landmarks.swap_table(config.swap, source.names)) is not None:
        info["swap"] = swap
    if chosen is not None:
        info["grouping"] = {"cut": chosen[0].chosen.cut, "embedding": chosen[1], "reason": chosen[0].reason}
    elif old is not None and "grouping" in old.info:
        info["grouping"] = old.info["grouping"]
    if test is not None:
        info |= test.info
        both = neighbours.near_pairs(
            np.concatenate([prints.phash, test_prints.phash]), np.concatenate([prints.tiny, test_prints.tiny])
        )
        report_shared(table, test.table, both, found)
    manifest = _manifest(config, source, table, info)
    made = Prepared(manifest, test, found.table(), table.rename(columns={"file": "path"}), test_looks, prints, pairs,
                    twins[(twins < len(table)).all(axis=1)], chosen[0] if chosen else None, decided)  # fmt: skip
    if old is not None:
        made.changes = lineage.differences(old, manifest, before.fresh)
        info |= {"re_encoded": before.same} if before.same else {}
        info["previous"] = old.info.get("previous", "") if old.hash == manifest.hash else old.hash[:12]
    made.summary = _summary(made)
    return made


def check(config: Prepare) -> None:
    """Refuse what can be seen to be wrong before any work or run is begun.

    Raises:
        UserError: no images named, or a path that is not there.
    """
    given = [name for name in ("images", "source", "builtin") if getattr(config, name)]
    if not given:
        expected = "--images FOLDER (with --labels CSV, or class folders), --source, or --builtin digits"
        raise UserError("prepare", expected=expected, got="none of them")
    if len(given) > 1:
        raise UserError("prepare", expected="one of --images, --source, --builtin", got=" and ".join(given))
    if config.decisions is not None:
        journal.read(existing(config.decisions, "what --decisions names"))
    _check_folds(config)
    if config.source:
        return  # what it holds is seen when it is there
    if config.sample_submission is not None and config.test_images is None:
        raise UserError("--sample_submission", expected="--test_images as well", got="none")
    if config.task == "keypoints" and config.labels is None and not config.builtin:
        raise UserError("prepare", expected="--labels CSV with <point>_x, <point>_y columns", got="no --labels")
    if config.task != "keypoints" and (config.swap or config.test_points):
        raise UserError("--swap, --test_points", expected="--task keypoints", got=config.task)
    if config.test_points is not None and config.test_images is None:
        raise UserError("--test_points", expected="--test_images as well", got="none")
    if config.task == "keypoints" and config.classes is not None:
        raise UserError("--classes", expected="--task classify", got="keypoints", fix="leave it out")
    names = ("images", "labels", "classes", "test_images", "sample_submission", "folds_file", "previous", "test_points")
    for name in names:
        if (path := getattr(config, name)) is not None:
            existing(path, f"what --{name} names")


def _check_folds(config: Prepare) -> None:
    ways = {"--folds_file": config.folds_file is not None, "--holdout": config.holdout is not None,
            "--folds": "folds" in config.model_fields_set}  # fmt: skip
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) > 1:
        expected = "one of --folds, --holdout, --folds_file"
        raise UserError("prepare", expected=expected, got=" and ".join(given), fix="leave out the others")


def read_source(config: Prepare) -> sources.Source:
    """The labelled images the flags name."""
    check(config)
    assert config.images is not None  # check saw to it
    if config.labels is not None:
        source = sources.from_csv(config.labels, config.images, config.image_column, config.label_column, config.task)
    else:
        source = sources.from_class_folders(config.images, config.test_images)
    if config.classes is not None and config.task == "classify":
        source = sources.fix_classes(source, config.classes)
    if config.task == "classify" and len(source.names) < 2:
        raise UserError(config.labels or config.images, expected="at least two classes", got=preview(source.names))
    return source


def _targets(source: sources.Source) -> list[str]:
    return ["label"] if "label" in source.table else [f"{name}_{axis}" for name in source.names for axis in "xy"]


def _samples(
    config: Prepare, source: sources.Source, said: journal.Journal | None, found: Findings
) -> tuple[pd.DataFrame, Fingerprints]:
    """Look at every labelled image; one row per content that stays, and their fingerprints."""
    looks = checks.look(source.table["file"].tolist(), source.images, "look at train")
    table = pd.concat([source.table, looks.table.drop(columns="file")], axis=1)
    if config.labels is None:
        found.absent("train", source.images)
    if config.folds_file is not None:
        table["fold"] = _given_folds(config, config.folds_file, source)
    if said is not None and "label" in table:  # an image under two labels, judged since, has one
        torn = table["torn"] = table.groupby("sample_id")["label"].transform("nunique") > 1
        table.loc[torn, "label"] = lineage.judged_labels(table[torn], said, source.names)
    rows = settle(table, _targets(source), config.conflicts, found)
    if not len(rows):
        raise UserError(source.images, expected="readable images", got=f"none of {len(looks.table)}")
    table = table.iloc[rows].reset_index(names="row")  # where it stands among the user's rows
    if "label" not in table:
        report_outside(table, source.names, found)
    return table, Fingerprints(table["sample_id"].to_numpy(str), looks.phash[rows], looks.tiny[rows])


def _given_folds(config: Prepare, path: Path, source: sources.Source) -> Ints:
    """``(N,)`` the fold of each row by the user's folds file."""
    table = sources.read_table(path, "folds (CSV image,label,fold)")
    sources.column(table, "fold", path, "folds_file")
    name = config.image_column if config.image_column in table else "image"
    files = source.table["file"]
    known = dict(zip(source.table["name"], files, strict=True)) | dict(zip(files, files, strict=True))
    table = table.assign(file=sources.column(table, name, path, "image_column").map(known))
    if config.label_column in table and "label" in source.table:
        table["label"] = sources.as_labels(table[config.label_column], str(source.info["label_type"]))
    labels = source.table["label"].tolist() if "label" in source.table else None
    return folds.from_file(table.dropna(subset=["file"]), files.tolist(), labels, path)


def _replay(
    said: journal.Journal | None, source: sources.Source, table: pd.DataFrame, before: _Before, found: Findings
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """The table with decisions replayed, and what became of each."""
    if said is None:
        return table, None
    done = replay(said, table, source.names, before.same)
    for number, what in done.damaged:
        found.line(said.path, number, what)
    if done.damaged:
        log.warning("%s: %s", said.path, done.summary())
    if done.table.empty:
        raise UserError(said.path, expected="some samples left", got="every one dropped")
    return done.table, done.report


def _select(prints: Fingerprints, ids: "pd.Series[str]") -> Fingerprints:
    place = {name: row for row, name in enumerate(prints.ids.tolist())}
    rows = np.array([place[name] for name in ids], np.int64)
    return Fingerprints(prints.ids[rows], prints.phash[rows], prints.tiny[rows])


def _group(
    config: Prepare, source: sources.Source, table: pd.DataFrame,
    images: tuple[kinship.Rows, kinship.Rows | None], found: tuple[Ints, Ints], before: _Before,
) -> tuple[Grouping, str] | None:  # fmt: skip
    """Write ``table["group"]`` ('' where a row stands alone); return how ``auto`` chose, and by which embedding.

    Raises:
        UserError: no such column.
    """
    table["group"] = ""
    if config.group not in ("auto", "none"):
        own = sources.groups(source, config.group, config.label_column, config.labels or config.images)
        table["group"] = own[table["row"]].tolist()
    elif config.group == "auto":
        (rows, other), (pairs, twins) = images, found
        # where test images chose a cut (then or now), it sees to the twins
        has_cut = other is not None and (before.manifest is None or "grouping" in before.manifest.info)
        kin = twins[:0] if has_cut else twins[(twins < len(table)).all(axis=1)]
        folder = folder_of(config) / "cache"
        if before.manifest is not None:
            fold, group = lineage.carry(table, before.manifest, before.same)
            known = before.manifest.info.get("grouping", {})
            pairs = kinship.joined(rows, pairs, kin, fold >= 0)
            table["group"] = kinship.follow(rows, pairs, fold >= 0, group, known, folder)
            return None
        pairs = kinship.joined(rows, pairs, kin)
        labels = table["label"].to_numpy(str) if "label" in table else None

        def assign(part: Ints) -> Ints:
            return folds.assign(part.astype(str), labels, config.folds, config.seed)

        sides = table[["width", "height"]].min(axis=1).to_numpy()
        table["group"], chosen = kinship.choose(rows, other, pairs, sides, assign, config.folds, config.seed, folder)
        return chosen
    return None


def _fold(config: Prepare, table: pd.DataFrame, before: _Before, found: Findings) -> None:
    """Write ``table["fold"]``: the user's, the manifest's before, or new ones."""
    groups = np.where(table["group"] == "", table["sample_id"], table["group"]).astype(str)
    if "fold" not in table:
        labels = table["label"].to_numpy(str) if "label" in table else None
        if before.manifest is not None:
            kept = lineage.carry(table, before.manifest, before.same)[0]
            table["fold"] = folds.extend(groups, labels, kept, before.manifest.fold, config.seed)
        elif config.holdout is not None:
            table["fold"] = folds.hold_out(groups, labels, config.holdout, config.seed)
        else:
            table["fold"] = folds.assign(groups, labels, config.folds, config.seed)
    crossing = folds.crossing(groups, table["fold"].to_numpy(np.int64))
    if crossing and config.folds_file is not None and config.group not in ("auto", "none"):
        raise UserError(
            config.folds_file,
            expected=f"each '{config.group}' in one fold",
            got=f"{len(crossing)} in several: {preview(crossing)}",
            fix="mend the folds file, or --group none to use it as it is",
        )
    for name in crossing:
        found.group(name)


def _manifest(config: Prepare, source: sources.Source, table: pd.DataFrame, info: dict[str, Any]) -> Manifest:
    columns = ["sample_id", "path", *_targets(source), "group", "fold"]
    extra = [name for name in source.table.columns if name not in (*columns, "file", "name")]
    table = table.rename(columns={"file": "path"})[[*columns, "width", "height", *extra]]
    return Manifest(table, config.task, source.names, config.competition, source.images, info)


def _summary(made: Prepared) -> dict[str, Any]:
    manifest, problems = made.manifest, made.problems
    sizes = pd.Series(manifest.groups).value_counts()
    summary: dict[str, Any] = {
        "samples": len(manifest.table),
        "class_count": len(manifest.classes),
        "folds": len(manifest.folds),
        "groups": len(sizes),
        "largest_group": int(sizes.max()),
        "test_samples": 0 if made.test is None else len(made.test.table),
        "problems": (problems["set"] + ": " + problems["kind"]).value_counts().to_dict(),
    }
    if "label" in manifest.table:
        counts = pd.crosstab(manifest.table["label"], manifest.table["fold"])
        summary["classes_missing_in_a_fold"] = [str(name) for name in counts.index[(counts == 0).any(axis=1)]]
    if made.grouping is not None:
        summary["grouping"] = made.grouping.reason
        summary["train_test_auc"] = made.grouping.auc
    if len(made.test_looks):
        summary["train_test_differences"] = {  # Kolmogorov-Smirnov: 0 = the same distribution, 1 = nothing in common
            name: float(ks_2samp(made.looks[name], made.test_looks[name]).statistic)
            for name in ("width", "height", "brightness", "contrast", "sharpness")
        }
    if made.decided is not None:
        summary["decisions"] = (made.decided["action"] + " " + made.decided["outcome"]).value_counts().to_dict()
    if made.changes is not None:
        summary["changes"] = made.changes["change"].value_counts().to_dict()
    return summary


def write(prepared: Prepared, config: Prepare) -> dict[str, Path]:
    """Write manifest, test manifest, classes and findings; each file whole or not at all, the manifest last."""
    out = folder_of(config)
    if config.sample_submission is not None and prepared.test is not None:
        kept, given = out / "sample_submission.csv", existing(config.sample_submission, "the sample submission")
        if kept.resolve() != given.resolve():
            with atomic(kept) as temporary:
                shutil.copyfile(given, temporary)
        for manifest in (prepared.manifest, prepared.test):
            manifest.info["sample_submission"] = kept.name  # beside the manifest
    paths = {}
    if archived := lineage.archive(out, prepared.manifest.hash):
        paths["replaced"] = archived
    paths["classes"] = write_json(out / "classes.json", list(prepared.manifest.classes))
    if prepared.test is not None:
        paths["test"] = prepared.test.save(out / "test.csv")
    elif (out / "test.csv").exists():
        log.warning("%s is an earlier prepare's: this one was given no --test_images", out / "test.csv")
    for name in ("problems", "decided", "changes"):
        table = getattr(prepared, name)
        if table is not None and not (name == "changes" and table.empty):  # a repeated call keeps what the first said
            paths[name] = out / f"{name}.csv"
            with atomic(paths[name]) as temporary:
                table.to_csv(temporary, index=False)
    prepared.prints.save(out)
    paths["report"] = write_json(out / "report.json", prepared.summary)
    paths["manifest"] = prepared.manifest.save(out / "manifest.csv")
    return paths
