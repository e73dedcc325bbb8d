"""PEFT adapters of every kind on the tiny checkpoint, with weights as after a training."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from records_for_tests import note_base
from safetensors.torch import load_file, save_file

from qwenvl import load_model
from qwenvl.base_check import identify_base

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny"
TARGETS = ["c_attn", "attn.c_proj", "w1", "w2"]  # of the published script

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"h.0.attn.c_attn": 2}, "alpha_pattern": {"w1": 24, r"h\.1\..*c_proj": 2}},
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "embeddings in full": {"modules_to_save": ["wte", "lm_head"]},
    "vision lora": {"target_modules": [*TARGETS, "in_proj", "out_proj", "c_fc", "mlp.c_proj"]},
    "convolution lora": {"target_modules": ["conv1"]},
    "convolution dora": {"target_modules": ["conv1"], "use_dora": True},
    "resampler in full": {"modules_to_save": ["attn_pool"]},
    "vision in full": {"modules_to_save": ["visual"]},
    "embedding lora": {"target_modules": [*TARGETS, "wte", "lm_head"]},
    "token rows": {"trainable_token_indices": [3, 514, 700]},
    "token rows of both": {"trainable_token_indices": {"wte": [3, 514], "lm_head": [515]}},
    "lora bias": {"target_modules": ["c_attn"], "lora_bias": True},
    "biases of lora": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian by regex": {"init_lora_weights": "gaussian", "target_modules": r".*\.h\.1\..*(c_attn|w2)"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "h"},
}


def make_adapter(
    folder: Path, *, base: str | Path = TINY, dtype: str | None = None, own: bool = True, **settings: Any
) -> PeftModel:
    """Save an adapter whose every weight was moved, and give the model as it was trained.

    Args:
        own: note the base beside it, as this toolkit does.
        settings: of PEFT's LoraConfig.
    """
    model = load_model(base, dtype=dtype)
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings
    adapted = get_peft_model(model, LoraConfig(**config)).eval()
    torch.manual_seed(7)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            spread = max(float(parameter.detach().float().std(correction=0)), 0.02)
            parameter.data = parameter.data.float() + 0.3 * spread * torch.randn(parameter.shape)
    adapted.save_pretrained(folder)
    if own:
        note_base(folder, base, identify_base(base))
    return adapted


def base_in(folder: Path, dtype: torch.dtype, suffix: str = "safetensors") -> Path:
    """The tiny checkpoint in another type; as `.bin` in three shards."""
    shutil.copytree(TINY, folder)
    (folder / "model.safetensors").unlink()
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(TINY / "model.safetensors").items()}
    config = json.loads((TINY / "config.json").read_text())
    kind = str(dtype).removeprefix("torch.")
    flags = {"fp32": dtype == torch.float32, "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    (folder / "config.json").write_text(json.dumps(config | flags | {"torch_dtype": kind}, indent=2))
    if suffix == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"pytorch_model-{number % 3 + 1:05}-of-00003.bin" for number, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        torch.save({name: tensors[name] for name, where in weight_map.items() if where == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def edit_config(folder: Path, **changes: Any):
    """Change keys of an adapter's config; None removes one."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    for key, value in changes.items():
        if value is None:
            del config[key]
    file.write_text(json.dumps(config))
