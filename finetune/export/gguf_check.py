"""What llama.cpp computes from a written GGUF file, compared with the model that it was made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

from finetune.errors import Failed
from finetune.export.streamed_logits import GivenRow, streamed_logits
from finetune.llamacpp.folder import GgufFolder, check_language
from finetune.llamacpp.language_model import LanguageModel, Positions
from finetune.llamacpp.prompts import image_places, prefill
from finetune.llamacpp.vision_tower import VisionTower
from finetune.terminal import Say
from qwenvl import QwenVLConfig, QwenVLTokenizer, load_processor
from qwenvl.checkpoint.checkpoint_files import StoredTensor
from qwenvl.text.chat import Rendered, render_chat, render_prompt

QUESTION = "What is written in the image, and where?"
NEW_TOKENS = 8

ALLOWED = {"f16": 0.02, "q8_0": 0.1, "q4_0": 0.7, "q4_k_m": 0.6}
"""Root mean square of the differences of logits, in standard deviations of the logits. Where two matrices of the nano
model are exchanged it is above 1; unrelated logits have 1.4. Of the nano model itself, on an image prompt: f16 0.002,
q8_0 0.02, q4_0 0.11, q4_k_m 0.10."""

ALLOWED_OF_RANDOM_WEIGHTS = ALLOWED | {"q8_0": 0.3, "q4_0": 1.3, "q4_k_m": 1.3}
"""Of a checkpoint whose config says that nothing trained it: each layer makes the rounding of those before it larger.
With 32 layers of the published widths, q4_k_m has 0.96."""


@dataclass(frozen=True)
class Found:
    """How replies of llama.cpp to one prompt differ from those of the source.

    Attributes:
        difference: root mean square of the differences of logits, in standard deviations of the logits.
        equal: tokens of llama.cpp's greedy reply that are the source's too, given those before.
        tokens: of the reply.
    """

    difference: float
    equal: int
    tokens: int


@torch.inference_mode()
def check_gguf(folder: GgufFolder, stored: Mapping[str, StoredTensor], kind: str, *, threads: int, say: Say) -> None:
    """Reply to a prompt of text, and to one with an image, and compare every logit with the source's.

    Args:
        folder: as it was written.
        stored: the tensors of the source.
        kind: the type that it was written in.
        threads: for llama.cpp.
        say: prints a labelled line.

    Raises:
        Failed: the differences are larger than those of the type.
    """
    config = folder.config
    tokenizer = QwenVLTokenizer.from_pretrained(folder.path)
    prompts: dict[str, tuple[Rendered, torch.Tensor | None]] = {
        "a text prompt": (_rendered(folder, tokenizer, image=False), None)
    }
    if folder.visual is not None:
        processor = load_processor(folder.path)
        pixels = processor.image_processor([page()], do_normalize=False, return_tensors="pt")["pixel_values"]
        prompts["an image prompt"] = (
            _rendered(folder, tokenizer, image=True),
            VisionTower(folder.visual, config).encode(pixels),
        )
    cells = max(len(rendered.ids) for rendered, _ in prompts.values()) + NEW_TOKENS
    if cells > config.seq_length:
        raise Failed(f"a prompt of {cells} tokens is needed to check it, and this model takes {config.seq_length}")
    replies: list[tuple[GivenRow, torch.Tensor]] = []
    with LanguageModel(folder.language, cells=cells, sequences=1, threads=threads) as model:
        check_language(folder, model)
        for rendered, features in prompts.values():
            replies.append(_reply(model, rendered.ids, features, config))
    expected = streamed_logits(config, stored, [row for row, _ in replies])
    never_trained = getattr(config, "random_weights", False)
    allowed = (ALLOWED_OF_RANDOM_WEIGHTS if never_trained else ALLOWED)[kind]
    for name, (_, logits), ours in zip(prompts, replies, expected, strict=True):
        found = compare(logits, ours)
        said = (
            f"{name}: logits differ by {found.difference:.2g} of their spread (allowed {allowed:g}), "
            f"{found.equal} of {found.tokens} greedy tokens are equal"
        )
        if not found.difference <= allowed:  # NaN too
            raise Failed(
                f"llama.cpp does not compute what the source does, on {said}: nothing was kept. Another --type may "
                "do, f16 first"
            )
        say("checked", said)


def compare(logits: torch.Tensor, expected: torch.Tensor) -> Found:
    """Compare logits (length, vocabulary) after the same tokens."""
    spread = expected.std(dim=1).mean()
    difference = (logits - expected).square().mean().sqrt() / spread
    equal = (logits.argmax(dim=1) == expected.argmax(dim=1)).sum()
    return Found(float(difference), int(equal), len(logits))


def page() -> Image.Image:
    """A picture with lines and text, always the same."""
    image = Image.new("RGB", (448, 448), "white")
    draw = ImageDraw.Draw(image)
    for line in range(12):
        draw.text((20, 20 + 35 * line), f"Line {line}: {line * 37 % 101} of {line * 53 % 997}", fill="black")
    draw.rectangle((260, 40, 420, 200), outline="red", fill="lightblue", width=4)
    return image


def _rendered(folder: GgufFolder, tokenizer: QwenVLTokenizer, *, image: bool) -> Rendered:
    """A prompt in the form that the model was trained on."""
    parts = [*([{"type": "image", "image": "page"}] if image else []), {"type": "text", "text": QUESTION}]
    n_queries = folder.config.n_queries
    if folder.record.style == "base":
        return render_prompt(parts, tokenizer, n_queries=n_queries)
    messages = [{"role": "user", "content": parts}]
    return render_chat(messages, tokenizer, add_generation_prompt=True, n_queries=n_queries)


def _reply(
    model: LanguageModel, ids: Sequence[int], features: torch.Tensor | None, config: QwenVLConfig
) -> tuple[GivenRow, torch.Tensor]:
    """A greedy reply, and the logits (NEW_TOKENS, vocabulary) of its tokens."""
    model.remove(0)
    places = image_places(ids, [] if features is None else list(features), config)
    logits, reply = [prefill(model, 0, ids, places)], list[int]()
    while True:
        reply.append(int(logits[-1].argmax()))
        if len(reply) == NEW_TOKENS:
            break
        at = Positions([len(ids) + len(reply) - 1], [0], [0])
        logits.append(model.decode_tokens(reply[-1:], at)[0])
    return GivenRow([*ids, *reply[:-1]], features, NEW_TOKENS), torch.stack(logits)
