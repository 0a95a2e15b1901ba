"""What a plugin author gets from the kit, seen from a project of the author's own: a fresh pytest, nothing configured."""

import re
import subprocess
import sys
from pathlib import Path

ASYNC = """
    import pytest

    @pytest.fixture
    def anyio_backend():
        from overlaynet.testing import VIRTUAL_CLOCK
        return VIRTUAL_CLOCK
"""


def run_pytest(directory: Path, *arguments: str, **files: str) -> str:
    """Run pytest on some files in a directory of their own; returns all that it prints."""
    for name, text in files.items():
        lines = text.strip("\n").splitlines()
        indentation = len(lines[0]) - len(lines[0].lstrip())
        (directory / f"{name}.py").write_text("\n".join(line[indentation:] for line in lines) + "\n")
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "--strict-markers"]
    done = subprocess.run(
        [*command, "--rootdir", str(directory), *arguments, str(directory)],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    return done.stdout + done.stderr


def test_one_fixture_is_enough_and_what_is_not_tested_is_said(tmp_path: Path) -> None:
    output = run_pytest(
        tmp_path,
        "-rs",
        test_mine="""
            import pytest
            from overlaynet.testing import BackendConformance
            from overlaynet.testing.fakes import FakeBackend

            class TestMine(BackendConformance):
                lacks = {"conflicts": "there is room for many"}

                @pytest.fixture
                def make_backend(self):
                    return lambda: FakeBackend(FakeBackend.Options())
        """,
    )
    assert " failed" not in output
    assert " error" not in output
    assert "it lacks conflicts: there is room for many" in output
    assert "not tested, for want of observation: override the fixture 'observe'" in output


def test_the_examples_of_the_documentation_pass(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to.md").read_text()
    section = page[page.index("## Write a plugin") :]
    examples = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", section, re.DOTALL))
    assert set(examples) == {
        "test_options_together",
        "test_my_backend",
        "test_whole_daemons",
        "test_real_hosts",
        "test_my_backend_with_faults",
        "test_deprecated_option",
    }
    output = run_pytest(tmp_path, **examples)
    assert re.search(r"\d\d passed, \d+ skipped", output), output
    assert "failed" not in output, output


def test_a_law_that_is_broken_shows_its_values(tmp_path: Path) -> None:
    output = run_pytest(
        tmp_path,
        "-k",
        "create or routes_for_the_same",
        test_mine="""
            import pytest
            from overlaynet.stores.memory import MemoryStore, MemoryTable
            from overlaynet.testing import BackendConformance, RouterConformance, StoreConformance, TableConformance
            from overlaynet.testing.fakes import FakeBackend

            class Deaf(MemoryTable):
                async def get(self, key):
                    return None

            class TestTable(TableConformance):
                @pytest.fixture
                def make_table(self):
                    return lambda: Deaf()

            class ForgetfulStore(MemoryStore):
                async def create_network(self, document):
                    return False

            class TestStore(StoreConformance):
                @pytest.fixture
                def make_store(self):
                    return ForgetfulStore

            class Moody(FakeBackend):
                def routes(self, peers):
                    self.tables += 1
                    return list(super().routes(peers)) * self.tables

            class TestBackend(BackendConformance):
                @pytest.fixture
                def make_backend(self):
                    return lambda: Moody(Moody.Options())
        """,
    )
    assert "assert None == Record(key='config'" in output  # of a table
    assert "assert False" in output  # of a store
    assert "Left contains" in output or "Right contains" in output  # of a backend


def test_a_misspelt_capability_is_an_error_that_names_the_right_one(tmp_path: Path) -> None:
    output = run_pytest(
        tmp_path,
        test_mine="""
            from overlaynet.testing import StoreConformance

            class TestMine(StoreConformance):
                lacks = {"lifetime": "they live for ever"}
        """,
    )
    assert "TestMine.lacks: there is no capability 'lifetime'; did you mean 'lifetimes'?" in output


def test_a_fixture_that_is_not_overridden_is_named(tmp_path: Path) -> None:
    output = run_pytest(
        tmp_path,
        test_mine="""
            from overlaynet.testing import RouterConformance

            class TestMine(RouterConformance):
                pass
        """,
    )
    assert "override the fixture 'make_router'" in output
    assert " passed" not in output


def test_a_failing_test_shows_the_packets_of_its_network(tmp_path: Path) -> None:
    output = run_pytest(
        tmp_path,
        conftest="""
            pytest_plugins = ["overlaynet.testing.fixtures"]
        """,
        test_mine=f"""{ASYNC}
    @pytest.mark.anyio
    async def test_lost(make_network):
        network = await make_network(2)
        a, b = network.nodes
        network.partition([a], [b])
        packet = network.send(a, b)
        await network.deliver()
        assert packet.delivered

    @pytest.mark.anyio
    async def test_fine(make_network):
        network = await make_network(2)
        packet = network.send(*network.nodes)
        await network.deliver()
        assert packet.delivered
""",
    )
    assert "1 failed, 1 passed" in output
    assert output.count("What happened in the network") == 1
    assert "partition: they are on two sides" in output


def test_nothing_is_forced_on_those_who_did_not_ask(tmp_path: Path) -> None:
    output = run_pytest(
        tmp_path,
        "--fixtures",
        test_mine="""
            import overlaynet.testing

            def test_nothing():
                pass
        """,
    )
    assert "make_network" not in output
    assert "overlaynet" not in output.replace(str(tmp_path), "")


def test_the_commands_do_without_pytest() -> None:
    code = """
import sys
sys.modules["pytest"] = None  # an import of it fails
import overlaynet.testing
import overlaynet.cli
import overlaynet.cli.demo
import overlaynet.testing.network, overlaynet.testing.fakes, overlaynet.testing.lab, overlaynet.testing.etcd
"""
    subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", code], check=True, timeout=60)
