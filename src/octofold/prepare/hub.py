"""Hub: Hugging Face, torchvision and Kaggle data sets by name, laid out as folders of images with tables beside them.

Hugging Face tables (parquet, or ``save_to_disk``'s arrow) are read with pyarrow; image bytes are kept as they are.
What needs a network says so when there is none.
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from octofold.config import log
from octofold.errors import UserError, known, preview
from octofold.files import atomic, write_json
from octofold.prepare import archives

SPLITS = {"train": "train", "validation": "train", "val": "train", "dev": "train", "valid": "train", "test": "test"}
_TRAIN = ({"train": True}, {"train": False})
_SPLIT = ({"split": "train"}, {"split": "test"})
TORCHVISION: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "CIFAR10": _TRAIN,
    "CIFAR100": _TRAIN,
    "MNIST": _TRAIN,
    "FashionMNIST": _TRAIN,
    "KMNIST": _TRAIN,
    "USPS": _TRAIN,
    "SVHN": _SPLIT,
    "STL10": _SPLIT,
    "DTD": _SPLIT,
    "Flowers102": _SPLIT,
    "Food101": _SPLIT,
    "FGVCAircraft": ({"split": "trainval"}, {"split": "test"}),
    "GTSRB": _SPLIT,
    "Country211": _SPLIT,
    "Imagenette": ({"split": "train"}, {"split": "val"}),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
    "EuroSAT": ({}, None),
    "Caltech101": ({}, None),
}
"""Data sets by name, with the arguments of their training and test parts."""
MARK = ".imported.json"
_TABLES = ("train.csv", "test_truth.csv", "sample_submission.csv", "classes.json")
_NUMBERED = re.compile(r"[0-9]{7}\.[a-z]+")  # what `Layout` calls its images


def _is_unmarked_import(folder: Path) -> bool:
    """Whether an import from before there was a mark made this: images numbered from 0 on, as listed, no more."""
    if {path.name for path in folder.iterdir()} - {"download", "train", "test", *_TABLES}:
        return False
    try:
        listed = pd.read_csv(folder / "train.csv", usecols=[0], dtype=str).iloc[:, 0].tolist()
    except (OSError, ValueError):
        return False
    if not listed or not all(str(name).startswith(f"{number:07d}.") for number, name in enumerate(listed)):
        return False
    train, test = ({path.name for path in (folder / part).glob("*")} for part in ("train", "test"))
    return train == {*listed} and all(_NUMBERED.fullmatch(name) for name in test)


@dataclass
class Layout:
    """Rows written so far, per part (train, test), and how many of train were left out for want of a label.

    Raises:
        UserError: the folder holds files that no import has put there (a ``download/`` of torchvision's may lie in it).
    """

    folder: Path
    unlabelled: int = 0
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"train": [], "test": []})

    def __post_init__(self) -> None:
        if self.folder.exists() and not (self.folder / MARK).exists() and not _is_unmarked_import(self.folder):
            others = [path.name for path in self.folder.iterdir() if path.name != "download"]
            archives.refuse_others(self.folder, others, "an empty folder to import into")

    def add(self, part: str, data: bytes, row: dict[str, Any]) -> None:
        """Keep an image's bytes and its row."""
        if not any(self.rows.values()):  # before the first file of ours: an import cut off can be begun again
            write_json(self.folder / MARK, {"written by": "prepare --source; another import overwrites it"})
        name = f"{len(self.rows[part]):07d}{_suffix(data)}"
        path = self.folder / part / name
        if not path.exists() or path.stat().st_size != len(data) or path.read_bytes() != data:
            with atomic(path) as temporary:
                temporary.write_bytes(data)
        self.rows[part].append({"image": name, **row})

    def close(self, classes: list[str] | None) -> Path:
        """Write the tables: labels, class order, and the test part's truth kept aside; remove an earlier source's."""
        if not self.rows["train"]:
            got = f"no images in one, but {self.unlabelled} without a label" if self.unlabelled else "no images in one"
            raise UserError(self.folder, expected="a training part", got=got)
        if self.unlabelled:
            log.warning("%d training images have no label (-1 or nothing): left out", self.unlabelled)
        train = pd.DataFrame(self.rows["train"])
        tables = {"train.csv": train}
        if self.rows["test"]:
            test = pd.DataFrame(self.rows["test"])
            if "label" in train:
                sample = test.iloc[:, :1].assign(label=train["label"].iloc[0])
                tables["sample_submission.csv"] = sample
            if "label" in test or "label" not in train:
                tables["test_truth.csv"] = test
        for name in {*_TABLES} - {*tables} - ({"classes.json"} if classes else set()):
            (self.folder / name).unlink(missing_ok=True)
        for part, rows in self.rows.items():
            ours = {row["image"] for row in rows}
            for path in (self.folder / part).glob("*"):
                if path.is_file() and path.name not in ours and _NUMBERED.fullmatch(path.name):
                    path.unlink()
        for name, table in tables.items():
            with atomic(self.folder / name) as temporary:
                table.to_csv(temporary, index=False)
        if classes:
            write_json(self.folder / "classes.json", classes)
        return self.folder


def _suffix(data: bytes) -> str:
    kinds = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif"}
    found = next((suffix for start, suffix in kinds.items() if data.startswith(start)), ".png")
    return ".webp" if data[8:12] == b"WEBP" else found


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds such a data set: parquet or arrow files somewhere inside."""
    return folder.is_dir() and any(_tables(folder))


def _tables(folder: Path) -> list[Path]:
    found = [*folder.rglob("*.parquet"), *folder.rglob("*.arrow")]
    return sorted(path for path in found if not path.name.startswith("cache-"))


def hugging_face(name: str, folder: Path) -> Path:
    """Bring a data set (a folder, or a repository's name) into `folder`.

    Raises:
        UserError: no such data set, no network, or no image column.
    """
    layout, names = Layout(folder), None
    source = Path(name).expanduser()
    if not is_hugging_face(source):
        source = _download(name)
    for path in _tables(source):
        part = _part(path, source)
        if part:
            names = _read(path, part, layout) or names
    return layout.close(names)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"hf:{name}", expected="a folder with parquet or arrow files, or OWNER/NAME", got=repr(name))
    try:
        wanted = ["*.parquet", "**/*.parquet"]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        raise UserError(
            f"hf:{name}",
            expected="a data set on the Hugging Face hub, reached over the network",
            got=_first_line(error),
            fix="check name and network, or download it elsewhere and give its folder: --source hf:FOLDER",
        ) from error


def _part(path: Path, root: Path) -> str:
    """train or test, by the folder or file name; '' for other splits (unsupervised, all …)."""
    words = re.split(r"[^a-z]+", path.relative_to(root).as_posix().lower())
    found = [SPLITS[word] for word in words if word in SPLITS]
    return found[-1] if found else "train" if not set(words) & {"unsupervised", "all", "extra"} else ""


def _read(path: Path, part: str, layout: Layout) -> list[str] | None:
    """Add a table's rows; return the class names it knows."""
    import pyarrow as pa

    try:
        batches = _batches(path)
        schema = next(batches)
        features = _features(path, schema)
        image, label, names = _columns(path, schema, features)
        called = _make_room(schema.names, label)
        for batch in tqdm(batches, desc=path.name, unit="batch"):
            for row in batch.to_pylist():
                data = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
                if not data:
                    got = f"only a path: {row[image].get('path')!r}" if isinstance(row[image], dict) else "nothing"
                    raise UserError(path, expected="images inside the table", got=got)
                kept = {called[key]: row[key] for key in called if isinstance(row[key], (str, int, float))}
                if label:
                    value = row[label]
                    if value is None or (names and value == -1):  # how these tables write that nobody knows
                        layout.unlabelled += part == "train"
                        if part == "train":
                            continue
                    else:
                        kept = {"label": names[value] if names and isinstance(value, int) else value, **kept}
                layout.add(part, data, kept)
    except (pa.ArrowException, OSError, KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise UserError(path, expected="a Hugging Face image table", got=_first_line(error)) from error
    return names


def _make_room(columns: list[str], label: str) -> dict[str, str]:
    """What the table's columns are called in ours, the label's left out: ``image`` and ``label`` are ours."""
    called = {name: name for name in columns if name != label}
    for name in {"image", "label"} & {*called}:
        while called[name] in ("image", "label", *columns):
            called[name] = f"user_{called[name]}"
    return called


def _batches(path: Path) -> Iterator[Any]:
    """The schema, then record batches, a few rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield file.schema_arrow
            yield from file.iter_batches(batch_size=64)
        return
    with pa.memory_map(str(path)) as source:
        with pa.ipc.open_stream(source) as stream:
            yield stream.schema
            yield from stream


def _features(path: Path, schema: Any) -> dict[str, Any]:
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    info = json.loads(text).get("info", {})
    if not info and (path.parent / "dataset_info.json").exists():
        info = json.loads((path.parent / "dataset_info.json").read_text(encoding="utf-8"))
    features = info.get("features") or {}
    return features if isinstance(features, dict) else {}


def _columns(path: Path, schema: Any, features: dict[str, Any]) -> tuple[str, str, list[str] | None]:
    """Image column, label column ('' if none) and class names."""
    import pyarrow as pa

    images = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Image"]
    usual = [name for name in schema.names if name in ("image", "img", "jpg", "png")]
    images = images or [name for name in usual if not pa.types.is_string(schema.field(name).type)]
    if not images:
        raise UserError(path, expected="an image column", got=f"columns {preview(schema.names, 12)}")
    coded = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"]
    preferred = [name for name in ("label", "labels", "fine_label", "class", "category") if name in schema.names]
    label = next((name for name in preferred if name in coded), (coded or preferred or [""])[0])
    names = features.get(label, {}).get("names") if label else None
    return images[0], label, [str(name) for name in names] if names else None


# ---- torchvision and Kaggle -----------------------------------------------------------------------------------------


def torchvision(name: str, folder: Path) -> Path:
    """Bring a torchvision data set into `folder`, its images as PNG; a copy already in ``folder/download`` is used.

    Raises:
        UserError: no such name, or it is not there and cannot be downloaded.
    """
    import torchvision.datasets as zoo

    known("torchvision data set", name, TORCHVISION)
    layout, names = Layout(folder), None
    for part, flags in zip(("train", "test"), TORCHVISION[name], strict=True):
        if flags is None:
            continue
        try:
            data = getattr(zoo, name)(folder / "download", download=True, **flags)
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            raise UserError(
                f"torchvision:{name}",
                expected=f"the data set in {folder / 'download'}, or a network to fetch it",
                got=_first_line(error),
                fix=f"copy torchvision's files into {folder / 'download'}",
            ) from error
        names = [str(one) for one in getattr(data, "classes", [])] or names
        for image, label in tqdm(data, desc=f"{name} {part}", unit="img"):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            layout.add(part, buffer.getvalue(), {"label": names[label] if names else label})
    return layout.close(names)


def kaggle(name: str, folder: Path) -> Path:
    """Fetch a Kaggle competition's files; return the folder they are in. Credentials: environment or ``.env``.

    Raises:
        UserError: kagglehub is not installed, no network, no credentials, rules not accepted.
    """
    del folder  # kagglehub keeps its own cache
    try:
        import kagglehub  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise UserError(
            f"kaggle:{name}", expected="kagglehub", got="not installed", fix="pip install kagglehub"
        ) from error
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"kaggle:{name}", expected="a competition's name as in its address", got=repr(name))
    import requests

    try:
        return Path(kagglehub.competition_download(name))
    except (OSError, ValueError, RuntimeError, requests.RequestException) as error:
        raise UserError(
            f"kaggle:{name}",
            expected="the competition's files, reached over the network with your credentials",
            got=_first_line(error),
            fix="set KAGGLE_USERNAME and KAGGLE_KEY (environment or .env), accept the competition's rules on its page",
        ) from None  # the request in the traceback may hold the key


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
