"""What can go wrong with one request to one endpoint of etcd, sorted by what to do about it."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Iterator

import requests
import urllib3.exceptions

from overlaynet.errors import StoreError, StoreUnavailable
from overlaynet.stores._etcd_replies import OddReply, read_refusal
from overlaynet.stores._etcd_settings import Endpoint

# gRPC codes after which the same request may well be served later, or by another endpoint: canceled, unknown ("context
# deadline exceeded"), deadline exceeded, aborted, internal, unavailable, data loss.
_PASSING = frozenset({1, 2, 4, 10, 13, 14, 15})


class EndpointError(Exception):
    """An endpoint did not serve a request; another one may. The text says why, in a few words."""

    def __init__(
        self, text: str, *, executed: bool = True, hopeless: bool = False, hung_up: bool = False, tls_end: bool = False
    ) -> None:
        super().__init__(text)
        self.executed = executed
        """A write may have taken effect all the same."""
        self.hopeless = hopeless
        """The endpoint will never serve us: a setting is wrong."""
        self.hung_up = hung_up
        """The connection was closed without a word; some versions of etcd 3.4 so answer a token that has expired."""
        self.tls_end = tls_end
        """A TLS connection was closed without a word; so may end one that lacks a client certificate."""


class NotValidNow(EndpointError):
    """OpenSSL takes the server's certificate, or an authority's, for one that has expired or is not valid yet."""

    def __init__(self, verdict: str) -> None:
        super().__init__(f"its certificate is not valid now ({verdict})", executed=False, hopeless=True)
        self.verdict = verdict
        """What OpenSSL says."""


class ClientNotTrusted(EndpointError):
    """The server does not take the certificate that we show, or misses one."""

    def __init__(self, alert: str) -> None:
        super().__init__(
            f"it demands a client certificate that it trusts ({alert}); check --etcd-certfile and --etcd-keyfile",
            executed=False,
            hopeless=True,
        )
        self.untimely = "expired" in alert
        """It says that the certificate has expired, or is not valid yet."""


class Refused(StoreError):
    """etcd understood the request and will not do it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        """gRPC code."""

    @property
    def by_token(self) -> bool:
        """It is the token that is refused, or that is missing: authenticate, and ask again."""
        text = str(self)
        return self.code == 16 or "user name is empty" in text or "revision of auth store is old" in text


class OutcomeUnknown(StoreUnavailable):
    """The write may or may not have taken effect; it is not sent again."""


class NoSpace(StoreUnavailable):
    """etcd is full, and writes nothing until an operator has made room; reads, deletions and its leases go on."""


def from_reply(reason: str, body: str | bytes) -> EndpointError | Refused:
    """What an HTTP answer other than 200 means.

    :param reason: the phrase of the status line.
    """
    refusal = read_refusal(body)
    if refusal is not None:
        return from_refusal(*refusal)
    text = body if isinstance(body, str) else body.decode(errors="replace")
    if "HTTPS server" in text:
        return EndpointError("it speaks TLS; write https:// in --etcd-endpoints", executed=False, hopeless=True)
    if reason == "Not Found":
        return EndpointError(
            "it has no /v3 HTTP gateway: it is not etcd 3.4 or later, or its gateway is off (--enable-grpc-gateway)",
            executed=False,
            hopeless=True,
        )
    return EndpointError(f"it answered {reason or 'with an error'}")


def from_refusal(code: int, message: str) -> EndpointError | Refused:
    """What a gRPC code and message of etcd mean."""
    if code in _PASSING:
        # Asked for by the header hasleader, and given before anything is done.
        return EndpointError(message.removeprefix("etcdserver: "), executed="no leader" not in message)
    return Refused(code, message)


def from_exception(error: BaseException, endpoint: Endpoint) -> EndpointError:
    """What an exception of ``requests``, ``http.client`` or ``socket`` means."""
    causes = list(_causes(error))

    def first(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    unconnected = (
        urllib3.exceptions.NewConnectionError,
        urllib3.exceptions.ConnectTimeoutError,
        urllib3.exceptions.ClosedPoolError,
        socket.gaierror,
    )
    executed = (
        first(*unconnected, requests.ConnectTimeout, ConnectionRefusedError, ssl.SSLCertVerificationError) is None
    )
    if (untrusted := first(ssl.SSLCertVerificationError)) is not None:
        return _untrusted(untrusted)
    if (tls := first(ssl.SSLError)) is not None:
        return _tls_failed(tls)
    if first(OddReply, requests.JSONDecodeError):
        return EndpointError("its answer is not one of etcd's", executed=True)
    by_tls = endpoint.scheme == "https"
    if first(http.client.RemoteDisconnected, http.client.IncompleteRead) is not None:
        hint = "" if by_tls else "; if it speaks TLS, write https://"
        return EndpointError(f"it closed the connection without an answer{hint}", hung_up=True)
    if first(ConnectionResetError) is not None:
        # So ends, too, what would have been an answer to the wrong protocol, if it is overtaken by the end.
        hint = "if it does not speak TLS, write http://" if by_tls else "if it speaks TLS, write https://"
        return EndpointError(f"it reset the connection; {hint}", executed=executed, tls_end=by_tls)
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror and not isinstance(cause, TimeoutError):
            return EndpointError(cause.strerror.lower(), executed=executed)
    if first(TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError) is not None:
        return EndpointError("no answer in time" if executed else "no connection in time", executed=executed)
    return EndpointError(type(error).__name__, executed=executed)


def _untrusted(error: BaseException) -> EndpointError:
    reason = str(getattr(error, "verify_message", "")).rstrip(".")
    code = getattr(error, "verify_code", 0)
    if code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
        return NotValidNow(reason)
    text = f"its certificate is not trusted ({reason}); check --etcd-cafile"
    if code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
        text = f"its certificate is another server's ({reason}); name it in --etcd-endpoints as its certificate does"
    return EndpointError(text, executed=False, hopeless=True)


def _tls_failed(error: BaseException) -> EndpointError:
    reason = str(getattr(error, "reason", None) or "")
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return ClientNotTrusted(reason.replace("_", " ").lower())
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
        return EndpointError("it does not speak TLS; write http:// in --etcd-endpoints", executed=False, hopeless=True)
    if isinstance(error, ssl.SSLEOFError):
        return EndpointError("it closed the TLS connection; if it does not speak TLS, write http://", tls_end=True)
    return EndpointError(f"TLS failed ({reason.replace('_', ' ').lower() or error})")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and all that it was made from: the libraries wrap each other's, each in its own way."""
    seen: set[int] = set()
    pending: list[object] = [error]
    while pending:
        found = pending.pop(0)
        if isinstance(found, BaseException) and id(found) not in seen:
            seen.add(id(found))
            yield found
            pending += [getattr(found, "reason", None), found.__cause__, found.__context__, *found.args]
