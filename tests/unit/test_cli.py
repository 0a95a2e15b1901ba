"""The command line, on the file store, as subprocesses and in process."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from overlaynet import __version__
from overlaynet.cli import BUILT_IN, main


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
        "import sys\nfrom overlaynet.cli import main\nmain(['--help'])\n"
        "heavy = {'requests', 'urllib3', 'pyroute2', 'etcd3gw', 'inotify_simple', 'rich', 'asyncio', 'pluggy', 'logging'}\n"
        "ours = {name for name in sys.modules if name.split('.')[0] == 'overlaynet'}\n"
        "print(*sorted(ours | heavy & set(sys.modules)), sep='\\n', file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert result.stderr.split() == ["overlaynet", "overlaynet.cli", "overlaynet.cli.commands", "overlaynet.errors"]


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
    assert main(["network", "set", *arguments, *store(tmp_path)]) == 1
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
            assert json.loads(watcher.stdout.readline()) == {"leases": [], "malformed": []}
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--store", "etdc"], "there is no store 'etdc'; did you mean 'etcd'? (installed: etcd, file, memory)"),
        (["--store", "file", "--store-option", "paht=/x"], "store file has no option 'paht'; did you mean 'Path'?"),
        (["--router", "netlnik"], "there is no router 'netlnik'; did you mean 'netlink'? (installed: memory, netlink)"),
        (["--router-option", "protocol=no"], "router netlink: option Protocol must be a whole number, not 'no'"),
        (["--network", "10.0.0.0/30"], "Network 10.0.0.0/30 is too small"),
    ],
)
def test_bad_flags_of_run_are_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = overlaynet("run", *store(tmp_path), "--status-socket", "", *arguments)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"overlaynet: {message}")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "store" / "config").exists()
