"""The dates of certificates, and what is said when one is not valid now. Against a real etcd: tests/faults."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from overlaynet.stores import _etcd_errors as errors
from overlaynet.stores._etcd_certificates import Validity, client_problem, server_problem, validities
from overlaynet.stores._etcd_settings import Endpoint, TLSFiles
from overlaynet.testing.etcd import make_certificates

NOW = datetime.now(UTC).replace(microsecond=0)
NOWHERE = Endpoint("https", "127.0.0.1", 9)


def files(directory: Path, since: datetime, until: datetime) -> TLSFiles:
    made = make_certificates(directory, validity=(since, until))
    return TLSFiles(str(made.cafile), str(made.client_certificate), str(made.client_key))


def text_of(files: TLSFiles) -> str:
    assert files.certfile is not None
    return Path(files.certfile).read_text()


@pytest.mark.parametrize(
    "until",
    [datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(2050, 1, 1, tzinfo=UTC)],
    ids=["two digits of the year", "four digits of the year"],
)
def test_the_dates_are_those_that_the_certificate_was_made_with(tmp_path: Path, until: datetime) -> None:
    assert validities(text_of(files(tmp_path, NOW, until))) == [Validity(NOW, until)]


def test_all_certificates_of_a_file_are_read_in_their_order(tmp_path: Path) -> None:
    early, late = NOW + timedelta(days=1), NOW + timedelta(days=2)
    texts = [text_of(files(tmp_path / str(until.day), NOW, until)) for until in (late, early)]
    found = validities("\n".join(["a chain", *texts]))
    assert [each.until for each in found] == [late, early]


def test_whatever_is_damaged_is_no_certificate(tmp_path: Path) -> None:
    """A stranger's server may show anything."""
    until = NOW + timedelta(days=1)
    der = ssl.PEM_cert_to_DER_cert(text_of(files(tmp_path, NOW, until)))
    for length in range(1, der.index(f"{until:%y%m%d%H%M%S}".encode()) + 12):
        short = ssl.DER_cert_to_PEM_cert(der[:length])
        with pytest.raises(ValueError):  # noqa: PT011 - each is damaged in a way of its own
            validities(short)
    assert validities("no certificate at all") == []


def test_a_certificate_that_only_the_server_takes_for_expired_hints_at_the_clocks(tmp_path: Path) -> None:
    given = files(tmp_path, NOW - timedelta(hours=1), NOW + timedelta(days=1))
    assert client_problem(given, untimely=False) is None
    text = client_problem(given, untimely=True)
    assert text is not None
    assert text.startswith(
        f"it takes this host's certificate, --etcd-certfile {given.certfile}, for one that has expired"
    )
    assert f"(from {NOW - timedelta(hours=1):%Y-%m-%d %H:%M:%S} UTC to " in text
    assert text.endswith("; check the clocks of both hosts")


def test_where_there_is_no_certificate_nothing_is_wrong_with_its_dates(tmp_path: Path) -> None:
    assert client_problem(TLSFiles(), untimely=True) is None
    assert client_problem(TLSFiles(None, str(tmp_path / "gone.crt"), str(tmp_path / "gone.key")), untimely=True) is None


@pytest.mark.parametrize(
    ("alert", "untimely"),
    [("SSLV3_ALERT_CERTIFICATE_EXPIRED", True), ("SSLV3_ALERT_BAD_CERTIFICATE", False)],
)
def test_a_server_may_say_that_it_is_the_dates(alert: str, untimely: bool) -> None:
    error = ssl.SSLError(1, alert)
    error.reason = alert
    found = errors.from_exception(error, NOWHERE)
    assert isinstance(found, errors.ClientNotTrusted)
    assert found.untimely == untimely


def test_a_server_that_does_not_answer_again_is_judged_by_what_openssl_said() -> None:
    text = server_problem(NOWHERE, TLSFiles(), 1.0, "certificate has expired")
    assert text == (
        "its certificate, or an authority's behind it, is not valid now (certificate has expired); replace it, or check "
        "the clock of this host"
    )
