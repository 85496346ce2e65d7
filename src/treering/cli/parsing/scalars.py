"""The meaning of an unquoted word in a configuration: the core rules of YAML 1.2, stricter where mistakes are common.

PyYAML follows YAML 1.1, in which `1e-4` is text, `no` is false and `010` is eight.
"""

import math
import re

Scalar = str | int | float | bool | None

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LIMIT = 2**63


class ScalarError(ValueError):
    """An unquoted word that could be read in two ways, or a number that no setting can take."""

    def __init__(self, message: str, remedy: str):
        super().__init__(message)
        self.remedy = remedy


def resolve(text: str) -> Scalar:
    """Return the value of an unquoted `text`."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _NOT_FINITE.fullmatch(text):
        raise ScalarError(f"{text} is not a finite number", "leave the key out, or quote it if it is meant as text")
    if _OCTAL_OR_HEX.fullmatch(text):
        return bounded(int(text, 0), text)
    if _FLOAT.fullmatch(text):  # every whole number too
        return _number(text)
    return text


def _number(text: str) -> int | float:
    if _LEADING_ZERO.match(text):
        stripped = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text)
        eight = f", 0o{stripped} for an octal number" if re.fullmatch("[0-7]+", stripped) else ""
        raise ScalarError(
            f"{text[:40]} starts with a zero: some programs read that as octal",
            f'write {stripped[:40]}{eight}, or "{text[:40]}" for text',
        )
    if _INT.fullmatch(text):
        if len(text) > 20:  # int() itself is quadratic, and refuses thousands of digits
            raise ScalarError(f"{text[:20]}… has {len(text)} digits", "no setting takes such a number")
        return bounded(int(text), text)
    value = float(text)
    if math.isinf(value):
        raise ScalarError(f"{text[:40]} is too large for a number", "write a smaller one")
    return value


def bounded(value: int, text: str) -> int:
    """Return `value` if it fits into 64 bits, which every file format of this project can store."""
    if not -_LIMIT <= value < _LIMIT:
        raise ScalarError(f"{text[:20]} does not fit into 64 bits", "no setting takes such a number")
    return value
