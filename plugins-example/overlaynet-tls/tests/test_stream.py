"""Packets in a stream: what comes out is what went in, however it was cut up, and hostile bytes do no harm."""

import random

import pytest

from overlaynet_tls.stream import Deframer, frame

PACKETS = [b"", b"a", bytes(range(256)), b"\0" * 65535, b"last"]


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1 << 20])
def test_packets_come_out_as_they_went_in_however_the_stream_is_cut_up(size: int) -> None:
    stream = b"".join(map(frame, PACKETS))
    deframer = Deframer()
    found = [packet for at in range(0, len(stream), size) for packet in deframer.feed(stream[at : at + size])]
    assert found == PACKETS


def test_a_packet_that_is_not_yet_complete_waits() -> None:
    deframer = Deframer()
    assert deframer.feed(frame(b"one") + frame(b"two")[:-1]) == [b"one"]
    assert deframer.feed(b"") == []
    assert deframer.feed(b"o") == [b"two"]


def test_whatever_comes_less_than_one_packet_is_kept() -> None:
    generator = random.Random(1)
    deframer = Deframer()
    for _ in range(1000):
        stream = generator.randbytes(generator.randrange(3000))
        packets = deframer.feed(stream)
        assert all(len(packet) <= 65535 for packet in packets)
        assert len(deframer._rest) < 2 + 65535
