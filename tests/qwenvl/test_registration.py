"""Published folders load through Transformers' Auto classes, and their code never runs."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from qwenvl import (
    QwenVLConfig,
    QwenVLForConditionalGeneration,
    QwenVLImageProcessor,
    QwenVLModel,
    QwenVLProcessor,
    QwenVLTokenizer,
)


@pytest.fixture
def published_folder(tiny_folder, tmp_path):
    """With the code files that the folder's auto_map names; each leaves a mark when it runs."""
    folder = tmp_path / "published"
    shutil.copytree(tiny_folder, folder)
    mark = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    body = (
        "class QWenConfig: pass\nclass QWenLMHeadModel: pass\nclass QWenTokenizer: pass\nclass QWenProcessor: pass\n"
    )
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen", "processing_qwen"):
        (folder / f"{name}.py").write_text(mark + body)
    return folder


AUTO_CLASSES = [
    (AutoConfig, QwenVLConfig),
    (AutoModel, QwenVLModel),
    (AutoModelForCausalLM, QwenVLForConditionalGeneration),
    (AutoModelForImageTextToText, QwenVLForConditionalGeneration),
    (AutoTokenizer, QwenVLTokenizer),
    (AutoProcessor, QwenVLProcessor),
]


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize(("auto", "ours"), AUTO_CLASSES)
def test_published_folders_load_and_their_code_never_runs(published_folder, auto, ours, trust):
    kwargs = {} if trust is None else {"trust_remote_code": trust}
    assert isinstance(auto.from_pretrained(published_folder, **kwargs), ours)
    assert not (published_folder.parent / "ran").exists()


def test_auto_map_tricks(published_folder):
    """Every Auto class named in every file's auto_map, in this folder and in another repository's name."""
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoProcessor")
    everything = dict.fromkeys(names, "modeling_qwen.QWenConfig")
    everything["AutoTokenizer"] = ["evil/repo--tokenization_qwen.QWenTokenizer", None]
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((published_folder / file).read_text())
        content["auto_map"] = everything
        (published_folder / file).write_text(json.dumps(content))
    processor = AutoProcessor.from_pretrained(published_folder)
    processor.save_pretrained(published_folder)
    for file in ("processor_config.json", "tokenizer_config.json"):
        content = json.loads((published_folder / file).read_text())
        content["auto_map"] = everything
        (published_folder / file).write_text(json.dumps(content))
    for auto, ours in AUTO_CLASSES:
        for trust in (False, True):
            assert isinstance(auto.from_pretrained(published_folder, trust_remote_code=trust), ours)
    assert not (published_folder.parent / "ran").exists()


def test_saved_processors_load_through_every_auto_class(tiny_processor, tiny_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), QwenVLProcessor)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), QwenVLTokenizer)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), QwenVLImageProcessor)


def test_importing_qwenvl_is_all_it_takes(tiny_folder):
    """In a fresh process, offline, with nothing else imported first; and it makes no connection."""
    script = f"""
        import socket
        def refuse(*args, **kwargs):
            raise SystemExit("a connection was attempted")
        socket.socket.connect = refuse
        import qwenvl
        from transformers import AutoModelForCausalLM, AutoProcessor
        model = AutoModelForCausalLM.from_pretrained({str(tiny_folder)!r})
        processor = AutoProcessor.from_pretrained({str(tiny_folder)!r})
        print(type(model).__name__, type(processor).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split() == ["QwenVLForConditionalGeneration", "QwenVLProcessor"], done.stderr


def test_the_image_text_to_text_pipeline(tiny_folder, tiny_images):
    answer = pipeline(
        "image-text-to-text",
        model=AutoModelForImageTextToText.from_pretrained(tiny_folder),
        processor=AutoProcessor.from_pretrained(tiny_folder),
    )(
        text=[
            {
                "role": "user",
                "content": [{"type": "image", "image": str(tiny_images[0])}, {"type": "text", "text": "What?"}],
            }
        ],
        max_new_tokens=3,
    )
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_a_folder_that_names_no_tokenizer_class(published_folder):
    (published_folder / "tokenizer_config.json").unlink()
    assert isinstance(AutoTokenizer.from_pretrained(published_folder), QwenVLTokenizer)
