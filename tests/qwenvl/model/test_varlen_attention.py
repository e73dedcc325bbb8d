import copy

import pytest
import torch
from varlen_kernel_on_cpu import kernel_on_cpu

from qwenvl import InputError
from qwenvl.model import modeling, sequences, varlen_attention
from qwenvl.model.sequences import PackedSequences
from qwenvl.model.varlen_attention import LONGEST_SPELLED_OUT, VARLEN, kernel_takes, spelled_out_is_faster


@pytest.fixture(params=["one by one", "kernel"])
def way(request, monkeypatch):
    """Both ways of attending; the calls of the kernel."""
    if request.param == "one by one":
        yield []
        return
    with kernel_on_cpu(monkeypatch) as calls:
        yield calls


@pytest.fixture
def pack(expected):
    """Three sequences in a row with their images, and their lengths."""
    rows = [expected[f"{name}.input_ids"] for name in ("one_image", "text_only", "two_images")]
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    labels = ids.masked_fill(positions == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "pixel_values": expected["pixel_values"][[0, 1, 3]]}
    return batch, positions, [len(row) for row in rows]


def step(model, attention, **batch):
    """Loss and gradients of every weight."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(ours, reference):
    assert ours[0] == pytest.approx(reference[0], rel=1e-6)
    for name, gradient in reference[1].items():
        assert (ours[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name


def test_a_pack_equals_the_masked_one(tiny_model, pack, way):
    batch, positions, _ = pack
    tiny_model.train()
    reference = step(tiny_model, "sdpa", **batch, position_ids=positions)
    assert_equal(step(tiny_model, VARLEN, **batch, position_ids=positions), reference)


def test_lengths_from_the_host_equal_positions(tiny_model, pack, way, monkeypatch):
    batch, positions, lengths = pack
    tiny_model.train()
    reference = step(tiny_model, VARLEN, **batch, position_ids=positions)
    for looking in ("lengths_of_sequences", "is_packed"):  # which would wait for the device
        monkeypatch.setattr(modeling, looking, None)
    assert_equal(step(tiny_model, VARLEN, **batch, sequence_lengths=lengths), reference)


def test_lengths_serve_the_masked_way_too(tiny_model, pack):
    batch, positions, lengths = pack
    tiny_model.train()
    reference = step(tiny_model, "sdpa", **batch, position_ids=positions)
    assert_equal(step(tiny_model, "sdpa", **batch, sequence_lengths=lengths), reference)


def test_no_mask_is_made_and_bounds_are_found_once(tiny_model, pack, monkeypatch):
    batch, positions, lengths = pack
    looked = []
    monkeypatch.setattr(modeling, "create_causal_mask", None)
    monkeypatch.setattr(
        modeling, "lengths_of_sequences", lambda at: looked.append(1) or sequences.lengths_of_sequences(at)
    )
    tiny_model.train()
    with kernel_on_cpu(monkeypatch) as calls:
        step(tiny_model, VARLEN, **batch, position_ids=positions)
    first, second = lengths[0], lengths[0] + lengths[1]
    layers = tiny_model.config.num_hidden_layers
    assert calls == [([0, first, second, sum(lengths)], max(lengths))] * layers
    assert len(looked) == 1


def test_rows_of_packs(tiny_model, expected, way):
    """Sequences end with their row, whatever the next row begins with."""
    text = expected["text_only.input_ids"]
    ids = torch.stack([torch.cat([text[:9], text[:7]]), torch.cat([text[:4], text[:12]])])
    lengths = [9, 7, 4, 12]
    with torch.no_grad():
        masked, apart = (
            tiny_model.set_attn_implementation(attention) or tiny_model(ids, sequence_lengths=lengths).logits
            for attention in ("sdpa", VARLEN)
        )
    assert (masked - apart).abs().max() < 1e-5


def test_beyond_seq_length_in_eval(tiny_model, expected, way):
    """Rotary stretch and log-n factors are each sequence's own."""
    text, long = expected["text_only.input_ids"], expected["long.input_ids"]
    tiny_model.set_attn_implementation(VARLEN)
    lengths = [len(text), len(long), len(text)]
    assert len(long) > tiny_model.config.seq_length
    with torch.no_grad():
        packed = tiny_model(torch.cat([text, long, text])[None], sequence_lengths=lengths).logits[0]
        apart = torch.cat([tiny_model(row[None]).logits[0] for row in (text, long, text)])
    assert (packed - apart).abs().max() < 2e-5


def test_what_is_not_a_pack_goes_through_sdpa(tiny_model, expected, monkeypatch):
    """Padding, a cache, one sequence, images."""
    row = expected["one_image.input_ids"]
    padding = torch.full((40,), 512)
    padded = {
        "input_ids": torch.cat([padding, row])[None],
        "attention_mask": torch.cat([torch.zeros_like(padding), torch.ones_like(row)])[None],
        "pixel_values": expected["pixel_values"][:1],
    }
    answers = []
    with kernel_on_cpu(monkeypatch) as calls, torch.no_grad():
        for attention in ("sdpa", VARLEN):
            tiny_model.set_attn_implementation(attention)
            written = tiny_model.generate(**padded, max_new_tokens=6, do_sample=False)
            answers.append((tiny_model(**padded).logits, written))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
    assert calls == []


