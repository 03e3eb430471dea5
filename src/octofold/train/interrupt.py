"""Interruptions: Ctrl-C, a termination signal and a file called `stop` all end a training between two steps."""

import logging
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

log = logging.getLogger("octofold")


class StopRequest:
    """While open, a first Ctrl-C or SIGTERM is only remembered; a second one interrupts at once.

    A file called ``stop`` in one of `folders` asks for the same; it is removed once it is heeded, so that the same
    command goes on.
    """

    def __init__(self, *folders: Path) -> None:
        self.files = [folder / "stop" for folder in folders]
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("stopping after this step (once more to stop at once)")

    def is_set(self) -> bool:
        """Whether to stop before the next step."""
        found = [file for file in self.files if file.exists()]
        for file in found:
            file.unlink(missing_ok=True)
        self.asked = self.asked or bool(found)
        return self.asked


def clear(folders: Sequence[Path]) -> None:
    """Forget stop files that were left before the training began."""
    for folder in folders:
        (folder / "stop").unlink(missing_ok=True)
