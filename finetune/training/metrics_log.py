"""metrics.jsonl of a run: what the trainer logs."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.run.folder import RunFolder


class WriteMetrics(TrainerCallback):
    """Writes every log of the trainer as a line of metrics.jsonl."""

    def __init__(self, run: RunFolder):
        self.run = run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            epoch = round(state.epoch, 4) if state.epoch is not None else None
            self.run.append_metrics({"step": state.global_step, **logs, "epoch": epoch})
