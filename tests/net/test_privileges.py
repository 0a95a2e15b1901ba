"""The daemon as an unprivileged user with one capability, and as root that gives up what it does not need."""

import contextlib
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlaynet.testing.daemons import DaemonProcess
from overlaynet.testing.lab import Lab, wait_until
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
    host: NetworkNamespace,
    directory: Path,
    command: list[str | Path],
    store: Path | None = None,
    **environment: str,
) -> Iterator[DaemonProcess]:
    """A daemon whose files lie in ``directory``, which its user can write to; on a file store, its own by default."""
    settings: list[str | Path] = ["--store", "file", "--store-path", store or directory / "store"]
    settings += ["--network", "10.244.0.0/16"]
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


def as_nobody(directory: Path) -> list[str | Path]:
    """``overlaynet run`` as an ordinary user with one capability, who owns ``directory`` from now on."""
    directory.mkdir(exist_ok=True)
    os.chown(directory, NOBODY, NOBODY)
    daemon = (
        f"exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --inh-caps -all,+net_admin"
        f' --ambient-caps -all,+net_admin --bounding-set -all,+net_admin {shlex.join(map(str, overlaynet_run()))} "$@"'
    )
    device = "mount -t tmpfs -o mode=755 none /dev/net && mknod -m 666 /dev/net/tun c 10 200"
    script = f"set -e; umask 022; {within_reach(directory, ROOT, Path(sys.base_prefix))}; {device}; {daemon}"
    return ["unshare", "--mount", "sh", "-c", script, "overlaynet"]


def test_an_unprivileged_user_with_one_capability_can_run_it(tmp_path: Path) -> None:
    """Two of them, on two hosts, carry packets between their containers."""
    os.chown(tmp_path, NOBODY, NOBODY)
    temporary = Path(tempfile.gettempdir())
    for above in itertools.takewhile(lambda path: path != temporary, tmp_path.parents):  # for their owner only
        above.chmod(above.stat().st_mode | 0o011)
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab("privileges", default_route=True))
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(tmp_path / "notify"))
        os.chown(tmp_path / "notify", NOBODY, NOBODY)
        manager.settimeout(30)
        daemons = []
        for host in lab.hosts:
            home = tmp_path / host.label
            told = {"NOTIFY_SOCKET": str(tmp_path / "notify")} if host is lab.hosts[0] else {}
            command = as_nobody(home)
            daemons.append(stack.enter_context(running(host.namespace, home, command, tmp_path / "store", **told)))
            host.subnet_file, host.status_socket = home / "run" / "subnet.env", home / "run" / "status.sock"
        for host, daemon in zip(lab.hosts, daemons, strict=True):
            daemon.wait_until_ready()
            host.connect_containers()
        assert manager.recv(1000).decode().splitlines()[0] == "READY=1"
        for source, destination in (lab.containers, reversed(lab.containers)):
            wait_until(lambda s=source, d=destination: s.reaches(d), 30, "a ping to arrive")  # type: ignore[misc]

        daemon, home = daemons[0], tmp_path / lab.hosts[0].label
        sets = capabilities(daemon.pid)
        assert sets == dict.fromkeys(sets, NET_ADMIN)
        assert Path("/proc", str(daemon.pid)).stat().st_uid == NOBODY
        assert not [record for record in daemon.records if record["level"] in ("WARNING", "ERROR")], daemon.log
        link = lab.hosts[0].namespace.ip_json("-d", "link", "show", "dev", "overlay0")[0]
        assert "UP" in link["flags"]
        modes = {path.name: path.stat().st_mode & 0o777 for path in (home / "run").iterdir()}
        assert modes == {"subnet.env": 0o644, "status.sock": 0o600}
        (identity,) = (home / "state").iterdir()
        assert [path.stat().st_mode & 0o777 for path in (identity.parent, identity)] == [0o700, 0o600]
        store = tmp_path / "store"
        assert store.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in store.rglob("*") if path.is_file()} == {0o600}
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


def test_the_exposure_of_the_unit_is_what_the_page_says_at_most() -> None:
    """Each version of systemd judges in its own way; what a unit loses counts in all of them."""
    page = (ROOT / "docs" / "how-to.md").read_text()
    figure = re.search(r"`systemd-analyze security` gives it an exposure of ([0-9.]+) ", page)
    assert figure is not None
    unit = ROOT / "systemd" / "overlaynet.service"
    threshold = f"--threshold={round(float(figure[1]) * 10)}"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", threshold, unit],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout.splitlines()[-1:] or done.stderr
