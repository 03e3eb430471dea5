"""Importing: data from elsewhere becomes a folder of images with tables beside it, and prepare's flags name them."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from octofold.commands import Prepare
from octofold.config import log
from octofold.data.folders import SUFFIXES, find_images, refuse_unseen
from octofold.errors import UserError, preview
from octofold.files import ROOT, atomic, existing, read_json
from octofold.prepare import archives, hub, sources
from octofold.prepare.findings import Findings

HELD_OUT = 0.2
LABELS = ("train.csv", "labels.csv", "train_labels.csv", "train_solution.csv", "landmarks.csv", "CollectedData.csv")
SAMPLES = ("sample_submission.csv", "sampleSubmission.csv", "sample_submission_example.csv")
TRAIN, TEST = ("train", "train_images", "training", "images"), ("test", "test_images", "testing")
MORE = ("val", "valid", "validation")  # ImageNet's second labelled part
"""Names of files and folders, in whatever case."""


def fetch(config: Prepare, found: Findings | None = None) -> Prepare:
    """Bring what ``--builtin`` or ``--source`` names, and return the flags with the paths filled in.

    Args:
        config: the flags.
        found: takes what is left aside.

    Raises:
        UserError: a source that is not there, cannot be reached, or holds nothing we can read.
    """
    if config.builtin == "digits":
        return digits(config)
    if not config.source:
        return config
    own = (config.out or ROOT / "data" / config.competition).absolute() / "raw"
    kind, colon, name = config.source.partition(":")
    if colon and kind in BRINGERS:
        return lay_out(BRINGERS[kind](name, own), own, config, found)
    path = existing(config.source, "an archive, a folder, hf:NAME, torchvision:NAME or kaggle:NAME (--source)")
    if path.is_file():
        if not archives.is_archive(path):
            raise UserError(path, expected=f"one of {', '.join(archives.ZIPS + archives.TARS)}", got=path.name)
        return lay_out(archives.unpack(path, own), own, config, found)
    if hub.is_hugging_face(path) and not find_images(path):
        return lay_out(hub.hugging_face(str(path), own), own, config, found)
    return lay_out(path, own, config, found)


BRINGERS = {"hf": hub.hugging_face, "torchvision": hub.torchvision, "kaggle": hub.kaggle}


def lay_out(raw: Path, own: Path, config: Prepare, findings: Findings | None = None) -> Prepare:
    """Find labels, images, test images and sample submission in a folder; flags that were given stand.

    Args:
        raw: the data, never written to unless it is ours.
        own: where we may write: archives inside `raw` are unpacked there.
        config: the flags.
        findings: takes what is left aside.

    Raises:
        UserError: neither a table of labels nor class folders.
    """
    raw = _descend(raw)
    roots = [raw]
    for path in sorted(raw.glob("*.zip")):  # Kaggle puts train.zip inside
        roots += [archives.unpack(path, own / path.stem), own]
    found: dict[str, Any] = {}
    labels = config.labels or _first(raw, LABELS)
    sample = config.sample_submission or _first(raw, SAMPLES)
    if labels is not None:
        labels = labels if labels.exists() else raw / labels
        table = sources.read_table(labels, "labels")
        name = _image_column(table, config.image_column, roots)
        found |= {"labels": labels, "image_column": name}
        found["images"] = config.images or _holding(
            roots, sources.column(table, name, labels, "image_column"), TRAIN, labels
        )
        if config.task == "classify" and config.label_column not in table and len(table.columns) == 2:
            found["label_column"] = next(str(other) for other in table.columns if other != name)
    else:
        found |= _class_folders(raw, own, findings or Findings())
    if config.classes is None and config.task == "classify" and _says_order(raw, own):
        found["classes"] = raw / "classes.json"
    if sample is not None:
        ids = sources.read_table(sample, "the sample submission").iloc[:, 0]
        found |= {"sample_submission": sample, "test_images": config.test_images or _holding(roots, ids, TEST, sample)}
    elif config.test_images is None:
        places = [place for root in roots for place in _folders(root, TEST) if find_images(place)]
        found |= {"test_images": places[0]} if places else {}
    return config.model_copy(update={"source": "", **found})


def _descend(raw: Path) -> Path:
    """A single folder inside a folder is the data's own top folder (archives are often made so)."""
    while True:
        inside = [path for path in raw.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX"]
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].name.casefold() in TRAIN + TEST:
            return raw
        raw = inside[0]


def _first(raw: Path, names: tuple[str, ...]) -> Path | None:
    return next((path for path in _named(raw, names) if path.is_file()), None)


