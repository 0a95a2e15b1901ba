"""The store ``etcd``: leases as flannel keeps them in etcd v3.

Nodes that run overlaynet and nodes that run flanneld share a network when they share its prefix.
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from overlaynet.errors import ConfigError
from overlaynet.leases import TableStore
from overlaynet.options import option
from overlaynet.stores._etcd_settings import Credentials, Timeouts, TLSFiles, key_root, parse_endpoints
from overlaynet.table import Table


@attrs.frozen
class EtcdOptions:
    """Where etcd is, and how to get in."""

    endpoints: tuple[str, ...] = option(
        ("http://127.0.0.1:4001", "http://127.0.0.1:2379"),
        "URLs of the etcd members; whichever answers is used",
    )
    prefix: str = option("/coreos.com/network", "What all keys of this network begin with")
    cafile: str | None = option(None, "PEM file of the authorities that sign etcd's certificates", name="CAFile")
    certfile: str | None = option(None, "PEM file of the certificate to show to etcd", name="CertFile")
    keyfile: str | None = option(None, "PEM file of that certificate's key", name="KeyFile")
    username: str | None = option(None, "User of etcd")
    password: str | None = option(None, "Password of that user; better kept in a file", secret=True)
    password_file: str | None = option(None, "File that holds the password; read again for each new token")


class EtcdStore(TableStore):
    """Leases in etcd 3.4 or later, through its HTTP gateway.

    :raises ConfigError: if the options do not go together.
    """

    Options = EtcdOptions
    timeouts: ClassVar[Timeouts] = Timeouts()

    def __init__(self, options: EtcdOptions) -> None:
        super().__init__(options)
        self._endpoints = parse_endpoints(options.endpoints)
        self._root = key_root(options.prefix)
        self._tls = _tls_files(options)
        self._credentials = _credentials(options)
        if self._tls != TLSFiles() and all(endpoint.scheme == "http" for endpoint in self._endpoints):
            raise ConfigError(
                "--etcd-cafile, --etcd-certfile and --etcd-keyfile are for TLS, and no URL in --etcd-endpoints "
                "begins with https://; write https:// or leave the files out"
            )

    def __str__(self) -> str:
        return f"etcd at {', '.join(map(str, self._endpoints))}, prefix {self._root.rstrip('/') or '/'}"

    def make_table(self) -> Table:
        # Imported only now: the libraries behind it take a fifth of a second, and the commands that only look at the
        # options need none of them.
        from overlaynet.stores._etcd_client import EtcdClient  # noqa: PLC0415
        from overlaynet.stores._etcd_table import EtcdTable  # noqa: PLC0415

        return EtcdTable(EtcdClient(self._endpoints, self._tls, self._credentials, self.timeouts), self._root)


def _tls_files(options: EtcdOptions) -> TLSFiles:
    if (options.certfile is None) != (options.keyfile is None):
        given, missing = ("certfile", "keyfile") if options.keyfile is None else ("keyfile", "certfile")
        raise ConfigError(f"--etcd-{given} is given without --etcd-{missing}; a client certificate needs both")
    return TLSFiles(options.cafile, options.certfile, options.keyfile)


def _credentials(options: EtcdOptions) -> Credentials | None:
    if options.password is not None and options.password_file is not None:
        raise ConfigError("--etcd-password and --etcd-password-file are both given; give one of them")
    if options.password is None and options.password_file is None:
        if options.username is None:
            return None
        raise ConfigError("--etcd-username is given without a password; give --etcd-password-file")
    if options.username is None:
        raise ConfigError("a password for etcd is given without --etcd-username")
    return Credentials(options.username, options.password, options.password_file)
