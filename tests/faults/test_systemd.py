"""The unit as it is shipped, run by a real systemd: what it promises of a node's life, and what its sandbox leaves it."""

import json
import re
import sys
import time
from collections.abc import Iterator

import pytest

from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.lab import SWITCH_ADDRESS, Lab, wait_until
from tests.faults.systemd_machine import SOURCE, SystemdMachine

PATIENCE = 30.0
UNIT = "overlaynet.service"
PRODUCT_UUID = "4c4c4544-0042-3510-8052-b4c04f564433"
PROBE = """
import ctypes, errno, json, mmap, os, socket, time
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)

def call(function, *arguments):
    if function(*arguments) != 0:
        raise OSError(ctypes.get_errno(), "")

parameter = Path("/proc/sys/net/ipv4/conf/lo/accept_local")
attempts = {
    "open the TUN device": lambda: open("/dev/net/tun", "r+b", buffering=0).close(),
    "write a parameter of the network": lambda: parameter.write_text(parameter.read_text()),
    "keep state": lambda: Path("/var/lib/overlaynet/probe").write_text(""),
    "write elsewhere": lambda: Path("/var/probe").write_text(""),
    "look into homes": lambda: os.listdir("/home"),
    "see other processes": lambda: os.stat("/proc/1"),
    "open another device": lambda: open("/dev/forbidden", "rb", buffering=0).close(),
    "have a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "have a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close(),
    "make a namespace": lambda: call(libc.unshare, 0x10000000),
    "make memory executable": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC),
    "become another user": lambda: os.setuid(0),
    "set the clock": lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
}
found = {}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = None
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
print(json.dumps(found))
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Two hosts; the first one is a machine with systemd, whose network the lab has made."""
    with Lab("service", hosts=2, default_route=True) as lab:
        yield lab


@pytest.fixture
def etcd(lab: Lab) -> Iterator[EtcdServer]:
    with EtcdServer(str(SWITCH_ADDRESS.ip), network_namespace=lab.switch.name) as server:
        yield server


@pytest.fixture
def machine(lab: Lab) -> Iterator[SystemdMachine]:
    """The first host, with overlaynet installed as the documentation says, and not started."""
    host = lab.hosts[0]
    with SystemdMachine(host.namespace) as machine:
        *install, start = documented_commands()
        assert start == "systemctl enable --now overlaynet"
        for command in install:
            machine.execute(command.split())
        host.subnet_file = machine.files / "run/flannel/subnet.env"
        host.status_socket = machine.files / "run/overlaynet/status.sock"
        yield machine


def documented_commands() -> list[str]:
    page = (SOURCE / "docs" / "how-to.md").read_text()
    section = page.split("## Run it as a service, without root")[1]
    match = re.search(r"\n\n((?:    .*\n)+)", section)
    assert match is not None
    return [line.strip() for line in match[1].splitlines()]


def write(machine: SystemdMachine, path: str, text: str) -> None:
    file = machine.files / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def configure(machine: SystemdMachine, **settings: object) -> None:
    lines = [f"{name.replace('_', '-')} = {json.dumps(value)}\n" for name, value in settings.items()]
    write(machine, "/etc/overlaynet/config.toml", "".join(lines))


def configure_file_store(machine: SystemdMachine, **settings: object) -> None:
    settings = {"store": "file", "network": "10.244.0.0/16", "node": "host-a"} | settings
    configure(machine, **{name: value for name, value in settings.items() if value is not None})


def drop_in(machine: SystemdMachine, text: str) -> None:
    write(machine, f"/etc/systemd/system/{UNIT}.d/test.conf", f"[Service]\n{text}\n")
    machine.systemctl("daemon-reload")


def main_pid(machine: SystemdMachine) -> str:
    """The id of the daemon, as it is inside the machine."""
    return machine.property("MainPID")


def wait_for_state(machine: SystemdMachine, state: str) -> None:
    wait_until(lambda: machine.property("ActiveState") == state, PATIENCE, f"the service to be {state}")


def restarted(machine: SystemdMachine) -> bool:
    return machine.property("NRestarts") == "1" and machine.property("ActiveState") == "active"


def subnets(machine: SystemdMachine) -> object:
    return json.loads(machine.execute(["overlaynet", "status", "--json"], check=False).stdout)["subnets"]


def wait_for_journal(machine: SystemdMachine, text: str) -> None:
    wait_until(lambda: text in machine.journal(UNIT), PATIENCE, f"{text!r} in the journal")


