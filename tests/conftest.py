"""What every test shares: its own project folder, the real photos when they are there, whole commands by subprocess."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The suite repeats itself: a red run is the change's doing. `HYPOTHESIS_PROFILE=explore` looks for new examples.
SHARED_HOUSE = [hypothesis.HealthCheck.function_scoped_fixture]  # examples may share one folder: they overwrite
hypothesis.settings.register_profile("repeat", derandomize=True, deadline=None, suppress_health_check=SHARED_HOUSE)
hypothesis.settings.register_profile("explore", max_examples=2000, deadline=None, suppress_health_check=SHARED_HOUSE)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"


LONGEST = ("test_tour", "test_resume", "test_scale", "test_report")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin the longest files first, or a worker ends alone with one of them."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


def _real(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the real data set '{name}' in {SHARED}, which is not shipped with the repository")
    return SHARED / name


@pytest.fixture(scope="session")
def grocery15() -> Path:
    """Folder of the real grocery photos, or skip."""
    return _real("grocery15")


@pytest.fixture(scope="session")
def mousekp() -> Path:
    """Folder of the real mouse keypoints, or skip."""
    return _real("mousekp")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on stdout's last line."""
        assert self.code == 0, self.err
        found: dict[str, Any] = json.loads(self.out.strip().splitlines()[-1])
        return found


@dataclass(frozen=True)
class House:
    """A project folder of one's own: `mlruns/` and `data/` land in `home`."""

    home: Path

    def environment(self) -> dict[str, str]:
        """Environment of a command in this house."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        return kept | {
            "OCTOFOLD_HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "GIT_CEILING_DIRECTORIES": "",
        }

    def run(self, entry: str, *flags: object, cwd: Path | None = None, timeout: float = 600) -> Outcome:
        """Run ``python entrypoints/<entry>.py`` and return how it ended."""
        command = [sys.executable, str(REPOSITORY / "entrypoints" / f"{entry}.py"), *map(str, flags)]
        done = subprocess.run(
            command, cwd=cwd or self.home, env=self.environment(), capture_output=True, text=True, timeout=timeout
        )
        return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ready and empty MLflow database to copy, because making one takes seconds."""
    from octofold.track import tracking

    file = tmp_path_factory.mktemp("store") / "mlruns" / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        tracking.client()
    return file


def furnish(home: Path, empty_store: Path) -> House:
    """Put an empty store into a folder and make it a house."""
    (home / "mlruns").mkdir(parents=True)
    shutil.copy(empty_store, home / "mlruns" / "mlflow.db")
    return House(home)


@pytest.fixture
def house(tmp_path: Path, empty_store: Path) -> House:
    """A fresh house whose path contains a space."""
    return furnish(tmp_path / "a house", empty_store)


@pytest.fixture(scope="session")
def shared_house(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> House:
    """One house for the tests of a session that only read what others of their file built."""
    return furnish(tmp_path_factory.mktemp("shared") / "a house", empty_store)


@pytest.fixture
def refuses() -> Callable[[Outcome, str], None]:
    """Check that a command ended as a user's mistake should: exit 2, no traceback, and the words that help."""

    def check(outcome: Outcome, words: str) -> None:
        assert outcome.code == 2, f"exit {outcome.code}\n{outcome.err}"
        assert "Traceback" not in outcome.err
        assert words in outcome.err, outcome.err

    return check


@pytest.fixture
def mlruns(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The `mlruns/` of a fresh house, as the store of this process."""
    from octofold.track import tracking

    folder = furnish(tmp_path / "a house", empty_store).home / "mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setattr(tracking, "_SPOOL", folder / "spool")
    return folder
