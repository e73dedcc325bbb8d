import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from adapters_for_tests import KINDS, TARGETS, TINY, base_in, make_adapter
from changed_bases import edit_json, flip_a_bit
from peft import LoraConfig, PeftModel
from recipes_for_tests import finetune, write_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.utils import logging

from finetune.errors import UserError
from finetune.merge.merge import merge
from finetune.recipe import load_recipe
from finetune.terminal import labelled
from finetune.training.train import train
from qwenvl import load_model, load_processor
from qwenvl.base_check import identify_base
from qwenvl.checkpoint.identity import identity_to_json

logging.disable_progress_bar()
logging.set_verbosity_error()

WEIGHTS = "adapter_model.safetensors"


def quietly(*arguments, **settings):
    """Merge without the check, which has its own tests; the lines that were said."""
    lines = []
    merge(*arguments, **{"check": False, "say": lambda *said: lines.append(labelled(*said))} | settings)
    return "\n".join(lines)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def trained(folder: Path, **settings) -> dict[str, torch.Tensor]:
    """An adapter in `folder`, and the weights that PEFT merges it into."""
    return make_adapter(folder, **settings).merge_and_unload(safe_merge=True).state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_merged_as_peft_does(tmp_path, kind):
    expected = trained(tmp_path / "adapter", **KINDS[kind])
    quietly(tmp_path / "adapter", tmp_path / "merged")
    merged, base = weights_of(tmp_path / "merged"), load_file(TINY / "model.safetensors")
    assert merged.keys() == expected.keys() == base.keys()
    difference = max(float((merged[name] - expected[name]).abs().max()) for name in merged)
    moved = max(float((merged[name] - base[name]).abs().max()) for name in merged)
    assert difference <= 1e-6 < moved  # largest seen: 2e-7 (PiSSA: a singular value decomposition made twice)
    untouched = [name for name in base if torch.equal(expected[name], base[name])]
    assert untouched
    assert all(torch.equal(merged[name], base[name]) for name in untouched)


@pytest.mark.parametrize("kind", ["lora", "dora", "embeddings in full", "resampler in full", "embedding lora"])
@pytest.mark.parametrize(
    ("stored", "written"), [("bfloat16", "auto"), ("float32", "bfloat16"), ("float32", "float16")]
)
def test_16_bit_weights_are_rounded_exactly_once(tmp_path, kind, stored, written):
    base = base_in(tmp_path / "base", getattr(torch, stored))
    # In float32 throughout, from the base as it is stored.
    expected = trained(tmp_path / "adapter", base=base, dtype="float32", **KINDS[kind])
    quietly(tmp_path / "adapter", tmp_path / "merged", dtype=written)
    dtype = getattr(torch, stored if written == "auto" else written)
    merged = weights_of(tmp_path / "merged")
    for name, tensor in expected.items():
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], tensor.to(dtype)), name
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert [config["bf16"], config["fp16"]] == [dtype == torch.bfloat16, dtype == torch.float16]


def test_what_pissa_left_of_a_16_bit_base_is_rounded_as_training_saw_it(tmp_path):
    base = base_in(tmp_path / "base", torch.bfloat16)
    adapted = make_adapter(tmp_path / "adapter", base=base, **KINDS["pissa"])
    layer = adapted.base_model.model.transformer.h[0].attn.c_attn
    product = layer.lora_B.default.weight @ layer.lora_A.default.weight
    expected = (layer.base_layer.weight.float() + layer.scaling["default"] * product).bfloat16()
    said = quietly(tmp_path / "adapter", tmp_path / "merged")
    merged = weights_of(tmp_path / "merged")["transformer.h.0.attn.c_attn.weight"]
    # The decomposition made twice may round a value of the residual to its neighbour.
    assert (merged != expected).float().mean() < 0.005
    assert (merged.float() - expected.float()).abs().max() <= expected.float().abs().max() / 128
    assert "Initialised by pissa" in said


def test_pickled_shards_give_the_same_as_safetensors(tmp_path):
    bases = [base_in(tmp_path / suffix, torch.bfloat16, suffix) for suffix in ("safetensors", "bin")]
    make_adapter(tmp_path / "adapter", base=bases[0])
    for base in bases:
        quietly(tmp_path / "adapter", tmp_path / f"{base.name}-merged", base=str(base), shard_bytes=1e6)
    first, second = (weights_of(tmp_path / f"{base.name}-merged") for base in bases)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert len(list((tmp_path / "bin-merged").glob("model-*.safetensors"))) > 2


