"""A memory that holds packs up to some tokens: training in it runs out of memory where a test wants it to.

As a program it is the command line in such a memory: `memory_for_tests.py TOKENS WHERE RANK ARGUMENTS...`
"""

import os
import sys

import torch

from finetune.training.trainer import QwenVLTrainer

MESSAGE = (
    "CUDA out of memory. Tried to allocate 1.25 GiB. GPU 0 has a total capacity of 7.79 GiB of which 3 MiB is free."
)


class SmallMemory:
    """Patches the trainer's loss so that larger packs run out of memory.

    Args:
        tokens: of the largest pack that it holds.
        where: `forward`; `backward`, when the last layer has its gradients and the first has none; `recompute`, the
            same in a checkpointed layer's second forward; `host` and `device`, a true error of the CPU's or the GPU's
            allocator.
        first_step: from 1; before it there is memory for all.
        mode: of the model, `train` or `eval`; in the other there is memory for all.

    Attributes:
        failures: tokens of each pack that failed.
        left_behind: parameters that had a gradient after each failure in a backward.
    """

    def __init__(self, tokens: int, where: str = "forward", *, first_step: int = 1, mode: str = "train"):
        self.tokens, self.where, self.first_step, self.mode = tokens, where, first_step, mode
        self.failures: list[int] = []
        self.left_behind: list[int] = []
        self._real = QwenVLTrainer.compute_loss

    def install(self, monkeypatch=None):
        memory = self

        def compute_loss(trainer, model, inputs, **arguments):
            tokens = inputs["input_ids"].numel()
            is_meant = ("train" if model.training else "eval") == memory.mode
            if tokens <= memory.tokens or not is_meant or trainer.state.global_step + 1 < memory.first_step:
                return memory._real(trainer, model, inputs, **arguments)
            memory.failures.append(tokens)
            return memory._fail(trainer, model, inputs, arguments)

        if monkeypatch is None:
            QwenVLTrainer.compute_loss = compute_loss
        else:
            monkeypatch.setattr(QwenVLTrainer, "compute_loss", compute_loss)
        return self

    def _fail(self, trainer, model, inputs, arguments):
        if self.where == "forward":
            raise torch.OutOfMemoryError(MESSAGE)
        if self.where == "host":
            return torch.empty(1 << 60, dtype=torch.uint8)
        if self.where == "device":
            return torch.empty(2 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")
        (first_layer,) = (module for name, module in model.named_modules() if name.endswith("transformer.h.0"))

        def fail(*_):
            self.left_behind.append(sum(p.grad is not None for p in model.parameters()))
            raise torch.OutOfMemoryError(MESSAGE)

        def fail_in_backward(_module, _inputs, output):
            hook.remove()
            (output[0] if isinstance(output, tuple) else output).register_hook(fail)

        calls = []

        def fail_when_recomputed(*_):
            calls.append(None)
            if len(calls) == 2:  # the first was in the forward
                hook.remove()
                fail()

        if self.where == "backward":
            hook = first_layer.register_forward_hook(fail_in_backward)
        else:
            # A part of the layer: what is computed anew is the layer's forward, without its own hooks.
            hook = first_layer.mlp.register_forward_pre_hook(fail_when_recomputed)
        return self._real(trainer, model, inputs, **arguments)


if __name__ == "__main__":
    from finetune.cli import main

    tokens, where, rank, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        SmallMemory(int(tokens), where).install()
    sys.exit(main(arguments))
