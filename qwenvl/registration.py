"""Register the model family with Transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

# Not from `transformers` itself, which before 5.23 has a dummy class there that requires torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

from qwenvl.images.image_processor import QwenVLImageProcessor
from qwenvl.model.configuration import QwenVLConfig
from qwenvl.model.modeling import QwenVLForConditionalGeneration, QwenVLModel
from qwenvl.processor import QwenVLProcessor
from qwenvl.text.tokenizer import QwenVLTokenizer


def register() -> None:
    """Register the classes for model type `qwen`; a second call is harmless."""
    AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
    AutoModel.register(QwenVLConfig, QwenVLModel, exist_ok=True)
    for auto_model in (AutoModelForCausalLM, AutoModelForImageTextToText):
        auto_model.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(QwenVLConfig, image_processor_classes={"pil": QwenVLImageProcessor}, exist_ok=True)
    AutoProcessor.register(QwenVLConfig, QwenVLProcessor, exist_ok=True)
    # By class name only, ours and the published one. `AutoTokenizer.register` would map the config class as well, and
    # for mapped classes `trust_remote_code=True` runs a folder's own tokenizer code; for named ones it never does.
    # Folders that name no tokenizer class get ours through `QwenVLConfig.tokenizer_class`.
    for name in (QwenVLTokenizer.__name__, "QWenTokenizer"):
        REGISTERED_TOKENIZER_CLASSES[name] = QwenVLTokenizer
