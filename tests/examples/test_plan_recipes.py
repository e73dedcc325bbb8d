"""The memory of every recipe, planned: the table in recipes/README.md is what the script prints."""

import runpy
import sys

import pytest
from forked_finetune import run_forked
from recipes_for_tests import ROOT

from finetune.memory.free_memory import CARDS

SCRIPT = ROOT / "examples" / "plan_recipes.py"
README = ROOT / "recipes" / "README.md"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def lines(script):
    return script["table"]()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_in_the_readme_is_this_one(lines):
    """If not: run the script and put in what it prints."""
    text = README.read_text(encoding="utf-8").splitlines()
    first = text.index(lines[0])
    assert text[first : first + len(lines)] == lines
    assert not text[first + len(lines)].startswith("|")


def test_so_is_that_of_cards_that_share_a_model(script):
    shared = script["shared_table"]("full_sft", "fsdp")
    text = README.read_text(encoding="utf-8").splitlines()
    first = text.index(shared[0])
    assert text[first : first + len(shared)] == shared


def test_every_recipe_of_a_published_checkpoint_is_in_it(script, lines):
    planned = [cells(line)[0].partition("]")[0].strip("[") for line in lines[2:]]
    assert planned == sorted(planned)  # a recipe for two cards has two lines
    assert set(planned) == {file.stem for file in (ROOT / "recipes").glob("*.yaml")} - {"quickstart"}
    assert script["MADE_FOR"].keys() <= set(planned) and script["CONVERSATIONS"].keys() <= set(planned)


def test_recipes_fit_the_cards_that_they_are_for(script):
    for name, cards in script["MADE_FOR"].items():
        recipe = script["load_recipe"](script["RECIPES"] / f"{name}.yaml", script["SETTLED"])
        for row in script["rows_of"](name, recipe, cards):
            assert row.plan.fits(CARDS[row.card]), (name, row.card, row.plan.lines())
            assert not row.switches.reasons or "auto" in recipe.to_yaml()


def test_the_spec_of_small_cards(lines):
    """Q-LoRA at most 8.0 GB on 8 GB, 6.0 GB on 6 GB with cached features; LoRA at most 21.5 GB on 24 GB."""
    limits = {"docvqa_qlora_8gb": 8.0, "docvqa_qlora_6gb": 6.0, "docvqa_lora_24gb": 21.5}
    for line in lines[2:]:
        name, _, _, _, *memory = cells(line)
        limit = limits.get(name.partition("]")[0].strip("["))
        if limit is not None:
            assert max(float(gigabytes) for gigabytes in memory[:-1]) <= limit, line


def test_one_recipe_on_another_card_with_another_setting(lines):
    words = ["docvqa_qlora_8gb", "--card", "6", "data.tokens_per_batch=1024"]
    done = run_forked(words, timeout=300, program=SCRIPT)
    assert done.returncode == 0, done.stderr
    head, _, row = (cells(line) for line in done.stdout.splitlines())
    assert head == cells(lines[0]) and row[1:3] == ["6 GB", "1,024"]


@pytest.mark.parametrize("argument", ["docvqa_qlora_9gb", "data.tokens_per_bach=3"])
def test_what_there_is_not(argument, script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), argument])
    with pytest.raises(SystemExit) as ended:
        script["main"]()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "docvqa_qlora_8gb" in said or "did you mean data.tokens_per_batch" in said
