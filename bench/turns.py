"""What the benches beside peers share: contestants in processes of their own, in turns; photos in class folders.

A busy moment of the machine hits all contestants alike if they take turns, A B C A B C. Each result is a line of JSON,
written at once, so an interrupted bench goes on with the turn it had come to.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def take_turns(names: Sequence[str], rounds: Sequence[int], run: Callable[[str, int], Result], record: Path) -> None:
    """Run every contestant once a round, except those of which `record` has that round's line already."""
    known = {(line["name"], line["round"]) for line in lines(record)}
    for number in rounds:
        for name in names:
            if (name, number) not in known:
                line = json.dumps({"name": name, "round": number, **run(name, number)})
                print(line, flush=True)
                if '"failed"' not in line:  # a later call tries again
                    with record.open("a") as file:
                        file.write(line + "\n")


def lines(record: Path) -> list[Result]:
    """All results so far."""
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def alone(script: str, *arguments: str) -> Result:
    """Run a script in a process of its own; return the JSON of its last line, or how it failed."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@contextmanager
def class_folders(manifest_file: Path, valid_fold: int | None = None) -> Iterator[Path]:
    """Lay the photos out as ``train/class/photo`` and ``valid/class/photo``, what every peer reads, for a while."""
    from octofold.data import manifest

    table = manifest.read(manifest_file)
    with tempfile.TemporaryDirectory() as folder:
        for path, label, fold in zip(table.paths, table.table["label"], table.fold, strict=True):
            place = Path(folder, "valid" if fold == valid_fold else "train", label)
            place.mkdir(parents=True, exist_ok=True)
            (place / path.name).symlink_to(path)
        yield Path(folder)
