"""Keys that do not go together: refused, with the places of all of them."""

import re

import pytest

from finetune.recipe import RecipeError, parse_recipe
from finetune.recipe.sources import PLACEHOLDERS, ROLES

TEXT = """\
model: {path: m}
data:
  train: {path: p, format: messages}
output: o
"""
EVALUATE = "evaluate.data={path: p, format: messages}"
VQA = "evaluate.data={path: p, format: vqa}"


def refusal(*overrides, text=TEXT):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides, file="x.yaml")
    return str(caught.value)


def test_both_lines_are_named():
    text = TEXT + "adapter: null\nfreeze:\n  vision: true\n  language: true\n"
    assert refusal(text=text) == (
        "x.yaml:5: adapter: nothing would be trained: there is no adapter, and everything is frozen "
        "(see freeze.vision in line 7, freeze.resampler by its default, freeze.language in line 8); "
        "set adapter, or one key of freeze to false"
    )


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["adapter=null"], ["adapter", "freeze.language"]),
        (["adapter=null", "freeze.language=false", "model.quantization=nf4"], ["model.quantization", "adapter"]),
        (["adapter.init=pissa", "model.quantization=nf4"], ["adapter.init", "model.quantization"]),
        (["freeze.language=false"], ["freeze.language", "adapter"]),
        (
            ["freeze.vision=false", "freeze.resampler=false", "adapter.vision_targets=[a]"],
            ["freeze.vision", "adapter.vision_targets"],
        ),
        (["adapter.targets=[]"], ["adapter.targets", "adapter.vision_targets"]),
        (["adapter.targets=[a,b,a]"], ["adapter.targets"]),
        (["model.attention=flash_attention_2", "model.dtype=float32"], ["model.attention", "model.dtype"]),
        (["train.eval_strategy=steps"], ["train.eval_strategy", "evaluate"]),
        (["train.eval_on_start=true"], ["train.eval_on_start", "evaluate"]),
        (["train.load_best_model_at_end=true"], ["train.load_best_model_at_end", "evaluate"]),
        (["train.save_strategy=best"], ["train.save_strategy", "load_best_model_at_end"]),
        (["train.metric_for_best_model=loss"], ["train.metric_for_best_model", "evaluate"]),
        (["train.greater_is_better=false"], ["train.greater_is_better", "evaluate"]),
        ([EVALUATE, "train.metric_for_best_model=loss"], ["train.metric_for_best_model", "no effect"]),
        (
            [EVALUATE, "train.metric_for_best_model=eval_anls", "train.load_best_model_at_end=true"],
            ["train.metric_for_best_model", "evaluate.task", "the loss alone"],
        ),
        (
            [EVALUATE, "train.greater_is_better=true", "train.load_best_model_at_end=true"],
            ["train.greater_is_better", "keeps the worst"],
        ),
        (
            [VQA, "evaluate.task=docvqa", "train.greater_is_better=false"],
            ["train.greater_is_better", "keeps the worst"],
        ),
        (
            [VQA, "evaluate.task=docvqa", "train.metric_for_best_model=eval_loss", "train.greater_is_better=true"],
            ["train.greater_is_better", "keeps the worst"],
        ),
        ([VQA, "evaluate.task=docvqa", "train.save_strategy=no"], ["train.save_strategy", "evaluate.task"]),
        (
            [EVALUATE, "evaluate.patience=1", "train.save_strategy=no"],
            ["train.save_strategy", "load_best_model_at_end"],
        ),
        (
            [EVALUATE, "train.lr_scheduler_type=reduce_lr_on_plateau", "train.lr_scheduler_kwargs={mode: max}"],
            ["train.lr_scheduler_kwargs", "write mode: min"],
        ),
        (["train.lr_scheduler_type=greedy"], ["train.lr_scheduler_type", "reduce_lr_on_plateau"]),
        (["train.lr_scheduler_type=constant", "train.warmup_steps=3"], ["train.warmup_steps", "constant_with_warmup"]),
        (
            ["train.lr_scheduler_type=constant_with_warmup", "train.lr_scheduler_kwargs={min_lr: 0.1}"],
            ["train.lr_scheduler_kwargs", "no effect"],
        ),
        (["train.warmup_steps=1.5"], ["train.warmup_steps"]),
        ([EVALUATE, "train.eval_steps=5"], ["train.eval_steps", "train.eval_strategy", "once an epoch"]),
        ([EVALUATE, "train.eval_delay=4"], ["train.eval_delay", "train.num_train_epochs"]),
        (
            [EVALUATE, "train.eval_strategy=steps", "train.eval_delay=9", "train.max_steps=8"],
            ["train.eval_delay", "train.max_steps"],
        ),
        (["train.optim=lomo"], ["train.optim", "backward"]),
        (["train.optim=schedule_free_adamw"], ["train.optim", "evaluated and saved"]),
        (["train.optim=galore_adamw"], ["train.optim", "projects"]),
        (["train.optim=stable_adamw"], ["train.optim", "optimizer=..."]),
        (["train.optim=sgd", "train.adam_beta1=0.8"], ["train.adam_beta1", "train.optim", "no effect"]),
        (["train.optim=lion_32bit", "train.adam_epsilon=1e-6"], ["train.adam_epsilon", "train.optim", "no effect"]),
        (["train.optim_args='momentum=0.9'"], ["train.optim_args", "train.optim", "takes no momentum"]),
        (["train.optim=sgd", "train.optim_args='momentun=0.9'"], ["train.optim_args", "momentum, dampening"]),
        (["train.optim=sgd", "train.optim_args='weight_decay=0.1'"], ["train.optim_args", "use train.weight_decay"]),
        (["train.optim=sgd", "train.optim_args=fast"], ["train.optim_args", "no setting"]),
        (
            ["train.gradient_checkpointing_kwargs={use_reentrant: true}"],
            ["train.gradient_checkpointing_kwargs", "use_reentrant: false"],
        ),
        (
            ["train.activation_checkpointing_kwargs={preserve_rng_state: false}"],
            ["train.activation_checkpointing_kwargs", "set checkpointing"],
        ),
        (
            ["train.gradient_checkpointing=true", "train.activation_checkpointing=false"],
            ["train.activation_checkpointing", "train.gradient_checkpointing"],
        ),
        (["train.report_to=[none, wandb]"], ["train.report_to", "none stands alone"]),
        (["train.lr_scheduler_type=reduce_lr_on_plateau"], ["train.lr_scheduler_type", "evaluate"]),
        ([EVALUATE, "evaluate.patience=2", "train.eval_strategy=no"], ["evaluate.patience", "train.eval_strategy"]),
        (
            [EVALUATE, "train.load_best_model_at_end=true", "train.eval_strategy=no"],
            ["train.load_best_model_at_end", "train.eval_strategy"],
        ),
        (["data.tokens_per_batch=100"], ["data.tokens_per_batch", "data.max_length"]),
        (["data.tokens_per_batch=4096", "data.packing=false"], ["data.tokens_per_batch", "data.packing"]),
        (["data.tokens_per_batch=auto", "data.packing=false"], ["data.tokens_per_batch", "data.packing"]),
        (["train.learning_rates.vision=1e-4"], ["train.learning_rates.vision", "freeze.vision"]),
        (["train.learning_rates.language=1e-4"], ["train.learning_rates.language", "freeze.language"]),
        (
            ["adapter=null", "freeze.language=false", "train.learning_rates.adapter=1e-4"],
            ["train.learning_rates.adapter", "adapter"],
        ),
        (
            ["adapter.train_embeddings=false", "train.learning_rates.embeddings=1e-4"],
            ["train.learning_rates.embeddings", "adapter.train_embeddings"],
        ),
        (["train.vision_layer_decay=0.95"], ["train.vision_layer_decay", "freeze.vision"]),
        (["train.deepspeed=ds.json", "train.fsdp=true"], ["train.deepspeed", "train.fsdp"]),
        (["train.max_steps=0"], ["train.max_steps"]),
        (["train.save_steps=1.5"], ["train.save_steps"]),
        (
            ["data.workers=0", "train.dataloader_prefetch_factor=2"],
            ["train.dataloader_prefetch_factor", "data.workers"],
        ),
        (["data.train.format=grounding"], ["data.train.0.format", "data.train.0.box_form"]),
        (["data.train.box_form=xyxy"], ["data.train.0.box_form", "data.train.0.format"]),
        (["data.train.prompt=hello"], ["data.train.0.prompt", "data.train.0.format"]),
        (["data.train.format=vqa", "data.train.prompt=hello"], ["data.train.0.prompt", "data.train.0.format"]),
    ],
)
def test_contradiction(overrides, keys):
    message = refusal(*overrides)
    assert message.count("\n") == 0
    for key in keys:
        assert key in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=null", "freeze.language=false"],
        ["adapter=null", "freeze.vision=false", "train.vision_layer_decay=0.95", "train.learning_rates.vision=1e-4"],
        ["freeze.resampler=false", "train.learning_rates.resampler=1e-4", "train.learning_rates.adapter=1e-3"],
        ["freeze.vision=false", "freeze.resampler=false"],
        ["adapter.vision_targets=[attn.in_proj]", "adapter.targets=[]"],
        ["model.quantization=nf4", "adapter.init=gaussian"],
        ["train.learning_rates.embeddings=1e-4"],  # auto may train them
        [EVALUATE, "evaluate.patience=2"],
        # Evaluation is once an epoch by default, saving every 500 steps: the best is saved besides.
        [EVALUATE, "train.load_best_model_at_end=true"],
        [EVALUATE, "train.load_best_model_at_end=true", "train.eval_strategy=steps", "train.eval_steps=300"],
        [EVALUATE, "train.load_best_model_at_end=true", "train.metric_for_best_model=loss"],
        [EVALUATE, "evaluate.patience=1", "train.greater_is_better=false"],
        [EVALUATE, "evaluate.patience=1", "train.load_best_model_at_end=false", "train.save_strategy=no"],
        [VQA, "evaluate.task=docvqa", "train.greater_is_better=true"],
        [VQA, "evaluate.task=docvqa", "train.metric_for_best_model=eval_loss"],
        [VQA, "evaluate.task=docvqa", "train.load_best_model_at_end=false", "train.save_strategy=no"],
        [EVALUATE, "train.lr_scheduler_type=reduce_lr_on_plateau", "train.lr_scheduler_kwargs={mode: min}"],
        ["train.optim=sgd", "train.optim_args='momentum=0.9, nesterov=true'", "train.adam_beta1=0.9"],
        ["train.gradient_checkpointing_kwargs={use_reentrant: false}"],
        ["train.lr_scheduler_type=constant_with_warmup", "train.warmup_steps=3"],
        ["data.tokens_per_batch=2048"],
        ["data.tokens_per_batch=auto"],
        ["data.max_length=null", "data.tokens_per_batch=512"],
        ["data.train.format=grounding", "data.train.box_form=xywh", "data.train.prompt='Find {phrase}.'"],
        ["data.train.format=caption", "data.train.prompt=Describe it."],
        ["train.fsdp=full_shard", "train.logging_steps=0.1", "train.max_steps=-1"],
    ],
)
def test_no_contradiction(overrides):
    parse_recipe(TEXT, overrides)


