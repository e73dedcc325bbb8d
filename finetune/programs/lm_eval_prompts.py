"""lm-evaluation-harness (`lm_eval`): its prompts are strings, and ChatML in them is to be read as ChatML.

`--apply_chat_template` writes a conversation to a string and gives that to the tokenizer, for which `<|im_start|>` in
a text is text: the model would be asked in letters that spell ChatML, and nothing would say so. With images its
strings go to the processor, which reads them as they are meant.

And a task's `max_gen_toks` is what ends a reply: lm_eval gives it as `max_length`, before which `generate` would take
the `max_new_tokens` of the model's own settings.
"""

from collections.abc import Sequence
from typing import Any

import torch

from finetune.programs.internals import require_parameters
from qwenvl import QwenVLConfig, QwenVLTokenizer
from qwenvl.text.chat_string import read_string
from qwenvl.text.model_inputs import input_columns


def prepare_lm_eval() -> None:
    """Let lm_eval's models read prompt strings with the structure that is in them.

    Raises:
        UserError: lm_eval is another than is known here.
    """
    from lm_eval.models.huggingface import HFLM

    one, several = getattr(HFLM, "tok_encode", None), getattr(HFLM, "tok_batch_encode", None)
    require_parameters("lm_eval", "HFLM.tok_encode", one, ["string", "left_truncate_len"])
    wanted = ["strings", "padding_side", "left_truncate_len", "truncation"]
    require_parameters("lm_eval", "HFLM.tok_batch_encode", several, wanted)
    create = getattr(HFLM, "_create_model", None)
    require_parameters("lm_eval", "HFLM._create_model", create, ["self", "pretrained"])
    HFLM.tok_encode, HFLM.tok_batch_encode = reading_one(one), reading_several(several)
    HFLM._create_model = without_own_limit(create)


def without_own_limit(theirs: Any) -> Any:
    """`HFLM._create_model`: sets `_model`, whose settings have no limit of their own to a reply."""

    def create_model(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        if isinstance(self._model.config, QwenVLConfig):
            self._model.generation_config.max_new_tokens = None

    return create_model


def reading_one(theirs: Any) -> Any:
    """`HFLM.tok_encode`: the ids of a prompt string."""

    def tok_encode(
        self: Any,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(self.tokenizer, QwenVLTokenizer):
            return theirs(self, string, add_special_tokens, left_truncate_len, **kwargs)
        ids = read_string(string, self.tokenizer, n_queries=self.config.n_queries).ids
        return ids[-left_truncate_len:] if left_truncate_len else ids

    return tok_encode


def reading_several(theirs: Any) -> Any:
    """`HFLM.tok_batch_encode`: ids and attention mask of prompt strings, (strings, length) each."""

    def tok_batch_encode(
        self: Any,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        if not isinstance(self.tokenizer, QwenVLTokenizer):
            return theirs(self, strings, padding_side, left_truncate_len, truncation)
        read = [read_string(string, self.tokenizer, n_queries=self.config.n_queries) for string in strings]
        limit = self.tokenizer.model_max_length if truncation else None
        columns = input_columns(
            read, self.tokenizer, padding=True, padding_side=padding_side, truncation=truncation, max_length=limit
        )
        kept = slice(-left_truncate_len if left_truncate_len else None, None)
        return tuple(torch.tensor(columns[name])[:, kept] for name in ("input_ids", "attention_mask"))

    return tok_batch_encode
