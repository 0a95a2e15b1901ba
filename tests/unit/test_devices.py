"""What backends with devices share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from overlaynet.devices import Claim, Parameters, check_name, is_claimed, name_is_taken
from overlaynet.errors import BackendError


def test_a_name_is_claimed_by_one_at_a_time() -> None:
    name = f"test{os.getpid()}"
    assert not is_claimed(name)
    first = Claim(name)
    assert is_claimed(name)
    with pytest.raises(
        BackendError, match=f"^{name} belongs to another overlaynet that is running; stop it, or choose"
    ):
        Claim(name)
    other = Claim(f"{name}b")
    assert not first.closed
    for _ in range(2):
        first.close()
    assert first.closed
    assert not is_claimed(name)
    Claim(name).close()
    other.close()


def test_a_claim_ends_with_its_process() -> None:
    name = f"test{os.getpid()}"
    code = (
        "import os, sys\n"
        "from overlaynet.devices import Claim\n"
        f"claim = Claim({name!r})\n"
        "print('claimed', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"claimed\n"
        assert is_claimed(name)
        process.kill()
    assert not is_claimed(name)


@pytest.mark.parametrize("name", ["overlay0", "flannel.1", "a", "123456789012345", "over.lay-0_1@"])
def test_names_of_interfaces_are_names(name: str) -> None:
    assert check_name(name) is None


@pytest.mark.parametrize(
    "name", ["", "1234567890123456", "a b", "a/b", "a:b", "a%d", ".", "..", "all", "default", "é", "a\n"]
)
def test_what_the_kernel_refuses_as_a_name_is_none(name: str) -> None:
    problem = check_name(name)
    assert problem is not None
    assert repr(name) in problem


def test_parameters_are_written_only_if_they_differ(tmp_path: Path) -> None:
    directory = tmp_path / "ipv6" / "conf" / "overlay0"
    directory.mkdir(parents=True)
    (directory / "accept_ra").write_text("1\n")
    parameters = Parameters(tmp_path)
    assert parameters.set(6, "overlay0", "accept_ra", "0")
    assert (directory / "accept_ra").read_text() == "0"
    os.utime(directory / "accept_ra", (0, 0))
    assert not parameters.set(6, "overlay0", "accept_ra", "0")
    assert (directory / "accept_ra").stat().st_mtime == 0
    assert not parameters.set(6, "overlay0", "not_there", "0")
    assert not (directory / "not_there").exists()


def test_a_parameter_that_cannot_be_set_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ipv4" / "conf" / "overlay0" / "rp_filter").mkdir(parents=True)  # a directory: it cannot be read
    parameters = Parameters(tmp_path)
    for _ in range(2):
        assert not parameters.set(4, "overlay0", "rp_filter", "0")
    assert [record.message for record in caplog.records] == ["kernel parameter not set"]


def test_a_missing_parameter_is_reported_for_ipv4_and_left_out_for_ipv6(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = Parameters(tmp_path)
    assert not parameters.set(6, "overlay0", "disable_ipv6", "0")
    assert caplog.records == []
    assert not parameters.set(4, "overlay0", "accept_local", "1")
    (record,) = caplog.records
    assert record.__dict__["fields"]["parameter"] == tmp_path / "ipv4" / "conf" / "overlay0" / "accept_local"


@pytest.mark.parametrize(
    ("kind", "text"), [("dummy", "another interface (dummy);"), ("", "another interface; delete that with `ip link")]
)
def test_a_name_that_is_taken_is_told_with_what_has_it(kind: str, text: str) -> None:
    assert f"the device name overlay0 is taken by {text}" in name_is_taken("overlay0", kind)
