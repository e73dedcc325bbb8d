"""TRL's commands: their processes know the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from recipes_for_tests import ROOT, TINY
from safetensors.torch import load_file
from transformers.models.auto import modeling_auto

from finetune.errors import UserError
from finetune.programs import registered, trl_launch

COLOURS = ("red", "green", "blue", "white")


def test_the_script_runs_behind_the_registration(monkeypatch):
    from accelerate.commands import launch

    started = []
    monkeypatch.setattr(launch, "launch_command", started.append)
    arguments = launch.launch_command_parser().parse_args(["--num_processes", "2", "sft.py", "--max_steps", "3"])
    trl_launch.launch_registered(arguments)
    (given,) = started
    assert (given.training_script, given.module) == ("finetune.programs.registered", True)
    assert given.training_script_args == ["sft.py", "--max_steps", "3"] and given.num_processes == 2


def test_a_registered_script_sees_the_class_by_its_name(tmp_path, monkeypatch, capsys):
    for name in ("QWenLMHeadModel", "QwenVLForConditionalGeneration"):
        monkeypatch.setattr(sys.modules["transformers"], name, None, raising=False)  # taken away after the test
    monkeypatch.setitem(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "qwen", None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", torch.distributed.destroy_process_group)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, transformers\n"
        "from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as names\n"
        "assert __name__ == '__main__'\n"
        "print(sys.argv[1:], transformers.QWenLMHeadModel.__name__, names['qwen'])\n"
    )
    monkeypatch.setattr(sys, "argv", ["registered", str(script), "--a", "b"])
    registered.main()
    name = "QwenVLForConditionalGeneration"
    assert capsys.readouterr().out == f"['--a', 'b'] {name} {name}\n"


def test_trl_under_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="give trl --num_processes N"):
        trl_launch.prepare_trl()


def test_another_trl_is_said(monkeypatch):
    from trl.cli import accelerate_launcher

    monkeypatch.setattr(accelerate_launcher, "launch_training_script", lambda script_name: None)
    with pytest.raises(UserError, match=r"trl 1\.\S+ has no cli.accelerate_launcher.launch_training_script as this"):
        trl_launch.prepare_trl()


def write_conversations(folder: Path, with_images: bool) -> Path:
    """Sixteen conversations about a colour, as the datasets library reads a folder."""
    folder.mkdir()
    rows = []
    for number in range(16):
        colour = COLOURS[number % 4]
        messages = [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": colour}]
        if with_images:
            Image.new("RGB", (112, 112), colour).save(folder / f"{number}.png")
            rows.append({"file_name": f"{number}.png", "messages": messages})
        else:
            rows.append({"messages": messages})
    file = folder / ("metadata.jsonl" if with_images else "train.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("with_images", "launch"),
    [(True, []), (False, []), (True, ["--num_processes", "2", "--multi_gpu"])],
    ids=["images", "text", "two processes"],
)
def test_trl_trains_an_adapter(tmp_path, with_images, launch):
    data, output = write_conversations(tmp_path / "data", with_images), tmp_path / "adapter"
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "run", "trl", "sft", *launch]
        + ["--model_name_or_path", str(TINY), "--dataset_name", str(data), "--output_dir", str(output)]
        + ["--max_steps", "12", "--logging_steps", "3", "--learning_rate", "2e-3", "--max_length", "1024"]
        + ["--per_device_train_batch_size", "4", "--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false"]
        + ["--use_peft", "--lora_r", "8", "--lora_target_modules", "c_attn", "w1", "w2"]
        + ["--report_to", "none", "--save_strategy", "no"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [
        float(line.split("'loss': '")[1].split("'")[0]) for line in done.stdout.splitlines() if "'loss': '" in line
    ]
    assert len(losses) >= 4 and losses[-1] < 0.8 * losses[0], losses
    adapter = load_file(output / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and tensor.abs().max() > 0 for name, tensor in adapter.items())
