"""etcd's JSON: whatever arrives, it is read right or refused in words."""

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlaynet.stores import _etcd_replies as replies
from overlaynet.stores._etcd_replies import Documents, Header, KeyValue, OddReply, TimeToLive, Transacted

READERS = [
    replies.read_header,
    replies.read_range,
    replies.read_transaction,
    replies.read_lease,
    replies.read_time_to_live,
    replies.read_token,
    replies.read_watch,
]

HEADER = {"cluster_id": "7", "member_id": "8", "revision": "9", "raft_term": "2"}
KEY = {"key": "YQ==", "create_revision": "2", "mod_revision": "3", "version": "1", "value": "dg==", "lease": "4"}


def test_what_etcd_3_4_really_sends_is_read() -> None:
    assert replies.read_range({"header": HEADER}) == (Header(7, 9), ())
    assert replies.read_range({"header": HEADER, "kvs": [KEY], "count": "1"}) == (
        Header(7, 9),
        (KeyValue(b"a", b"v", 3, 4),),
    )
    empty = {"key": "YQ==", "mod_revision": "3"}
    assert replies.read_range({"header": HEADER, "kvs": [empty]})[1] == (KeyValue(b"a", b"", 3, 0),)

    put = {"response_put": {"header": {"revision": "9"}, "prev_kv": KEY}}
    done = {"header": HEADER, "succeeded": True, "responses": [put]}
    assert replies.read_transaction(done) == Transacted(True, 9, 4)
    assert replies.read_transaction({"header": HEADER}) == Transacted(False, 9, 0)
    delete = {"response_delete_range": {"header": {"revision": "9"}, "deleted": "1", "prev_kvs": [KEY]}}
    assert replies.read_transaction({**done, "responses": [delete]}) == Transacted(True, 9, 4)
    first = {"response_put": {"header": {"revision": "9"}}}
    assert replies.read_transaction({**done, "responses": [first]}) == Transacted(True, 9, 0)

    assert replies.read_lease({"header": HEADER, "ID": "1234", "TTL": "5"}) == 1234
    living = {"header": HEADER, "ID": "1234", "TTL": "4", "grantedTTL": "5", "keys": ["YQ=="]}
    assert replies.read_time_to_live(living) == TimeToLive(4, frozenset([b"a"]))
    assert replies.read_time_to_live({"header": HEADER, "ID": "99", "TTL": "-1"}) == TimeToLive(-1, frozenset())
    assert replies.read_time_to_live({"header": HEADER, "ID": "99"}) == TimeToLive(0, frozenset())
    assert replies.read_token({"header": HEADER, "token": "bYIvVlwZyqiobPvI.24"}) == "bYIvVlwZyqiobPvI.24"


def test_documents_of_a_watch_are_read() -> None:
    def read(**result: Any) -> replies.WatchReply:
        return replies.read_watch({"result": {"header": HEADER, **result}})

    assert read(created=True) == replies.WatchReply(Header(7, 9), created=True)
    deleted = {"type": "DELETE", "kv": {"key": "YQ==", "mod_revision": "4"}}
    assert read(events=[{"kv": KEY}, deleted]).events == (
        (KeyValue(b"a", b"v", 3, 4), False),
        (KeyValue(b"a", b"", 4, 0), True),
    )
    assert read(canceled=True, compact_revision="4").compacted
    reason = "rpc error: code = OutOfRange desc = etcdserver: mvcc: required revision has been compacted"
    assert read(canceled=True, cancel_reason=reason).compacted
    refused = read(canceled=True, created=True, watch_id="-1", cancel_reason="etcdserver: permission denied")
    assert (refused.cancelled, refused.compacted) == (True, False)


@pytest.mark.parametrize(
    ("reason", "read"),
    [
        (
            "rpc error: code = PermissionDenied desc = etcdserver: permission denied",
            (7, "etcdserver: permission denied"),
        ),
        ("rpc error: code = Unauthenticated desc = a\nb", (16, "a b")),
        ("rpc error: code = Whatever desc = x", (2, "x")),
        ("anything", (2, "anything")),
        ("", (2, "the watch was cancelled")),
    ],
)
def test_why_a_watch_was_cancelled(reason: str, read: tuple[int, str]) -> None:
    assert replies.read_cancel_reason(reason) == read


