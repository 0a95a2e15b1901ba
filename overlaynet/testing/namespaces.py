"""Network namespaces for tests and for the demonstration: whole hosts, as far as the network is concerned.

Everything here needs Linux and root; :func:`requirements` says what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, ParamSpec, Self, TypeVar

from overlaynet.errors import OverlaynetError
from overlaynet.testing._processes import ProcessStart

P = ParamSpec("P")
T = TypeVar("T")

DIRECTORY = Path("/run/netns")
"""Where ``ip netns`` keeps the names of namespaces."""

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21}
_COMMANDS = {"ip": "iproute2", "ping": "iputils-ping"}
_CLONE_NEWNET = 0x40000000
_TUNGETFEATURES = 0x800454CF
_counter = itertools.count(1)


class NamespaceError(OverlaynetError):
    """A namespace cannot be made or entered, or a command inside of it failed."""


class NetworkNamespace:
    """A named network namespace, as ``ip netns`` makes them; its loopback interface is down.

    It exists from construction until :meth:`close`, which leaving the ``with`` block does.

    :param name: the full name; by default a unique one that ends in ``label``.
    :param label: what the namespace stands for, such as ``host-a``.
    :raises NamespaceError: if it cannot be made, for instance because the name is taken.
    """

    def __init__(self, name: str | None = None, *, label: str = "namespace") -> None:
        self.name = name if name is not None else f"overlaynet-{os.getpid()}-{next(_counter)}-{label}"
        self._starts: list[ProcessStart] = []
        self._closed = False
        _execute(["ip", "netns", "add", self.name])

    def __repr__(self) -> str:
        return f"<NetworkNamespace {self.name}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file that stands for the namespace."""
        return DIRECTORY / self.name

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread of its own that has entered the namespace; return its result, raise its error.

        Sockets and processes that it makes belong to the namespace. If the caller is interrupted, the thread is
        left to itself. Inside of it, look at ``/proc/thread-self/net`` rather than ``/proc/net``, which shows the
        namespace of the process's first thread.
        """
        return run_inside(self.name, function, *args, **kwargs)

    def run_async(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like :meth:`run` for a coroutine function, which gets an event loop of its own inside that thread.

        If the caller is interrupted, the coroutine is cancelled, and its end awaited for 10 seconds at most.
        """
        started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = []
        interrupted = threading.Event()

        async def work() -> T:
            task = asyncio.current_task()
            assert task is not None  # for the type checker: a coroutine that runs is a task's
            started.append((asyncio.get_running_loop(), task))
            if interrupted.is_set():
                raise asyncio.CancelledError
            return await function(*args, **kwargs)

        call = _Call(self.path, lambda: asyncio.run(work()))
        try:
            return call.wait()
        except BaseException:
            interrupted.set()
            with contextlib.suppress(RuntimeError):  # the loop is closed: the coroutine ended by itself
                for loop, task in started:
                    loop.call_soon_threadsafe(task.cancel)
            call.ended.wait(10)
            raise

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Move the calling thread into the namespace for a ``with`` block: sockets that it makes there belong to it.

        Threads that it starts meanwhile are inside, too, and stay there.

        :raises NamespaceError: if it cannot be entered.
        """
        with open("/proc/thread-self/ns/net", "rb") as home:
            _enter(self.path)
            try:
                yield
            finally:
                _set_namespace(home.fileno())

    def execute(
        self, command: Sequence[str | Path], *, check: bool = True, timeout: float = 60, input: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end inside the namespace and return what it wrote, as text.

        :param timeout: seconds after which the command is killed.
        :raises NamespaceError: if it was killed, or with ``check``, if its exit status is not 0.
        """
        return _execute(self._inside(command), check=check, timeout=timeout, input=input, shown=command)

    def popen(
        self,
        command: Sequence[str | Path],
        *,
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command inside the namespace, in a session of its own: a terminal's Ctrl-C does not reach it.

        Its process id is that of the command. :meth:`close` kills it, with all that it started, if it still runs.
        """
        inside = self._inside(command)
        start = ProcessStart(
            lambda: subprocess.Popen(  # noqa: S603
                inside, stdin=stdin, stdout=stdout, stderr=stderr, env=env, start_new_session=True
            )
        )
        self._starts.append(start)
        return start.wait()

    def socket(self, family: int = socket.AF_INET, type: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
        """A socket that belongs to the namespace, wherever it is used. The caller closes it."""
        return self.run(socket.socket, family, type, proto)

    def ip(self, *commands: str) -> None:
        """Run ``ip`` commands inside the namespace, such as ``link set lo up``, in one batch that ends with the first error.

        :raises NamespaceError: if one fails.
        """
        _execute(["ip", "-n", self.name, "-batch", "-"], input="\n".join(commands) + "\n", shown=["ip", *commands])

    def ip_json(self, *arguments: str) -> list[dict[str, Any]]:
        """What ``ip -details -json`` tells inside the namespace, for instance of ``route show``."""
        output = _execute(["ip", "-n", self.name, "-details", "-json", *arguments]).stdout
        content: list[dict[str, Any]] = json.loads(output or "[]")
        return content

    def set_sysctl(self, name: str, value: object) -> None:
        """Set a kernel parameter of the namespace, such as ``net.ipv4.ip_forward``.

        :raises NamespaceError: if the kernel refuses, or has no such parameter.
        """
        path = Path("/proc/sys", *name.split("."))
        try:
            self.run(path.write_text, str(value))
        except OSError as error:
            raise NamespaceError(f"the kernel parameter {name} cannot be set: {error.strerror}") from error

    def processes(self) -> list[int]:
        """Ids of all processes inside the namespace, whoever started them."""
        return process_ids(self.name)

    def close(self) -> None:
        """Kill what was started with :meth:`popen` and still runs, and delete the namespace. Idempotent.

        The kernel takes the namespace's interfaces away once nothing (a socket, a foreign process) is left in it.
        """
        if self._closed:
            return
        started = [process for start in self._starts if (process := start.give_up()) is not None]
        for process in started:
            process.kill()
        sessions = {process.pid for process in started}
        for identifier in self.processes():
            # What they started: it may outlive them. Not by os.killpg: the number may be another group's by now.
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(identifier) in sessions:
                    os.kill(identifier, signal.SIGKILL)
        for process in started:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        delete(self.name)
        self._closed = True

    def _inside(self, command: Sequence[str | Path]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *map(str, command)]


def run_inside(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like :meth:`NetworkNamespace.run`, for a namespace that somebody else has made."""
    return _Call(DIRECTORY / name, lambda: function(*args, **kwargs)).wait()


def requirements() -> list[str]:
    """What this machine lacks for namespaces, TUN devices and captures: clauses for a sentence, empty if all is there."""
    if sys.platform != "linux":
        return [f"it needs Linux, and this is {sys.platform}"]
    import fcntl  # noqa: PLC0415 - not to be had elsewhere

    missing = []
    lacking = [name for name, bit in _CAPABILITIES.items() if not _effective_capabilities() >> bit & 1]
    if lacking and os.geteuid() != 0:
        missing.append("it needs root (try sudo)")
    elif lacking:
        missing.append(f"root lacks {', '.join(lacking)} here (start the container with --privileged)")
    tun = Path("/dev/net/tun")
    if not tun.exists():
        missing.append(f"{tun} is missing (try modprobe tun, or give the container that device)")
    elif not lacking:
        try:
            with tun.open("r+b", buffering=0) as file:
                fcntl.ioctl(file, _TUNGETFEATURES, bytes(4))
        except OSError as error:
            missing.append(f"{tun} cannot be used: {error.strerror} (try modprobe tun)")
    for command, package in _COMMANDS.items():
        if shutil.which(command) is None:
            missing.append(f"the command {command} is missing (install {package})")
    return missing


def names() -> list[str]:
    """The names of all network namespaces, sorted."""
    try:
        return sorted(os.listdir(DIRECTORY))
    except FileNotFoundError:
        return []


def process_ids(name: str) -> list[int]:
    """Ids of the processes inside a named namespace; none if there is no such namespace."""
    return [int(line) for line in _execute(["ip", "netns", "pids", name], check=False).stdout.split()]


def delete(name: str) -> None:
    """Delete a namespace by name; nothing happens if there is none. What runs inside keeps it, without a name.

    :raises NamespaceError: if it cannot be deleted.
    """
    result = _execute(["ip", "netns", "delete", name], check=False)
    if result.returncode != 0 and (DIRECTORY / name).exists():
        raise NamespaceError(f"the network namespace {name} cannot be deleted: {_last_line(result)}")


class _Call(Generic[T]):
    """A function that runs in a thread inside a namespace."""

    def __init__(self, path: Path, function: Callable[[], T]) -> None:
        self._path = path
        self._function = function
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.ended = threading.Event()

    def _work(self) -> None:
        try:
            _enter(self._path)
            self._results.append(self._function())
        except BaseException as error:
            self._error = error
        finally:
            self.ended.set()

    def wait(self) -> T:
        thread = threading.Thread(target=self._work, name=f"in {self._path.name}", daemon=True)
        thread.start()
        thread.join()
        if self._error is None:
            return self._results[0]
        try:
            raise self._error
        finally:
            self._error = None  # or the error's traceback and this object keep each other alive


def _enter(path: Path) -> None:
    """Move the calling thread, and no other, into the namespace."""
    try:
        with path.open("rb") as file:
            _set_namespace(file.fileno())
    except OSError as error:
        raise NamespaceError(f"the network namespace {path.name} cannot be entered: {error.strerror}") from error


def _set_namespace(descriptor: int) -> None:
    if sys.version_info >= (3, 12):
        os.setns(descriptor, _CLONE_NEWNET)
    else:
        library = ctypes.CDLL(None, use_errno=True)
        if library.setns(descriptor, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _execute(
    command: Sequence[str],
    *,
    check: bool = True,
    timeout: float = 60,
    input: str = "",
    shown: Sequence[str | Path] | None = None,
) -> subprocess.CompletedProcess[str]:
    text = " ".join(map(str, command if shown is None else shown))
    pipe = subprocess.PIPE
    start = ProcessStart(
        lambda: subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)  # noqa: S603
    )
    try:
        process = start.wait()
        output, errors = process.communicate(input, timeout)
    except FileNotFoundError as error:
        raise NamespaceError(f"the command {command[0]} is missing: install {_COMMANDS[command[0]]}") from error
    except subprocess.TimeoutExpired as error:
        raise NamespaceError(f"`{text}` did not end within {timeout:g} s and was killed") from error
    finally:
        begun = start.give_up()
        if begun is not None:
            with begun:  # closes the pipes, and waits for its end
                begun.kill()
    result = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check and result.returncode != 0:
        raise NamespaceError(f"`{text}` failed with exit status {result.returncode}: {_last_line(result)}")
    return result


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    # `ip -batch` tells the reason first and then only which line it was.
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("Command failed")]
    return lines[-1].strip() if lines else "it said nothing"
