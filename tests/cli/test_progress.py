"""The live line: a terminal redraws it, a file gets lines, other ranks are silent."""

import io

import pytest
from rich.console import Console

from treering.cli import console as console_module
from treering.cli.console import Live, duration


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200, markup=False, highlight=False)


def test_a_file_gets_one_plain_line_a_step(monkeypatch):
    console = plain_console()
    now = [100.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    live = Live(console, rank=0)
    live.start(10)
    for step in (1, 2, 3):
        live.step({"step": step, "loss": 2.5 / step, "lr": 1e-4, "tokens_per_second": 12345.6, "memory": 3 * 2**30})
        now[0] += 2.0
    live.stop()
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "step 1/10 · loss 2.5000 · lr 1.00e-04 · 12,346 tokens/s · 3.0 GiB"
    assert lines[2].endswith("ETA 14 s")
    assert len(lines) == 3


def test_a_terminal_gets_one_line_that_is_redrawn():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, markup=False)
    live = Live(console, rank=0)
    live.start(3)
    for step in (1, 2, 3):
        live.step({"step": step, "loss": 1.0})
    live.note("saved step-3")
    live.stop()
    text = console.file.getvalue()
    assert "step 3/3" in text
    assert "saved step-3" in text
    assert "\x1b[" in text


def test_other_ranks_say_nothing():
    console = plain_console()
    live = Live(console, rank=1)
    live.start(3)
    live.step({"step": 1, "loss": 1.0})
    live.note("x")
    live.table([{"a": 1}])
    live.stop()
    assert console.file.getvalue() == ""


def test_the_rank_comes_from_the_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    console = plain_console()
    Live(console).note("x")
    assert console.file.getvalue() == ""


def test_text_from_data_is_neither_markup_nor_control():
    console = plain_console()
    live = Live(console, rank=0)
    live.note("[red]stop[/red] \x1b[2Jgone")
    assert console.file.getvalue() == "[red]stop[/red] \\x1b[2Jgone\n"


def test_a_table_has_the_keys_as_columns():
    console = plain_console()
    Live(console, rank=0).table([{"what": "loss", "value": 0.25}, {"what": "tokens", "value": 12000}])
    text = console.file.getvalue()
    assert "what" in text
    assert "0.2500" in text
    assert "12,000" in text


@pytest.mark.parametrize(("seconds", "text"), [(4.2, "4 s"), (187, "3:07 min"), (43500, "12:05 h"), (59.7, "1:00 min")])
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
