"""What ranks know of each other: heartbeats, watchdog, signals, the lock of a run."""
