"""What the etcd store takes as settings, and what it says about those it does not take."""

from pathlib import Path
from typing import Any

import pytest

from overlaynet.errors import ConfigError, StoreError
from overlaynet.lease_keeping import LEAST_PAUSE, renewal_margin
from overlaynet.network import DEFAULT_LEASE_TTL, MINIMUM_LEASE_TTL
from overlaynet.options import parse
from overlaynet.stores._etcd_settings import Credentials, Endpoint, Timeouts, TLSFiles, key_root, parse_endpoints
from overlaynet.stores.etcd import EtcdOptions, EtcdStore

HTTP = ("http://10.0.0.1:2379",)
HTTPS = ("https://10.0.0.1:2379",)


@pytest.mark.parametrize(
    ("prefix", "root"),
    [  # what Go's path.Join(prefix, "config") gives, without "config"
        ("/coreos.com/network", "/coreos.com/network/"),
        ("/coreos.com/network/", "/coreos.com/network/"),
        ("//coreos.com//network//", "/coreos.com/network/"),
        ("coreos.com/network", "coreos.com/network/"),
        ("/a/../b/./c", "/b/c/"),
        ("/..", "/"),
        ("..", "../"),
        (".", ""),
        ("", ""),
        ("/", "/"),
        ("//", "/"),
        ("///a", "/a/"),
        ("/netz/größe", "/netz/größe/"),
        ("/monkey", "/monkey/"),
        ("key", "key/"),
    ],
)
def test_keys_are_joined_as_flannel_joins_them(prefix: str, root: str) -> None:
    assert key_root(prefix) == root


