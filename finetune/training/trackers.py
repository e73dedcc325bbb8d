"""What trackers (TensorBoard, Weights & Biases, MLflow and others) are told of a run, and where they keep it.

Transformers' callbacks give a tracker the dictionary of the training arguments: here it has the recipe and the data as
well. Where a tracker keeps its files is set by environment variables; what the user has set stays.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trl import SFTConfig

from finetune.data.summary import count_rows
from finetune.recipe import Recipe
from finetune.training.trained_model import TrainedModel
from finetune.training.training_data import TrainingData


class TrackedConfig(SFTConfig):
    """TRL's configuration, whose dictionary has `facts` of the run: it is what trackers get."""

    facts: Mapping[str, Any] = MappingProxyType({})

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | dict(self.facts)


def facts_of_run(recipe: Recipe, data: TrainingData, trained: TrainedModel) -> dict[str, Any]:
    """The resolved recipe, the rows of the data and the parameters, one value a key: `recipe.adapter.r`,
    `rows.train.kept`, `parameters.trained`."""
    facts: dict[str, Any] = dict(_flat("recipe", recipe.model_dump(mode="json")))
    for name, checked in data.checked.items():
        facts |= _flat(f"rows.{name}", count_rows(checked))
    facts["parameters.trained"] = trained.trained_parameters
    facts["parameters.total"] = sum(count.total for count in trained.parameters.values())
    return facts


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value):
        for number, inner in enumerate(value):
            yield from _flat(f"{name}.{number}", inner)
    else:
        yield name, value


@contextlib.contextmanager
def trackers_in(run: Path) -> Iterator[None]:
    """Inside, trackers keep their files in the run folder, unless the environment says where."""
    folder = run.resolve()
    wanted = {
        "TENSORBOARD_LOGGING_DIR": folder / "tensorboard",
        "WANDB_DIR": folder,  # it makes a folder `wandb` there
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "TRACKIO_DIR": folder / "trackio",
        "SWANLAB_LOG_DIR": folder / "swanlog",
        "COMET_OFFLINE_DIRECTORY": folder / "comet",
    }
    ours = {name: str(place) for name, place in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
