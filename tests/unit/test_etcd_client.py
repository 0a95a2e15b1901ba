"""The etcd store against a gateway that answers as the test tells it to: what a real etcd does too seldom to wait for."""

import asyncio
import base64
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs
import pytest

from overlaynet.errors import NoThread, StoreError, StoreUnavailable
from overlaynet.stores._etcd_newest import Newest
from overlaynet.stores._etcd_settings import Timeouts
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.table import Record, Table
from overlaynet.testing.tables import until

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
HEADER: Mapping[str, object] = {"cluster_id": "7", "member_id": "8", "revision": "100", "raft_term": "2"}
HANG_UP = 0
NO_LEADER = (503, {"error": "etcdserver: no leader", "message": "etcdserver: no leader", "code": 14})
TIMED_OUT = (500, {"error": "context deadline exceeded", "message": "context deadline exceeded", "code": 2})
BAD_TOKEN = (401, {"error": "etcdserver: invalid auth token", "message": "etcdserver: invalid auth token", "code": 16})
GRANTED = (200, {"header": HEADER, "ID": "1234", "TTL": "60"})
WRITTEN = (200, {"header": HEADER, "succeeded": True, "responses": [{"response_put": {"header": {"revision": "100"}}}]})
EMPTY = (200, {"header": HEADER})

Answer = tuple[int, object]
"""Status and body; a list as body is a stream of documents, after which the connection is closed."""


@pytest.fixture
def anyio_backend() -> object:
    return "asyncio"  # real threads and sockets need the real clock


@attrs.frozen
class Request:
    path: str
    body: Mapping[str, Any]
    token: str | None
    port: int
    """Of the client."""


