"""From the text of a configuration to a checked configuration, or an error with every problem at once."""

from treering.cli.parsing.convert import json_schema, validate
from treering.cli.parsing.problems import ConfigErrors, Problem
from treering.cli.parsing.reader import ConfigDocument, read_file, read_text
from treering.cli.parsing.resolved import to_yaml

__all__ = ["ConfigDocument", "ConfigErrors", "Problem", "json_schema", "read_file", "read_text", "to_yaml", "validate"]
