"""What plugins rely on does not change unnoticed: all of it stands in tests/contract/api.txt, with its version."""

import difflib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from overlaynet import api

SCRIPT = Path(__file__).parents[1] / "contract" / "write.py"


@pytest.fixture(scope="module")
def contract() -> ModuleType:
    """What writes the file."""
    spec = importlib.util.spec_from_file_location("write_contract", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_contract_is_what_it_was_when_its_version_was_chosen(contract: ModuleType) -> None:
    before, now = contract.FILE.read_text(encoding="utf-8"), contract.text()
    if before == now:
        return
    changes = "\n".join(
        difflib.unified_diff(before.splitlines(), now.splitlines(), "api.txt", "overlaynet.api", lineterm="", n=1)
    )
    pytest.fail(
        f"the plugin contract has changed: undo that, or raise the {contract.part_to_raise(before, now)} part of API in "
        f"overlaynet/drivers.py (unless no release has had {api.API} yet), and run: python tests/contract/write.py\n{changes}"
    )


OLD = """\
class Backend(Driver)
  abstract method routes(self, peers) -> list
  method status(self) -> dict
class Peer()
  field node: str, has a default
  method status(self) -> dict
hook overlaynet_ready(lease: Lease) -> None
"""


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("class Peer()", "class Pair()\nclass Peer()", "minor"),
        ("class Peer()", "  method more(self) -> None\nclass Peer()", "minor"),
        ("class Peer()", "class Peer()\n  field more: int, has a default", "minor"),
        ("lease: Lease", "lease: Lease, network: Network", "minor"),
        ("class Peer()", "class Peer()\n  field more: int, required", "major"),
        ("class Peer()", "  abstract method more(self) -> None\nclass Peer()", "major"),
        ("  method status(self) -> dict\nclass Peer()", "class Peer()", "major"),
        ("status(self) -> dict\nclass", "status(self, more: int) -> dict\nclass", "major"),
        ("lease: Lease", "network: Network", "major"),
        ("hook overlaynet_ready(lease: Lease) -> None\n", "", "major"),
    ],
)
def test_the_part_that_a_change_raises_is_that_of_the_rule(contract: ModuleType, old: str, new: str, part: str) -> None:
    assert old in OLD
    assert contract.part_to_raise(OLD, OLD.replace(old, new)) == part
