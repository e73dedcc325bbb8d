"""docs/migration.md: its Python runs, its recipes are read, its commands are understood, its data are."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune.cli import Parser
from finetune.data.formats.qwen_json import qwen_json
from finetune.evaluation.tasks import TASKS
from finetune.recipe import load_recipe
from qwenvl import load_model
from qwenvl.published import Query

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def new_side(diff: str) -> str:
    """A diff's lines without those that are removed."""
    return "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith("-"))


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_folder, tiny_images):
    """A folder with the files that the page names; the published names lead to the tiny checkpoint."""
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("receipt.jpg", "page.png"), tiny_images, strict=False):
        (tmp_path / name).write_bytes(image.read_bytes())
    for name in ("Qwen-VL-Chat", "Qwen-VL"):
        (tmp_path / "Qwen").mkdir(exist_ok=True)
        (tmp_path / "Qwen" / name).symlink_to(tiny_folder)
    return tmp_path


def test_its_python_runs_from_top_to_bottom(workplace, tiny_folder):
    adapted = get_peft_model(load_model(tiny_folder), LoraConfig(r=2, target_modules=["c_attn"]))
    adapted.save_pretrained(workplace / "output_qwen")
    programs = re.findall(r"^```(diff|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(programs) == 7
    names = {"device": "cpu"}
    for kind, program in programs:
        program = new_side(program) if kind == "diff" else program
        assert "trust_remote_code" not in program
        torch.manual_seed(0)
        exec(compile(program, str(ROOT / "docs" / "migration.md"), "exec"), names)
        if "model" in names:
            names["model"].generation_config.max_new_tokens = 4
    assert isinstance(names["query"], Query) and len(names["history"]) == 2 and len(names["replies"]) == 2
    assert isinstance(names["response"], str) and names["response"]
    assert type(names["model"]).__name__.startswith("PeftModel")


def test_its_recipes_are_recipes(workplace):
    lora, qlora = blocks("yaml")
    for name, text in (("lora.yaml", lora), ("qlora.yaml", qlora)):
        (workplace / name).write_text(text, encoding="utf-8")
    recipe = load_recipe(workplace / "lora.yaml")
    adapter = recipe.adapter
    assert (adapter.r, adapter.alpha, adapter.dropout) == (64, 16, 0.05)
    assert adapter.targets == ("c_attn", "attn.c_proj", "w1", "w2")
    assert recipe.freeze.vision and recipe.data.labels == "structure" and recipe.evaluate is None
    assert load_recipe(workplace / "qlora.yaml").model.quantization == "nf4"


def test_every_key_that_it_names_is_one_of_a_recipe():
    keys = set(re.findall(r"`((?:model|adapter|freeze|data|train|evaluate)\.\w+)(?=[:`])", PAGE))
    assert {"data.max_length", "train.checkpointing", "freeze.vision", "adapter.targets"} <= keys and len(keys) > 15
    definitions = json.loads((ROOT / "finetune" / "recipe_schema.json").read_text(encoding="utf-8"))["$defs"]
    for section, key in (key.split(".") for key in sorted(keys)):
        assert key in definitions[section.capitalize()]["properties"], f"{section}.{key}"


def test_its_table_of_arguments_gives_a_recipe(workplace):
    (workplace / "lora.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    full = ["adapter=null", "freeze={language: false, resampler: false}", "train.checkpointing=auto"]
    full += ["evaluate={data: {path: F, format: qwen_json}}", "data.on_long=drop", "model.dtype=float16"]
    recipe = load_recipe(workplace / "lora.yaml", full)
    assert recipe.freeze.vision and recipe.evaluate.data[0].format == "qwen_json"


def test_its_data_are_read():
    (block,) = blocks("json")
    (row,) = json.loads(block)
    ((user, assistant),) = qwen_json(row, {"conversations": "conversations", "system": "system"})
    assert [part["image"] for part in user["content"] if part["type"] == "image"] == ["receipt.jpg"]
    assert assistant["role"] == "assistant"


def test_its_commands_are_understood():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`(finetune [^`]*--[^`]*)`", PAGE)
    assert len(lines) == 5
    for line in lines:
        program, name, *arguments = shlex.split(line)
        command = import_module(f"finetune.commands.{name}")
        parser = Parser(prog=program)
        command.add_arguments(parser)
        parser.parse_intermixed_args(arguments)
    tasks = re.findall(r"`(?:--task )?([\w+]+)`", " ".join(re.findall(r"`--task \w+`[^|]*", PAGE)))
    assert len(tasks) == 12 and set(tasks) <= {*TASKS}
