"""docker-compose.yml says what the docs say: every variable is in the example file, versions are the lock's."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY

FILE = REPOSITORY / "docker-compose.yml"
TEXT = FILE.read_text()
SERVICES = yaml.safe_load(TEXT)["services"]


def test_every_variable_is_in_the_example() -> None:
    example = (REPOSITORY / ".env.server.example").read_text()
    assert set(re.findall(r"\$\{(\w+)", TEXT)) <= set(re.findall(r"\b([A-Z0-9_]+)=", example))


def test_nothing_starts_without_its_passwords() -> None:
    for name in re.findall(r"\$\{(\w*(?:PASSWORD|SECRET|KEY)\w*)", TEXT):
        assert re.search(rf"\${{{name}:\?", TEXT), name
        assert not re.search(rf"\${{{name}(:-|}})", TEXT), name


def test_the_server_is_the_clients_mlflow() -> None:
    pinned = re.search(r"mlflow==([\d.]+)", (REPOSITORY / "pyproject.toml").read_text())
    assert pinned is not None
    assert f"mlflow[auth]=={pinned[1]}" in SERVICES["mlflow"]["build"]["dockerfile_inline"]


def test_images_are_pinned_and_ports_are_loopback() -> None:
    for service in SERVICES.values():
        assert "image" not in service or re.search(r":[\w.-]*\d", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_docker_agrees(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("needs docker compose")
    filled = re.sub(
        r"^(\w+)=$", r"\1=0123456789ab", (REPOSITORY / ".env.server.example").read_text(), flags=re.MULTILINE
    )
    (tmp_path / "env").write_text(filled)
    command = [docker, "compose", "--file", str(FILE), "--env-file", str(tmp_path / "env"), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