def wait_for_traffic(lab: Lab) -> None:
    for source, destination in (lab.containers, reversed(lab.containers)):
        wait_until(lambda s=source, d=destination: s.reaches(d), PATIENCE, "a ping to arrive")  # type: ignore[misc]


@pytest.mark.parametrize("backend", ["udp", "vxlan", "host-gw"])
def test_the_documented_commands_make_a_node(lab: Lab, machine: SystemdMachine, etcd: EtcdServer, backend: str) -> None:
    """It is ready when the command returns, carries packets with nothing to complain of, and stops."""
    store = ["--store", "etcd", "--etcd-endpoints", etcd.endpoint]
    machine.execute(["overlaynet", "network", "set", "--network", "10.244.0.0/16", "--backend", backend, *store])
    configure(machine, etcd_endpoints=[etcd.endpoint], node="host-a")
    machine.systemctl("enable", "--now", "overlaynet")
    assert machine.property("ActiveState") == "active"
    assert re.search(r"^\S+ ready  ", machine.journal(UNIT), re.MULTILINE), "the command waits for readiness"
    assert 'Status: "ready, 10.244.' in machine.systemctl("status", "overlaynet").stdout
    lab.hosts[1].start_overlaynet(store, ["--backend", backend])
    for host in lab.hosts:
        host.connect_containers()
    wait_for_traffic(lab)
    machine.execute(["overlaynet", "status"])
    for complaint in ("warning:", "error:", "Traceback"):
        assert complaint not in machine.journal(UNIT)

    machine.systemctl("stop", "overlaynet")
    assert stopped_well(machine)
    assert "overlay0" not in [link["ifname"] for link in lab.hosts[0].namespace.ip_json("link", "show")]


@pytest.mark.parametrize("backend", ["udp", "vxlan"])
def test_kernel_parameters_that_may_not_be_written_are_named_and_done_without(
    lab: Lab, machine: SystemdMachine, etcd: EtcdServer, backend: str
) -> None:
    configure(machine, etcd_endpoints=[etcd.endpoint], network="10.244.0.0/16", backend=backend)
    drop_in(machine, "ProtectKernelTunables=yes")
    machine.systemctl("start", "overlaynet")
    assert "kernel parameter not set" in machine.journal(UNIT)
    assert "Read-only file system" in machine.journal(UNIT)
    lab.hosts[1].start_overlaynet(["--store", "etcd", "--etcd-endpoints", etcd.endpoint], ["--backend", backend])
    for host in lab.hosts:
        host.connect_containers()
    wait_for_traffic(lab)


def test_a_device_that_may_not_be_opened_is_named(machine: SystemdMachine) -> None:
    configure_file_store(machine)
    drop_in(machine, "DeviceAllow=\nRestart=no")
    assert machine.systemctl("start", "overlaynet", check=False).returncode == 1
    message = "/dev/net/tun may not be opened: Operation not permitted; let this user read and write it, and hand it in"
    assert message in machine.journal(UNIT)


def test_the_sandbox_holds(machine: SystemdMachine) -> None:
    """What the unit forbids is forbidden here, too: or the other tests would say nothing of it."""
    write(machine, "/usr/local/bin/probe", PROBE)
    machine.execute(["mknod", "-m", "666", "/dev/forbidden", "c", "10", "229"])
    python = f"/opt/overlaynet/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    drop_in(machine, f"Type=oneshot\nRestart=no\nWatchdogSec=0\nExecStart=\nExecStart={python} /usr/local/bin/probe")
    machine.systemctl("start", "overlaynet")
    line = next(line for line in machine.journal(UNIT).splitlines() if line.startswith("{"))
    assert json.loads(line) == {
        "open the TUN device": None,
        "write a parameter of the network": None,
        "keep state": None,
        "write elsewhere": "EROFS",
        "look into homes": "EACCES",
        "see other processes": "ENOENT",
        "open another device": "EPERM",
        "have a packet socket": "EAFNOSUPPORT",
        "have a raw socket": "EPERM",
        "make a namespace": "EPERM",
        "make memory executable": "EPERM",
        "become another user": "EPERM",
        "set the clock": "EPERM",
    }


def stopped_well(machine: SystemdMachine) -> bool:
    """What systemd says of the last stop: no time ran out, no signal was needed but the first, and the exit status was 0."""
    return f"{UNIT}: Deactivated successfully.\n" in machine.journal(UNIT).rpartition("Stopping ")[2]


def status(machine: SystemdMachine) -> str:
    return machine.systemctl("status", "overlaynet", check=False).stdout


