"""Supervision of ranks: heartbeats, watchdog, signals, the lock of a run."""
