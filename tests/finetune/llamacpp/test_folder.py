"""A GGUF folder with a part that is missing, damaged or of another folder is refused, and says which."""

import json
import shutil

import pytest
from gguf_for_tests import NANO, UNAVAILABLE, changed_copy
from safetensors.torch import load_file, save_file

from finetune.errors import InputError
from finetune.replies.gguf_model import gguf_use, open_gguf
from finetune.replies.model_style import find_use

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


def opened(folder):
    found, use = gguf_use(folder)
    return open_gguf(found, use, rows=2, threads=1)


@pytest.fixture
def folder(tmp_path):
    return changed_copy(tmp_path / "nano-gguf")


def test_whole_it_opens(folder):
    model = opened(folder)
    assert model.decoder.most_tokens == 2048 and model.decoder.most_rows == 2
    assert "keys and values of 2,048 tokens: 6.3 MB; 1 thread" in model.memory()[0]
    model.language.close()


def remove_visual(folder):
    (folder / "visual" / "visual.safetensors").unlink()


def remove_config(folder):
    (folder / "config.json").unlink()


def remove_record(folder):
    (folder / "qwenvl.json").unlink()


def remove_language(folder):
    (folder / "model-f16.gguf").unlink()


def add_second_language(folder):
    shutil.copy(folder / "model-f16.gguf", folder / "model-q8_0.gguf")


def record_of_another(folder):
    record = json.loads((folder / "qwenvl.json").read_text())
    record["base"]["weights"] = "0" * 32
    (folder / "qwenvl.json").write_text(json.dumps(record))


def record_of_4_bits(folder):
    record = json.loads((folder / "qwenvl.json").read_text())
    (folder / "qwenvl.json").write_text(json.dumps({**record, "quantize": ["language"]}))


def visual_of_another(folder):
    file = folder / "visual" / "visual.safetensors"
    tensors = load_file(file)
    tensors["proj"] = tensors["proj"] + 1
    save_file(tensors, file)


def visual_of_another_size(folder):
    save_file(
        {"proj": load_file(folder / "visual" / "visual.safetensors")["proj"]}, folder / "visual" / "visual.safetensors"
    )


def cut_visual(folder):
    file = folder / "visual" / "visual.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def cut_language(folder):
    file = folder / "model-f16.gguf"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_header(folder):
    file = folder / "model-f16.gguf"
    file.write_bytes(file.read_bytes()[:3000])


def empty_language(folder):
    (folder / "model-f16.gguf").write_bytes(b"")


def another_kind_of_file(folder):
    (folder / "model-f16.gguf").write_bytes((NANO / "model.safetensors").read_bytes()[:100_000])


def other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "seq_length": 1024}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove_visual, "visual/visual.safetensors is missing, the vision side"),
        (remove_config, "there is no config.json beside model-f16.gguf"),
        (remove_record, "qwenvl.json is missing, or does not name the model"),
        (remove_language, "there is no GGUF file here"),
        (add_second_language, "has 2 GGUF files (model-f16.gguf, model-q8_0.gguf): keep one"),
        (record_of_another, "is not the language model that"),
        (record_of_4_bits, "names parts in 4 bits of bitsandbytes (language)"),
        (visual_of_another, "is not the vision side that model-f16.gguf was exported with"),
        (visual_of_another_size, "or of another shape than config.json says"),
        (cut_visual, "visual.safetensors cannot be read: it is damaged"),
        (cut_language, "cannot be loaded by llama.cpp: "),
        (cut_header, "cannot be loaded by llama.cpp: "),
        (empty_language, "cannot be loaded by llama.cpp: "),
        (another_kind_of_file, "cannot be loaded by llama.cpp: "),
        (other_sizes, "is not the language model that"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(folder, change, reason):
    change(folder)
    with pytest.raises(InputError) as caught:
        opened(folder)
    assert reason in str(caught.value) and str(folder) in str(caught.value)
    assert "does not say why" not in str(caught.value)


def test_a_gguf_file_by_itself_is_refused(folder):
    with pytest.raises(InputError, match="is a file: give its folder"):
        gguf_use(folder / "model-f16.gguf")


def test_a_gguf_file_of_another_program_is_refused(folder):
    """Its metadata without our keys, which have the same length."""
    file = folder / "model-f16.gguf"
    file.write_bytes(file.read_bytes().replace(b"qwenvl.weights", b"other0.weights"))
    with pytest.raises(InputError, match="was not written by finetune export MODEL --to gguf"):
        opened(folder)


def test_other_commands_say_what_such_a_folder_is(folder):
    with pytest.raises(InputError, match=r"the language model is in a GGUF file here, which llama.cpp runs"):
        find_use(str(folder))
