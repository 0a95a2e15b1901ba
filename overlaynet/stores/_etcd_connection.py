"""One connection to one endpoint of etcd that another thread can cut at any moment: for the endless answer of a watch."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from overlaynet._threads import start_thread
from overlaynet.stores import _etcd_errors as errors
from overlaynet.stores import _etcd_replies as replies
from overlaynet.stores._etcd_client import HEADERS, SOCKET_OPTIONS, EtcdClient
from overlaynet.stores._etcd_errors import EndpointError
from overlaynet.stores._etcd_settings import Endpoint

_READ_SIZE = 1 << 16
_LONGEST_ERROR = 1 << 16


class Connection:
    """Sends requests over a socket of its own, opened when it is needed. Only :meth:`cut` is for other threads.

    Plain ``http.client``: it knows no proxies, no ``.netrc`` and no environment, and does not hide the socket.
    """

    def __init__(self, client: EtcdClient, endpoint: Endpoint) -> None:
        self._client = client
        self._endpoint = endpoint
        self._http = http.client.HTTPConnection(endpoint.host, endpoint.port)
        self._http.auto_open = 0  # it would connect without TLS
        self._response: http.client.HTTPResponse | None = None
        self._silent: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._cut = False
        self._too_slow = False

    def call(self, path: str, body: Mapping[str, Any], token: str | None) -> object:
        """Send one request and return its parsed answer.

        :raises EndpointError: then the next request opens the socket anew. :raises Refused: if etcd does not want to.
        :raises NoThread: if the kernel gives none to watch over the time; nothing was sent.
        """
        with self._in_time():
            try:
                return replies.parse_json(self._post(path, body, token).read())
            except EndpointError:
                self.close()
                raise
            except (OSError, http.client.HTTPException, replies.OddReply) as error:
                self.close()
                raise self._failed(error) from error

    def stream(
        self, path: str, body: Mapping[str, Any], token: str | None, silent: Callable[[], None]
    ) -> Iterator[object]:
        """Send one request whose answer is a stream of documents, and yield them.

        The first one has to come as fast as any answer.

        :param silent: called after the first one, whenever nothing was heard for some seconds; what it raises ends the
            stream.
        :raises EndpointError: when the stream breaks or ends. :raises Refused: if etcd ends it with an error of ours.
        :raises NoThread: as for :meth:`call`.
        """
        with self._in_time():
            response = self._post(path, body, token)
        documents = replies.Documents()
        try:
            while data := response.read1(_READ_SIZE):
                for line in documents.feed(data):
                    yield self._document(line)
                    if self._silent is None:
                        self._silent = silent
                        self._set_timeout(self._silence())
            if rest := documents.finish():
                yield self._document(rest)
        except (OSError, http.client.HTTPException, replies.OddReply) as error:
            raise self._failed(error) from error
        raise EndpointError("it ended the watch")

    def cut(self) -> None:
        """End whatever :meth:`open`, :meth:`call` or :meth:`stream` waits for, from any thread; idempotent."""
        with self._lock:
            self._cut = True
            if self._socket is not None:
                _shut_down(self._socket)

    def close(self) -> None:
        """Close the socket; idempotent."""
        with self._lock:
            held, self._socket = self._socket, None
        if self._response is not None:
            self._response.close()
        self._http.close()
        if held is not None:
            held.close()

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """Break the connection when all this takes too long, although bytes arrive now and then."""
        self._too_slow = False
        timer = threading.Timer(self._client.timeouts.whole, self._give_up)
        timer.daemon = True
        start_thread(timer)
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        self._too_slow = True
        with self._lock:
            if self._socket is not None:
                _shut_down(self._socket)

    def _post(self, path: str, body: Mapping[str, Any], token: str | None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json", **HEADERS}
        if token is not None:
            headers["Authorization"] = token
        try:
            if self._http.sock is None:
                self._open()
            self._set_timeout(self._client.timeouts.answer)
            self._http.request("POST", f"/v3/{path}", json.dumps(body), headers)
            self._response = response = self._http.getresponse()
            if response.status == http.HTTPStatus.OK:
                return response
            text = response.read(_LONGEST_ERROR)
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error) from error
        raise errors.from_reply(response.reason, text)

    def _open(self) -> None:
        """Connect, with TLS if the endpoint says so."""
        self.close()  # what a server has left that closes after each answer
        if self._cut:
            raise EndpointError("cut")
        host = self._endpoint.host
        opened = socket.create_connection((host, self._endpoint.port), self._client.timeouts.connect)
        self._hold(opened)
        for option in SOCKET_OPTIONS:
            opened.setsockopt(*option)
        if self._endpoint.scheme == "https":
            opened = self._client.context().wrap_socket(opened, server_hostname=host, do_handshake_on_connect=False)
            self._hold(opened)
            opened.do_handshake()
        self._http.sock = _Socket(opened, self._time_is_up)

    def _hold(self, opened: socket.socket) -> None:
        """Make the socket known to :meth:`cut` and :meth:`close`."""
        with self._lock:
            self._socket = opened
            if self._cut:
                _shut_down(opened)

    def _set_timeout(self, seconds: float) -> None:
        if self._socket is not None:
            self._socket.settimeout(seconds)

    def _time_is_up(self) -> None:
        """Nothing was heard for as long as the socket's time limit says. :raises TimeoutError: if that is an end."""
        if self._silent is None:
            raise TimeoutError("timed out")
        self._silent()
        self._set_timeout(self._silence())

    def _silence(self) -> float:
        """Seconds; never twice the same, as a whole fleet hears its last event at once."""
        return self._client.timeouts.silence * random.uniform(0.75, 1.0)

    def _document(self, line: bytes) -> object:
        refusal = replies.read_refusal(line)
        if refusal is not None:
            raise errors.from_refusal(*refusal)
        return replies.parse_json(line)

    def _failed(self, error: Exception) -> EndpointError:
        if self._cut:
            return EndpointError("cut")
        if self._too_slow:
            return EndpointError(f"no whole answer within {self._client.timeouts.whole:g} s")
        return self._client.connection_failed(self._endpoint, error)


class _Socket:
    """What ``http.client`` needs of a socket; after a time limit has passed, it may be read on."""

    def __init__(self, opened: socket.socket, time_is_up: Callable[[], None]) -> None:
        self._socket = opened
        self._time_is_up = time_is_up
        self.sendall = opened.sendall

    def makefile(self, mode: str) -> io.BufferedReader:
        """What an answer is read from. Python's own refuses to read on after a time limit."""
        return io.BufferedReader(_Raw(self._socket, self._time_is_up))

    def close(self) -> None:
        """Nothing: the connection closes the socket, and an answer may still be read from it."""


class _Raw(io.RawIOBase):
    def __init__(self, opened: socket.socket, time_is_up: Callable[[], None]) -> None:
        self._socket = opened
        self._time_is_up = time_is_up

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                return self._socket.recv_into(buffer)
            except TimeoutError:
                self._time_is_up()


def _shut_down(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is not connected (any more), so nobody waits for it
        # Not the method of SSLSocket: that one takes the TLS state away from under the thread that reads.
        socket.socket.shutdown(opened, socket.SHUT_RDWR)
