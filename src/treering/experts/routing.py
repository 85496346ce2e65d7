"""Which tokens go to which expert, as sorted rows: what every product over experts is computed on.

S rows = tokens × experts chosen for each, sorted by expert, equal experts in the order of their tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """The rows of one forward.

    Attributes:
        tokens: [S] the token of each row.
        experts: [S] the expert of each row, ascending.
        offsets: [E] int32, where each expert's rows end: expert e has rows offsets[e − 1] to offsets[e].
        order: [S] which of the (token, choice) pairs, counted token by token, each row is.
        choices: experts chosen for each token.
        first: which expert of the module the expert 0 of this routing is: not 0 where other ranks have those before it.
        counted: [S] which rows count for observers, of rows that other ranks sent; None: the observer knows.
    """

    tokens: Tensor
    experts: Tensor
    offsets: Tensor
    order: Tensor
    choices: int
    first: int = 0
    counted: Tensor | None = None

    def combine(self, rows: Tensor) -> Tensor:
        """Return the sum of each token's rows, [tokens, width], of rows [S, width].

        The rows are put back in the order of the pairs and summed there: the same sum on every run, where an indexed
        addition would depend on the order in which a GPU's threads arrive.
        """
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(self.order), device=self.order.device)
        if self.choices == 1:
            return rows[back]
        return rows[back].view(-1, self.choices, rows.shape[-1]).sum(1)


def route(chosen: Tensor, experts: int) -> Routing:
    """Sort the pairs of `chosen` [tokens, choices], the experts of each token, by expert."""
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True)
    choices = chosen.shape[-1]
    return Routing(tokens=order // choices, experts=ids, offsets=ends.to(torch.int32), order=order, choices=choices)
