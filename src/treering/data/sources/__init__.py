"""From a source string to records, each with its place."""
