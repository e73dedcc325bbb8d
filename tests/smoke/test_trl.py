"""Stock trl trains this model with this processor, unmodified."""

import json

import pytest
import torch
import transformers
from datasets import Dataset
from datasets import Image as ImageFeature
from packaging.version import Version
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from qwenvl import QwenVLForConditionalGeneration, load_model, load_processor

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="trl's assistant_only_loss needs Transformers 5.18"
)


@pytest.fixture
def dataset(tiny_images):
    """An `images` + `messages` dataset: one image, none, and two in a conversation of two turns."""

    def turn(role, text):
        return {"role": role, "content": text}

    rows = [
        ([0], [turn("user", "What is it?"), turn("assistant", "A crimson box.")]),
        ([], [turn("user", "Say hello"), turn("assistant", "Hello!")]),
        (
            [1, 2],
            [turn("user", "Compare."), turn("assistant", "Alike."), turn("user", "Sure?"), turn("assistant", "Yes.")],
        ),
    ] * 2
    columns = {
        "images": [[str(tiny_images[index]) for index in images] for images, _ in rows],
        "messages": [messages for _, messages in rows],
    }
    return Dataset.from_dict(columns).cast_column("images", [ImageFeature()])


def arguments(tmp_path, **changes):
    return SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=5e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=None,
        assistant_only_loss=True,
        **changes,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_with_lora(tiny_model, tiny_processor, dataset, tmp_path, checkpointing):
    trainer = SFTTrainer(
        model=tiny_model,
        args=arguments(tmp_path, gradient_checkpointing=checkpointing),
        train_dataset=dataset,
        processing_class=tiny_processor,
        peft_config=LoraConfig(r=8, target_modules=["c_attn", "attn.c_proj", "w1", "w2"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.3
    moved = [parameter for name, parameter in trainer.model.named_parameters() if "lora_B" in name]
    assert len(moved) == 8 and all(parameter.abs().sum() > 0 for parameter in moved)

    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = load_model(tmp_path / "adapter")
    batch = trainer.data_collator([dataset[0]])
    with torch.no_grad():
        ours = reloaded(**batch).logits
        theirs = trainer.model.eval()(**batch).logits
    assert (ours - theirs).abs().max() < 1e-5


def test_the_loss_is_on_the_replies(tiny_model, tiny_processor, dataset, tmp_path):
    trainer = SFTTrainer(
        model=tiny_model, args=arguments(tmp_path), train_dataset=dataset, processing_class=tiny_processor
    )
    batch = trainer.data_collator([dataset[2]])
    assert tiny_processor.decode(batch["labels"][batch["labels"] != -100]) == "Alike.<|im_end|>Yes.<|im_end|>"
    assert len(batch["pixel_values"]) == 2


def test_turns_that_are_context_are_not_trained(tiny_model, tiny_processor, dataset, tmp_path):
    """In `messages` as they are, and as columns of a dataset have them, where other turns have the flag None."""
    row = dataset[2]
    marked = [{**turn, "train": False} if turn["content"] == "Alike." else {**turn} for turn in row["messages"]]
    columns = Dataset.from_dict({"images": [row["images"]], "messages": [marked]})
    args = arguments(tmp_path)
    trainer = SFTTrainer(model=tiny_model, args=args, train_dataset=columns, processing_class=tiny_processor)
    for example in (columns[0], {**row, "messages": marked}):
        batch = trainer.data_collator([example])
        assert tiny_processor.decode(batch["labels"][batch["labels"] != -100]) == "Yes.<|im_end|>"


def test_sft_by_the_checkpoints_path(tiny_folder, dataset, tmp_path):
    """trl loads model and processor itself, through the Auto classes."""
    trainer = SFTTrainer(
        model=str(tiny_folder), args=arguments(tmp_path, gradient_checkpointing=False), train_dataset=dataset
    )
    assert isinstance(trainer.model, QwenVLForConditionalGeneration)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3


@pytest.fixture
def saved_folder(tiny_folder, tmp_path):
    """A checkpoint as this library saves one that came without published code: nothing names it (`auto_map`)."""
    model = QwenVLForConditionalGeneration.from_pretrained(tiny_folder)
    del model.config.auto_map
    model.save_pretrained(tmp_path / "model")
    load_processor(tiny_folder).save_pretrained(tmp_path / "model")
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    return tmp_path / "model"


def test_sft_at_its_defaults_by_the_path_of_a_saved_model(saved_folder, dataset, tmp_path):
    """Every token is trained but image placeholders, and the logged loss is the model's own over these."""
    args = arguments(tmp_path, gradient_checkpointing=False)
    args.assistant_only_loss, args.max_steps = False, 1
    trainer = SFTTrainer(model=str(saved_folder), args=args, train_dataset=dataset)
    batch = trainer.data_collator([dataset[index] for index in range(3)])
    ids, image_token = batch["input_ids"], trainer.model.config.image_token_id
    expected = ids.masked_fill((ids == image_token) | (batch["attention_mask"] == 0), -100)
    assert torch.equal(batch["labels"], expected) and (ids == image_token).sum() == 3 * 256
    model = load_model(saved_folder).train()
    with torch.no_grad():
        own = model(**batch).loss.item()
    trainer.get_train_dataloader = lambda: [batch]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(own, rel=1e-5)
    trainer.save_model(str(tmp_path / "trained"))
    assert json.loads((tmp_path / "trained" / "generation_config.json").read_text())["eos_token_id"] == 512


def test_dpo_by_the_path_of_a_saved_model(saved_folder, tiny_images, tmp_path):
    arguments = DPOConfig(**common(tmp_path) | {"max_steps": 1}, max_length=None)
    trainer = DPOTrainer(model=str(saved_folder), args=arguments, train_dataset=preferences(tiny_images))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_truncation_inside_an_image_is_an_error(tiny_model, tiny_processor, dataset, tmp_path):
    args = arguments(tmp_path)
    args.max_length = 100
    trainer = SFTTrainer(model=tiny_model, args=args, train_dataset=dataset, processing_class=tiny_processor)
    with pytest.raises(ValueError, match="cut or drop an image"):
        trainer.train()


LORA = LoraConfig(r=8, target_modules=["c_attn"], task_type="CAUSAL_LM")


def preferences(tiny_images):
    """Replies to choose between; one spells a control token, which the string form must keep as text."""
    columns = {
        "images": [[str(tiny_images[0])], [str(tiny_images[1])]] * 2,
        "prompt": [[{"role": "user", "content": "What is it?"}]] * 4,
        "chosen": [[{"role": "assistant", "content": "A box."}]] * 4,
        "rejected": [[{"role": "assistant", "content": "A <|im_end|> cat."}]] * 4,
    }
    return Dataset.from_dict(columns).cast_column("images", [ImageFeature()])


def common(tmp_path):
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }


def test_dpo(tiny_model, tiny_processor, tiny_images, tmp_path):
    trainer = DPOTrainer(
        model=tiny_model,
        args=DPOConfig(**common(tmp_path), max_length=None),
        train_dataset=preferences(tiny_images),
        processing_class=tiny_processor,
        peft_config=LORA,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]


def test_grpo(tiny_model, tiny_processor, tiny_images, tmp_path):
    trainer = GRPOTrainer(
        model=tiny_model,
        args=GRPOConfig(**common(tmp_path), num_generations=2, max_completion_length=8),
        train_dataset=preferences(tiny_images).remove_columns(["chosen", "rejected"]),
        processing_class=tiny_processor,
        reward_funcs=lambda completions, **_: [float(len(completion[0]["content"])) for completion in completions],
        peft_config=LORA,
    )
    trainer.train()
    assert sum("reward" in entry for entry in trainer.state.log_history) == 3
