"""Where a turn ends and the template's text around it is divided, found by comparing it in two renderings."""

from collections.abc import Sequence
from typing import NamedTuple

from treering.data.chat.control_tokens import ControlTokens
from treering.data.chat.conversation import TextPiece


class FieldRun(NamedTuple):
    """Pieces of one field of one message with nothing between them."""

    begin: int
    end: int
    last: TextPiece
    after: int  # index of the first piece behind it


def field_runs(turn_pieces: Sequence[tuple[int, TextPiece]]) -> list[FieldRun]:
    """Return the runs of a turn. `turn_pieces` are its pieces, with their indices among all."""
    runs: list[FieldRun] = []
    for i, piece in turn_pieces:
        last = runs[-1] if runs else None
        if last is not None and last.end == piece.begin and last.last.source.field == piece.source.field:
            runs[-1] = FieldRun(last.begin, piece.end, piece, i + 1)
        else:
            runs.append(FieldRun(piece.begin, piece.end, piece, i + 1))
    return runs


def last_run(runs: list[FieldRun], ended: list[FieldRun]) -> int | None:
    """Return the index of the run that ends a turn, by its runs where it is the last turn; None if it was left out."""
    wanted = ended[-1].last
    same = [run for run in ended if run.last.source is wanted.source and run.last.stop == wanted.stop]
    stops = [run.last.stop for run in runs if run.last.source is wanted.source]
    most = max(stops, default=-1)
    ends = [i for i, run in enumerate(runs) if run.last.source is wanted.source and run.last.stop == most]
    if len(ends) < len(same):
        return None
    last = ends[len(same) - 1]
    seen = [run.last.source for run in runs[: last + 1]]
    while (
        last + 1 < len(runs)
        and runs[last + 1].last.source not in seen
        and runs[last + 1].after == (runs[last].after + 1)
    ):  # written only if the turn is not the last one, as the number of a call
        last += 1
    return last


def end_of_turn(control: ControlTokens, tail: str, behind: str, limit: int | None) -> tuple[int, bool] | None:
    """Return the length of `behind` that belongs to the turn, and whether the turn is endless; None if it has no end.

    Args:
        tail: the text that ends the turn when it is the last one.
        behind: the text between this turn and the next text of the data.
        limit: where text of another message begins in `behind`, if that is known.
    """
    tokens = list(control.any.finditer(tail))
    common = common_length(control, tail, behind)
    inside = [m.end() for m in tokens if m.end() <= common]
    closing = bool(tokens) and not tail[tokens[-1].end() :].strip()
    closed = [m.end() for m in control.special.finditer(tail, 0, common)]
    complete = bool(inside) and inside[-1] == tokens[-1].end()
    if closed and (not complete or closed[-1] == inside[-1]):
        return closed[-1], False
    if complete:  # by a token that may also be inside a turn: the text behind it belongs to the turn
        return (inside[-1] if not tail[inside[-1] : common].strip() else common), False
    if closing and limit is not None:
        other = control.any.match(behind, common)
        if tokens[-1].start() == common and other and other.end() <= limit:
            return other.end(), False  # the last turn of a conversation ends with another token than earlier ones
        if (at := behind.find(tokens[-1][0], 0, limit)) >= 0:
            return at + len(tokens[-1][0]), False
    return None if tail[common:].strip() else (common, not behind[:common].strip())


def word_border(control: ControlTokens, text: str, at: int) -> int:
    """Return the last place up to `at` that is behind a blank or a control token."""
    ends = [token.end() for token in control.any.finditer(text, 0, at) if token.end() <= at]
    blank = max((i + 1 for i in range(at) if text[i].isspace()), default=0)
    return at if at == len(text) else max([blank, *ends], default=0)


def common_length(control: ControlTokens, a: str, b: str) -> int:
    """Return the length of the common beginning, without the first half of a control token."""
    length = shared_length(a, b)
    for text in (a, b):
        near = max(0, length - 64)
        for token in control.any.finditer(text, near, length + 64):
            if token.start() < length < token.end():
                length = token.start()
    return length


def shared_length(a: str, b: str) -> int:
    """Return the length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def shared_end(a: str, b: str) -> str:
    """Return the common end."""
    length = shared_length(a[::-1], b[::-1])
    return a[len(a) - length :]
