"""Adapters, bases and runs with damaged or wrong files: each is refused in a sentence, and nothing is written."""

import json
import shutil

import pytest
from adapters_for_tests import TINY, edit_config, make_adapter

from finetune.errors import InputError, UserError
from finetune.merge.merge import merge
from finetune.terminal import say_nothing

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 224312341\n"
DAMAGED = {"empty": b"", "text": b"hello", "null": b"null", "binary": b"\xff\xfe\x00\x01", "a pointer": POINTER}
RUN = {"identity": {"recipe": {"model": {"dtype": "float32", "quantization": "none"}}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "adapter"
    make_adapter(folder)
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A run folder with an adapter; the base is a copy too."""
    shutil.copytree(TINY, tmp_path / "base")
    shutil.copytree(made, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.json").write_text(json.dumps(RUN))
    return tmp_path / "run"


def refused(run, match="", *, check=False, base=None):
    """Merging raises an error for the user, and leaves nothing behind."""
    before = sorted(path.name for path in run.parent.iterdir())
    with pytest.raises(InputError, match=match):
        merge(run, run.parent / "to", base=base, check=check, say=say_nothing)
    assert sorted(path.name for path in run.parent.iterdir()) == before


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", ["adapter_config.json", "qwenvl.json", "adapter_model.safetensors"])
def test_a_damaged_file_of_the_adapter_is_named(run, name, damage):
    (run / "adapter" / name).write_bytes(DAMAGED[damage])
    refused(run, name.replace(".", r"\."))


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken"])
def test_a_damaged_file_of_the_base_is_named_before_anything_is_written(run, name, damage):
    base = run.parent / "base"
    (base / name).write_bytes(DAMAGED[damage])
    refused(run, "base", base=str(base), check=True)


def test_a_base_that_lacks_a_shard_or_a_tensor_is_refused(run):
    base = run.parent / "base"
    (base / "model.safetensors").unlink()
    names = {"weight_map": {"transformer.ln_f.weight": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(names))
    refused(run, r"model-00001-of-00002\.safetensors, which is missing", base=str(base))


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_description_of_the_run_is_named(run, damage):
    (run / "run.json").write_bytes(DAMAGED[damage])
    refused(run, r"run\.json")


@pytest.mark.parametrize("quantize", [5, ["everything"], "language"])
def test_unknown_parts_in_4_bits_are_refused(run, quantize):
    model = {"quantization": "nf4", "quantize": quantize}
    (run / "run.json").write_text(json.dumps({"identity": {"recipe": {"model": model}}}))
    refused(run, r"run\.json: quantize is .*, but the parts are language, vision, head")


@pytest.mark.parametrize("described", [{"identity": 5}, {"identity": {"recipe": []}}, {}])
def test_a_run_without_a_recipe_is_merged_as_one_in_16_bits(run, described):
    (run / "run.json").write_text(json.dumps(described))
    merge(run, run.parent / "to", check=False, say=say_nothing)


def test_rows_that_no_run_writes_are_refused_before_anything_is_written(run):
    (run / "run.json").write_text(json.dumps(RUN | {"rows": {"train": 5}}))
    refused(run, r"run\.json: its rows are not as a run writes them")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target_modules": 5}, "target_modules is 5 instead of a list of names or a text"),
        ({"target_modules": "("}, "instead of a list of names or a text that is a regular expression"),
        ({"rank_pattern": {"(": 4}}, "its settings cannot be used"),
        ({"rank_pattern": {"c_attn": "x"}}, "rank_pattern is .* instead of a positive number for each module"),
        ({"modules_to_save": "wte"}, "modules_to_save is 'wte' instead of a list of names"),
        ({"bias": 5}, "bias is 5 instead of"),
        ({"trainable_token_indices": {"wte": 5}}, "trainable_token_indices is"),
        ({"layers_to_transform": "x"}, "layers_to_transform is 'x' instead of a whole number"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5 instead of a text"),
        ({"base_model_name_or_path": "x" * 300}, r"cannot be read: .*[Nn]ame too long"),
        ({"layers_pattern": "h"}, "its settings cannot be used: .*layers_to_transform"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_named(run, changes, match):
    edit_config(run / "adapter", **changes)
    refused(run, match)


def test_a_base_that_is_nowhere_is_named(run):
    edit_config(run / "adapter", base_model_name_or_path="no/where/x")
    file = run / "adapter" / "qwenvl.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"base": record["base"] | {"path": "no/where/y"}}))
    refused(run, "is not there: give it with --base")


@pytest.mark.parametrize("changes", [{"base": {"path": "x"}}, {"base": 5}, {"quantize": [["language"]]}])
def test_a_wrong_record_is_named(run, changes):
    file = run / "adapter" / "qwenvl.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(run, r"qwenvl\.json: .* is (not understood|damaged): restore the file")


def test_a_damaged_merge_can_be_merged_again_elsewhere(run):
    to = run.parent / "to"
    merge(run, to, check=False, say=say_nothing)
    (to / "merge.json").write_text("{")
    with pytest.raises(UserError, match=r"merge\.json is not JSON .*, or remove the folder and merge again"):
        merge(run, to, check=False, say=say_nothing)
    (to / "merge.json").write_text(json.dumps({"made_of": 5, "files": 5}))
    with pytest.raises(UserError, match="holds another merge"):
        merge(run, to, check=False, say=say_nothing)


def test_scripts_in_sub_folders_of_the_base_are_not_copied(run):
    base = run.parent / "base"
    (base / "making").mkdir()
    (base / "making" / "train.py").write_text("raise SystemExit")
    (base / "modeling.py").write_text("class Model: ...")
    merge(run, run.parent / "to", base=str(base), check=False, say=say_nothing)
    assert [path.name for path in (run.parent / "to").rglob("*.py")] == ["modeling.py"]
