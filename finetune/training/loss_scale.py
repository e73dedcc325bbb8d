"""Loss scaling of float16: gradients of activations below 6e-8 would be zero, so the loss is scaled up and they down.

The scale is found as training goes (PyTorch's `GradScaler`): a step whose gradients overflow changes no weight, and
halves it; after 2,000 steps without an overflow it is doubled. Accelerate's optimizer unscales and skips.
"""

import torch
from accelerate import Accelerator, DistributedType

from finetune.errors import Failed

LEAST_SCALE = 2.0**-10
"""Below it gradients that are not scaled at all overflow by far, and a smaller scale makes most others zero."""


class GradientsOverflow(Failed):
    """Gradients overflow float16, however the loss is scaled."""

    def __init__(self, step: int, scale: float):
        super().__init__(
            f"the gradients overflow float16 at step {step}, with the loss scaled by {scale:g} already: nothing is "
            "learned any more. Use model.dtype: bfloat16 or float32, or lower train.learning_rate"
        )


class LossScale:
    """The loss scale of a run, and the steps that it skips.

    Args:
        accelerator: of the trainer. For a process without a GPU it gets the scaler that it makes for devices only.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._noted = 0  # the last step that was noted
        if accelerator.device.type == "cpu" and accelerator.distributed_type != DistributedType.DEEPSPEED:
            accelerator.scaler = torch.amp.GradScaler("cpu")
            accelerator.native_amp = True

    def take_news(self, step: int) -> dict[str, float] | None:
        """What is logged of a step that was skipped, once; None where it was not.

        Raises:
            GradientsOverflow: a smaller scale would not help.
        """
        scaler = self.accelerator.scaler
        if scaler is None or not self.accelerator.optimizer_step_was_skipped or step == self._noted:
            return None
        self._noted = step
        scale = scaler.get_scale()
        if scale < LEAST_SCALE:
            raise GradientsOverflow(step, scale)
        return {"skipped_steps": 1, "loss_scale": scale}


def skip_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Make the scaler skip a step by not calling the optimizer, fused ones included: those would look at the overflow
    themselves, and Accelerate, which advances the schedule, would not know that the step was skipped."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # of fused optimizers only
