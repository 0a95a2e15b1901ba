"""Users, passwords and certificates of a real etcd: what is let in, and what an operator is told who is not."""

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from overlaynet.errors import OverlaynetError, StoreError, StoreUnavailable
from overlaynet.stores._etcd_settings import Timeouts
from overlaynet.stores.etcd import EtcdOptions, EtcdStore
from overlaynet.table import Table
from overlaynet.testing.etcd import Certificates, EtcdCluster, EtcdServer, make_certificates
from overlaynet.testing.lab import SWITCH_ADDRESS, Host, Lab, wait_until
from overlaynet.testing.relay import Relay
from overlaynet.testing.tables import until

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
TOKEN_TTL = 2
"""Seconds; that of a signed token is up to one less, for it counts whole ones."""
PASSWORD = "open sesame"

OpenTable = Callable[..., Table]
Invalid = tuple[tuple[datetime, datetime], str]

_numbers = itertools.count()


class HastyStore(EtcdStore):
    timeouts = Timeouts(connect=2.0, answer=5.0, silence=1.0, patience=2.0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of another authority, and for another server."""
    return make_certificates(tmp_path_factory.mktemp("foreign"), server_names=["DNS:elsewhere.example"])


@pytest.fixture(scope="module")
def successor(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of another authority, for the same server."""
    return make_certificates(tmp_path_factory.mktemp("successor"))


@pytest.fixture(scope="module", params=["simple", "jwt"])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd that knows users: ``writer`` for all under /guarded, ``stranger`` for nothing.

    Its tokens are random texts that it remembers for a while, or signed ones that say themselves when they end.
    """
    tokens = ["--auth-token-ttl", str(TOKEN_TTL)]
    if request.param == "jwt":
        key = tmp_path_factory.mktemp("tokens") / "key.pem"
        public = key.with_name("public.pem")
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        subprocess.run(["openssl", "rsa", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
        tokens = ["--auth-token", f"jwt,pub-key={public},priv-key={key},sign-method=RS256,ttl={TOKEN_TTL}s"]
    with EtcdServer(arguments=[*tokens, "--bcrypt-cost", "4"]) as server:
        enable_users(server)
        yield server


@pytest.fixture(scope="module")
def secured(certificates: Certificates) -> Iterator[EtcdServer]:
    with EtcdServer(certificates=certificates) as server:
        yield server


@pytest.fixture(scope="module")
def exclusive(certificates: Certificates) -> Iterator[EtcdServer]:
    """An etcd that demands client certificates."""
    with EtcdServer(certificates=certificates, client_certificates=True) as server:
        yield server


@pytest.fixture
async def open_table() -> AsyncIterator[OpenTable]:
    opened: list[Table] = []
    prefix = f"/guarded/test{next(_numbers)}"

    def open_table(*endpoints: str, **options: Any) -> Table:
        paths = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        opened.append(HastyStore(EtcdOptions(endpoints=endpoints, **{"prefix": prefix, **paths})).make_table())
        return opened[-1]

    yield open_table
    for table in opened:
        await table.aclose()


def enable_users(server: EtcdServer) -> None:
    def encode(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    for user in ("root", "writer", "stranger"):
        server.post("/v3/auth/user/add", {"name": user, "password": PASSWORD})
    permission = {"permType": "READWRITE", "key": encode("/guarded/"), "range_end": encode("/guarded0")}
    server.post("/v3/auth/role/add", {"name": "network"})
    server.post("/v3/auth/role/grant", {"name": "network", "perm": permission})
    server.post("/v3/auth/user/grant", {"user": "writer", "role": "network"})
    server.post("/v3/auth/user/grant", {"user": "root", "role": "root"})
    server.post("/v3/auth/enable", {})


async def check_works(table: Table) -> None:
    """Every kind of request, and a watch."""
    async with aclosing(table.watch("subnets/")) as listings:
        await until(listings, lambda listing: not listing)
        record = await table.create("subnets/a", b"one", 60.0)
        assert record is not None
        await until(listings, bool)
        replaced = await table.replace(record, b"two", 60.0)
        assert replaced is not None
        assert await table.get("subnets/a") == replaced
        assert 0 < await table.ttl(replaced) <= 60
        assert await table.delete(replaced)
        await until(listings, lambda listing: not listing)


async def refusal(table: Table) -> str:
    """What every kind of request says that is refused for good: a read, a write and a watch agree."""
    texts = set()
    for request in (table.get("config"), table.create("config", b"", 60.0), anext(table.watch("subnets/"))):
        with pytest.raises(StoreError) as caught:
            await request
        texts.add(str(caught.value))
    (text,) = texts
    assert PASSWORD not in text
    return text


async def tokens_expired(server: EtcdServer) -> None:
    """Wait until etcd has forgotten all tokens that were not used meanwhile."""
    async with asyncio.timeout(PATIENCE):
        while True:
            token = server.post("/v3/auth/authenticate", {"name": "writer", "password": PASSWORD})["token"]
            await asyncio.sleep(TOKEN_TTL + 1.5)  # etcd looks for expired tokens once a second
            try:
                server.post("/v3/kv/range", {"key": "L2d1YXJkZWQv"}, token)
            except OverlaynetError:
                return


# Users


async def test_a_user_with_the_right_password_and_role_is_let_in(guarded: EtcdServer, open_table: OpenTable) -> None:
    await check_works(open_table(guarded.endpoint, username="writer", password=PASSWORD))


async def test_a_token_that_expired_is_renewed(guarded: EtcdServer, open_table: OpenTable) -> None:
    async with Relay("127.0.0.1", guarded.port) as relay:

        def authentications() -> int:
            return relay.received.count(b"POST /v3/auth/authenticate")

        table = open_table(f"http://127.0.0.1:{relay.port}", username="writer", password=PASSWORD)
        record = await table.create("subnets/a", b"one", 60.0)
        assert record is not None
        assert await table.get("subnets/a") == record
        assert authentications() == 1
        await tokens_expired(guarded)
        replaced = await table.replace(record, b"two", 60.0)
        assert replaced is not None
        assert authentications() == 2
        await tokens_expired(guarded)
        async with aclosing(table.watch("subnets/")) as listings:
            assert await until(listings, bool) == {"subnets/a": replaced}
        assert authentications() == 3
        await tokens_expired(guarded)
        assert await asyncio.gather(*(table.get("subnets/a") for _ in range(10))) == [replaced] * 10


async def test_a_watch_survives_its_token(guarded: EtcdServer, open_table: OpenTable) -> None:
    table = open_table(guarded.endpoint, username="writer", password=PASSWORD)
    async with aclosing(table.watch("subnets/")) as listings:
        await until(listings, lambda listing: not listing)
        await tokens_expired(guarded)
        record = await table.create("subnets/a", b"")
        assert record is not None
        assert await until(listings, bool) == {"subnets/a": record}


async def test_a_dropped_connection_with_a_stale_token_is_answered_with_a_new_token(
    guarded: EtcdServer, open_table: OpenTable
) -> None:
    """Some versions of etcd 3.4 answer a token that has expired by hanging up, as the relay does here."""
    async with Relay("127.0.0.1", guarded.port) as relay:
        table = open_table(f"http://127.0.0.1:{relay.port}", username="writer", password=PASSWORD)
        assert await table.get("config") is None
        relay.hang_up_next = True
        assert await table.get("config") is None
        assert relay.received.count(b"/v3/auth/authenticate") == 2


async def test_a_password_file_is_read_for_each_token(
    guarded: EtcdServer, open_table: OpenTable, tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text("wrong\n")
    table = open_table(guarded.endpoint, username="writer", password_file=secret)
    with pytest.raises(StoreError, match="invalid user ID or password"):
        await table.get("config")
    secret.write_text(f"{PASSWORD}\n")
    assert await table.get("config") is None
    secret.unlink()
    await tokens_expired(guarded)
    with pytest.raises(StoreError, match=f"--etcd-password-file: cannot read {secret}: No such file or directory"):
        await table.get("config")


@pytest.mark.parametrize("user", ["writer", "nobody"])
async def test_a_wrong_user_or_password_is_named(guarded: EtcdServer, open_table: OpenTable, user: str) -> None:
    text = await refusal(open_table(guarded.endpoint, username=user, password="wrong"))
    assert text == (
        f"etcd at {guarded.endpoint} refused user {user!r}: authentication failed, invalid user ID or password; "
        "check --etcd-username and --etcd-password"
    )


async def test_missing_credentials_are_asked_for(guarded: EtcdServer, open_table: OpenTable) -> None:
    text = await refusal(open_table(guarded.endpoint))
    assert text == f"etcd at {guarded.endpoint} demands a user; give --etcd-username and --etcd-password-file"


async def test_a_user_without_permission_is_named(guarded: EtcdServer, open_table: OpenTable) -> None:
    text = await refusal(open_table(guarded.endpoint, username="stranger", password=PASSWORD))
    assert text.startswith(f"etcd at {guarded.endpoint} refused user 'stranger': permission denied; grant")
    outside = open_table(guarded.endpoint, username="writer", password=PASSWORD, prefix="/elsewhere")
    assert "permission denied" in await refusal(outside)


async def test_credentials_do_no_harm_where_there_are_no_users(open_table: OpenTable) -> None:
    with EtcdServer(arguments=["--bcrypt-cost", "4"]) as server:
        table = open_table(server.endpoint, username="writer", password=PASSWORD)
        await check_works(table)
        enable_users(server)  # and when there are users from now on, they serve
        await check_works(table)


# TLS


async def test_an_authority_alone_is_enough(
    secured: EtcdServer, certificates: Certificates, open_table: OpenTable
) -> None:
    await check_works(open_table(secured.endpoint, cafile=certificates.cafile))


async def test_a_client_certificate_lets_in(
    exclusive: EtcdServer, certificates: Certificates, open_table: OpenTable
) -> None:
    table = open_table(
        exclusive.endpoint,
        cafile=certificates.cafile,
        certfile=certificates.client_certificate,
        keyfile=certificates.client_key,
    )
    await check_works(table)


async def test_users_and_client_certificates_go_together(certificates: Certificates, open_table: OpenTable) -> None:
    with EtcdServer(certificates=certificates, client_certificates=True, arguments=["--bcrypt-cost", "4"]) as server:
        enable_users(server)
        table = open_table(
            server.endpoint,
            cafile=certificates.cafile,
            certfile=certificates.client_certificate,
            keyfile=certificates.client_key,
            username="writer",
            password=PASSWORD,
        )
        await check_works(table)


async def test_a_wrong_authority_is_named(secured: EtcdServer, foreign: Certificates, open_table: OpenTable) -> None:
    text = await refusal(open_table(secured.endpoint, cafile=foreign.cafile))
    assert text.startswith(f"etcd at {secured.endpoint} cannot be used: its certificate is not trusted (")
    assert text.endswith("; check --etcd-cafile")


async def test_without_an_authority_those_of_the_system_decide(secured: EtcdServer, open_table: OpenTable) -> None:
    text = await refusal(open_table(secured.endpoint))
    assert text.startswith(f"etcd at {secured.endpoint} cannot be used: its certificate is not trusted (")


async def test_a_certificate_for_another_name_is_named(foreign: Certificates, open_table: OpenTable) -> None:
    with EtcdServer(certificates=foreign) as server:
        text = await refusal(open_table(server.endpoint, cafile=foreign.cafile))
        assert text == (
            f"etcd at {server.endpoint} cannot be used: its certificate is another server's (IP address mismatch, "
            "certificate is not valid for '127.0.0.1'); name it in --etcd-endpoints as its certificate does"
        )


async def test_a_server_is_known_by_the_name_it_is_asked_for(open_table: OpenTable, tmp_path: Path) -> None:
    named = make_certificates(tmp_path, server_names=["DNS:localhost"])
    with EtcdServer(certificates=named) as server:
        await check_works(open_table(f"https://localhost:{server.port}", cafile=named.cafile))
        assert "its certificate is another server's" in await refusal(open_table(server.endpoint, cafile=named.cafile))


@pytest.mark.parametrize("attempt", range(5))  # etcd may hang up before or after the request is written
async def test_a_missing_client_certificate_is_asked_for(
    exclusive: EtcdServer, certificates: Certificates, open_table: OpenTable, attempt: int
) -> None:
    text = await refusal(open_table(exclusive.endpoint, cafile=certificates.cafile))
    assert text.startswith(
        f"etcd at {exclusive.endpoint} cannot be used: it demands a client certificate that it trusts ("
    )
    assert text.endswith("; check --etcd-certfile and --etcd-keyfile")


async def test_a_client_certificate_of_another_authority_is_refused(
    exclusive: EtcdServer, certificates: Certificates, foreign: Certificates, open_table: OpenTable
) -> None:
    table = open_table(
        exclusive.endpoint,
        cafile=certificates.cafile,
        certfile=foreign.client_certificate,
        keyfile=foreign.client_key,
    )
    assert "it demands a client certificate that it trusts" in await refusal(table)


async def test_a_certificate_that_was_replaced_is_taken(
    exclusive: EtcdServer, certificates: Certificates, foreign: Certificates, open_table: OpenTable, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "client.crt", tmp_path / "client.key"
    shutil.copy(foreign.client_certificate, certificate)
    shutil.copy(foreign.client_key, key)
    table = open_table(exclusive.endpoint, cafile=certificates.cafile, certfile=certificate, keyfile=key)
    with pytest.raises(StoreError, match="demands a client certificate"):
        await table.get("config")
    shutil.copy(certificates.client_certificate, certificate)
    shutil.copy(certificates.client_key, key)
    await check_works(table)


def copied(certificates: Certificates, directory: Path) -> Certificates:
    """The same, as files of the test's own."""
    directory.mkdir(exist_ok=True)
    names = attrs.asdict(certificates)
    return Certificates(**{name: shutil.copy(path, directory / path.name) for name, path in names.items()})


def replace(path: Path, by: Path) -> None:
    """Put another file in place, as those do who rotate certificates: whole, and at once."""
    shutil.copy(by, path.with_suffix(".next"))
    os.replace(path.with_suffix(".next"), path)


async def test_a_whole_rotation_goes_unnoticed(
    certificates: Certificates, successor: Certificates, open_table: OpenTable, tmp_path: Path
) -> None:
    """Authority, server and client get new certificates under running clients, all at once, while etcd is away."""
    ours, theirs = copied(certificates, tmp_path / "ours"), copied(certificates, tmp_path / "theirs")
    with EtcdServer(certificates=theirs, client_certificates=True) as server:
        files = {"cafile": ours.cafile, "certfile": ours.client_certificate, "keyfile": ours.client_key}
        table = open_table(server.endpoint, **files)
        async with aclosing(table.watch("subnets/")) as listings:
            await until(listings, lambda listing: not listing)
            record = await table.create("subnets/a", b"", 600.0)
            await until(listings, bool)
            await asyncio.to_thread(server.stop)
            copied(successor, tmp_path / "theirs")
            for path, by in (
                (ours.cafile, successor.cafile),
                (ours.client_certificate, successor.client_certificate),
                (ours.client_key, successor.client_key),
            ):
                replace(path, by)
            await asyncio.to_thread(server.start)
            assert await table.get("subnets/a") == record
            assert await table.create("subnets/b", b"", 600.0) is not None
            await until(listings, lambda listing: set(listing) == {"subnets/a", "subnets/b"})


async def test_a_rotation_step_by_step_refuses_nothing(
    certificates: Certificates, successor: Certificates, open_table: OpenTable, tmp_path: Path
) -> None:
    """As an operator does it who has three members: both authorities are trusted before any certificate changes.

    Reads and renewals go on all the time, and are counted. One may fail while a member stops, as the others may have to
    agree on a leader first; and a renewal that was under way there has happened or not, which is looked up, as the daemon
    does. At no other time one fails, and at none for its certificate.
    """
    ours, theirs = copied(certificates, tmp_path / "ours"), copied(certificates, tmp_path / "theirs")
    both = tmp_path / "both.crt"
    both.write_bytes(certificates.cafile.read_bytes() + successor.cafile.read_bytes())
    served = {"reads": 0, "renewals": 0}
    stopping = ended = False

    async def read(table: Table) -> None:
        while not ended:
            try:
                assert await table.get("config") is None
            except StoreUnavailable:
                if not stopping:
                    raise
            else:
                served["reads"] += 1

    async def renew(table: Table) -> None:
        record = await table.create("subnets/a", b"", 600.0)
        while not ended:
            assert record is not None
            try:
                record = await table.replace(record, b"", 600.0)
            except StoreUnavailable:
                if not stopping:
                    raise
                with contextlib.suppress(StoreUnavailable):
                    record = await table.get("subnets/a")
            else:
                served["renewals"] += 1

    async def more_are_served() -> None:
        before = dict(served)
        async with asyncio.timeout(PATIENCE):
            while not all(served[kind] > before[kind] + 3 for kind in served):
                await asyncio.sleep(0.01)

    with EtcdCluster(certificates=theirs, client_certificates=True) as cluster:

        async def restart_one_after_another() -> None:
            nonlocal stopping
            for member in cluster.members:
                stopping = True
                await asyncio.to_thread(member.stop)
                await more_are_served()
                stopping = False
                await more_are_served()
                await asyncio.to_thread(member.start)
                await more_are_served()

        def open_one() -> Table:
            files = {"cafile": ours.cafile, "certfile": ours.client_certificate, "keyfile": ours.client_key}
            return open_table(*cluster.endpoints, **files)

        async with asyncio.TaskGroup() as tasks, aclosing(open_one().watch("subnets/")) as listings:
            tasks.create_task(read(open_one()))
            tasks.create_task(renew(open_one()))
            await until(listings, bool)
            replace(ours.cafile, both)
            replace(theirs.cafile, both)
            await restart_one_after_another()
            replace(theirs.server_certificate, successor.server_certificate)
            replace(theirs.server_key, successor.server_key)
            replace(ours.client_certificate, successor.client_certificate)
            replace(ours.client_key, successor.client_key)
            await more_are_served()
            replace(theirs.cafile, successor.cafile)
            await restart_one_after_another()
            replace(ours.cafile, successor.cafile)
            await more_are_served()
            ended = True
            assert await open_one().create("subnets/last", b"", 600.0) is not None
            await until(listings, lambda listing: set(listing) == {"subnets/a", "subnets/last"})
        # The former ones are of no use any more.
        files = {"certfile": certificates.client_certificate, "keyfile": certificates.client_key}
        for cafile in (certificates.cafile, successor.cafile):
            with pytest.raises(StoreError, match="trust"):
                await open_table(*cluster.endpoints, cafile=cafile, **files).get("config")


async def test_half_a_rotation_changes_nothing(
    certificates: Certificates,
    successor: Certificates,
    open_table: OpenTable,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A new certificate without its key is of no use yet: the former ones are."""
    ours, theirs = copied(certificates, tmp_path / "ours"), copied(certificates, tmp_path / "theirs")
    with EtcdServer(certificates=theirs, client_certificates=True) as server:
        files = {"cafile": ours.cafile, "certfile": ours.client_certificate, "keyfile": ours.client_key}
        table = open_table(server.endpoint, **files)
        assert await table.get("config") is None
        replace(ours.client_certificate, successor.client_certificate)
        await asyncio.to_thread(server.stop)  # so that all connections are new
        await asyncio.to_thread(server.start)
        await check_works(table)
        assert caplog.messages.count("certificates not replaced, the former ones are kept") == 1
        replace(ours.client_key, successor.client_key)
        replace(ours.cafile, successor.cafile)
        copied(successor, tmp_path / "theirs")
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        await check_works(table)


async def test_a_server_may_replace_its_certificate(
    certificates: Certificates, successor: Certificates, open_table: OpenTable, tmp_path: Path
) -> None:
    ours, theirs = copied(certificates, tmp_path / "ours"), copied(certificates, tmp_path / "theirs")
    with EtcdServer(certificates=theirs) as server:
        async with Relay("127.0.0.1", server.port) as relay:

            async def served() -> str:
                return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", server.port))

            table = open_table(f"https://127.0.0.1:{relay.port}", cafile=ours.cafile)
            async with aclosing(table.watch("subnets/")) as listings:
                await until(listings, lambda listing: not listing)
                assert await table.get("config") is None
                before = await served()
                replace(theirs.server_certificate, successor.server_certificate)
                replace(theirs.server_key, successor.server_key)
                assert await served() != before
                # What is connected stays so; what connects anew is told whose certificate is not trusted.
                assert await table.create("subnets/a", b"", 600.0) is not None
                await until(listings, bool)
                stranger = open_table(f"https://127.0.0.1:{relay.port}", cafile=ours.cafile)
                assert "its certificate is not trusted" in await refusal(stranger)
                replace(ours.cafile, successor.cafile)
                await relay.cut()
                for each in (table, stranger):
                    assert await each.get("subnets/a") is not None
                assert await table.create("subnets/b", b"", 600.0) is not None
                await until(listings, lambda listing: set(listing) == {"subnets/a", "subnets/b"})


NOW = datetime.now(UTC).replace(microsecond=0)
YESTERDAY, TOMORROW = NOW - timedelta(days=1), NOW + timedelta(days=1)


@pytest.fixture(
    params=[
        ((YESTERDAY - timedelta(days=1), YESTERDAY), f"has expired on {YESTERDAY:%Y-%m-%d %H:%M:%S} UTC"),
        ((TOMORROW, TOMORROW + timedelta(days=1)), f"is not valid before {TOMORROW:%Y-%m-%d %H:%M:%S} UTC"),
    ],
    ids=["expired", "not valid yet"],
)
def invalid(request: pytest.FixtureRequest) -> Invalid:
    """The dates of a certificate that is not valid now, and what is to be said of it."""
    found: Invalid = request.param
    return found


async def test_a_servers_certificate_that_is_not_valid_now_is_named(
    certificates: Certificates, open_table: OpenTable, tmp_path: Path, invalid: Invalid
) -> None:
    made = make_certificates(tmp_path, authority=certificates, validity=invalid[0])
    with EtcdServer(certificates=made, client_certificates=True) as server:
        table = open_table(
            server.endpoint,
            cafile=certificates.cafile,
            certfile=certificates.client_certificate,
            keyfile=certificates.client_key,
        )
        assert await refusal(table) == (
            f"etcd at {server.endpoint} cannot be used: its certificate {invalid[1]}; replace it, or check the clock of this "
            "host"
        )


async def test_an_authoritys_certificate_that_is_not_valid_now_is_named(
    open_table: OpenTable, tmp_path: Path, invalid: Invalid
) -> None:
    authority = make_certificates(tmp_path / "authority", validity=invalid[0])
    made = make_certificates(tmp_path / "others", authority=authority)
    with EtcdServer(certificates=made) as server:
        assert await refusal(open_table(server.endpoint, cafile=made.cafile)) == (
            f"etcd at {server.endpoint} cannot be used: the certificate of an authority in --etcd-cafile {made.cafile} "
            f"{invalid[1]}; replace it, or check the clock of this host"
        )


async def test_a_client_certificate_that_is_not_valid_now_is_named(
    exclusive: EtcdServer,
    certificates: Certificates,
    open_table: OpenTable,
    tmp_path: Path,
    invalid: Invalid,
) -> None:
    made = make_certificates(tmp_path, authority=certificates, validity=invalid[0])
    files = {"cafile": made.cafile, "certfile": made.client_certificate, "keyfile": made.client_key}
    texts = {await refusal(open_table(exclusive.endpoint, **files)) for _ in range(3)}
    # Each time etcd may hang up before or after a request is written.
    assert texts == {
        f"etcd at {exclusive.endpoint} cannot be used: it refuses this host's certificate, --etcd-certfile "
        f"{made.client_certificate}, which {invalid[1]}; replace it and its key, or check the clock of this host"
    }


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("certificates") as lab:
        yield lab


def start_with_a_short_life(
    host: Host, store: list[str | Path], authority: Certificates, ours: Certificates
) -> datetime:
    """Start a daemon whose client certificate expires soon, but not before the daemon is ready; when it does."""
    for seconds in (5, 60):
        until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds)
        made = make_certificates(host.directory / str(seconds), authority=authority, validity=(YESTERDAY, until))
        replace(ours.client_certificate, made.client_certificate)
        replace(ours.client_key, made.client_key)
        try:
            host.start_overlaynet(store, ["--log-level", "debug"])
        except OverlaynetError:  # a slow machine
            host.daemon.kill()
        else:
            return until
    raise AssertionError("it was never ready in time")


def test_a_daemon_whose_certificate_expires_says_so_once_and_heals_when_it_is_replaced(lab: Lab) -> None:
    good = make_certificates(lab.directory / "good", [f"IP:{SWITCH_ADDRESS.ip}"])
    ours = copied(good, lab.directory / "ours")
    a, b = lab.hosts
    with EtcdServer(
        str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name, certificates=good, client_certificates=True
    ) as etcd:

        def store(certificates: Certificates) -> list[str | Path]:
            files: list[str | Path] = [
                "--etcd-cafile",
                certificates.cafile,
                "--etcd-certfile",
                certificates.client_certificate,
            ]
            return [
                "--store",
                "etcd",
                "--etcd-endpoints",
                etcd.endpoint,
                *files,
                "--etcd-keyfile",
                certificates.client_key,
            ]

        b.start_overlaynet(store(good))
        until = start_with_a_short_life(a, store(ours), good, ours)
        daemons = [host.daemon for host in lab.hosts]
        for host in lab.hosts:
            host.connect_containers()
        lab.wait_until_acquainted()
        before = a.status()
        near, far = lab.containers
        wait_until(lambda: near.reaches(far), PATIENCE, "a ping to arrive")
        wait_until(lambda: datetime.now(UTC) > until, 90, "the end of the certificate")
        assert a.status()["problems"] == {}, "what is connected stays so"
        etcd.stop()
        etcd.start()
        problem = (
            f"it refuses this host's certificate, --etcd-certfile {ours.client_certificate}, which has expired on "
            f"{until:%Y-%m-%d %H:%M:%S} UTC; replace it and its key, or check the clock of this host"
        )
        wait_until(lambda: problem in str(a.status()["problems"]), PATIENCE, "the daemon to say what is wrong")

        def told() -> list[int]:
            records = enumerate(daemons[0].records)
            return [at for at, record in records if "degraded" in record["message"] and problem in record["reason"]]

        (first,) = told()
        wait_until(
            lambda: sum(record["message"] == "watch broke" for record in daemons[0].records[first:]) >= 2,
            PATIENCE,
            "two more tries",
        )
        assert told() == [first], "once is enough"
        assert near.reaches(far), "traffic goes on"
        assert b.status()["peers"] == 1

        replace(ours.client_certificate, good.client_certificate)
        replace(ours.client_key, good.client_key)
        wait_until(lambda: a.status()["problems"] == {}, PATIENCE, "the end of all problems")
        after = a.status()
        assert (after["subnets"], after["peers"]) == (before["subnets"], 1)
        assert near.reaches(far)
        for daemon in daemons:
            assert not [record for record in daemon.records if record["message"] in ("peer removed", "lease lost")]
            assert daemon.stop() == 0


@pytest.mark.parametrize("missing", ["cafile", "certfile", "keyfile"])
async def test_a_missing_file_is_named(
    secured: EtcdServer, certificates: Certificates, open_table: OpenTable, missing: str
) -> None:
    files = {
        "cafile": certificates.cafile,
        "certfile": certificates.client_certificate,
        "keyfile": certificates.client_key,
    }
    table = open_table(secured.endpoint, **{**files, missing: "/nowhere/to-be-found.pem"})
    assert await refusal(table) == (
        f"--etcd-{missing}: cannot read /nowhere/to-be-found.pem: No such file or directory"
    )


async def test_a_file_that_is_no_certificate_is_named(
    secured: EtcdServer, certificates: Certificates, foreign: Certificates, open_table: OpenTable, tmp_path: Path
) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    text = await refusal(open_table(secured.endpoint, cafile=junk))
    assert text == f"--etcd-cafile: {junk} holds no certificate in PEM form"
    mixed = open_table(
        secured.endpoint,
        cafile=certificates.cafile,
        certfile=certificates.client_certificate,
        keyfile=foreign.client_key,
    )
    assert "are not a certificate and its key" in await refusal(mixed)


async def test_http_and_https_mixed_up_is_explained(
    secured: EtcdServer, guarded: EtcdServer, certificates: Certificates, open_table: OpenTable
) -> None:
    plain = open_table(secured.endpoint.replace("https", "http"))
    with pytest.raises(StoreUnavailable, match="if it speaks TLS, write https://"):
        await plain.get("config")
    tls = open_table(guarded.endpoint.replace("http", "https"), cafile=certificates.cafile)
    with pytest.raises(StoreUnavailable, match="if it does not speak TLS, write http://"):
        await tls.get("config")


async def test_a_gateway_that_is_off_is_named(open_table: OpenTable) -> None:
    with EtcdServer(arguments=["--enable-grpc-gateway=false"]) as server:
        text = await refusal(open_table(server.endpoint))
        assert "or its gateway is off (--enable-grpc-gateway)" in text
