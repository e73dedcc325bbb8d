"""Rows of one batch with adapters of their own, and beginnings that are not computed again."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from recipes_for_tests import IMAGES
from replies_for_tests import alone, row
from torch import nn

from finetune.errors import UserError
from finetune.replies.decoder import PromptRow
from finetune.replies.prefix_store import PrefixStore
from finetune.replies.prompt_tokens import BLOCK, ComparedTokens, common_prefix
from finetune.replies.running_batch import ReplyRequest, RunningBatch
from finetune.replies.torch_decoder import TorchDecoder

NEW = 6


def replies(batch: RunningBatch, requests: list[ReplyRequest]) -> list[list[int]]:
    """The replies to requests that join together, token by token to their ends."""
    numbers, new = batch.join(requests)
    made = {number: [] for number in numbers}
    while new:
        for token in new:
            if token.reply in made and token.id is not None:
                made[token.reply].append(token.id)
        new = batch.step()
    return [made[number] for number in numbers]


def greedy(rows: list[PromptRow]) -> list[ReplyRequest]:
    return [ReplyRequest(one, NEW, ()) for one in rows]


def computed(model) -> list[int]:
    """Gets the positions that each forward computes, as they come."""
    positions, forward = [], model.forward
    model.forward = lambda **inputs: positions.append(inputs["input_ids"].numel()) or forward(**inputs)
    return positions


# ---- adapters


@pytest.fixture
def adapted(tiny_model):
    """Two plain adapters of different modules, one with DoRA, and one with a head of its own; none is active."""
    torch.manual_seed(0)
    configs = {
        "a": LoraConfig(r=4, target_modules=["c_attn"]),
        "b": LoraConfig(r=2, target_modules=["attn.c_proj", "w1"]),
        "dora": LoraConfig(r=2, target_modules=["w2"], use_dora=True),
        "head": LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"]),
    }
    model = get_peft_model(tiny_model, configs["a"], adapter_name="a")
    for name, config in list(configs.items())[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "modules_to_save.head" in name:
            parameter.data = parameter.data.roll(7, 0)
    return model.eval()


@pytest.fixture
def expected(adapted, tiny_processor):
    """What each adapter replies alone, and the model without; then none is active."""
    rows = [row(adapted.get_base_model(), tiny_processor, text, *images) for text, images in ASKED]
    found = {}
    for name in ("a", "b", "dora", "head"):
        adapted.set_adapter(name)
        found[name] = [alone(adapted.get_base_model(), one, NEW) for one in rows]
    with adapted.disable_adapter():
        found[None] = [alone(adapted.get_base_model(), one, NEW) for one in rows]
    for module in adapted.modules():
        if hasattr(module, "adapter_layer_names"):
            module.set_adapter([])
    assert len({str(one) for one in found.values()}) == 5
    return rows, found


ASKED = [("What is it?", IMAGES[:1]), ("Hello", ()), ("long " * 180, ())]


@pytest.mark.parametrize("names", [("a", "b"), ("a", None, "b"), ("a", "dora", None, "head"), ("dora",), (None,)])
def test_adapters_beside_each_other(adapted, expected, tiny_processor, names):
    rows, found = expected
    asked = [(name, number) for number in range(len(rows)) for name in names]
    batch = RunningBatch(TorchDecoder(adapted.get_base_model(), prefix_bytes=10**8), tiny_processor.tokenizer)
    wanted = [PromptRow(rows[n].ids, rows[n].features, rows[n].image_keys, name) for name, n in asked]
    for _ in range(2):  # the second time with what is kept, which is not another adapter's
        assert replies(batch, greedy(wanted)) == [found[name][n] for name, n in asked]


def test_logits_that_memory_does_not_hold_leave_the_rows_as_they_were(adapted, expected, tiny_processor, monkeypatch):
    """After all forwards have gone well: no row has joined, and none has moved on."""
    rows, found = expected
    batch = RunningBatch(TorchDecoder(adapted.get_base_model()), tiny_processor.tokenizer)
    asked = [ReplyRequest(PromptRow(rows[1].ids, adapter=name), NEW, ()) for name in ("dora", None, "head")]
    cat, vocabulary = torch.cat, adapted.get_base_model().config.vocab_size

    def fails(tensors, *args, **kwargs):
        if tensors[0].shape[1:] == (vocabulary,):
            raise torch.OutOfMemoryError("out of memory")
        return cat(tensors, *args, **kwargs)

    numbers, new = batch.join(asked[:2])
    made = {number: [token.id] for number, token in zip(numbers, new, strict=True)}
    while len(batch):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "cat", fails)
            for call in (batch.step, lambda: batch.join(asked[1:])):
                with pytest.raises(torch.OutOfMemoryError):
                    call()
        for token in batch.step():
            made[token.reply].append(token.id)
    assert list(made.values()) == [found["dora"][1], found[None][1]]


def test_plain_adapters_share_a_forward(adapted, expected, tiny_processor):
    rows, _ = expected
    base = adapted.get_base_model()
    positions = computed(base)
    batch = RunningBatch(TorchDecoder(base), tiny_processor.tokenizer)
    batch.join(greedy([PromptRow(rows[1].ids, adapter=name) for name in ("a", "b", None)]))
    assert positions == [3 * len(rows[1].ids)]
    batch.step()
    assert positions[1:] == [3]
    batch.join(greedy([PromptRow(rows[1].ids, adapter=name) for name in ("dora", "head")]))
    del positions[:]
    batch.step()
    assert positions == [3, 1, 1]


def test_an_adapter_that_is_not_there(adapted, tiny_processor):
    batch = RunningBatch(TorchDecoder(adapted.get_base_model()), tiny_processor.tokenizer)
    (number,), _ = batch.join(greedy([PromptRow([5, 6, 7])]))
    with pytest.raises(UserError, match="no adapter 'gone'"):
        batch.join(greedy([PromptRow([5, 6], adapter="a"), PromptRow([5, 6], adapter="gone")]))
    assert [token.reply for token in batch.step()] == [number]


def test_an_adapter_of_another_method(tiny_model, tiny_processor):
    one = row(tiny_model, tiny_processor, "Hello")
    plain = alone(tiny_model, one, NEW)
    model = get_peft_model(tiny_model, IA3Config(target_modules=["c_attn"], feedforward_modules=[]), "scaled").eval()
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            nn.init.normal_(parameter, std=2)
    other = alone(tiny_model, one, NEW)
    for module in model.modules():
        if hasattr(module, "adapter_layer_names"):
            module.set_adapter([])
    batch = RunningBatch(TorchDecoder(tiny_model), tiny_processor.tokenizer)
    made = replies(batch, greedy([PromptRow(one.ids, adapter=name) for name in ("scaled", None)]))
    assert made == [other, plain] and other != plain


# ---- beginnings


def test_a_common_beginning_is_computed_once(tiny_model, tiny_processor):
    """Of prompts that join together, of one that joins a live row, and of several replies to one prompt."""
    rows = [row(tiny_model, tiny_processor, f"What is number {n}?", IMAGES[0]) for n in range(4)]
    expected = [alone(tiny_model, one, NEW) for one in rows]
    positions = computed(tiny_model)
    batch = RunningBatch(TorchDecoder(tiny_model), tiny_processor.tokenizer)
    length = len(rows[0].ids)
    assert replies(batch, greedy(rows)) == expected
    assert length < sum(positions) < 1.3 * length
    del positions[:]
    assert replies(batch, greedy([rows[0]] * 5)) == [expected[0]] * 5
    assert sum(positions) == length - 1 + 5 + 5 * (NEW - 1)
    # A live row.
    batch.join(greedy(rows[:1]))
    del positions[:]
    assert replies(batch, greedy(rows[1:2])) == expected[1:2]
    assert positions[0] < 40


def test_what_has_left_is_kept(tiny_model, tiny_processor):
    """A conversation that goes on, another question on the page; not another page, nor rows beyond seq_length."""
    one = row(tiny_model, tiny_processor, "What is it?", IMAGES[0])
    reply = alone(tiny_model, one, NEW)
    turn = PromptRow([*one.ids, *reply, 40, 41, 42], one.features, one.image_keys)
    other = row(tiny_model, tiny_processor, "What is it?", IMAGES[1])
    long = row(tiny_model, tiny_processor, "long " * 240, IMAGES[0])
    assert len(long.ids) > tiny_model.config.seq_length
    expected = [alone(tiny_model, prompt, NEW) for prompt in (turn, other, long)]
    positions = computed(tiny_model)
    batch = RunningBatch(TorchDecoder(tiny_model, prefix_bytes=10**8), tiny_processor.tokenizer)
    assert replies(batch, greedy([one])) == [reply]
    del positions[:]
    assert replies(batch, greedy([turn])) == expected[:1]
    assert positions[0] == 4  # the reply's last token was not computed
    page = other.ids.index(tiny_model.config.image_start_id)
    known = {"other page": page, "the same again": len(other.ids) - 1, "long": 0, "long again": 0}
    for prompt, right, (what, count) in zip((other, other, long, long), (1, 1, 2, 2), known.items(), strict=True):
        del positions[:]
        assert replies(batch, greedy([prompt])) == [expected[right]]
        assert positions[0] == len(prompt.ids) - count, what


def test_rows_leave_where_memory_is_too_short_to_keep_them(tiny_model, tiny_processor, monkeypatch):
    def full(store, tokens, row):
        raise torch.OutOfMemoryError("out of memory")

    one = row(tiny_model, tiny_processor, "Hello")
    batch = RunningBatch(TorchDecoder(tiny_model, prefix_bytes=10**8), tiny_processor.tokenizer)
    expected = replies(batch, greedy([one]))
    monkeypatch.setattr(PrefixStore, "keep", full)
    assert replies(batch, greedy([one])) == expected and not batch.drop_kept()


def test_a_store_keeps_to_its_bytes(tiny_model):
    def kept(first: int, length: int) -> tuple[ComparedTokens, list]:
        tokens = ComparedTokens([first, *range(length - 1)], [], None, tiny_model.config)
        return tokens, [(torch.full((1, length, 2), float(first)), torch.zeros(1, length, 2))]

    store = PrefixStore(most_bytes=16 * 100)
    for first in (1, 2, 3):
        store.keep(*kept(first, 32))
    assert len(store) == 3 and store.bytes == 16 * 96
    assert store.longest(kept(1, 40)[0])[0] == 32  # used now
    store.keep(*kept(4, 32))
    assert store.bytes == 16 * 96
    assert [store.longest(kept(first, 40)[0])[0] for first in (1, 2, 3, 4)] == [32, 0, 32, 32]
    store.keep(*kept(4, 48))  # begins with one that is kept, which is part of it
    assert [store.longest(kept(first, 60)[0])[0] for first in (1, 3, 4)] == [0, 32, 48] and store.bytes == 16 * 80
    store.keep(*kept(4, 32))
    store.keep(*kept(5, 101))
    assert len(store) == 2
    count, row = store.longest(ComparedTokens([4, *range(20), 9, 9, 9], [], None, tiny_model.config))
    assert count == 21 and float(row[0][0][0, 0, 0]) == 4
    assert store.longest(ComparedTokens([4, *range(20)], [], "a", tiny_model.config))[0] == 0
    store.forget("a")
    assert len(store) == 2


def test_where_beginnings_part(tiny_model, tiny_processor):
    """At the last common token; never inside an image, and with a token left to go on from."""
    config = tiny_model.config
    one, two = (row(tiny_model, tiny_processor, text, IMAGES[0]).ids for text in ("What is it?", "What was it?"))
    prefix = common_prefix([one, two], config)
    assert one[: len(prefix)] == two[: len(prefix)] and one[len(prefix)] != two[len(prefix)]
    assert common_prefix([one, one], config) == one[:-1]
    start = one.index(config.image_start_id)
    assert common_prefix([one, one[: start + 5]], config) == one[:start]
    pages = [ComparedTokens(one, [key], None, config) for key in ("a", "b", "a")]
    assert pages[0].common(pages[1]) == start + 1 and pages[0].common(pages[2]) == len(one)
    assert len(pages[0].chain) == len(one) // BLOCK
