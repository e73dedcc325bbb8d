"""Adapters in a model that runs: put in and taken out, and what they change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.functional import delete_adapter

from finetune.errors import UserError
from finetune.replies.active_adapter import activate, adapter_layers, has_adapter
from qwenvl import QwenVLForConditionalGeneration
from qwenvl.checkpoint.adapter_config import INIT_TAKES_FROM_BASE
from qwenvl.loading import AdapterReading, add_adapter


class ModelAdapters:
    """The adapters of a model, by names that are never used twice.

    Between calls none of them is active: the model computes as the base. Each is LoRA that leaves the base as it is,
    so that it computes the same whatever else is loaded. For one thread at a time.

    Attributes:
        model: the base; the same object whatever is loaded, with layers of PEFT's inside once there was an adapter.

    Args:
        model: without adapters, in eval mode.
        base: folder or hub id of its checkpoint.
    """

    def __init__(self, model: QwenVLForConditionalGeneration, base: str) -> None:
        self.model = model
        self._base, self._added = base, 0
        self._adapted: PeftModel | None = None
        self._of_vision: set[str] = set()

    def add(self, folder: str, reading: AdapterReading) -> str:
        """Put an adapter into the model.

        Args:
            folder: of the adapter.
            reading: `qwenvl.loading.read_adapter(folder)`.

        Returns:
            Its name in the model.

        Raises:
            InputError: it is of another base, damaged, does not fit, or changes the base; the model is as it was then.
        """
        if changed := changes_base(reading):
            raise UserError(f"{folder}: {changed}. {MERGE}")
        self._added += 1
        name = f"adapter_{self._added}"
        if self._adapted is not None:
            # PEFT looks at the one that it takes for active, which may be gone.
            tuner: Any = self._adapted.base_model
            tuner.active_adapter = name
        try:
            self._adapted = add_adapter(self._adapted or self.model, self._base, folder, reading, name=name)
        except BaseException:
            self.remove(name)
            raise
        activate(self.model, None)
        visual = self.model.transformer.visual
        if visual is not None and any(has_adapter(layer, name) for layer in adapter_layers(visual)):
            self._of_vision.add(name)
        return name

    def remove(self, name: str) -> None:
        """Take an adapter out of the model, and its weights out of memory."""
        activate(self.model, None)
        if self._adapted is not None:
            self._adapted.peft_config.pop(name, None)
        elif hasattr(self.model, "peft_config"):  # of a first adapter that failed
            del self.model.peft_config
        delete_adapter(self.model, name, prefix="lora_")
        self._of_vision.discard(name)

    def touches_vision(self, name: str) -> bool:
        """Whether an adapter changes the features of images."""
        return name in self._of_vision

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Let one adapter compute, and no other; None is the base."""
        activate(self.model, name)
        try:
            yield
        finally:
            activate(self.model, None)


MERGE = "Merge it (finetune merge) and serve the folder, or serve the adapter alone"


def changes_base(reading: AdapterReading) -> str:
    """Why an adapter cannot be in a model beside others: it is none of LoRA, or changes what they compute on; empty
    where it can."""
    config = reading.config
    if config is None:
        return "several names are served with LoRA, and this adapter is of another method"
    bias = getattr(config, "bias", "none")
    if bias != "none":
        return f"bias is {bias!r}: it changes biases of the base, under all other names too"
    if getattr(config, "layer_replication", None):
        return "layer_replication changes the base, under all other names too"
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.startswith(INIT_TAKES_FROM_BASE):
        return f"init_lora_weights is {init!r}: it takes weights out of the base, under all other names too"
    return ""
