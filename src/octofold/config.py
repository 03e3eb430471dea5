"""Configuration: typed sections, YAML recipes, dotted flags, and the frame every entry point runs in.

Strength, weakest first: schema defaults, ``--config`` YAML, flags. Unknown keys are refused and the valid
ones listed. A flag's text is coerced by its field's type; only ``[…]``, ``{…}`` and ``null`` are read as JSON,
because YAML would turn ``1e-3`` into a string and ``no`` into False.
"""

import json
import logging
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from octofold.errors import UserError, blank_logs, redact
from octofold.files import existing

log = logging.getLogger("octofold")


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error. Describe every field with `Field(description=…)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


S = TypeVar("S", bound=Section)


def load(schema: type[S], argv: Sequence[str]) -> S:
    """Build a `schema` from flags and the YAML that ``--config`` names.

    Args:
        schema: the entry point's section; its field `config` (if any) takes the YAML's path.
        argv: flags as typed, ``--optim.lr 3e-4`` or ``--optim.lr=3e-4``; a bare ``--flag`` means true;
            an empty value means "not given", which is what MLflow passes for an empty default.

    Raises:
        UserError: an unknown key, a value out of range, a YAML that is not a mapping.
    """
    flags = _parse(argv)
    source = flags.get("config")
    values = read_yaml(existing(source, "a recipe (YAML)")) if source and "config" in schema.model_fields else {}
    for key, text in flags.items():
        _put(values, key.split("."), _literal(text, _field_at(schema, key)), key)
    return build(schema, values, source or "command line", flags)


def build(schema: type[S], values: dict[str, Any], source: object, flags: dict[str, str] | None = None) -> S:
    """Validate plain `values` as a `schema`, naming `source` and the valid keys in any error.

    Raises:
        UserError: a key or value the schema refuses.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_explain(schema, problem, flags or {}) for problem in error.errors()]
        raise UserError(f"{source}:\n  " + "\n  ".join(lines), fix="see --help for every field") from error


def dump(section: Section) -> str:
    """Return the section as YAML that `load` reads back to an equal section."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(section: Section) -> dict[str, Any]:
    """Return ``{"optim.lr": 3e-4, …}``: every leaf under its dotted name, for params and for comparing."""
    found: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{name}.{key}" if name else str(key))
        else:
            found[name] = value

    walk(section.model_dump(mode="json"), "")
    return found


def run_main(schema: type[S], run: Callable[[S], dict[str, Any]], argv: Sequence[str] | None = None) -> None:
    """Run one entry point: parse, call `run`, print its result as one JSON line, end with the right exit code.

    Progress and logs go to stderr; stdout's last line is the JSON. Exit codes: 0 done, 2 the user's mistake
    (no traceback), 130 interrupted, 1 a defect.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    program = Path(sys.argv[0]).name
    if {"-h", "--help"} & set(argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is no defect
        print(help_text(schema, program, sys.modules["__main__"].__doc__ or schema.__doc__ or ""))
        raise SystemExit(0)
    blank_logs()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, _interrupt)  # a stopped job leaves the same state as Ctrl-C
    try:
        result = run(load(schema, argv))
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception:  # a defect of ours; a library's words in it may show the address it was given
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        raise SystemExit(1) from None
    print(json.dumps(result, ensure_ascii=False, default=_plain), flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _plain(value: Any) -> Any:
    """JSON for what results hold: paths as text, numpy scalars as numbers."""
    return value.item() if hasattr(value, "item") else str(value)


def help_text(schema: type[Section], program: str, about: str) -> str:
    """Return the help page: what it does, then every field with type, default and description."""
    rows = list(_rows(schema, ""))
    width = min(34, max(len(name) for name, _, _ in rows))
    lines = [f"usage: {program} [--field value …]", "", about.strip(), "", "fields:"]
    for name, kind, text in rows:
        lines.append(f"  --{name:<{width}}  {kind}")
        lines.append(f"    {'':<{width}}  {text}".rstrip())
    return "\n".join(lines)


def _rows(schema: type[Section], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in schema.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None and not _is_optional(field.annotation):
            yield from _rows(inner, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"default: {_show(default)}"
        yield prefix + name, f"{_type_name(field.annotation)} ({shown})", field.description or ""


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return json.dumps(value.model_dump(mode="json")) if isinstance(value, BaseModel) else str(value) or "''"


def _type_name(kind: Any) -> str:
    if kind is None or kind is type(None):
        return "null"
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in get_args(kind))
    if str(get_origin(kind)) == "typing.Literal":
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple, dict):
        parts = ", ".join(_type_name(part) for part in get_args(kind) if part is not Ellipsis)
        return f"{get_origin(kind).__name__} of {parts}"
    if str(get_origin(kind)) == "typing.Annotated":
        return _type_name(get_args(kind)[0])
    return getattr(kind, "__name__", str(kind))


def _section_of(kind: Any) -> type[Section] | None:
    """The Section behind an annotation (``X`` or ``X | None``), if any."""
    for part in (kind, *get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else (kind,):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _is_optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _parse(argv: Sequence[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError("command line", expected="--field value", got=repr(word), fix="see --help")
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        name = name.replace("-", "_")
        if name in flags:
            raise UserError(f"--{name}", expected="one value", got=f"{flags[name]!r} and {text!r}")
        if text != "":
            flags[name] = text
    return flags


class _KeysOnce(yaml.SafeLoader):
    """Refuses a key given twice: YAML would keep the last and drop the others without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of settings; an empty file is an empty mapping.

    Raises:
        UserError: not YAML, a key given twice, or not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _KeysOnce)  # noqa: S506 - a safe loader
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(path, expected="valid YAML", got=str(error)) from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(path, expected="a mapping of settings (key: value)", got=type(values).__name__)
    return values


def _field_at(schema: type[Section], key: str) -> FieldInfo | None:
    names = key.split(".")
    for name in names[:-1]:
        inner = _section_of(schema.model_fields[name].annotation) if name in schema.model_fields else None
        if inner is None:
            return None
        schema = inner
    return schema.model_fields.get(names[-1])


def _literal(text: str, field: FieldInfo | None) -> Any:
    if text == "null":
        return None
    if text[:1] in "[{":
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text  # a folder may be called "[old]"; the schema decides
    wants_list = field is not None and any(
        get_origin(part) in (list, tuple) for part in (field.annotation, *get_args(field.annotation))
    )
    return [part.strip() for part in text.split(",")] if wants_list else text


def _put(values: dict[str, Any], names: list[str], value: Any, key: str) -> None:
    for name in names[:-1]:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise UserError(f"--{key}", expected=f"'{name}' to hold settings", got=f"{inner!r} from the recipe")
        values = inner
    values[names[-1]] = value


def _explain(schema: type[Section], problem: Any, flags: dict[str, str]) -> str:
    names = [str(part) for part in problem["loc"]]
    key = ".".join(names)
    origin = f"          (from --{key})" if key in flags else ""
    if problem["type"] == "extra_forbidden":
        parent: type[Section] | None = schema
        for name in names[:-1]:
            field = parent.model_fields.get(name) if parent else None
            parent = _section_of(field.annotation) if field else parent
        valid = ", ".join((parent or schema).model_fields)
        return f"{key}: no such setting. {'.'.join(names[:-1]) or 'Valid here'}: {valid}{origin}"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] == "missing" else f", got {_shorten(problem.get('input'))}"
    return f"{key + ': ' if key else ''}{message}{got}{origin}"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"


def environment() -> None:
    """Set what the libraries read at import time: no telemetry, no update check, `.env` for the rest."""
    from dotenv import load_dotenv

    from octofold.files import ROOT

    load_dotenv(ROOT / ".env")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
