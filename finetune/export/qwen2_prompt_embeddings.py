"""Messages and images -> prompt embeddings for the language model in this folder.

    python prompt_embeddings.py --image receipt.jpg "What is the total?"
    python prompt_embeddings.py --image receipt.jpg "What is the total?" --save prompt.pt
    python prompt_embeddings.py --image receipt.jpg "What is the total?" --server http://localhost:8000/v1 --name MODEL

The first runs the language model here, with Transformers' own classes. The second writes the embeddings, a tensor
(length, hidden) in torch's format. The third sends them to a server's completions API as vLLM has it
(`vllm serve FOLDER --enable-prompt-embeds`).

It needs the package `qwenvl`, for the vision tower and to turn messages into tokens; the server needs only this
folder. Of the language model's weights only the embedding rows of the prompt's tokens are read.
"""

import argparse
import base64
import io
import json
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qwenvl import QwenVLConfig, load_processor
from qwenvl.chat import render_chat
from qwenvl.checkpoint.record import read_record
from qwenvl.image_span import place_image_features
from qwenvl.images.image_processor import normalize_pixels
from qwenvl.vision import VisionTransformer

EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True)
class PromptEmbeddings:
    """A prompt as the language model takes it.

    Attributes:
        embeddings: (1, length, hidden), with the image features at the positions of the images.
        input_ids: (1, length); an image is `<img>`, 256 x `<imgpad>`, `</img>`.
        attention_mask: (1, length), all 1.
    """

    embeddings: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class PromptEncoder:
    """Encodes conversations for the language model in a folder.

    Args:
        folder: with the language model's weights and `visual/`; by default the one that this file is in.
        device: of the vision tower.

    Raises:
        FileNotFoundError: no such export in `folder`.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent, device: str = "cpu"):
        self.folder = Path(folder)
        visual = self.folder / "visual"
        self.config = QwenVLConfig.from_pretrained(visual, attn_implementation="sdpa")
        self.processor = load_processor(visual)
        record = read_record(self.folder)
        self.views = None if record is None else record.views
        weights = load_file(visual / "visual.safetensors", device=device)
        with torch.device("meta"):
            self.tower = VisionTransformer(self.config)
        self.tower.load_state_dict(weights, assign=True)
        self.tower.eval()
        self._embeddings_file = _file_of(self.folder, EMBEDDINGS)

    @torch.no_grad()
    def __call__(self, messages: Sequence[Mapping[str, Any]], *, grounding: bool = False) -> PromptEmbeddings:
        """Encode a conversation up to the beginning of the reply; with the views that the model was trained with.

        Args:
            messages: `{"role": ..., "content": text or parts}`; parts are `{"type": "text", "text": ...}` and
                `{"type": "image", "image": path or PIL image}`. See `qwenvl.chat.render_chat`.
            grounding: read `<ref>`, `<box>` and `<quad>` in the messages as tokens.

        Raises:
            ValueError: malformed messages, or an image that cannot be read.
        """
        rendered = render_chat(
            messages,
            self.processor.tokenizer,
            add_generation_prompt=True,
            grounding=grounding,
            views=self.views,
            n_queries=self.config.n_queries,
        )
        features = None
        if rendered.images:
            pixels = self.processor.image_processor(rendered.images, return_tensors="pt")["pixel_values"]
            features = self.encode_images(pixels)
        ids = torch.tensor([rendered.ids])
        return PromptEmbeddings(self.embed(ids, features), ids, torch.ones_like(ids))

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, S, S), float normalised, or uint8 as decoded -> (images, n_queries, hidden), on the CPU."""
        pixel_values = pixel_values.to(self.tower.proj.device)
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize_pixels(pixel_values)
        return self.tower(pixel_values).cpu()

    def embed(self, ids: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        """Embeddings of token ids, with image features at the positions of the images.

        Args:
            ids: (1, length)
            features: (images, n_queries, hidden), in reading order; None without images.

        Returns:
            (1, length, hidden)
        """
        return place_image_features(self._rows(ids), ids, features, self.config)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        """(1, length) ids -> (1, length, hidden), reading only the rows of ids that occur."""
        distinct, places = ids.unique(return_inverse=True)
        with safe_open(self._embeddings_file, framework="pt") as opened:
            table = opened.get_slice(EMBEDDINGS)
            rows = torch.cat([table[row : row + 1] for row in distinct.tolist()])
        return rows[places]


def _file_of(folder: Path, name: str) -> Path:
    """The weight file that contains a tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return folder / json.loads(index.read_text(encoding="utf-8"))["weight_map"][name]
    return folder / "model.safetensors"


def for_server(prompt: PromptEmbeddings) -> str:
    """The embeddings as a server's `prompt_embeds` takes them."""
    return encoded_for_server(prompt.embeddings[0])


def encoded_for_server(embeddings: torch.Tensor) -> str:
    """(length, hidden) as a server's `prompt_embeds` takes it: base64 of torch's file of it."""
    content = io.BytesIO()
    torch.save(embeddings.clone(), content)  # a view would be written with all that it is a view of
    return base64.b64encode(content.getvalue()).decode()


def ask_server(prompt: PromptEmbeddings, server: str, name: str, max_new_tokens: int) -> str:
    """The reply of a server with the completions API."""
    asked = {"model": name, "prompt_embeds": for_server(prompt), "max_tokens": max_new_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{server.rstrip('/')}/completions",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answered:
        return json.loads(answered.read())["choices"][0]["text"]


def ask_here(folder: Path, prompt: PromptEmbeddings, max_new_tokens: int) -> str:
    """The reply of the language model, run in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    torch.nn.Module.to(model, device)
    generated = model.generate(
        inputs_embeds=prompt.embeddings.to(device, model.dtype),
        attention_mask=prompt.attention_mask.to(device),
        max_new_tokens=max_new_tokens,
    )
    reply = AutoTokenizer.from_pretrained(folder).decode(generated[0], skip_special_tokens=True)
    assert isinstance(reply, str), "the ids of one reply, not of a batch"
    return reply


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--image", action="append", default=[], help="image file; may be given several times")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="default: where this file is")
    parser.add_argument("--save", metavar="FILE", help="write the embeddings instead of asking")
    parser.add_argument("--server", metavar="URL", help="ask the completions API there")
    parser.add_argument("--name", help="of the model on the server")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    given = parser.parse_args(arguments)
    if given.server and not given.name:
        parser.error("--server needs --name, the model's name there")

    encoder = PromptEncoder(given.folder, "cuda" if torch.cuda.is_available() else "cpu")
    parts = [{"type": "image", "image": image} for image in given.image]
    prompt = encoder([{"role": "user", "content": [*parts, {"type": "text", "text": given.question}]}])
    if given.save:
        torch.save(prompt.embeddings[0].contiguous(), given.save)
        print(f"{given.save}: {tuple(prompt.embeddings[0].shape)}, {prompt.embeddings.dtype}")
    elif given.server:
        print(ask_server(prompt, given.server, given.name, given.max_new_tokens))
    else:
        print(ask_here(given.folder, prompt, given.max_new_tokens))


if __name__ == "__main__":
    main()
