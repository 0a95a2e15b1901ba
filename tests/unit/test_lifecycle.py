"""The life of a daemon and of its drivers is what the explanation's diagram says."""

import asyncio
import functools
import re
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import attrs
import pytest

from overlaynet import api, hookspecs
from overlaynet import network as documents
from overlaynet.hookspecs import hookimpl
from overlaynet.model import LeaseRequest
from overlaynet.routers.memory import MemoryRouter
from overlaynet.testing import Network
from overlaynet.testing.fakes import FakeBackend, UnreliableStore

pytestmark = pytest.mark.anyio

PAGE = (Path(__file__).parents[2] / "docs" / "explanation.md").read_text()
SECTION = PAGE.partition("\n## The life of a daemon and of its drivers\n")[2].partition("\n## ")[0]
NAME = r"(?:Store|Backend|Router)\.\w+|overlaynet_\w+"
PARTS = [
    re.findall(rf"^    [│ ]   (\(?)({NAME})", part, re.MULTILINE)
    for part in re.split(r"^    (?:overlaynet run|[├└]── .*)$", SECTION, flags=re.MULTILINE)[1:]
]
"""The names in each part of the diagram, each with a parenthesis before it if it is not always called."""
STAND_INS = {"Store": UnreliableStore, "Backend": FakeBackend, "Router": MemoryRouter}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called of the drivers, from now on."""
    found: list[str] = []

    def record(name: str) -> None:
        axis, method = name.split(".")
        original = getattr(STAND_INS[axis], method)

        @functools.wraps(original)
        def wrapped(*arguments: Any) -> Any:
            found.append(name)
            return original(*arguments)

        monkeypatch.setattr(STAND_INS[axis], method, wrapped)

    for name in {name for part in PARTS for _, name in part if "." in name}:
        record(name)
    return found


def observer(called: list[str]) -> object:
    """Records each of the diagram's hooks when it is called."""

    def implementation(name: str) -> Callable[[], None]:
        def implement() -> None:
            called.append(name)

        return hookimpl(specname=name)(implement)

    hooks = {name for part in PARTS for _, name in part if "." not in name}
    return type("Observer", (), {name: staticmethod(implementation(name)) for name in hooks})()


def in_order(part: list[tuple[str, str]], seen: list[str]) -> list[str]:
    """What a part of the diagram says is called, if of what is called under a condition just this was."""
    return [name for condition, name in part if not condition or name in seen]


def test_every_name_in_it_exists_and_none_is_missing() -> None:
    names = set(re.findall(NAME, SECTION))
    for name in names:
        axis, _, method = name.partition(".")
        assert hasattr(getattr(api, axis), method) if method else hasattr(hookspecs, name), name
    hooks = {name for name in vars(hookspecs) if name.startswith("overlaynet_")}
    methods = {
        f"{cls.__name__}.{name}"
        for cls in (api.Backend, api.Router)
        for name, member in vars(cls).items()
        if callable(member) and not name.startswith("_")
    }
    # Answered and asked whenever somebody wants to know: no part of the life.
    assert (hooks | methods) - names == {"overlaynet_driver", "overlaynet_cli", "Backend.status"}


async def test_what_is_called_comes_in_its_order(called: list[str]) -> None:
    start, beside, rounds, renewal, stop = PARTS
    async with Network(1, observers=[observer(called)], release_on_stop=True) as network:
        (node,) = network.nodes
        # A peer comes, is reached in another way, and goes.
        store, document = network.make_store(), documents.parse('{"Network": "10.0.0.0/8"}')
        peer = await store.acquire(document, LeaseRequest("b", "1", IPv4Address("172.16.0.2")))
        await asyncio.sleep(5)
        peer = await store.renew(document, attrs.evolve(peer, public_ipv4=IPv4Address("172.16.0.3")))
        await asyncio.sleep(5)
        await store.release(peer)
        node.underlay = attrs.evolve(node.underlay, mtu=1400)
        await asyncio.sleep(86_400)
        await node.stop()
    first_beside = min(called.index(name) for _, name in beside)
    first_round = called.index("Backend.set_peers")
    stopping = called.index("overlaynet_stopping")
    assert called[:first_beside] == in_order(start, called[:first_beside])
    assert sorted(called[first_beside:first_round]) == sorted(in_order(beside, []))
    assert called[stopping:] == in_order(stop, called[stopping:])
    assert "Store.release" in called

    between = [name for name in called[first_round:stopping] if name not in in_order(beside, [])]
    renewals = [name for name in between if name in in_order(renewal, [])]
    assert renewals == in_order(renewal, []) * (len(renewals) // 2) != []
    between = [name for name in between if name not in renewals]
    seen: set[str] = set()
    while between:
        end = between.index("Backend.set_peers", 1) if "Backend.set_peers" in between[1:] else len(between)
        assert between[:end] == in_order(rounds, between[:end])
        seen |= set(between[:end])
        between = between[end:]
    assert seen == {name for _, name in rounds}


async def test_after_a_crash_the_next_run_does_the_same_and_has_the_same_lease(called: list[str]) -> None:
    async with Network(1, observers=[observer(called)]) as network:
        (node,) = network.nodes
        subnets = node.lease.subnets
        await node.crash()
        called.clear()
        node.start()
        await network.converge()
        assert node.lease.subnets == subnets
    start, beside = PARTS[:2]
    first_beside = min(called.index(name) for _, name in beside)
    assert called[:first_beside] == in_order(start, called[:first_beside])
