"""The tokenizer files of an export: `tokenizer.json`, and the settings with a template for conversations in text."""

import json
from pathlib import Path

from qwenvl.text.fast_tokenizer import fast_tokenizer
from qwenvl.text.vocabulary import END_OF_TEXT, Vocabulary

# ChatML for conversations in text. Images are no part of it: they come as prompt embeddings.
TEXT_CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] != 'text' -%}
{{- raise_exception('this template is for text: an image goes in by prompt_embeddings.py') -}}
{%- endif -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def write_tokenizer(vocabulary: Vocabulary, folder: Path, *, eos_token: str, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        eos_token: the control token that ends a reply, for programs that know only one.
        max_length: tokens that the model takes.

    Raises:
        InputError: see `fast_tokenizer`.
    """
    fast_tokenizer(vocabulary).save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        # Programs that honour this class load tokenizer.json as it is. Transformers 5 takes Qwen2's own class because
        # of the model, and builds it from the vocabulary and merges in tokenizer.json: the same ids.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": eos_token,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEXT_CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
