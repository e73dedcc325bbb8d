"""The recipes that are shipped."""

from pathlib import Path

import pytest

from finetune.recipe import load_recipe
from finetune.recipe.schema_file import FILE

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_which_there_are():
    assert {recipe.stem for recipe in RECIPES} == {
        *("quickstart", "docvqa_lora", "docvqa_qlora", "chartqa_lora", "textvqa_lora"),
        *("docvqa_lora_24gb", "docvqa_qlora_8gb", "docvqa_qlora_6gb"),
        *("grounding_lora", "caption_lora", "chat_lora", "base_lora", "full_sft"),
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, tmp_path):
    recipe = load_recipe(path)
    assert recipe.output == f"runs/{path.stem}"
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(resolved) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_opens_with(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    schema = lines[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).resolve() == FILE
    opening = [line for line in lines if line.startswith("#")]
    assert any(line.startswith("# Needs: ") for line in opening)
    commands = [line.removeprefix("#     ") for line in opening if line.startswith("#     ")]
    assert any(f"recipes/{path.name}" in command for command in commands)
    examples = [command.split(f"recipes/{path.name}")[1].split() for command in commands]
    assert any(examples)
    for overrides in examples:
        load_recipe(path, overrides)


def test_the_bundled_data_of_the_quickstart_is_there():
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    for path in (recipe.model.path, recipe.data.train[0].path, recipe.evaluate.data[0].path):
        assert (ROOT / path).exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_make_an_sft_config(path, tmp_path):
    from trl import SFTConfig

    arguments = load_recipe(path).train_arguments()
    SFTConfig(**arguments, output_dir=str(tmp_path), bf16=False, use_cpu=True)
