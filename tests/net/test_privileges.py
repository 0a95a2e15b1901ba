"""The daemon as an unprivileged user with one capability, and as root that gives up what it does not need."""

import contextlib
import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlaynet.testing.daemons import DaemonProcess
from overlaynet.testing.namespaces import NetworkNamespace

ROOT = Path(__file__).parents[2]
NOBODY = 65534
NET_BIND_SERVICE, NET_ADMIN = 1 << 10, 1 << 12


@pytest.fixture
def host() -> Iterator[NetworkNamespace]:
    with NetworkNamespace(label="host") as made:
        made.ip(
            "link set lo up", "link add eth0 type veth peer name other", "link set other up", "link set eth0 up",
            "address add 172.16.130.140/24 dev eth0", "route add default via 172.16.130.1",
        )  # fmt: skip
        yield made


def within_reach(workplace: Path, *paths: Path) -> str:
    """Shell commands for a mount namespace in which others can pass to ``paths``, whatever lies above them."""
    keep, cover, restore = [], {}, []
    for number, path in enumerate(paths):
        closed = next((above for above in reversed(path.parents) if not above.stat().st_mode & 0o001), None)
        if closed is not None:
            keep.append(f"mkdir {workplace}/{number}; mount --bind {path} {workplace}/{number}")
            cover[closed] = f"mount -t tmpfs -o mode=755 none {closed}"
            restore.append(f"mkdir -p {path}; mount --bind {workplace}/{number} {path}")
    return "; ".join([*keep, *cover.values(), *restore]) or "true"


@contextlib.contextmanager
def running(
    host: NetworkNamespace, directory: Path, command: list[str | Path], **environment: str
) -> Iterator[DaemonProcess]:
    """A daemon on the file store in ``directory``, which every user can write to."""
    settings: list[str | Path] = ["--store", "file", "--store-path", directory / "store", "--network", "10.244.0.0/16"]
    settings += [
        "--subnet-file",
        directory / "run" / "subnet.env",
        "--status-socket",
        directory / "run" / "status.sock",
        "--state-directory",
        directory / "state",
    ]
    log = directory / "log"
    with log.open("wb") as output:
        process = host.popen(
            [*command, *settings, "--log-format", "json", "--log-level", "debug"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
    daemon = DaemonProcess("host", process, log, directory / "run" / "subnet.env")
    try:
        yield daemon
    finally:
        if daemon.running:
            daemon.kill()


def capabilities(process: int) -> dict[str, int]:
    """The capability sets of all threads, which are the same for each."""
    found = set()
    for status in Path("/proc", str(process), "task").glob("*/status"):
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        found.add(tuple((name, int(lines[name], 16)) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")))
        assert lines["NoNewPrivs"].strip() == "1"
    assert len(found) == 1
    return dict(found.pop())


def overlaynet_run() -> list[str | Path]:
    return [sys.executable, "-m", "overlaynet", "run"]


def test_an_unprivileged_user_with_one_capability_can_run_it(host: NetworkNamespace, tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    temporary = Path(tempfile.gettempdir())
    for above in itertools.takewhile(lambda path: path != temporary, tmp_path.parents):  # for their owner only
        above.chmod(above.stat().st_mode | 0o011)
    as_nobody = (
        f"exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --inh-caps -all,+net_admin"
        f' --ambient-caps -all,+net_admin --bounding-set -all,+net_admin {shlex.join(map(str, overlaynet_run()))} "$@"'
    )
    device = "mount -t tmpfs -o mode=755 none /dev/net && mknod -m 666 /dev/net/tun c 10 200"
    script = f"set -e; umask 022; {within_reach(tmp_path, ROOT, Path(sys.base_prefix))}; {device}; {as_nobody}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        os.chown(tmp_path / "notify", NOBODY, NOBODY)
        manager.settimeout(30)
        command: list[str | Path] = ["unshare", "--mount", "sh", "-c", script, "overlaynet"]
        with running(host, tmp_path, command, NOTIFY_SOCKET=str(tmp_path / "notify")) as daemon:
            daemon.wait_until_ready()
            assert manager.recv(1000).decode().splitlines()[0] == "READY=1"
            sets = capabilities(daemon.pid)
            assert sets == dict.fromkeys(sets, NET_ADMIN)
            assert Path("/proc", str(daemon.pid)).stat().st_uid == NOBODY
            assert not [record for record in daemon.records if record["level"] in ("WARNING", "ERROR")], daemon.log
            link = host.ip_json("-d", "link", "show", "dev", "overlay0")[0]
            assert "UP" in link["flags"]
            modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()}
            assert modes == {"subnet.env": 0o644, "status.sock": 0o600}
            (identity,) = (tmp_path / "state").iterdir()
            assert [path.stat().st_mode & 0o777 for path in (identity.parent, identity)] == [0o700, 0o600]
            assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
            assert {path.stat().st_mode & 0o777 for path in (tmp_path / "store").rglob("*") if path.is_file()} == {
                0o600
            }
            assert daemon.stop() == 0
            assert manager.recv(1000).decode().splitlines()[0] == "STOPPING=1"


def test_root_gives_up_all_but_the_network(host: NetworkNamespace, tmp_path: Path) -> None:
    with running(host, tmp_path, overlaynet_run()) as daemon:
        daemon.wait_until_ready()
        sets = capabilities(daemon.pid)
        wanted = NET_ADMIN | NET_BIND_SERVICE
        assert sets == {"CapEff": wanted, "CapPrm": wanted, "CapInh": wanted, "CapBnd": wanted, "CapAmb": 0}
        assert daemon.stop() == 0


def test_root_may_keep_everything(host: NetworkNamespace, tmp_path: Path) -> None:
    with running(host, tmp_path, [*overlaynet_run(), "--privileges", "keep"]) as daemon:
        daemon.wait_until_ready()
        status = Path("/proc", str(daemon.pid), "status").read_text()
        assert f"CapEff:\t{Path('/proc/self/status').read_text().split('CapEff:')[1].split()[0]}" in status
        assert daemon.stop() == 0


def test_the_unit_is_sound() -> None:
    unit = ROOT / "systemd" / "overlaynet.service"
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "overlaynet.service" in line]
    # It is not installed here; nothing else may be said of it.
    assert [line for line in complaints if "is not executable" not in line] == []
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--json=short", unit],
        capture_output=True,
        text=True,
        check=True,
    )
    exposed = {entry["json_field"] for entry in json.loads(done.stdout) if entry["set"] is False}
    assert "ProtectKernelTunables" in exposed  # kernel parameters of the device are written
    assert not exposed & {"NoNewPrivileges", "ProtectSystem", "ProtectHome", "RestrictNamespaces", "LockPersonality"}
