"""From a source string to records with their places."""
