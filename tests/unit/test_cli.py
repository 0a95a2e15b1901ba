"""The command line, on the file store, as subprocesses and in process."""

import argparse
import asyncio
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import attrs
import pytest

from overlaynet import __version__
from overlaynet.cli import BUILT_IN, main
from overlaynet.commands import Command
from overlaynet.errors import ConfigError, IdentityTaken, LeaseLost, OverlaynetError, SettingsError
from overlaynet.leases import TableStore
from overlaynet.model import Lease, Snapshot, Subnets
from overlaynet.records import encode_lease, lease_key
from overlaynet.stores._file_directory import Directory
from overlaynet.stores.file import FileTable


def overlaynet(*arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "overlaynet", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def store(directory: Path) -> list[str]:
    return ["--store", "file", "--store-path", str(directory / "store")]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in BUILT_IN:
        assert f"\n  {name}" in text
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"overlaynet {__version__}\n"


@pytest.mark.parametrize("command", BUILT_IN)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: overlaynet {command}" in capsys.readouterr().out


def test_an_unknown_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rnu"]) == 2
    assert "there is no command 'rnu'; did you mean 'run'?" in capsys.readouterr().err


def test_help_imports_neither_drivers_nor_heavy_libraries() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom overlaynet.cli import main\nmain(['--help'])\n"
        "heavy = {'requests', 'urllib3', 'pyroute2', 'etcd3gw', 'inotify_simple', 'rich', 'asyncio', 'pluggy', 'logging'}\n"
        "heavy |= {'importlib.metadata'} - before\n"
        "ours = {name for name in sys.modules if name.split('.')[0] == 'overlaynet'}\n"
        "print(*sorted(ours | heavy & set(sys.modules)), sep='\\n', file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert result.stderr.split() == ["overlaynet", "overlaynet.cli", "overlaynet.commands", "overlaynet.errors"]


def test_network_set_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["network", "show", *store(tmp_path)]) == 1
    assert "holds no network document; write one with" in capsys.readouterr().err
    arguments = [
        "--network",
        "10.244.0.0/16",
        "--backend",
        "udp",
        "--backend-option",
        "port=8286",
        "--subnet-len",
        "25",
    ]
    assert main(["network", "set", *arguments, *store(tmp_path)]) == 0
    assert "is now:" in capsys.readouterr().out
    assert main(["network", "set", *arguments, *store(tmp_path)]) == 0
    assert "is already:" in capsys.readouterr().out
    assert main(["network", "show", *store(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "Network": "10.244.0.0/16",
        "SubnetLen": 25,
        "Backend": {"Type": "udp", "Port": 8286},
    }
    assert main(["network", "set", "--network", "10.245.0.0/16", *store(tmp_path)]) == 0
    assert "it was: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the overlay's network with --network, such as 10.244.0.0/16, or with --ipv6-network"),
        (["--network", "10.244.0.0/29"], "Network 10.244.0.0/29 is too small"),
        (["--network", "banana"], "Network is 'banana', which is not a network such as 10.244.0.0/16"),
        (
            ["--network", "10.244.0.0/16", "--subnet-min", "10.250.0.0"],
            "SubnetMin 10.250.0.0 lies outside 10.244.0.0/16",
        ),
        (
            ["--network", "10.244.0.0/16", "--subnet-min", "10.244.9.0", "--subnet-max", "10.244.2.0"],
            "SubnetMin 10.244.9.0 is above SubnetMax 10.244.2.0; swap them",
        ),
        (["--network", "10.244.0.0/16", "--backend", "upd"], "there is no backend 'upd'; did you mean 'udp'?"),
        (
            ["--network", "10.244.0.0/16", "--backend-option", "Prot=1"],
            "backend udp has no option 'Prot'; did you mean 'Port'?",
        ),
        (
            ["--network", "10.244.0.0/16", "--backend-option", "Port=x"],
            "backend udp: option Port must be a whole number, not 'x'",
        ),
        (
            ["--network", "10.244.0.0/16", "--backend-option", "Port"],
            "--backend-option 'Port' is not of the form KEY=VALUE",
        ),
    ],
)
def test_a_bad_network_is_one_sentence_and_changes_nothing(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["network", "set", *arguments, *store(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"overlaynet: {message}")
    assert error.count("\n") == 1
    assert main(["network", "show", *store(tmp_path)]) == 1


def test_leases_as_table_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leases", *store(tmp_path)]) == 0
    assert capsys.readouterr().out == "no leases\n"
    code = (
        "import asyncio, sys\n"
        "from overlaynet import network\nfrom overlaynet.model import LeaseRequest\n"
        "from overlaynet.stores.file import FileStore\nfrom ipaddress import IPv4Address\n"
        "async def main():\n"
        "    store = FileStore(FileStore.Options(path=sys.argv[1]))\n"
        '    the_network = network.parse(\'{"Network": "10.244.0.0/16"}\')\n'
        "    for n in 1, 2:\n"
        "        await store.acquire(the_network, LeaseRequest(f'host-{n}', 'run', IPv4Address(f'172.16.130.{n}')))\n"
        "    await store.aclose()\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], check=True, timeout=60)
    assert main(["leases", *store(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "host-1" in text
    assert "172.16.130.2" in text
    assert "24 h 00 min" in text
    assert main(["leases", "--json", *store(tmp_path)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {lease["node"] for lease in content["leases"]} == {"host-1", "host-2"}
    assert all(86000 < lease["expires_in_seconds"] <= 86400 for lease in content["leases"])
    (tmp_path / "store" / "subnets" / "10.244.9.0-24").write_text("garbage")
    assert main(["leases", *store(tmp_path)]) == 0
    assert "cannot be read: subnets/10.244.9.0-24" in capsys.readouterr().err


def test_leases_watch_prints_again_after_each_change_until_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "overlaynet", "leases", "--watch", "--json", *store(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        try:
            assert watcher.stdout is not None
            assert json.loads(watcher.stdout.readline()) == {"leases": [], "reservations": [], "malformed": []}
            (tmp_path / "store" / "subnets").mkdir(exist_ok=True)
            (tmp_path / "store" / "subnets" / "10.244.9.0-24").write_text("garbage")
            assert json.loads(watcher.stdout.readline())["malformed"][0]["key"] == "subnets/10.244.9.0-24"
        finally:
            watcher.send_signal(signal.SIGINT)
        assert watcher.wait(20) == 130


def test_plugins_lists_the_built_in_drivers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["overlaynet.backends", "udp", "overlaynet", __version__, "ok"] in lines
    assert main(["plugins", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} >= {
        "udp",
        "etcd",
        "file",
        "memory",
        "netlink",
    }


def test_print_config_masks_secrets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERLAYNET_ETCD_PASSWORD", "hunter2")
    assert main(["run", "--print-config", "--store", "file"]) == 0
    text = capsys.readouterr().out
    assert 'store = "file"  # flag' in text
    assert "hunter2" not in text


def test_status_without_a_daemon_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--status-socket", str(tmp_path / "none.sock")]) == 1
    assert "is `overlaynet run` running" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = [sys.executable, "-m", "overlaynet", "run", "--print-config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


AWAY = ["--store", "etcd", "--etcd-endpoints", "http://127.0.0.1:9"]
"""A store that never answers."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--store", "etdc"], "there is no store 'etdc'; did you mean 'etcd'? (installed: etcd, file, memory)"),
        (["--store", "file", "--store-option", "paht=/x"], "store file has no option 'paht'; did you mean 'Path'?"),
        (["--router", "netlnik"], "there is no router 'netlnik'; did you mean 'netlink'? (installed: memory, netlink)"),
        (["--router-option", "protocol=no"], "router netlink: option Protocol must be a whole number, not 'no'"),
        (["--network", "10.0.0.0/30"], "Network 10.0.0.0/30 is too small"),
        (["--backend", "upd"], "there is no backend 'upd'; did you mean 'udp'? (installed: alloc, extension, "),
        (["--backend", "udp", "--backend-option", "port=3"], "backend udp: option Port is the same for all nodes; "),
        ([*AWAY, "--backend", "upd"], "there is no backend 'upd'; did you mean 'udp'? (installed: alloc, extension, "),
        ([*AWAY, "--router", "netlnik"], "there is no router 'netlnik'; did you mean 'netlink'? "),
    ],
)
def test_bad_flags_of_run_are_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = overlaynet("run", *store(tmp_path), "--status-socket", "", *arguments)
    assert result.returncode == 2, "a service manager need not try again"
    assert result.stderr.splitlines()[-1].startswith(f"overlaynet: {message}")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "store" / "config").exists()


# Reservations and releases


def stored_lease(directory: Path, subnet: str, ttl: float, **lease: Any) -> Lease:
    """Write a lease into the file store."""
    covered = Subnets(IPv4Network(subnet))
    of_a_day = Lease(covered, IPv4Address("192.0.2.1"), node="b", run="1", renewal_margin=3600)
    written = attrs.evolve(of_a_day, **lease)
    change_store(directory, lambda table: table.create(lease_key(covered), encode_lease(written), ttl))
    return written


def change_store(directory: Path, change: Callable[[FileTable], Awaitable[object]]) -> None:
    asyncio.run(_change(FileTable(Directory(str(directory / "store"))), change))


async def _change(table: FileTable, change: Callable[[FileTable], Awaitable[object]]) -> None:
    assert await change(table)
    await table.aclose()


def listed(directory: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["leases", "--json", *store(directory)]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


@pytest.fixture
def with_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["network", "set", "--network", "10.244.0.0/16", "--lease-ttl", "86400", *store(tmp_path)]) == 0
    capsys.readouterr()
    return tmp_path


def test_reserve_list_and_unreserve(with_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reserve", "10.244.7.0/24", "--node", "host-b", *store(with_network)]) == 0
    assert capsys.readouterr().out == "10.244.7.0/24 is reserved for node host-b\n"
    assert main(["reserve", "10.244.8.0/24", "--public-ip", "192.0.2.9", *store(with_network)]) == 0
    assert capsys.readouterr().out == "10.244.8.0/24 is reserved for the node at 192.0.2.9\n"
    stored_lease(with_network, "10.244.9.0/24", 600)
    content = listed(with_network, capsys)
    nobody: dict[str, Any] = {"node": None, "public_ipv4": None, "public_ipv6": None, "held": False}
    assert content["reservations"] == [
        nobody | {"subnets": ["10.244.7.0/24"], "node": "host-b"},
        nobody | {"subnets": ["10.244.8.0/24"], "public_ipv4": "192.0.2.9"},
    ]
    assert [lease["subnets"] for lease in content["leases"]] == [["10.244.9.0/24"]]
    assert main(["leases", *store(with_network)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"10\.244\.7\.0/24 +node host-b +no", shown)
    assert re.search(r"10\.244\.8\.0/24 +the node at 192\.0\.2\.9 +no", shown)
    assert main(["unreserve", "10.244.7.0/24", *store(with_network)]) == 0
    assert capsys.readouterr().out == "10.244.7.0/24 is not reserved any more\n"
    assert [found["subnets"] for found in listed(with_network, capsys)["reservations"]] == [["10.244.8.0/24"]]
    assert main(["unreserve", "10.244.7.0/24", *store(with_network)]) == 1
    assert capsys.readouterr().err == "overlaynet: 10.244.7.0/24 is not reserved; `overlaynet leases` lists what is\n"


def test_reserve_for_the_node_that_holds_it(with_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored_lease(with_network, "10.244.7.0/24", 600)
    assert main(["reserve", "10.244.7.0/24", "--node", "b", *store(with_network)]) == 0
    assert listed(with_network, capsys)["reservations"][0]["held"]


def test_reserve_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks = ["--network", "10.244.0.0/16", "--ipv6-network", "fd00:10:244::/48"]
    assert main(["network", "set", *networks, *store(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["reserve", "10.244.7.0/24", "--node", "b", *store(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "overlaynet: the network 10.244.0.0/16 and fd00:10:244::/48 has both families; name a subnet of its IPv6 network, "
        "too\n"
    )
    pair = ["10.244.7.0/24", "fd00:10:244:7::/64"]
    assert main(["reserve", *pair, "--public-ip", "2001:db8::9", *store(tmp_path)]) == 0
    (reservation,) = listed(tmp_path, capsys)["reservations"]
    assert (reservation["subnets"], reservation["public_ipv6"]) == (pair, "2001:db8::9")
    assert main(["unreserve", pair[1], *store(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["banana", "--node", "b"],
            "'banana' is not a subnet such as 10.244.7.0/24: the length of its prefix is missing",
        ),
        (
            ["10.244.7.1/24", "--node", "b"],
            "'10.244.7.1/24' is not a subnet such as 10.244.7.0/24: 10.244.7.1/24 has host",
        ),
        (
            ["10.245.7.0/24", "--node", "b"],
            "10.245.7.0/24 is not one that the network document grants; those are the /24 subnets from 10.244.1.0/24 to "
            "10.244.255.0/24",
        ),
        (["10.244.7.0/25", "--node", "b"], "10.244.7.0/25 is not one that the network document grants"),
        (["fd00::/64", "--node", "b"], "the network document has no IPv6 network, so fd00::/64 cannot be reserved"),
        (["10.244.7.0/24", "10.244.8.0/24", "--node", "b"], "name one subnet, or one of IPv4 and one of IPv6"),
        (["10.244.7.0/24", "--public-ip", "host-b"], "--public-ip is 'host-b', which is not an address"),
        (["10.244.7.0/24", "--node", ""], "--node must be a printable name"),
        (["10.244.9.0/24", "--node", "host-c"], "10.244.9.0/24 is held by node b at 192.0.2.1, not by node host-c"),
    ],
)
def test_what_cannot_be_reserved(
    arguments: list[str], message: str, with_network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored_lease(with_network, "10.244.9.0/24", 600)
    assert main(["reserve", *arguments, *store(with_network)]) == 1
    assert capsys.readouterr().err.startswith(f"overlaynet: {message}")
    assert listed(with_network, capsys)["reservations"] == []


def test_reserve_needs_the_network_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reserve", "10.244.7.0/24", "--node", "b", *store(tmp_path)]) == 1
    assert "holds no network document; write one with" in capsys.readouterr().err


def test_a_lease_that_is_overdue_is_released(with_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored_lease(with_network, "10.244.7.0/24", 2690)
    assert main(["release", "10.244.7.0/24", *store(with_network)]) == 0
    assert capsys.readouterr().out == "released: the lease on 10.244.7.0/24 of node b at 192.0.2.1\n"
    assert listed(with_network, capsys)["leases"] == []


def test_a_lease_that_may_be_a_live_nodes_is_released_by_force_only(
    with_network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored_lease(with_network, "10.244.7.0/24", 86_400 - 3600 - 1800)
    assert main(["release", "10.244.7.0/24", *store(with_network)]) == 1
    assert re.fullmatch(
        r"overlaynet: the lease on 10\.244\.7\.0/24 of node b at 192\.0\.2\.1 is to be renewed only in 21 h (29|30) min: its "
        r"node may be alive; stop it, or make sure that it is gone, and use --force\n",
        capsys.readouterr().err,
    )
    assert len(listed(with_network, capsys)["leases"]) == 1
    assert main(["release", "10.244.7.0/24", "--force", *store(with_network)]) == 0
    assert listed(with_network, capsys)["leases"] == []


def test_a_lease_that_is_about_to_be_renewed_is_not_overdue_yet(
    with_network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its node may be waiting for an answer of the store at this very moment."""
    stored_lease(with_network, "10.244.7.0/24", 2800)
    assert main(["release", "10.244.7.0/24", *store(with_network)]) == 1
    assert "is being renewed about now: its node may be alive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("margin", "left", "lifetime_now", "overdue"),
    [
        (3600, 2690, "60", True),  # what the node was started with counts, not what the document has come to say since
        (3600, 2690, "864000", True),
        (3600, 3700, "60", False),
        (40, 29, "86400", True),
        (40, 45, "86400", False),  # by the document, and by the margin that is set where nothing is said, it would be
        (40, 31, "86400", False),
    ],
)
def test_whether_a_lease_is_overdue_its_own_node_has_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    margin: int,
    left: float,
    lifetime_now: str,
    overdue: bool,
) -> None:
    assert main(["network", "set", "--network", "10.244.0.0/16", "--lease-ttl", lifetime_now, *store(tmp_path)]) == 0
    stored_lease(tmp_path, "10.244.7.0/24", left, renewal_margin=margin)
    for minutes in ("1", "1439"):
        monkeypatch.setenv("OVERLAYNET_SUBNET_LEASE_RENEW_MARGIN", minutes)
        if overdue:
            monkeypatch.setattr(TableStore, "remove", _refuse)
        assert main(["release", "10.244.7.0/24", *store(tmp_path)]) == 1
        assert ("at this very moment" if overdue else "its node may be alive") in capsys.readouterr().err


async def _refuse(*_: object) -> bool:
    return False


@pytest.mark.parametrize("of", [{"node": "", "run": ""}, {}], ids=["flannel's", "an older version's"])
def test_a_lease_that_does_not_say_when_it_is_renewed_is_released_by_force_only(
    with_network: Path, capsys: pytest.CaptureFixture[str], of: dict[str, Any]
) -> None:
    stored_lease(with_network, "10.244.7.0/24", 20, renewal_margin=None, **of)
    assert main(["release", "10.244.7.0/24", *store(with_network)]) == 1
    assert (
        "at 192.0.2.1 does not say when it is to be renewed, so nobody can tell whether its node is alive; if it is not, use "
        "--force\n"
    ) in capsys.readouterr().err
    assert main(["release", "10.244.7.0/24", "--force", *store(with_network)]) == 0


def test_a_lease_without_an_end_is_released_by_force_only(
    with_network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored_lease(with_network, "10.244.7.0/24", math.inf)
    assert main(["release", "10.244.7.0/24", *store(with_network)]) == 1
    assert "never expires, so nobody can tell whether its node is alive" in capsys.readouterr().err
    assert main(["release", "10.244.7.0/24", "--force", *store(with_network)]) == 0


def test_release_by_node_releases_all_or_nothing(with_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored_lease(with_network, "10.244.7.0/24", 10)
    stored_lease(with_network, "10.244.8.0/24", 80_000)
    stored_lease(with_network, "10.244.9.0/24", 10, node="c")
    assert main(["release", "--node", "b", *store(with_network)]) == 1
    assert len(listed(with_network, capsys)["leases"]) == 3
    assert main(["release", "--node", "b", "--force", *store(with_network)]) == 0
    assert [lease["node"] for lease in listed(with_network, capsys)["leases"]] == ["c"]
    assert main(["release", "--node", "b", *store(with_network)]) == 1
    assert "is of a node 'b'; `overlaynet leases` lists them" in capsys.readouterr().err


def test_a_record_that_cannot_be_read_is_removed_by_force_only(
    with_network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_store(with_network, lambda table: table.create("subnets/10.244.7.0-24", b"{"))
    assert main(["release", "10.244.7.0/24", *store(with_network)]) == 1
    assert "the record subnets/10.244.7.0-24, which cannot be read (its value is not JSON" in capsys.readouterr().err
    assert main(["release", "10.244.7.0/24", "--force", *store(with_network)]) == 0
    assert listed(with_network, capsys)["malformed"] == []


def test_a_lease_that_is_not_there_cannot_be_released(with_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["release", "10.244.7.0/24", *store(with_network)]) == 1
    assert "has no lease on 10.244.7.0/24; `overlaynet leases` lists them" in capsys.readouterr().err


def test_a_lease_that_is_renewed_meanwhile_is_not_released(
    with_network: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_lease(with_network, "10.244.7.0/24", 10)
    real = TableStore.leases

    async def leases(self: TableStore) -> Snapshot:
        snapshot = await real(self)
        record = await self.table.get("subnets/10.244.7.0-24")
        assert record is not None
        assert await self.table.replace(record, record.value, 86_400)
        return snapshot

    monkeypatch.setattr(TableStore, "leases", leases)
    assert main(["release", "10.244.7.0/24", *store(with_network)]) == 1
    assert "was written at this very moment, so its node is alive" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(listed(with_network, capsys)["leases"]) == 1


def test_a_released_lease_stays_reserved(with_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored_lease(with_network, "10.244.7.0/24", 10)
    assert main(["reserve", "10.244.7.0/24", "--node", "b", *store(with_network)]) == 0
    assert main(["release", "10.244.7.0/24", *store(with_network)]) == 0
    content = listed(with_network, capsys)
    assert content["leases"] == []
    assert len(content["reservations"]) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LeaseLost("another node has it"), 1),
        (ConfigError("the network document is wrong"), 1),
        (SettingsError("a flag is wrong"), 2),
        (IdentityTaken("another process is this node"), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_exit_status_says_if_it_is_of_use_to_try_again(
    error: OverlaynetError, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("overlaynet.cli._find", lambda name: Command("run", "be a node", lambda parser: None, run))
    assert main(["run"]) == status
    assert capsys.readouterr().err == f"overlaynet: {error}\n"
