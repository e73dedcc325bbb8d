"""Ask a trained run, adapter or checkpoint about images, from Python.

python examples/use_adapter.py runs/quickstart examples/quickstart/images/receipt_001.png "What is the date?"
"""

import argparse

import torch

from qwenvl import load_model, load_processor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder, adapter folder, checkpoint folder or hub id")
    parser.add_argument("image")
    parser.add_argument("question")
    arguments = parser.parse_args()

    model = load_model(arguments.model, device_map="cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(arguments.model)
    parts = [{"type": "image", "image": arguments.image}, {"type": "text", "text": arguments.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    reply = ids[0, inputs["input_ids"].shape[1] :]
    print(processor.tokenizer.decode(reply, skip_special_tokens=True, keep_grounding=True))


if __name__ == "__main__":
    main()
