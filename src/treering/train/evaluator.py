"""Between two steps: the loss on held-out documents, and samples to read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from treering.plan import Run
from treering.train import evaluate
from treering.train.checkpoints.manager import Keeper
from treering.train.prepare import RunData
from treering.train.ranks.watchdog import Watchdog
from treering.train.reporter import Teller
from treering.train.stopwatch import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Judge:
    run: Run
    data: RunData
    tokenizer: "PreTrainedTokenizerBase"
    keeper: Keeper
    tell: Teller
    watch: Stopwatch
    watchdog: Watchdog

    def after(self, step: int) -> None:
        """Evaluate the model after `step`. An evaluation that a signal interrupts is done when the run resumes."""
        asked, settings = self.watchdog.stop_asked, self.keeper.job.train.evaluate
        if self.data.eval is not None:
            with self.watch("evaluation"):
                held_out = evaluate.held_out_loss(self.run, self.data.eval, asked)
                self.keeper.counts["owed"] = step if held_out is None else None
                if held_out is None:
                    return
                self.keeper.judge(step, held_out)
                self.tell.evaluated(step, held_out)
        if settings.prompts:
            with self.watch("samples"):
                prompts, new_tokens = settings.prompts, settings.new_tokens
                texts = evaluate.samples(self.run, self.tokenizer, prompts, new_tokens, self.data.template, asked)
                self.tell.sampled(prompts, texts)

    def pay(self, start: int) -> None:
        """Do the evaluation that was interrupted before step `start` was saved."""
        if start and self.keeper.counts.get("owed") == start:
            self.after(start)
