"""Qwen-VL for current Transformers.

Importing this package registers the family (model type `qwen`) with Transformers' Auto classes, so that published
folders load through them with no remote code.
"""

from qwenvl import errors as errors  # an attribute of the package, even if it was imported before the package
from qwenvl.errors import InputError, MissingFileError
from qwenvl.images.image_processor import QwenVLImageProcessor
from qwenvl.images.images import ImageAccess, ImageError, load_image
from qwenvl.loading import load_model, load_processor
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.modeling import QwenVLForConditionalGeneration, QwenVLModel
from qwenvl.processor import QwenVLProcessor
from qwenvl.registration import register
from qwenvl.text.tokenizer import QwenVLTokenizer

register()

__all__ = [
    "ImageAccess",
    "ImageError",
    "InputError",
    "MissingFileError",
    "QwenVLConfig",
    "QwenVLForConditionalGeneration",
    "QwenVLImageProcessor",
    "QwenVLModel",
    "QwenVLProcessor",
    "QwenVLTokenizer",
    "load_image",
    "load_model",
    "load_processor",
]