@pytest.mark.parametrize(
    ("body", "read"),
    [
        ('{"error":"no leader","message":"no leader","code":14}', (14, "no leader")),
        ('{"code":14,"message":"no leader","details":[]}', (14, "no leader")),  # etcd 3.6
        ('{"error":{"grpc_code":14,"http_code":503,"message":"no leader","http_status":"x"}}', (14, "no leader")),
        ('{"error":{"code":14,"message":"no leader","details":[]}}', (14, "no leader")),
        ('{"error":"x","message":"\\u001b[2Jclear\\nscreen","code":2}', (2, "[2Jclear screen")),
        ("404 page not found\n", None),
        ("", None),
        ("[]", None),
        ('{"code":"14","message":"x"}', None),
        ('{"code":true,"message":"x"}', None),
        ('{"code":14}', None),
        ("[" * 100_000, None),
        ('{"header":{},"created":true}', None),
    ],
)
def test_a_refusal_is_told_from_other_answers(body: str, read: tuple[int, str] | None) -> None:
    assert replies.read_refusal(body) == read


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("reply", [None, [], "text", 5, {}, {"header": None}, {"header": {"revision": "x"}}])
def test_what_is_no_answer_is_odd(read: Any, reply: object) -> None:
    with pytest.raises(OddReply):
        read(reply)


@pytest.mark.parametrize(
    "change",
    [
        {"kvs": {}},
        {"kvs": None},
        {"kvs": [None]},
        {"kvs": [{}]},
        {"kvs": [{**KEY, "key": None}]},
        {"kvs": [{**KEY, "key": "not base64!"}]},
        {"kvs": [{**KEY, "key": "ключ"}]},
        {"kvs": [{**KEY, "value": 5}]},
        {"kvs": [{**KEY, "mod_revision": "0"}]},
        {"kvs": [{**KEY, "mod_revision": "-3"}]},
        {"kvs": [{**KEY, "mod_revision": 3.5}]},
        {"kvs": [{**KEY, "mod_revision": True}]},
        {"kvs": [{**KEY, "mod_revision": "٣"}]},
        {"kvs": [{**KEY, "mod_revision": " 3"}]},
        {"kvs": [{**KEY, "mod_revision": "1_000"}]},
        {"kvs": [{**KEY, "mod_revision": "9" * 5000}]},
        {"kvs": [{**KEY, "lease": None}]},
    ],
)
def test_an_odd_member_is_named(change: dict[str, object]) -> None:
    with pytest.raises(OddReply, match="kv|key|value|revision|lease"):
        replies.read_range({"header": HEADER, **change})


MEMBERS = ["header", "kvs", "kv", "key", "value", "mod_revision", "revision", "cluster_id", "result", "events", "type"]
MEMBERS += ["ID", "TTL", "keys", "token", "succeeded", "responses", "prev_kv", "prev_kvs", "created"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=5),
    max_leaves=20,
)


@given(JSON)
def test_no_answer_raises_anything_but_an_odd_reply(reply: object) -> None:
    for wrapped in (reply, {"header": HEADER, "kvs": [reply]}, {"result": reply}, {"header": reply}):
        for read in READERS:
            with contextlib.suppress(OddReply):
                read(wrapped)


@given(st.lists(st.dictionaries(st.text(max_size=10), st.text(max_size=20), max_size=3), max_size=20), st.data())
def test_any_cutting_of_the_stream_gives_the_same_documents(documents: list[object], data: st.DataObject) -> None:
    stream = b"".join(json.dumps(document, ensure_ascii=False).encode() + b"\n" for document in documents)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    cutter = Documents()
    found = [json.loads(line) for piece in pieces for line in cutter.feed(piece)]
    assert found == documents
    assert cutter.finish() == b""


def test_a_document_without_an_end_is_kept_for_the_end() -> None:
    cutter = Documents()
    assert list(cutter.feed(b'\r\n\n{"a":1}\n{"error"')) == [b'{"a":1}']
    assert list(cutter.feed(b":2}")) == []
    assert cutter.finish() == b'{"error":2}'


def test_an_endless_document_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_MAX_LINE", 100)
    cutter = Documents()
    assert list(cutter.feed(b"x" * 100)) == []
    with pytest.raises(OddReply, match="longer than 100 bytes"):
        list(cutter.feed(b"x"))


@given(st.binary(max_size=6), st.binary(max_size=8))
def test_a_prefix_selects_exactly_the_keys_that_start_with_it(prefix: bytes, key: bytes) -> None:
    selected = {name: base64.b64decode(value) for name, value in replies.prefix_range(prefix).items()}
    low, high = selected["key"], selected["range_end"]
    # How etcd reads a range: from key to range_end, which is not part of it; "\0" is no end.
    assert (low <= (key or b"\0") and (high == b"\0" or key < high)) == (key or b"\0").startswith(prefix)
