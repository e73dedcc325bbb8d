"""The run folder: what a run writes about itself."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files.atomic_writes import make_folder, write_text
from finetune.files.path_errors import path_errors
from finetune.run import metrics_file
from finetune.run.json_values import to_json, with_floats
from finetune.run.lock import LOCK_FILE, lock_folder


class RunFolder:
    """The folder of one run.

    | name | what |
    |---|---|
    | `recipe.yaml` | the recipe as it was resolved: file, defaults and overrides |
    | `run.json` | versions, fingerprints, state; its `identity` decides whether a resume continues the same run |
    | `metrics.jsonl` | one JSON object a line, each with its `step` |
    | `log.txt` | what was printed, warned of and complained about, each line with its time |
    | `checkpoints/step-N/` | state after N optimizer steps, with a manifest (`checkpoints.py`) |
    | `adapter/` | the result, in PEFT's format |
    | `report.html` | the run to look at |
    | `left_out.jsonl` | the rows that are not trained on, or not whole, with reasons (`left_out.py`) |
    | `rows.npz` | a digest of each row, by which its place in the order is found again |
    | `tensorboard/`, `wandb/` ... | what the trackers of `train.report_to` keep |
    | `run.lock` | held while a process trains here |
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.run_file = self.path / "run.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.log_file = self.path / "log.txt"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.rows_file = self.path / "rows.npz"
        self.report_file = self.path / "report.html"
        self.lock_file = self.path / LOCK_FILE

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run folder while the context is open; see `lock.lock_folder`."""
        return lock_folder(self.path)

    def write_recipe(self, text: str) -> None:
        """Write `recipe.yaml`, atomically."""
        make_folder(self.path)
        write_text(self.recipe_file, text)

    def write_run(self, run: dict[str, Any]) -> None:
        """Write `run.json`, atomically. Values are JSON's; non-finite numbers as in `metrics_file`."""
        make_folder(self.path)
        write_text(self.run_file, to_json(run, indent=2) + "\n")

    def read_run(self) -> dict[str, Any] | None:
        """What `run.json` says; None where no run was started in this folder.

        Raises:
            UserError: it cannot be read, or is not a JSON object.
        """
        with path_errors(self.run_file, "read", "Restore it, or start a new run"):
            try:
                content = self.run_file.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        try:
            run = with_floats(json.loads(content.decode()))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.run_file} is not JSON ({error}): restore it, or start a new run") from None
        if not isinstance(run, dict):
            raise UserError(f"{self.run_file} is not a JSON object: restore it, or start a new run")
        return run

    def update_run(self, changes: Mapping[str, Any]) -> None:
        """Replace entries of `run.json`, or add them; the others stay.

        Raises:
            UserError: there is none, or it is damaged.
        """
        run = self.read_run()
        if run is None:
            raise UserError(f"{self.run_file} has been deleted while the run needs it: start the run again")
        self.write_run({**run, **changes})

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl`; see `metrics_file.append_metrics`."""
        metrics_file.append_metrics(self.metrics_file, record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`; see `metrics_file.read_metrics`."""
        return metrics_file.read_metrics(self.metrics_file)

    def forget_metrics_after(self, step: int) -> int:
        """Drop the records of later steps; see `metrics_file.forget_metrics_after`."""
        return metrics_file.forget_metrics_after(self.metrics_file, step)

    def forget_evaluation_of(self, step: int) -> int:
        """Drop the records of an evaluation; see `metrics_file.forget_evaluation_of`."""
        return metrics_file.forget_evaluation_of(self.metrics_file, step)
