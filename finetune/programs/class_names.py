"""The family under the names by which other programs look for it in Transformers itself."""

import sys

from transformers.models.auto import modeling_auto

from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration

CLASS_NAMES = ("QWenLMHeadModel", "QwenVLForConditionalGeneration")
"""What `architectures` in a `config.json` says: of published checkpoints, and of those that Transformers has saved."""


def expose_class_names() -> None:
    """Let `transformers.QWenLMHeadModel` be the model's class, and the tables of names have it.

    `import qwenvl` registers the Auto classes, which is all that most programs need. These look a class up by its name
    in `config.architectures`, or the kind of a model by its type, in tables that registering does not reach. All of it
    is in memory.
    """
    for name in CLASS_NAMES:
        # Transformers replaces its own module while it is imported; a name bound before that is not the one in use.
        setattr(sys.modules["transformers"], name, QwenVLForConditionalGeneration)
    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    names[QwenVLConfig.model_type] = QwenVLForConditionalGeneration.__name__
