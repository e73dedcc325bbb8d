"""How fast answers are scored on this machine: the engine of `finetune evaluate` against one question at a time.

    python examples/benchmark_evaluation.py [--device cuda] [--dtype bfloat16] [--size mid] [--pages 8]

A model of the published shape made smaller, with random weights, is asked several questions on each page, as DocVQA
does. One at a time: `generate` for each question, its image decoded and encoded each time. The engine
(`finetune.replies.replies`): batches by length, each page decoded and encoded once. Both give the same tokens, as
shown.
"""

import argparse
import io
import time

import numpy as np
import torch
from benchmark_model import MID_VISUAL, SIZES
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
    """What the engine asks of a tokenizer; random weights have nothing to say that would need a vocabulary."""

    def __init__(self, config: QwenVLConfig):
        self.pad_token_id = config.image_start_id - 1

    def decode(self, ids, **kwargs) -> str:
        return " ".join(map(str, ids))


def make_prompts(config: QwenVLConfig, pages: int, questions: int) -> list[Prompt]:
    """Questions of 15 to 45 tokens, each with one image of 1700 x 2200 pixels, as scanned pages are."""
    noise = np.random.default_rng(0)
    span = [config.image_start_id, *[config.image_token_id] * config.n_queries, config.image_end_id]
    prompts = []
    for page in range(pages):
        coarse = Image.fromarray(noise.integers(0, 256, (275, 212, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((1700, 2200)).save(file, "JPEG", quality=85)
        for question in range(questions):
            text = noise.integers(0, config.image_start_id - 300, noise.integers(15, 46)).tolist()
            name = f"page {page}, question {question}"
            prompts.append(Prompt([*span, *text], [file.getvalue()], ImageAccess(), name))
    return prompts


def one_at_a_time(model, prompts, processor, new_tokens: int, pad: int) -> list[tuple[int, ...]]:
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


def engine(model, prompts, processor, tokenizer, decoding: Decoding) -> list[tuple[int, ...]]:
    made = generate_replies(model, prompts, plan_replies(prompts), tokenizer, processor, decoding)
    return [reply.ids for reply in sorted(made, key=lambda reply: reply.index)]


def timed(run) -> tuple[list[tuple[int, ...]], float]:
    start = time.perf_counter()
    replies = run()
    return replies, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CONFIGS, default="mid")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--pages", type=int, default=8)
    parser.add_argument("--questions", type=int, default=4, help="on each page; DocVQA's validation split has 4.2")
    parser.add_argument("--new-tokens", type=int, default=12, help="of a reply; DocVQA's answers take about so many")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = QwenVLConfig(**CONFIGS[arguments.size])
    with torch.device(arguments.device):
        model = QwenVLForConditionalGeneration._from_config(config, dtype=getattr(torch, arguments.dtype)).eval()
    processor, tokenizer = QwenVLImageProcessor(config.visual["image_size"]), ByteTokenizer(config)
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
