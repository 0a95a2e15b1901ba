"""Fixtures for pytest, for those who ask for them: ``pytest_plugins = ["overlaynet.testing.fixtures"]`` in a ``conftest.py``.

Installing overlaynet adds nothing to anybody's tests by itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

from overlaynet.testing import namespaces
from overlaynet.testing._requirements import pytest
from overlaynet.testing.etcd import EtcdServer
from overlaynet.testing.namespaces import NetworkNamespace
from overlaynet.testing.network import Network

MakeNetwork: TypeAlias = Callable[..., Awaitable[Network]]
_NETWORKS = pytest.StashKey[list[Network]]()


@pytest.fixture
async def make_network(request: pytest.FixtureRequest) -> AsyncIterator[MakeNetwork]:
    """Makes a :class:`overlaynet.testing.Network` each time it is called, with the same arguments, and ends it after the test.

    If the test fails, its report shows what happened in the network, as a diagram.
    """
    made = request.node.stash.setdefault(_NETWORKS, [])
    async with AsyncExitStack() as stack:

        async def make(*arguments: Any, **keywords: Any) -> Network:
            network = Network(*arguments, **keywords)
            made.append(network)
            return await stack.enter_async_context(network)

        yield make


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    """A network namespace, deleted after the test. Without root, the test is skipped."""
    if missing := namespaces.requirements():
        pytest.skip(f"not on this machine: {'; '.join(missing)}")
    with NetworkNamespace(label="test") as made:
        yield made


@pytest.fixture(scope="session")
def etcd_server() -> Iterator[EtcdServer]:
    """A private etcd, one for all tests: give each its own prefix."""
    with EtcdServer() as server:
        yield server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the networks' diagrams to the report of a test that failed."""
    report = yield
    if report.when == "call" and report.failed:
        for network in item.stash.get(_NETWORKS, []):
            report.sections.append(("What happened in the network", network.diagram()))
    return report
