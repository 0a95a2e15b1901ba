"""etcd's JSON, read strictly: whatever arrives, the outcome is a value of ours or :exc:`OddReply`.

Numbers arrive as strings, members that have their default value do not arrive at all, keys and values are base64: that
is how protocol buffers are written as JSON.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

_MAX_LINE = 64 << 20
"""Bytes of one document of a watch. etcd sends a thousand events at most in one, 1.5 MiB at most in each."""

# The codes of gRPC, as etcd uses them; the names are those it writes into the reason of a cancelled watch.
CODES = {
    "Canceled": 1,
    "Unknown": 2,
    "InvalidArgument": 3,
    "DeadlineExceeded": 4,
    "NotFound": 5,
    "PermissionDenied": 7,
    "ResourceExhausted": 8,
    "FailedPrecondition": 9,
    "Aborted": 10,
    "OutOfRange": 11,
    "Unimplemented": 12,
    "Internal": 13,
    "Unavailable": 14,
    "Unauthenticated": 16,
}


class OddReply(Exception):
    """The answer is not one that etcd gives; the message says what is odd about it."""


@attrs.frozen
class Header:
    """Which cluster answered, and its revision and term at that moment."""

    cluster: int
    revision: int
    term: int = attrs.field(default=0, eq=False)
    """Counts the elections of a leader."""


@attrs.frozen
class KeyValue:
    """One key, its value, the revision that wrote it, and the etcd lease it is attached to (0 for none)."""

    key: bytes
    value: bytes
    revision: int
    lease: int


@attrs.frozen
class WatchReply:
    """One document of a watch."""

    header: Header
    created: bool = False
    cancelled: bool = False
    cancel_reason: str = ""
    compacted: bool = False
    """The watch was cancelled because what it asks for is compacted away."""
    events: tuple[tuple[KeyValue, bool], ...] = ()
    """In order: the key, and whether it is deleted."""


def encode(data: bytes) -> str:
    """Bytes, as they stand in a request."""
    return base64.b64encode(data).decode("ascii")


def prefix_range(prefix: bytes) -> dict[str, str]:
    """The members of a request that select all keys which start with ``prefix``."""
    if not prefix:
        return {"key": encode(b"\0"), "range_end": encode(b"\0")}
    rest = prefix.rstrip(b"\xff")
    end = rest[:-1] + bytes([rest[-1] + 1]) if rest else b"\0"
    return {"key": encode(prefix), "range_end": encode(end)}


def read_header(reply: object) -> Header:
    """The header that every answer has."""
    header = _object(_object(reply, "the answer").get("header"), "header")
    return Header(_integer(header, "cluster_id"), _integer(header, "revision"), _integer(header, "raft_term"))


def read_range(reply: object) -> tuple[Header, tuple[KeyValue, ...]]:
    """The answer to ``kv/range``."""
    return read_header(reply), tuple(map(_key_value, _array(_object(reply, "the answer"), "kvs")))


@attrs.frozen
class Transacted:
    """What a transaction of one put or one deletion did."""

    succeeded: bool
    revision: int
    previous_lease: int
    """The etcd lease of the record that was there before; 0 for none."""


def read_transaction(reply: object) -> Transacted:
    """The answer to ``kv/txn``."""
    header = read_header(reply)
    answer = _object(reply, "the answer")
    previous = 0
    if not _boolean(answer, "succeeded"):
        return Transacted(False, header.revision, 0)
    for response in _array(answer, "responses"):
        for kind, content in _object(response, "response").items():
            done = _object(content, kind)
            before = [done["prev_kv"]] if "prev_kv" in done else _array(done, "prev_kvs")
            for found in before:
                previous = _key_value(found).lease
    return Transacted(True, header.revision, previous)


def read_lease(reply: object) -> int:
    """The answer to ``lease/grant``: the lease's id."""
    found = _integer(_object(reply, "the answer"), "ID")
    if found == 0:
        raise OddReply("it has no member 'ID'")
    return found


@attrs.frozen
class TimeToLive:
    """How long an etcd lease lives, and for which keys."""

    seconds: int
    """-1 if there is no such lease (any more)."""
    keys: frozenset[bytes]


def read_time_to_live(reply: object) -> TimeToLive:
    """The answer to ``lease/timetolive`` with ``keys``."""
    content = _object(reply, "the answer")
    read_header(content)  # without one, a missing TTL would be read as 0
    keys = _array(content, "keys")
    return TimeToLive(_integer(content, "TTL"), frozenset(_decode(key, "keys") for key in keys))


