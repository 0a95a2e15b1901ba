"""Signals that come at the very end: the daemon is told to stop once more when nothing is left to do."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, os, signal, sys
from overlaynet.cli import main

def once_more():
    os.kill(os.getpid(), signal.SIGTERM)

Loop = asyncio.SelectorEventLoop
close, remove_signal_handler = Loop.close, Loop.remove_signal_handler

def watched_close(loop):
    once_more()
    close(loop)
    once_more()

def watched_remove_signal_handler(loop, number):
    once_more()
    return remove_signal_handler(loop, number)

Loop.close, Loop.remove_signal_handler = watched_close, watched_remove_signal_handler
status = main(sys.argv[1:])
once_more()
sys.exit(status)
"""


def test_signals_at_the_very_end_neither_kill_nor_leave_words(tmp_path: Path) -> None:
    """They come before, while and after asyncio closes its loop, and after that."""
    command = [sys.executable, "-c", PROGRAM, "run", "--store", "file", "--store-path", str(tmp_path / "store")]
    command += ["--status-socket", "", "--state-directory", str(tmp_path / "state")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("waiting for the network document" in line for line in lines)
        process.terminate()
        rest = list(lines)
        assert process.wait() == 0, rest
    assert "stopped" in rest[-1], rest
    assert not [line for line in rest if "ignored" in line or "Error" in line]
