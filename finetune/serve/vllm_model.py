"""An exported folder, opened before the vLLM server that has its language model."""

from pathlib import Path

import torch

from finetune.errors import UserError
from finetune.export.qwen2 import VISUAL
from finetune.export.qwen2_prompt_embeddings import PromptEncoder
from finetune.replies.model_style import ModelUse, unknown_style
from finetune.replies.stop_ids import stop_ids_by
from finetune.replies.task_replies import Style
from finetune.serve.asked_name import Asking, name_of
from finetune.serve.served_names import ServedNames
from finetune.serve.vllm_engine import VllmEngine
from finetune.serve.vllm_server import ServerFailed, VllmServer
from qwenvl.checkpoint.record import trained_as
from qwenvl.loading import ModelSource
from qwenvl.model.generation import stored_generation_config

PROBE = "The total of the receipt is"


def open_before_vllm(
    folder: str,
    at: str,
    *,
    key: str | None = None,
    name: str | None = None,
    style: Style | None = None,
    system: str | None = None,
    prompt: str | None = None,
    device: str = "cpu",
    max_open: int,
    image_bytes: int,
) -> tuple[VllmEngine, ServedNames]:
    """Open a folder that `finetune export --to qwen2` has written, and check that a vLLM server has the same model.

    Args:
        folder: its images and prompts are encoded here.
        at: address of the server.
        key: its API key; None where it has none.
        name: that clients use; None is that of the folder.
        style, system, prompt: as in `open_served`.
        device: of the vision tower.
        max_open: most requests at once.
        image_bytes: of image features to keep.

    Raises:
        UserError: no such folder, or the server does not answer, takes no embeddings, or has another model.
    """
    place = Path(folder)
    if not (place / VISUAL).is_dir():
        raise UserError(
            f"{folder}: there is no {VISUAL}/ in it. --engine vllm takes a folder of `finetune export MODEL --to "
            "qwen2`; a model that reads text alone needs no server of ours before vLLM's"
        )
    server = VllmServer(at, key)
    use = _use(place, style)
    encoder = PromptEncoder(place, device)
    tokenizer = encoder.processor.tokenizer
    names = ServedNames(
        use.source.base,
        use.quantized,
        tokenizer,
        Asking(style, system, prompt),
        no_adapters="a vLLM server has the model. Merge the adapter (finetune merge) and export it",
    )
    stop_ids = stop_ids_by(stored_generation_config(place), tokenizer, use.style)
    names.put(use, name or name_of(folder), None, stop_ids=stop_ids)
    ids = tokenizer.encode_text(PROBE)
    try:
        served = server.what_is_served()
        server.check_embeddings(served.name, ids, encoder.embed(torch.tensor([ids]), None)[0])
    except ServerFailed as failed:
        raise UserError(f"--at {at}: {failed.message}") from failed
    return VllmEngine(server, served, encoder, max_open=max_open, image_bytes=image_bytes), names


def _use(folder: Path, style: Style | None) -> ModelUse:
    """How the exported model is asked: as its record says, which is beside the language model."""
    source, record = ModelSource(str(folder / VISUAL), None), trained_as(folder)
    if style is None and record.style is None:
        raise UserError(unknown_style(folder, source))
    asked_by = record.read_from if style is None else f"--style {style}"
    return ModelUse(str(folder), source, record, style or record.style or "chat", asked_by, (), "")
