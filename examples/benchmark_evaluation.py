"""Measure how fast replies are generated on this machine: as `finetune evaluate` does it, and one at a time.

    python examples/benchmark_evaluation.py [--device cuda] [--dtype bfloat16] [--size mid] [--pages 8]

A smaller model of the published architecture, with random weights, is asked several questions about each page, as in
DocVQA. One at a time: `generate` for each question, its image decoded and encoded each time. The engine
(`finetune.replies.replies`): batches by length, each page decoded and encoded once. The last line says how many
replies are the same in both.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from benchmark_model import IMAGE_SIZE, MID_VISUAL, SIZES, image_span
from PIL import Image

from finetune.replies.replies import Decoding, Prompt, generate_replies, plan_replies
from qwenvl import ImageAccess, QwenVLConfig, QwenVLForConditionalGeneration, QwenVLImageProcessor, load_image

SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "kv_channels": 64,
    "intermediate_size": 1024,
    "vocab_size": 16000,
    "visual": {**MID_VISUAL, "heads": 4, "layers": 4, "output_dim": 256, "width": 256},
}
CONFIGS = {**SIZES, "small": SMALL}


class ByteTokenizer:
    """What the engine needs of a tokenizer; replies of random weights need no vocabulary."""

    def __init__(self, config: QwenVLConfig) -> None:
        self.pad_token_id = image_span(config)[0][0] - 1

    def decode(self, ids: Sequence[int], **kwargs: object) -> str:
        return " ".join(map(str, ids))


def make_prompts(config: QwenVLConfig, pages: int, questions: int) -> list[Prompt]:
    """Questions of 15 to 45 tokens, each with one image of 1700 x 2200 pixels, as scanned pages are."""
    noise = np.random.default_rng(0)
    span, text_ids = image_span(config)
    prompts = []
    for page in range(pages):
        coarse = Image.fromarray(noise.integers(0, 256, (275, 212, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((1700, 2200)).save(file, "JPEG", quality=85)
        for question in range(questions):
            text = noise.integers(0, text_ids, noise.integers(15, 46)).tolist()
            name = f"page {page}, question {question}"
            prompts.append(Prompt([*span, *text], [file.getvalue()], ImageAccess(), name))
    return prompts


def one_at_a_time(
    model: QwenVLForConditionalGeneration,
    prompts: Sequence[Prompt],
    processor: QwenVLImageProcessor,
    new_tokens: int,
    pad: int,
) -> list[tuple[int, ...]]:
    """Reply to each prompt by itself."""
    replies = []
    for prompt in prompts:
        image = load_image(prompt.images[0])
        pixels = processor(image, do_normalize=False, return_tensors="pt")["pixel_values"].to(model.device)
        ids = torch.tensor([prompt.ids], device=model.device)
        new = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        replies.append(tuple(new[0, ids.shape[1] :].tolist()))
    return replies


def engine(
    model: QwenVLForConditionalGeneration,
    prompts: Sequence[Prompt],
    processor: QwenVLImageProcessor,
    tokenizer: ByteTokenizer,
    decoding: Decoding,
) -> list[tuple[int, ...]]:
    """Reply to all prompts as `finetune evaluate` does."""
    plan = plan_replies(prompts)
    made = generate_replies(model, prompts, plan, tokenizer, processor, decoding)  # type: ignore[arg-type]  # a stand-in
    return [reply.ids for reply in sorted(made, key=lambda reply: reply.index)]


def timed(run: Callable[[], list[tuple[int, ...]]]) -> tuple[list[tuple[int, ...]], float]:
    """The result of a function and the seconds it took."""
    start = time.perf_counter()
    replies = run()
    return replies, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CONFIGS, default="mid")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--pages", type=int, default=8)
    parser.add_argument("--questions", type=int, default=4, help="about each page; 4.2 in DocVQA's validation split")
    parser.add_argument("--new-tokens", type=int, default=12, help="of a reply; about as many as in DocVQA")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = QwenVLConfig(**CONFIGS[arguments.size])
    with torch.device(arguments.device):
        model = QwenVLForConditionalGeneration._from_config(config, dtype=getattr(torch, arguments.dtype)).eval()
    processor, tokenizer = QwenVLImageProcessor(IMAGE_SIZE), ByteTokenizer(config)
    prompts = make_prompts(config, arguments.pages, arguments.questions)
    decoding = Decoding(arguments.new_tokens, (), batch_tokens=arguments.batch_tokens)

    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{arguments.size} size, {millions:.0f} M parameters, {arguments.dtype}, on {where}, torch {torch.__version__}"
    )
    print(f"{len(prompts)} questions on {arguments.pages} pages, {arguments.new_tokens} new tokens each")
    few = prompts[: arguments.questions]
    one_at_a_time(model, few[:1], processor, arguments.new_tokens, tokenizer.pad_token_id)  # to warm up
    engine(model, few, processor, tokenizer, decoding)
    slow, slow_seconds = timed(
        lambda: one_at_a_time(model, prompts, processor, arguments.new_tokens, tokenizer.pad_token_id)
    )
    fast, fast_seconds = timed(lambda: engine(model, prompts, processor, tokenizer, decoding))
    same = sum(left == right for left, right in zip(slow, fast, strict=True))
    print(f"  {'one at a time':14s} {len(prompts) / slow_seconds:8.2f} examples/s")
    print(f"  {'engine':14s} {len(prompts) / fast_seconds:8.2f} examples/s")
    print(f"  {'ratio':14s} {slow_seconds / fast_seconds:8.2f}")
    print(f"  {same} of {len(prompts)} replies are the same tokens")


if __name__ == "__main__":
    main()
