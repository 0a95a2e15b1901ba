"""What the tests have in common: certificates, which openssl makes for the run."""

from collections.abc import Callable

import pytest

from overlaynet.testing.etcd import make_certificates
from overlaynet_tls import TlsOptions

MakeOptions = Callable[..., TlsOptions]

_LOOPBACK = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
ADDRESSES = (*_LOOPBACK, "192.0.2.1", "192.0.2.2", "192.0.2.100", "2001:db8::1", "2001:db8::2", "2001:db8::64")
"""Those of the suites' hosts, with pretended devices and with real ones."""


@pytest.fixture(scope="session")
def make_options(tmp_path_factory: pytest.TempPathFactory) -> MakeOptions:
    """Makes the options of a backend whose certificate names some addresses, of an authority of its own each time."""

    def make(*addresses: str) -> TlsOptions:
        directory = tmp_path_factory.mktemp("certificates")
        made = make_certificates(directory, [f"IP:{address}" for address in addresses])
        return TlsOptions(
            certificate=str(made.server_certificate), key=str(made.server_key), authority=str(made.cafile)
        )

    return make


@pytest.fixture(scope="session")
def options(make_options: MakeOptions) -> TlsOptions:
    """Those of all members: the tests' hosts share a certificate, which names each of them."""
    return make_options(*ADDRESSES)
