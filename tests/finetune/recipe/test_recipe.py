"""Recipes as objects: reading, overrides, defaults, round trip."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from finetune.recipe import Adapter, Data, Model, Recipe, RecipeError, Source, load_recipe, parse_recipe

TEXT = """\
model:
  path: examples/tiny
data:
  train: {path: rows.jsonl, format: messages}
output: runs/test
"""


def lines_of(text=TEXT, overrides=()):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides, file="x.yaml")
    return str(caught.value).splitlines()


def test_what_is_not_said_has_its_default():
    recipe = parse_recipe(TEXT)
    assert recipe.model == Model(path="examples/tiny")
    assert recipe.adapter.targets == ("c_attn", "attn.c_proj", "w1", "w2")
    assert recipe.freeze.vision and recipe.freeze.resampler and recipe.freeze.language
    assert recipe.data.max_length == 2048 and recipe.data.packing
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.max_steps == -1
    assert recipe.evaluate is None
    assert (recipe.output, recipe.seed, recipe.resume) == ("runs/test", 0, "auto")


def test_one_source_stands_for_a_list_of_one():
    assert parse_recipe(TEXT).data.train == (Source(path="rows.jsonl", format="messages"),)
    two = TEXT.replace("{path: rows.jsonl, format: messages}", "[{path: a, format: vqa}, {path: b, format: caption}]")
    assert [source.path for source in parse_recipe(two).data.train] == ["a", "b"]
    assert Data(train=Source(path="a", format="vqa")) == Data(train=[{"path": "a", "format": "vqa"}])


def test_train_arguments_are_what_was_set_and_what_decides_the_result():
    arguments = parse_recipe(TEXT, ["train.logging_steps=5", "train.learning_rates.adapter=1e-4"]).train_arguments()
    assert arguments["logging_steps"] == 5 and isinstance(arguments["logging_steps"], int)
    assert arguments["learning_rate"] == 1e-5
    assert arguments["per_device_train_batch_size"] == 8
    assert not {"learning_rates", "vision_layer_decay", "save_steps", "output_dir", "seed"} & arguments.keys()


def test_train_arguments_make_an_sft_config(tmp_path):
    from trl import SFTConfig

    recipe = parse_recipe(TEXT, ["train.lr_scheduler_kwargs={a: [1, 2]}", "train.report_to=[none]"])
    arguments = recipe.train_arguments()
    arguments["lr_scheduler_kwargs"]["b"] = 1  # TRL changes what it is given; the recipe stays as it is
    assert recipe.train.lr_scheduler_kwargs == {"a": (1, 2)}
    config = SFTConfig(**arguments, output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert config.learning_rate == 1e-5 and config.lr_scheduler_kwargs["a"] == [1, 2]


def test_nothing_in_a_recipe_can_be_changed():
    recipe = parse_recipe(TEXT, ["data.train.columns={images: pictures}", "train.lr_scheduler_kwargs={a: {b: 1}}"])
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.seed = 3
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.data.train[0].path = "other"
    for mapping in (recipe.data.train[0].columns, recipe.train.lr_scheduler_kwargs["a"]):
        with pytest.raises(TypeError, match="does not change"):
            mapping["images"] = "other"
        with pytest.raises(TypeError, match="does not change"):
            mapping.update(images="other")
    assert isinstance(recipe.adapter.targets, tuple)


def test_recipes_are_copied_and_sent_to_other_processes():
    recipe = parse_recipe(TEXT, ["data.train.columns={images: pictures}"])
    assert copy.deepcopy(recipe) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_resolved_recipe_loads_back_equal(tmp_path):
    overrides = [
        "train.learning_rate=2e-4",
        "train.logging_steps=0.1",
        "train.lr_scheduler_kwargs={a: [1, {b: no}]}",
        "train.run_name='1e5'",  # text that these rules would read as a number
        "train.eval_strategy=no",  # text that YAML 1.1 reads as false
        "data.images_root='null'",
        "data.train.columns={images: 'yes'}",
        "output='ünïcode: # {}'",
        "adapter=null",
        "freeze.language=false",
    ]
    recipe = parse_recipe(TEXT, overrides)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(file)
    assert again == recipe
    assert again.train_arguments() == recipe.train_arguments()
    assert again.to_yaml() == recipe.to_yaml()


def test_resolved_recipe_says_what_decides_the_result():
    text = parse_recipe(TEXT).to_yaml()
    for key in ("max_length: 2048", "  r: 64", "num_train_epochs: 3.0", "learning_rate: 1.0e-05", "evaluate: null"):
        assert key in text
    assert "torch_compile" not in text


def test_resolved_recipe_means_the_same_to_other_yaml_readers():
    import yaml

    recipe = parse_recipe(TEXT, ["train.eval_strategy=no", "train.learning_rate=2e-5", "train.run_name='1e5'"])
    values = yaml.safe_load(recipe.to_yaml())
    assert values["train"]["eval_strategy"] == "no"
    assert values["train"]["learning_rate"] == 2e-5
    assert values["train"]["run_name"] == "1e5"


# Overrides


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("train.max_steps=24", lambda recipe: recipe.train.max_steps, 24),
        ("train.learning_rate=2e-4", lambda recipe: recipe.train.learning_rate, 2e-4),
        ("adapter.targets=[c_attn,w1]", lambda recipe: recipe.adapter.targets, ("c_attn", "w1")),
        ("data.train.0.path=x", lambda recipe: recipe.data.train[0].path, "x"),
        ("data.train.path=x", lambda recipe: recipe.data.train[0].path, "x"),
        ("data.train={path: x, format: llava}", lambda recipe: recipe.data.train[0].format, "llava"),
        ("data.max_length=null", lambda recipe: recipe.data.max_length, None),
        ("data.max_length=", lambda recipe: recipe.data.max_length, None),
        ("evaluate.data={path: x, format: vqa}", lambda recipe: recipe.evaluate.data[0].path, "x"),
        ("output=a=b", lambda recipe: recipe.output, "a=b"),
        ('output="3"', lambda recipe: recipe.output, "3"),
    ],
)
def test_override(override, get, value):
    assert get(parse_recipe(TEXT, [override])) == value


def test_an_override_makes_the_section_it_needs():
    assert parse_recipe(TEXT + "adapter: null\n", ["adapter.r=8"]).adapter == Adapter(r=8)


def test_the_last_override_of_a_key_counts():
    assert parse_recipe(TEXT, ["seed=1", "seed=2"]).seed == 2


def test_an_override_mends_what_it_replaces():
    broken = TEXT + "train:\n  max_steps: many\nadapter:\n  rr: 1\n"
    assert parse_recipe(broken, ["train.max_steps=3", "adapter={r: 8}"]).train.max_steps == 3
    tagged = TEXT + "seed: !!python/name:os.system x\n"
    assert parse_recipe(tagged, ["seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "train.max_step=24",
            "override train.max_step=24: train.max_step: unknown key; did you mean train.max_steps?",
        ),
        ("trian.max_steps=2", "override trian.max_steps=2: trian: unknown key; did you mean train?"),
        ("train.max_steps", "override train.max_steps: is not of the form key.path=value; as in train.max_steps=24"),
        ("=3", "override =3: is not of the form key.path=value; as in train.max_steps=24"),
        ("a..b=3", "override a..b=3: is not of the form key.path=value; as in train.max_steps=24"),
        ("data.train.1.path=x", "override data.train.1.path=x: data.train.1.path: data.train is a list, its indices"),
        ("output.x=3", "override output.x=3: output.x: output is a single value: nothing is below it"),
        ("adapter.targets=[a", "override adapter.targets=[a: adapter.targets: not readable as YAML"),
        ("adapter={r: 1, r: 2}", "override adapter={r: 1, r: 2}: adapter.r: this key stands twice"),
        ("seed=!!python/name:os.system x", "override seed=!!python/name:os.system x: seed: the tag"),
        (
            "data.train.columns={a: b}",
            "override data.train.columns={a: b}: data.train.0.columns.a: format messages has",
        ),
    ],
)
def test_an_error_names_its_override(override, line):
    lines = lines_of(overrides=[override])
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_every_wrong_override_is_named_beside_what_is_wrong_in_the_file():
    lines = lines_of(TEXT + "sed: 3\n", ["train.max_step=1", "nothing", "model.dtype=bf16"])
    assert len(lines) == 4
    assert lines[0] == "x.yaml:6: sed: unknown key; did you mean seed?"


# Errors


def test_a_problem_has_its_parts():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(TEXT + "train:\n  max_steps: 1\n  learning_rat: 3\n", file="x.yaml")
    (problem,) = caught.value.problems
    assert (problem.place.file, problem.place.line, problem.place.column) == ("x.yaml", 8, 3)
    assert (problem.key, problem.reason) == ("train.learning_rat", "unknown key")
    assert problem.remedy == "did you mean train.learning_rate?"
    assert str(problem) == "x.yaml:8: train.learning_rat: unknown key; did you mean train.learning_rate?"


def test_all_problems_are_raised_at_once():
    lines = lines_of("""\
