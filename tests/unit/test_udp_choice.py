"""What a node chooses for itself: engine and threads."""

import logging
import os
import socket
import sys
from ipaddress import IPv4Network

import pytest

from overlaynet.backends.udp.choice import choose, threads_for
from overlaynet.backends.udp.engine import PeerTable
from overlaynet.backends.udp.python_engine import PythonEngine
from overlaynet.errors import BackendError
from overlaynet.model import Subnets


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 3), (8, 4), (256, 4)])
def test_half_of_the_cpus_have_a_thread_and_no_more_than_four(cpus: int, threads: int) -> None:
    assert threads_for(cpus) == threads


@pytest.mark.parametrize(("wanted", "threads"), [("auto", 3), ("1", 1), ("64", 64)])
def test_the_cpus_that_count_are_those_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, wanted: str, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    assert choose("native", "auto", wanted).threads == threads


@pytest.mark.parametrize(("wanted", "said"), [("auto", []), ("1", []), ("2", ["the Python engine has one thread"])])
def test_the_python_engine_has_one_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wanted: str, said: list[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    caplog.set_level(logging.INFO)
    assert choose("python", "auto", wanted).threads == 1
    assert caplog.messages == said


NOT_BUILT = "import of overlaynet.backends.udp._native halted; None in sys.modules"


@pytest.fixture
def without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where overlaynet was installed without a compiler."""
    monkeypatch.delitem(sys.modules, "overlaynet.backends.udp.native_engine", raising=False)
    monkeypatch.delattr("overlaynet.backends.udp._native", raising=False)
    monkeypatch.setitem(sys.modules, "overlaynet.backends.udp._native", None)


@pytest.mark.usefixtures("without_the_extension")
def test_where_no_native_engine_was_built_the_python_engine_carries_the_packets_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    choice = choose("auto", "auto", "auto")
    with socket.socket(type=socket.SOCK_DGRAM) as tun, socket.socket(type=socket.SOCK_DGRAM) as wire:
        engine = choice.make([(tun.fileno(), [wire.fileno()])], 1472, PeerTable(Subnets(IPv4Network("10.244.1.0/24"))))
        assert isinstance(engine, PythonEngine)
        engine.close()
    assert choice.threads == 1
    assert not choice.offload_header
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage() == "native packet engine not built"
    assert str(vars(record)["fields"]["reason"]) == NOT_BUILT


@pytest.mark.usefixtures("without_the_extension")
def test_a_native_engine_that_is_asked_for_and_was_not_built_is_an_error_with_the_way_out() -> None:
    with pytest.raises(BackendError) as error:
        choose("native", "auto", "auto")
    assert str(error.value) == (
        f"the native packet engine is not there ({NOT_BUILT}); install overlaynet where there is a C compiler, "
        "or choose --udp-engine python"
    )
