"""A complement operator: the identity on free directions, less on those that are held.

    P = rest · (I − Q Qᵀ) + Q diag(values) Qᵀ        Q_Dk with orthonormal columns, 0 ≤ values, rest ≤ 1

The span of Q is closed by rest 1 and values 0; kept open alone by rest 0 and values 1; anything between is soft.
In the form I − Q diag(d) Qᵀ: d = 1 − values, with rest 1. Experts have a leading dimension E.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operator:
    Q: Tensor  # […, D, k]
    values: Tensor  # […, k]
    rest: float | Tensor

    def right(self, X: Tensor) -> Tensor:
        """X P, for X […, c, D]."""
        return self._combine(X, ((X @ self.Q) * self._weights()[..., None, :]) @ self.Q.mT)

    def inside(self, X: Tensor) -> Tensor:
        """X P Q: where rest is 0, all there is of X P, in k coordinates."""
        return (X @ self.Q) * self.values[..., None, :]

    def left(self, X: Tensor) -> Tensor:
        """P X, for X […, D, c]."""
        return self.combine(X, self.coefficients(X))

    def coefficients(self, X: Tensor) -> Tensor:
        """Qᵀ X. Of rows of Q and X that are dealt over ranks, the sum over ranks is that of the whole."""
        return self.Q.mT @ X

    def combine(self, X: Tensor, coefficients: Tensor) -> Tensor:
        """P X from X and its coefficients; local where the rows of Q and X are."""
        return self._combine(X, self.Q @ (self._weights()[..., :, None] * coefficients))

    def matrix(self) -> Tensor:
        """P itself, D × D."""
        identity = torch.eye(self.Q.shape[-2], dtype=self.Q.dtype, device=self.Q.device)
        return self.left(identity.expand(*self.Q.shape[:-2], *identity.shape))

    def _weights(self) -> Tensor:
        return self.values - self.rest

    def _combine(self, X: Tensor, inside: Tensor) -> Tensor:
        if isinstance(self.rest, float):  # the two that there are without a scale, and without a copy
            return inside if self.rest == 0 else inside.add_(X, alpha=self.rest)
        return X * self.rest + inside
