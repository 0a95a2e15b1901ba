"""Requests to etcd's HTTP gateway: over several endpoints, with TLS, users and time limits. Blocking and thread-safe."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import requests
import urllib3.exceptions
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception
from requests.adapters import HTTPAdapter

from overlaynet.errors import OverlaynetError, StoreError, StoreUnavailable
from overlaynet.logs import fields
from overlaynet.stores import _etcd_certificates as certificates
from overlaynet.stores import _etcd_errors as errors
from overlaynet.stores import _etcd_replies as replies
from overlaynet.stores._etcd_errors import (
    ClientNotTrusted,
    EndpointError,
    NoSpace,
    NotValidNow,
    OutcomeUnknown,
    Refused,
)
from overlaynet.stores._etcd_pools import POOLS
from overlaynet.stores._etcd_settings import Credentials, Endpoint, Timeouts, TLSFiles

log = logging.getLogger(__name__)

T = TypeVar("T")

HEADERS = {"Grpc-Metadata-hasleader": "true"}
"""Makes a member that lost the others say so at once, instead of after 7 seconds or, on a watch, never."""

SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
]
"""A peer that vanished without a word is noticed within half a minute."""

_CONNECTIONS = 64


class EtcdClient:
    """Sends requests to whichever endpoint serves them; makes connections only when they are needed.

    Every method may be called from any thread, and blocks no longer than the time limits times the endpoints.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        tls: TLSFiles,
        credentials: Credentials | None,
        timeouts: Timeouts,
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.timeouts = timeouts
        self._tls = tls
        self._credentials = credentials
        self._lock = threading.Lock()
        self._gateways: dict[Endpoint, Etcd3Client] = {}
        self._context: ssl.SSLContext | None = None
        self._context_state: tuple[object, ...] = ()
        self._unreadable_state: tuple[object, ...] = ()
        self._token: str | None = None
        self._authenticated = False
        self._closed = False
        self._first = 0

    def __str__(self) -> str:
        return f"etcd at {', '.join(map(str, self.endpoints))}"

    def call(self, path: str, body: Mapping[str, Any], read: Callable[[object], T], *, repeatable: bool = True) -> T:
        """Send one request, to each endpoint in turn until one serves it, and read the answer.

        :param path: of the gateway, without the version: ``kv/range``.
        :param read: makes the result from the parsed answer; raises :exc:`OddReply`.
        :param repeatable: sending it twice does no harm. What is not repeatable goes to another endpoint only if the
            one before has surely not executed it.
        :raises OutcomeUnknown: a request that is not repeatable may or may not have been executed.
        :raises StoreUnavailable: no endpoint serves it now.
        :raises Refused: etcd refused the request itself.
        :raises StoreError: wrong credentials, wrong certificates, and what else does not heal.
        """
        failures: dict[Endpoint, EndpointError] = {}
        took: dict[Endpoint, float] = {}
        began = time.monotonic()
        for endpoint in self.rotation():
            asked_at = time.monotonic()
            try:
                result = self._call_endpoint(endpoint, path, body, read, repeatable)
            except EndpointError as error:
                log.debug("endpoint passed over", extra=fields(endpoint=endpoint, reason=error))
                failures[endpoint] = error
                took[endpoint] = time.monotonic() - asked_at
                self.pass_over(endpoint)
                if error.executed and not repeatable:
                    raise OutcomeUnknown(self._unserved_text(failures)) from error
            except Refused as refusal:
                raise self.explained(refusal) from refusal
            else:
                slow = time.monotonic() - began > self.timeouts.whole
                self._first = self.endpoints.index(endpoint) + slow
                return result
        # One that has said at once that it cannot is asked first again: not one that hangs.
        self._first = self.endpoints.index(min(took, key=took.__getitem__))
        raise self.unserved(failures)

    def rotation(self) -> Sequence[Endpoint]:
        """All endpoints, first the one that served last."""
        first = self._first % len(self.endpoints)
        return self.endpoints[first:] + self.endpoints[:first]

    def pass_over(self, endpoint: Endpoint) -> None:
        """Begin no request at this endpoint, which has failed, if another one is left."""
        if endpoint == self.rotation()[0]:
            self._first = self.endpoints.index(endpoint) + 1

    def hurry(self, lifetime: float) -> None:
        """Shorten the time limits, for good, to what the renewal of a record that lives so many seconds has room for."""
        with self._lock:
            self.timeouts = self.timeouts.for_lifetime(lifetime)

    def token(self, endpoint: Endpoint) -> str | None:
        """What to send as ``Authorization``; asks the endpoint for a token if there is none yet.

        ``None`` without credentials, and where etcd knows no users.
        """
        if self._credentials is None:
            return None
        with self._lock:
            if self._authenticated:
                return self._token
        user = {"name": self._credentials.username, "password": self._credentials.read_password()}
        try:
            # Without a header Authorization: a token that has expired would be refused here, too.
            token: str | None = self._post(endpoint, "auth/authenticate", user, None, replies.read_token)
        except Refused as refusal:
            if "authentication is not enabled" not in str(refusal):
                raise
            log.warning("etcd knows no users, going on without", extra=fields(endpoint=endpoint))
            token = None
        except EndpointError as error:
            error.executed = False  # what the token is for has not been sent
            raise
        with self._lock:
            self._token, self._authenticated = token, True
        return token

    def forget_token(self, token: str | None) -> bool:
        """Ask for a new token next time, unless another thread has got one meanwhile. ``False`` if that is no use."""
        with self._lock:
            if self._token == token:
                self._token, self._authenticated = None, False
        return self._credentials is not None

    def context(self) -> ssl.SSLContext:
        """The TLS settings, made of what the files hold now. :raises StoreError: naming the file that cannot be read.

        Files that cannot be read any more change nothing: they may be in the middle of being replaced.
        """
        with self._lock:
            return self._tls_context()

    def unserved(self, failures: Mapping[Endpoint, EndpointError]) -> OverlaynetError:
        """What to raise when every endpoint has failed."""
        if any(failure.hopeless for failure in failures.values()):
            # Read the files again, even if they look the same: clocks of file systems are coarse.
            self._context_state = ()
        if all(failure.hopeless for failure in failures.values()):
            return StoreError(f"{self} cannot be used: {_reasons(failures)}")
        return StoreUnavailable(self._unserved_text(failures))

    def explained(self, refusal: Refused) -> OverlaynetError:
        """The refusal, as a sentence for the operator."""
        message = str(refusal).removeprefix("etcdserver: ")
        user = "" if self._credentials is None else f" user {self._credentials.username!r}"
        if "authentication failed" in message:
            return StoreError(f"{self} refused{user}: {message}; check --etcd-username and --etcd-password")
        if "user name is empty" in message:
            return StoreError(f"{self} demands a user; give --etcd-username and --etcd-password-file")
        if "CommonName of client" in message:
            return StoreError(
                f"{self} takes no client certificate that has a common name (CN) now that it knows users; give one "
                f"without with --etcd-certfile, and --etcd-username"
            )
        if refusal.code == 7:
            return StoreError(
                f"{self} refused{user}: {message}; grant the user's role read and write for all keys under "
                f"--etcd-prefix, or check --etcd-username and --etcd-password"
            )
        if "space exceeded" in message:
            return NoSpace(
                f"{self} is out of space (NOSPACE alarm): compact and defragment it, then run etcdctl alarm disarm"
            )
        if refusal.code in (8, 16) or refusal.by_token:
            return StoreUnavailable(f"{self} does not serve us now: {message}")
        return Refused(refusal.code, f"{self} refused the request: {message}")

    def connection_failed(self, endpoint: Endpoint, error: Exception) -> EndpointError:
        """What an exception of a library means."""
        failure = errors.from_exception(error, endpoint)
        if failure.tls_end:
            failure = self._explain_tls_end(endpoint) or failure
        text = None
        if isinstance(failure, NotValidNow):
            text = certificates.server_problem(endpoint, self._tls, self.timeouts.connect, failure.verdict)
        elif isinstance(failure, ClientNotTrusted):
            text = certificates.client_problem(self._tls, untimely=failure.untimely)
        return failure if text is None else EndpointError(text, executed=False, hopeless=True)

    def too_slow(self) -> StoreUnavailable:
        """What to raise when a request is given up that still goes on; the next one begins at another endpoint."""
        self._first += 1
        return StoreUnavailable(f"{self} is too slow: no whole answer within {self.timeouts.whole:g} s")

    def check_open(self) -> None:
        """:raises StoreUnavailable: after :meth:`close`."""
        if self._closed:
            raise StoreUnavailable(f"the connection to {self} is closed")

    def close(self) -> None:
        """Close all connections; idempotent. What is under way ends with an error."""
        with self._lock:
            self._closed = True
            gateways = list(self._gateways.values())
            self._gateways.clear()
        for gateway in gateways:
            gateway.session.close()

    def _call_endpoint(
        self, endpoint: Endpoint, path: str, body: Mapping[str, Any], read: Callable[[object], T], repeatable: bool
    ) -> T:
        """Send the request to one endpoint; with a new token if the one we have is no longer good."""
        token = self.token(endpoint)
        try:
            return self._post(endpoint, path, body, token, read)
        except Refused as refusal:
            if not refusal.by_token or not self.forget_token(token):
                raise
        except EndpointError as error:
            if not error.hung_up or token is None:
                raise
            self.forget_token(token)
            if not repeatable:
                raise
        return self._post(endpoint, path, body, self.token(endpoint), read)

    def _post(
        self, endpoint: Endpoint, path: str, body: Mapping[str, Any], token: str | None, read: Callable[[object], T]
    ) -> T:
        headers = HEADERS if token is None else HEADERS | {"Authorization": token}
        gateway = self._gateway(endpoint)
        try:
            return read(gateway.post(gateway.get_url(path), json=body, headers=headers, allow_redirects=False))
        except Etcd3Exception as error:
            if error.args:  # an HTTP answer; what never became one has no arguments
                raise errors.from_reply(str(error), error.detail_text or "") from error
            raise self.connection_failed(endpoint, error) from error
        except replies.OddReply as error:
            raise EndpointError(f"its answer is not one of etcd's: {error}") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self.connection_failed(endpoint, error) from error

    def _explain_tls_end(self, endpoint: Endpoint) -> EndpointError | None:
        """Why a TLS connection ended without a word, if it can be found out.

        A server that misses a client certificate says so only after the handshake (TLS 1.3), and hangs up; who writes
        at that moment never reads what it said. So connect once more, and only read.
        """
        try:
            with (
                socket.create_connection((endpoint.host, endpoint.port), self.timeouts.connect) as plain,
                self.context().wrap_socket(plain, server_hostname=endpoint.host) as connection,
            ):
                connection.settimeout(1.0)
                connection.recv(1)
        except OSError as error:
            found = errors.from_exception(error, endpoint)
            return found if found.hopeless else None
        return None

    def _gateway(self, endpoint: Endpoint) -> Etcd3Client:
        with self._lock:
            self.check_open()
            context = self._tls_context() if endpoint.scheme == "https" else None
            if endpoint not in self._gateways:
                session = requests.Session()
                session.trust_env = False  # no proxy, no .netrc, no REQUESTS_CA_BUNDLE: they go behind our settings
                session.mount(f"{endpoint.scheme}://", _Adapter(context))
                self._gateways[endpoint] = Etcd3Client(
                    host=endpoint.host,
                    port=endpoint.port,
                    protocol=endpoint.scheme,
                    api_path="/v3/",
                    session=session,
                )
            gateway = self._gateways[endpoint]
            # It is handed through to requests, which takes a pair: to connect, to answer.
            gateway.timeout = (self.timeouts.connect, self.timeouts.answer)  # type: ignore[assignment]
            return gateway

    def _tls_context(self) -> ssl.SSLContext:
        """The TLS settings; made anew if their files have changed, for all connections from now on."""
        state = self._tls.state()
        if self._context is not None and state == self._context_state:
            return self._context
        try:
            context = self._tls.context()
        except StoreError as error:
            if self._context is None:
                raise
            if state != self._unreadable_state:
                self._unreadable_state = state
                log.warning("certificates not replaced, the former ones are kept", extra=fields(reason=error))
            return self._context
        self._context, self._context_state = context, state
        for gateway in self._gateways.values():
            gateway.session.close()
        self._gateways.clear()
        return context

    def _unserved_text(self, failures: Mapping[Endpoint, EndpointError]) -> str:
        return f"{self} does not answer ({_reasons(failures)})"


class _Adapter(HTTPAdapter):
    """Connections with our TLS settings and nothing of what ``requests`` would add to them."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context
        super().__init__(pool_maxsize=_CONNECTIONS)

    def init_poolmanager(self, *arguments: Any, **settings: Any) -> None:
        if self._context is not None:
            settings["ssl_context"] = self._context
        super().init_poolmanager(*arguments, socket_options=SOCKET_OPTIONS, **settings)
        self.poolmanager.pool_classes_by_scheme = POOLS

    def close(self) -> None:
        """Close the connections now: ``requests`` leaves that to the day when nobody, not even an error, knows them."""
        for key in self.poolmanager.pools.keys():  # noqa: SIM118 - the container cannot be iterated
            pool = self.poolmanager.pools.get(key)
            if pool is not None:
                pool.close()
        super().close()

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """The context verifies; ``requests`` would trust its own bundle of authorities beside it."""


def _reasons(failures: Mapping[Endpoint, EndpointError]) -> str:
    """The reasons, each once; told apart by endpoint if they differ."""
    texts = {str(failure) for failure in failures.values()}
    if len(texts) == 1:
        return texts.pop()
    return "; ".join(f"{endpoint}: {failure}" for endpoint, failure in failures.items())
