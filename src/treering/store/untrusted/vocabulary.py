"""Limits on a tokenizer.json, before the tokenizers library reads it: ids, and how much longer a text can become."""

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from treering.core.errors import CheckpointError

_SPARSE, _FEW = 4, 1 << 20  # ids may be four times as many as tokens, or a million
_MOST_GROWTH = 256  # of a text, in a normalizer and a pre-tokenizer; published ones stay below 20
_UNICODE = {"NFD": 4, "NFC": 3, "NFKD": 18, "NFKC": 18, "Lowercase": 3, "BertNormalizer": 12}


def check_tokenizer(state: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError where a table by id would be huge, or a text would become hundreds of times as long."""
    ids, model = [], state.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids += list(vocabulary.values())
    elif isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    added = state.get("added_tokens")
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    whole = [id for id in ids if type(id) is int]
    tokens = len(whole) + (len(vocabulary) if isinstance(vocabulary, list) else 0)
    if len(whole) != len(ids) or max(whole, default=0) >= max(_FEW, _SPARSE * tokens):
        highest = max(whole, default=0) if len(whole) == len(ids) else next(id for id in ids if type(id) is not int)
        raise CheckpointError(f"{path} has the token id {str(highest)[:40]} among {tokens:,} tokens; refused")
    try:
        growth = _growth(state.get("normalizer")) * _growth(state.get("pre_tokenizer"))
    except (TypeError, ValueError, KeyError, AttributeError, binascii.Error) as error:
        raise CheckpointError(f"{path} has a normalizer that cannot be read ({type(error).__name__})") from None
    if growth > _MOST_GROWTH:
        raise CheckpointError(
            f"{path} has a normalizer that can make a text {min(growth, 10**12):,.0f} times as long; more than "
            f"{_MOST_GROWTH} is refused"
        )


def _growth(step: Any) -> float:
    """Return about how many times as long a text can become. Unicode's normal forms do not multiply one another."""
    growth, unicode = 1.0, 1
    for one in _steps(step):
        kind = one["type"]
        if kind == "Replace":
            growth *= _replacement(one["pattern"], one["content"])
        elif kind == "Prepend":
            growth *= 1 + len(one["prepend"])
        elif kind == "Metaspace":
            growth *= 1 + len(one.get("replacement", ""))
        elif kind == "ByteLevel":
            growth *= 4
        elif kind == "Precompiled":
            longest = _longest_mapping(one["precompiled_charsmap"])
            if longest > _UNICODE["NFKC"]:
                growth *= longest
            else:
                unicode = max(unicode, longest)
        else:
            unicode = max(unicode, _UNICODE.get(kind, 1))
    return growth * unicode


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    inner = [step] if step is not None else []
    while inner:
        one = inner.pop()
        nested = one.get("normalizers") or one.get("pretokenizers") if one["type"] == "Sequence" else None
        if nested is None:
            yield one
        else:
            inner += nested


def _replacement(pattern: Mapping[str, str], content: str) -> float:
    if pattern.get("String"):
        return max(1.0, len(content) / len(pattern["String"]))
    return 1.0 + len(content)  # an expression may match nothing, between any two characters


def _longest_mapping(encoded: str | None) -> int:
    """Return the length of the longest text that a table of SentencePiece writes for a character."""
    data = base64.b64decode(encoded or "", validate=True)
    texts = data[4 + int.from_bytes(data[:4], "little") :].decode("utf-8", "replace")
    return max(1, *map(len, texts.split("\0")))
