"""What an inference job leaves behind: Predictions, a table by file name, and images sorted into class folders."""

import csv
import filecmp
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from octofold.config import log
from octofold.errors import UserError, preview
from octofold.files import atomic
from octofold.infer.looks import Source
from octofold.infer.shards import Result, rows

_LABELS = ["file", "sample_id", "predicted"]
_SKIPPED = ["file", "reason"]
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def write(result: Result, folder: Path) -> dict[str, str]:
    """Write ``predictions.parquet``, ``predictions.csv`` (a row per file) and ``skipped.csv`` where files were skipped.

    Returns:
        The paths by name.
    """
    said = result.predictions
    paths = {
        "predictions": str(said.save(folder / "predictions.parquet")),
        "predictions_csv": str(folder / "predictions.csv"),
    }
    if said.is_points:
        header = ["file", "sample_id", *(f"{name}_{axis}" for name in said.classes for axis in "xy")]
        lines = ([name, one, *(f"{v:.3f}" for v in values.ravel())] for name, one, values in rows(result))
    else:
        header = ["file", "sample_id", "predicted", "confidence", *said.classes]
        lines = (
            [name, one, said.classes[values.argmax()], f"{values.max():.6f}", *(f"{v:.6f}" for v in values)]
            for name, one, values in rows(result)
        )
    _write_csv(folder / "predictions.csv", header, lines)
    if _is_ours(folder / "labels.csv", _LABELS):
        (folder / "labels.csv").unlink()
    return paths | _write_skipped(result, folder)


def write_labels(result: Result, folder: Path) -> dict[str, str]:
    """Write ``labels.csv``, a row per file: what remains of a fast job, whose probabilities are not to be blended.

    Where files were skipped, ``skipped.csv`` too, as `write` does.
    """
    said = result.predictions
    lines = ([name, one, said.classes[values.argmax()]] for name, one, values in rows(result))
    _write_csv(folder / "labels.csv", _LABELS, lines)
    if _is_ours(folder / "predictions.csv", ["file", "sample_id"]):
        for name in ("predictions.csv", "predictions.parquet"):
            (folder / name).unlink(missing_ok=True)
    return {"labels": str(folder / "labels.csv")} | _write_skipped(result, folder)


def _write_skipped(result: Result, folder: Path) -> dict[str, str]:
    """Write ``skipped.csv``, or remove an earlier job's: what lies in a folder is what its last job found."""
    path = folder / "skipped.csv"
    if result.skipped:
        _write_csv(path, _SKIPPED, result.skipped)
        return {"skipped_csv": str(path)}
    if _is_ours(path, _SKIPPED):
        path.unlink()
    return {}


def _is_ours(path: Path, header: Sequence[str]) -> bool:
    """Whether we wrote a table, going by its first columns: a user's own ``labels.csv`` is not ours to remove."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return file.readline().rstrip("\r\n").split(",")[: len(header)] == list(header)


def sort_into(result: Result, source: Source, folder: Path) -> int:
    """Copy every readable image into ``folder/<predicted class>/``; originals stay where they are.

    Class names that are no folder names are made so (``a/b`` becomes ``a_b``); files of one name from different
    folders are kept apart by their path. A second call writes the same files again; another photo that an earlier call
    left under the same name stays, and a photo that an earlier call put into another class is told of, not removed.

    Returns:
        How many images were copied.

    Raises:
        UserError: points have no classes to sort by, or the folder lies inside the images' own.
    """
    said, folder = result.predictions, folder.absolute()
    check_sorting("keypoints" if said.is_points else "classify", source, folder)
    paths = {item.name: item.path for item in source.items}
    folders = dict(zip(said.classes, folder_names(said.classes), strict=True))
    bases = Counter(Path(name).name.lower() for name, _ in result.files)
    before, elsewhere = _files_by_name(folder), []
    for name, sample_id, values in rows(result):
        path, own = paths[name], folder / folders[said.classes[values.argmax()]]
        names = _file_names(name, sample_id, bases)
        first = own / names[0]
        target = own / names[1] if first.exists() and not _is_copy(path, first) else first
        old = [one for title in names for one in before.get(title, []) if one.parent != own and _is_copy(path, one)]
        elsewhere += [f"{one.relative_to(folder)} (now {own.name})" for one in old]
        with atomic(target) as temporary:
            shutil.copyfile(path, temporary)
    if elsewhere:
        log.warning(
            "%s: an earlier sorting put some into other classes, where they stay: %s", folder, preview(elsewhere)
        )
    return len(result.files)


def _files_by_name(folder: Path) -> dict[str, list[Path]]:
    """What lies in the class folders by now."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/*")):
        found.setdefault(path.name, []).append(path)
    return found


def _is_copy(path: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(path, other, shallow=False)
    except OSError:  # copying will say what is wrong
        return False


def check_sorting(task: str, source: Source, folder: Path) -> None:
    """Refuse what `sort_into` would refuse, before the hours of predicting.

    Raises:
        UserError: points have no classes to sort by, or the folder lies inside the images' own.
    """
    if task == "keypoints":
        raise UserError("--sort_into", expected="a classifier", got="a model of points", fix="leave it out")
    if not source.is_manifest and folder.resolve().is_relative_to(source.where.resolve()) and len(source.items) > 1:
        raise UserError(
            folder,
            expected=f"a folder outside {source.where}",
            got="one inside: the copies would be predicted next time",
        )


def folder_names(classes: Sequence[str]) -> list[str]:
    """Return a safe, distinct folder name for each class, its own name wherever that is safe.

    Example:
        >>> folder_names(["red", "a/b", "a_b", ".."])
        ['red', 'a_b', 'a_b-2', '_']
    """
    taken: set[str] = set()
    names = []
    for one in classes:
        name = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", one).strip(" .")[:100] or "_"
        name = f"_{name}" if name.lower().partition(".")[0] in _RESERVED else name
        unique, number = name, 1
        while unique.lower() in taken:  # some file systems do not tell cases apart
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.lower())
        names.append(unique)
    return names


def _file_names(name: str, sample_id: str, bases: "Counter[str]") -> tuple[str, str]:
    """What to call a copy, and what to call it where another photo lies under that name.

    The file's own name if no other file has it, else its path as a name, ended by its id against ``a__b/c``.
    """
    path = Path(name)
    is_only = bases[path.name.lower()] == 1
    flat = path.name if is_only else "__".join(part for part in path.parts if part not in ("..", "/"))
    stem, suffix = flat[: len(flat) - len(path.suffix)], path.suffix
    with_id = f"{stem[-150:]}.{sample_id}{suffix}"
    return (path.name if is_only else with_id), with_id


def _write_csv(path: Path, header: Sequence[str], lines: object) -> None:
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)  # type: ignore[arg-type]
