"""Checkpoints in every stored form, adapters of this and of other programs, and their bases."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from records_for_tests import note_base
from safetensors.torch import load_file, save_file

from qwenvl import InputError, MissingFileError, QwenVLForConditionalGeneration, load_model, load_processor
from qwenvl.base_check import identify_base
from qwenvl.checkpoint.fingerprint import weights_fingerprint
from qwenvl.checkpoint.identity import BaseIdentity
from qwenvl.loading import find_source
from qwenvl.loading_errors import checkpoint_errors

STORED = ["safetensors", "sharded safetensors", "bin", "sharded bin"]


def store(tiny_folder, folder, form: str, dtype=torch.float32):
    """The tiny checkpoint's weights in another form, its other files beside them."""
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(tiny_folder / "model.safetensors").items()}
    names = sorted(tensors)
    shards = [names[:20], names[20:40], names[40:]] if "sharded" in form else [names]
    suffix, stem = ("bin", "pytorch_model") if "bin" in form else ("safetensors", "model")
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}.{suffix}" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        weight_map.update(dict.fromkeys(shard, file))
        content = {name: tensors[name] for name in shard}
        if suffix == "bin":
            torch.save(content, folder / file)
        else:
            save_file(content, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def logits(expected):
    """Logits of one image and a question; the adapted and merged models below are compared by them."""

    def compute(model):
        with torch.no_grad():
            ids = expected["one_image.input_ids"][None]
            return model(input_ids=ids, pixel_values=expected["pixel_values"][:1]).logits

    return compute


@pytest.mark.parametrize("form", STORED)
def test_every_stored_form_loads_the_same(tiny_folder, tiny_model, tmp_path, form):
    model = load_model(store(tiny_folder, tmp_path / "copy", form))
    ours, theirs = model.state_dict(), tiny_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not model.training


@pytest.mark.parametrize("shard_size", ["50GB", "1MB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load(tiny_folder, tmp_path, shard_size, dtype):
    model = load_model(tiny_folder, dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    load_processor(tiny_folder).save_pretrained(tmp_path)
    reloaded = load_model(tmp_path)
    assert str(reloaded.dtype) == f"torch.{dtype}"
    ours, theirs = reloaded.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (tiny_folder / "qwen.tiktoken").read_bytes()
    again = load_processor(tmp_path)
    assert (
        again.n_queries == 256
        and again.image_processor.to_dict() == load_processor(tiny_folder).image_processor.to_dict()
    )


def test_saved_tensors_have_the_published_names(tiny_folder, tmp_path):
    load_model(tiny_folder).save_pretrained(tmp_path)
    published = load_file(tiny_folder / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in saved)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(tiny_folder, device_map, logits, tiny_model):
    assert torch.equal(logits(load_model(tiny_folder, device_map=device_map)), logits(tiny_model))


def test_unknown_values_are_named(tiny_folder):
    with pytest.raises(InputError, match="float99"):
        load_model(tiny_folder, dtype="float99")
    with pytest.raises(InputError, match="nf5"):
        load_model(tiny_folder, quantization="nf5")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder_is_named(path):
    with pytest.raises(MissingFileError, match="no such folder"):
        load_model(path)


def test_a_hub_id_that_cannot_be_had_is_named():
    for load in (load_model, load_processor):
        with pytest.raises(MissingFileError, match=r"no-one/no-model: there is no such folder.*hf download"):
            load("no-one/no-model")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"neither config\.json"):
        load_model(tmp_path)


def test_a_missing_shard_is_named(tiny_folder, tmp_path):
    folder = store(tiny_folder, tmp_path / "copy", "sharded bin")
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(MissingFileError, match="00002-of-00003"):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match="00002-of-00003"):
        weights_fingerprint(folder)


def test_a_vocabulary_of_another_model_is_named(tiny_folder, tmp_path):
    folder = store(tiny_folder, tmp_path / "copy", "safetensors")
    lines = (folder / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines[:-12]))
    with pytest.raises(ValueError, match=r"<img> is id 714 .* 726"):
        load_processor(folder)


def change_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut_short(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGED_CHECKPOINTS = {
    "cut config": (lambda folder: cut_short(folder / "config.json"), r"config\.json is not JSON"),
    "a list as config": (
        lambda folder: (folder / "config.json").write_text("[]"),
        r"config\.json holds a list where an object is expected",
    ),
    "a word as size": (lambda folder: change_json(folder / "config.json", hidden_size="x"), "hidden_size.*'x'"),
    "unknown dtype": (lambda folder: change_json(folder / "config.json", torch_dtype="float99"), "float99"),
    "cut weights": (lambda folder: cut_short(folder / "model.safetensors"), "model.safetensors cannot be read"),
    "weights of another size": (
        lambda folder: change_json(folder / "config.json", intermediate_size=100),
        r"mlp\.w1\.weight has shape \(256, 256\), but config.json asks for \(50, 256\)",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights here"),
    "generation config": (
        lambda folder: change_json(folder / "generation_config.json", max_new_tokens=-1),
        r"generation_config\.json: max_new_tokens is -1 instead of a positive whole number",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_CHECKPOINTS)
def test_a_damaged_checkpoint_is_an_input_error(tiny_folder, tmp_path, damage):
    make, message = DAMAGED_CHECKPOINTS[damage]
    shutil.copytree(tiny_folder, tmp_path / "copy")
    make(tmp_path / "copy")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "copy")


def test_an_error_with_another_cause_passes(tiny_folder):
    with pytest.raises(RuntimeError, match="no memory"), checkpoint_errors(str(tiny_folder)):
        raise RuntimeError("no memory")


# Adapters


def train_a_little(model, seed=0):
    """Give LoRA matrices (and trained embeddings) values that change the logits."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


# The published script's settings; for the base checkpoint it trains wte and lm_head too.
PUBLISHED_LORA = {
    "r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["c_attn", "attn.c_proj", "w1", "w2"],
    "bias": "none",
    "task_type": "CAUSAL_LM",
}


@pytest.fixture(params=[None, ["wte", "lm_head"]], ids=["chat", "base"])
def adapter(request, tiny_folder, tmp_path):
    """An adapter folder beside its own copy of the base, and the adapted model it was saved from."""
    base = store(tiny_folder, tmp_path / "base", "safetensors")
    model = get_peft_model(load_model(base), LoraConfig(**PUBLISHED_LORA, modules_to_save=request.param))
    train_a_little(model)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", model


def test_published_targets_match_the_language_model_only(adapter):
    _, _, model = adapter
    matched = {name.rsplit(".lora_A", 1)[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    inside = "base_model.model.transformer.h"
    parts = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    assert matched == {f"{inside}.{layer}.{part}" for layer in range(2) for part in parts}


def test_an_adapter_folder_finds_its_base(adapter, logits):
    base, folder, model = adapter
    loaded = load_model(folder)
    assert isinstance(loaded, PeftModel) and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert find_source(folder).base == str(base)
    assert load_processor(folder).n_queries == 256


def test_a_run_folder_and_an_adapter_beside_a_base(adapter, logits, tmp_path):
    base, folder, model = adapter
    shutil.copytree(folder, tmp_path / "run" / "adapter")
    assert torch.equal(logits(load_model(tmp_path / "run")), logits(model))
    assert torch.equal(logits(load_model(base, adapter=tmp_path / "run")), logits(model))


def test_a_base_relative_to_the_adapter(adapter, logits):
    _, folder, model = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "../base"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_model(folder)), logits(model))


def test_peft_auto_class(adapter, logits):
    _, folder, model = adapter
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder).eval()), logits(model))


def test_peft_auto_class_with_a_tokenizer_in_the_adapter_folder(adapter, logits, tiny_processor):
    """The published script leaves one there, which makes PEFT resize the embeddings."""
    _, folder, model = adapter
    tiny_processor.tokenizer.save_pretrained(folder)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.get_input_embeddings().weight.shape[0] == 768
    assert torch.equal(logits(loaded), logits(model))


def as_published(folder):
    """The adapter as PEFT of the published script's time wrote it: pickled weights, few configuration keys."""
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    keys = [
        *("auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
        *("layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r"),
        *("revision", "target_modules", "task_type"),
    ]
    (folder / "adapter_config.json").write_text(json.dumps({key: config[key] for key in keys}))


def test_adapters_of_the_published_script(adapter, logits):
    _, folder, model = adapter
    as_published(folder)
    names = torch.load(folder / "adapter_model.bin", weights_only=True).keys()
    assert "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in names
    assert torch.equal(logits(load_model(folder)), logits(model))


def test_a_moved_base_is_named(adapter, tmp_path):
    base, folder, _ = adapter
    base.rename(tmp_path / "moved")
    with pytest.raises(MissingFileError, match=r"base .* is not there.*adapter="):
        load_model(folder)


def test_the_fingerprint_is_checked(adapter, logits):
    base, folder, model = adapter
    note_base(folder, base, identify_base(base))
    assert torch.equal(logits(load_model(folder)), logits(model))
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.h.1.mlp.w2.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"trained on .* differs: other weights \(fingerprint was [0-9a-f]{32}, is"):
        load_model(folder)


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fingerprint_is_of_the_weights_not_the_files(tiny_folder, tmp_path, form, dtype):
    copy = store(tiny_folder, tmp_path / "copy", form, dtype)
    assert weights_fingerprint(copy) == weights_fingerprint(tiny_folder)


def rename_one(tensors):
    name = sorted(name for name in tensors if ".h.0." in name)[0]
    tensors[name.replace(".h.0.", ".h.9.")] = tensors.pop(name)


def drop_one(tensors):
    tensors.pop(sorted(name for name in tensors if ".h.0." in name)[0])


@pytest.mark.parametrize("damage", [rename_one, drop_one])
def test_adapter_weights_without_a_place_are_named(adapter, damage):
    _, folder, _ = adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"does not fit .*transformer\.h\.[09]"):
        load_model(folder)


DAMAGED_ADAPTERS = {
    "cut config": (lambda folder: cut_short(folder / "adapter_config.json"), r"adapter_config\.json is not JSON"),
    "unknown kind": (lambda folder: change_json(folder / "adapter_config.json", peft_type="FOO"), "'FOO'"),
    "a number as base": (
        lambda folder: change_json(folder / "adapter_config.json", base_model_name_or_path=5),
        "base_model_name_or_path is 5 instead of a text",
    ),
    "no modules": (lambda folder: change_json(folder / "adapter_config.json", target_modules=["foo"]), "'foo'"),
    "another rank": (
        lambda folder: change_json(folder / "adapter_config.json", r=8),
        r"does not fit .*size mismatch for .*lora_A",
    ),
    "cut weights": (lambda folder: cut_short(folder / "adapter_model.safetensors"), "it is damaged, fetch it again"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "weights are missing"),
}


@pytest.mark.parametrize("damage", DAMAGED_ADAPTERS)
def test_a_damaged_adapter_is_an_input_error(tiny_folder, tmp_path, damage):
    make, message = DAMAGED_ADAPTERS[damage]
    get_peft_model(load_model(tiny_folder), LoraConfig(**PUBLISHED_LORA)).save_pretrained(tmp_path / "adapter")
    make(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "adapter")


def test_an_adapter_on_an_adapter_is_refused(adapter):
    _, folder, _ = adapter
    with pytest.raises(InputError, match="an adapter itself"):
        load_model(folder, adapter=folder)


def test_a_base_is_no_adapter(tiny_folder):
    with pytest.raises(MissingFileError, match="not an adapter"):
        load_model(tiny_folder, adapter=tiny_folder)


def test_from_pretrained_keeps_loading_information(tiny_folder):
    model, info = QwenVLForConditionalGeneration.from_pretrained(tiny_folder, output_loading_info=True)
    assert not any(info.values())
    assert model.generation_config.eos_token_id == [514, 513, 512]


# Hub ids, with the hub's files in its cache and no connection


def put_into_hub_cache(cache, repository, folder):
    home = cache / f"models--{repository.replace('/', '--')}"
    revision = "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    shutil.copytree(folder, home / "snapshots" / revision)


HUB_IDS = """
import sys
from qwenvl import load_model, load_processor

print(type(load_model("Qwen/Qwen-VL-Chat")).__name__, load_processor("someone/right-lora").n_queries)
for noted in ("right", "no", "wrong"):
    print(f"--- {noted}", file=sys.stderr, flush=True)
    print(noted, type(load_model(f"someone/{noted}-lora")).__name__)
    print(type(load_model("Qwen/Qwen-VL-Chat", adapter=f"someone/{noted}-lora")).__name__)
"""


def test_hub_ids(tiny_folder, tmp_path):
    """A base and adapters by their ids, loaded in a process of its own that sees only the hub's cache: adapters that
    note a fingerprint of this base, none, and another's."""
    model = get_peft_model(load_model(tiny_folder), LoraConfig(**PUBLISHED_LORA))
    train_a_little(model).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "Qwen/Qwen-VL-Chat"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    hub, notes = tmp_path / "hub", {"right": identify_base(tiny_folder), "wrong": BaseIdentity("0", None, None, "0")}
    put_into_hub_cache(hub, "Qwen/Qwen-VL-Chat", store(tiny_folder, tmp_path / "base", "sharded bin"))
    put_into_hub_cache(hub, "someone/no-lora", tmp_path / "adapter")
    for name, noted in notes.items():
        folder = shutil.copytree(tmp_path / "adapter", tmp_path / name)
        note_base(folder, "Qwen/Qwen-VL-Chat", noted)
        put_into_hub_cache(hub, f"someone/{name}-lora", folder)
    done = subprocess.run(
        [sys.executable, "-c", HUB_IDS],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"},
    )
    loaded = ["PeftModelForCausalLM"] * 2
    assert done.stdout.split() == ["QwenVLForConditionalGeneration", "256", "right", *loaded, "no", *loaded], (
        done.stderr
    )
    _, right, no, wrong = done.stderr.split("--- ")
    assert "unchecked" not in right and "unchecked" in no
    assert done.returncode == 1 and "was trained on Qwen/Qwen-VL-Chat" in wrong


def test_parts_on_disk(tiny_folder, tmp_path, logits, tiny_model):
    """Accelerate may keep whole blocks, the vision tower or the head on disk, and bring them in when they run."""
    device_map = {
        "transformer.wte": "cpu",
        "transformer.h.0": "disk",
        "transformer.h.1": "cpu",
        "transformer.ln_f": "cpu",
        "transformer.visual": "disk",
        "lm_head": "disk",
    }
    model = QwenVLForConditionalGeneration.from_pretrained(
        tiny_folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(model.eval()), logits(tiny_model))


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match=r"holds a model of type 'qwen2', and Qwen-VL is of type 'qwen'"):
        load_model(tmp_path)
