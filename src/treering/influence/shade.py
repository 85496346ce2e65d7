"""Tokens of a document, shaded by their share of its score: as a value, and as a fragment of HTML.

    share of token t = s_t / Σ_t |s_t|

Shares are positive where a token is helpful, and their absolute values add up to 1. A token is shaded in one of five
levels, in proportion to the largest share of the document. Of long texts only the parts with the largest shares are
shown, and how much of the document that is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treering.data.examine import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEVELS = 5
HELPFUL, HARMFUL = (31, 119, 180), (214, 96, 20)  # blue and orange: the two that colour-blind readers tell apart
_AROUND = 6  # tokens shown on each side of one with a large share
_REPLACEMENT = "\ufffd"
_BYTES = 4  # of the longest character in UTF-8: at most so many tokens make up one


@dataclass(frozen=True, kw_only=True)
class ShadedToken:
    """Consecutive tokens with one shade. `level` is −5 (harmful) to 5; `left_out`: tokens that are not shown here."""

    text: str  # as it is in the data
    share: float
    level: int
    left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class ShadedText:
    """A document's tokens with their shades.

    Attributes:
        tokens: in order, with an entry without text for each part that is left out.
        largest: the largest absolute share; a token of level 5 has about that.
        shown, total: tokens.
        covered: the sum of the absolute shares of what is shown.
    """

    tokens: tuple[ShadedToken, ...]
    largest: float
    shown: int
    total: int
    covered: float

    @property
    def legend(self) -> str:
        """What the shades mean, and how much is left out."""
        text = f"blue: helpful, orange: harmful; the darkest has {self.largest:.1%} of the score"
        if self.shown < self.total:
            text += f"; shown: {self.shown:,} of {self.total:,} tokens, which have {self.covered:.0%} of the score"
        return text


def shade(texts: Sequence[str], scores: NDArray[Any], *, most: int = 400) -> ShadedText:
    """Return the tokens of a document with shades.

    Args:
        texts: the text of each token, see `token_texts`.
        scores: [tokens], the score of each token for one query.
        most: about so many tokens are shown at most.
    """
    if len(texts) != len(scores):
        raise ValueError(f"{len(texts)} texts and {len(scores)} scores of tokens")
    values = np.asarray(scores, dtype=np.float64)
    absolute = float(np.abs(values).sum())
    shares = values / absolute if absolute > 0 else np.zeros(len(values))
    largest = float(np.abs(shares).max(initial=0.0))
    levels = np.rint(LEVELS * shares / largest).astype(int) if largest > 0 else np.zeros(len(values), dtype=int)
    visible = _visible(np.abs(shares), most)
    tokens: list[ShadedToken] = []
    for i, text in enumerate(texts):
        if visible[i]:
            tokens.append(ShadedToken(text=text, share=float(shares[i]), level=int(levels[i])))
        elif i and not visible[i - 1]:
            tokens[-1] = ShadedToken(text="", share=0.0, level=0, left_out=tokens[-1].left_out + 1)
        else:
            tokens.append(ShadedToken(text="", share=0.0, level=0, left_out=1))
    return ShadedText(
        tokens=tuple(tokens),
        largest=largest,
        shown=int(visible.sum()),
        total=len(texts),
        covered=float(np.abs(shares)[visible].sum()),
    )


def _visible(shares: NDArray[np.float64], most: int) -> NDArray[np.bool_]:
    """Return which tokens are shown: those with the largest shares and their neighbours, until there are `most`."""
    if len(shares) <= most:
        return np.ones(len(shares), dtype=np.bool_)
    visible = np.zeros(len(shares), dtype=np.bool_)
    for i in np.argsort(-shares, kind="stable"):
        visible[max(0, i - _AROUND) : i + _AROUND + 1] = True
        if visible.sum() >= most:
            break
    return visible


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds. Tokens of one character: the first has its text, the others have none."""
    if not len(ids):
        return []
    tokens = [int(id) for id in ids]
    decode = lambda lists: tokenizer.batch_decode(lists, clean_up_tokenization_spaces=False)  # noqa: E731
    # Some tokenizers drop the blank at the beginning of a text, so a token is decoded behind the one before it.
    alone, pairs = decode([[id] for id in tokens]), decode([list(pair) for pair in pairwise(tokens)])
    texts = [alone[0]]
    for i, pair in enumerate(pairs):
        texts.append(pair[len(alone[i]) :] if pair.startswith(alone[i]) else alone[i + 1])
    i = 0
    while i < len(tokens):
        length = 1
        if _REPLACEMENT in alone[i]:
            for longer in range(2, min(_BYTES, len(tokens) - i) + 1):
                (text,) = decode([tokens[i : i + longer]])
                if _REPLACEMENT not in text:
                    texts[i : i + longer] = [text] + [""] * (longer - 1)
                    length = longer
                    break
        i += length
    return texts


def html(shaded: ShadedText, title: str = "") -> str:
    """Return a fragment of HTML: the shaded text with its legend. It is escaped, and loads nothing."""
    body = []
    for token in shaded.tokens:
        if token.left_out:
            body.append(f'<span style="color:#888"> … {token.left_out:,} tokens … </span>')
            continue
        text = escape(_shown(token.text))
        if token.level:
            red, green, blue = HELPFUL if token.level > 0 else HARMFUL
            style = f"background:rgba({red},{green},{blue},{0.8 * abs(token.level) / LEVELS:.2f})"
            text = f'<span style="{style}" title="{token.share:+.2%}">{text}</span>'
        body.append(text)
    heading = f"<h4>{escape(printable(title))}</h4>" if title else ""
    text = f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(body)}</div>'
    return f'<section>{heading}{text}<p style="color:#666">{escape(shaded.legend)}</p></section>\n'


def _shown(text: str) -> str:
    """Return text with line breaks kept and other control characters escaped."""
    return "\n".join(printable(line) for line in text.split("\n"))
