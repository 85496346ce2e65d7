"""Messages of rows of tokens, as they are or with each tensor in 8 bits, and what the coding costs in accuracy.

A row of a message consists of parts: the heads of q, of k and of v, or of the output. With codecs, each part of a
message is coded for itself; what a receiver needs is inside, and sizes follow from shapes.

Shapes: N rows (tokens × rows of the batch), H heads, D width of a head, W width of a row.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from treering.core.row_messages import Transport, all_gather_rows, all_to_all
from treering.techniques.ulysses.codec import RowCodec, aligned, codec

Content = Literal["query", "key", "value", "output"]
CONTENTS: tuple[Content, ...] = get_args(Content)


class MessagePart(NamedTuple):
    """Some heads of one tensor in each row of a message."""

    content: Content
    heads: int
    width: int


class Rows(NamedTuple):
    """A message: so many rows of these parts."""

    number: int
    parts: tuple[MessagePart, ...]

    @property
    def width(self) -> int:
        return sum(part.heads * part.width for part in self.parts)

    @property
    def elements(self) -> int:
        return self.number * self.width


@dataclass(frozen=True, kw_only=True)
class Codecs:
    """What is coded, and how; None: sent in the dtype of the model.

    Attributes:
        forward, backward: By content; of the backward the gradients of it.
        errors: Where the errors of some messages are added up.
    """

    forward: Mapping[Content, RowCodec] = field(default_factory=dict)
    backward: Mapping[Content, RowCodec] = field(default_factory=dict)
    errors: "CodingErrors | None" = None

    @classmethod
    def of(cls, name: str, uncoded: Collection[str] = (), errors: "CodingErrors | None" = None) -> "Codecs":
        """Return one codec for all contents that are not `uncoded`; that may name `gradients` as well."""
        one = codec(name)
        if one is None:
            return cls()
        forward = {content: one for content in CONTENTS if content not in uncoded}
        backward = {} if "gradients" in uncoded else dict.fromkeys(CONTENTS, one)
        return cls(forward=forward, backward=backward, errors=errors)

    def check(self, key_width: int, value_width: int) -> None:
        """Refuse widths of heads that a codec cannot write."""
        for kinds in (self.forward, self.backward):
            for content, one in kinds.items():
                one.check(key_width if content in ("query", "key") else value_width)

    def _coding(self, *, gradients: bool) -> Mapping[Content, RowCodec]:
        return self.backward if gradients else self.forward

    def size(self, rows: Rows, itemsize: int, *, gradients: bool) -> int:
        """Return the bytes of a message."""
        if not self.any(gradients=gradients):
            return rows.elements * itemsize
        return sum(self._size(part, rows.number, itemsize, gradients=gradients) for part in rows.parts)

    def any(self, *, gradients: bool) -> bool:
        """Return whether anything is coded in this pass."""
        return bool(self._coding(gradients=gradients))

    def _size(self, part: MessagePart, number: int, itemsize: int, *, gradients: bool) -> int:
        coding = self._coding(gradients=gradients).get(part.content)
        if coding is not None:
            return coding.size(number, part.heads, part.width)
        return aligned(number * part.heads * part.width * itemsize)

    def encode(self, flat: Tensor, messages: Sequence[Rows], *, gradients: bool) -> tuple[Tensor, list[int]]:
        """Return the messages that `flat` holds, one after the other, as bytes, and the size of each."""
        sizes = [self.size(rows, flat.element_size(), gradients=gradients) for rows in messages]
        coded = torch.empty(sum(sizes), dtype=torch.uint8, device=flat.device)
        errors = self.errors
        measures = errors is not None and errors.due()
        for message, rows, into in zip(flat.split([rows.elements for rows in messages]), messages, coded.split(sizes)):
            start = 0
            for part, x_NHD in _parts(message, rows):
                size = self._size(part, rows.number, flat.element_size(), gradients=gradients)
                coding = self._coding(gradients=gradients).get(part.content)
                if coding is not None:
                    coding.encode(x_NHD, out=into[start : start + size])
                    if measures:
                        assert errors is not None
                        errors.add(coding.error(x_NHD, into[start : start + size]), gradients=gradients)
                elif size:
                    piece = x_NHD.contiguous().view(-1).view(torch.uint8)
                    into[start : start + len(piece)].copy_(piece)
                    into[start + len(piece) : start + size].zero_()
                start += size
        return coded, sizes

    def decode(self, coded: Tensor, messages: Sequence[Rows], dtype: torch.dtype, *, gradients: bool) -> Tensor:
        """Return the messages in `dtype`, one after the other and flat."""
        flat = torch.empty(sum(rows.elements for rows in messages), dtype=dtype, device=coded.device)
        sizes = [self.size(rows, dtype.itemsize, gradients=gradients) for rows in messages]
        pieces = zip(flat.split([rows.elements for rows in messages]), messages, coded.split(sizes))
        for message, rows, given in pieces:
            start = 0
            for part, x_NHD in _parts(message, rows):
                size = self._size(part, rows.number, dtype.itemsize, gradients=gradients)
                coding = self._coding(gradients=gradients).get(part.content)
                if coding is not None:
                    x_NHD.copy_(coding.decode(given[start : start + size], rows.number, part.heads, part.width, dtype))
                elif size:
                    used = given[start : start + x_NHD.numel() * dtype.itemsize]
                    x_NHD.copy_(used.view(dtype).view(x_NHD.shape))
                start += size
        return flat


NONE = Codecs()


class CodingErrors:
    """Sums of squares of coding errors, and of what was coded, of every so many messages of this rank.

    Args:
        every: one of so many messages is decoded again and compared. An odd number meets all kinds in turn.
        device: where sums are added up.
    """

    def __init__(self, every: int, device: torch.device | str = "cpu"):
        self.every, self.seen, self.device = every, 0, device
        self.sums: dict[str, Tensor] = {}

    def due(self) -> bool:
        """Count a message, and return whether it is to be measured."""
        self.seen += 1
        return self.seen % self.every == 0

    def add(self, squares: Tensor, *, gradients: bool) -> None:
        name = "gradients" if gradients else "forward"
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares

    def metrics(self, group: Any) -> dict[str, float]:
        """Return the relative errors since the last call, over all ranks of `group`. A collective."""
        names = ("forward", "gradients")
        # Ranks may have measured different messages: one without heads sends none.
        device = next(iter(self.sums.values())).device if self.sums else self.device
        nothing = torch.zeros(2, dtype=torch.float64, device=device)
        squares = torch.cat([self.sums.pop(name, nothing) for name in names])
        dist.all_reduce(squares, group=group)
        pairs = zip(names, squares.view(2, 2).tolist())
        return {f"ulysses/error_{name}": (error / size) ** 0.5 for name, (error, size) in pairs if size}


def _parts(message: Tensor, rows: Rows) -> list[tuple[MessagePart, Tensor]]:
    """Return the parts of a flat message as views [N, H, D]."""
    pieces = message.view(rows.number, rows.width).split([part.heads * part.width for part in rows.parts], dim=1)
    return [(part, piece.unflatten(1, (part.heads, part.width))) for part, piece in zip(rows.parts, pieces)]


def exchange(
    flat: Tensor, sent: Sequence[Rows], received: Sequence[Rows], group: str, transport: Transport, codecs: Codecs,
    *, gradients: bool = False,
) -> Tensor:  # fmt: skip
    """Return what each rank of a group has sent to this one, flat. A collective.

    Args:
        flat: the messages for each rank, one after the other.
        sent, received: their rows.
        gradients: whether it is the backward that sends.
    """
    send = all_to_all(transport)
    if not codecs.any(gradients=gradients):
        return send(flat, [rows.elements for rows in sent], [rows.elements for rows in received], group)
    coded, sizes = codecs.encode(flat, sent, gradients=gradients)
    arriving = [codecs.size(rows, flat.element_size(), gradients=gradients) for rows in received]
    return codecs.decode(send(coded, sizes, arriving, group), received, flat.dtype, gradients=gradients)


def gather(
    flat: Tensor, of_ranks: Sequence[Rows], place: int, group: str, transport: Transport, codecs: Codecs
) -> Tensor:
    """Return the messages of all ranks, flat, of which `flat` is that of the rank at `place`. A collective."""
    if not codecs.any(gradients=False):
        return all_gather_rows(flat, [rows.elements for rows in of_ranks], group, transport)
    coded, _ = codecs.encode(flat, of_ranks[place : place + 1], gradients=False)
    sizes = [codecs.size(rows, flat.element_size(), gradients=False) for rows in of_ranks]
    return codecs.decode(all_gather_rows(coded, sizes, group, transport), of_ranks, flat.dtype, gradients=False)
