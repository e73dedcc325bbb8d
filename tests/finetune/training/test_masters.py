"""Full training in 16 bits: the update is that of float32, and what is saved and resumed is it."""

import json
import shutil

import pytest
import torch
from recipes_for_tests import TINY, write_recipe
from safetensors.torch import load_file, save_file

from finetune.model import adapters
from finetune.recipe import load_recipe
from finetune.terminal import say_nothing
from finetune.training import trainer
from finetune.training.loss_scale import GradientsOverflow
from finetune.training.train import train
from qwenvl import load_model

IN_FULL = {"adapter": None, "freeze": {"language": False, "resampler": False, "vision": False}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny checkpoint in bfloat16, from which runs of every dtype start with the same weights."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(TINY, folder)
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def run(folder, base, dtype, say=say_nothing, **changes):
    settings = {"train__learning_rate": 1e-5, "train__save_steps": 100, "evaluate": None, **IN_FULL, **changes}
    recipe = write_recipe(folder, model={"path": str(base), "dtype": dtype}, **settings)
    return train(load_recipe(recipe), say)


def weights(folder):
    return load_file(folder / "model.safetensors")


def update(finished, base, steps):
    """The change of all weights in a checkpoint, as one vector."""
    before, after = weights(base), weights(finished / "checkpoints" / f"step-{steps}")
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in sorted(before)])


