"""Text from files, data and arguments, without control characters and secrets, for a terminal."""

import json
import os
import re
from typing import Any

# C0 and C1 controls move cursors and open escape sequences; the bidirectional marks reorder what is read; lone
# surrogates cannot be printed at all.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_LINE_UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|secret|password|passwd|credentials?|(access|auth|hub|hf|wandb|bearer)_token)$|^token$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[A-Za-z0-9_-]{16,}")
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_SECRET_NAME = re.compile(r"TOKEN$|(^|_)KEY$|SECRET|PASSWORD|PASSWD|CREDENTIAL")  # of an environment variable
MASK = "***"


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def plain(text: str) -> str:
    """Return `text` as one line in which every control character is escaped."""
    return _UNSAFE.sub(_escape, text)


def plain_lines(text: str) -> str:
    """Return `plain(text)` with line breaks kept."""
    return _LINE_UNSAFE.sub(_escape, text)


def short(text: str, width: int = 80) -> str:
    """Return `plain(text)`, cut to `width` characters."""
    text = plain(text[: width + 1])
    return text if len(text) <= width else text[: width - 1] + "…"


def masked(key: str, value: Any) -> Any:
    """Return `value`, or a mask if its key or its form is that of a secret."""
    if not isinstance(value, str):
        return value
    if _SECRET_KEY.search(key):
        return MASK
    return _USER_IN_URL.sub(MASK + "@", _SECRET_VALUE.sub(MASK, value))


def scrubbed(text: str) -> str:
    """Return a message or traceback without secrets: text of their form, and values of variables named like them."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    return str(masked("", text))


def shown(value: Any, *, key: str = "") -> str:
    """Return a value from a configuration as a message quotes it."""
    if isinstance(value, dict):
        keys = ", ".join(short(str(k), 20) for k in list(value)[:4])
        return f"a mapping with {keys}{', …' if len(value) > 4 else ''}" if value else "an empty mapping"
    if isinstance(value, list):
        return short("[" + ", ".join(shown(v, key=key) for v in value[:8]) + (", …]" if len(value) > 8 else "]"))
    if isinstance(value, str):
        return '"' + short(masked(key, value), 60) + '" (text)'
    return short(json.dumps(value))


def count(n: int, singular: str, plural: str = "") -> str:
    """Return `1 problem` or `2 problems`."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def size(n: float) -> str:
    """Return a number of bytes in words, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")
