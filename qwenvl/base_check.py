"""Identify a checkpoint by what it computes, and check that an adapter's base is the one that it was trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qwenvl.checkpoint.checkpoint_files import find_file, locate_tensors, weight_files
from qwenvl.checkpoint.fingerprint import hash_tensors, sample_tensors, vocabulary_fingerprint
from qwenvl.checkpoint.fingerprint_cache import (
    WeightsFingerprints,
    find_fingerprints,
    keep_fingerprints,
    stamp_files,
)
from qwenvl.checkpoint.identity import IMAGE_SIZE, BaseIdentity, Setting, differences
from qwenvl.checkpoint.pretrained_errors import pretrained_errors
from qwenvl.checkpoint.record import read_record
from qwenvl.errors import InputError
from qwenvl.images.image_processor import QwenVLImageProcessor
from qwenvl.model.configuration import VISUAL_NUMBERS, QwenVLConfig

COMPUTATION = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels", "intermediate_size"),
    *("seq_length", "use_dynamic_ntk", "use_logn_attn", "rotary_emb_base", "layer_norm_epsilon"),
    *("attn_dropout_prob", "emb_dropout_prob"),
)
"""Keys of config.json that change what the model computes; with `VISUAL_NUMBERS` in `visual`. Not among them: those
that allow one value (`no_bias`), names and types (`architectures`, `torch_dtype`, `bf16`), what is of fresh weights
(`initializer_range`), and what only bounds a conversation (`max_position_embeddings`). A key may be added: records
that do not have it are not compared by it."""

IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def identify_base(
    path: str | Path,
    progress: Callable[[int], None] | None = None,
    *,
    page_cache: bool = False,
    cached: bool = False,
) -> BaseIdentity:
    """Find the identity of a checkpoint: of all values of its weights, its configuration and its vocabulary.

    A 4-bit folder that was exported from a 16-bit checkpoint and has not changed since has that checkpoint's weights:
    an adapter trained on the one belongs to the other too.

    Args:
        path: folder or hub id.
        progress: called with the number of bytes just hashed, `fingerprint.stored_bytes` in all.
        page_cache: as `fingerprint.weights_fingerprint`.
        cached: take the fingerprint that was computed before from the same files, by their paths, sizes, times and
            inodes. Otherwise all values are read.

    Raises:
        MissingFileError: no checkpoint at `path`.
        InputError: a file of it is damaged.
    """
    identity = _identify_but_weights(path)
    files = weight_files(path)
    stamps = stamp_files(files)
    found = find_fingerprints(stamps) if cached and stamps is not None else None
    if found is None:
        tensors = locate_tensors(path)
        found = WeightsFingerprints(hash_tensors(tensors, progress, page_cache=page_cache), sample_tensors(tensors))
        if stamps is not None and stamp_files(files) == stamps:  # nobody wrote meanwhile
            keep_fingerprints(stamps, found)
    record = read_record(path)
    if record is not None and record.base is not None:
        noted = record.base.identity
        if record.own_weights == found.weights:
            return replace(identity, weights=noted.weights, sampled=noted.sampled)
        if record.own_weights is None and record.own_sampled == found.sampled:
            return replace(identity, weights=None, sampled=noted.sampled)
    return replace(identity, weights=found.weights, sampled=found.sampled)


def check_base(
    adapter: str | Path,
    base: str | Path,
    progress: Callable[[int], None] | None = None,
    *,
    page_cache: bool = False,
    cached: bool = False,
) -> bool:
    """Compare a base with the one that an adapter was trained on.

    Args:
        adapter: folder of the adapter.
        base: folder or hub id.
        progress, page_cache, cached: as `identify_base`.

    Returns:
        False if the adapter does not say which it was (adapters of other programs do not).

    Raises:
        InputError: another base, or one whose configuration or vocabulary was changed.
    """
    record = read_record(adapter)
    if record is None or record.base is None:
        return False
    found = identify_base(base, progress, page_cache=page_cache, cached=cached)
    lines = differences(record.base.identity, found)
    if lines:
        raise InputError(
            f"the adapter in {adapter} was trained on {record.base.path}, from which {base} differs: "
            f"{'; '.join(lines)}. Give the base that it was trained on, unchanged: --base BASE, or load_model(BASE, "
            f"adapter={str(adapter)!r})"
        )
    return True


def _identify_but_weights(path: str | Path) -> BaseIdentity:
    """The identity of a checkpoint without its weights."""
    config = QwenVLConfig.from_pretrained(path)
    computation: dict[str, Setting] = {key: getattr(config, key) for key in COMPUTATION}
    if config.visual is not None:
        visual = {**config.visual, "n_queries": config.n_queries}
        computation |= {f"visual.{key}": visual[key] for key in VISUAL_NUMBERS}
        computation[IMAGE_SIZE] = visual["image_size"]
        if any(find_file(path, name) for name in IMAGE_PROCESSOR_FILES):
            with pretrained_errors(path):
                computation[IMAGE_SIZE] = QwenVLImageProcessor.from_pretrained(path).size["height"]
    return BaseIdentity(None, computation, vocabulary_fingerprint(path), "")
