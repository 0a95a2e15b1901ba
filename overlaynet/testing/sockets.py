"""What becomes of the sockets of one address in this process, without its leave: packets are kept from them, or they vanish.

The hosts of a test share this process, and are told apart by their loopback addresses. No root is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
# Classic BPF (linux/filter.h): load a word, return a constant, jump if equal. Offsets from SKF_NET_OFF on are those of
# the IP header, wherever the socket's own data begins.
_LOAD, _RETURN, _JUMP_IF_EQUAL = 0x20, 0x06, 0x15
_IPV4_SOURCE = 0xFFF00000 + 12
_WHOLE_PACKET, _NOTHING = 0xFFFFFFFF, 0


def block(address: IPv4Address, senders: Collection[IPv4Address]) -> None:
    """Have the kernel drop what comes from ``senders`` for any socket that is bound to ``address`` now.

    Nobody is told: datagrams are lost, connections hang until the senders are let through again. What is accepted by a socket
    that listens is blocked with it. Each call replaces what the last one has asked for.

    :param senders: at most 200.
    """
    if len(senders) > 200:
        raise ValueError(f"at most 200 senders can be blocked, not {len(senders)}")
    # Each comparison jumps over those that are left, and the RETURN behind them, to the last instruction.
    jumps = [(_JUMP_IF_EQUAL, len(senders) - n, 0, int(sender)) for n, sender in enumerate(senders)]
    code = [(_LOAD, 0, 0, _IPV4_SOURCE), *jumps, (_RETURN, 0, 0, _WHOLE_PACKET), (_RETURN, 0, 0, _NOTHING)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in code))
    attached = struct.pack("HP", len(code), ctypes.addressof(program))
    for _, bound in _sockets_of(address):
        if senders:
            bound.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)
        else:
            with contextlib.suppress(FileNotFoundError):  # it has none
                bound.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def take_away(address: IPv4Address) -> None:
    """Close all sockets that are bound to ``address``, as the kernel does when a process is killed.

    Their descriptors stay open, and lead to a socket that is connected to nothing, until whoever owns them closes them.
    """
    for descriptor, bound in _sockets_of(address):
        with socket.socket(socket.AF_UNIX, bound.type) as dead:
            dead.setblocking(False)
            os.dup2(dead.fileno(), descriptor, inheritable=False)


def _sockets_of(address: IPv4Address) -> Iterator[tuple[int, socket.socket]]:
    """The descriptors of this process's sockets with this address at their own end, each with a socket object to use now."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            copy = os.dup(descriptor)
        except OSError:
            continue  # closed meanwhile; that of the listing itself, too
        with socket.socket(fileno=copy) as bound:
            if bound.family == socket.AF_INET and bound.getsockname()[0] == str(address):
                yield descriptor, bound
