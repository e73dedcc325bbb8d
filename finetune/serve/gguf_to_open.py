"""A folder of `finetune export --to gguf`, served: vision in PyTorch, the language model in llama.cpp."""

import torch

from finetune.replies.gguf_model import gguf_use, open_gguf
from finetune.replies.task_replies import Style
from finetune.serve.asked_name import Asking, name_of
from finetune.serve.batch_bounds import BatchBounds
from finetune.serve.engine import Engine
from finetune.serve.model_to_open import Backend, ModelToOpen
from finetune.serve.opened_model import OpenedModel
from finetune.serve.served_names import ServedNames

NO_ADAPTERS = "llama.cpp runs no adapters here: merge it, and export what is merged (finetune export --to gguf)"


def open_llamacpp(
    folder: str,
    *,
    name: str | None = None,
    style: Style | None = None,
    system: str | None = None,
    prompt: str | None = None,
    rows: int = 8,
    tokens: int | None = None,
    threads: int | None = None,
) -> tuple[OpenedModel, ServedNames]:
    """Open a folder to be served.

    Args:
        folder: that `finetune export --to gguf` wrote.
        name, style, system, prompt: as `open_served` takes them.
        rows, tokens, threads: as `open_gguf` takes them.

    Raises:
        InputError: an argument is wrong, or the folder is not whole.
        Failed: llama.cpp does not get the memory.
    """
    found, use = gguf_use(folder, style)
    opened = open_gguf(found, use, rows=rows, tokens=tokens, threads=threads)
    try:
        asking = Asking(style, system, prompt)
        names = ServedNames(folder, (), opened.tokenizer, asking, no_adapters=NO_ADAPTERS)
        names.put(use, name or name_of(folder), None, stop_ids=opened.stop_ids, notes=tuple(opened.memory()))
    except BaseException:
        opened.language.close()
        raise

    def encode(pixels: torch.Tensor, adapter: str | None) -> torch.Tensor:
        assert adapter is None, "there are none"
        return opened.encode(pixels)

    model = OpenedModel(
        opened.decoder, encode, lambda adapter: "", opened.tokenizer, opened.image_processor, opened.config
    )
    return model, names


def llamacpp_model(
    folder: str,
    *,
    name: str | None = None,
    style: Style | None = None,
    system: str | None = None,
    prompt: str | None = None,
    rows: int = 8,
    tokens: int | None = None,
    threads: int | None = None,
    max_queue: int = 64,
) -> ModelToOpen:
    """A folder that is served by this process.

    Args:
        folder, name, style, system, prompt, rows, tokens, threads: as `open_llamacpp` takes them.
        max_queue: most requests that wait.

    Raises:
        InputError: there is no such folder, a part is missing, or nothing says how it is asked.
    """
    found, _ = gguf_use(folder, style)

    def open_here() -> Backend:
        opened, names = open_llamacpp(
            folder,
            name=name,
            style=style,
            system=system,
            prompt=prompt,
            rows=rows,
            tokens=tokens,
            threads=threads,
        )
        engine = Engine(
            opened, bounds=BatchBounds(rows=rows, tokens=opened.decoder.most_tokens or 1), max_queue=max_queue
        )
        return Backend(engine, names, opened.tokenizer)

    context = found.config.seq_length
    return ModelToOpen(context, context, open_here)
