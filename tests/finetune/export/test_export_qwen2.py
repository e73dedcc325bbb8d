"""The exported Qwen2 model computes what ours computes, images included."""

import json
import runpy
import sys

import pytest
import torch
from recipes_for_tests import IMAGES, TINY
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from finetune.export.export import export
from finetune.export.qwen2 import limits, plan_language, qwen2_config
from finetune.export.qwen2_prompt_embeddings import PromptEncoder, for_server, main
from finetune.terminal import labelled, say_nothing
from qwenvl import QwenVLConfig, load_model, load_processor
from qwenvl.checkpoint.checkpoint_files import locate_tensors

# float32 on the CPU. The two differ in nothing but the order of some sums.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "qwen2"
    return export(str(TINY), "qwen2", out=folder, shard_bytes=2e6, say=say_nothing)


@pytest.fixture(scope="module")
def ours():
    return load_model(TINY)


@pytest.fixture(scope="module")
def theirs(exported):
    return AutoModelForCausalLM.from_pretrained(exported).eval()


@pytest.fixture(scope="module")
def encoder(exported):
    return PromptEncoder(exported)


def conversation(images: int, words: int) -> list[dict]:
    parts = [{"type": "image", "image": str(image)} for image in IMAGES[:images]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this? " + "and " * words}]}]


def inputs_of(messages):
    return load_processor(TINY).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


@torch.inference_mode()
@pytest.mark.parametrize(("images", "words"), [(0, 1), (1, 3), (2, 0), (1, 150)])
def test_logits_agree_up_to_the_training_context(ours, theirs, encoder, images, words):
    messages = conversation(images, words)
    inputs, prompt = inputs_of(messages), encoder(messages)
    assert torch.equal(prompt.input_ids, inputs["input_ids"])
    assert prompt.input_ids.shape[1] <= ours.config.seq_length
    expected = ours(**inputs).logits
    got = theirs(inputs_embeds=prompt.embeddings, attention_mask=prompt.attention_mask).logits
    assert (got - expected).abs().max() < TOLERANCE
    assert expected.abs().max() > 1  # numbers that could have differed


@torch.inference_mode()
def test_logits_agree_at_exactly_the_training_context_and_differ_beyond(ours, theirs):
    torch.manual_seed(0)
    ids = torch.randint(0, 512, (1, ours.config.seq_length + 1))
    within = ids[:, :-1]
    assert (theirs(within).logits - ours(within).logits).abs().max() < TOLERANCE
    # What the card says is missing there.
    assert (theirs(ids).logits - ours(ids).logits).abs().max() > 1e-3


def test_greedy_tokens_agree(ours, theirs, encoder):
    messages = conversation(1, 4)
    inputs, prompt = inputs_of(messages), encoder(messages)
    length = inputs["input_ids"].shape[1]
    expected = ours.generate(**inputs, max_new_tokens=48, do_sample=False)[0, length:]
    got = theirs.generate(
        inputs_embeds=prompt.embeddings, attention_mask=prompt.attention_mask, max_new_tokens=48, do_sample=False
    )[0]
    assert len(set(expected.tolist())) > 5
    assert got.tolist() == expected.tolist()


def test_it_is_a_plain_qwen2_folder(exported, theirs):
    assert type(theirs) is Qwen2ForCausalLM
    config = json.loads((exported / "config.json").read_text())
    assert "auto_map" not in config and config["max_position_embeddings"] == 700
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (256, 4)
    assert theirs.config.rope_parameters["rope_theta"] == 10000
    assert theirs.generation_config.eos_token_id == [514, 513, 512]
    assert len(list(exported.glob("model-*.safetensors"))) > 1


def test_every_value_of_the_source_is_somewhere(exported):
    """Nothing is left out: the parts have as many values, and the same sum of squares, as the whole."""
    source = load_file(TINY / "model.safetensors").values()
    parts = [*exported.glob("model*.safetensors"), exported / "visual" / "visual.safetensors"]
    written = [tensor for file in parts for tensor in load_file(file).values()]
    assert sum(tensor.numel() for tensor in written) == sum(tensor.numel() for tensor in source)
    assert sum(tensor.double().square().sum() for tensor in written).item() == pytest.approx(
        sum(tensor.double().square().sum() for tensor in source).item(), rel=1e-12
    )


def test_the_card_says_what_is_missing(exported):
    card = (exported / "README.md").read_text()
    for note in limits(QwenVLConfig.from_pretrained(TINY)):
        assert note in card
    assert "up to 700 tokens" in card and "dynamic NTK and log-n attention" in card
    assert "PromptEncoder" in card and "from qwenvl import load_model" not in card


def test_the_script_works_where_it_ships(exported, encoder, tmp_path, monkeypatch):
    """By itself, from another folder, and with nothing of this toolkit but `qwenvl`."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "finetune"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "finetune", None)  # importing it fails
    monkeypatch.chdir(tmp_path)
    script = str(exported / "prompt_embeddings.py")
    monkeypatch.setattr(sys, "argv", [script, "--image", str(IMAGES[0]), "What is this?", "--save", "prompt.pt"])
    runpy.run_path(script, run_name="__main__")
    saved = torch.load(tmp_path / "prompt.pt", weights_only=True)
    question = [{"type": "image", "image": str(IMAGES[0])}, {"type": "text", "text": "What is this?"}]
    assert torch.equal(saved, encoder([{"role": "user", "content": question}]).embeddings[0])


def test_the_script_answers_here_and_through_a_server(exported, encoder, capsys, monkeypatch):
    main(["--folder", str(exported), "--image", str(IMAGES[0]), "What?", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.strip()
    asked = []

    class Answer:
        def __init__(self, request):
            asked.append((request.full_url, json.loads(request.data)))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self):
            return b'{"choices": [{"text": "a receipt"}]}'

    monkeypatch.setattr("urllib.request.urlopen", Answer)
    main(["--folder", str(exported), "What?", "--server", "http://localhost:8000/v1/", "--name", "me"])
    assert capsys.readouterr().out == "a receipt\n"
    url, content = asked[0]
    assert url == "http://localhost:8000/v1/completions"
    assert (content["model"], content["max_tokens"], content["temperature"]) == ("me", 256, 0)
    expected = encoder([{"role": "user", "content": [{"type": "text", "text": "What?"}]}])
    assert content["prompt_embeds"] == for_server(expected)


def test_a_text_only_checkpoint_has_no_visual_side(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    del config["visual"]
    (source / "config.json").write_text(json.dumps(config))
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        (source / name).write_bytes((TINY / name).read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "visual" not in name}
    save_file({**tensors, "transformer.rotary_emb.inv_freq": torch.ones(3)}, source / "model.safetensors")
    said = []
    out = export(str(source), "qwen2", out=tmp_path / "out", say=lambda *line: said.append(labelled(*line)))
    assert any("left out, as no part of the model: transformer.rotary_emb.inv_freq" in line for line in said)
    assert not (out / "visual").exists() and not (out / "prompt_embeddings.py").exists()
    assert "prompt_embeddings" not in (out / "README.md").read_text()
    ids = AutoTokenizer.from_pretrained(out)("Hello")["input_ids"]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(out)(torch.tensor([ids])).logits
        expected = load_model(source)(torch.tensor([ids])).logits
    assert (logits - expected).abs().max() < TOLERANCE


def test_the_published_sizes(tmp_path):
    """The settings that the 9.66 B checkpoint gets, held against those of the class."""
    settings = {"eos_token_id": [151645, 151644, 151643], "pad_token_id": 151643}
    written = qwen2_config(QwenVLConfig(), settings, torch.bfloat16)
    assert written["intermediate_size"] == 11008 and written["max_position_embeddings"] == 2048
    assert written["torch_dtype"] == "bfloat16" and "head_dim" not in written
    plan = plan_language(QwenVLConfig.from_pretrained(TINY), locate_tensors(TINY), torch.bfloat16)
    assert {tensor.dtype for tensor in plan} == {torch.bfloat16}
