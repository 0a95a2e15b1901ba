"""What this node chooses for itself: which engine carries the packets, in how many threads, with which offloads."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import attrs

from overlaynet.backends.udp.engine import Engine, PeerTable, Queue
from overlaynet.backends.udp.python_engine import PythonEngine
from overlaynet.errors import BackendError
from overlaynet.logs import fields

log = logging.getLogger(__name__)

_MOST_THREADS_BY_ITSELF = 4


@attrs.frozen
class EngineChoice:
    """How engines are made on this node."""

    make: Callable[[Sequence[Queue], int, PeerTable], Engine]
    """From queues, no more than ``threads``; the device's MTU in bytes; and the first table."""
    threads: int
    """How many queues, each with a thread, an engine is to have."""
    offload_header: bool
    """Whether the engine can do with the header of ``IFF_VNET_HDR`` before each packet of the device."""
    gro: bool | None = None
    """Whether the device is to join what is written to it; ``None`` for an engine that does so itself."""


def threads_for(cpus: int) -> int:
    """How many threads carry packets by default, on so many CPUs.

    A thread keeps about as much of a second CPU busy, with whoever sends and receives, and with what the kernel does in
    interrupts: so half of the CPUs. What comes from one host is one thread's business, which fills several Gbit/s; more than
    four pay only where as many hosts are busy at once, and cost a megabyte of buffers each, and eight for each socket.
    """
    return max(1, min(cpus // 2, _MOST_THREADS_BY_ITSELF))


def choose(engine: str, offload: str, threads: str) -> EngineChoice:
    """The choice that the settings ``--udp-engine``, ``--udp-offload`` and ``--udp-threads`` stand for.

    :raises BackendError: if the native engine is asked for, and was not built.
    """
    with_offload = offload != "off"

    def make_python(queues: Sequence[Queue], mtu: int, table: PeerTable) -> Engine:
        ((tun, sockets),) = queues
        return PythonEngine(tun, sockets, mtu, table, offload=with_offload)

    python = EngineChoice(make_python, threads=1, offload_header=False, gro=with_offload)
    if engine == "python":
        return _with_one_thread(python, threads)
    try:
        from overlaynet.backends.udp.native_engine import NativeEngine  # noqa: PLC0415 - it may be missing
    except ImportError as error:
        if engine == "native":
            raise BackendError(
                f"the native packet engine is not there ({error}); install overlaynet where there is a C compiler, "
                f"or choose --udp-engine python"
            ) from error
        log.info("native packet engine not built", extra=fields(reason=error))
        return _with_one_thread(python, threads)

    def make_native(queues: Sequence[Queue], mtu: int, table: PeerTable) -> Engine:
        (tun, sockets), *more = queues
        return NativeEngine(tun, sockets, mtu, table, more_queues=more, offload=with_offload)

    count = threads_for(len(os.sched_getaffinity(0))) if threads == "auto" else int(threads)
    return EngineChoice(make_native, count, offload_header=with_offload)


def _with_one_thread(python: EngineChoice, threads: str) -> EngineChoice:
    if threads not in ("auto", "1"):
        log.warning(
            "the Python engine has one thread", extra=fields(wanted=threads, hint="more are for --udp-engine native")
        )
    return python
