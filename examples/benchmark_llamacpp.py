"""Memory and time of a GGUF folder in this process: opening it, an image, its prompt, and the tokens of a reply.

    python examples/make_random_checkpoint.py --to random-full --vocabulary qwen.tiktoken
    finetune export random-full --to gguf --type q4_k_m
    python examples/benchmark_llamacpp.py random-full-gguf --threads 4

Weights are in the files' mappings: what is read of them counts as memory of the process ("files"), and the system
takes it back where others need it.

Measured so, with 2 threads on two cores of an AMD EPYC that four other jobs used: 2.9 s to open, 50 s for an image,
97 s for its prompt of 292 tokens; at most 6.64 GB (own 1.66, files 4.98). One thread by itself takes 0.29 s of a core
for a token; `finetune serve` had 6.38 GB after a reply.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from PIL import Image

from finetune.replies.decoder import PromptRow
from finetune.replies.gguf_model import gguf_use, open_gguf
from finetune.replies.running_batch import ReplyRequest, RunningBatch
from qwenvl.text.chat import render_chat

QUESTION = "What is written in the image, and where?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of finetune export --to gguf, with a vision side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=16, help="of the reply")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    say_memory()
    start = time.perf_counter()
    folder, use = gguf_use(arguments.folder)
    model = open_gguf(folder, use, rows=4, threads=arguments.threads)
    if model.image_processor is None:
        parser.error(f"{arguments.folder} is a text-only model")
    say("opened", start)
    for line in model.memory():
        print(f"    {line}")

    picture = Image.linear_gradient("L").convert("RGB")
    pixels = model.image_processor([picture], do_normalize=False, return_tensors="pt")["pixel_values"]
    start = time.perf_counter()
    features = model.encode(pixels)
    say("image encoded", start)

    parts = [{"type": "image", "image": "picture"}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}]
    rendered = render_chat(messages, model.tokenizer, add_generation_prompt=True, n_queries=model.config.n_queries)
    prompt = PromptRow(rendered.ids, list(features), ["picture"])
    batch = RunningBatch(model.decoder, model.tokenizer)
    start = time.perf_counter()
    batch.join([ReplyRequest(prompt, arguments.tokens, ())])
    say(f"prompt of {len(rendered.ids)} tokens computed", start)
    start = time.perf_counter()
    while len(batch):
        batch.step()
    say(f"{arguments.tokens - 1} tokens", start, arguments.tokens - 1)
    start = time.perf_counter()
    batch.join([ReplyRequest(prompt, 2, ())])
    say("the same prompt again, of which all but the last token is kept", start)


def say(what: str, start: float, count: int = 1) -> None:
    each = f", {(time.perf_counter() - start) / count:.2f} s each" if count > 1 else ""
    print(f"{what}: {time.perf_counter() - start:.2f} s{each}")
    say_memory()


def say_memory() -> None:
    """Resident memory of this process, on Linux."""
    file = Path("/proc/self/status")
    if not file.is_file():
        return
    entries = dict(line.split(":", 1) for line in file.read_text().splitlines())
    sizes = {key: int(entries[key].split()[0]) / 1e6 for key in ("VmRSS", "RssAnon", "RssFile", "VmHWM")}
    print(
        f"    memory: {sizes['VmRSS']:.2f} GB (own {sizes['RssAnon']:.2f}, files {sizes['RssFile']:.2f}), at most "
        f"{sizes['VmHWM']:.2f}; load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )


if __name__ == "__main__":
    main()
