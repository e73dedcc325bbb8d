"""Ask a Qwen-VL checkpoint about an image.

    python examples/describe_image.py --model Qwen/Qwen-VL-Chat --image receipt.jpg "What is the total?"
    python examples/describe_image.py --model runs/quickstart "Where am I flying to?"

Without arguments the bundled nano checkpoint transcribes a bundled page. The model may be a checkpoint folder, a hub
id, a run folder, or an adapter folder.
"""

import argparse
from pathlib import Path

import torch
from transformers import BatchFeature, TextStreamer
from transformers.utils import logging

from qwenvl import load_model, load_processor

EXAMPLES = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="Write down all the text.")
    parser.add_argument("--model", default=str(EXAMPLES / "nano"), help="checkpoint, run or adapter folder, or hub id")
    parser.add_argument(
        "--image", default=str(EXAMPLES / "quickstart" / "boarding" / "images" / "test" / "000084.png")
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(arguments.model, device_map=device)
    processor = load_processor(arguments.model)
    parts = [{"type": "image", "image": arguments.image}, {"type": "text", "text": arguments.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert isinstance(inputs, BatchFeature), "what return_dict=True gives"
    inputs = inputs.to(device)

    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"model     {arguments.model} ({size:,} parameters, {model.dtype}, on {device})")
    print(f"image     {arguments.image} -> {tuple(inputs['pixel_values'].shape)}")
    print(f"prompt    {inputs['input_ids'].shape[1]} tokens, {processor.n_queries + 2} of them for the image")
    print(f"question  {arguments.question}")
    print("answer    ", end="", flush=True)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, streamer=streamer)


if __name__ == "__main__":
    main()
