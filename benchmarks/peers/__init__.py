"""Other people's packages, each in an environment of its own under `.venv-peers/`, beside ours in one process."""
