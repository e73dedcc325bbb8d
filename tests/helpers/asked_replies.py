"""What a model is asked, whoever asks it: by `generate`, or in a running batch."""

from dataclasses import dataclass, field

import torch

from finetune.replies.running_batch import RunningBatch
from qwenvl import QwenVLForConditionalGeneration


@dataclass(frozen=True)
class Asked:
    """A reply: the ids of its prompt, the ids that end it, and its new ids without these."""

    prompt: tuple[int, ...]
    stop: frozenset[int]
    reply: tuple[int, ...]
    features: torch.Tensor | None = field(default=None, compare=False)
    """(values of all pictures of the prompt, hidden); None without pictures."""


class Listener:
    """Notes each reply."""

    def __init__(self, monkeypatch):
        self.asked: list[Asked] = []
        self._growing: dict[tuple[int, int], tuple] = {}
        generate, join, step = QwenVLForConditionalGeneration.generate, RunningBatch.join, RunningBatch.step

        def generate_and_note(model, *arguments, **settings):
            features = settings.get("image_features")
            if features is None and "pixel_values" in settings:
                with torch.no_grad():
                    features = model.get_image_features(settings["pixel_values"])
            generated = generate(model, *arguments, **settings)
            config = settings.get("generation_config") or model.generation_config
            stop = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            for row, mask, whole in zip(settings["input_ids"], settings["attention_mask"], generated, strict=True):
                new = whole[len(row) :].tolist()
                reply = new[: next((place for place, token in enumerate(new) if token in stop), len(new))]
                flat = None if features is None else features.flatten(0, -2).clone()
                self.asked.append(Asked(tuple(row[mask.bool()].tolist()), frozenset(stop), tuple(reply), flat))
            return generated

        def join_and_note(batch, requests):
            numbers, tokens = join(batch, requests)
            for number, request in zip(numbers, requests, strict=True):
                self._growing[id(batch), number] = (request, [])
            self._note(batch, tokens)
            return numbers, tokens

        def step_and_note(batch):
            tokens = step(batch)
            self._note(batch, tokens)
            return tokens

        monkeypatch.setattr(QwenVLForConditionalGeneration, "generate", generate_and_note)
        monkeypatch.setattr(RunningBatch, "join", join_and_note)
        monkeypatch.setattr(RunningBatch, "step", step_and_note)

    def _note(self, batch, tokens):
        for token in tokens:
            request, ids = self._growing[id(batch), token.reply]
            if token.id is not None:
                ids.append(token.id)
            if token.finish is not None:
                del self._growing[id(batch), token.reply]
                prompt, features = request.prompt, list(request.prompt.features)
                flat = torch.cat(features).clone() if features else None
                self.asked.append(Asked(tuple(prompt.ids), frozenset(request.stop_ids), tuple(ids), flat))

    def last(self) -> Asked:
        """The latest, of those since the last call."""
        asked, self.asked = self.asked[-1], []
        return asked
