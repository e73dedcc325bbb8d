"""llama.cpp's library, found and loaded by the bindings of llama-cpp-python; only the C functions of it are used."""

import ctypes
import functools
import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from finetune.errors import UserError

logger = logging.getLogger(__name__)

INSTALL = 'pip install "qwenvl-finetune[llamacpp]"'
OLDEST = "0.3.36"

NEEDED = (
    *("llama_backend_init", "llama_log_set"),
    *("llama_model_default_params", "llama_model_load_from_file", "llama_model_free", "llama_model_size"),
    *("llama_model_n_embd", "llama_model_n_layer", "llama_model_n_ctx_train", "llama_model_meta_val_str"),
    *("llama_model_get_vocab", "llama_vocab_n_tokens", "llama_vocab_get_text"),
    *("llama_context_default_params", "llama_init_from_model", "llama_free", "llama_get_memory", "llama_n_ctx"),
    *("llama_memory_seq_rm", "llama_memory_seq_cp"),
    *("llama_decode", "llama_get_logits_ith", "llama_batch"),
)
CONTEXT_FIELDS = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_outputs_max", "n_threads", "kv_unified")
ON_BY_DEFAULT = ("offload_kqv", "op_offload", "swa_full")
"""Fields that llama.cpp sets, late in their structure: in another layout they are not where they should be."""

WARNING = 3
"""GGML_LOG_LEVEL_WARN; errors are above. A level of 5 continues the line before."""


class _Messages:
    """What llama.cpp says: kept for the message of an error, passed on to `logging`, not printed."""

    def __init__(self) -> None:
        self.last: list[str] = []
        self._level = 0

    def take(self, level: int, text: bytes, _: Any) -> None:
        said = text.decode(errors="replace").strip()
        self._level = self._level if level == 5 else level
        if not said:
            return
        logger.debug("%s", said)
        if self._level >= WARNING:
            self.last = [*self.last[-4:], said]


messages = _Messages()


def last_words() -> str:
    """What llama.cpp said last about something that failed, for a message; it is forgotten then."""
    said, messages.last = messages.last, []
    # The first names the cause, those after it what could not be done for that.
    return said[0] if said else "it does not say why"


@functools.cache
def library() -> Any:
    """The bindings, `llama_cpp.llama_cpp`, with its library loaded.

    Raises:
        UserError: it is not installed, has no library, or one that lacks what is needed.
    """
    try:
        from llama_cpp import llama_cpp as found
    except ImportError as error:
        raise UserError(f"GGUF files need the package llama-cpp-python: {INSTALL}") from error
    except (OSError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"llama-cpp-python {_version()} is installed without a library of llama.cpp that it can use ({error}): "
            f"install it anew, {INSTALL}, and leave LLAMA_CPP_LIB_PATH unset"
        ) from error
    bound: Any = found
    fields = [name for name, *_ in bound.llama_context_params._fields_]
    missing = [name for name in NEEDED if not hasattr(bound, name)]
    missing += [f"llama_context_params.{name}" for name in CONTEXT_FIELDS if name not in fields]
    if missing:
        raise UserError(f"llama-cpp-python {_version()} lacks {missing[0]}: at least {OLDEST} is needed, {INSTALL}")
    defaults = bound.llama_context_default_params()
    if not all(getattr(defaults, name) for name in ON_BY_DEFAULT):
        raise UserError(
            f"the library of llama.cpp in {bound._base_path} does not fit llama-cpp-python {_version()}: their "
            f"structures differ. Install it anew, {INSTALL}, and leave LLAMA_CPP_LIB_PATH unset"
        )
    # Kept alive by the attribute: ctypes keeps no callback that C holds.
    bound.qwenvl_log_callback = bound.llama_log_callback(messages.take)
    bound.llama_log_set(bound.qwenvl_log_callback, ctypes.c_void_p(0))
    bound.llama_backend_init()
    return bound


@functools.cache
def quantize_chunk() -> Any:
    """ggml's `ggml_quantize_chunk(type, values, into, start, rows, values of a row, importance)`.

    Raises:
        UserError: as `library`.
    """
    bound = library()
    try:
        found = bound._lib.ggml_quantize_chunk
    except AttributeError:  # on Windows a library has only its own functions, and these are of ggml-base
        from llama_cpp._ctypes_extensions import load_shared_library

        try:
            found = load_shared_library("ggml-base", bound._base_path).ggml_quantize_chunk
        except (OSError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"the library of llama-cpp-python {_version()} has no ggml_quantize_chunk: install it anew, {INSTALL}"
            ) from error
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    found.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    found.restype = ctypes.c_size_t
    return found


def _version() -> str:
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "(of an unknown version)"