class Gateway:
    """Answers each path with its answers in turn, the last one again and again."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: dict[str, list[Answer]] = {}
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                path = self.path.removeprefix("/v3/")
                gateway.requests.append(Request(path, body, self.headers.get("Authorization"), self.client_address[1]))
                answers = gateway.answers[path]
                status, content = answers.pop(0) if len(answers) > 1 else answers[0]
                if status == HANG_UP:
                    self.close_connection = True
                    return
                stream = isinstance(content, list)
                documents = content if isinstance(content, list) else [content]
                text = b"".join(d if isinstance(d, bytes) else json.dumps(d).encode() + b"\n" for d in documents)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text) + (1 if stream else 0)))
                self.end_headers()
                self.wfile.write(text)
                if stream:
                    self.close_connection = True
                    gateway.streaming.wait()

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing: the tests look at the requests."""

        self.streaming = threading.Event()
        """Set it, and streams end."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.01])
        self._thread.start()

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def close(self) -> None:
        self.streaming.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class HastyStore(EtcdStore):
    timeouts = Timeouts(connect=5.0, answer=5.0, silence=5.0, patience=5.0)


class AttentiveStore(EtcdStore):
    """Hardly bears silence."""

    timeouts = Timeouts(connect=5.0, answer=5.0, silence=0.1, patience=5.0)


class ImpatientStore(EtcdStore):
    timeouts = Timeouts(connect=5.0, answer=0.5)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


@pytest.fixture
def other() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


OpenTable = Callable[..., Table]


@pytest.fixture
async def open_table(gateway: Gateway, other: Gateway) -> AsyncIterator[OpenTable]:
    opened: list[Table] = []

    def open_table(*urls: str, store: type[EtcdStore] = HastyStore, **options: Any) -> Table:
        opened.append(store(EtcdOptions(endpoints=urls or (gateway.url,), prefix="", **options)).make_table())
        return opened[-1]

    yield open_table
    for table in opened:
        await table.aclose()  # before the gateways go: they wait for their connections to end


def kv(key: str, revision: int, value: str = "", lease: int = 0) -> dict[str, str]:
    return {
        "key": base64.b64encode(key.encode()).decode(),
        "value": base64.b64encode(value.encode()).decode(),
        "mod_revision": str(revision),
        "lease": str(lease),
    }


def listed(*keys: Mapping[str, str], revision: int = 100) -> Answer:
    return 200, {"header": {**HEADER, "revision": str(revision)}, "kvs": list(keys)}


def watched(*events: object, revision: int = 100, **members: object) -> dict[str, object]:
    return {"result": {"header": {**HEADER, "revision": str(revision)}, "events": list(events), **members}}


CREATED = watched(created=True)


# Writes whose outcome is unknown


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (TIMED_OUT, "context deadline exceeded"),
        ((HANG_UP, None), "it closed the connection without an answer; if it speaks TLS, write https://"),
        ((502, b"<html>bad gateway</html>"), "it answered Bad Gateway"),
        ((200, b"<html>welcome</html>"), "its answer is not one of etcd's"),
        ((200, {"header": None}), "its answer is not one of etcd's: header is not an object"),
    ],
)
async def test_a_write_that_may_have_happened_is_not_sent_again(
    gateway: Gateway, other: Gateway, open_table: OpenTable, answer: Answer, reason: str
) -> None:
    gateway.streaming.set()
    gateway.answers = {"kv/txn": [answer], "lease/grant": [GRANTED]}
    with pytest.raises(StoreUnavailable) as caught:
        await open_table(gateway.url, other.url).create("a", b"", 60.0)
    assert str(caught.value) == f"etcd at {gateway.url}, {other.url} does not answer ({reason})"
    assert len(gateway.asked("kv/txn")) == 1
    assert other.requests == []
    # The record may be there: it must not vanish with its lease.
    assert gateway.asked("lease/revoke") == []


async def test_after_an_endpoint_failed_the_next_request_goes_elsewhere(
    gateway: Gateway, other: Gateway, open_table: OpenTable
) -> None:
    gateway.answers = {"kv/txn": [TIMED_OUT]}
    other.answers = {"kv/txn": [WRITTEN], "kv/range": [EMPTY]}
    table = open_table(gateway.url, other.url)
    with pytest.raises(StoreUnavailable):
        await table.create("a", b"")
    assert await table.create("a", b"") is not None
    assert await table.get("a") is None
    assert len(gateway.requests) == 1


async def test_after_all_have_failed_one_that_said_so_is_asked_first_and_not_one_that_hangs(
    gateway: Gateway, other: Gateway, open_table: OpenTable
) -> None:
    with socket.socket() as hung:
        hung.bind(("127.0.0.1", 0))
        hung.listen()
        hung.settimeout(PATIENCE)
        address = f"http://127.0.0.1:{hung.getsockname()[1]}"
        for gateway_ in (gateway, other):
            gateway_.answers = {"kv/range": [NO_LEADER, EMPTY]}
        table = open_table(address, gateway.url, other.url, store=ImpatientStore)
        with pytest.raises(StoreUnavailable, match="no leader"):
            await table.get("a")
        assert await table.get("a") is None
        hung.accept()[0].close()
        hung.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            hung.accept()


async def test_a_write_that_surely_did_not_happen_is_sent_elsewhere(
    gateway: Gateway, other: Gateway, open_table: OpenTable
) -> None:
    gateway.answers = {"kv/txn": [NO_LEADER], "lease/grant": [NO_LEADER]}
    other.answers = {"kv/txn": [WRITTEN], "lease/grant": [GRANTED]}
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{closed.getsockname()[1]}"
        table = open_table(refusing, gateway.url, other.url)
        assert await table.create("a", b"", 60.0) is not None
        assert await open_table(refusing, gateway.url, other.url).create("a", b"") is not None


async def test_reads_and_grants_are_sent_elsewhere_whatever_happened(
    gateway: Gateway, other: Gateway, open_table: OpenTable
) -> None:
    other.answers = {"kv/txn": [WRITTEN], "lease/grant": [GRANTED], "kv/range": [EMPTY]}
    for answer in (TIMED_OUT, (HANG_UP, None), (200, {"header": None})):
        gateway.answers = {"kv/range": [answer], "lease/grant": [answer]}
        assert await open_table(gateway.url, other.url).get("a") is None
        assert await open_table(gateway.url, other.url).create("a", b"", 60.0) is not None


async def test_a_grant_whose_first_answer_was_lost_is_not_made_twice(gateway: Gateway, open_table: OpenTable) -> None:
    exists = "etcdserver: lease already exists"
    gateway.answers = {
        "lease/grant": [(412, {"error": exists, "message": exists, "code": 9})],
        "kv/txn": [WRITTEN],
    }
    assert await open_table().create("a", b"", 59.1) is not None
    (grant,) = gateway.asked("lease/grant")
    assert grant.body["TTL"] == "60", "a lifetime is rounded up"
    assert int(grant.body["ID"]) > 0
    (write,) = gateway.asked("kv/txn")
    assert write.body["success"][0]["request_put"]["lease"] == grant.body["ID"]


async def test_a_write_that_failed_for_good_gives_its_etcd_lease_back(gateway: Gateway, open_table: OpenTable) -> None:
    for code, message, error in [
        (5, "etcdserver: requested lease not found", StoreUnavailable),
        (8, "etcdserver: mvcc: database space exceeded", StoreUnavailable),
        (8, "etcdserver: too many requests", StoreUnavailable),
        (7, "etcdserver: permission denied", StoreError),
        (3, "etcdserver: key is not provided", StoreError),
    ]:
        gateway.requests.clear()
        gateway.answers = {
            "lease/grant": [GRANTED],
            "kv/txn": [(400, {"error": message, "message": message, "code": code})],
            "lease/revoke": [TIMED_OUT],  # and what is not given back expires
        }
        with pytest.raises(error) as caught:
            await open_table().create("a", b"", 60.0)
        assert gateway.url in str(caught.value)
        assert [request.body for request in gateway.asked("lease/revoke")] == [{"ID": "1234"}]


# Tokens


async def test_a_token_is_asked_for_without_the_old_one_and_only_once_more(
    gateway: Gateway, open_table: OpenTable
) -> None:
    tokens: list[Answer] = [(200, {"header": HEADER, "token": token}) for token in ("one", "two")]
    gateway.answers = {"auth/authenticate": tokens, "kv/range": [EMPTY, BAD_TOKEN, EMPTY, BAD_TOKEN]}
    table = open_table(username="joe", password="secret")
    assert await table.get("a") is None
    assert await table.get("a") is None
    assert [(request.path, request.token) for request in gateway.requests] == [
        ("auth/authenticate", None),
        ("kv/range", "one"),
        ("kv/range", "one"),
        ("auth/authenticate", None),
        ("kv/range", "two"),
    ]
    with pytest.raises(StoreUnavailable, match="does not serve us now: invalid auth token"):
        await table.get("a")
    assert len(gateway.asked("auth/authenticate")) == 3


async def test_a_write_goes_elsewhere_when_there_is_no_token_to_be_had(
    gateway: Gateway, other: Gateway, open_table: OpenTable
) -> None:
    gateway.answers = {"auth/authenticate": [TIMED_OUT]}
    other.answers = {"auth/authenticate": [(200, {"header": HEADER, "token": "one"})], "kv/txn": [WRITTEN]}
    assert await open_table(gateway.url, other.url, username="joe", password="secret").create("a", b"") is not None


async def test_a_write_that_hung_up_is_not_repeated_but_the_next_gets_a_new_token(
    gateway: Gateway, open_table: OpenTable
) -> None:
    tokens: list[Answer] = [(200, {"header": HEADER, "token": token}) for token in ("one", "two")]
    gateway.answers = {"auth/authenticate": tokens, "kv/txn": [(HANG_UP, None), WRITTEN]}
    table = open_table(username="joe", password="secret")
    with pytest.raises(StoreUnavailable):
        await table.create("a", b"")
    assert await table.create("a", b"") is not None
    assert [request.token for request in gateway.asked("kv/txn")] == ["one", "two"]


async def test_a_client_certificate_with_a_common_name_is_explained(gateway: Gateway, open_table: OpenTable) -> None:
    message = "CommonName of client sending a request against gateway will be ignored and not used as expected"
    gateway.answers = {"kv/range": [(400, {"error": message, "message": message, "code": 3})]}
    with pytest.raises(StoreError, match=r"takes no client certificate that has a common name \(CN\)"):
        await open_table().get("a")


# Watching


async def test_a_watch_resumes_after_its_last_event_and_not_at_the_newest_revision(
    gateway: Gateway, open_table: OpenTable
) -> None:
    """etcd sends old events in batches; each batch names the newest revision, with events yet to come before it."""
    b, c = kv("b", 102, lease=7), kv("c", 104, lease=8)
    deleted = {"type": "DELETE", "kv": kv("a", 103)}
    gateway.answers = {
        "kv/range": [EMPTY, listed(b, revision=6153), listed(c, revision=6153)],
        "watch": [
            (200, [CREATED, watched({"kv": kv("a", 101)}, {"kv": b}, revision=6153)]),
            (200, [watched(created=True, revision=6153), watched(deleted, {"kv": c}, revision=6153)]),
            (200, [watched(created=True, revision=6153), watched(revision=6153)]),  # nothing but a sign of life
            (200, [watched(created=True, revision=6153)]),
        ],
    }
    gateway.streaming.set()
    async with aclosing(open_table().watch("")) as listings:
        await until(listings, lambda listing: set(listing) == {"b", "c"})
        async with asyncio.timeout(PATIENCE):
            while len(gateway.asked("watch")) < 4:
                await asyncio.sleep(0.01)
    starts = [request.body["create_request"]["start_revision"] for request in gateway.asked("watch")]
    assert starts[:4] == ["101", "103", "105", "105"]
    # Before it went on, it asked whether the last event still stands where it was, and for no more.
    asked = [(request.body["key"], request.body.get("revision")) for request in gateway.asked("kv/range")]
    assert asked[1:4] == [(b["key"], "102"), (c["key"], "104"), (c["key"], "104")]


@pytest.mark.parametrize(
    "answer",
    [
        listed(),
        listed(kv("b", 102, lease=8)),
        listed(kv("b", 101, lease=7)),
        listed(kv("b", 102, "other", lease=7)),
        (400, {"message": "etcdserver: mvcc: required revision has been compacted", "code": 11}),
        (400, {"message": "etcdserver: mvcc: required revision is a future revision", "code": 11}),
    ],
    ids=["gone", "another lease", "another revision", "another value", "compacted", "yet to come"],
)
async def test_a_watch_lists_anew_if_etcd_no_longer_has_what_was_seen_last(
    gateway: Gateway, open_table: OpenTable, answer: Answer
) -> None:
    gateway.answers = {
        "kv/range": [EMPTY, answer, listed(kv("new", 190), revision=200)],
        "watch": [
            (200, [CREATED, watched({"kv": kv("b", 102, lease=7)})]),
            (200, [watched(created=True, revision=200)]),
        ],
    }
    gateway.streaming.set()
    async with aclosing(open_table().watch("")) as listings:
        await until(listings, lambda listing: set(listing) == {"b"})
        await until(listings, lambda listing: set(listing) == {"new"})
        async with asyncio.timeout(PATIENCE):
            while len(gateway.asked("watch")) < 2:
                await asyncio.sleep(0.01)
    assert gateway.asked("watch")[1].body["create_request"]["start_revision"] == "201"


@pytest.mark.parametrize(
    "document",
    [
        watched(canceled=True, compact_revision="150"),
        watched(canceled=True, cancel_reason="etcdserver: mvcc: required revision has been compacted"),
        watched(created=True, revision=50),
        {"result": {"header": {"cluster_id": "6", "revision": "100"}, "created": True}},
    ],
    ids=["compacted", "compacted, in words", "revision went back", "another cluster"],
)
async def test_a_watch_that_cannot_go_on_lists_anew(gateway: Gateway, open_table: OpenTable, document: object) -> None:
    gateway.answers = {
        "kv/range": [
            listed(kv("old", 90)),
            listed(kv("new", 190), revision=200),
        ],
        "watch": [(200, [CREATED, document]), (200, [watched(created=True, revision=200)])],
    }
    async with aclosing(open_table().watch("")) as listings:
        assert set(await until(listings, lambda listing: "old" not in listing)) == {"new"}
        async with asyncio.timeout(PATIENCE):
            while len(gateway.asked("watch")) < 2:
                await asyncio.sleep(0.01)
    assert gateway.asked("watch")[1].body["create_request"]["start_revision"] == "201"


@pytest.mark.parametrize(
    "answer",
    [
        (200, [CREATED, {"error": {"grpc_code": 14, "message": "etcdserver: no leader"}}]),
        (200, [CREATED, watched(canceled=True)]),
        (200, [CREATED, b"not json\n"]),
        (200, [CREATED, {"surprise": True}]),
        (200, [CREATED, {"result": {"header": HEADER, "events": "many"}}]),
        (200, []),
        NO_LEADER,
        (502, [b"<html>"]),
        (HANG_UP, None),
    ],
)
async def test_a_watch_that_breaks_goes_on_at_the_next_endpoint(
    gateway: Gateway, other: Gateway, open_table: OpenTable, answer: Answer
) -> None:
    gateway.answers = {"kv/range": [EMPTY], "watch": [answer]}
    other.answers = {"kv/range": [EMPTY], "watch": [(200, [CREATED, watched({"kv": kv("a", 101)})])]}
    gateway.streaming.set()
    async with aclosing(open_table(gateway.url, other.url).watch("")) as listings:
        assert set(await until(listings, bool)) == {"a"}


async def test_a_watch_takes_a_new_token_once(gateway: Gateway, open_table: OpenTable) -> None:
    tokens: list[Answer] = [(200, {"header": HEADER, "token": token}) for token in ("one", "two", "three")]
    refused = watched(
        created=True,
        canceled=True,
        watch_id="-1",
        cancel_reason="rpc error: code = Unauthenticated desc = etcdserver: invalid auth token",
    )
    gateway.answers = {
        "auth/authenticate": tokens,
        "kv/range": [EMPTY],
        "watch": [(200, [refused]), (200, [CREATED, watched({"kv": kv("a", 101)})]), (200, [refused])],
    }
    table = open_table(username="joe", password="secret")
    async with aclosing(table.watch("")) as listings:
        assert set(await until(listings, bool)) == {"a"}
    with pytest.raises(StoreUnavailable, match="invalid auth token"):
        async with aclosing(table.watch("")) as listings:
            await until(listings, bool)
    assert [request.token for request in gateway.asked("watch")] == ["one", "two", "two", "three"]


async def asked_for_one_key(gateway: Gateway, times: int) -> list[Request]:
    """What came after the listing."""
    async with asyncio.timeout(PATIENCE):
        while len(gateway.asked("kv/range")) <= times:
            await asyncio.sleep(0.01)
    _, *asked = gateway.asked("kv/range")
    return asked


async def test_while_a_watch_is_silent_its_member_is_asked_for_one_key_over_one_connection(
    gateway: Gateway, open_table: OpenTable
) -> None:
    gateway.answers = {"kv/range": [EMPTY], "watch": [(200, [CREATED])]}
    async with aclosing(open_table(store=AttentiveStore).watch("subnets/")) as listings:
        assert await anext(listings) == {}
        asked = await asked_for_one_key(gateway, 4)
    assert [request.body for request in asked] == [{"key": base64.b64encode(b"subnets/").decode()}] * len(asked)
    (watch,) = gateway.asked("watch")
    (port,) = {request.port for request in asked}
    assert port != watch.port


@pytest.mark.parametrize("answer", [(HANG_UP, None), BAD_TOKEN])
async def test_a_sign_of_life_is_asked_for_again_with_another_token_or_connection(
    gateway: Gateway, other: Gateway, open_table: OpenTable, answer: Answer
) -> None:
    gateway.answers = {
        "auth/authenticate": [(200, {"header": HEADER, "token": token}) for token in ("one", "two")],
        "kv/range": [EMPTY, EMPTY, answer, EMPTY],
        "watch": [(200, [CREATED])],
    }
    table = open_table(gateway.url, other.url, store=AttentiveStore, username="joe", password="secret")
    async with aclosing(table.watch("")) as listings:
        assert await anext(listings) == {}
        before, refused, again, *_ = await asked_for_one_key(gateway, 4)
    assert (before.token, before.port) == (refused.token, refused.port) == ("one", before.port)
    assert again.token == "two"
    assert (again.port != refused.port) == (answer[0] == HANG_UP)
    assert len(gateway.asked("watch")) == 1
    assert other.requests == [], "the watch need not go elsewhere"


async def test_a_silent_watch_whose_permission_is_taken_away_ends(gateway: Gateway, open_table: OpenTable) -> None:
    denied = {"error": "", "message": "etcdserver: permission denied", "code": 7}
    gateway.answers = {"kv/range": [EMPTY, (403, denied)], "watch": [(200, [CREATED])]}
    async with aclosing(open_table(store=AttentiveStore).watch("")) as listings:
        assert await anext(listings) == {}
        with pytest.raises(StoreError, match="permission denied; grant the user's role"):
            await anext(listings)


async def test_a_listing_once_yielded_does_not_change(gateway: Gateway, open_table: OpenTable) -> None:
    gateway.answers = {
        "kv/range": [listed(kv("a", 90))],
        "watch": [
            (200, [CREATED, watched({"kv": kv("b", 101)})]),
            (200, [watched(created=True, revision=101), watched({"kv": kv("c", 102)}, revision=102)]),
        ],
    }
    async with aclosing(open_table().watch("")) as listings:
        seen = [await anext(listings)]
        keys = [set(seen[0])]
        gateway.streaming.set()
        while "c" not in seen[-1]:
            seen.append(await anext(listings))
            keys.append(set(seen[-1]))
    assert [set(listing) for listing in seen] == keys


async def test_the_last_words_of_a_watch_are_heard(gateway: Gateway, open_table: OpenTable) -> None:
    """etcd 3.4 ends a stream with an error that has no end of line."""
    last_words = b'{"error":{"grpc_code":7,"http_code":403,"message":"etcdserver: permission denied"}}'
    gateway.answers = {"kv/range": [EMPTY], "watch": [(200, [CREATED, last_words])]}
    gateway.streaming.set()
    with pytest.raises(StoreError, match="permission denied"):
        async with aclosing(open_table().watch("")) as listings:
            await until(listings, bool)


async def test_a_watch_without_permission_ends(gateway: Gateway, open_table: OpenTable) -> None:
    reason = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
    refused = watched(created=True, canceled=True, watch_id="-1", cancel_reason=reason)
    gateway.answers = {"kv/range": [EMPTY], "watch": [(200, [refused])]}
    with pytest.raises(StoreError, match=f"etcd at {gateway.url} refused: permission denied; grant"):
        async with aclosing(open_table().watch("")) as listings:
            await until(listings, bool)


async def test_a_watch_for_whose_time_no_thread_is_to_be_had_says_so(
    gateway: Gateway, open_table: OpenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(timer: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", refuse)
    async with aclosing(open_table().watch("")) as listings:
        with pytest.raises(NoThread, match=r"no thread \(can't start new thread\); raise the limit of tasks"):
            await anext(listings)
    assert gateway.requests == []


# Handing over


async def test_the_newest_value_is_handed_over_and_nothing_piles_up() -> None:
    newest = Newest[int]()

    def put() -> None:
        for number in range(10_000):
            newest.put(number)

    thread = threading.Thread(target=put)
    thread.start()
    thread.join()
    assert await newest.get() == 9_999
    newest.put(1)
    newest.close(StoreUnavailable("gone"))
    assert await newest.get() == 1
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="gone"):
            await newest.get()


async def test_who_waits_is_woken_from_a_thread() -> None:
    newest = Newest[int]()
    for number in range(100):
        waiting = asyncio.ensure_future(newest.get())
        await asyncio.sleep(0)
        thread = threading.Thread(target=newest.put, args=[number])
        thread.start()
        async with asyncio.timeout(PATIENCE):
            assert await waiting == number
        thread.join()
    waiting = asyncio.ensure_future(newest.get())
    await asyncio.sleep(0)
    newest.close()
    async with asyncio.timeout(PATIENCE):
        assert await waiting is None
        await newest.wait_closed()


# -- an etcd that is full

FULL = (
    429,
    {
        "error": "etcdserver: mvcc: database space exceeded",
        "message": "etcdserver: mvcc: database space exceeded",
        "code": 8,
    },
)
KEPT_KEY = base64.b64encode(b"subnets/a").decode()


def kept(header: Mapping[str, object] = HEADER, **changes: object) -> Answer:
    """The record, as ``kv/range`` shows it."""
    found = {"key": KEPT_KEY, "value": base64.b64encode(b"v").decode(), "mod_revision": "90", "lease": "1234"} | changes
    return 200, {"header": header, "kvs": [found]}


def prolonged(header: Mapping[str, object] = HEADER, ttl: int = 60) -> Answer:
    return 200, {"result": {"header": header, "ID": "1234", "TTL": f"{ttl}"}}


def living(seconds: int = 60, keys: Sequence[str] = (KEPT_KEY,)) -> Answer:
    return 200, {"header": HEADER, "ID": "1234", "TTL": f"{seconds}", "keys": list(keys)}


LATER_TERM = {**HEADER, "raft_term": "3"}
GOOD: Mapping[str, list[Answer]] = {
    "lease/grant": [FULL],
    "kv/range": [kept()],
    "lease/keepalive": [prolonged()],
    "lease/timetolive": [living()],
}


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        ({}, "kept"),
        ({"lease/keepalive": [prolonged(ttl=61)]}, "kept"),
        ({"kv/range": [EMPTY]}, "changed"),
        ({"kv/range": [kept(mod_revision="91")]}, "changed"),
        ({"kv/range": [kept(lease="1235")]}, "changed"),
        ({"kv/range": [kept(), EMPTY]}, "changed"),
        ({"kv/range": [kept(), kept(mod_revision="91")]}, "changed"),
        ({"kv/range": [kept(), kept(lease="1235")]}, "changed"),
        ({"kv/range": [kept(value="")]}, "refused"),  # something else is to be published
        ({"lease/keepalive": [prolonged(ttl=0)]}, "refused"),  # it ended at this very moment
        ({"lease/keepalive": [prolonged(ttl=59)]}, "refused"),  # it was made for a shorter lifetime
        ({"lease/keepalive": [prolonged(LATER_TERM)]}, "refused"),
        ({"kv/range": [kept(), kept(LATER_TERM)]}, "refused"),  # a leader that was deposed may have prolonged it
        ({"lease/timetolive": [living(-1, ())]}, "refused"),
        ({"lease/timetolive": [living(60, ())]}, "refused"),
    ],
)
async def test_what_a_full_etcd_keeps_alive_counts_only_if_all_proves_it(
    gateway: Gateway, open_table: OpenTable, answers: Mapping[str, list[Answer]], outcome: str
) -> None:
    gateway.answers = {path: list(answer) for path, answer in {**GOOD, **answers}.items()}
    replacing = open_table().replace(Record("subnets/a", b"", "90/1234"), b"v", 60.0)
    if outcome == "refused":
        with pytest.raises(StoreUnavailable, match="NOSPACE"):
            await replacing
    else:
        found = await replacing
        expected = ("subnets/a", b"v", "90/1234", 60.0) if outcome == "kept" else None
        assert (found and (found.key, found.value, found.version, found.ttl)) == expected
    assert "kv/txn" not in {request.path for request in gateway.requests}
