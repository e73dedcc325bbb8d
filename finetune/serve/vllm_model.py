"""An exported folder, opened before the vLLM server that has its language model."""

from pathlib import Path

import torch

from finetune.batches.budget import KEPT_FEATURE_BYTES
from finetune.errors import UserError
from finetune.export.qwen2 import VISUAL
from finetune.export.qwen2_prompt_embeddings import PromptEncoder
from finetune.replies.model_style import ModelUse, unknown_style
from finetune.replies.stop_ids import stop_ids_as_trained
from finetune.replies.task_replies import Style
from finetune.serve.asked_name import Asking, name_of
from finetune.serve.model_to_open import Backend, ModelToOpen
from finetune.serve.served_names import ServedNames
from finetune.serve.vllm_engine import VllmEngine
from finetune.serve.vllm_server import ServerFailed, VllmServer
from qwenvl import QwenVLConfig, QwenVLTokenizer
from qwenvl.checkpoint.record import trained_as
from qwenvl.loading import ModelSource

PROBE = "The total of the receipt is"
"""A prompt that the server is asked at the start, as ids and as embeddings."""


def vllm_model(
    folder: str,
    at: str,
    *,
    key: str | None = None,
    name: str | None = None,
    style: Style | None = None,
    system: str | None = None,
    prompt: str | None = None,
    max_open: int = 64,
    keep_feature_bytes: int = KEPT_FEATURE_BYTES,
) -> ModelToOpen:
    """A folder that `finetune export --to qwen2` has written: its images and prompts are encoded in this process, and
    a vLLM server that serves it makes the replies.

    Args:
        folder: the export.
        at: address of the server.
        key: its API key; None where it has none.
        name, style, system, prompt: as `open_served` takes them.
        max_open: most requests at once.
        keep_feature_bytes: bytes of image features that are kept for later requests.

    Raises:
        UserError: no such folder, or the server does not answer.
    """
    place = Path(folder)
    if not (place / VISUAL).is_dir():
        raise UserError(
            f"{folder}: there is no {VISUAL}/ in it. --engine vllm takes a folder of `finetune export MODEL --to "
            "qwen2` with a vision side; of a text model, vLLM serves the folder by itself"
        )
    server = VllmServer(at, key)
    use = _use(place, style)
    config = QwenVLConfig.from_pretrained(use.source.base)
    try:
        served = server.what_is_served()
    except ServerFailed as failed:
        raise UserError(f"--at {at}: {failed.message}") from failed
    # Beyond the context of its training the exported model computes something else, without an error.
    context = min(config.seq_length, served.context or config.seq_length)

    def open_here() -> Backend:
        tokenizer = QwenVLTokenizer.from_pretrained(use.source.base)
        names = ServedNames(
            use.source.base,
            use.quantized,
            tokenizer,
            Asking(style, system, prompt),
            no_adapters="a vLLM server has the model. Merge the adapter (finetune merge) and export it",
        )
        names.put(
            use,
            name or name_of(folder),
            None,
            stop_ids=stop_ids_as_trained(place, config, use.record, tokenizer, use.style),
            notes=(
                f"replies are made by {served.name} at {server.url}",
                "that server must be reached from here alone: embeddings of a wrong shape may end it, and it asks "
                "nobody what this one asks",
            ),
        )
        encoder = PromptEncoder(place, "cuda" if torch.cuda.is_available() else "cpu")
        ids = tokenizer.encode_text(PROBE)
        try:
            server.check_embeddings(served.name, ids, encoder.embed(torch.tensor([ids]), None)[0])
        except ServerFailed as failed:
            raise UserError(f"--at {at}: {failed.message}") from failed
        engine = VllmEngine(
            server, served.name, encoder, context=context, max_open=max_open, keep_feature_bytes=keep_feature_bytes
        )
        return Backend(engine, names, tokenizer)

    return ModelToOpen(config.seq_length, context, open_here)


def read_server_key(file: Path) -> str:
    """The key of a vLLM server: the first line of a file.

    Raises:
        UserError: it cannot be read, or has none.
    """
    try:
        key = file.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"--at-key-file {file} cannot be read: {reason}") from None
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"--at-key-file {file}: its first line must be the key, in letters, digits and signs")
    return key


def _use(folder: Path, style: Style | None) -> ModelUse:
    """How the exported model is asked: as its record says, which is beside the language model."""
    source, record = ModelSource(str(folder / VISUAL), None), trained_as(folder)
    own = record.style if style is None else style
    if own is None:
        raise UserError(unknown_style(folder, source))
    asked_by = record.read_from if style is None else f"--style {style}"
    return ModelUse(str(folder), source, record, own, asked_by, (), "")
