"""Logging that tells the story of the node: for people on a terminal, or one JSON object a line for machines.

A record's message is a short phrase that never varies ("lease acquired"); what varies goes into fields::

    log.info("lease acquired", extra=fields(subnet=lease.subnets, ttl=lease.ttl))
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any, TextIO

_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31m",
}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


def fields(**values: object) -> Mapping[str, object]:
    """What varies between two records of the same message, for ``extra=``."""
    return {"fields": values}


def configure(level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:
    """Send all records of ``level`` and above to ``stream`` (standard error by default). Idempotent.

    :param level: ``debug``, ``info``, ``warning`` or ``error``.
    :param format: ``text`` or ``json``.
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter() if format == "json" else TextFormatter(colour=stream.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # What libraries say below a warning is not part of the node's story.
    for library in ("urllib3", "asyncio", "pyroute2"):
        logging.getLogger(library).setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """``12:30:01 lease acquired  subnet=10.244.1.0/24 ttl=86400``; the level is shown when it is not ``info``."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        values = " ".join(f"{name}={_show(value)}" for name, value in _fields(record).items())
        message = f"{level}{record.getMessage()}"
        if self._colour:
            time, values = f"{_DIM}{time}{_RESET}", f"{_DIM}{values}{_RESET}" if values else ""
            message = f"{_COLOURS.get(record.levelno, '')}{message}{_RESET}"
        line = f"{time} {message}" + (f"  {values}" if values else "")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JSONFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        content: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _fields(record).items():
            content[f"field_{name}" if name in content else name] = value
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str, ensure_ascii=False)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    values: Mapping[str, Any] = getattr(record, "fields", {})
    return values


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c.isspace() or c in '"=' for c in text) else text