@pytest.mark.parametrize(
    ("lengths", "others", "message"),
    [
        ([9, 8], {}, "do not fill"),
        ([16, 0], {}, "do not fill"),
        ([16], {"position_ids": torch.arange(16)[None]}, "replace position_ids"),
        ([9, 7], {"attention_mask": torch.ones(1, 16, dtype=torch.long)}, "replace position_ids"),
        ([9, 7], {"use_cache": True}, "cannot use a cache"),
    ],
)
def test_lengths_that_contradict(tiny_model, lengths, others, message):
    with pytest.raises(InputError, match=message):
        tiny_model(torch.arange(16)[None], sequence_lengths=lengths, **others)


def test_lengths_that_reach_into_the_next_row(tiny_model):
    with pytest.raises(InputError, match="reaches into the next row"):
        tiny_model(torch.arange(16).view(2, 8), sequence_lengths=[6, 6, 4])


def test_bounds():
    found = PackedSequences.of_lengths([3, 1, 2], torch.device("cpu"))
    assert found.bounds.tolist() == [0, 3, 4, 6]
    assert found.longest == 3
    positions = torch.tensor([[0, 1, 2, 0], [0, 1, 5, 6]])  # a jump begins a sequence, as in Transformers' masks
    assert sequences.lengths_of_sequences(positions) == [3, 1, 2, 2]


def test_the_kernel_is_for_16_bits_on_a_gpu():
    assert not kernel_takes(torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_the_kernel_on_a_gpu(tiny_model, pack):
    """bfloat16: as far from float32 as the masked way is, give or take its rounding."""
    batch, positions, lengths = pack
    tiny_model.train()
    exact = step(tiny_model.cuda(), "sdpa", **on_gpu(batch), position_ids=positions.cuda())
    tiny_model.bfloat16()
    masked = step(tiny_model, "sdpa", **on_gpu(batch), position_ids=positions.cuda())
    varlen = step(tiny_model, VARLEN, **on_gpu(batch), sequence_lengths=lengths)
    assert kernel_takes(torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16, device="cuda"))
    assert varlen[0] == pytest.approx(exact[0], abs=2 * abs(masked[0] - exact[0]) + 1e-3)
    for name, gradient in exact[1].items():
        far = (masked[1][name].float() - gradient).norm()
        assert (varlen[1][name].float() - gradient).norm() <= 2 * far + 1e-2 * gradient.norm(), name


def on_gpu(batch):
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize("lengths", [[2, 1], [3, 5, 2], [64, 33]])
def test_attention_spelled_out_is_as_exact_as_the_kernel(tiny_model, lengths):
    """In bfloat16, against float32: gradients are as close as those of the CPU's kernel, or a fifth further off."""
    for parameter in tiny_model.transformer.visual.parameters():
        parameter.requires_grad_(False)
    ids = torch.randint(0, 200, (1, sum(lengths)))

    def gradients(dtype, spelled_out):
        model = copy.deepcopy(tiny_model).train().to(dtype)
        model.set_attn_implementation(VARLEN)
        with pytest.MonkeyPatch.context() as patched:
            calls = []
            in_halves = varlen_attention._attend_in_halves
            patched.setattr(varlen_attention, "spelled_out_is_faster", lambda *arguments: spelled_out)
            patched.setattr(
                varlen_attention, "_attend_in_halves", lambda *a, **b: calls.append(a) or in_halves(*a, **b)
            )
            model(input_ids=ids, labels=ids, sequence_lengths=lengths).loss.backward()
        assert len(calls) == spelled_out * model.config.num_hidden_layers * len(lengths)
        return torch.cat([one.grad.float().flatten() for one in model.parameters() if one.grad is not None])

    exact = gradients(torch.float32, spelled_out=False)
    assert (gradients(torch.float32, spelled_out=True) - exact).norm() <= 1e-5 * exact.norm()
    spelled, kernel = (gradients(torch.bfloat16, spelled_out=way) for way in (True, False))
    assert 0 < (spelled - exact).norm() <= 1.2 * (kernel - exact).norm() < 0.1 * exact.norm()


def test_attention_is_spelled_out_only_where_that_is_faster():
    query = torch.zeros(1, 2, 8, 4, dtype=torch.bfloat16, requires_grad=True)
    assert spelled_out_is_faster(query)
    assert not spelled_out_is_faster(query.detach())  # nothing to train
    assert not spelled_out_is_faster(query.float())
    assert not spelled_out_is_faster(query, dropout=0.1)
    assert not spelled_out_is_faster(query, device_type="cuda")
    assert not spelled_out_is_faster(query.expand(1, 2, 8, 4).repeat(1, 1, LONGEST_SPELLED_OUT // 8 + 1, 1))
