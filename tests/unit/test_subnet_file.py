"""The subnet file: flannel's format to the byte, replaced in one step."""

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from overlaynet import network, subnet_file
from overlaynet.errors import ConfigError
from overlaynet.model import Lease, Subnets

NETWORK = network.parse('{"Network": "10.244.0.0/16"}')
LEASE = Lease(Subnets(IPv4Network("10.244.1.0/24")))


def test_the_text_is_flannels() -> None:
    assert subnet_file.render(NETWORK, LEASE, 1472) == (
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )


def test_both_families() -> None:
    both = network.parse('{"Network": "10.42.0.0/16", "EnableIPv6": true, "IPv6Network": "2001:cafe:42::/56"}')
    lease = Lease(Subnets(IPv4Network("10.42.7.0/24"), IPv6Network("2001:cafe:42:7::/64")))
    assert subnet_file.render(both, lease, 1450) == (
        "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.7.1/24\n"
        "FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42:7::1/64\n"
        "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )


def test_what_is_written_is_read_as_previous(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "subnet.env"
    subnet_file.write(path, subnet_file.render(NETWORK, LEASE, 1472))
    assert subnet_file.read_previous(path) == LEASE.subnets
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["subnet.env"]


@pytest.mark.parametrize(
    "text", ["", "FLANNEL_SUBNET=", "FLANNEL_SUBNET=10.244.1.1/24,10.244.2.1/24", "\xff\xfe", "=\n=="]
)
def test_a_damaged_file_names_no_previous_subnet(tmp_path: Path, text: str) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(text, encoding="latin-1")
    assert subnet_file.read_previous(path) is None


def test_no_file_names_no_previous_subnet(tmp_path: Path) -> None:
    assert subnet_file.read_previous(tmp_path / "none") is None


def test_a_file_that_cannot_be_written_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "subnet.env"
    for attempt in (subnet_file.check_writable, lambda path: subnet_file.write(path, "x")):
        with pytest.raises(ConfigError) as caught:
            attempt(path)
        assert str(caught.value) in (
            f"the subnet file {path} cannot be written: {reason}; choose another with --subnet-file"
            for reason in ("Not a directory", "File exists")
        )


def test_the_check_leaves_nothing(tmp_path: Path) -> None:
    subnet_file.check_writable(tmp_path / "subnet.env")
    assert list(tmp_path.iterdir()) == []
