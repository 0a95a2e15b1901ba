"""What the log says of offloads that begin to fail and work again."""

import logging

import pytest

from overlaynet.backends.udp.offload_log import OffloadLog


def said(caplog: pytest.LogCaptureFixture, *states: str) -> list[str]:
    """What is logged when an offload is found in these states, one after the other."""
    caplog.set_level(logging.INFO)
    log = OffloadLog()
    for state in states:
        log.look({"udp_segment": state, "udp_gro": "on"})
    assert all(record.__dict__["fields"]["offload"] == "udp_segment" for record in caplog.records)
    return caplog.messages


FAILING, WORKS = "offload failing", "offload works again"


@pytest.mark.parametrize(
    ("states", "messages"),
    [
        (["on", "on"], []),
        (["off: EOPNOTSUPP", "off: EOPNOTSUPP"], []),
        (["on", "failing: EIO (1 times)"], [FAILING]),
        (["on", "off: EINVAL", "off: EINVAL"], [FAILING]),
        (["on", "off: EINVAL", "on"], [FAILING, WORKS]),
        (["on", "off"], []),
        (["failing: EIO (1 times)"], [FAILING]),
        (["on", "failing: EIO (1 times)", "failing: EIO (9 times)", "failing: EIO (9 times)"], [FAILING]),
        # It failed, and worked again, between two looks.
        (["on", "on (failed 1 times)", "on (failed 1 times)"], [FAILING, WORKS]),
        (["on", "failing: EIO (1 times)", "on (failed 1 times)", "on (failed 1 times)"], [FAILING, WORKS]),
        # It works for one peer and not for another.
        (
            ["on", "failing: EIO (1 times)", "on (failed 2 times)", "failing: EIO (3 times)", "on (failed 4 times)"],
            [FAILING],
        ),
        # Another engine has taken over.
        (["failing: EIO (1 times)", "on"], [FAILING, WORKS]),
        (["failing: EIO (1 times)", "on", "failing: EIO (1 times)"], [FAILING, WORKS, FAILING]),
    ],
)
def test_failing_and_working_again_are_each_said_once(
    caplog: pytest.LogCaptureFixture, states: list[str], messages: list[str]
) -> None:
    assert said(caplog, *states) == messages
