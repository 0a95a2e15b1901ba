"""From when until when certificates are valid, and what is said when one of them is not valid now.

Python shows the dates of a certificate only once it has been found to be trusted, so they are read here.
"""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime
from pathlib import Path

import attrs

from overlaynet.stores._etcd_settings import Endpoint, TLSFiles

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME, _VERSION = 0x17, 0xA0
_CLOCK = "or check the clock of this host"


@attrs.frozen
class Validity:
    """From when until when a certificate is valid."""

    since: datetime
    until: datetime

    def problem(self) -> str | None:
        """What is wrong with such a certificate now, by the clock of this host; ``None`` if nothing is."""
        now = datetime.now(UTC)
        if now < self.since:
            return f"is not valid before {_shown(self.since)}"
        return f"has expired on {_shown(self.until)}" if now > self.until else None

    def __str__(self) -> str:
        return f"from {_shown(self.since)} to {_shown(self.until)}"


def validities(pem: str) -> list[Validity]:
    """Those of all certificates in a text, in their order. :raises ValueError: if one is damaged."""
    try:
        return [_read(ssl.PEM_cert_to_DER_cert(block)) for block in _PEM.findall(pem)]
    except IndexError:
        raise ValueError("a certificate ends too early") from None


def server_problem(endpoint: Endpoint, files: TLSFiles, timeout: float, verdict: str) -> str:
    """Which certificate it is that OpenSSL does not take for valid now: the server's, or an authority's behind it.

    Asks the server for its certificate once more.

    :param timeout: seconds to wait for the server.
    :param verdict: what OpenSSL says of it, which is said if no more can be found out.
    """
    try:
        shown = validities(ssl.get_server_certificate((endpoint.host, endpoint.port), timeout=timeout))
    except (OSError, ValueError):
        return f"its certificate, or an authority's behind it, is not valid now ({verdict}); replace it, {_CLOCK}"
    for each in shown:
        if problem := each.problem():
            return f"its certificate {problem}; replace it, {_CLOCK}"
    for each in [] if files.cafile is None else _of_file(files.cafile):
        if problem := each.problem():
            return f"the certificate of an authority in --etcd-cafile {files.cafile} {problem}; replace it, {_CLOCK}"
    return f"the certificate of an authority behind its own is not valid now ({verdict}); replace it, {_CLOCK}"


def client_problem(files: TLSFiles, *, untimely: bool) -> str | None:
    """What is wrong with the dates of the certificate that this host shows, and the server refused; ``None`` if nothing.

    :param untimely: the server says that it is because of its dates.
    """
    found = [] if files.certfile is None else _of_file(files.certfile)
    if not found:
        return None
    ours = f"this host's certificate, --etcd-certfile {files.certfile},"
    if problem := found[0].problem():
        return f"it refuses {ours} which {problem}; replace it and its key, {_CLOCK}"
    if untimely:
        return (
            f"it takes {ours} for one that has expired or is not valid yet ({found[0]}); check the clocks of both hosts"
        )
    return None


def _of_file(path: str) -> list[Validity]:
    """None if it cannot be read: that is said where it is used."""
    try:
        return validities(Path(path).read_text(encoding="ascii", errors="replace"))
    except (OSError, ValueError):
        return []


def _shown(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _read(der: bytes) -> Validity:
    """The dates of a certificate in DER form (RFC 5280). :raises ValueError: or :exc:`IndexError` if it is none."""
    _, at, _ = _element(der, 0)  # Certificate
    _, at, _ = _element(der, at)  # TBSCertificate
    if der[at] == _VERSION:
        _, _, at = _element(der, at)
    for _ in ("serial number", "signature", "issuer"):
        _, _, at = _element(der, at)
    _, at, _ = _element(der, at)  # Validity
    since, at = _time(der, at)
    until, _ = _time(der, at)
    return Validity(since, until)


def _time(der: bytes, at: int) -> tuple[datetime, int]:
    tag, begin, end = _element(der, at)
    digits = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(der[begin:end].decode("ascii"), digits).replace(tzinfo=UTC), end


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """The tag of the element at this place, and where its content begins and ends."""
    tag, size = der[at], der[at + 1]
    at += 2
    if size & 0x80:  # the size is written behind its own size
        count = size & 0x7F
        size, at = int.from_bytes(der[at : at + count], "big"), at + count
    return tag, at, at + size
