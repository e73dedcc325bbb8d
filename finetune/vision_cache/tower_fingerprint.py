"""A fingerprint of all that decides an image's features besides its pixels."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import torch

from finetune.files.tensor_files import tensor_bytes
from qwenvl import QwenVLForConditionalGeneration
from qwenvl.images.image_processor import IMAGE_MEAN, IMAGE_STD
from qwenvl.model.nf4_weights import is_quantized

HASHERS = 4  # threads; hashlib releases the GIL


def tower_fingerprint(model: QwenVLForConditionalGeneration, device: torch.device) -> str:
    """SHA-256, cut to 32 hexadecimal digits, of the vision transformer and resampler as they are loaded.

    It covers all weights with their dtypes (of 4-bit weights the codes, scales and compute dtype), the tower's sizes,
    the attention implementation, the kind of device and the normalisation of pixels. Features of two machines with
    equal fingerprints can still differ in the last bits, as two runs on them would.

    Args:
        model: without an adapter around it; on any device.
        device: where images are encoded.
    """
    config, visual = model.config, model.transformer.visual
    settings = {
        "visual": config.visual,
        "hidden_size": config.hidden_size,
        "attention": config._attn_implementation,
        "device": device.type,
        "mean": IMAGE_MEAN,
        "std": IMAGE_STD,
        "computed_in": sorted({str(module.compute_dtype) for module in visual.modules() if is_quantized(module)}),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    tensors = sorted(visual.state_dict().items())
    with ThreadPoolExecutor(HASHERS) as hashers:
        for (name, tensor), content in zip(tensors, hashers.map(_tensor_hash, tensors), strict=True):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {content}\n".encode())
    return digest.hexdigest()[:32]


def _tensor_hash(named: tuple[str, torch.Tensor]) -> str:
    return hashlib.sha256(tensor_bytes(named[1])).hexdigest()
