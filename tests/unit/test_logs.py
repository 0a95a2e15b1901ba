"""Logging for people and for machines."""

import io
import json
import logging

from overlaynet import logs


def test_text_is_a_line_with_the_fields_behind_it() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    logging.getLogger("overlaynet.daemon").info(
        "lease acquired", extra=logs.fields(subnet="10.244.1.0/24", hint="two words")
    )
    logging.getLogger("overlaynet.daemon").warning("careful")
    first, second = stream.getvalue().splitlines()
    assert first[8:] == ' lease acquired  subnet=10.244.1.0/24 hint="two words"'
    assert second[8:] == " warning: careful"
    assert "\x1b" not in stream.getvalue()


def test_json_is_one_object_a_line() -> None:
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    logging.getLogger("overlaynet.x").debug("peer added", extra=logs.fields(subnet="a\nb", level="mine"))
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("overlaynet.x").exception("bad")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["message"] == "peer added"
    assert first["level"] == "debug"
    assert first["field_level"] == "mine"
    assert first["subnet"] == "a\nb"
    assert first["time"].endswith("Z")
    assert "ValueError: boom" in second["exception"]


def test_configuring_twice_does_not_log_twice() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    logs.configure(stream=stream)
    logging.getLogger("overlaynet").info("once")
    assert len(stream.getvalue().splitlines()) == 1
