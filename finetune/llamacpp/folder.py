"""The folder that `finetune export --to gguf` writes, and checks that its parts belong together.

    model-q4_k_m.gguf            the language model
    visual/visual.safetensors    the vision side; none of a text-only model
    qwenvl.json                  what it was trained as
    config.json, generation_config.json, qwen.tiktoken, tokenizer_config.json, ...    as in the source

The GGUF file names the weights that it was made from and the vision side that belongs to it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import MissingFileError, UserError
from finetune.llamacpp.gguf_files import gguf_files
from finetune.llamacpp.language_model import LanguageModel
from qwenvl import QwenVLConfig
from qwenvl.checkpoint.record import RECORD, ModelRecord, read_record

VISUAL_FILE = Path("visual") / "visual.safetensors"

WEIGHTS_KEY, VISUAL_KEY = "qwenvl.weights", "qwenvl.visual"
"""Keys of the GGUF file's metadata: the source's fingerprint, and `visual_digest` of the vision side (or "none")."""
NO_VISUAL = "none"

DIGEST_BYTES = 1 << 20
EXPORT = "finetune export MODEL --to gguf"


@dataclass(frozen=True)
class GgufFolder:
    """A folder that `finetune export --to gguf` wrote.

    Attributes:
        path: of the folder.
        language: the GGUF file.
        visual: the vision side's weights; None of a text-only model.
        config: of the source.
        record: what it was trained as.
    """

    path: Path
    language: Path
    visual: Path | None
    config: QwenVLConfig
    record: ModelRecord


def read_folder(path: str | Path) -> GgufFolder:
    """Find the parts of a folder; no weights are read.

    Raises:
        InputError: a part is missing or damaged.
    """
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{folder} is a file: give its folder, which {EXPORT} wrote, with all that belongs to it")
    files = gguf_files(folder)
    if not files:
        raise MissingFileError(f"{folder}: there is no GGUF file here: give a folder that {EXPORT} wrote")
    if len(files) > 1:
        raise UserError(
            f"{folder} has {len(files)} GGUF files ({', '.join(file.name for file in files)}): keep one of them here"
        )
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{folder}: there is no config.json beside {files[0].name}: export it anew ({EXPORT})")
    config, record = QwenVLConfig.from_pretrained(folder, attn_implementation="sdpa"), read_record(folder)
    if record is None or record.base is None:
        raise UserError(
            f"{folder}: {RECORD} is missing, or does not name the model that this one was made from: export it anew "
            f"({EXPORT})"
        )
    visual = None if config.visual is None else folder / VISUAL_FILE
    if visual is not None and not visual.is_file():
        raise MissingFileError(
            f"{folder}: {VISUAL_FILE} is missing, the vision side of this model: restore it, or export it anew "
            f"({EXPORT})"
        )
    return GgufFolder(folder, files[0], visual, config, record)


def check_language(folder: GgufFolder, model: LanguageModel) -> None:
    """Check that a GGUF file is the language model of its folder.

    Raises:
        UserError: it is another one, or the vision side is.
    """
    config, file = folder.config, folder.language
    weights = model.setting(WEIGHTS_KEY)
    if weights is None:
        raise UserError(f"{file} was not written by {EXPORT}, and belongs to no folder: export it anew")
    expected = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.seq_length)
    found = (model.vocabulary_size, model.hidden_size, model.layers, model.trained_context)
    assert folder.record.base is not None, "read_folder checks it"
    if weights != folder.record.base.identity.fingerprint or expected != found:
        raise UserError(
            f"{file} is not the language model that {folder.path / RECORD} is about (its weights' fingerprint is "
            f"{weights}, the record's {folder.record.base.identity.fingerprint}): one is of another folder. Restore "
            "it, or export anew"
        )
    digest = NO_VISUAL if folder.visual is None else visual_digest(folder.visual)
    if model.setting(VISUAL_KEY) != digest:
        raise UserError(
            f"{folder.path / VISUAL_FILE} is not the vision side that {file.name} was exported with: it is damaged, "
            "or of another folder. Restore it, or export anew"
        )


def visual_digest(file: Path) -> str:
    """A digest of a file of weights: of its length, its beginning with the header, and its end."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        digest.update(opened.read(DIGEST_BYTES))
        opened.seek(max(0, size - DIGEST_BYTES))
        digest.update(opened.read(DIGEST_BYTES))
    return digest.hexdigest()[:32]
