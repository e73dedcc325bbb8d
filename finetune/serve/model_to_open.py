"""What is served: how a model is opened once all arguments are known to be right."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from finetune.errors import UserError
from finetune.replies.model_style import find_use
from finetune.replies.task_replies import Style
from finetune.serve.asked import EngineClosed
from finetune.serve.batch_bounds import BatchBounds
from finetune.serve.engine import Engine
from finetune.serve.opened_model import open_served
from finetune.serve.replier import Replier
from finetune.serve.served_names import BetweenSteps, ServedNames
from qwenvl import QwenVLConfig, QwenVLTokenizer

KEPT_BYTES = 1_000_000_000
"""Features of some hundred images and keys and values of 1,400 tokens of the published model in 16 bits."""

T = TypeVar("T")


@dataclass(frozen=True)
class Backend:
    """What replies.

    Attributes:
        replier: to requests.
        names: what is served.
        tokenizer: of the model.
        between_steps: runs what changes the model; None where adapters cannot be loaded and dropped.
    """

    replier: Replier
    names: ServedNames
    tokenizer: QwenVLTokenizer
    between_steps: BetweenSteps | None = None


@dataclass(frozen=True)
class ModelToOpen:
    """A model whose weights are not loaded yet.

    Attributes:
        trained_length: tokens that it was trained on.
        context: most tokens that it takes, prompt and reply together.
        open: loads it.
    """

    trained_length: int
    context: int
    open: Callable[[], Backend]

    def length_limit(self, asked: int | None) -> int:
        """Most tokens of a prompt and its reply.

        Args:
            asked: with `--max-model-len`; None is what the model was trained on.

        Raises:
            UserError: more than it takes.
        """
        if asked is not None and asked > self.context:
            raise UserError(
                f"--max-model-len {asked}: the model takes {self.context:,} tokens, prompt and reply together"
            )
        return min(self.trained_length, self.context) if asked is None else asked


def pytorch_model(
    model: str,
    *,
    name: str | None = None,
    adapters: Mapping[str, str] | None = None,
    base_name: str | None = None,
    base: str | None = None,
    style: Style | None = None,
    system: str | None = None,
    prompt: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    bounds: BatchBounds = BatchBounds(),  # noqa: B008  # is copied by the engine
    max_queue: int = 64,
    keep_bytes: int = KEPT_BYTES,
) -> ModelToOpen:
    """A model that PyTorch computes in this process.

    Args:
        model, name, adapters, base_name, base, style, system, prompt, dtype, quantization: as `open_served`'s.
        bounds: of the batch.
        max_queue: most requests that wait.
        keep_bytes: of the device's memory, for what was computed of earlier requests: image features have a quarter,
            and keys and values of prompts the rest.

    Raises:
        InputError: there is no such model, or nothing says how it is asked.
    """
    use = find_use(model, base=base, style=style, quantization=quantization)
    config = QwenVLConfig.from_pretrained(use.source.base)

    def open_here() -> Backend:
        opened, names = open_served(
            model,
            name=name,
            adapters=adapters,
            base_name=base_name,
            base=base,
            style=style,
            system=system,
            prompt=prompt,
            dtype=dtype,
            quantization=quantization,
            prefix_bytes=keep_bytes - keep_bytes // 4,
        )
        engine = Engine(opened, bounds=bounds, max_queue=max_queue, keep_feature_bytes=keep_bytes // 4)
        return Backend(engine, names, opened.tokenizer, BetweenStepsOf(engine))

    return ModelToOpen(config.seq_length, config.max_position_embeddings, open_here)


class BetweenStepsOf:
    """`run_between_steps` of an engine; what comes once it is closed fails in its future, the model gone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, work: Callable[[], T], /) -> "Future[T]":
        try:
            return self._engine.run_between_steps(work)
        except EngineClosed as error:
            failed: Future[T] = Future()
            failed.set_exception(error)
            return failed
