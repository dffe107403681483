"""Ctrl-C while processes are started is neither lost nor theirs."""

import subprocess
import sys

from tests.support.command import ENVIRONMENT


def test_ctrl_c_is_raised_afterwards_and_does_not_reach_the_processes() -> None:
    """In a process of its own, whose main thread has signals."""
    program = """
import os, signal, subprocess, sys, threading
from store.interrupts import interrupts_delayed
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with interrupts_delayed():
        os.kill(0, signal.SIGINT)
        child = [sys.executable, "-c", "import os, signal; os.kill(0, signal.SIGINT); print('on')"]
        thread = threading.Thread(target=subprocess.run, args=(child,))
        thread.start()
        thread.join()
except KeyboardInterrupt:
    print("raised", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, start_new_session=True,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("on\nraised True\n", "")
