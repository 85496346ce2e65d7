"""One folder each; none imports another."""
