"""Checks of files from others, before anything reads them: files of a model folder, JSON, headers of tensors."""

from treering.store.untrusted.files import (
    MAX_JSON,
    MOST_VALUES,
    Header,
    basename,
    in_folder,
    parse_json,
    read_bytes,
    read_header,
    read_json,
    visible,
)
from treering.store.untrusted.models import check_folder, first_line, notes_on, open_tokenizer

__all__ = [
    "MAX_JSON",
    "MOST_VALUES",
    "Header",
    "basename",
    "check_folder",
    "first_line",
    "in_folder",
    "notes_on",
    "open_tokenizer",
    "parse_json",
    "read_bytes",
    "read_header",
    "read_json",
    "visible",
]
