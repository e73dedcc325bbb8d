"""The packing budget in run.json, where a resumed run finds it."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.batches.budget import NOTES, ChosenBudget
from finetune.run.folder import RunFolder


class NoteBudgets(TrainerCallback):
    """Writes the budget of the run into run.json, and each lower one after a pack did not fit.

    Args:
        budget: at the start of this part of the run, with what earlier parts noted.
    """

    def __init__(self, run: RunFolder, budget: ChosenBudget):
        self.run = run
        self._tokens = budget.tokens
        self._notes = list(budget.lowered)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.run.update_run({"tokens_per_batch": self._tokens, NOTES: self._notes})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "out_of_memory_tokens" in logs:
            budgets = {key: tokens for key, tokens in logs.items() if "tokens" in key}
            self._notes.append({"step": state.global_step, **budgets})
            self.run.update_run({NOTES: self._notes})
