"""Rows that go wrong, each in its own way, and one that does not."""

import os
import subprocess
import sys
import time

from benchmarks.gpu.record import Figure


def works(context):
    yield Figure(figure="a figure", case="works", ours=[2.0, 4.0], peer=[1.0, 1.0], unit="s", at_most=2.5)


def raises(context):
    yield Figure(figure="a figure", case="before the error", ours=1.0)
    raise ValueError("a reason with | and\nlines")


def ends(context):
    """And leaves a process that holds its output open."""
    yield Figure(figure="a figure", case="before the end", ours=1.0)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    os._exit(9)


def hangs(context):
    yield Figure(figure="a figure", case="before it hangs", ours=1.0)
    time.sleep(600)
