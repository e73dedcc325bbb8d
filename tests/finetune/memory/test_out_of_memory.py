"""Packs that do not fit into the memory: smaller ones from there on, and a training that is the same."""

import json
import re
import shutil

import pytest
import torch
from memory_for_tests import SmallMemory
from recipes_for_tests import write_recipe
from safetensors.torch import load_file
from said import collect

from finetune.batches.attempt import OutOfMemory, attempt, is_out_of_memory
from finetune.errors import Failed, Interrupted
from finetune.memory.out_of_memory import DoesNotFit, PackBudget
from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training.step_in_packs import StepInPacks
from finetune.training.train import train

# The rows have some 30, 300 and 600 tokens in turn (an image takes 258), a batch of four some 1,000 to 1,600.
BATCHES = {
    "adapter__dropout": 0.0,
    "train__per_device_train_batch_size": 4,
    "train__gradient_accumulation_steps": 2,
    "train__max_steps": 3,
    "train__optim": "sgd",  # AdamW's first steps make much of a gradient's rounding
    "train__learning_rate": 0.1,
    "train__save_strategy": "no",
    "data__max_length": 650,
    "data__tokens_per_batch": 2000,
}


def run(folder, *overrides, **changes):
    """Train; what was said, the adapter, the records of metrics.jsonl and run.json."""
    said = []
    recipe = load_recipe(write_recipe(folder, **{**BATCHES, **changes}), overrides)
    train(recipe, collect(said))
    return said, *results(folder)


def results(folder, name="run"):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    described = json.loads((folder / name / "run.json").read_text())
    return load_file(folder / name / "adapter" / "adapter_model.safetensors"), [*map(json.loads, lines)], described


def losses(records):
    return [record["loss"] for record in records if "loss" in record]


def assert_close(ours, theirs, rounding):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= rounding, name


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def in_one_pack(tmp_path_factory):
    """The run as it is with memory for everything."""
    return run(tmp_path_factory.mktemp("in_one_pack"))


@pytest.mark.parametrize(
    "where", ["forward", "backward", "recompute", "host", pytest.param("device", marks=pytest.mark.gpu)]
)
def test_training_is_the_same(tmp_path, monkeypatch, capsys, in_one_pack, where):
    memory = SmallMemory(650, where).install(monkeypatch)
    _, adapter, records, described = run(tmp_path, f"train.gradient_checkpointing={where == 'recompute'}".lower())
    _, theirs, all_records, all_described = in_one_pack
    assert memory.failures
    assert (where in ("backward", "recompute")) == bool(memory.left_behind)
    rounding = 1e-6 if where != "device" else 1e-4  # a GPU's kernels depend on the shapes
    assert losses(records) == pytest.approx(losses(all_records), rel=rounding)
    assert_close(adapter, theirs, rounding)
    events = [record for record in records if "out_of_memory_tokens" in record]
    budgets = [event["tokens_per_batch"] for event in events]
    assert events[0]["step"] == 1 and budgets == sorted(set(budgets), reverse=True) and budgets[-1] <= 650
    keys = ("step", "tokens_per_batch", "out_of_memory_tokens")
    assert described["out_of_memory"] == [{key: event[key] for key in keys} for event in events]
    assert described["tokens_per_batch"] == 2000 and all_described["out_of_memory"] == []
    lines = re.findall("step ./3 .* out of memory with (.*) tokens .*same loss and gradients", capsys.readouterr().out)
    assert lines == [f"{event['out_of_memory_tokens']:,}" for event in events]


def test_parameters_had_part_of_their_gradients(tmp_path, monkeypatch):
    """What the tests above rely on: the failure comes between the layers."""
    memory = SmallMemory(650, "backward").install(monkeypatch)
    gradients = []
    real = PackBudget.lower

    def lower(budget, *arguments):
        gradients.append(memory.left_behind[-1])
        real(budget, *arguments)

    monkeypatch.setattr(PackBudget, "lower", lower)
    _, adapter, *_ = run(tmp_path, "train.max_steps=1", "data.shuffle=false")
    assert 0 < gradients[0] < len(adapter)  # none is left of before: this was the first pack