def test_troubles_are_in_the_status_line(machine: SystemdMachine, etcd: EtcdServer) -> None:
    configure(machine, etcd_endpoints=[etcd.endpoint], network="10.244.0.0/16")
    machine.systemctl("start", "overlaynet")
    etcd.stop()
    wait_until(lambda: 'Status: "degraded: store: ' in status(machine), PATIENCE, "the trouble in the status line")
    assert machine.property("ActiveState") == "active"
    etcd.start()
    wait_until(lambda: 'Status: "ready, 10.244.' in status(machine), PATIENCE, "the end of it")


def test_a_start_waits_for_the_network_document(machine: SystemdMachine, etcd: EtcdServer) -> None:
    configure(machine, etcd_endpoints=[etcd.endpoint])
    with machine.popen(["systemctl", "start", "overlaynet"]) as start:
        wait_for_journal(machine, "waiting for the network document")
        assert start.poll() is None
        assert machine.property("ActiveState") == "activating"
        machine.execute(
            ["overlaynet", "network", "set", "--network", "10.244.0.0/16", "--etcd-endpoints", etcd.endpoint]
        )
        assert start.wait(PATIENCE) == 0
        assert machine.property("ActiveState") == "active"


def test_a_daemon_that_hangs_is_replaced_and_keeps_its_subnet(machine: SystemdMachine) -> None:
    configure_file_store(machine)
    drop_in(machine, "WatchdogSec=2")
    machine.systemctl("start", "overlaynet")
    before = main_pid(machine)
    held = subnets(machine)
    time.sleep(3)
    assert main_pid(machine) == before, "it gives signs of life"
    machine.execute(["kill", "-STOP", before])
    wait_until(lambda: restarted(machine), PATIENCE, "another process")
    assert "Watchdog timeout" in machine.journal(UNIT)
    assert main_pid(machine) != before
    assert subnets(machine) == held


def test_a_daemon_that_is_killed_or_restarted_keeps_its_subnet(machine: SystemdMachine) -> None:
    configure_file_store(machine)
    machine.systemctl("start", "overlaynet")
    first = main_pid(machine)
    held = subnets(machine)
    machine.execute(["kill", "-KILL", first])
    wait_until(lambda: restarted(machine), PATIENCE, "another process")
    assert main_pid(machine) != first
    assert subnets(machine) == held
    machine.systemctl("restart", "overlaynet")
    assert machine.property("ActiveState") == "active"
    assert subnets(machine) == held
    running = main_pid(machine)
    assert "Job type reload is not applicable" in machine.systemctl("reload", "overlaynet", check=False).stderr
    assert main_pid(machine) == running, "it goes on"
    machine.systemctl("reload-or-restart", "overlaynet")
    assert main_pid(machine) != running


@pytest.mark.parametrize(
    ("flag", "config", "message"),
    [
        ("--no-such-flag", "", "overlaynet run: error: unrecognized arguments: --no-such-flag"),
        ("", 'store-paht = "/x"\n', "has an unknown setting 'store-paht'; did you mean 'store-path'?"),
        ("", 'store = "flie"\n', "there is no store 'flie'; did you mean 'file'?"),
        ("", None, "the configuration file /etc/overlaynet/config.toml cannot be read: No such file or directory"),
    ],
    ids=["flag", "setting", "store", "no file"],
)
def test_wrong_settings_are_named_and_not_tried_again(
    machine: SystemdMachine, flag: str, config: str | None, message: str
) -> None:
    if config is not None:
        write(machine, "/etc/overlaynet/config.toml", config)
    command = "/usr/local/bin/overlaynet run --config /etc/overlaynet/config.toml"
    drop_in(machine, f"RestartSec=100ms\nExecStart=\nExecStart={command} {flag}")
    assert machine.systemctl("start", "overlaynet", check=False).returncode == 1
    time.sleep(1)
    assert machine.property("ActiveState") == "failed"
    assert machine.property("ExecMainStatus") == "2"
    assert machine.property("NRestarts") == "0"
    assert machine.journal(UNIT).count(message) == 1


