import re

import pytest
import yaml

from finetune.export.model_card import training_sections, write_card
from finetune.run.folder import RunFolder


def read(folder):
    text = (folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_hub_reads_base_task_and_license(tmp_path):
    (tmp_path / "LICENSE").write_text("Tongyi Qianwen LICENSE AGREEMENT\n...")
    write_card(tmp_path, title="receipts", base="Qwen/Qwen-VL-Chat", fingerprint="abc123", tags=["lora"])
    header, body = read(tmp_path)
    assert header == {
        "base_model": "Qwen/Qwen-VL-Chat",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["qwen-vl", "vision-language", "fine-tuned", "lora"],
        "license": "other",
        "license_name": "tongyi-qianwen",
        "license_link": "LICENSE",
    }
    assert "# receipts" in body
    assert "https://huggingface.co/Qwen/Qwen-VL-Chat" in body
    assert "`abc123`" in body
    assert "load_model(folder" in body
    assert "AutoModelForCausalLM" in body


def test_a_license_is_not_guessed(tmp_path):
    write_card(tmp_path, title="x", base="Qwen/Qwen-VL")
    assert "license" not in read(tmp_path)[0]
    (tmp_path / "LICENSE.txt").write_text("Do what you like")
    write_card(tmp_path, title="x", base="Qwen/Qwen-VL")
    header, body = read(tmp_path)
    assert (header["license"], header["license_link"]) == ("other", "LICENSE.txt")
    assert "license_name" not in header
    assert "[LICENSE.txt](LICENSE.txt)" in body


@pytest.mark.parametrize("base", ["/data/models/qwen", "./qwen", "a/b/c", "qwen"])
def test_a_folder_is_no_base_model_for_the_hub(tmp_path, base):
    write_card(tmp_path, title="x", base=base)
    header, body = read(tmp_path)
    assert "base_model" not in header
    assert f"`{base}`" in body


def test_facts_and_notes_are_shown(tmp_path):
    write_card(tmp_path, title="x", base="Qwen/Qwen-VL", facts={"weights": "a | b"}, notes=["Trained in 4 bits."])
    body = read(tmp_path)[1]
    assert "| weights | a \\| b |" in body
    assert "> Trained in 4 bits." in body


def test_a_run_gives_data_figures_and_recipe(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.write_recipe("model:\n  path: Qwen/Qwen-VL-Chat\n")
    counts = {"total": 1200, "kept": 1100, "too_long": 60, "bad": 40}
    run.write_run({"rows": {"train": counts}})
    for step, record in [
        (0, {"eval_loss": 2.5, "eval_runtime": 3.0}),
        (1, {"loss": 2.0}),
        (9, {"loss": 0.5}),
        (9, {"eval_loss": 0.25, "eval_anls": 0.75}),
    ]:
        run.append_metrics({"step": step, **record})
    folder = tmp_path / "model"
    folder.mkdir()
    write_card(folder, title="x", base="Qwen/Qwen-VL", training=training_sections(run.path))
    body = read(folder)[1]
    assert "| train | 1,200 | 1,100 | 60 | 40 |" in body
    assert "| eval_loss | 2.5000 (step 0) | 0.2500 (step 9) |" in body
    assert "| eval_anls | 0.7500 (step 9) | 0.7500 (step 9) |" in body
    assert "| loss | 2.0000 (step 1) | 0.5000 (step 9) |" in body
    assert "eval_runtime" not in body
    assert re.search(r"```yaml\nmodel:\n  path: Qwen/Qwen-VL-Chat\n```", body)


def test_the_figures_are_those_of_the_saved_step(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.write_run({"best_checkpoint": str(tmp_path / "run" / "checkpoints" / "step-20")})
    for step in (10, 20, 30):
        run.append_metrics({"step": step, "loss": step / 10})
        run.append_metrics({"step": step, "eval_anls": step / 100})
    write_card(tmp_path, title="x", base="Qwen/Qwen-VL", training=training_sections(run.path))
    body = read(tmp_path)[1]
    assert "| | first | of these weights, step 20 |" in body
    assert "| loss | 1.0000 (step 10) | 2.0000 (step 20) |" in body
    assert "| eval_anls | 0.1000 (step 10) | 0.2000 (step 20) |" in body


def test_a_run_folder_may_lack_everything(tmp_path):
    (tmp_path / "run").mkdir()
    write_card(tmp_path, title="x", base="Qwen/Qwen-VL", training=training_sections(tmp_path / "run"))
    assert "## Data" not in read(tmp_path)[1]
