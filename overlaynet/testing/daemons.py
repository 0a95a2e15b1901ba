"""Daemons as processes: started by somebody, watched through their log, stopped or killed."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from overlaynet.errors import OverlaynetError

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], seconds: float, what: str) -> T:
    """Ask again and again until the answer is true, and return it.

    :raises TimeoutError: if it was not within so many seconds; ``what`` says in the message what was waited for.
    """
    deadline = time.monotonic() + seconds
    while not (answer := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.02)
    return answer


class DaemonProcess:
    """An ``overlaynet run`` process, whose log is in JSON.

    :param label: of the host, for messages.
    :param process: the process, just started.
    :param log_file: where its standard output and standard error go.
    :param subnet_file: where it writes its subnet file.
    """

    def __init__(self, label: str, process: subprocess.Popen[bytes], log_file: Path, subnet_file: Path) -> None:
        self.label = label
        self.log_file = log_file
        self._process = process
        self._subnet_file = subnet_file

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """True until it has ended."""
        return self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """``None`` while it runs; negative if a signal ended it."""
        return self._process.poll()

    @property
    def log(self) -> str:
        """All that it has written, to standard output or standard error."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of its log: ``time``, ``level``, ``logger``, ``message`` and the fields of each."""
        records = []
        for line in self.log.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
        return records

    def log_lines(self) -> list[str]:
        """The lines of its log as a person reads them."""
        return [_readable(line) for line in self.log.splitlines()]

    def wait_for(self, message: str, seconds: float = 30) -> dict[str, Any]:
        """The first record with this message; waits until there is one.

        :raises OverlaynetError: if the process ends before that, or is still without after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while True:
            ended = not self.running  # asked first: what it wrote before its end is to be found
            found = next((record for record in self.records if record.get("message") == message), None)
            if found is not None:
                return found
            if ended:
                raise OverlaynetError(
                    f"overlaynet on {self.label} ended with exit status {self.exit_status}: {self.last_words(1)}"
                )
            if time.monotonic() > deadline:
                raise OverlaynetError(
                    f"overlaynet on {self.label} did not say {message!r} within {seconds:g} s: {self.last_words()}"
                )
            time.sleep(0.02)

    def wait_until_ready(self, seconds: float = 30) -> None:
        """Wait until it carries packets and has written the subnet file.

        :raises OverlaynetError: if it ends instead, or is not ready within so many seconds.
        """
        self.wait_for("ready", seconds)
        wait_until(self._subnet_file.exists, 5, str(self._subnet_file))

    def last_words(self, lines: int = 3) -> str:
        """The last lines of its log, for messages."""
        return " | ".join(self.log_lines()[-lines:]) or "it wrote nothing"

    def stop(self, seconds: float = 15) -> int:
        """End it as an operator would (SIGTERM) and return its exit status; at once if it has ended already.

        :raises OverlaynetError: if it still runs after so many seconds; it is killed then.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise OverlaynetError(
                f"overlaynet on {self.label} did not stop within {seconds:g} s: {self.last_words()}"
            ) from None

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        self._process.kill()
        self._process.wait()


def _readable(line: str) -> str:
    """A record of a log in JSON as one line of text; any other line as it is."""
    try:
        record = json.loads(line)
        when, level, message = (record.pop(name) for name in ("time", "level", "message"))
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
        return line
    values = " ".join(f"{name}={value}" for name, value in record.items() if name != "logger")
    return f"{str(when)[11:23]} {level}: {message}  {values}".rstrip()
