"""The tutorial on backends, done literally: its commands, its files and what comes out, with only the built wheel installed."""

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import pytest

from overlaynet.testing import namespaces

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial-backend.md"
NAMES = ("tutorial-tls-a", "tutorial-tls-b")
MARK = "=== step"

pytestmark = pytest.mark.timeout(900)  # it builds a wheel, and installs it with all that it needs


@attrs.define
class Step:
    """A block of commands, or a file that is written, and what the page says comes out."""

    script: str
    expected: str | None = None


def steps(page: str) -> list[Step]:
    """What the page has its reader do. A block of text after one of commands is their output."""
    found: list[Step] = []
    for language, path, content in re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if language == "bash":
            found.append(Step(content))
        elif path:
            assert "END OF FILE" not in content
            found.append(Step(f"cat > {path} <<'END OF FILE'\n{content}END OF FILE\n"))
        else:
            assert language == "text", f"what is to be done with {language}?"
            assert found[-1].expected is None
            found[-1].expected = content
    return found


def stable(text: str) -> str:
    """The text without what is otherwise each time: numbers, however long, and the space that aligns them."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"[0-9a-f]*\d[0-9a-f.:]*", "#", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines()) + "\n"


def differs(expected: str, got: str) -> bool:
    return not doctest.OutputChecker().check_output(stable(expected), stable(got), doctest.ELLIPSIS)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """The built wheel."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        tmp_path / "wheels",
        ROOT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("overlaynet-*.whl")
    return wheel


@pytest.fixture
def _nothing_left() -> Iterator[None]:
    assert not set(NAMES) & set(namespaces.names()), "somebody does the tutorial on this machine"
    yield
    for name in set(NAMES) & set(namespaces.names()):
        for pid in namespaces.process_ids(name):
            os.kill(pid, 9)
        namespaces.delete(name)


def do(todo: Sequence[Step], directory: Path, environment: dict[str, str]) -> list[str]:
    """Do the steps in one shell; what came out of each that was done."""
    script = "".join(f"echo '{MARK}'\n{step.script}" for step in todo)
    transcript = directory.with_name("transcript")
    with transcript.open("w") as output:
        done = subprocess.run(
            ["bash", "-eu"],
            input=script,
            stdout=output,
            stderr=output,
            text=True,
            check=False,
            timeout=400,
            cwd=directory,
            env=environment,
        )
    outputs = transcript.read_text().split(f"{MARK}\n")[1:]
    if done.returncode != 0:
        raise AssertionError(f"this ended with {done.returncode}:\n{todo[len(outputs) - 1].script}\n{outputs[-1]}")
    return outputs


@pytest.mark.usefixtures("_nothing_left")
def test_all_that_the_tutorial_says_comes_out(wheel: Path, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    version = wheel.name.split("-")[1]
    constraints.write_text((ROOT / "constraints.txt").read_text() + f"overlaynet=={version}\n")
    # As on a machine where nothing of this project is: neither its environment's commands nor its variables.
    own = str(Path(sys.executable).parent)
    path = [entry for entry in os.environ["PATH"].split(":") if entry != own]
    kept = {
        name: value
        for name, value in os.environ.items()
        # CI: pytest does not shorten its summary where that is set, and a reader's terminal has it not.
        if not re.match("PYTHON|VIRTUAL_ENV|OVERLAYNET_|PYTEST|CI$|BUILD_NUMBER$", name)
    }
    environment = kept | {
        "PATH": ":".join([str(Path(sys.base_prefix) / "bin"), *path]),
        "PIP_CONSTRAINT": str(constraints),
        "PIP_FIND_LINKS": str(wheel.parent),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    directory = tmp_path / "empty"
    directory.mkdir()
    todo = steps(PAGE.read_text())
    assert len(todo) > 15
    outputs = do(todo, directory, environment)
    wrong = [
        f"$ {step.script}\nis said to give\n{step.expected}\nand gave\n{output}"
        for step, output in zip(todo, outputs, strict=True)
        if step.expected is not None and differs(step.expected, output)
    ]
    assert not wrong, "\n\n".join(wrong)
    assert list(directory.iterdir()) == []
    assert not set(NAMES) & set(namespaces.names())