def test_of_two_nodes_with_one_identity_the_first_ends_for_good(
    lab: Lab, machine: SystemdMachine, etcd: EtcdServer
) -> None:
    """Or they would take the lease from each other every two seconds, for ever."""
    configure(machine, etcd_endpoints=[etcd.endpoint], network="10.244.0.0/16", node="twin")
    drop_in(machine, "RestartSec=100ms")
    machine.systemctl("start", "overlaynet")
    other = lab.hosts[1]
    other.start_overlaynet(["--store", "etcd", "--etcd-endpoints", etcd.endpoint], ["--node", "twin"])
    wait_for_journal(machine, "another process with the same node identity 'twin' at 172.16.130.164; give each")
    time.sleep(2)
    assert machine.property("ActiveState") == "failed"
    assert machine.property("ExecMainStatus") == "3"
    assert machine.property("NRestarts") == "0"
    assert other.status()["ready"]
    assert other.status()["node"] == "twin"


def test_what_may_be_over_at_the_next_try_is_tried_again(lab: Lab, machine: SystemdMachine) -> None:
    configure_file_store(machine, iface=["eth7"])
    drop_in(machine, "RestartSec=100ms")
    machine.systemctl("start", "--no-block", "overlaynet")
    wait_until(lambda: int(machine.property("NRestarts")) > 1, PATIENCE, "two tries")
    assert "overlaynet: there is no interface" in machine.journal(UNIT)
    lab.hosts[0].namespace.ip(
        "link add eth7 type bridge", "address add 192.0.2.7/24 dev eth7", "link set eth7 up"
    )  # fmt: skip
    wait_for_state(machine, "active")


def test_a_stop_does_not_wait_for_a_store_that_hangs(machine: SystemdMachine, etcd: EtcdServer) -> None:
    configure(machine, etcd_endpoints=[etcd.endpoint], network="10.244.0.0/16", release_on_stop=True)
    machine.systemctl("start", "overlaynet")
    etcd.pause()
    try:
        machine.systemctl("stop", "overlaynet")
    finally:
        etcd.resume()
    assert stopped_well(machine)


@pytest.mark.parametrize("known", [True, False], ids=["a machine with a product UUID", "one without"])
def test_the_firmwares_name_of_the_machine_is_handed_to_the_daemon(machine: SystemdMachine, known: bool) -> None:
    """By it a node knows itself when all its interfaces are new at a boot; root alone may read it."""
    if known:
        machine.execute(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/sys/class"])
        machine.execute(["mkdir", "-p", "/sys/class/dmi/id"])
        machine.execute(["install", "-m", "400", "/dev/null", "/sys/class/dmi/id/product_uuid"])
        write(machine, "/sys/class/dmi/id/product_uuid", f"{PRODUCT_UUID}\n")
    configure_file_store(machine, node=None)
    machine.systemctl("start", "overlaynet")
    (kept,) = (machine.files / "var/lib/overlaynet").glob("identity-*.json")
    product = json.loads(kept.read_text())["Product"]
    assert bool(product) == known
    assert PRODUCT_UUID not in kept.read_text()
    listed = machine.execute(["find", "/run", "-name", "*product_uuid", "-printf", "%u %g %m %p\\n"]).stdout
    assert listed.splitlines() == (["root overlaynet 440 /run/overlaynet.product_uuid"] if known else [])
    for complaint in ("product_uuid", "FAILURE", "warning:", "error:"):
        assert complaint not in machine.journal(UNIT)


def test_its_files_are_its_own_and_in_its_directories(machine: SystemdMachine) -> None:
    configure_file_store(machine, node=None)
    machine.systemctl("start", "overlaynet")
    places = ["/dev", "/etc", "/run", "/tmp", "/var"]  # noqa: S108 - they are only searched
    found = machine.execute(["find", *places, "-user", "overlaynet", "-printf", "%y %m %p\\n"]).stdout.splitlines()
    assert {line for line in found if not line.endswith(".lock")} >= {
        "d 755 /run/flannel",
        "f 644 /run/flannel/subnet.env",
        "d 755 /run/overlaynet",
        "s 600 /run/overlaynet/status.sock",
        "d 700 /var/lib/overlaynet",
        "d 700 /var/lib/overlaynet/store",
        "f 600 /var/lib/overlaynet/store/config",
    }
    assert any(line.startswith("f 600 /var/lib/overlaynet/identity-") for line in found)
    for line in found:
        kind, mode, path = line.split()
        assert path.startswith(("/run/flannel", "/run/overlaynet", "/var/lib/overlaynet"))
        if path.startswith("/var/lib"):
            assert mode == {"d": "700", "f": "600"}[kind], line
    machine.systemctl("stop", "overlaynet")
    assert (machine.files / "run/flannel/subnet.env").exists(), "containers that run know their subnet"
    assert not (machine.files / "run/overlaynet/status.sock").exists()