@pytest.mark.parametrize("format_name", ROLES)
def test_roles_of_each_format(format_name):
    box = ["data.train.box_form=xyxy"] if format_name == "grounding" else []
    box += ["data.train.fields=[total]"] if format_name == "fields" else []
    for role in ROLES[format_name]:
        source = parse_recipe(TEXT, [f"data.train.format={format_name}", f"data.train.columns.{role}=x", *box])
        assert source.data.train[0].columns == {role: "x"}
        message = refusal(f"data.train.format={format_name}", f"data.train.columns.{role[:-1]}=x", *box)
        assert re.search(rf"did you mean (\w+ or )*{role}\b", message)
        assert f"The roles are {', '.join(ROLES[format_name])}" in message


def test_roles_and_prompts_are_those_of_the_formats():
    from finetune.data.formats import row_format as formats

    assert ROLES == formats.COLUMNS
    assert {name: placeholder for name, placeholder in PLACEHOLDERS.items() if placeholder} == formats.PLACEHOLDERS
    assert set(PLACEHOLDERS) == set(formats.PROMPTS)


def test_components_are_those_of_the_model():
    from finetune.model.components import COMPONENTS
    from finetune.recipe import LearningRates

    assert tuple(LearningRates.model_fields) == COMPONENTS


def test_sections_are_checked_against_each_other_when_another_is_wrong():
    message = refusal("adapter=null", "data.max_lenght=3", "model.dtype=x", "train.eval_strategy=epoch")
    assert "nothing would be trained" in message
    assert "epoch needs an evaluation" in message
    assert message.count("\n") == 3


def test_a_wrong_value_is_not_a_contradiction_as_well():
    assert refusal("freeze.language=no").count("\n") == 0
