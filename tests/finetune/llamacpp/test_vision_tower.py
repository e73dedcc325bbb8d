"""The vision side in its file's mapping computes what the loaded model does, image after image."""

import torch
from gguf_for_tests import NANO
from safetensors.torch import load_file, save_file

from finetune.llamacpp.vision_tower import VisionTower
from qwenvl import QwenVLConfig, load_model


def test_features_are_the_models(tmp_path):
    prefix = "transformer.visual."
    tensors = {name.removeprefix(prefix): one for name, one in load_file(NANO / "model.safetensors").items()}
    config = QwenVLConfig.from_pretrained(NANO, attn_implementation="sdpa")
    names = load_model(NANO).transformer.visual.state_dict()
    file = tmp_path / "visual.safetensors"
    save_file({name: tensors[name] for name in names}, file)
    pixels = torch.randint(0, 256, (2, 3, 140, 140), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tower = VisionTower(file, config)
    first = tower.encode(pixels)
    with torch.inference_mode():
        expected = torch.cat([load_model(NANO).get_image_features(one[None]) for one in pixels]).float()
    assert first.dtype == torch.float32 and torch.equal(first, expected)
    # Pages that were given back are read again.
    assert torch.equal(tower.encode(pixels), expected)
