"""The tokens of a completion behind its prompt.

At inference a prompt is tokenised alone, so prompt and completion are tokenised apart. Tokenizers of the SentencePiece
kind put a space before every text, which would stand between the two. They get the completion behind a character that
never becomes a part of another token; its tokens are cut off. What the tokens say together is compared with the
prompt and the completion as one text.
"""

import numpy as np
from numpy.typing import NDArray

from treering.data.sources.records import bad
from treering.data.token_places import Placer, Tokens

_CHARACTERS = ("\n", "\t", ".", "字")


def separator(placer: Placer, completion: str = "x") -> str:
    """A character to put before a completion; none for a tokenizer that adds nothing to the beginning of a text."""
    (alone,) = placer.encode([completion])
    for character in _CHARACTERS:
        text = character + completion
        (tokens,) = placer.place([text], placer.encode([text]))
        if (behind := behind_cut(tokens, 1, len(text))) is not None:
            return "" if behind.tolist() == alone.ids else character
    return ""


def behind_cut(tokens: Tokens, cut: int, length: int) -> NDArray[np.uint32] | None:
    """The tokens behind the first `cut` characters; None if a token lies on both sides."""
    ((first, _),) = tokens.ranges([(cut, length)], [(cut, length)])
    if first > 0:
        _, ends, places = tokens.places(np.array([first - 1]), [cut])
        if ends[0] > places[0]:
            return None
    return tokens.ids[first:]


def check_together(placer: Placer, prompt: str, completion: str, given: NDArray, behind: NDArray, where: str) -> None:
    """Raise SampleError unless the tokens of the two spell both, as the tokens of one text do."""
    (whole,) = placer.encode([prompt + completion])
    if placer.decode([*given.tolist(), *behind.tolist()]) != placer.decode(whole.ids):
        raise bad(
            where,
            "tokenizer",
            "the tokens of the prompt and of the completion do not spell the two one after the other; move the border "
            "between them to a place between two words",
            at="completion",
        )
