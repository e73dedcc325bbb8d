"""Replies of a model that is sharded over processes: the same forwards on all of them, in the same order.

Under FSDP2 and ZeRO-3 each forward gathers the parameters of every layer from all processes, so none can run one
alone. But how many forwards replies take is known only when they are there, and each process has its own questions.
So before each forward the processes agree by one number which kind is next: images to encode before text. Those that
want another kind, have no questions left, or never had any, run it on a blank image or a single token and drop the
result. Transformers' `synced_gpus` does the same for the tokens of one `generate`; this spans encoding, prefixes and
any number of batches.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from finetune.run.agreement import first_trouble, largest
from finetune.run.trouble import Trouble
from qwenvl import QwenVLForConditionalGeneration

T = TypeVar("T")

NOTHING, TEXT, IMAGES, FAILED = range(4)
"""What a process wants next; the largest of all processes is what happens."""


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are split over processes, by FSDP2 or ZeRO-3, so that a forward needs all of them."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_status") for parameter in model.parameters())


def lockstep_of(model: nn.Module, token: int) -> "AbstractContextManager[Lockstep | None]":
    """The lockstep of a sharded model; of another one a context without, as its processes need not wait."""
    return Lockstep(model, token) if is_sharded(model) else nullcontext()


class Lockstep:
    """Keeps the forwards of a sharded model the same on all processes, from entering to leaving its context.

    All processes enter and leave it, whatever they have to do inside. Inside, a call of the model's `forward` and
    `encode` wait for the others; leaving runs what the others still need. When a process fails between two forwards,
    all leave with an error. When it fails within one, the others are in the middle of a collective and cannot be
    told: it raises, and the launcher ends them.

    Args:
        model: as it is sharded, with or without an adapter.
        token: any id, for forwards whose results are dropped.
    """

    def __init__(self, model: nn.Module, token: int):
        self._model, self._token = model, token
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(base, QwenVLForConditionalGeneration), f"a {type(base).__name__} is not a Qwen-VL model"
        self._base = base
        self._is_inside = False  # a forward that counts
        self._is_dropped = False  # the forward is one whose result is dropped

    def __enter__(self) -> "Lockstep":
        # Before FSDP's own hook, which gathers.
        self._hook = self._base.register_forward_pre_hook(self._before_forward, prepend=True)
        self._through_root = _through_root(self._model)
        self._own_forward = vars(self._base).get("forward")  # one that a library has put there, such as autocast
        forward = self._base.forward

        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            call = functools.partial(forward, *args, **kwargs)
            output = call() if self._base is self._model else self._through_root(call)
            self._is_inside = False
            return output

        self._base.forward = counted  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._agree_on(NOTHING)
            elif not self._is_inside and not isinstance(error, _FromOthers):
                largest(FAILED)
                first_trouble(Trouble.of(error, dist.get_rank()))
        except _FromOthers as others:
            raise others.trouble.error() from None
        finally:
            self._hook.remove()
            if self._own_forward is None:
                del self._base.forward
            else:
                self._base.forward = self._own_forward  # type: ignore[method-assign]
            if isinstance(self._model, FSDPModule):
                del self._model.run_as_forward
        if isinstance(error, _FromOthers):
            raise error.trouble.error() from None

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """As the model's `get_image_features`: (images, 3, S, S) -> (images, n_queries, hidden)."""
        self._agree_on(IMAGES)
        self._is_inside = True
        features = self._through_root(functools.partial(self._base.get_image_features, pixels))
        self._is_inside = False
        return features

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not self._is_dropped:
            self._agree_on(TEXT)
            self._is_inside = True

    def _agree_on(self, wanted: int) -> None:
        """Return when all processes are about to do this, or all have nothing left to do."""
        while (now := largest(wanted)) != wanted:
            if now == FAILED:
                raise _FromOthers(first_trouble(None))
            self._run_dropped(now)

    @torch.no_grad()
    def _run_dropped(self, kind: int) -> None:
        """A forward for the others' sake."""
        config, device, was_training = self._base.config, self._base.device, self._model.training
        self._is_dropped = True
        self._model.eval()  # dropout would draw random numbers
        try:
            if kind == IMAGES:
                assert config.visual is not None, "a process encodes images, so the model has a vision side"
                size = config.visual["image_size"]
                pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
                self._through_root(functools.partial(self._base.get_image_features, pixels))
            else:
                ids = torch.tensor([[self._token]], device=device)
                self._base(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            self._is_dropped = False
            self._model.train(was_training)


class _FromOthers(BaseException):
    """Another process has failed; becomes an error when it leaves the lockstep. A BaseException, so that nothing
    between takes it for a damaged image."""

    def __init__(self, trouble: Trouble):
        super().__init__(trouble)
        self.trouble = trouble


def _through_root(model: nn.Module) -> Callable[[Callable[[], T]], T]:
    """Runs work as a forward of the model: FSDP2 gathers parameters outside of the blocks, and knows which module is
    the outermost, by its forward alone."""
    if not isinstance(model, FSDPModule):
        return lambda work: work()
    model.run_as_forward = lambda work: work()  # type: ignore[assignment]  # no parameter, nor a module
    register_fsdp_forward_method(model, "run_as_forward")
    run: Any = model.run_as_forward
    return run
