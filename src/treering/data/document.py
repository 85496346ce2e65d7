"""A tokenised document as a value. It needs no library of data, so that what measures documents needs none either."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Document:
    """The tokens of one document and which of them are trained."""

    ids: NDArray[np.uint32]
    mask: NDArray[np.bool_]  # True: trained; never the first token
    sample_id: str
