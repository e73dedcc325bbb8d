"""What must not change a gradient: how samples are packed, batched, accumulated, checkpointed."""

from types import SimpleNamespace

import pytest
import torch
from recipes_for_tests import LORA
from transformers import TrainerCallback
from trl import SFTConfig

from finetune.batches.collate import Collator
from finetune.data.checks.rules import Rules
from finetune.model.adapters import put_lora
from finetune.run.folder import RunFolder
from finetune.training.trainer import NonFiniteLoss, QwenVLTrainer
from qwenvl import ImageAccess, QwenVLForConditionalGeneration
from qwenvl.text.chat import render_chat

FROZEN = SimpleNamespace(vision=True, resampler=False, language=True)


@pytest.fixture(scope="module")
def samples(tiny_images):
    """Eight conversations of different lengths, with none, one or two images."""
    rows = []
    for row in range(8):
        parts = [{"type": "image", "image": str(tiny_images[(row + n) % 5])} for n in range(row % 3)]
        parts.append({"type": "text", "text": f"Question {row} " + "and more " * row})
        messages = ({"role": "user", "content": parts}, {"role": "assistant", "content": "Answer " * (row % 4 + 1)})
        rows.append(SimpleNamespace(messages=messages, origin=f"rows.jsonl, row {row + 1}", access=ImageAccess()))
    return rows


@pytest.fixture(scope="module")
def make_trainer(tiny_folder, tiny_processor, samples, tmp_path_factory):
    def make(*, tokens_per_batch=2048, rows=range(8), model=None, **arguments):
        folder = tmp_path_factory.mktemp("trainer")
        if model is None:
            torch.manual_seed(0)
            base = QwenVLForConditionalGeneration.from_pretrained(tiny_folder)
            model = put_lora(base, LORA, FROZEN, embeddings=True)
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
        rules = Rules(tiny_processor.tokenizer, None, tiny_processor.n_queries)
        collator = Collator(samples, rules, tiny_processor.image_processor)
        defaults = {
            "max_steps": 1,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
        }
        args = SFTConfig(
            **{**defaults, **arguments},
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=None,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        )
        return QwenVLTrainer(
            model,
            args,
            collators={"train": collator, "eval": collator},
            indices={"train": list(rows), "eval": list(rows)},
            run=RunFolder(folder / "run"),
            tokens_per_batch=tokens_per_batch,
            shuffle=False,
        )

    return make


class KeepGradients(TrainerCallback):
    """The gradients as the optimizer is about to see them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def step(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step."""
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return loss, keep.gradients


@pytest.fixture(scope="module")
def reference(tiny_folder, make_trainer, samples, tiny_processor):
    """Loss and gradients by hand: each conversation padded into a plain batch, the model's own loss."""
    trainer = make_trainer()
    model = trainer.model.train()
    rendered = [render_chat(sample.messages, tiny_processor.tokenizer) for sample in samples]
    longest = max(len(one.ids) for one in rendered)
    ids = torch.tensor([one.ids + [512] * (longest - len(one.ids)) for one in rendered])
    labels = torch.tensor([one.labels + [-100] * (longest - len(one.labels)) for one in rendered])
    mask = torch.tensor([[1] * len(one.ids) + [0] * (longest - len(one.ids)) for one in rendered])
    pixels = tiny_processor.image_processor([source for one in rendered for source in one.images], return_tensors="pt")
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels["pixel_values"]).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), gradients


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-8, name


@pytest.mark.parametrize("tokens_per_batch", [None, 300, 700, 4096])
def test_packed_equals_padded(make_trainer, reference, tokens_per_batch):
    assert_same(step(make_trainer(tokens_per_batch=tokens_per_batch)), reference)


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulation_equals_a_larger_batch(make_trainer, reference, batch, accumulation):
    trainer = make_trainer(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert_same(step(trainer), reference)


def test_gradient_checkpointing_changes_nothing(make_trainer, reference):
    assert_same(step(make_trainer(gradient_checkpointing=True)), reference)


def test_the_order_of_samples_in_a_step_changes_nothing(make_trainer, reference):
    assert_same(step(make_trainer(rows=[5, 2, 7, 0, 1, 6, 3, 4], tokens_per_batch=600)), reference)


def test_evaluation_loss_is_the_mean_over_supervised_tokens(make_trainer, reference):
    for tokens_per_batch, batch in ((None, 1), (700, 3), (4096, 8)):
        trainer = make_trainer(tokens_per_batch=tokens_per_batch, per_device_eval_batch_size=batch)
        metrics = trainer.evaluate()
        assert metrics["eval_samples"] == 8 and metrics["eval_long_samples"] == 0
        assert metrics["eval_loss"] == pytest.approx(reference[0], abs=1e-5)


def test_a_non_finite_loss_names_its_samples(make_trainer):
    trainer = make_trainer(tokens_per_batch=None)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"step 1, on rows\.jsonl, row 1\. Look at these"):
        trainer.train()


def test_nothing_is_sent_anywhere(make_trainer, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_: pytest.fail("telemetry was sent"))
    make_trainer()


def test_throughput_is_logged(make_trainer):
    trainer = make_trainer()
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["tokens_per_second"] > 0 and logged["images_per_second"] > 0
    assert logged["peak_memory_bytes"] > 1e8
    assert trainer.throughput.totals().images == 7
