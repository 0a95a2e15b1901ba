"""``overlaynet demo``, for real: needs root."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlaynet.cli import main
from overlaynet.cli.demo import MOST_HOSTS
from overlaynet.demo.scenario import Scenario, Step
from overlaynet.testing import namespaces
from overlaynet.testing.lab import standing, wait_until

DEMO = [sys.executable, "-P", "-m", "overlaynet", "demo"]
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "TERM": "xterm-256color",
    "LANG": "C.UTF-8",
    "PYTHONWARNINGS": "default",
    "COLUMNS": "80",
}


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def left_of(name: str) -> list[str]:
    """What there still is of a demonstration: namespaces, files, processes."""
    its = re.compile(re.escape(name) + r"(?!\d)")  # and not that of another, whose number begins alike
    left = [other for other in namespaces.names() if its.match(other)]
    left += [str(path) for path in Path("/run").glob(f"{name}*") if its.match(path.name)]
    for process in Path("/proc").glob("[0-9]*"):
        command, directory = "", ""
        with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to somebody better
            command = (process / "cmdline").read_text(errors="replace")
            directory = os.readlink(process / "cwd")
        if its.search(command) or its.search(directory):
            left.append(f"process {process.name}: {command!r}")
    return left


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = interfaces()
    yield
    prefix = f"overlaynet-demo-{os.getpid()}"
    assert not left_of(prefix)
    assert interfaces() == before


def demo(*arguments: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run it to its end; what it did, and its name."""
    with subprocess.Popen(
        [*DEMO, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        try:
            output, errors = process.communicate(timeout=100)
        except BaseException:
            process.terminate()
            raise
    return subprocess.CompletedProcess(
        process.args, process.returncode, output, errors
    ), f"overlaynet-demo-{process.pid}"


def check_documented_facts(output: str) -> None:
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in output
    for letter, number, address in (("a", 1, 140), ("b", 2, 164)):
        start = next(place for place, line in enumerate(lines) if f" host-{letter}  172.16.130.{address} " in line)
        panel = "\n".join(lines[start : start + 10])
        assert f"10.244.{number}.0/24 for 24 h" in panel
        assert "overlay0  tun, POINTOPOINT, mtu 1472 = 1500 - 28" in panel
        assert "• 10.244.0.0/16 dev overlay0" in panel
        assert f"• 10.244.{number}.0/24 dev cni0" in panel
        assert "• 172.16.130.0/24 dev eth0" in panel
    hops = [" ".join(line.split()[1:3]) for line in lines if line.startswith("● ")]
    assert hops == [
        "container-a eth0",
        "host-a cni0",
        "host-a overlay0",
        "host-a eth0",
        "host-b eth0",
        "host-b overlay0",
        "host-b cni0",
        "container-b eth0",
    ]
    sizes = [line.split()[-2] for line in lines if line.startswith("● ")]
    assert sizes == ["84", "84", "84", "112", "112", "84", "84", "84"]
    inner = [line for line in lines if "IP 10.244.1.96 → 10.244.2.194  ttl" in line]
    assert [re.findall(r"ttl (\d+)", line) for line in inner] == [
        [str(ttl)] for ttl in (64, 64, 63, 63, 63, 63, 62, 62)
    ]
    outer = [line for line in lines if "IP 172.16.130.140 → 172.16.130.164" in line]
    assert len(outer) == 2
    assert all(line.endswith("UDP 8285 → 8285") for line in outer)
    assert "84 bytes inside, 112 outside: 28 more" in output
    assert "the echo reply is back after 8 hops" in output
    assert "10 of 10 answered" in output
    assert re.search(r"\d MB of random bytes in \d\.\d\d s: \d+ Mbit/s", output)
    assert "arrived: " in output
    assert "✓ every packet arrived, with the right headers" in output


def test_the_documented_scenario_on_the_file_store() -> None:
    result, name = demo()
    assert (result.returncode, result.stderr) == (0, "")
    check_documented_facts(result.stdout)
    assert "Who reaches whom" not in result.stdout
    assert not left_of(name)


def test_three_hosts_on_etcd() -> None:
    result, name = demo("--store", "etcd", "--hosts", "3")
    assert (result.returncode, result.stderr) == (0, "")
    check_documented_facts(result.stdout)
    assert "a private etcd at 172.16.130.1" in result.stdout
    assert re.search(r"host-c +172\.16\.130\.165 +10\.244\.3\.0/24 +tun overlay0 +1472 +3 of 3", result.stdout)
    assert "6 of 6 pairs reach each other" in result.stdout
    assert not left_of(name)


def test_what_is_kept_can_be_looked_at_and_taken_down() -> None:
    result, name = demo("--keep", "--store", "etcd")
    try:
        assert result.returncode == 0
        assert name in standing()
        # Everything that it says one can try does work, but for what would not end by itself.
        commands = re.findall(r"^  ((?:ip|/|overlaynet).*)", result.stdout, re.MULTILINE)
        commands = [command for command in commands if "tcpdump" not in command and "--down" not in command]
        assert len(commands) == 4
        for command in commands:
            words = command.split() + (["-c", "1"] if " ping " in command else [])
            ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
            assert ran.returncode == 0, (command, ran.stderr)
        assert f"demo --down {name}" in result.stdout
    finally:
        down = subprocess.run([*DEMO, "--down", name], capture_output=True, text=True, check=False, timeout=30)
    assert (down.returncode, down.stdout) == (0, f"{name} is taken down\n")
    wait_until(lambda: not left_of(name), 10, "the end of all processes")
    again = subprocess.run([*DEMO, "--down", name], capture_output=True, text=True, check=False, timeout=30)
    assert again.returncode == 1
    assert f"there is nothing left of {name}" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_everything_down(number: signal.Signals) -> None:
    with subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        name = f"overlaynet-demo-{process.pid}"
        wait_until(lambda: namespaces.process_ids(f"{name}-host-b") or process.poll(), 30, "the daemons")
        assert left_of(name)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == "overlaynet: interrupted; everything is taken down\n"
    assert "every packet arrived" not in output
    assert not left_of(name)


@pytest.mark.parametrize("begun", ["host-a", "host-b", "switch"])
def test_a_signal_while_a_process_begins_takes_it_down_too(
    begun: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has been started, and :class:`subprocess.Popen` does not know it yet."""
    real = subprocess.Popen._execute_child  # type: ignore[attr-defined]
    started: list[int] = []

    def execute_child(self: subprocess.Popen[bytes], command: list[str], *rest: object) -> None:
        real(self, command, *rest)
        if "netns" in command and command[-1].endswith(begun) if begun == "switch" else begun in command:
            started.append(self.pid)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess.Popen, "_execute_child", execute_child)
    assert main(["demo"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "overlaynet: interrupted; everything is taken down\n"
    assert not Path(f"/proc/{started[0]}").exists()  # the fixture looks for all the rest


def test_on_a_terminal_it_shows_progress_and_ends_on_ctrl_c() -> None:
    leader, follower = os.openpty()
    # The terminal becomes the demonstration's own, so that its Ctrl-C is a real one; setsid execs and keeps the id.
    process = subprocess.Popen(
        ["setsid", "--ctty", *DEMO], stdin=follower, stdout=follower, stderr=follower, env=ENVIRONMENT
    )
    os.close(follower)
    name = f"overlaynet-demo-{process.pid}"
    output, pressed = b"", False
    try:
        while True:
            try:
                output += os.read(leader, 65536)
            except OSError:
                break  # nobody has the terminal open any more
            if not pressed and b"Ping times" in output:
                os.write(leader, b"\x03")
                pressed = True
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    text = output.decode()
    assert "✓\x1b[0m overlaynet run on each host" in text
    assert text.count("overlaynet: interrupted; everything is taken down") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert not left_of(name)


def sabotage(monkeypatch: pytest.MonkeyPatch, place: int, action: Callable[[Scenario], None]) -> None:
    """Do something wrong after so many steps of the set-up."""
    steps = Scenario.steps

    def with_sabotage(scenario: Scenario) -> list[Step]:
        right = steps(scenario)
        return [*right[:place], Step("something goes wrong", lambda: action(scenario)), *right[place:]]

    monkeypatch.setattr(Scenario, "steps", with_sabotage)


def test_what_is_not_as_documented_is_told_with_the_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def split_route(scenario: Scenario) -> None:
        # Every packet still arrives.
        scenario.lab.hosts[1].namespace.ip(
            "route add 172.16.130.0/25 dev eth0",
            "route add 172.16.130.128/25 dev eth0",
            "route delete 172.16.130.0/24 dev eth0",
        )

    sabotage(monkeypatch, 3, split_route)
    assert main(["demo"]) == 1
    output = capsys.readouterr().out
    verdict = output[output.index("✗ not everything is as it should be") :]
    assert "host-b has no route 172.16.130.0/24 dev eth0" in verdict
    assert "the last lines of overlaynet's log on host-a" in verdict
    assert "info: ready" in verdict
    assert "every packet arrived" not in output


def test_a_daemon_that_does_not_start_is_told_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[socket.socket] = []

    def take_port(scenario: Scenario) -> None:
        taken.append(scenario.lab.hosts[0].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM))
        taken[0].bind(("172.16.130.140", 8285))

    sabotage(monkeypatch, 1, take_port)
    try:
        # Nothing can be looked at, so nothing is kept.
        assert main(["demo", "--keep"]) == 1
    finally:
        for each in taken:
            each.close()
    output = capsys.readouterr().out
    assert "overlaynet on host-a ended with exit status 1:" in output.replace("\n", " ")
    assert "8285" in output
    assert "It stays up" not in output


def test_a_packet_that_does_not_arrive_is_told_hop_by_hop() -> None:
    scenario = Scenario()
    try:
        for step in scenario.steps():
            step.action()
        assert scenario.walk().problems == ()
        scenario.lab.hosts[1].disconnect()
        walks = scenario.walk()
        assert [str(hop.station) for hop in walks.request.hops] == [
            "container-a eth0",
            "host-a cni0",
            "host-a overlay0",
            "host-a eth0",
        ]
        assert walks.problems == (
            "the echo request reached host-a eth0, but not host-b eth0",
            "the echo reply was not seen at all",
        )
        assert set(scenario.reach().values()) == {False}
    finally:
        scenario.close()
        scenario.close()


def test_what_is_missing_is_said_in_one_sentence_without_root() -> None:
    # Whoever may not read the interpreter's files can still be nobody once they are loaded.
    script = (
        "import os, sys, overlaynet.cli.demo\n"
        "from overlaynet.testing.namespaces import requirements\n"
        "assert requirements() == []\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(overlaynet.cli.main(['demo']))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "overlaynet: the demo cannot run here: it needs root (try sudo)\n"


@pytest.mark.parametrize(
    ("hide", "reason"),
    [
        (
            "mount -t tmpfs none /dev/net",
            "/dev/net/tun is missing (try modprobe tun, or give the container that device)",
        ),
        ("mount --bind /dev/null /dev/net/tun", "/dev/net/tun cannot be used: Inappropriate ioctl for device"),
        ("PATH=/nowhere", "the command ip is missing (install iproute2); the command ping is missing"),
        ("capsh", "root lacks CAP_NET_ADMIN here (start the container with --privileged)"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(hide: str, reason: str) -> None:
    if hide == "capsh":
        command = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin", *DEMO]
    else:
        command = ["unshare", "--mount", "sh", "-c", f'{hide}; exec "$@"', "sh", *DEMO]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"overlaynet: the demo cannot run here: {reason}")
    assert result.stderr.count("\n") == 1


def test_another_operating_system_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "overlaynet: the demo cannot run here: it needs Linux, and this is darwin\n"
    assert namespaces.requirements() == ["it needs Linux, and this is darwin"]


def test_etcd_is_asked_for_only_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for command in ("ip", "ping"):
        (tmp_path / command).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["demo", "--store", "etcd"]) == 1
    assert "the command etcd is missing (install etcd-server)" in capsys.readouterr().err


@pytest.mark.parametrize("hosts", ["1", str(MOST_HOSTS + 1), "-2", "two", "2.5", ""])
def test_a_wrong_number_of_hosts_is_refused(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", f"--hosts={hosts}"])
    assert f"must be a number from 2 to {MOST_HOSTS}, not {hosts!r}" in capsys.readouterr().err


def test_only_demonstrations_are_taken_down(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--down", "../../etc"]) == 1
    assert "'../../etc' is not the name of a lab" in capsys.readouterr().err
