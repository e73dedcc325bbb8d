"""`finetune demo`: from the command to a reply of a real model in the browser."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from demo_page_for_tests import ask, browser, make_strong_adapter, opened  # noqa: F401 (a fixture)
from recipes_for_tests import ROOT

NANO = ROOT / "examples" / "nano"
PAGE = ROOT / "examples/quickstart/known/images/test/000000.png"
QUESTION = "The shop, please."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["examples/nano", "--port", "x"], "must be a number from 0 to 65535"),
        (["examples/nano", "--host", "0.0.0.0"], "--password-file"),
        (["examples/nano", "--password-file", "none"], "none"),
        (["examples/none"], "examples/none"),
        (["examples/nano", "--compare", "examples/none"], "examples/none"),
    ],
)
def test_wrong_arguments_end_it_with_a_sentence(arguments, said, capfd):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    from finetune.cli import main

    assert main(["demo", *arguments]) == 2
    error = capfd.readouterr().err
    assert said in error and "Traceback" not in error


def chat_once(model: Path) -> str:
    command = [sys.executable, "-m", "finetune", "chat", model, "--image", PAGE, "--once", QUESTION]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.rstrip("\n")


@pytest.mark.slow
def test_the_page_of_a_tuned_model_and_its_base_replies_as_the_chat_and_leaves_nothing(
    browser,  # noqa: F811
    tmp_path,
):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    adapter, files = tmp_path / "adapter", tmp_path / "temporary"
    make_strong_adapter(adapter, NANO)
    files.mkdir()
    command = [sys.executable, "-u", "-m", "finetune", "demo", adapter, "--compare", NANO, "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(files)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = None
        for line in process.stdout:
            if found := re.fullmatch(r"page +(http://127\.0\.0\.1:\d+) until Ctrl-C\n", line):
                address = found[1]
                break
        assert address is not None, process.stderr.read()
        with opened(browser, address) as page:
            page.locator("input[type=file]").first.set_input_files(str(PAGE))
            page.get_by_role("button", name=PAGE.name, pressed=True).wait_for()
            ask(page, QUESTION)
            page.locator(".reply").nth(1).wait_for()
            page.get_by_role("button", name="Send", disabled=False).wait_for()
            replies = [
                page.get_by_role("region", name=f"Conversation with {model}").locator(".reply").inner_text()
                for model in (adapter, NANO)
            ]
            assert replies == [chat_once(adapter).strip(), chat_once(NANO).strip()]
            assert replies[1] == "Stone Deli" != replies[0]
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 143
        assert errors.splitlines()[-1] == (
            "interrupted by SIGTERM; the page is closed, and what was uploaded is removed"
        )
        assert "Traceback" not in errors and not list(files.glob("finetune-demo-*"))
    finally:
        process.kill()
