"""Registered models and their versions: MLflow's registry calls, with its refusals put in the user's words."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from octofold.errors import UserError, redact
from octofold.track.outage import error_code, patiently
from octofold.track.store import pages, quoted, uri
from octofold.track.tracking import client

_AT_ONCE = 100  # names in one filter: through a server it travels in the URL


def registered_models(prefix: str) -> list[Any]:
    """Return the registered models whose name begins so, with aliases, tags and the highest version of each stage."""
    filters = f"name LIKE {quoted(prefix + '%')}"  # `_` is a wildcard in LIKE, so look again
    found = patiently(
        lambda: pages(lambda token: client().search_registered_models(filters, max_results=1000, page_token=token))
    )
    return [model for model in found if model.name.startswith(prefix)]


def versions_of(names: Sequence[str], also: str = "") -> list[Any]:
    """Return every version of the registered models `names`; `also` is one more MLflow filter."""
    found: list[Any] = []
    for start in range(0, len(names), _AT_ONCE):
        listed = ", ".join(map(quoted, names[start : start + _AT_ONCE]))
        filters = f"name IN ({listed})" + (f" and {also}" if also else "")
        found += patiently(partial(_search, filters))
    return found


def _search(filters: str) -> list[Any]:
    return pages(lambda token: client().search_model_versions(filters, max_results=10000, page_token=token))


def existing_version(name: str, version: int) -> Any:
    """Return a registered version.

    Raises:
        UserError: it, or its registered model, was deleted.
    """
    return _asked(lambda: client().get_model_version(name, str(version)), f"{name} version {version}")


def is_there(named: str, run_id: str) -> bool:
    """Tell whether ``<registered name>/<version>`` of this run was not deleted (another may bear its number since)."""
    name, _, number = named.rpartition("/")
    return any(int(version.version) == int(number) for version in versions_of([name], f"run_id = '{run_id}'"))


def registered_model(name: str) -> Any:
    """Return a registered model with its aliases and tags.

    Raises:
        UserError: it was deleted.
    """
    return _asked(lambda: client().get_registered_model(name), f"registered model '{name}'")


def ensure_registered(name: str, tags: Mapping[str, str]) -> None:
    """Make a registered model unless it is there; two processes may both try."""
    try:
        patiently(lambda: client().create_registered_model(name, tags=dict(tags)))
    except Exception as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":
            raise


def has_stages() -> bool:
    """Tell whether this MLflow still has its legacy stages."""
    return hasattr(client(), "transition_model_version_stage")


def set_alias(name: str, alias: str, version: int | None) -> None:
    """Point an alias at a version, or remove it (None)."""
    if version is None:
        _asked(lambda: client().delete_registered_model_alias(name, alias), f"alias {alias} of {name}")
    else:
        _asked(lambda: client().set_registered_model_alias(name, alias, str(version)), f"{name} version {version}")


def set_stage(name: str, version: int, stage: str) -> None:
    """Put a version in a legacy stage (``None``, ``Staging``, ``Production``, ``Archived``), and no other with it."""
    if not has_stages():
        return

    def move() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated: that is why the alias is the truth
            client().transition_model_version_stage(name, str(version), stage, archive_existing_versions=False)

    _asked(move, f"{name} version {version}")


def set_model_tag(name: str, key: str, value: str) -> None:
    """Tag a registered model."""
    _asked(lambda: client().set_registered_model_tag(name, key, value), f"registered model '{name}'")


def set_version_tags(name: str, version: int, tags: Mapping[str, str]) -> None:
    """Tag a version."""
    for key, value in tags.items():
        _asked(
            lambda key=key, value=value: client().set_model_version_tag(name, str(version), key, value),
            f"{name} version {version}",
        )


def _asked(ask: Any, what: str) -> Any:
    try:
        return patiently(ask)
    except Exception as error:
        if error_code(error) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UserError(
            what,
            expected=f"in the registry {redact(uri())}",
            got=redact(str(error)).splitlines()[0][:200],
            fix="it was deleted; promote another version, or train and promote again",
        ) from error
