"""The tutorial's commands, executed in order as its reader would."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlaynet.testing import namespaces

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
DIRECTORY = Path("/tmp/overlaynet-tutorial")  # noqa: S108 - what the page says
NAMES = ("tutorial-a", "tutorial-b", "tutorial-container-a", "tutorial-container-b")


@pytest.fixture
def _nothing_left() -> Iterator[None]:
    assert not set(NAMES) & set(namespaces.names()), "somebody does the tutorial on this machine"
    yield
    for name in set(NAMES) & set(namespaces.names()):
        for pid in namespaces.process_ids(name):
            os.kill(pid, 9)
        namespaces.delete(name)
    shutil.rmtree(DIRECTORY, ignore_errors=True)


@pytest.mark.usefixtures("_nothing_left")
def test_every_command_of_the_tutorial_does_what_it_says() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = "\n".join(f"echo '=== block {number}'\n{block}" for number, block in enumerate(blocks))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-eu"], input=script, capture_output=True, text=True, check=False, timeout=100, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    parts = re.split(r"=== block \d+\n", result.stdout)
    assert len(parts) == len(blocks) + 1
    assert "3 received" in result.stdout
    assert "Destination Net Unreachable" in result.stdout
    assert "unreachable 10.244.0.0/16 proto 82" in result.stdout
    before, after = (
        sorted(re.findall(r"10\.244\.\d+\.0/24(?=  )", part)) for part in parts if "PUBLIC ADDRESS" in part
    )
    assert before == after, "the subnets are the same after the crash"
    assert len(before) == 2
    assert not set(NAMES) & set(namespaces.names())
    assert not DIRECTORY.exists()
