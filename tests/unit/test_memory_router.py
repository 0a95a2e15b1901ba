"""What the memory router offers beyond the laws of all routers."""

import asyncio
from ipaddress import ip_network

import pytest

from overlaynet.errors import RouterError
from overlaynet.model import Route
from overlaynet.routers.memory import MemoryRouter

pytestmark = pytest.mark.anyio

BACKSTOP = Route(ip_network("10.244.0.0/16"), kind="unreachable")
LEADING = Route(ip_network("10.244.0.0/16"), device="overlay0")


async def test_it_remembers_each_set_that_differed() -> None:
    router = MemoryRouter()
    await router.open("overlay0")
    await router.apply([BACKSTOP])
    await router.apply([BACKSTOP, LEADING])
    await router.apply([LEADING, BACKSTOP])
    await router.apply([BACKSTOP])
    assert router.history == [(BACKSTOP,), (BACKSTOP, LEADING), (BACKSTOP,)]
    assert router.applied == (BACKSTOP,)


async def test_a_refused_set_changes_nothing() -> None:
    router = MemoryRouter()
    await router.apply([BACKSTOP])
    router.refuse = RouterError("no")
    with pytest.raises(RouterError, match="no"):
        await router.apply([LEADING])
    assert router.applied == (BACKSTOP,)
    router.refuse = None
    await router.apply([LEADING])
    assert router.applied == (LEADING,)


async def test_a_disturbance_drops_routes_and_is_told_once() -> None:
    router = MemoryRouter()
    await router.apply([BACKSTOP, LEADING])
    router.disturb()
    assert router.applied == (BACKSTOP,)
    await router.changed()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(60):
            await router.changed()