model:
  dtype: bf16
adapter: {r: 3.0, r: 4, dropout: 1}
data:
  train:
    - path: a
      format: grounding
    - path: b
      format: vqa
      columns: {imge: x}
  tokens_per_batch: 10
train:
  max_lenght: 3
  eval_strategy: epoch
  adam_beta1: "0.9"
  push_to_hub: true
seed: -1
""")
    expected = [
        "x.yaml:1: model.path: this key is required",
        "x.yaml:1: output: this key is required; give it text",
        "x.yaml:2: model.dtype: expected one of auto, float32, bfloat16, float16, found 'bf16' (text); did you mean",
        "x.yaml:3: adapter.dropout: expected a number, at least 0 and below 1, found 1",
        "x.yaml:3: adapter.r: this key stands twice, first in line 3",
        "x.yaml:7: data.train.0.format: boxes in pixels are stored in two ways, and box_form does not say which",
        "x.yaml:10: data.train.1.columns.imge: format vqa has no such role (see data.train.1.format in line 9); did",
        "x.yaml:13: train.max_lenght: unknown key; did you mean data.max_length?",
        "x.yaml:14: train.eval_strategy: epoch needs an evaluation, and there is none (see evaluate by its default)",
        "x.yaml:15: train.adam_beta1: expected a number, at least 0 and below 1, found '0.9' (text); write 0.9, with",
        "x.yaml:16: train.push_to_hub: is not for a recipe to set; a run uploads nothing",
        "x.yaml:17: seed: expected a whole number, at least 0 and below 4294967296, found -1",
    ]
    found = sorted(lines)
    assert len(found) == len(expected), "\n".join(lines)
    for line, beginning in zip(found, sorted(expected), strict=True):
        assert line.startswith(beginning)


def test_a_mistyped_key_is_not_missing_as_well():
    lines = lines_of(TEXT.replace("model:", "modle:"))
    assert lines == ["x.yaml:1: modle: unknown key; did you mean model?"]


def test_recipe_error_survives_pickling():
    with pytest.raises(RecipeError) as caught:
        parse_recipe("seed: x")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_recipe_made_in_python_is_checked_too():
    values = {"model": {"path": "m"}, "data": {"train": [{"path": "p", "format": "vqa"}]}, "output": "o"}
    assert Recipe.model_validate(values).model.path == "m"
    with pytest.raises(pydantic.ValidationError, match="nothing would be trained"):
        Recipe.model_validate(values | {"adapter": None})


def test_nothing_heavy_is_imported():
    script = """
import sys
from pathlib import Path
from finetune.recipe import RecipeError, load_recipe
for file in Path("recipes").glob("*.yaml"):
    load_recipe(file, ["train.max_steps=2"]).to_yaml()
    try:
        load_recipe(file, ["train.max_step=2", "adapter=3"])
    except RecipeError:
        continue
    sys.exit("was accepted")
heavy = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "PIL", "qwenvl"}
sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
