"""Places: where each name in a user's file leads; never outside the folder it is relative to."""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from octofold.data.folders import SUFFIXES
from octofold.errors import UserError, preview


def locate(names: Iterable[str], folder: Path, where: object) -> list[str]:
    """Find each named image inside `folder`.

    A name may lack its suffix, be written with backslashes or in another Unicode form, or be absolute if it still
    lies inside; one that leaves the folder (``../``, absolute, through a link) is refused.

    Returns:
        posix paths relative to `folder`, in the order of `names`.

    Raises:
        UserError: names that are empty, lead out of the folder, have no file, or no suffix and several files; each
            kind is listed.
    """
    root = folder.resolve()
    present = _listing(root)
    known: dict[str, str] = {}
    twofold: dict[str, list[str]] = {}
    found, missing, outside, doubtful = [], [], [], []
    for name in names:
        if name in present:
            found.append(name)
            continue
        if not known:
            known = {_plain(path): path for path in sorted(present, reverse=True)}
            stems: dict[str, list[str]] = {}
            for path in sorted(known):
                if path.lower().endswith(SUFFIXES):
                    stems.setdefault(path.rpartition(".")[0], []).append(path)
            twofold = {stem: paths for stem, paths in stems.items() if len(paths) > 1 and stem not in known}
            known = {stem: known[paths[0]] for stem, paths in stems.items()} | known
        if (inside := _inside(name, root)) is None:
            outside.append(name)
        elif inside in twofold:  # photo.jpg beside its mask photo.png: nobody says which
            doubtful.append(f"{name}: {preview(twofold[inside])}")
        elif inside in known:
            found.append(known[inside])
        else:
            missing.append(name)
    if outside:
        raise UserError(
            where,
            expected=f"image names inside {root}",
            got=f"{len(outside)} that lead out of it: {preview(map(repr, outside))}",
            fix="copy the files into the folder, or give --images the folder that holds them all",
        )
    if doubtful:
        raise UserError(
            where,
            expected="one image for every name without a suffix",
            got=f"{len(doubtful)} with several: {preview(doubtful)}",
            fix="write the suffixes too, or keep the other files in another folder",
        )
    if missing:
        raise UserError(
            where,
            expected=f"a file in {root} for every image name",
            got=f"{len(missing)} without one: {preview(map(repr, missing))}",
            fix="check the folder, or remove the rows",
        )
    return found


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _listing(root: Path) -> set[str]:
    """Relative posix paths of the files under `root`, without links that lead out of it.

    Linked folders are not entered: `_inside` leads a name through them to the folder itself.
    """
    found = set()
    for place, _, files in os.walk(root):
        prefix = "" if place == str(root) else Path(place).relative_to(root).as_posix() + "/"
        for name in files:
            full = f"{place}/{name}"
            if not os.path.islink(full) or Path(os.path.realpath(full)).is_relative_to(root):
                found.add(prefix + name)
    return found


def _inside(name: str, root: Path) -> str | None:
    """The name made plain and relative to `root`, or None where it leads out."""
    text = name.strip().replace("\\", "/")
    if "\0" in text or re.match(r"[A-Za-z]:/", text):
        return None
    if text.startswith("/"):
        path = Path(os.path.normpath(text))
        path = path if path.is_relative_to(root) else Path(os.path.realpath(path))
        return _plain(path.relative_to(root).as_posix()) if path.is_relative_to(root) else None
    text = os.path.normpath(text) if text else ""
    if PurePosixPath(text).parts[:1] == ("..",) or (
        len(text) < 4000 and os.path.lexists(root / text) and _leads_out(root / text, root)
    ):
        return None
    if len(text) < 4000 and (folder := Path(os.path.realpath((root / text).parent))) != (root / text).parent:
        if not folder.is_relative_to(root):
            return None
        text = (folder / PurePosixPath(text).name).relative_to(root).as_posix()  # by a link to a folder inside
    return _plain(text)


def _leads_out(path: Path, root: Path) -> bool:
    return not Path(os.path.realpath(path)).is_relative_to(root)
