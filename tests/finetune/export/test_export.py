"""An export from beginning to end: what is refused, what is written, and that nothing partial stays."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from changed_bases import UNSAMPLED, flip_a_bit
from recipes_for_tests import TINY, finetune
from safetensors.torch import load_file

from finetune.errors import Failed, InputError, UserError
from finetune.export import export as export_module
from finetune.export import tensors as exported_tensors
from finetune.export.export import export
from finetune.export.folder import default_folder
from finetune.files.direct_file import DirectFile
from finetune.files.tensor_files import Planned, write_tensors
from finetune.terminal import labelled, say_nothing
from qwenvl import QwenVLForConditionalGeneration
from qwenvl.checkpoint.checkpoint_files import stored_tensors
from qwenvl.checkpoint.fingerprint import weights_fingerprint


@pytest.fixture
def pickled(tmp_path) -> Path:
    """The tiny checkpoint in two pickled shards, as old ones are, one of its tensors transposed in the file."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    name = "transformer.h.0.mlp.w1.weight"
    tensors[name] = tensors[name].T.contiguous().T
    assert not tensors[name].is_contiguous()
    names = list(tensors)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, held in shards.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_pickled_shards_become_safetensors_with_every_bit(pickled, tmp_path):
    said = []
    settings = {"out": tmp_path / "out", "shard_bytes": 2e6}
    out = export(str(pickled), "safetensors", **settings, say=lambda *line: said.append(labelled(*line)))
    written, source = dict(stored_tensors(out)), load_file(TINY / "model.safetensors")
    assert written.keys() == source.keys()
    assert all(torch.equal(written[name], source[name]) for name in source)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) == 5 and files[0] == "model-00001-of-00005.safetensors"
    for name in ("config.json", "generation_config.json", "qwen.tiktoken", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (TINY / name).read_bytes()
    assert not list(out.glob("*.bin*"))
    assert weights_fingerprint(out) == weights_fingerprint(TINY)
    assert "weights' fingerprint `" + weights_fingerprint(TINY) in (out / "README.md").read_text()
    QwenVLForConditionalGeneration.from_pretrained(out)
    assert any("GB/s" in line or "MB/s" in line for line in said)


def test_a_bit_that_was_lost_on_the_way_is_found(tmp_path, monkeypatch):
    """In a tensor that is not among those computed once more."""
    original = export_module.pieces

    def flipped(tensors):
        for name, piece in original(tensors):
            if name == UNSAMPLED:
                piece.view(torch.int32).view(-1)[len(piece.view(-1)) // 3] ^= 1
            yield name, piece

    monkeypatch.setattr(export_module, "pieces", flipped)
    monkeypatch.setattr(exported_tensors, "SAMPLED", 2)
    with pytest.raises(Failed, match=r"written weights do not read back as those of the source: .* Nothing was kept"):
        export(str(TINY), "safetensors", out=tmp_path / "out", say=say_nothing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stored", "dtype"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_types_of_one_size_are_not_taken_for_the_same(tmp_path, stored, dtype):
    tensors = load_file(TINY / "model.safetensors")
    write_checkpoint(tmp_path / "in", {name: tensor.to(getattr(torch, stored)) for name, tensor in tensors.items()})
    out = export(str(tmp_path / "in"), "safetensors", out=tmp_path / "out", dtype=dtype, say=say_nothing)
    assert {str(tensor.dtype) for _, tensor in stored_tensors(out)} == {f"torch.{dtype}"}
    wide = export(str(out), "safetensors", out=tmp_path / "wide", dtype="float32", say=say_nothing)
    assert weights_fingerprint(wide) == weights_fingerprint(out)


def test_another_type_is_one_rounding(tmp_path):
    out = export(str(TINY), "safetensors", out=tmp_path / "out", dtype="bfloat16", say=say_nothing)
    source = load_file(TINY / "model.safetensors")
    for name, tensor in stored_tensors(out):
        assert torch.equal(tensor, source[name].bfloat16()), name
    config = json.loads((out / "config.json").read_text())
    assert (config["torch_dtype"], config["bf16"], config["fp32"]) == ("bfloat16", True, False)
    assert QwenVLForConditionalGeneration.from_pretrained(out).dtype == torch.bfloat16


def test_a_value_that_the_type_cannot_hold_is_named(tmp_path):
    source = tmp_path / "large"
    tensors = load_file(TINY / "model.safetensors")
    tensors["transformer.h.1.ln_2.weight"][3] = 1e6
    write_checkpoint(source, tensors)
    with pytest.raises(UserError, match=r"transformer.h.1.ln_2.weight: 1e\+06 is more than float16 can hold"):
        export(str(source), "safetensors", out=tmp_path / "out", dtype="float16", say=say_nothing)
    assert not list(tmp_path.glob("*out*"))


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]):
    folder.mkdir()
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    plan = [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_tensors(folder, plan, tensors.items())


def test_the_card_of_the_source_stays(tmp_path):
    source = tmp_path / "merged"
    write_checkpoint(source, load_file(TINY / "model.safetensors"))
    (source / "README.md").write_text("# How it was trained\n")
    out = export(str(source), "safetensors", out=tmp_path / "out", say=say_nothing)
    assert (out / "README.md").read_text() == "# How it was trained\n"


def test_an_incomplete_checkpoint_is_refused_before_anything_is_written(tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    del tensors["transformer.h.0.attn.c_attn.bias"]
    write_checkpoint(tmp_path / "source", tensors)
    with pytest.raises(InputError, match=r"h\.0\.attn.c_attn.bias is missing from its weights"):
        export(str(tmp_path / "source"), "qwen2", out=tmp_path / "out", say=say_nothing)
    assert not list(tmp_path.glob("*out*"))


def test_an_adapter_is_refused_with_the_way_to_merge_it(tmp_path):
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(TINY), "r": 4})
    )
    with pytest.raises(
        UserError, match=rf"merge it first.*\n    finetune merge {tmp_path}/run --to {tmp_path}/run-me"
    ):
        export(str(tmp_path / "run"), "safetensors", say=say_nothing)