def logged(finished):
    return [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def in_float32(base, tmp_path_factory):
    return update(run(tmp_path_factory.mktemp("float32"), base, "float32"), base, 8)


def compare(ours, theirs):
    """Cosine of two updates, and the ratio of their lengths."""
    return (ours @ theirs / ours.norm() / theirs.norm()).item(), (ours.norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def in_bfloat16(base, tmp_path_factory):
    """A finished run in bfloat16, with all its checkpoints and an evaluation."""
    folder = tmp_path_factory.mktemp("bfloat16")
    evaluate = {"data": [{"path": str(folder / "eval.jsonl"), "format": "messages"}], "predictions": 0}
    saved = {"train__save_steps": 2, "train__save_total_limit": 9, "train__eval_strategy": "epoch"}
    return run(folder, base, "bfloat16", evaluate=evaluate, **saved)


def test_the_update_is_that_of_float32(in_bfloat16, base, in_float32):
    cosine, length = compare(update(in_bfloat16, base, 8), in_float32)
    assert cosine >= 0.95
    assert 0.9 <= length <= 1.1


@pytest.mark.slow  # float16 is slow on a CPU
def test_so_is_that_of_float16(tmp_path, base, in_float32):
    cosine, length = compare(update(run(tmp_path, base, "float16"), base, 8), in_float32)
    assert cosine >= 0.95
    assert 0.9 <= length <= 1.1


def test_without_masters_it_is_not(tmp_path, base, in_float32, monkeypatch):
    monkeypatch.setattr(adapters, "make_masters", lambda model: None)
    cosine, _ = compare(update(run(tmp_path, base, "bfloat16"), base, 8), in_float32)
    assert cosine < 0.5


def test_the_result_is_the_masters_rounded_once(in_bfloat16):
    masters, model = weights(in_bfloat16 / "checkpoints" / "step-8"), weights(in_bfloat16 / "model")
    trained = {name for name, tensor in masters.items() if tensor.dtype == torch.float32}
    assert trained == set(masters) - {"transformer.visual.attn_pool.pos_embed"}
    for name, tensor in model.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, masters[name].bfloat16()), name
    for folder in (in_bfloat16 / "model", in_bfloat16 / "checkpoints" / "step-8"):
        assert load_model(folder).dtype == torch.bfloat16
    moments = torch.load(in_bfloat16 / "checkpoints" / "step-8" / "optimizer.pt")["state"]
    assert {state["exp_avg"].dtype for state in moments.values()} == {torch.float32}


def test_evaluation_in_training_is_of_the_model_that_is_saved(tmp_path, in_bfloat16):
    """Its loss is, to the last bit, that of the saved model before a training on it."""
    last = [record["eval_loss"] for record in logged(in_bfloat16) if "eval_loss" in record][-1]
    evaluate = {"data": [{"path": str(tmp_path / "eval.jsonl"), "format": "messages"}], "predictions": 0}
    again = {"train__eval_on_start": True, "train__eval_strategy": "steps", "train__eval_steps": 9}
    after = run(tmp_path, in_bfloat16 / "model", "auto", evaluate=evaluate, train__max_steps=1, **again)
    assert next(record["eval_loss"] for record in logged(after) if "eval_loss" in record) == last


def forget_since(finished, step):
    """Take a finished run back to a checkpoint, as if its process had been killed after it."""
    shutil.rmtree(finished / "model")
    for folder in (finished / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    facts = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps(facts | {"status": "running"}))


def resumed(finished, step, say=say_nothing):
    """A copy of a finished run, taken back to a checkpoint and finished again."""
    copy = finished.parent / f"from-{step}"
    shutil.copytree(finished, copy)
    forget_since(copy, step)
    return train(load_recipe(finished.parent / "recipe.yaml", [f"output={copy}"]), say)


def test_a_resumed_run_is_bit_identical(in_bfloat16):
    again = resumed(in_bfloat16, 4)
    for file in ("model/model.safetensors", "checkpoints/step-8/model.safetensors", "checkpoints/step-8/optimizer.pt"):
        assert (again / file).read_bytes() == (in_bfloat16 / file).read_bytes(), file


def test_a_run_of_before_goes_on_with_masters_and_says_so(tmp_path, base, monkeypatch):
    saved = {"train__save_steps": 2, "train__save_total_limit": 9}
    with monkeypatch.context() as before:
        before.setattr(adapters, "make_masters", lambda model: None)
        finished = run(tmp_path, base, "bfloat16", **saved)
    facts = json.loads((finished / "run.json").read_text())
    del facts["masters"]
    (finished / "run.json").write_text(json.dumps(facts))
    said = []
    again = resumed(finished, 4, lambda label, text="": said.append((label, str(text))))
    (words,) = [text for label, text in said if label == "masters"]
    assert "from here on it trains them in float32" in words
    assert weights(again / "checkpoints" / "step-8")["lm_head.weight"].dtype == torch.float32
    assert json.loads((again / "run.json").read_text())["masters"] == "float32"


def test_float16_is_scaled_and_skipped_steps_change_nothing(tmp_path, base, monkeypatch):
    """The first scale overflows: such steps are said, change no weight and do not advance the schedule."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**17))
    small = {"train__max_steps": 5, "train__gradient_accumulation_steps": 1, "train__optim": "adamw_torch_fused"}
    finished = run(tmp_path, base, "float16", **small, train__save_steps=1, train__save_total_limit=9)
    skipped = {record["step"]: record["loss_scale"] for record in logged(finished) if "skipped_steps" in record}
    assert 0 < len(skipped) < 5
    assert list(skipped.values()) == [2.0 ** (16 - number) for number in range(len(skipped))]
    rates = [record["learning_rate"] for record in logged(finished) if "learning_rate" in record]
    changes = [0.0, *(update(finished, base, step).norm().item() for step in range(1, 6))]
    assert 1 in skipped and changes[1] < 1e-6  # the least of the base's bfloat16 values are none of float16's
    for step in range(2, 5):
        assert (changes[step] == changes[step - 1]) == (rates[step] == rates[step - 1]) == (step in skipped), step
    again = resumed(finished, next(iter(skipped)))
    for file in ("model/model.safetensors", "checkpoints/step-5/scaler.pt"):
        assert (again / file).read_bytes() == (finished / file).read_bytes(), file


def test_gradients_that_always_overflow_stop_the_run(tmp_path, base, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**-10))
    monkeypatch.setattr(trainer.QwenVLTrainer, "_clip_grad_norm", spoil_gradients)
    with pytest.raises(GradientsOverflow, match=r"step 1, .* model.dtype: bfloat16"):
        run(tmp_path, base, "float16")


def spoil_gradients(trainer, model):
    for parameter in model.parameters():
        parameter.grad.fill_(float("inf"))
