"""The place of studies: a database of their own, never the one that MLflow keeps its runs in."""

import os
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool

from octofold.errors import UserError
from octofold.files import ROOT
from octofold.track import store


def address(given: str = "") -> str:
    """Return the storage's URL: the one given, ``OCTOFOLD_STORAGE``, or sqlite in the project's ``mlruns/``.

    Raises:
        UserError: it is MLflow's own database.
    """
    url = given or os.environ.get("OCTOFOLD_STORAGE") or f"sqlite:///{ROOT / 'mlruns' / 'optuna.db'}"
    if same_database(url, store.uri()):
        raise taken()
    return url


def taken() -> UserError:
    """Return the refusal of MLflow's database: both keep their schema's version in one table of the same name."""
    return UserError(
        "storage", expected="a database of its own", got="the one that MLflow keeps its runs in",
        fix="createdb studies, and postgresql://…/studies as --storage or OCTOFOLD_STORAGE",
    )  # fmt: skip


def same_database(one: str, other: str) -> bool:
    """Tell whether two URLs name one database, by whatever driver and user."""
    try:
        first, second = make_url(one), make_url(other)
    except ArgumentError:
        return False
    kind = first.get_backend_name()
    if kind == second.get_backend_name() == "sqlite" and first.database and second.database:
        return Path(first.database).resolve() == Path(second.database).resolve()
    parts = ("host", "port", "database")
    return kind == second.get_backend_name() and all(getattr(first, part) == getattr(second, part) for part in parts)


def has_runs(address: URL, engine: dict[str, Any]) -> bool:
    """Tell whether a database holds MLflow's tables."""
    made = create_engine(address, poolclass=NullPool, **engine)
    return inspect(made).has_table("experiments")