def _named(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """What a folder holds under these names, in their order: as they are written, else in another case."""
    present = {path.name.casefold(): path for path in sorted(folder.iterdir())}
    for name in names:
        path = folder / name if (folder / name).exists() else present.get(name.casefold())
        if path is not None:
            yield path


def _folders(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [path for path in _named(folder, names) if path.is_dir()]


def _says_order(raw: Path, own: Path) -> bool:
    """Whether there is a class list. One that prepare wrote beside its manifest, in no special order, says nothing."""
    path = raw / "classes.json"
    if not path.exists() or raw != own.parent or not (raw / "manifest.json").exists():
        return path.exists()
    names = read_json(path)
    return not isinstance(names, list) or list(sources.classes_of(pd.Series(names, dtype=str), path)[1]) != names


def _places(roots: list[Path], names: tuple[str, ...]) -> list[Path]:
    """Where images may be: ``train/``, ``train/train/`` …, or beside the table."""
    inside = [
        place
        for root in roots
        for name in names
        for outer in _folders(root, (name,))
        for place in (outer, *_folders(outer, (name,)))
    ]
    return [*inside, *roots]


def _image_column(table: pd.DataFrame, wanted: str, roots: list[Path]) -> str:
    """The column asked for, or the first one whose first cell names a file here."""
    if wanted in table or table.empty:
        return wanted
    places = _places(roots, TRAIN)
    return next(
        (str(name) for name in table.columns if any(_has(place, str(table[name].iloc[0])) for place in places)), wanted
    )


def _holding(roots: list[Path], names: "pd.Series[str]", kinds: tuple[str, ...], where: Path) -> Path:
    """The folder that holds the first image named."""
    for place in _places(roots, kinds):
        if len(names) and _has(place, str(names.iloc[0])):
            return place
    raise UserError(
        where,
        expected=f"its images in {preview(kinds)} or beside it",
        got=f"'{names.iloc[0]}' in none of them" if len(names) else "no rows",
        fix="say where: --images (--test_images)",
    )


def _has(folder: Path, name: str) -> bool:
    """Whether a name, perhaps without its suffix, is a file in the folder; `places.locate` does the checking later."""
    if not name.strip() or "\0" in name:
        return False
    return any(os.path.isfile(f"{folder}/{name}{suffix}") for suffix in ("", *SUFFIXES))


def _class_folders(raw: Path, own: Path, findings: Findings) -> dict[str, Any]:
    """Class folders here, in ``train/``, or in ``train/`` and ``val/`` (then a table says which)."""
    train = next(iter(_folders(raw, TRAIN)), None)
    if train is None:
        return {"images": raw}
    more = [path for path in _folders(raw, MORE) if find_images(path)]
    _tell_aside(raw, [train, *more, *_folders(raw, TEST), own], findings)
    if not more:
        return {"images": train}
    rows = []
    for part in (train, *more):
        refuse_unseen(part)
        for path in find_images(part):
            inner = path.relative_to(part).parts
            if len(inner) < 2:
                raise UserError(part, expected="one folder per class", got=f"an image outside: {path.name}")
            rows.append((path.relative_to(raw).as_posix(), inner[0], part.name))
    labels = own.parent / "cache" / "class_folders.csv"  # no place where the next call takes it for the user's
    with atomic(labels) as temporary:
        pd.DataFrame(rows, columns=["image", "label", "split"]).to_csv(temporary, index=False)
    return {"images": raw, "labels": labels, "image_column": "image", "label_column": "label"}


def _tell_aside(raw: Path, taken: list[Path], findings: Findings) -> None:
    """Name the folders of images beside ``train/``: samples to look at, or classes, of which one is called train."""
    beside = [path for path in sorted(raw.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    aside = [path.name for path in beside if path not in taken and path.name != "__MACOSX" and find_images(path)]
    if aside:
        told = "%s: the classes are in %s/; folders of images left aside: %s; if they are classes too, --images %s"
        log.warning(told, raw, taken[0].name, preview(aside, 12), raw)
        findings.unseen("train", [(name, f"a folder of images beside {taken[0].name}/") for name in aside])


def digits(config: Prepare) -> Prepare:
    """Write scikit-learn's digits (1797 real 8x8 scans) as PNGs, a fifth of them kept aside as the test set.

    The truth of the held-out part goes to ``test_truth.csv``, so that an estimate can be compared with what came.

    Returns:
        The flags, with the paths filled in.

    Raises:
        UserError: where these go lie other files.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    rows = np.arange(len(data.target))
    train, test = train_test_split(rows, test_size=HELD_OUT, random_state=0, stratify=data.target)
    folder = (config.out or ROOT / "data" / config.competition).absolute()
    parts = {"train": np.sort(train), "test": np.sort(test)}
    names = {part: [f"{part}_{row:04d}.png" for row in chosen] for part, chosen in parts.items()}
    tables = {part: pd.DataFrame({"image": names[part], "label": data.target[parts[part]]}) for part in parts}
    texts = {"train.csv": tables["train"], "test_truth.csv": tables["test"]}
    texts["sample_submission.csv"] = tables["test"].assign(label=0)
    _refuse_others(folder, names, texts)
    for part, chosen in parts.items():
        if not all((folder / "images" / part / name).exists() for name in names[part]):
            _write_digits(folder / "images" / part, names[part], data.images[chosen])
    for name, table in texts.items():
        with atomic(folder / name) as temporary:
            table.to_csv(temporary, index=False)
    return config.model_copy(
        update={
            "builtin": "",
            "images": folder / "images" / "train",
            "labels": folder / "train.csv",
            "test_images": folder / "images" / "test",
            "sample_submission": folder / "sample_submission.csv",
        }
    )


def _refuse_others(folder: Path, names: dict[str, list[str]], tables: dict[str, pd.DataFrame]) -> None:
    """Refuse a folder where the digits would take the place of somebody's images or tables."""
    others = [name for name, table in tables.items() if (folder / name).exists() and not _says(folder / name, table)]
    for part, ours in names.items():
        found = {path.name for path in (folder / "images" / part).glob("*")} - {*ours}
        others += [f"images/{part}/{name}" for name in found if not name.startswith(".")]
    archives.refuse_others(folder, others, "a folder for the digits, empty or with an earlier call's")


def _says(path: Path, table: pd.DataFrame) -> bool:
    return path.read_bytes().decode("utf-8", "replace").split() == table.to_csv(index=False).split()


def _write_digits(folder: Path, names: list[str], scans: Any) -> None:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, scan in zip(names, scans, strict=True):
        Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8)).save(part / name)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