def test_endpoints_are_taken_apart() -> None:
    assert parse_endpoints(["http://a:1", "https://[::1]:2379/", "http://a:1/"]) == (
        Endpoint("http", "a", 1),
        Endpoint("https", "::1", 2379),
    )
    assert [str(endpoint) for endpoint in parse_endpoints(["http://a:1/", "https://[::1]:2379"])] == [
        "http://a:1",
        "https://[::1]:2379",
    ]


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("10.0.0.1:2379", "is not a URL such as"),
        ("localhost", "is not a URL such as"),
        ("ftp://a:1", "is not a URL such as"),
        ("http://:2379", "is not a URL such as"),
        ("", "is not a URL such as"),
        ("http://[::1:2379", "is not a URL such as"),
        ("http://a:port", "is not a URL such as"),
        ("http://a:65536", "is not a URL such as"),
        ("http://a", "names no port"),
        ("http://a:0", "names no port"),
        ("http://a:1/v3", "has more than scheme, host and port"),
        ("http://a:1?x=1", "has more than scheme, host and port"),
        ("http://a:1#x", "has more than scheme, host and port"),
        ("http://a:1/\n", "has more than scheme, host and port"),
        ("http://a b:1", "has more than scheme, host and port"),
    ],
)
def test_an_endpoint_that_is_no_url_of_etcd_is_named(url: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match="--etcd-endpoints: ") as caught:
        EtcdStore(EtcdOptions(endpoints=("http://fine:2379", url)))
    assert complaint in str(caught.value)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("url", ["http://root:hunter2@a:2379", "root:hunter2@a:2379", "http://hunter2@[:2379"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="must not hold a user or password") as caught:
        EtcdStore(EtcdOptions(endpoints=(url,)))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"endpoints": ()}, "names no etcd"),
        ({"endpoints": HTTPS, "certfile": "c"}, "--etcd-certfile is given without --etcd-keyfile"),
        ({"endpoints": HTTPS, "keyfile": "k"}, "--etcd-keyfile is given without --etcd-certfile"),
        ({"endpoints": HTTP, "cafile": "ca"}, "no URL in --etcd-endpoints begins with https://"),
        ({"endpoints": HTTP, "certfile": "c", "keyfile": "k"}, "no URL in --etcd-endpoints begins with https://"),
        ({"username": "joe"}, "--etcd-username is given without a password"),
        ({"password": "hunter2"}, "without --etcd-username"),
        ({"password_file": "f"}, "without --etcd-username"),
        ({"username": "joe", "password": "hunter2", "password_file": "f"}, "are both given"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EtcdStore(EtcdOptions(**options))
    assert complaint in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_store_says_where_it_is_and_keeps_its_secret() -> None:
    options = EtcdOptions(endpoints=(*HTTP, *HTTPS), prefix="//a/b/", username="joe", password="hunter2", cafile="ca")
    store = EtcdStore(options)
    assert str(store) == "etcd at http://10.0.0.1:2379, https://10.0.0.1:2379, prefix /a/b"
    assert "hunter2" not in repr(options) + repr(store) + repr(Credentials("joe", "hunter2"))


def test_the_defaults_are_those_of_flannel() -> None:
    store = EtcdStore(parse(EtcdOptions, {}, "store etcd"))
    assert str(store) == "etcd at http://127.0.0.1:4001, http://127.0.0.1:2379, prefix /coreos.com/network"


def test_the_options_are_read_from_text() -> None:
    text = {"endpoints": "https://a:1, https://b:2", "ca-file": "ca", "Password_File": "f", "username": "joe"}
    options = parse(EtcdOptions, {}, "store etcd", text)
    assert options == EtcdOptions(
        endpoints=("https://a:1", "https://b:2"), cafile="ca", password_file="f", username="joe"
    )


def test_system_authorities_are_trusted_when_none_is_given() -> None:
    context = TLSFiles().context()
    assert context.check_hostname
    assert context.verify_mode.name == "CERT_REQUIRED"


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    junk, nowhere = tmp_path / "junk", tmp_path / "nowhere"
    junk.write_bytes(b"\xff\xfe")
    for files, complaint in [
        (TLSFiles(cafile=str(nowhere)), f"--etcd-cafile: cannot read {nowhere}: No such file or directory"),
        (TLSFiles(cafile=str(tmp_path)), f"--etcd-cafile: cannot read {tmp_path}: Is a directory"),
        (TLSFiles(cafile=str(junk)), f"--etcd-cafile: {junk} holds no certificate in PEM form"),
        (TLSFiles(certfile=str(junk), keyfile=str(nowhere)), f"--etcd-keyfile: cannot read {nowhere}"),
        (TLSFiles(certfile=str(junk), keyfile=str(junk)), "are not a certificate and its key"),
    ]:
        with pytest.raises(StoreError) as caught:
            files.context()
        assert complaint in str(caught.value)


def test_a_password_file_ends_with_its_line(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    credentials = Credentials("joe", password_file=str(secret))
    for content, complaint in [(b"\n", "is empty"), (b"\xff\n", "is not UTF-8 text")]:
        secret.write_bytes(content)
        with pytest.raises(StoreError, match=f"--etcd-password-file: {secret} {complaint}"):
            credentials.read_password()
    secret.write_text(" with spaces \r\n")
    assert credentials.read_password() == " with spaces "


@pytest.mark.parametrize("minutes", [1, 60, 1439])
@pytest.mark.parametrize("ttl", [MINIMUM_LEASE_TTL, 6.0, 9.0, 20.0, 44.0, 45.0, 90.0, 91.0, 3600.0, DEFAULT_LEASE_TTL])
def test_a_hung_member_leaves_a_renewal_enough_of_its_margin(ttl: float, minutes: int) -> None:
    """It may hang at the one request that is not sent elsewhere: then the renewal fails, and begins anew after a pause."""
    limits = Timeouts().for_lifetime(ttl)
    pause = LEAST_PAUSE * 1.2
    rest = 1.0
    assert limits.connect <= limits.answer
    assert limits.answer + pause + rest <= renewal_margin(ttl, minutes)


def test_limits_are_shortened_for_short_lifetimes_alone_and_for_good() -> None:
    limits = Timeouts()
    assert limits.for_lifetime(DEFAULT_LEASE_TTL) == limits
    short = limits.for_lifetime(9.0)
    assert (short.connect, short.answer) == (2.0, 2.0)
    assert short.for_lifetime(DEFAULT_LEASE_TTL) == short
    assert short.for_lifetime(0.1).answer == 1.0, "what etcd may need on a busy machine"