def test_the_same_failure_gives_the_same_adapter(tmp_path, monkeypatch):
    """With dropout, whose masks are those of the step run with the lower budget from its start."""
    once, twice = (tmp_path / name for name in ("once", "twice"))
    SmallMemory(650, "backward", first_step=2).install(monkeypatch)
    _, first, records, described = run(once, adapter__dropout=0.1)
    _, second, again, _ = run(twice, adapter__dropout=0.1)
    assert_equal(first, second)
    assert losses(records) == losses(again)
    assert [note["step"] for note in described["out_of_memory"]] == [2]


def test_a_resumed_run_keeps_the_lower_budget(tmp_path, monkeypatch):
    """From the step on at which it was lowered, be the checkpoint that it goes on from after that step or before."""
    changes = {"adapter__dropout": 0.1, "train__save_strategy": "steps", "train__save_steps": 1}
    memory = SmallMemory(650, "backward", first_step=2)
    with monkeypatch.context() as patch:
        memory.install(patch)
        _, uninterrupted, records, described = run(tmp_path / "whole", **changes)
        notes = described["out_of_memory"]
        assert notes[0]["step"] == 2
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            run(tmp_path, **changes)
    shutil.copytree(tmp_path / "run", tmp_path / "earlier")
    shutil.rmtree(tmp_path / "earlier" / "checkpoints" / "step-2")
    for name in ("run", "earlier"):
        # There is memory for everything now.
        train(load_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path / name}"]), say_nothing)
        resumed, resumed_records, described = results(tmp_path, name)
        assert_equal(resumed, uninterrupted)
        assert losses(resumed_records) == losses(records)
        assert described["out_of_memory"] == [note for note in notes if note["step"] == 2]


def stop_after(patch, step: int):
    """As a kill: nothing is saved."""
    from finetune.training.interrupts import StopOnSignal

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Interrupted(15, saved=False)

    patch.setattr(StopOnSignal, "on_step_begin", on_step_begin)


def test_a_conversation_that_does_not_fit_is_named(tmp_path, monkeypatch):
    SmallMemory(400).install(monkeypatch)
    with pytest.raises(DoesNotFit) as caught:
        run(tmp_path)
    message = str(caught.value)
    assert re.search(r"at step 1, with \S*train\.jsonl, row \d+ \(\d{3} tokens, 2 images\): one conversation", message)
    assert re.search(r"data.max_length below \d{3} with", message) and "model.quantization: nf4" in message
    assert "Tried to allocate 1.25 GiB" in message
    assert isinstance(caught.value, Failed)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_without_packing_nothing_can_be_lowered(tmp_path, monkeypatch):
    SmallMemory(400).install(monkeypatch)
    with pytest.raises(DoesNotFit, match="by itself"):
        run(tmp_path, "data.packing=false", "data.tokens_per_batch=null")


def test_evaluation_goes_on_in_smaller_packs(tmp_path, monkeypatch, capsys):
    rows = [{"path": str(tmp_path / "eval.jsonl"), "format": "messages"}]
    changes = {"evaluate": {"data": rows, "predictions": 0}, "train__eval_strategy": "steps", "train__eval_steps": 1}
    _, adapter, records, _ = run(tmp_path, **changes)
    output = f"output={tmp_path / 'small' / 'run'}"
    memory = SmallMemory(650, mode="eval").install(monkeypatch)
    train(load_recipe(tmp_path / "recipe.yaml", [output]), say_nothing)
    ours, small, described = results(tmp_path / "small")
    assert memory.failures
    evaluations = [[r["eval_loss"] for r in all_of if "eval_loss" in r] for all_of in (small, records)]
    assert len(evaluations[0]) == 3 and evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)
    (note,) = described["out_of_memory"]
    assert note["step"] == 1 and note["evaluation_tokens_per_batch"] <= 650 and "tokens_per_batch" not in note
    assert_equal(ours, adapter)
    assert "of evaluation: at most" in capsys.readouterr().out


