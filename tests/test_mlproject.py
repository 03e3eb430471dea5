"""MLproject, entry points and schemas agree, and conda.yaml pins what the lock pins."""

import re
import tomllib

import pytest
import yaml

from conftest import REPOSITORY
from octofold import commands

PROJECT = yaml.safe_load((REPOSITORY / "MLproject").read_text())
ENTRIES = PROJECT["entry_points"]
SCRIPTS = sorted(path.stem for path in (REPOSITORY / "entrypoints").glob("*.py"))


def schema_of(script: str) -> type[commands.Section]:
    """The section a script's file reads its flags into."""
    text = (REPOSITORY / "entrypoints" / f"{script}.py").read_text()
    found = re.search(r"run_main\((\w+),", text)
    assert found, f"{script} does not call run_main"
    schema = getattr(commands, found[1])
    assert issubclass(schema, commands.Section)
    return schema  # type: ignore[no-any-return]


def test_every_script_is_an_entry_point_once() -> None:
    names = re.findall(r"^  (\w+):$", (REPOSITORY / "MLproject").read_text(), flags=re.MULTILINE)
    assert sorted(names) == sorted([*SCRIPTS, "main"])  # YAML would let the later of two win, silently


@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_declared_parameters_are_used_and_exist(entry: str) -> None:
    declared = set(ENTRIES[entry].get("parameters", {}))
    command = ENTRIES[entry]["command"]
    script = re.search(r"entrypoints/(\w+)\.py", command)
    assert script
    assert set(re.findall(r"\{(\w+)\}", command)) == declared
    assert set(re.findall(r"--(\w+) ", command)) == declared
    assert declared <= set(schema_of(script[1]).model_fields)
    assert all(
        "default" not in spec for spec in ENTRIES[entry].get("parameters", {}).values() if isinstance(spec, dict)
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_is_described(script: str) -> None:
    for name, field in schema_of(script).model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, commands.Section):
            continue
        assert field.description, f"{script}: {name} has no description"


def test_conda_pins_what_the_lock_pins() -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name.strip().lower())

    lock = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name, version = line.split("==")
            lock[normal(name)] = version.strip()
    conda = yaml.safe_load((REPOSITORY / "conda.yaml").read_text())["dependencies"][-1]["pip"]
    pinned = {normal(line.split("==")[0]): line.split("==")[1].strip() for line in conda}
    assert pinned.items() <= lock.items()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {normal(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"]}  # type: ignore[index]
    assert needed <= set(pinned)
