"""Many datagrams with one system call: sendmmsg(2), which Python's socket module does not have."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any


class IoVector(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Header(ctypes.Structure):
    """``struct msghdr``."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.c_void_p),
        ("vectors_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class Message(ctypes.Structure):
    """``struct mmsghdr``."""

    _fields_ = (("header", Header), ("sent", ctypes.c_uint))


_send = ctypes.CDLL(None, use_errno=True).sendmmsg


def send(descriptor: int, messages: ctypes.Array[Message], count: int) -> int:
    """Send the first so many messages; how many the kernel took. :raises OSError: if it took none."""
    done: int = _send(descriptor, messages, count, 0)
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return done


class Batch:
    """Datagrams for a connected socket, laid out once for the kernel, and sent as often as wanted."""

    def __init__(self, payloads: Sequence[bytes]) -> None:
        self.size = len(payloads)
        self._buffers: list[Any] = [ctypes.create_string_buffer(payload, max(1, len(payload))) for payload in payloads]
        self._vectors = (IoVector * self.size)(
            *(
                IoVector(ctypes.addressof(buffer), len(payload))
                for buffer, payload in zip(self._buffers, payloads, strict=True)
            )
        )
        self._messages = (Message * self.size)(
            *(Message(Header(vectors=ctypes.addressof(vector), vectors_length=1)) for vector in self._vectors)
        )

    def send(self, descriptor: int) -> int:
        """Send them; how many the kernel took. :raises OSError: if it took none."""
        return send(descriptor, self._messages, self.size)
