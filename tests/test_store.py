"""Where the store is, and what a person is told when nobody answers there."""

from pathlib import Path

import pytest

from octofold.errors import UserError, redact
from octofold.files import ROOT
from octofold.track import store


@pytest.fixture(autouse=True)
def _no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_default_is_sqlite_in_mlruns() -> None:
    assert store.uri() == f"sqlite:///{ROOT / 'mlruns' / 'mlflow.db'}"


def test_relative_path_is_the_projects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlruns/other.db")
    assert store.uri() == f"sqlite:///{ROOT / 'mlruns' / 'other.db'}"
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "other.db").touch()
    assert store.database(store.uri()) == tmp_path / "mlruns" / "other.db"


def test_artifacts_stand_beside_the_database_even_through_the_symlink(tmp_path: Path) -> None:
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlflow.db").symlink_to(tmp_path / "mlruns" / "mlflow.db")
    root = (tmp_path / "mlruns" / "artifacts" / "digits").as_uri()
    assert store.artifact_root(f"sqlite:///{tmp_path}/mlflow.db", "digits") == root
    assert store.artifact_root(f"sqlite:///{tmp_path}/mlruns/mlflow.db", "digits") == root
    assert store.artifact_root("http://server:5000", "digits") is None


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9", "postgresql://me:hidden@127.0.0.1:9/db", "https://no.invalid"]
)
def test_nobody_there_is_told_at_once(address: str) -> None:
    with pytest.raises(UserError, match="a tracking server that answers") as error:
        store.check_reachable(address)
    assert "hidden" not in str(error.value)


def test_a_slash_in_a_password_is_told_without_it() -> None:
    with pytest.raises(UserError, match="%2F") as error:
        store.check_reachable("postgresql://me:hid/den@db/x")
    assert "hid" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:secret@db/x", "postgresql://me:***@db/x"),
        ("postgresql+psycopg://me:s3%40t@db:5432/x", "postgresql+psycopg://me:***@db:5432/x"),
        ("https://:tok@host and http://a:b@c", "https://:***@host and http://a:***@c"),
        ("http://127.0.0.1:5000/#/models/x@staging", "http://127.0.0.1:5000/#/models/x@staging"),
        ("models:/x@production", "models:/x@production"),
        ("postgresql://me:p/q@db/x", "postgresql://me:***@db/x"),
        ("postgresql://me:p@q:r@db/x and a@b", "postgresql://me:***@db/x and a@b"),
        ("http://127.0.0.1:5000/models/x@staging", "http://127.0.0.1:5000/models/x@staging"),
        ('{"uri":"http://h:5000","to":"a@b"}', '{"uri":"http://h:5000","to":"a@b"}'),
    ],
)
def test_redact_urls(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_redact_values_of_secret_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "tiger-1234")
    assert redact("Bearer tiger-1234") == "Bearer ***"
    assert "tiger" not in str(UserError("server", got="refused tiger-1234"))


def test_a_run_opened_in_the_callers_folder_is_adopted_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    assert store.adopt() == "abc"
    assert store.adopt() is None
    assert not caplog.records  # the project's own store: nothing to say
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert store.adopt() == "abc"
    assert "make ui" in caplog.text
