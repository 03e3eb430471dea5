"""The one error a user can cause: it says where, what was expected, what came, what to do. And one that nobody sees."""

import logging
import os
import re

_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|_KEY$", re.IGNORECASE)
# A password may hold a slash or an @; a port before a path that holds an @ is none.
_URL_PASSWORD = re.compile(r"""(\w://[^\s:/@]*):(?!\d{1,5}/)[^\s@"'<>]+@(?:[^\s@/"'<>]*@)*""")


def redact(text: str) -> str:
    """Blank secrets: passwords inside URLs, and the value of any environment variable named like a secret.

    Everything that leaves the process (params, tags, logged text, error messages) goes through here.
    """
    text = _URL_PASSWORD.sub(r"\1:***@", text)
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name) and not os.path.exists(value):
            text = text.replace(value, "***")
    return text


class _DiscreetRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return redact(super().getMessage())


def blank_logs() -> None:
    """From now on blank secrets in whatever this process logs, the libraries' own words too."""
    logging.setLogRecordFactory(_DiscreetRecord)


class UserError(ValueError):
    """A mistake the user can mend. Entry points print it without a traceback and exit 2.

    Args:
        where: the file, flag, table or registered model the trouble is in.
        expected: what would have been right.
        got: what was found instead.
        fix: the next thing to do, a command where there is one.
    """

    def __init__(self, where: object, *, expected: str = "", got: str = "", fix: str = "") -> None:
        lines = [str(where)]
        lines += [f"  expected: {expected}"] if expected else []
        lines += [f"  got:      {got}"] if got else []
        lines += [f"  do this:  {fix}"] if fix else []
        super().__init__(redact("\n".join(lines)))


class Handover(Exception):
    """What this process was doing is another command's by now: stop, and leave everything to that one."""


def known(kind: str, name: str, table: object) -> str:
    """Return `name` if it is a key of `table` (any container of names), else refuse it, listing the keys.

    Raises:
        UserError: `name` is not in `table`.
    """
    names = sorted(map(str, table))  # type: ignore[call-overload]
    if name not in names:
        raise UserError(f"{kind} '{name}'", expected=f"one of {', '.join(names)}", got=repr(name))
    return name


def preview(items: object, most: int = 5) -> str:
    """Show the first few of many things, and how many there are: ``a, b, c and 7 more``."""
    listed = [str(item) for item in items]  # type: ignore[attr-defined]
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")
