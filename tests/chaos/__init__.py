"""What a run survives: kills, damage, other numbers of ranks, and input that nobody meant well. See __main__.py."""
