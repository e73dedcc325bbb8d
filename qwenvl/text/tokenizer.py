"""Qwen-VL's tokenizer: tiktoken BPE over NFC text, control tokens placed by id and never read from ordinary text.

`QwenVLTokenizer.encode_text` is the one producer of ids: any text, even one that spells `<|im_end|>` or `<img>`,
becomes ordinary tokens, unless the caller names the control tokens to recognise. The rest of Transformers' interface
(`tokenizer(text)`, `decode`, padding, saving) is the base class's, built on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

from qwenvl.checkpoint.pretrained_errors import pretrained_errors
from qwenvl.checkpoint.settings import examine_settings
from qwenvl.errors import InputError, MissingFileError
from qwenvl.text.chat import TurnOptions, render_chat
from qwenvl.text.chat_string import CHAT_TEMPLATE, write_chat
from qwenvl.text.fast_tokenizer import shared_fast_tokenizer
from qwenvl.text.model_inputs import check_template_arguments, conversation_batch, input_columns
from qwenvl.text.vocabulary import (
    CONTROL_TOKENS,
    END_OF_TEXT,
    GROUNDING_TOKENS,
    IM_END,
    IM_START,
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    Vocabulary,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NO_TOKEN = "\ufffd"


class QwenVLTokenizer(PreTrainedTokenizer):
    """Tokenizer of Qwen-VL and Qwen-VL-Chat, from a `qwen.tiktoken` of any size.

    With n ranks in the file, ids 0..n-1 are ordinary tokens and n..n+216 the control tokens of `control_tokens`:
    `<|endoftext|>` n, `<|im_start|>` n+1, `<|im_end|>` n+2, `<|extra_0|>`.. n+3.., `<ref>` n+208 .. `<imgpad>` n+216.

    Text is normalised to NFC, as in the model's training: `decode(encode(text))` is the NFC form of `text`; nothing
    else is lost. Control tokens written in a text are text (`split_special_tokens=True`); calling with
    `split_special_tokens=False` recognises all of them, as the published tokenizer does, and lets the author of the
    text forge turns and images.

    Args:
        vocab_file: path of the `qwen.tiktoken`.
        eos_token, pad_token: control tokens.
        split_special_tokens: whether control tokens in a text are text.
        chat_template: for other programs only; conversations are rendered by `qwenvl.text.chat`.
        **kwargs: see `PreTrainedTokenizer` (`padding_side`, `model_max_length`, ...).

    Raises:
        InputError: no vocabulary file, a damaged one (with its line), or tokens that are not in it.
    """

    vocab_files_names = {"vocab_file": "qwen.tiktoken"}  # noqa: RUF012 (Transformers' own declaration)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (Transformers' own declaration)
    image_token = IMAGE_PAD  # ProcessorMixin reads the placeholder of one image feature under this name

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        *,
        eos_token: str | AddedToken | None = None,
        pad_token: str | AddedToken | None = None,
        split_special_tokens: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        if vocab_file is None:
            folder = kwargs.get("name_or_path") or "the given path"
            raise InputError(
                f"no vocabulary: {folder} has no `qwen.tiktoken`. It is part of every published Qwen-VL folder; "
                "copy it there, or pass vocab_file=."
            )
        self._vocabulary = Vocabulary(_read_vocabulary(vocab_file), name=str(vocab_file))
        self._drop_saved_tokens(kwargs)
        # Keys that other tools' saves and the loader add: remote code that this class replaces, details of one load.
        for key in ("auto_map", "tokenizer_file", "is_local", "local_files_only", "clean_up_tokenization_spaces"):
            kwargs.pop(key, None)
        self._added_tokens_decoder = {
            i: AddedToken(token, normalized=False, special=True) for token, i in self.control_tokens.items()
        }
        kwargs |= {"eos_token": str(eos_token or END_OF_TEXT), "pad_token": str(pad_token or END_OF_TEXT)}
        self._check_known(kwargs.get(name) for name in self.SPECIAL_TOKENS_ATTRIBUTES)
        super().__init__(
            split_special_tokens=split_special_tokens, chat_template=chat_template or CHAT_TEMPLATE, **kwargs
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *init_inputs: Any, **kwargs: Any
    ) -> QwenVLTokenizer:
        """Load from a hub id or a folder; arguments as in Transformers.

        Raises:
            MissingFileError: there is no such folder or hub id.
            InputError: files that are damaged, or that belong to another vocabulary.
        """
        if Path(pretrained_model_name_or_path).is_dir():
            examine_settings(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        with pretrained_errors(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)

    # ---- ids of the control tokens

    @property
    def control_tokens(self) -> dict[str, int]:
        """The 217 control tokens and their ids, in order."""
        return self._vocabulary.control_tokens

    @property
    def eod_id(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.control_tokens[END_OF_TEXT]

    @property
    def im_start_id(self) -> int:
        """Id of `<|im_start|>`."""
        return self.control_tokens[IM_START]

    @property
    def im_end_id(self) -> int:
        """Id of `<|im_end|>`."""
        return self.control_tokens[IM_END]

    @property
    def image_start_id(self) -> int:
        """Id of `<img>`."""
        return self.control_tokens[IMAGE_START]

    @property
    def image_end_id(self) -> int:
        """Id of `</img>`."""
        return self.control_tokens[IMAGE_END]

    @property
    def image_pad_id(self) -> int:
        """Id of `<imgpad>`, which stands for one image feature."""
        return self.control_tokens[IMAGE_PAD]

    @property
    def image_token_id(self) -> int:
        """Id of `image_token`, under the name that ProcessorMixin uses."""
        return self.image_pad_id

    # ---- text to ids

    def encode_text(self, text: str, *, tokens: Collection[str] = ()) -> list[int]:
        """Encode `text`, recognising no control tokens except those in `tokens`.

        Args:
            text: any Unicode text; it is normalised to NFC.
            tokens: control tokens to recognise, for example `GROUNDING_TOKENS`.

        Raises:
            InputError: `tokens` has a string that is no control token; `text` has half a surrogate pair, needs a byte
                that the vocabulary lacks, or has a run of a million white space characters.
        """
        unknown = [token for token in tokens if token not in self.control_tokens]
        if unknown:
            raise InputError(f"not control tokens: {unknown}. `tokens` takes strings such as '<box>'.")
        return self._vocabulary.encode(text, tokens)

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        *,
        split_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Split `text` into token strings: one printable character per byte, different from every control token.

        Args:
            text: any Unicode text.
            pair: not supported.
            add_special_tokens: without effect: Qwen-VL adds none.
            split_special_tokens: whether control tokens in the text are text; the tokenizer's own setting if None.

        Raises:
            InputError: as `encode_text`, or a `pair`.
        """
        if pair is not None:
            raise InputError("tokenize takes one text: Qwen-VL has no format for a pair of them")
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        ids = self.encode_text(text, tokens=() if split_special_tokens else CONTROL_TOKENS)
        strings = self._vocabulary.token_strings
        return [strings[i] for i in ids]

    def _encode_plus(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        if kwargs.get("is_split_into_words"):
            raise InputError(
                "is_split_into_words=True is not supported: the space before a word is part of its token, so the ids "
                "would be others than the text's. Join the words and pass the text."
            )
        return super()._encode_plus(*args, **kwargs)

    def apply_chat_template(  # type: ignore[override]  # options by keyword only, and no tools or documents
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        grounding: bool = False,
        sanitize_control_tokens: bool = True,
        tools: None = None,
        documents: None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        load_audio_from_video: bool = False,
        **layout: Any,
    ) -> BatchEncoding | list | str:
        """Render a conversation without images, or a batch of them; with images, use `QwenVLProcessor`.

        Args:
            conversation: messages as in `chat.render_chat`.
            chat_template: this tokenizer's own, or None: conversations are rendered by `qwenvl.text.chat`.
            tokenize: return ids (True) or a string (False), in which control tokens spelled in text are marked.
            return_dict: return `input_ids` and `attention_mask`, not only the ids.
            return_assistant_tokens_mask: add `assistant_masks`, 1 for tokens that the label rule "assistant" trains.
            grounding: see `chat.render_chat`.
            sanitize_control_tokens: accepted for compatibility; text never becomes a control token.
            tools, documents: not supported.
            load_audio_from_video: accepted for compatibility, and without effect.
            tokenizer_kwargs, layout: `padding`, `truncation`, ...: see `model_inputs.input_columns`.

        Raises:
            InputError: malformed messages (the place is named), images, another chat template, tools or documents.
        """
        check_template_arguments(chat_template, self.chat_template, tools, documents)
        conversations, is_batch = conversation_batch(conversation)
        how: TurnOptions = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "grounding": grounding,
        }
        if not tokenize:
            strings = [write_chat(messages, **how) for messages in conversations]
            return strings if is_batch else strings[0]
        rendered = [render_chat(messages, self, **how) for messages in conversations]
        if any(one.images for one in rendered):
            raise InputError("the conversation holds images: the tokenizer reads only text, use the processor")
        layout = {**(tokenizer_kwargs or {}), **layout}
        columns = input_columns(rendered, self, assistant_masks=return_assistant_tokens_mask, **layout)
        if is_batch or return_tensors is not None:
            batch = BatchEncoding(columns, tensor_type=return_tensors)
        else:
            batch = BatchEncoding({name: rows[0] for name, rows in columns.items()})
        return batch if return_dict else batch["input_ids"]

    # ---- ids to text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        *,
        keep_grounding: bool = False,
        errors: Literal["replace", "ignore", "strict"] = "replace",
        **kwargs: Any,
    ) -> str | list[str]:
        """Decode `token_ids` byte for byte; spaces are never cleaned up.

        Args:
            token_ids: an id, a sequence of ids, or a batch of sequences.
            skip_special_tokens: leave out all control tokens, grounding tokens included.
            keep_grounding: with `skip_special_tokens`, keep `<ref>`, `<box>`, `<quad>` and their closing tags.
            errors: for bytes that are not UTF-8, such as half a character, and ids without a token (the embedding has
                rows beyond the vocabulary, and labels have -100): "replace" gives U+FFFD, "ignore" leaves them out,
                "strict" raises.

        Raises:
            UnicodeDecodeError: (a ValueError) with `errors="strict"`.
        """
        return super().decode(
            token_ids, skip_special_tokens=skip_special_tokens, keep_grounding=keep_grounding, errors=errors, **kwargs
        )

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        *,
        keep_grounding: bool = False,
        errors: str = "replace",
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if skip_special_tokens:
            kept = {self.control_tokens[token] for token in GROUNDING_TOKENS} if keep_grounding else set()
            skipped = set(self.control_tokens.values()) - kept
            ids = [i for i in ids if i not in skipped]
        return self._vocabulary.decode(ids, errors)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join token strings, as `tokenize` gives them, to text; an unknown one becomes U+FFFD."""
        return self._vocabulary.decode((self._vocabulary.token_ids.get(token, -1) for token in tokens), "replace")

    @property
    def _tokenizer(self) -> Tokenizer:
        """The same tokens as a tokenizer of the library `tokenizers`, under the name that it has in Transformers'
        tokenizers of that library: its server streams by `DecodeStream.step(tokenizer._tokenizer, id)`.

        Nothing here uses it. It is built when it is first asked for, which takes seconds, and is no part of what is
        pickled or saved. The control tokens are special tokens of it, except those of grounding, which are part of a
        reply: `DecodeStream(skip_special_tokens=True)` leaves out the others.

        Raises:
            InputError: an ordinary token is spelled like a control token.
        """
        return shared_fast_tokenizer(self._vocabulary)

    # ---- the vocabulary, in the base class's terms

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included: n + 217. The model's embedding may have more rows."""
        return len(self._vocabulary)

    def __len__(self) -> int:
        return len(self._vocabulary)

    def get_vocab(self) -> dict[str, int]:
        """The ids by token string, all of them."""
        return dict(self._vocabulary.token_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        """All control tokens."""
        return list(self.control_tokens)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._vocabulary.token_ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._vocabulary.token_strings[index] if 0 <= index < len(self) else _NO_TOKEN

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"eos_token={self.eos_token!r}, pad_token={self.pad_token!r})"
        )

    # ---- no tokens can be added: their ids would be unknown to encode_text and decode, and to the model

    def add_special_tokens(self, special_tokens_dict: dict, replace_extra_special_tokens: bool = True) -> int:
        """Set named special tokens (`eos_token`, ...) to tokens that exist; add none and return 0.

        Raises:
            InputError: a token that is not in the vocabulary.
        """
        for value in special_tokens_dict.values():
            self._check_known(value if isinstance(value, list | tuple) else [value])
        return super().add_special_tokens(special_tokens_dict, replace_extra_special_tokens)

    def _add_tokens(self, new_tokens: Iterable[str | AddedToken], special_tokens: bool = False) -> int:
        self._check_known(new_tokens)
        return 0

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.SPECIAL_TOKENS_ATTRIBUTES:
            self._check_known([value])
        super().__setattr__(key, value)

    def _check_known(self, tokens: Iterable[str | AddedToken | None]) -> None:
        names = [str(token) for token in tokens if token is not None]
        unknown = [t for t in names if t not in self.control_tokens and t not in self._vocabulary.token_ids]
        if unknown:
            raise InputError(
                f"not in the vocabulary: {', '.join(map(repr, unknown))}. Tokens cannot be added to Qwen-VL's "
                "tokenizer; use one of the 205 spare ones, '<|extra_0|>' to '<|extra_204|>'."
            )

    def _drop_saved_tokens(self, kwargs: dict[str, Any]) -> None:
        """Check that the tokens that a saved configuration lists are the vocabulary's, and drop them from `kwargs`."""
        for token_id, token in (kwargs.pop("added_tokens_decoder", None) or {}).items():
            if self.control_tokens.get(str(token)) != token_id:
                raise InputError(
                    f"{kwargs.get('name_or_path') or 'the tokenizer'} adds the token {str(token)!r} as id {token_id}, "
                    "which its `qwen.tiktoken` does not have: it was saved by a tokenizer with added tokens, or "
                    "belongs to another vocabulary. Restore the published tokenizer files."
                )
        for key in ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"):
            repeated = kwargs.pop(key, None) or []
            self._check_known(repeated.values() if isinstance(repeated, dict) else repeated)

    # ---- saving

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str]:
        """Write `qwen.tiktoken`, byte for byte the file that was loaded, and return its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory, prefix + self.vocab_files_names["vocab_file"])
        path.write_bytes(self._vocabulary.source)
        return (str(path),)

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        # The base class has written the configuration with all 217 control tokens, which follow from the vocabulary.
        config_path = Path(file_names[0])
        config = json.loads(config_path.read_text(encoding="utf-8"))
        for key in ("added_tokens_decoder", "extra_special_tokens", "backend"):
            config.pop(key, None)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        config_path.write_text(text + "\n", encoding="utf-8", newline="\n")
        return (*file_names, *self.save_vocabulary(save_directory, filename_prefix))


def _read_vocabulary(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise MissingFileError(f"there is no vocabulary {path}: give the path of a `qwen.tiktoken`") from error
    except OSError as error:
        raise InputError(f"the vocabulary {path} cannot be read ({error.strerror}): check its permissions") from error