def test_the_result_of_a_full_training_is_exported(tmp_path):
    write_checkpoint(tmp_path / "model", load_file(TINY / "model.safetensors"))
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "model").rename(run / "model")
    (run / "run.json").write_text("{}")
    out = export(str(run), "safetensors", say=say_nothing)
    assert out == tmp_path / "run-safetensors"
    assert weights_fingerprint(out) == weights_fingerprint(TINY)


def test_what_is_there_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        export(str(TINY), "safetensors", out=tmp_path / "out", say=say_nothing)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file of this name is in the way"):
        export(str(TINY), "safetensors", out=tmp_path / "file", say=say_nothing)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written_is_told_first(tmp_path):
    """Before the checkpoint is looked for: there is none here."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for out, reason in [
        (tmp_path / "file" / "out", "file is a file"),
        (tmp_path / "dangling", "is a symbolic link to nowhere, which does not exist"),
        (tmp_path / ("x" * 240), "the name is too long"),
    ]:
        with pytest.raises(UserError, match=f"cannot write the export to {out}: .*{reason}.* with --out"):
            export(str(tmp_path / "none"), "qwen2", out=out, say=say_nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.mark.parametrize("to", ["safetensors", "nf4", "qwen2"])
def test_scripts_in_sub_folders_are_not_exported(tmp_path, to):
    write_checkpoint(tmp_path / "source", load_file(TINY / "model.safetensors"))
    (tmp_path / "source" / "making").mkdir()
    (tmp_path / "source" / "making" / "train.py").write_text("raise SystemExit")
    (tmp_path / "source" / "modeling.py").write_text("class Model: ...")
    out = export(str(tmp_path / "source"), to, out=tmp_path / "out", say=say_nothing)
    # The language model as Qwen2 needs no code of the source's.
    assert [path.name for path in out.rglob("*.py")] == ["prompt_embeddings.py" if to == "qwen2" else "modeling.py"]


def test_too_little_disk_space_is_told_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match=r"are free, but 67\.8 MB are needed"):
        export(str(TINY), "safetensors", out=tmp_path / "out", say=say_nothing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["safetensors", "qwen2"])
def test_a_disk_that_fails_leaves_nothing(to, tmp_path, monkeypatch):
    written = []

    def failing(self, content):
        written.append(len(content))
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, content)

    write = DirectFile.write
    monkeypatch.setattr(DirectFile, "write", failing)
    with pytest.raises(Failed, match="No space left on device"):
        export(str(TINY), to, out=tmp_path / "out", say=say_nothing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        ("auto", "the written weights do not read back as those of the source"),
        ("bfloat16", r"model\.safetensors does not read back as it was written"),
    ],
)
def test_a_flipped_bit_is_found_when_it_is_read_back(tmp_path, monkeypatch, dtype, told):
    write = export_module.write_tensors

    def with_damage(folder, *given):
        hashes = write(folder, *given)
        flip_a_bit(folder / "model.safetensors")
        return hashes

    monkeypatch.setattr(export_module, "write_tensors", with_damage)
    with pytest.raises(Failed, match=told):
        export(str(TINY), "safetensors", out=tmp_path / "out", dtype=dtype, say=say_nothing)
    assert not list(tmp_path.iterdir())


def test_a_tensor_made_otherwise_is_found(tmp_path, monkeypatch):
    rounded = exported_tensors.ExportedTensor._rounded
    calls = []

    def wrong_at_first(self, values):
        calls.append(self.name)
        right = rounded(self, values)
        return right + 1 if calls.count(self.name) == 1 and self.name.endswith("ln_f.weight") else right

    monkeypatch.setattr(exported_tensors.ExportedTensor, "_rounded", wrong_at_first)
    monkeypatch.setattr(exported_tensors, "SAMPLED", 1000)
    with pytest.raises(Failed, match=r"transformer\.ln_f.weight was not written as it was computed"):
        export(str(TINY), "safetensors", out=tmp_path / "out", dtype="bfloat16", say=say_nothing)
    assert not list(tmp_path.iterdir())


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(exported_tensors, "PIECE_BYTES", 5000)
    out = export(str(TINY), "qwen2", out=tmp_path / "out", say=say_nothing)
    source, written = load_file(TINY / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], source["lm_head.weight"])
    fused = source["transformer.h.1.attn.c_attn.weight"]
    parts = [written[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), fused)


def test_default_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "x").mkdir(parents=True)
    assert default_folder("models/x", "qwen2") == tmp_path / "models" / "x-qwen2"
    assert default_folder("models/x/", "nf4") == tmp_path / "models" / "x-nf4"
    assert default_folder("Qwen/Qwen-VL-Chat", "nf4") == Path("Qwen-VL-Chat-nf4")


def test_the_command(tmp_path):
    done = finetune("export", TINY, "--to", "qwen2", "--out", tmp_path / "served", cwd=tmp_path)
    assert "every byte as written" in done.stdout and "dynamic NTK and log-n attention" in done.stdout
    assert {path.name for path in (tmp_path / "served").iterdir()} >= {"config.json", "tokenizer.json", "visual"}
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


@pytest.mark.parametrize("form", ["safetensors", "nf4", "qwen2"])
def test_links_out_of_the_folder_are_left_out_and_told(tmp_path, form):
    write_checkpoint(tmp_path / "source", load_file(TINY / "model.safetensors"))
    (tmp_path / "id_rsa").write_text("a secret")
    for name in ("LICENSE", "README.md", "modeling_qwen.py", "NOTICE"):
        (tmp_path / "source" / name).symlink_to("../id_rsa" if name != "NOTICE" else "/nowhere")
    (tmp_path / "source" / "LICENCE.txt").write_text("a licence")
    (tmp_path / "source" / "LICENCE").symlink_to("LICENCE.txt")
    said = []
    out = export(str(tmp_path / "source"), form, out=tmp_path / "out", say=lambda *words: said.append(words))
    told = {str(text).partition(":")[0] for label, text in said if label == "left out"}
    assert told == {"LICENSE", "README.md", "modeling_qwen.py", "NOTICE"}
    written = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert (out / "LICENCE").read_text() == "a licence" and not (out / "LICENCE").is_symlink()
    assert not any(b"a secret" in content for content in written.values())
