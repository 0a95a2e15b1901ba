"""Where etcd is and how to get in: endpoints, TLS files, credentials, time limits. No network here."""

from __future__ import annotations

import os
import posixpath
import ssl
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import attrs

from overlaynet.errors import ConfigError, StoreError

_LEAST_ANSWER = 1.0
"""Seconds that any member is given for an answer, however short a lifetime is."""


@attrs.frozen
class Timeouts:
    """How long the etcd store waits, in seconds."""

    connect: float = 3.0
    """For a connection, before the next endpoint is tried."""
    answer: float = 10.0
    """For an answer. A member that lost the others answers only after 7 seconds."""
    whole: float = 30.0
    """For a whole request, failed endpoints included: one that answers byte by byte would take for ever."""
    silence: float = 5.0
    """For a sign of life on a watch, before its member is asked for one: at most, and never less than three quarters."""
    patience: float = 5.0
    """For a watch that broke to be opened again, before that is reported: the restart of a member is no news."""
    stay: float = 60.0
    """For a sign of life on a watch, before it is ended although no other member answers either."""

    def for_lifetime(self, seconds: float) -> Timeouts:
        """These limits for a client that renews a record which lives for so many seconds.

        There are two thirds of the lifetime for that, or more (see :func:`overlaynet.lease_keeping.renewal_margin`), and
        a renewal counts after three requests. One that takes a third of it is given up, so that a member that hangs
        leaves enough for another; those of a member that always takes as long would come too late all the same.
        """
        answer = min(self.answer, max(_LEAST_ANSWER, seconds * 2 / 9))
        return attrs.evolve(self, connect=min(self.connect, answer), answer=answer)


@attrs.frozen
class Endpoint:
    """The URL of one etcd member, taken apart."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def parse_endpoints(urls: Sequence[str]) -> tuple[Endpoint, ...]:
    """The endpoints, each once, in the order given. :raises ConfigError: that never repeats a password from a URL."""
    endpoints = tuple(dict.fromkeys(map(_parse_endpoint, urls)))
    if not endpoints:
        raise ConfigError("--etcd-endpoints names no etcd; give URLs such as http://10.0.0.1:2379, separated by commas")
    return endpoints


def _parse_endpoint(url: str) -> Endpoint:
    if "@" in url:
        raise ConfigError(
            "--etcd-endpoints: a URL must not hold a user or password; give --etcd-username and --etcd-password-file"
        )
    shown = f"--etcd-endpoints: {url!r}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{shown} is not a URL such as http://10.0.0.1:2379: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{shown} is not a URL such as http://10.0.0.1:2379 or https://etcd.example:2379")
    if port is None or port == 0:
        raise ConfigError(f"{shown} names no port; etcd's is usually 2379")
    if parts.path not in ("", "/") or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise ConfigError(f"{shown} has more than scheme, host and port; the place in etcd is given by --etcd-prefix")
    return Endpoint(parts.scheme, parts.hostname, port)


def key_root(prefix: str) -> str:
    """What every key of the table begins with, given ``--etcd-prefix``: cleaned as flannel does (Go's ``path.Join``).

    ``/coreos.com//network/`` gives ``/coreos.com/network/``; no leading slash is added.
    """
    if not prefix:
        return ""
    joined = posixpath.normpath(f"{prefix}/key")
    if joined.startswith("//"):  # normpath keeps two leading slashes, for POSIX; Go does not
        joined = joined[1:]
    return joined.removesuffix("key")


@attrs.frozen
class TLSFiles:
    """The PEM files of a TLS client; ``None`` for those not given."""

    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None

    def state(self) -> tuple[object, ...]:
        """Something that changes when one of the files is replaced, written, or gone. Cheap."""
        return tuple(_file_state(path) for path in (self.cafile, self.certfile, self.keyfile) if path is not None)

    def context(self) -> ssl.SSLContext:
        """Read the files. Without a CA file, the authorities of the system are trusted. Server names are checked.

        :raises StoreError: naming the file that cannot be read.
        """
        context = ssl.create_default_context() if self.cafile is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.cafile is not None:
            _check_readable(self.cafile, "--etcd-cafile")
            try:
                context.load_verify_locations(cafile=self.cafile)
            except ssl.SSLError as error:
                raise StoreError(f"--etcd-cafile: {self.cafile} holds no certificate in PEM form") from error
        if self.certfile is not None and self.keyfile is not None:
            _check_readable(self.certfile, "--etcd-certfile")
            _check_readable(self.keyfile, "--etcd-keyfile")
            try:
                # A password given here keeps OpenSSL from asking for one on the terminal.
                context.load_cert_chain(self.certfile, self.keyfile, password=lambda: b" ")
            except ssl.SSLError as error:
                raise StoreError(
                    f"--etcd-certfile {self.certfile} and --etcd-keyfile {self.keyfile} are not a certificate and its "
                    f"key, in PEM form and not encrypted"
                ) from error
        return context


@attrs.frozen
class Credentials:
    """A user of etcd, and the password or the file that holds it."""

    username: str
    password: str | None = attrs.field(default=None, repr=False)
    password_file: str | None = None

    def read_password(self) -> str:
        """The password; a file is read anew each time, so it may be replaced. :raises StoreError: naming the file."""
        if self.password_file is None:
            return self.password or ""
        _check_readable(self.password_file, "--etcd-password-file")
        try:
            password = Path(self.password_file).read_text(encoding="utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise StoreError(f"--etcd-password-file: {self.password_file} is not UTF-8 text") from None
        if not password:
            raise StoreError(f"--etcd-password-file: {self.password_file} is empty")
        return password


def _file_state(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _check_readable(path: str, option: str) -> None:
    """Say which file is missing; what reads it afterwards may not."""
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise StoreError(f"{option}: cannot read {path}: {error.strerror}") from error
