"""What a node chooses for itself: engine and threads."""

import logging
import os

import pytest

from overlaynet.backends.udp.choice import choose, threads_for


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
