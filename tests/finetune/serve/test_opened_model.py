"""Several adapters in one model: each name replies as its adapter loaded alone, whatever else comes and goes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters_for_tests import KINDS, edit_config, make_adapter
from recipes_for_tests import IMAGES, TINY
from requests_for_tests import image_part, text_part, user
from safetensors.torch import load_file, save_file

from finetune.errors import InputError, UserError
from finetune.replies.decoder import PromptRow
from finetune.replies.running_batch import ReplyRequest, RunningBatch
from finetune.serve.asked_name import name_of
from finetune.serve.opened_model import open_served
from finetune.serve.served_names import NameTaken, UnknownName
from qwenvl import load_model
from qwenvl.checkpoint.record import read_record, write_record
from qwenvl.views import Views

TOKENS = 12
MESSAGES = [user(image_part(IMAGES[0]), text_part("What is this?"))]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A folder with an adapter of each kind that is used here."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, kind in enumerate(("lora", "rslora", "dora", "embeddings in full", "vision lora", "all biases")):
        torch.manual_seed(number)
        make_adapter(folder / kind, **KINDS[kind])
        weights = load_file(folder / kind / "adapter_model.safetensors")
        torch.manual_seed(number)
        moved = {name: tensor + 0.05 * torch.randn(tensor.shape) for name, tensor in weights.items()}
        save_file(moved, folder / kind / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def alone(adapters):
    """The reply of an adapter, or the base, that is loaded by itself, by kind."""
    known: dict[str | None, list[int]] = {}

    def alone(kind: str | None) -> list[int]:
        if kind not in known:
            known[kind] = generated(load_model(TINY if kind is None else adapters / kind))
        return known[kind]

    return alone


def generated(model) -> list[int]:
    """A reply to `MESSAGES` by `generate`."""
    opened, names = open_served(str(TINY), name="tiny")
    prompt = names.get("tiny").render(MESSAGES)
    pixels = opened.image_processor([IMAGES[0]], do_normalize=False, return_tensors="pt")["pixel_values"]
    ids = torch.tensor([prompt.ids])
    new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **GREEDY)
    return new[0, len(prompt.ids) :].tolist()


GREEDY = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}


def request(opened, names, name, messages=MESSAGES) -> ReplyRequest:
    served = names.get(name)
    prompt = served.render(messages)
    images = [one.source for one in prompt.images]
    pixels = opened.image_processor(images, do_normalize=False, return_tensors="pt")["pixel_values"]
    features = opened.encode(pixels, served.adapter)
    keys = [f"{opened.vision_key(served.adapter)}{number}" for number in range(len(images))]
    row = PromptRow(prompt.ids, list(features), keys, served.adapter)
    return ReplyRequest(row, TOKENS, served.stop_ids, min_new_tokens=TOKENS)


def replies(opened, names, *wanted) -> dict[str, list[int]]:
    """The replies of some names, in one batch."""
    batch = RunningBatch(opened.decoder, opened.tokenizer)
    numbers, new = batch.join([request(opened, names, name) for name in wanted])
    return grown(batch, dict(zip(numbers, wanted, strict=True)), new)


def grown(batch, wanted, new) -> dict[str, list[int]]:
    ids: dict[str, list[int]] = {name: [] for name in wanted.values()}
    while new:
        for token in new:
            ids[wanted[token.reply]].append(token.id)
        new = batch.step()
    return ids


def test_each_name_replies_as_its_adapter_alone(adapters, alone):
    kinds = ["lora", "dora", "embeddings in full", "vision lora"]
    others = {kind: str(adapters / kind) for kind in kinds}
    opened, names = open_served(str(adapters / "rslora"), base_name="bare", adapters=others)
    assert [name.name for name in names] == ["rslora", "bare", *kinds]
    expected = {name: alone(None if name == "bare" else name) for name in ["rslora", "bare", *kinds]}
    assert replies(opened, names, *expected) == expected
    assert len({tuple(reply) for reply in expected.values()}) == len(expected)  # otherwise nothing is shown
    assert replies(opened, names, "dora") == {"dora": alone("dora")}


@pytest.mark.parametrize("form", [{"dtype": "bfloat16"}, {"quantization": "nf4"}])
def test_names_reply_in_16_and_in_4_bits_as_alone(adapters, form):
    """Copies that were trained in full stay in 32 bits beside a 16-bit base; PEFT casts those of each adapter."""
    kinds = ["lora", "embeddings in full"]
    if "quantization" in form:
        pytest.importorskip("bitsandbytes")
    opened, names = open_served(
        str(TINY), name="bare", adapters={kind: str(adapters / kind) for kind in kinds}, **form
    )
    for kind in kinds:
        model = load_model(TINY, adapter=adapters / kind, **form)
        assert dtypes_of(model, "default") == dtypes_of(module_of(opened), names.get(kind).adapter)
        assert replies(opened, names, kind) == {kind: generated(model)}


def dtypes_of(model, adapter) -> dict[str, torch.dtype]:
    found = {name: one.dtype for name, one in model.named_parameters() if f".{adapter}." in name}
    return {name.replace(adapter, "").removeprefix("base_model.model."): dtype for name, dtype in found.items()}


def test_features_are_shared_between_adapters_that_leave_vision_alone(adapters):
    opened, names = open_served(str(TINY), adapters={kind: adapters / kind for kind in ("lora", "vision lora")})
    pixels = opened.image_processor(list(IMAGES[:2]), do_normalize=False, return_tensors="pt")["pixel_values"]
    of_lora, of_vision = (names.get(name).adapter for name in ("lora", "vision lora"))
    assert opened.vision_key(None) == opened.vision_key(of_lora) != opened.vision_key(of_vision)
    base = load_model(TINY).get_image_features(pixels)
    assert opened.encode(pixels, of_lora).equal(base) and opened.encode(pixels, None).equal(base)
    changed = load_model(adapters / "vision lora").get_image_features(pixels)
    torch.testing.assert_close(opened.encode(pixels, of_vision), changed, rtol=0, atol=1e-6)
    assert (changed - base).abs().max() > 1e-3
    assert opened.encode(pixels, None).equal(base)


def test_adapters_come_and_go_while_replies_grow(adapters, alone):
    """The model is opened without any: the first adapter changes its modules under a reply that is half done."""
    opened, names = open_served(str(TINY), name="bare")
    model = module_of(opened)
    batch = RunningBatch(opened.decoder, opened.tokenizer)
    numbers, new = batch.join([request(opened, names, "bare")])
    wanted, seen = {numbers[0]: "bare"}, list(new)
    seen += batch.step()
    first = names.load("tuned", str(adapters / "lora"))
    numbers, new = batch.join([request(opened, names, "tuned")])
    wanted[numbers[0]] = "tuned"
    seen += [*new, *batch.step()]
    with names.lease("tuned") as held:
        assert held is first
        names.drop("tuned")
        assert names.get("tuned") is None and parameters_of(model, first.adapter)
        with pytest.raises(UnknownName, match="there is no model 'tuned' here, but bare"), names.lease("tuned"):
            pass
        second = names.load("tuned", str(adapters / "embeddings in full"))
        assert second.adapter != first.adapter
        numbers, new = batch.join([request(opened, names, "tuned")])
        wanted[numbers[0]] = "again"
        found = grown(batch, wanted, [*seen, *new])
    assert not parameters_of(model, first.adapter) and parameters_of(model, second.adapter)
    assert found == {"bare": alone(None), "tuned": alone("lora"), "again": alone("embeddings in full")}
    names.drop("tuned")
    assert not parameters_of(model, second.adapter) and replies(opened, names, "bare") == {"bare": alone(None)}
    names.load("tuned", str(adapters / "lora"))
    assert replies(opened, names, "tuned", "bare") == {"tuned": alone("lora"), "bare": alone(None)}


def module_of(opened) -> torch.nn.Module:
    """The module that is decoded."""
    return opened.decoder._forward.base


def parameters_of(model, adapter: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if f".{adapter}." in name or name.endswith(f".{adapter}")]


@pytest.mark.parametrize("others", [{}, {"lora": "lora"}])
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(adapters, alone, tmp_path, others):
    folders = {name: str(adapters / kind) for name, kind in others.items()}
    opened, names = open_served(str(TINY), name="bare", adapters=folders)
    model = module_of(opened)
    before = weights_of(model)
    for kind in ("rslora", "embeddings in full"):
        broken = tmp_path / kind
        shutil.copytree(adapters / kind, broken)
        weights = load_file(broken / "adapter_model.safetensors")
        some = next(name for name in weights if "lora_" in name)
        save_file({name: one for name, one in weights.items() if name != some}, broken / "adapter_model.safetensors")
        with pytest.raises(InputError, match=r"the adapter does not fit .* missing from the adapter"):
            names.load("broken", str(broken))
        edit_config(broken, r=5)
        with pytest.raises(InputError, match="does not fit"):
            names.load("broken", str(broken))
        assert names.get("broken") is None and weights_of(model) == before
    names.load("broken", str(adapters / "rslora"))
    expected = {"bare": alone(None), "broken": alone("rslora"), **{name: alone(kind) for name, kind in others.items()}}
    assert replies(opened, names, *expected) == expected


def weights_of(model) -> list[str]:
    """Names of a model's tensors, without PEFT's layers around them."""
    names = [name.replace(".original_module", "").replace(".base_layer", "") for name, _ in model.named_parameters()]
    return sorted(names)


def test_each_name_is_asked_as_its_own_record_says(adapters, tmp_path):
    views = Views(page=True, grid=(1, 2), overlap=0.0)
    for name, fields in {
        "receipts": {"prompts": {"vqa": ("{question} One word.",)}, "system": "Read.", "views": views},
        "raw": {"chat_format": "raw", "labels": "assistant", "stop_ids": (512,)},
    }.items():
        shutil.copytree(adapters / "lora", tmp_path / name)
        record = read_record(tmp_path / name)
        write_record(tmp_path / name, type(record)(**{**vars(record), **fields}))
    opened, names = open_served(str(TINY), adapters={name: tmp_path / name for name in ("receipts", "raw")})
    tokenizer = opened.tokenizer
    receipts, raw, tiny = (names.get(name) for name in ("receipts", "raw", "tiny"))
    said = tokenizer.decode(receipts.render(MESSAGES).ids)
    assert said.startswith("<|im_start|>system\nRead.<|im_end|>") and "What is this? One word.<|im_end|>" in said
    assert len(receipts.render(MESSAGES).images) == 3 and len(tiny.render(MESSAGES).images) == 1
    assert "One word" not in tokenizer.decode(tiny.render(MESSAGES).ids)
    assert tokenizer.decode(raw.render([user("Total?")]).ids) == "Total?"
    assert raw.stop_ids == (tokenizer.eod_id,) and set(tiny.stop_ids) > set(raw.stop_ids)
    assert any("put into the prompt '{question} One word.' (as it was trained" in note for note in receipts.notes)
    assert not any("base" in note for note in receipts.notes)
    _, names = open_served(str(tmp_path / "receipts"), prompt="plain", system="Look.")
    assert any(
        note.endswith("tiny is not served by itself; --base-name gives it a name")
        for note in names.get("receipts").notes
    )
    said = tokenizer.decode(names.get("receipts").render([user("Total?")]).ids)
    assert said.startswith("<|im_start|>system\nLook.<|im_end|>") and "user\nTotal?<|im_end|>" in said
    with pytest.raises(UserError, match=r"--prompt trained: .*lora has no single prompt"):
        open_served(str(tmp_path / "receipts"), prompt="trained", adapters={"other": adapters / "lora"})
    with pytest.raises(UserError, match=r"raw is a base model, .* no system message"):
        open_served(str(TINY), system="Look.", adapters={"raw": tmp_path / "raw"})


def test_what_cannot_be_beside_others_is_served_alone(adapters, alone):
    biases = adapters / "all biases"
    opened, names = open_served(str(biases), name="biases")
    assert replies(opened, names, "biases") == {"biases": alone("all biases")}
    with pytest.raises(UserError, match="all biases cannot be served beside others: bias is 'all': it changes biases"):
        names.load("lora", str(adapters / "lora"))
    with pytest.raises(UserError, match="biases is the model itself"):
        names.drop("biases")
    for options in ({"adapters": {"lora": adapters / "lora"}}, {"base_name": "bare"}):
        with pytest.raises(UserError, match="all biases cannot be served beside others: bias is 'all'"):
            open_served(str(biases), **options)
    with pytest.raises(UserError, match="all biases cannot be served beside others: bias is 'all'"):
        open_served(str(TINY), adapters={"biases": biases})


def test_names_and_adapters_that_are_wrong_are_refused_before_weights_are_loaded(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.serve.opened_model.load_model", None)
    lora = str(adapters / "lora")
    other_base = tmp_path / "other"
    shutil.copytree(TINY, other_base)
    config = json.loads((other_base / "config.json").read_text())
    (other_base / "config.json").write_text(json.dumps({**config, "seq_length": 64}))
    in_4_bits, pissa = (tmp_path / name for name in ("in 4 bits", "pissa"))
    for folder in (in_4_bits, pissa):
        shutil.copytree(lora, folder)
    record = read_record(in_4_bits)
    write_record(in_4_bits, type(record)(**{**vars(record), "quantize": ("language",)}))
    edit_config(pissa, init_lora_weights="pissa_niter_4")
    for options, said in (
        ({"adapters": {"x": str(TINY)}}, "is no adapter: only adapters on .* can be served beside it"),
        (
            {"adapters": {"tiny": lora}},
            "two models are to be served as tiny: .*tiny and .*lora. Give",
        ),
        ({"adapters": {" x": lora}}, "' x' is no name for a model"),
        ({"name": "x\n"}, "no name for a model"),
        ({"base_name": "bare"}, "--base-name bare: .*tiny is no adapter; --name gives it a name"),
        (
            {"adapters": {"x": str(in_4_bits)}},
            "was trained on language in 4 bits, and the model .*tiny, has all",
        ),
        ({"adapters": {"x": str(tmp_path / "nothing")}}, "no such folder"),
        ({"prompt": "Answer:"}, r"--prompt: there is no \{question\}"),
    ):
        with pytest.raises(UserError if "nothing" not in str(options) else InputError, match=said):
            open_served(str(TINY), **options)
    with pytest.raises(InputError, match=r"lora was trained on .*tiny, from which .*other differs: .*seq_length"):
        open_served(str(other_base), adapters={"x": lora})
    with pytest.raises(InputError, match="init_lora_weights"):
        open_served(str(TINY), adapters={"x": str(pissa)})


def test_the_name_of_a_folder(tmp_path):
    run = tmp_path / "receipts"
    for folder in ("adapter", "model"):
        (run / folder).mkdir(parents=True)
    assert [name_of(str(run / folder)) for folder in ("", "adapter", "model")] == ["receipts", "adapter", "model"]
    (run / "run.json").write_text("{}")
    assert [name_of(str(run / folder)) for folder in ("", "adapter", "model/")] == ["receipts"] * 3
    assert name_of("Qwen/Qwen-VL-Chat") == "Qwen/Qwen-VL-Chat"


def test_a_name_is_taken_while_it_is_served(adapters):
    _, names = open_served(str(TINY), adapters={"lora": adapters / "lora"})
    with pytest.raises(NameTaken, match="lora is served already: unload it first"):
        names.load("lora", str(adapters / "rslora"))
    with pytest.raises(UserError, match="tiny is the model itself, which cannot be unloaded"):
        names.drop("tiny")
    with pytest.raises(UnknownName):
        names.drop("other")
