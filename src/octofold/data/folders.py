"""Folders: which files under one are images, and which are left out though somebody may think they are seen."""

import os
from collections.abc import Iterator
from pathlib import Path

from octofold.errors import UserError, preview

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
COMPANIONS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf", ".py",
              ".ipynb", ".zip", ".tar", ".gz", ".tgz", ".parquet", ".arrow", ".db", ".ini")  # fmt: skip
"""Files that lie beside images and that nobody takes for one."""
NOT_UTF8 = "a name that is not UTF-8"


def find_images(folder: Path) -> list[Path]:
    """Every image file under a folder, by suffix, sorted; see `left_out` for what is passed over."""
    walk = _walk(folder)
    named = [(place, name) for place, _, files in walk for name in files if name.lower().endswith(SUFFIXES)]
    return sorted(Path(place, name) for place, name in named if _is_text(os.path.join(place, name), folder))


def left_out(folder: Path) -> list[tuple[str, str]]:
    """What `find_images` passes over and should not without a word: ``(path relative to folder, why)``, sorted."""
    found: list[tuple[Path, str]] = []
    closed: list[OSError] = []
    for place, folders, files in _walk(folder, closed):
        linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [(Path(place, name), "a link to a folder: not followed") for name in linked]
        named = [name for name in files if name.lower().endswith(SUFFIXES)]
        bad = [name for name in named if not _is_text(os.path.join(place, name), folder)]
        found += [(Path(place, name), f"{NOT_UTF8}: rename it") for name in bad]
        other = [name for name in files if Path(name).suffix and not name.lower().endswith(SUFFIXES + COMPANIONS)]
        found += [(Path(place, name), f"'{Path(name).suffix}' is no suffix of images that we read") for name in other]
    found += [(Path(error.filename), error.strerror or str(error)) for error in closed]
    return sorted((told(path.relative_to(folder).as_posix()), why) for path, why in found)


def _is_text(path: str, folder: Path) -> bool:
    return is_utf8(path.removeprefix(str(folder)))


def is_utf8(path: str) -> bool:
    """Whether a table can hold the path: file names are bytes, and not all of them are UTF-8."""
    return told(path) == path


def told(path: str) -> str:
    """The path as it can be written anywhere."""
    return path.encode("utf-8", "backslashreplace").decode()


def refuse_unseen(folder: Path) -> None:
    """Refuse a folder with linked or closed folders in it, where all of its images count: they may hold a whole class.

    Raises:
        UserError: there are some.
    """
    unseen = [(name, why) for name, why in left_out(folder) if (folder / name).is_dir()]
    linked = [name for name, _ in unseen if (folder / name).is_symlink()]
    closed = [f"{name} ({why})" for name, why in unseen if name not in linked]
    if closed:
        raise UserError(
            folder,
            expected="folders that may be opened",
            got=f"{len(closed)} that may not: {preview(closed)}",
            fix="let this user read and enter them (chmod u+rx), or move them away",
        )
    if linked:
        raise UserError(
            folder,
            expected="folders of images, not links to them",
            got=f"{len(linked)} linked: {preview(linked)}",
            fix="put the folders themselves there, or name the images in a table: --labels (--sample_submission)",
        )


def _walk(folder: Path, closed: list[OSError] | None = None) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` without what is hidden (``.name``, ``__MACOSX``); `closed` takes what hindered opening a folder."""
    for place, folders, files in os.walk(folder, onerror=None if closed is None else closed.append):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        yield place, folders, [name for name in files if not name.startswith(".")]
