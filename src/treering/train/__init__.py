"""The trainer. `Job` and the settings import no torch; `train` does."""

from typing import TYPE_CHECKING, Any

from treering.train.config import Job

if TYPE_CHECKING:
    from treering.train.run import train

__all__ = ["Job", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from treering.train.run import train

        return train
    raise AttributeError(f"treering.train has no {name!r}")
