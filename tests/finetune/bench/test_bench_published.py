"""Both settings do the same work: the same loss and gradients on the same samples."""

from types import SimpleNamespace

import pytest
import torch
from recipes_for_tests import LORA
from transformers import TrainerCallback

from finetune.bench.arithmetic import Trained
from finetune.bench.flops import packs_of, published_flops, useful_flops
from finetune.bench.published import PUBLISHED_ARGUMENTS, PublishedTrainer, published_recipe
from finetune.bench.workload import BenchCollator, Lengths, PaddedCollator
from finetune.model.adapters import put_lora
from finetune.recipe import parse_recipe
from finetune.run.folder import RunFolder
from finetune.training.arguments import sft_config
from finetune.training.trainer import QwenVLTrainer
from qwenvl import QwenVLForConditionalGeneration

FROZEN = SimpleNamespace(vision=True, resampler=True, language=True)
LENGTHS = [Lengths(tokens, supervised, 1) for tokens, supervised in ((300, 12), (340, 60), (290, 3), (310, 9))] * 2


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def step(tiny_folder, tiny_processor, tmp_path):
    """Loss and gradients of a step of 8 samples."""

    def run(trainer_class, make_collator, attention, budget, **arguments):
        torch.manual_seed(0)
        base = QwenVLForConditionalGeneration.from_pretrained(tiny_folder)
        base.set_attn_implementation(attention)
        model = put_lora(base, LORA, FROZEN, embeddings=True)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        keep = KeepGradients()
        given = {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 1e-3, "logging_steps": 1, **arguments}
        given |= {"save_strategy": "no", "report_to": "none"}
        trainer = trainer_class(
            model,
            sft_config(given, output=str(tmp_path), seed=0),
            collators={"train": make_collator(base.config, tiny_processor.tokenizer)},
            indices={"train": range(8)},
            run=RunFolder(tmp_path),
            tokens_per_batch=budget,
            shuffle=False,
            callbacks=[keep],
        )
        trainer.train()
        loss = next(record["loss"] for record in trainer.state.log_history if "loss" in record)
        return loss, keep.gradients

    return run


def test_loss_and_gradients_are_the_same(step):
    ours = step(
        QwenVLTrainer,
        lambda config, tokenizer: BenchCollator(LENGTHS, config, tokenizer),
        "varlen",
        1024,
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
    )
    published = step(
        PublishedTrainer,
        lambda config, tokenizer: PaddedCollator(LENGTHS, config, tokenizer, padded_to=400),
        "eager",
        None,
        gradient_accumulation_steps=8,
        **PUBLISHED_ARGUMENTS,
    )
    assert ours[0] == pytest.approx(published[0], abs=1e-5)
    assert ours[1].keys() == published[1].keys() and any("lora_A" in name for name in ours[1])
    for name, gradient in published[1].items():
        assert gradient.abs().max() > 0, name
        assert (ours[1][name] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-8, name


def test_the_published_recipe_trains_the_same_with_other_settings():
    recipe = parse_recipe(
        """
model: {path: examples/tiny, quantization: nf4, quantize: [language, vision], embeddings_on_cpu: true}
adapter: {r: 8}
data:
  train: {path: rows.jsonl, format: messages}
  max_length: 768
  tokens_per_batch: 4096
  vision_cache: memory
train: {learning_rate: 1e-4}
output: runs/x
"""
    )
    published = published_recipe(recipe)
    assert published.adapter == recipe.adapter and published.freeze == recipe.freeze
    assert published.train.learning_rate == 1e-4 and published.data.max_length == 768
    assert published.model.quantization == "nf4" and published.model.quantize == ("language",)
    assert not published.model.embeddings_on_cpu and published.model.attention == "eager"
    assert not published.data.packing and published.data.vision_cache == "off"


def test_padding_is_executed_and_not_useful(tiny_folder):
    config = QwenVLForConditionalGeneration.config_class.from_pretrained(tiny_folder)
    trained = Trained(lora=1000)
    packs = packs_of(LENGTHS, None, 1)
    assert len(packs) == 8
    useful = useful_flops(config, trained, LENGTHS)
    executed = [published_flops(config, trained, packs, padded_to=length) for length in (340, 680)]
    assert useful < executed[0] and 2 * useful < executed[1]
