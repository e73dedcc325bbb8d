"""The record of what a model was trained as: what is written is read, and nothing else is taken for it."""

import json

import pytest

from qwenvl.checkpoint.identity import BaseIdentity
from qwenvl.checkpoint.record import OF_A_RUN, RECORD, BaseNote, ModelRecord, read_record, trained_as, write_record
from qwenvl.errors import InputError

WHOLE = ModelRecord(
    base=BaseNote("Qwen/Qwen-VL", BaseIdentity("9f", {"seq_length": 2048, "use_logn_attn": True}, "c1", "5a")),
    own_weights="ab",
    quantize=("language", "head"),
    chat_format="chatml",
    stop_ids=(514, 513, 512),
    prompts={"vqa": ("{question} Answer:", "{question}"), "caption": ("Describe it.",)},
    system="Antworte auf Deutsch.",
    grounding=True,
    labels="structure",
    read_from=RECORD,
)


@pytest.mark.parametrize("record", [WHOLE, ModelRecord(read_from=RECORD)])
def test_what_is_written_is_read(tmp_path, record):
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


def test_only_what_says_something_is_written(tmp_path):
    write_record(tmp_path, ModelRecord())
    assert json.loads((tmp_path / RECORD).read_text()) == {"version": 1}
    assert read_record(tmp_path / "..") is None


@pytest.mark.parametrize("version", [2, "1", None, 0, True])
def test_an_unknown_version_is_refused(tmp_path, version):
    (tmp_path / RECORD).write_text(json.dumps({"version": version, "chat_format": "chatml"}))
    with pytest.raises(InputError, match=r"qwenvl\.json: version .* is not known"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("base", value) for value in ("Qwen", {"path": 1, "sampled": "f"}, None)),
        *(("quantize", value) for value in ("language", ["vison"], [1])),
        *(("chat_format", value) for value in ("llama", 1, ["raw"])),
        *(("stop_ids", value) for value in (5, [-1], [True], ["<|im_end|>"])),
        *(("labels", value) for value in ("all", 1)),
        *(("grounding", value) for value in (1, "yes")),
        ("system", 5),
        ("own_weights", 5),
        *(("prompts", value) for value in ("{question}", {"vqa": "{question}"}, {"vqa": [1]})),
        ("views", [2, 2]),
        ("tiles", {"most": 12}),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, key, value):
    """A key of a later version could change what the model computes."""
    (tmp_path / RECORD).write_text(json.dumps({"version": 1, key: value}))
    with pytest.raises(InputError, match=rf"qwenvl\.json: {key}: .* is not understood"):
        read_record(tmp_path)


@pytest.mark.parametrize("base", [{"path": "x"}, {"path": "x", "sampled": "f", "weights": 5}])
def test_a_damaged_identity_of_the_base_is_refused(tmp_path, base):
    (tmp_path / RECORD).write_text(json.dumps({"version": 1, "base": base}))
    with pytest.raises(InputError, match=r"qwenvl\.json: what it says of the base's fingerprints is damaged"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"version": 1'])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(InputError, match=r"qwenvl\.json"):
        trained_as(tmp_path)


def test_a_checkpoint_s_record_goes_before_its_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"chat_format": "raw"}')
    assert trained_as(tmp_path).chat_format == "raw"
    write_record(tmp_path, ModelRecord(chat_format="chatml"))
    assert trained_as(tmp_path).chat_format == "chatml"
    # A record that does not say it leaves it to the published file.
    write_record(tmp_path, ModelRecord(system="Hi."))
    assert (trained_as(tmp_path).chat_format, trained_as(tmp_path).system) == ("raw", "Hi.")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"quantization": "nf4", "quantize": ["language", "head"]}, ("language", "head")),
        ({"quantization": "nf4"}, ("language",)),
        ({"quantization": "none", "quantize": ["language"]}, ()),
    ],
)
def test_an_adapter_without_a_record_is_what_its_run_trained(tmp_path, model, expected):
    base, adapter = tmp_path / "base", tmp_path / "run" / "adapter"
    base.mkdir()
    adapter.mkdir(parents=True)
    (base / "generation_config.json").write_text('{"chat_format": "raw"}')
    assert trained_as(base, adapter).chat_format is None
    (tmp_path / "run" / "run.json").write_text(json.dumps({"identity": {"recipe": {"model": model}}}))
    found = trained_as(base, adapter)
    assert (found.chat_format, found.quantize, found.read_from) == ("chatml", expected, OF_A_RUN)
    write_record(adapter, ModelRecord(chat_format="raw"))  # a record says it all
    assert (trained_as(base, adapter).chat_format, trained_as(base, adapter).quantize) == ("raw", ())


def test_the_parts_of_a_run_that_are_none_are_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "run.json").write_text(
        '{"identity": {"recipe": {"model": {"quantization": "nf4", "quantize": ["all"]}}}}'
    )
    with pytest.raises(InputError, match=r"run\.json: quantize is \['all'\], but the parts are"):
        trained_as(tmp_path, tmp_path / "adapter")
