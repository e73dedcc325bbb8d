"""Write a checkpoint in the published layout with random weights, to measure memory, time and disk without a download.

    python examples/make_random_checkpoint.py --to random-full --vocabulary qwen.tiktoken
    python examples/make_random_checkpoint.py --to random-small --vocabulary qwen.tiktoken --layers 2 --vision-layers 2

The first is the full Qwen-VL: 853 tensors, 9,656,935,168 parameters, ten `.bin` files of 19.3 GB in all, in bfloat16.
One file at a time is in memory. The published vocabulary is part of every published checkpoint and of the dashscope
package.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from qwenvl.model.configuration import PUBLISHED_VISUAL

FILE_BYTES = 2_000_000_000
POOL = 1 << 26  # random values; every tensor is a slice from a random place
SPREAD = 0.02  # the published initializer_range


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--vocabulary", type=Path, required=True, help="the published qwen.tiktoken")
    parser.add_argument("--layers", type=int, default=32, help="of the language model")
    parser.add_argument("--vision-layers", type=int, default=48, help="of the vision transformer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    if arguments.to.exists():
        parser.error(f"--to: {arguments.to} exists; give another folder")
    if not arguments.vocabulary.is_file():
        parser.error(f"--vocabulary: there is no file {arguments.vocabulary}")
    arguments.to.mkdir(parents=True)
    config = random_config(arguments.layers, arguments.vision_layers)
    config.architectures = ["QWenLMHeadModel"]
    config.save_pretrained(arguments.to)
    shutil.copy(arguments.vocabulary, arguments.to / "qwen.tiktoken")
    (arguments.to / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "QWenTokenizer", "model_max_length": 8192}'
    )
    settings = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "do_sample": False}
    (arguments.to / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_weights(config, arguments.to, arguments.seed)


def random_config(layers: int, vision_layers: int) -> QwenVLConfig:
    """The published configuration with this many layers, marked as having random weights."""
    visual = {**PUBLISHED_VISUAL, "layers": vision_layers}
    config = QwenVLConfig(num_hidden_layers=layers, visual=visual, dtype=torch.bfloat16)
    config.random_weights = True
    return config


def write_weights(config: QwenVLConfig, folder: Path, seed: int) -> None:
    """Write random weights as `.bin` files with an index."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in QwenVLForConditionalGeneration(config).state_dict().items()}
    shards = split(shapes)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(POOL).normal_(0, SPREAD, generator=generator).bfloat16()
    weight_map: dict[str, str] = {}
    with tqdm(total=sum(shape.numel() for shape in shapes.values()) * 2, unit="B", unit_scale=True) as bar:
        for number, names in enumerate(shards, start=1):
            file = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
            torch.save({name: fill(name, shapes[name], pool, generator) for name in names}, folder / file)
            weight_map |= dict.fromkeys(names, file)
            bar.update(sum(shapes[name].numel() for name in names) * 2)
    index = {"metadata": {"total_size": bar.n}, "weight_map": weight_map}
    write_json(folder / "pytorch_model.bin.index.json", index)


def split(shapes: dict[str, torch.Size]) -> list[list[str]]:
    """The names of the tensors of each file, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + shape.numel() * 2 > FILE_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += shape.numel() * 2
    return shards


def fill(name: str, shape: torch.Size, pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor of this shape: weights of norms near 1, all else near 0."""
    pieces, missing = [], shape.numel()
    while missing:
        start = int(torch.randint(len(pool), (), generator=generator))
        pieces.append(pool[start : start + missing])
        missing -= len(pieces[-1])
    values = torch.cat(pieces).reshape(shape)
    is_norm = len(shape) == 1 and name.endswith("weight")
    return 1 + values if is_norm else values


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
