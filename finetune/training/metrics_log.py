"""metrics.jsonl of a run: what the trainer logs, as it logs it."""

from transformers import TrainerCallback

from finetune.run.folder import RunFolder


class WriteMetrics(TrainerCallback):
    """Every log of the trainer becomes a line of metrics.jsonl."""

    def __init__(self, run: RunFolder):
        self.run = run

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            epoch = round(state.epoch, 4) if state.epoch is not None else None
            self.run.append_metrics({"step": state.global_step, **logs, "epoch": epoch})
