"""Commands that an operator writes down: read without a shell, run with a time limit, ended with all their children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import tempfile
from collections.abc import Mapping
from typing import IO

import attrs

LONGEST_OUTPUT = 64 * 1024
"""Bytes of each output that are read; what is beyond is dropped."""
GRACE = 2.0
"""Seconds between asking a command to end and killing it."""

_OPERATORS = frozenset("|&;<>()`")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


class CommandFailed(Exception):
    """A command could not be run, ended with an error, or took too long; the message says which, and what it wrote."""


@attrs.frozen
class Output:
    """What a command wrote, without white space at either end."""

    stdout: str
    stderr: str


def check_command(text: str) -> str | None:
    """A command and its arguments, in shell quoting but run without a shell."""
    if "\0" in text:
        return "must not contain a NUL character"
    try:
        words = shlex.split(text)
    except ValueError as error:
        return f"cannot be split into arguments: {error}"
    if text.strip() and not words[0]:
        return "must begin with the program to run"
    operator = _shell_operator(text)
    if operator is not None:
        return (
            f"has an unquoted {operator!r}, but is run without a shell; put it into a script, quote it, "
            f"or write sh -c '...'"
        )
    return None


def expand(text: str, variables: Mapping[str, str]) -> list[str]:
    """The command's arguments. ``$NAME`` and ``${NAME}`` become the variable's value, within one argument.

    What is no variable of ours stays as it is.
    """

    def value(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[2], match[0])

    return [_VARIABLE.sub(value, word) for word in shlex.split(text)]


async def run(arguments: list[str], variables: Mapping[str, str], limit: float, stdin: str = "") -> Output:
    """Run a command to its end.

    Its environment is this process's, but for overlaynet's own settings (some are secret), with ``variables``. It has a
    session of its own; when it takes too long, or this call is cancelled, it and all that it started are ended. What a
    command that ends well leaves running in the background is left alone.

    :param limit: seconds that it may take.
    :raises CommandFailed: if it cannot be run, ends with another status than 0, or takes too long.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OVERLAYNET_")}
    try:
        # Files, not pipes: a pipe would stay open as long as anything that the command leaves in the background.
        with contextlib.ExitStack() as files:
            given, out, err = (files.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            given.write(stdin.encode())
            given.seek(0)
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=given,
                stdout=out,
                stderr=err,
                env={**environment, **variables},
                start_new_session=True,
            )
            try:
                async with asyncio.timeout(limit):
                    status = await process.wait()
            except TimeoutError:
                await _end(process)
                raise CommandFailed(f"{arguments[0]!r} took more than {limit:g} seconds{_told(err)}") from None
            except BaseException:
                await asyncio.shield(_end(process))
                raise
            if status != 0:
                how = f"was ended by {_signal_name(-status)}" if status < 0 else f"ended with exit status {status}"
                raise CommandFailed(f"{arguments[0]!r} {how}{_told(err)}")
            return Output(_read(out), _read(err))
    except OSError as error:  # of the program, or of the files: a full disk, too many of them
        raise CommandFailed(f"{arguments[0]!r} cannot be run: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise CommandFailed(
            f"{arguments[0]!r} cannot be run: its standard input is to have {error.object[error.start]!r}, "
            f"which is no character"
        ) from error


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the command's session: ask first, then kill what is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE):
            await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _told(err: IO[bytes]) -> str:
    text = _read(err)
    return f": {text}" if text else ", and said nothing"


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(LONGEST_OUTPUT).decode(errors="replace").strip()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _shell_operator(text: str) -> str | None:
    """The first character that a shell would take for an operator: outside of quotes, and not behind a backslash."""
    quote, escaped = None, False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\" and quote != "'":
            escaped = True
        elif quote is not None:
            quote = None if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _OPERATORS:
            return character
    return None