def test_an_evaluation_row_that_does_not_fit_is_named(tmp_path, monkeypatch):
    rows = [{"path": str(tmp_path / "eval.jsonl"), "format": "messages"}]
    SmallMemory(400, mode="eval").install(monkeypatch)
    with pytest.raises(DoesNotFit, match=r"in evaluation after step 2, with \S*eval\.jsonl, row \d"):
        run(tmp_path, evaluate={"data": rows, "predictions": 0})


# The pieces by themselves


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
    failed = attempt(lambda: torch.empty(1 << 60, dtype=torch.uint8))
    assert isinstance(failed, OutOfMemory) and "can't allocate memory" in failed.said
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        attempt(lambda: torch.ones(2) @ torch.ones(3))


def test_nothing_of_a_failed_attempt_is_held():
    """Neither by the error's frames nor by cycles among what the work made."""
    import weakref

    held = []

    def work():
        tensor = torch.ones(3)
        cycle = {"tensor": tensor}
        cycle["itself"] = cycle
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("full")

    assert attempt(work) == OutOfMemory("full")
    assert held[0]() is None


@pytest.mark.parametrize(
    ("failed", "longest", "expected"),
    [
        (1000, 300, 500),
        (1001, 300, 500),
        (1000, 700, 700),  # it has to be run anyhow
        (1000, 1200, 500),  # another pack's; this one was too much for its images
        (12, 9, 9),
    ],
)
def test_the_budget_that_a_failed_pack_leaves(failed, longest, expected):
    budget = PackBudget("tokens_per_batch", 5000)
    budget.lower(failed, longest)
    assert budget.tokens == expected < failed
    device = torch.device("cpu")
    assert budget.take_news(device) == {"tokens_per_batch": expected, "out_of_memory_tokens": failed}
    assert budget.take_news(device) is None


def test_a_noted_budget_holds_from_its_step_on():
    notes = [{"step": 3, "tokens_per_batch": 500}, {"step": 4, "evaluation_tokens_per_batch": 10}]
    notes.append({"step": 6, "tokens_per_batch": 200})
    budget = PackBudget("tokens_per_batch", 5000, notes)
    seen = []
    for step in range(1, 8):
        budget.reach(step)
        seen.append(budget.tokens)
    assert seen == [5000, 5000, 500, 500, 500, 200, 200]


def batch_of(*lengths):
    tokens = sum(lengths)
    columns = {name: torch.arange(tokens)[None] for name in ("input_ids", "labels", "position_ids")}
    none = torch.zeros(len(lengths), dtype=torch.long)
    return columns | {"sequence_lengths": torch.tensor(lengths), "sequence_images": none, "samples": none}


def test_a_step_is_run_anew_from_its_first_batch():
    """Gradients of earlier batches are neither lost nor counted twice, and the returned shares add up."""
    gradient, drawn = torch.zeros(()), []

    def run_pack(pack, is_last):
        tokens = pack["input_ids"].sum() + 1
        drawn.append(torch.rand(()).item())
        gradient.add_(tokens)  # as a backward that fails has done in part
        if pack["input_ids"].numel() > 50:
            raise torch.OutOfMemoryError("full")
        return tokens.float()

    def step(budget):
        gradient.zero_()
        torch.manual_seed(0)
        steps = StepInPacks(
            PackBudget("tokens_per_batch", budget),
            run_pack=run_pack,
            empty_gradients=gradient.zero_,
            refuse=lambda pack, failure: pytest.fail("nothing to refuse"),
            device=torch.device("cpu"),
        )
        shares = [steps.run(batch) for batch in (batch_of(10, 20, 20), batch_of(40, 30, 5), batch_of(1))]
        return gradient.item(), sum(shares).item(), steps.budget.tokens, drawn[-1]

    # 75 tokens fail in the second batch. With 40 from the start the first batch is in two packs as well.
    assert step(1000) == step(40)
    assert len(drawn) == 2 + 5 + 5