def test_an_adapter_of_the_published_script_is_merged(tmp_path):
    """PEFT of 2023: fewer settings, pickled weights, embeddings trained in full, the base named by its hub id."""
    folder = tmp_path / "adapter"
    expected = trained(folder, own=False, **KINDS["embeddings in full"])
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    settings = {"base_model_name_or_path": "Qwen/Qwen-VL", "bias": "none", "fan_in_fan_out": False, "r": 4}
    settings |= {"auto_mapping": None, "inference_mode": True, "init_lora_weights": True, "lora_alpha": 8}
    settings |= {"layers_pattern": None, "layers_to_transform": None, "lora_dropout": 0.05, "peft_type": "LORA"}
    settings |= {"modules_to_save": ["wte", "lm_head"], "revision": None, "target_modules": TARGETS}
    settings |= {"task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    said = quietly(folder, tmp_path / "merged", base=str(TINY))
    merged = weights_of(tmp_path / "merged")
    assert max(float((merged[name] - expected[name]).abs().max()) for name in merged) <= 1e-6
    assert "does not say which weights it was trained on (it names Qwen/Qwen-VL)" in said
    # Nothing is known of its training: the base's settings stay.
    for name in ("generation_config.json", "config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (TINY / name).read_bytes()


def test_a_run_becomes_a_checkpoint_that_every_loader_opens(tmp_path, tiny_images):
    changes = {"train__max_steps": 2, "adapter__train_embeddings": True, "evaluate": None}
    run = train(load_recipe(write_recipe(tmp_path, **changes), []), say=lambda *_: None)
    lines = []
    to = merge(run, tmp_path / "merged", say=lambda *said: lines.append(labelled(*said)))
    said = "\n".join(lines)
    assert "from base with adapter (allowed: 1e-05)" in said

    assert (to / "qwen.tiktoken").read_bytes() == (TINY / "qwen.tiktoken").read_bytes()
    assert (to / "tokenizer_config.json").read_bytes() == (TINY / "tokenizer_config.json").read_bytes()
    # As published: chat_format says where replies end, and loading derives the rest.
    settings = json.loads((to / "generation_config.json").read_text())
    assert (settings["chat_format"], settings["eos_token_id"]) == ("chatml", 512)
    assert load_model(to).generation_config.eos_token_id == [514, 513, 512]

    question = [{"type": "image", "image": str(tiny_images[0])}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": question}]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    prompt = load_processor(run).apply_chat_template(messages, **settings)
    adapted = load_model(run)
    with torch.inference_mode():
        expected = adapted(**prompt).logits
        for loaded in (load_model(to), AutoModelForCausalLM.from_pretrained(to).eval()):
            assert (loaded(**prompt).logits - expected).abs().max() <= 1e-5
    for processor in (load_processor(to), AutoProcessor.from_pretrained(to)):
        again = processor.apply_chat_template(messages, **settings)
        assert all(torch.equal(again[name], prompt[name]) for name in prompt)

    card = (to / "README.md").read_text()
    assert "max_steps: 2" in card
    assert "| train | 14 | 14 | 0 | 0 |" in card
    noted = json.loads((to / "merge.json").read_text())
    assert noted["made_of"]["base"] == identity_to_json(identify_base(TINY))
    assert {path.name for path in to.iterdir()} == {*noted["files"], "README.md", "merge.json"}


def test_the_same_merge_is_not_done_twice(tmp_path):
    make_adapter(tmp_path / "adapter")
    to = tmp_path / "merged"
    quietly(tmp_path / "adapter", to)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in to.iterdir()}
    (to / "README.md").write_text("people may write here")
    assert "already holds this merge" in quietly(tmp_path / "adapter", to)
    del before["README.md"]
    assert all((to / name).stat().st_mtime_ns == time for name, (time, _) in before.items())
    # Elsewhere it gives the same bytes.
    quietly(tmp_path / "adapter", tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == content for name, (_, content) in before.items())


def test_another_merge_or_a_damaged_one_is_only_replaced_when_asked(tmp_path):
    make_adapter(tmp_path / "adapter")
    to = tmp_path / "merged"
    quietly(tmp_path / "adapter", to)
    with pytest.raises(UserError, match=r"another merge \(dtype was float32, is float16\): .* or --overwrite"):
        quietly(tmp_path / "adapter", to, dtype="float16")
    quietly(tmp_path / "adapter", to, dtype="float16", overwrite=True)
    assert weights_of(to)["lm_head.weight"].dtype == torch.float16
    flip_a_bit(to / "model.safetensors", "lm_head.weight")
    with pytest.raises(UserError, match=r"holds this merge, but model\.safetensors is missing or was changed"):
        quietly(tmp_path / "adapter", to, dtype="float16")
    (to / "qwen.tiktoken").unlink()
    with pytest.raises(UserError, match=r"holds this merge, but qwen\.tiktoken is missing or was changed"):
        quietly(tmp_path / "adapter", to, dtype="float16")
    quietly(tmp_path / "adapter", to, dtype="float16", overwrite=True)
    assert (to / "qwen.tiktoken").is_file()


def test_a_merge_from_before_is_known_by_the_sampled_values(tmp_path):
    make_adapter(tmp_path / "adapter")
    to = tmp_path / "merged"
    quietly(tmp_path / "adapter", to)
    noted = json.loads((to / "merge.json").read_text())
    noted["made_of"]["base"] = noted["made_of"]["base"]["sampled"]
    (to / "merge.json").write_text(json.dumps(noted))
    assert "already holds this merge" in quietly(tmp_path / "adapter", to)


def test_a_base_that_was_changed_is_refused_or_another_merge(tmp_path):
    shutil.copytree(TINY, tmp_path / "base")
    make_adapter(tmp_path / "adapter", base=tmp_path / "base")
    quietly(tmp_path / "adapter", tmp_path / "merged")
    flip_a_bit(tmp_path / "base" / "model.safetensors")
    with pytest.raises(UserError, match=r"base differs: other weights \(fingerprint was"):
        quietly(tmp_path / "adapter", tmp_path / "merged")
    flip_a_bit(tmp_path / "base" / "model.safetensors")
    edit_json(tmp_path / "base" / "config.json", visual={"image_size": 140})
    with pytest.raises(UserError, match=r"base differs: config\.json: visual\.image_size was 112, is 140\. Give the"):
        quietly(tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "adapter" / "qwenvl.json").unlink()
    with pytest.raises(UserError, match=r"another merge \(base: config\.json: visual\.image_size was 112, is 140\)"):
        quietly(tmp_path / "adapter", tmp_path / "merged")


def test_nothing_else_is_written_over(tmp_path):
    make_adapter(tmp_path / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        quietly(tmp_path / "adapter", tmp_path / "mine")
    with pytest.raises(UserError, match="a file of this name is in the way"):
        quietly(tmp_path / "adapter", tmp_path / "mine" / "thesis.tex", overwrite=True)
    for source in (tmp_path / "adapter", tmp_path):
        with pytest.raises(UserError, match="which is read: give another folder"):
            quietly(tmp_path / "adapter", source, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_place_that_cannot_be_written_is_told_first(tmp_path, monkeypatch):
    """Before the adapter is read: there is none here."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for to, reason in [
        (tmp_path / "file", "a file of this name is in the way"),
        (tmp_path / "file" / "to", "file is a file"),
        (tmp_path / "dangling", "is a symbolic link to nowhere, which does not exist"),
        (tmp_path / ("x" * 240), "the name is too long"),
    ]:
        with pytest.raises(UserError, match=f"cannot write the merged model to {to}: .*{reason}.* with --to"):
            quietly(tmp_path / "adapter", to)

    def no_permission(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", no_permission)
    with pytest.raises(UserError, match=r"cannot write the merged model to .*: you have no permission.* with --to"):
        quietly(tmp_path / "adapter", tmp_path / "to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_an_empty_folder_may_be_filled(tmp_path):
    make_adapter(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    quietly(tmp_path / "adapter", tmp_path / "merged")
    assert weights_of(tmp_path / "merged")


def test_what_is_not_an_adapter_is_told_by_what_it_is(tmp_path):
    make_adapter(tmp_path / "adapter")
    quietly(tmp_path / "adapter", tmp_path / "merged")
    shutil.copytree(TINY, tmp_path / "full" / "model")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text("{}")
    for path, match in [
        (tmp_path / "merged", "is a merged checkpoint already"),
        (tmp_path / "full", "was trained without an adapter: .*model is a whole checkpoint already"),
        (tmp_path / "unfinished", "has no adapter yet: the run did not finish"),
        (TINY, "is a whole checkpoint: there is no adapter to merge"),
    ]:
        with pytest.raises(UserError, match=match):
            quietly(path, tmp_path / "to")
    with pytest.raises(FileNotFoundError, match="neither a run nor an adapter"):
        quietly(tmp_path / "nowhere", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_another_base_is_refused(tmp_path):
    make_adapter(tmp_path / "adapter")
    other = base_in(tmp_path / "other", torch.bfloat16)
    with pytest.raises(UserError, match=r"from which .*other differs: other weights .*\. Give .*with --base"):
        quietly(tmp_path / "adapter", tmp_path / "to", base=str(other))


def test_a_base_that_was_moved_is_asked_for(tmp_path):
    base = base_in(tmp_path / "base", torch.float32)
    make_adapter(tmp_path / "adapter", base=base)
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"its base .*base.* is not there: give it with --base"):
        quietly(tmp_path / "adapter", tmp_path / "to")
    quietly(tmp_path / "adapter", tmp_path / "to", base=str(tmp_path / "moved"))
    assert weights_of(tmp_path / "to")


def test_an_adapter_of_a_larger_model_is_refused(tmp_path):
    make_adapter(tmp_path / "adapter", own=False)
    weights = {
        name.replace("h.1.", "h.31."): tensor for name, tensor in load_file(tmp_path / "adapter" / WEIGHTS).items()
    }
    save_file(weights, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(UserError, match=r"h\.31\.attn\.c_attn\.lora_A\.weight has no place"):
        quietly(tmp_path / "adapter", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_values_beyond_float16_are_named_and_nothing_is_left(tmp_path):
    folder = tmp_path / "adapter"
    make_adapter(folder)
    weights = load_file(folder / WEIGHTS)
    weights["base_model.model.transformer.h.1.mlp.w2.lora_B.weight"] *= 1e9
    save_file(weights, folder / WEIGHTS)
    match = r"transformer\.h\.1\.mlp\.w2\.weight: .* is more than float16 can hold \(65504\): give --dtype bfloat16"
    with pytest.raises(UserError, match=match):
        quietly(folder, tmp_path / "to", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    quietly(folder, tmp_path / "to", dtype="bfloat16")


def test_a_product_that_overflows_is_named(tmp_path):
    folder = tmp_path / "adapter"
    make_adapter(folder)
    weights = load_file(folder / WEIGHTS)
    for half in "AB":
        weights[f"base_model.model.transformer.h.1.mlp.w2.lora_{half}.weight"] *= 1e25
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"transformer\.h\.1\.mlp\.w2\.weight: the merged weights hold NaN or infin"):
        quietly(folder, tmp_path / "to")


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    make_adapter(tmp_path / "adapter")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(OSError, match=r"1\.0 MB are free"):
        quietly(tmp_path / "adapter", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_dtypes_of_a_mixed_base_are_kept(tmp_path):
    base = base_in(tmp_path / "base", torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    name = "transformer.visual.attn_pool.pos_embed"
    tensors[name] = load_file(TINY / "model.safetensors")[name]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    make_adapter(tmp_path / "adapter", base=base)
    quietly(tmp_path / "adapter", tmp_path / "to")
    merged = weights_of(tmp_path / "to")
    assert {key for key, tensor in merged.items() if tensor.dtype == torch.float32} == {name}
    assert torch.equal(merged[name], tensors[name])


def test_large_tensors_are_computed_in_pieces(tmp_path, monkeypatch):
    expected = trained(tmp_path / "adapter", **KINDS["embedding lora"])
    monkeypatch.setattr("finetune.merge.tensors.PIECE_VALUES", 10_000)
    monkeypatch.setattr("finetune.merge.tensors.COPIED_BYTES", 10_000)
    monkeypatch.setattr("finetune.files.tensor_files.PIECE_BYTES", 3_000)
    quietly(tmp_path / "adapter", tmp_path / "to")
    merged = weights_of(tmp_path / "to")
    assert max(float((merged[name] - expected[name]).abs().max()) for name in merged) <= 1e-6


def test_an_adapter_that_peft_wrote_from_a_merged_folder_merges_again(tmp_path):
    """Training may go on from a merged checkpoint: it is a base like any other."""
    make_adapter(tmp_path / "first")
    to = tmp_path / "merged"
    quietly(tmp_path / "first", to)
    expected = trained(tmp_path / "second", base=to)
    quietly(tmp_path / "second", tmp_path / "twice")
    merged = weights_of(tmp_path / "twice")
    assert max(float((merged[name] - expected[name]).abs().max()) for name in merged) <= 1e-6


def test_peft_saves_what_pissa_became_as_plain_lora_and_that_merges_too(tmp_path):
    """The remedy for initialisations whose residual cannot be computed again."""
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights="pissa_niter_4")
    model = PeftModel(load_model(TINY), settings)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa_niter_4"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn(parameter.shape)
    initial = str(tmp_path / "initial")
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=initial)
    expected = model.merge_and_unload().state_dict()
    quietly(tmp_path / "adapter", tmp_path / "to", base=str(TINY))
    merged = weights_of(tmp_path / "to")
    assert max(float((merged[name] - expected[name]).abs().max()) for name in merged) <= 1e-6


def test_the_command_tells_a_wrong_argument_and_merges(tmp_path):
    done = finetune("merge", tmp_path / "nowhere", "--to", tmp_path / "to", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "neither a run nor an adapter" in done.stderr
    make_adapter(tmp_path / "adapter")
    done = finetune("merge", tmp_path / "adapter", "--to", tmp_path / "to", "--shard-size", "2MB", "--no-check")
    assert f"merged      {tmp_path / 'to'}" in done.stdout
    assert len(list((tmp_path / "to").glob("model-*.safetensors"))) > 2
