"""Archives: zips and tars of images unpacked whole or not at all, and never outside their folder.

Refused by name: paths that leave the folder, links, devices, two members of one name, encryption, and sizes that no
collection of photos has. Only images and tables are taken out; a tar inside a tar (ImageNet) becomes a folder.
"""

import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tqdm import tqdm

from octofold.config import log
from octofold.data.folders import COMPANIONS, SUFFIXES
from octofold.errors import UserError, preview
from octofold.files import write_json

TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".arrow")
ZIPS, TARS = (".zip",), (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MOST_FILES = 10_000_000
MOST_RATIO, SMALL = 100, 100_000_000  # photos hardly shrink: past SMALL bytes a hundredfold growth is a bomb
UTF8 = 0x800  # a zip member's flag: its name is UTF-8
MARK = ".unpacked.json"
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, ValueError, NotImplementedError, RuntimeError)


class Member(NamedTuple):
    """One file of an archive."""

    name: str
    size: int
    file: IO[bytes]


def is_archive(path: Path | str) -> bool:
    """Whether the name is one that `unpack` reads."""
    return str(path).lower().endswith(ZIPS + TARS)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack into `folder`; a second call with the same archive finds it done.

    Returns:
        `folder`.

    Raises:
        UserError: not an archive, damaged, or one of the refusals above; nothing is left behind.
    """
    facts = {"archive": archive.name, "size": archive.stat().st_size, "modified": archive.stat().st_mtime_ns}
    mark = folder / MARK
    if mark.exists() and mark.read_text() == _text(facts):
        return folder
    if folder.exists():
        refuse_others(folder, [path.name for path in folder.iterdir()], "an empty folder to unpack into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(archive, part)
        write_json(part / MARK, facts)
        part.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    except OSError as error:
        raise UserError(folder, expected=f"room to unpack {archive.name}", got=error.strerror or str(error)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def refuse_others(folder: Path, names: list[str], expected: str) -> None:
    """Refuse to write where files lie that are not ours.

    Args:
        folder: where we would write.
        names: what is there and is not ours.
        expected: what would have been right.

    Raises:
        UserError: there are some.
    """
    if names:
        got = f"other files: {preview(sorted(names))}"
        raise UserError(folder, expected=expected, got=got, fix="move them away, or another --out")


def _text(facts: dict[str, object]) -> str:
    import json

    return json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _write(archive: Path, part: Path) -> None:
    free = shutil.disk_usage(part).free
    allowed = min(free, max(SMALL, archive.stat().st_size * MOST_RATIO))
    total = count = 0
    passed: Counter[str] = Counter()
    with _members(archive) as members, tqdm(desc=f"unpack {archive.name}", unit="file") as bar:
        try:
            for member in members:
                target = part / _inside(member.name, archive)
                count += 1
                total += member.size
                if total > allowed or count > MOST_FILES:
                    raise UserError(
                        archive, expected=f"at most {allowed:,} bytes unpacked and {MOST_FILES:,} files",
                        got=f"{total:,} bytes, {count:,} files by '{member.name}'", fix="unpack it by hand",
                    )  # fmt: skip
                if not target.name.lower().endswith(SUFFIXES + TABLES):
                    passed[target.suffix] += not target.name.lower().endswith(COMPANIONS)
                    continue
                if target.exists():
                    raise UserError(archive, expected="each name once", got=f"'{member.name}' twice")
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    _copy(member, file, archive)
                bar.update()
        except FileExistsError as error:
            raise UserError(archive, expected="a name is a file or a folder", got=str(error)) from error
        except _BROKEN as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                archive, expected="an archive that is whole", got=str(error) or type(error).__name__
            ) from error
    if passed := +passed:
        log.warning("%s: files left in it, by suffix: %s", archive.name, dict(passed))


def _copy(member: Member, file: IO[bytes], archive: Path) -> None:
    written = 0
    while piece := member.file.read(1 << 20):
        written += len(piece)
        if written > member.size:  # the header lied
            raise UserError(archive, expected=f"{member.size:,} bytes in '{member.name}'", got="more")
        file.write(piece)


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """The files of an archive, one by one, refusals raised on the way."""
    try:
        if archive.name.lower().endswith(ZIPS):
            with zipfile.ZipFile(archive) as opened:
                with closing(_of_zip(opened, archive)) as members:
                    yield members
        else:
            with tarfile.open(archive) as tar:
                with closing(_of_tar(tar, archive, "")) as members:
                    yield members
    except UserError:
        raise
    except _BROKEN as error:
        raise UserError(archive, expected="a zip or tar archive", got=str(error) or type(error).__name__) from error


def _of_zip(opened: zipfile.ZipFile, archive: Path) -> Generator[Member]:
    for info in opened.infolist():
        name = _name_of(info)
        if info.is_dir():
            _inside(name, archive)
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(archive, expected="files and folders", got=f"a link: '{name}'")
        if info.flag_bits & 1:
            raise UserError(archive, expected="no password", got=f"'{name}' is encrypted")
        with opened.open(info) as file:
            yield Member(name, info.file_size, file)


def _name_of(info: zipfile.ZipInfo) -> str:
    """The member's name: many zips (a Mac's) hold UTF-8 and do not say so, and Python reads them as cp437."""
    if info.flag_bits & UTF8:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


def _of_tar(tar: tarfile.TarFile, archive: Path, prefix: str) -> Generator[Member]:
    for info in tar:
        name = prefix + info.name
        if info.isdir():
            continue
        if not info.isreg():
            kind = "a link" if info.issym() or info.islnk() else "a device"
            raise UserError(archive, expected="files and folders", got=f"{kind}: '{name}'")
        file = tar.extractfile(info)
        assert file is not None  # it is a regular file
        if name.lower().endswith(".tar") and not prefix:
            with tarfile.open(fileobj=file) as inner:
                yield from _of_tar(inner, archive, name[:-4] + "/")
        else:
            yield Member(name, info.size, file)


def _inside(name: str, archive: Path) -> PurePosixPath:
    """The member's path made safe, or a refusal."""
    text = name.replace("\\", "/")
    path = PurePosixPath(os.path.normpath(text))
    if text.startswith("/") or ".." in PurePosixPath(text).parts or re.match(r"[A-Za-z]:", text) or "\0" in text:
        raise UserError(
            archive, expected="paths inside the archive's folder", got=f"'{name}'", fix="do not trust this file"
        )
    return path
