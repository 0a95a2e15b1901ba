"""Two hosts with ``overlaynet run --backend tls``, as root: pings and TCP between their containers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlaynet.testing import namespaces
from overlaynet.testing.lab import Lab, wait_until
from overlaynet_tls import TlsOptions

RECEIVE = "import socket, sys; s = socket.create_server(('', 9000)); c, _ = s.accept(); n = 0\n"
RECEIVE += "while data := c.recv(1 << 16): n += len(data)\nprint(n)"
SEND = "import socket, sys; s = socket.create_connection((sys.argv[1], 9000)); s.sendall(bytes(5_000_000))"


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Two hosts on one switch, with a container each."""
    if missing := namespaces.requirements():
        pytest.skip(f"not on this machine: {'; '.join(missing)}")
    with Lab("tls") as lab:
        yield lab


def test_containers_reach_each_other_by_ping_and_tcp(
    lab: Lab, tmp_path: Path, make_options: Callable[..., TlsOptions]
) -> None:
    options = make_options(*(str(host.address.ip) for host in lab.hosts))
    own = ["Certificate", "Key", "Authority"]
    files = [options.certificate, options.key, options.authority]
    extra = [word for name, file in zip(own, files, strict=True) for word in ("--backend-option", f"{name}={file}")]
    for host in lab.hosts:
        host.start_overlaynet(lab.file_store, ["--backend", "tls", *extra])
        host.connect_containers()
    lab.wait_until_acquainted()
    first, second = lab.containers
    for sender, receiver in ((first, second), (second, first)):
        output = sender.namespace.execute(["ping", "-c", "3", "-i", "0.2", "-W", "5", str(receiver.ip)]).stdout
        assert "3 received" in output
    size = lab.hosts[0].namespace.ip_json("link", "show", "overlay0")[0]["mtu"] - 28
    output = first.namespace.execute(["ping", "-c", "1", "-M", "do", "-s", str(size), str(second.ip)]).stdout
    assert "1 received" in output

    with (tmp_path / "count").open("wb") as count:
        receiver_process = second.namespace.popen(["python3", "-c", RECEIVE], stdout=count)
    wait_until(lambda: "9000" in second.namespace.execute(["ss", "-ltn"]).stdout, 10, "the receiver")
    first.namespace.execute(["python3", "-c", SEND, str(second.ip)])
    assert receiver_process.wait(20) == 0
    assert (tmp_path / "count").read_text() == "5000000\n"

    for host in lab.hosts:
        packets = host.status()["packets"]
        assert isinstance(packets, dict)
        assert packets["drops"] == {}
        assert host.daemon.stop() == 0
        assert host.namespace.ip_json("link", "show", "type", "tun") == []
