import copy
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, TextIteratorStreamer

from qwenvl import InputError, QwenVLConfig, QwenVLForConditionalGeneration
from qwenvl.checkpoint.record import ModelRecord, write_record
from qwenvl.model.generation import published_eos, read_published_settings, repeat_images
from qwenvl.model.image_span import place_image_features


def messages(*images, text="What is it?"):
    parts = [{"type": "image", "image": str(image)} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def inputs_of(processor, conversations):
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@pytest.fixture
def conversations(tiny_images):
    a, b, c, *_ = tiny_images
    # The third is longer than seq_length (700): its rotary stretch must not touch the others.
    return [messages(a, b), messages(text="Hello"), messages(c, text="long " * 260)]


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def new_tokens(model, inputs, **kwargs):
    return model.generate(**inputs, **{**GREEDY, **kwargs})[:, inputs["input_ids"].shape[1] :]


def test_batched_equals_unbatched(tiny_model, tiny_processor, conversations):
    batch = inputs_of(tiny_processor, conversations)
    assert batch["attention_mask"].sum(1).max() > tiny_model.config.seq_length
    together = new_tokens(tiny_model, batch)
    for row, conversation in enumerate(conversations):
        alone = new_tokens(tiny_model, inputs_of(tiny_processor, [conversation]))
        assert together[row].tolist() == alone[0].tolist()


def test_batched_logits_equal_unbatched(tiny_model, tiny_processor, conversations):
    batch = inputs_of(tiny_processor, conversations)
    with torch.no_grad():
        together = tiny_model(**batch).logits
        for row, conversation in enumerate(conversations):
            alone = tiny_model(**inputs_of(tiny_processor, [conversation])).logits[0]
            assert (together[row, -len(alone) :] - alone).abs().max() < 2e-5


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams_keep_every_row_its_own_images(tiny_model, tiny_processor, conversations, how):
    together = new_tokens(tiny_model, inputs_of(tiny_processor, conversations), **how)
    returned = how.get("num_return_sequences", 1)
    for row, conversation in enumerate(conversations):
        alone = new_tokens(tiny_model, inputs_of(tiny_processor, [conversation]), **how)
        assert together[row * returned : (row + 1) * returned].tolist() == alone.tolist()


def test_images_are_repeated_by_row(tiny_model, tiny_processor, conversations):
    ids = inputs_of(tiny_processor, conversations)["input_ids"]
    features = torch.arange(3.0)[:, None, None]
    assert repeat_images(features, ids, 2, tiny_model.config).flatten().tolist() == [0, 1, 0, 1, 2, 2]


def test_each_image_is_encoded_once(tiny_model, tiny_processor, conversations, monkeypatch):
    visual, encoded = tiny_model.transformer.visual, []
    forward = visual.forward
    monkeypatch.setattr(visual, "forward", lambda pixels: encoded.append(len(pixels)) or forward(pixels))
    new_tokens(tiny_model, inputs_of(tiny_processor, conversations), num_beams=2)
    assert encoded == [3]


def test_without_the_cache_the_same(tiny_model, tiny_processor, conversations):
    inputs = inputs_of(tiny_processor, conversations[:2])
    assert torch.equal(new_tokens(tiny_model, inputs), new_tokens(tiny_model, inputs, use_cache=False))


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_other_ways_to_decode_give_the_same(tiny_model, tiny_processor, conversations, how):
    inputs = inputs_of(tiny_processor, conversations[:1])
    assert torch.equal(new_tokens(tiny_model, inputs), new_tokens(tiny_model, inputs, **how))


def test_from_embeddings_with_the_images_in_place(tiny_model, tiny_processor, conversations):
    inputs = inputs_of(tiny_processor, conversations[:1])
    ids, config = inputs["input_ids"], tiny_model.config
    with torch.no_grad():
        features = tiny_model.get_image_features(inputs["pixel_values"])
        embeddings = place_image_features(tiny_model.get_input_embeddings()(ids), ids, features, config)
    generated = tiny_model.generate(inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(generated, new_tokens(tiny_model, inputs))


def test_sampling_is_seeded(tiny_model, tiny_processor, conversations):
    inputs = inputs_of(tiny_processor, conversations[:1])
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(new_tokens(tiny_model, inputs, do_sample=True, temperature=5.0).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_several_samples_of_two_images(tiny_model, tiny_processor, conversations):
    inputs = inputs_of(tiny_processor, conversations[:2])
    assert new_tokens(tiny_model, inputs, do_sample=True, num_return_sequences=4).shape == (8, 8)


def test_streaming_gives_the_same_text(tiny_model, tiny_processor, conversations):
    inputs = inputs_of(tiny_processor, conversations[:1])
    streamer = TextIteratorStreamer(tiny_processor.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=tiny_model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tiny_processor.decode(new_tokens(tiny_model, inputs)[0])


def test_decoding_keeps_the_rotary_stretch_of_the_prompt(tiny_model):
    """A prompt just below seq_length (700) that grows beyond it while decoding: alpha stays 1, log-n sets in."""
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (1, 720))
    with torch.no_grad():
        prompt = tiny_model(ids[:, :690], use_cache=True)
        decoded = tiny_model(ids[:, 690:], past_key_values=prompt.past_key_values).logits
        stretched = tiny_model(ids).logits[:, 690:]
        tiny_model.config.use_dynamic_ntk = False
        unstretched = tiny_model(ids).logits[:, 690:]
    assert (decoded - unstretched).abs().max() < 1e-5
    assert (decoded - stretched).abs().max() > 1e-3


def test_a_long_prompt_decodes_as_without_the_cache(tiny_model):
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (1, 760))
    with torch.no_grad():
        whole = tiny_model(ids).logits[:, 720:]
        prompt = tiny_model(ids[:, :720], use_cache=True)
        steps = [tiny_model(ids[:, n : n + 1], past_key_values=prompt.past_key_values).logits for n in range(720, 760)]
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 5e-5


def test_training_mode_uses_neither_extension(tiny_model):
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (1, 720))
    with torch.no_grad():
        extended = tiny_model(ids).logits
        trained = tiny_model.train()(ids).logits
        tiny_model.config.use_dynamic_ntk = tiny_model.config.use_logn_attn = False
        plain = tiny_model.eval()(ids).logits
    assert (trained - plain).abs().max() < 1e-5
    assert (trained - extended).abs().max() > 1e-3


def test_a_conversation_goes_on_from_its_cache(tiny_model, tiny_processor, tiny_images):
    """The second turn brings a second image; the first is in the cache already."""
    first = messages(tiny_images[0])
    inputs = inputs_of(tiny_processor, [first])
    out = tiny_model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    reply_ids = out.sequences[0, inputs["input_ids"].shape[1] :]
    tokenizer = tiny_processor.tokenizer
    turn = f"<|im_start|>user\n{tiny_processor.image_placeholder}And it?<|im_end|>\n"
    rest = tiny_processor(
        text=f"<|im_end|>\n{turn}<|im_start|>assistant\n",
        images=[tiny_images[1]],
        return_tensors="pt",
    )
    ids = torch.cat([inputs["input_ids"], reply_ids[None], rest["input_ids"]], dim=1)
    pixels = torch.cat([inputs["pixel_values"], rest["pixel_values"]])
    everything = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    afresh = new_tokens(tiny_model, everything)
    continued = new_tokens(tiny_model, everything, past_key_values=out.past_key_values)
    assert continued.tolist() == afresh.tolist()
    assert tokenizer.image_start_id in rest["input_ids"]


def test_chunked_prefill_is_refused(tiny_model, expected):
    with pytest.raises(InputError, match="prefill_chunk_size"):
        tiny_model.generate(expected["text_only.input_ids"][None], prefill_chunk_size=4)


def test_published_generation_config(tiny_model, tmp_path):
    settings = tiny_model.generation_config
    assert settings.eos_token_id == [514, 513, 512]  # <|im_end|>, <|im_start|>, <|endoftext|>
    assert settings.pad_token_id == 512
    assert settings.max_new_tokens == 32
    assert settings.chat_format == "chatml" and settings.max_window_size == 6144
    tiny_model.save_pretrained(tmp_path)
    reloaded = QwenVLForConditionalGeneration.from_pretrained(tmp_path)
    assert reloaded.generation_config.eos_token_id == [514, 513, 512]
    assert reloaded.generation_config.chat_format == "chatml"


def stored_settings(folder):
    return json.loads((folder / "generation_config.json").read_text())


def test_stop_tokens_are_saved_as_published(tiny_folder, tiny_model, tmp_path):
    """By every way: the published code's streaming ends after a token where the file has a list."""
    published = stored_settings(tiny_folder)["eos_token_id"]
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_model.generation_config.save_pretrained(tmp_path / "settings")
    copy.deepcopy(tiny_model).save_pretrained(tmp_path / "copy")
    auto = AutoModelForCausalLM.from_pretrained(tiny_folder)
    auto.save_pretrained(tmp_path / "auto")
    for folder in ("model", "settings", "copy", "auto"):
        saved = stored_settings(tmp_path / folder)
        assert saved["eos_token_id"] == published == 512 and saved["chat_format"] == "chatml"
    assert tiny_model.generation_config.eos_token_id == auto.generation_config.eos_token_id == [514, 513, 512]


def test_a_stop_token_of_ones_own_stays(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "base")
    own = stored_settings(tiny_folder) | {"eos_token_id": [512, 9]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(own))
    model = QwenVLForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert model.generation_config.eos_token_id == [514, 513, 512, 9]
    model.save_pretrained(tmp_path / "saved")
    assert stored_settings(tmp_path / "saved")["eos_token_id"] == [514, 513, 512, 9]
    again = QwenVLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.generation_config.eos_token_id == [514, 513, 512, 9]


@pytest.mark.parametrize(
    ("stored", "published"),
    [
        ([514, 513, 512], 512),
        ([512, 514, 513, 512], 512),
        (512, 512),
        ([512, 513], [512, 513]),
        (None, None),
        ([], []),
    ],
    ids=str,
)
def test_what_the_chat_format_says_is_not_said_twice(stored, published):
    assert published_eos(stored, "chatml") == published
    assert published_eos(stored, "raw") == published_eos(stored, None) == stored
    assert published_eos([514], "chatml") == published_eos([514], "raw") == 514


def test_a_text_only_checkpoint_saved_as_a_list_has_its_stop_tokens(tiny_folder):
    text_only = QwenVLConfig(**QwenVLConfig.from_pretrained(tiny_folder).to_dict() | {"visual": None})
    for stored in (512, [514, 513, 512]):
        settings = GenerationConfig(chat_format="chatml", eos_token_id=stored)
        assert read_published_settings(settings, text_only).eos_token_id == [514, 513, 512]


def test_the_base_models_raw_format_stops_at_end_of_text_only(tiny_folder):
    config = QwenVLConfig.from_pretrained(tiny_folder)
    raw = read_published_settings(GenerationConfig(chat_format="raw", eos_token_id=512, do_sample=True), config)
    assert raw.eos_token_id == 512


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_replies_end_where_the_record_says(tiny_folder, tmp_path, auto):
    """Through the Auto classes too, for programs that know no other way to load."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    write_record(folder, ModelRecord(chat_format="raw", stop_ids=(510, 7)))
    settings = auto.from_pretrained(folder).generation_config
    assert settings.eos_token_id == [510, 7] and settings.chat_format == "raw"
    (folder / "qwenvl.json").write_text("{}")
    with pytest.raises(InputError, match=r"qwenvl\.json: version None is not known"):
        auto.from_pretrained(folder)


def test_sampling_settings_of_the_published_chat_model_stay(tiny_folder):
    config = QwenVLConfig.from_pretrained(tiny_folder)
    published = GenerationConfig(chat_format="chatml", eos_token_id=512, do_sample=True, top_k=0, top_p=0.3)
    settings = read_published_settings(published, config)
    assert (settings.top_k, settings.top_p) == (0, 0.3)
    settings.validate(strict=True)


@pytest.mark.parametrize("token", ["im_end_id", "im_start_id", "eod_id"])
def test_generation_stops_at_each_of_the_three(tiny_model, tiny_processor, conversations, token):
    stop = getattr(tiny_processor.tokenizer, token)
    inputs = inputs_of(tiny_processor, conversations[:1])

    def force(_ids, scores):
        scores[:] = -1e4
        scores[:, stop] = 0
        return scores

    ids = tiny_model.generate(**inputs, max_new_tokens=8, logits_processor=[force])
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == [stop]
