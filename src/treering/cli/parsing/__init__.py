"""Configuration text to a checked configuration: read, overridden, checked, or refused with every reason at once."""

from treering.cli.parsing.convert import json_schema, validate
from treering.cli.parsing.problems import ConfigErrors, Problem
from treering.cli.parsing.reader import Document, read_file, read_text
from treering.cli.parsing.resolved import to_yaml

__all__ = ["ConfigErrors", "Document", "Problem", "json_schema", "read_file", "read_text", "to_yaml", "validate"]