def read_keep_alive(reply: object) -> tuple[Header, int]:
    """The first answer to ``lease/keepalive``: the seconds that the lease lives from then on; 0 if there is none."""
    result = _object(_object(reply, "the answer").get("result"), "result")
    return read_header(result), _integer(result, "TTL")


def read_token(reply: object) -> str:
    """The answer to ``auth/authenticate``."""
    token = _text(_object(reply, "the answer"), "token")
    if not token or not token.isascii() or not token.isprintable():
        raise OddReply("it has no token")
    return token


def read_refusal(text: str | bytes) -> tuple[int, str] | None:
    """gRPC code and message of a body or document that reports an error; ``None`` if it does not."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("error"), dict):  # in a watch
        content = content["error"]
    code = content.get("grpc_code", content.get("code"))
    message = content.get("message")
    if type(code) is not int or not isinstance(message, str):
        return None
    return code, _shortened(message)


def read_cancel_reason(text: str) -> tuple[int, str]:
    """gRPC code and message of a cancelled watch's reason."""
    match = re.fullmatch(r"rpc error: code = (\w+) desc = (.*)", text, re.DOTALL)
    code = CODES.get(match[1], 2) if match else 2
    return code, _shortened(match[2] if match else text) or "the watch was cancelled"


def read_watch(document: object) -> WatchReply:
    """One document of ``watch`` that reports no error."""
    result = _object(_object(document, "the document").get("result"), "result")
    header = read_header(result)
    reason = _text(result, "cancel_reason")
    compacted = _integer(result, "compact_revision") > 0 or "has been compacted" in reason
    return WatchReply(
        header,
        _boolean(result, "created"),
        _boolean(result, "canceled"),
        reason,
        compacted,
        tuple(map(_event, _array(result, "events"))),
    )


class Documents:
    """Cuts a stream of bytes into its lines, each one JSON document, wherever the network cut it."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take more of the stream; the documents that it completes, without empty ones."""
        searched = len(self._rest)
        self._rest += data
        while (end := self._rest.find(b"\n", searched)) >= 0:
            line = bytes(self._rest[:end])
            del self._rest[: end + 1]
            searched = 0
            if line.strip():
                yield line
        if len(self._rest) > _MAX_LINE:
            raise OddReply(f"a document is longer than {_MAX_LINE} bytes")

    def finish(self) -> bytes:
        """What came after the last line: an error may come without an end of line."""
        return bytes(self._rest).strip()


def parse_json(line: bytes) -> object:
    """Parse one document. :raises OddReply: if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise OddReply("it is not JSON") from None


def _event(event: object) -> tuple[KeyValue, bool]:
    content = _object(event, "event")
    kind = content.get("type", "PUT")
    if kind not in ("PUT", "DELETE"):
        raise OddReply(f"an event is of the type {_shortened(str(kind))!r}")
    return _key_value(content.get("kv")), kind == "DELETE"


def _key_value(item: object) -> KeyValue:
    content = _object(item, "kv")
    revision = _integer(content, "mod_revision")
    if revision <= 0:
        raise OddReply("a key has no mod_revision")
    return KeyValue(
        _decode(content.get("key"), "key"),
        _decode(content.get("value", ""), "value"),
        revision,
        _integer(content, "lease"),
    )


def _object(item: object, name: str) -> Mapping[str, Any]:
    if not isinstance(item, dict):
        raise OddReply(f"{name} is not an object")
    return item


def _array(content: Mapping[str, Any], name: str) -> list[Any]:
    items = content.get(name, [])
    if not isinstance(items, list):
        raise OddReply(f"{name} is not an array")
    return items


def _integer(content: Mapping[str, Any], name: str) -> int:
    item = content.get(name, 0)
    if isinstance(item, str) and re.fullmatch(r"-?[0-9]{1,20}", item):
        return int(item)
    if type(item) is not int:
        raise OddReply(f"{name} is not a number")
    return item


def _boolean(content: Mapping[str, Any], name: str) -> bool:
    item = content.get(name, False)
    if not isinstance(item, bool):
        raise OddReply(f"{name} is neither true nor false")
    return item


def _text(content: Mapping[str, Any], name: str) -> str:
    item = content.get(name, "")
    if not isinstance(item, str):
        raise OddReply(f"{name} is not a string")
    return item


def _decode(item: object, name: str) -> bytes:
    if not isinstance(item, str):
        raise OddReply(f"{name} is not a string")
    try:
        return base64.b64decode(item, validate=True)
    except (binascii.Error, ValueError):
        raise OddReply(f"{name} is not base64") from None


def _shortened(text: str) -> str:
    """Fit for a message: one line, not endless, nothing that a terminal would act upon."""
    return "".join(c if c.isprintable() else " " for c in text[:300]).strip()
