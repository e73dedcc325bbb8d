"""`make demo`: its commands are real ones, in order, and may be run again."""

import re

from recipes_for_tests import ROOT, write_recipe

from finetune.cli import main
from finetune.recipe import load_recipe


def commands() -> list[str]:
    """What `make demo` runs, as in the Makefile; each is announced just before."""
    target = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [line.strip().removeprefix("@") for line in target[1].splitlines()]
    for told, done in zip(lines[::2], lines[1::2], strict=True):
        assert told.startswith("echo ") and done.removeprefix("$(BIN)/") in told
    return lines[1::2]


def test_it_can_be_run_again(tmp_path, capsys):
    """On a run of one step in the place of the quickstart's."""
    recipe, output = write_recipe(tmp_path, train__max_steps=1), tmp_path / "run"
    assert load_recipe(ROOT / "recipes" / "quickstart.yaml").output == "runs/quickstart"
    said = []
    for command in 2 * commands():
        words = command.replace("recipes/quickstart.yaml", str(recipe)).replace("runs/quickstart", str(output)).split()
        assert words.pop(0) == "$(BIN)/finetune"
        assert main(words) == 0
        said.append(capsys.readouterr().out)
    assert f"merged      {output / 'merged'}" in said[1]
    assert "is finished" in said[2] and "nothing to do" in said[3]
    assert (output / "merged" / "model.safetensors").is_file() and (output / "adapter").is_dir()
