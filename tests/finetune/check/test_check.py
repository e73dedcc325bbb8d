"""`finetune check`: everything before training, told together, without weights; data is never more than text."""

import base64
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from encoded_images import encode
from PIL import Image
from recipes_for_tests import IMAGES, finetune, write_recipe
from rich.console import Console

from finetune.check.check import check
from finetune.errors import UserError
from finetune.model.base import build_without_weights, find_base, make_trainable
from finetune.model.components import count_parameters
from finetune.recipe import load_recipe
from qwenvl import QwenVLImageProcessor, load_model


def write(path, rows, **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "format": "messages", **settings}


def chat(question="Hi", answer="Hello", images=(), **settings):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **settings}]
    return {"messages": turns, "images": list(map(str, images))}


@pytest.fixture
def show(tmp_path):
    """Check a recipe, changed as `write_recipe` takes changes: what is printed, and why training is refused."""

    def run(*, overrides=(), colours=False, samples=3, html=None, images=False, **changes):
        recipe = load_recipe(write_recipe(tmp_path, **changes), overrides)
        printed = io.StringIO()
        looks = {"force_terminal": True, "color_system": "truecolor"} if colours else {}
        console = Console(file=printed, highlight=False, markup=False, emoji=False, soft_wrap=True, **looks)
        refused = ""
        try:
            check(recipe, console=console, samples=samples, html=html, images=images)
        except UserError as error:
            refused = str(error)
        return SimpleNamespace(text=printed.getvalue(), refused=refused, lines=printed.getvalue().splitlines())

    return run


def test_what_is_right_is_shown(show, tmp_path):
    second = write(tmp_path / "second.jsonl", [chat(f"Number {n}") for n in range(6)], weight=2.5)
    train = [{"path": str(tmp_path / "train.jsonl"), "format": "messages"}, second]
    shown = show(data__train=train, evaluate={"data": write(tmp_path / "e.jsonl", [chat()])})
    assert not shown.refused
    assert any(line.startswith("train data  20 of 20 rows, ") for line in shown.lines)
    assert f"14 of 14 {tmp_path / 'train.jsonl'} (messages)" in shown.text
    assert f"6 of 6 {tmp_path / 'second.jsonl'} (messages), x 2.5 = 15 an epoch" in shown.text
    assert "eval data   1 of 1 rows" in shown.text
    # 14 + 6 x 2.5 samples, one at a time, four a step; 8 steps are set.
    assert "epoch       29 samples, " in shown.text
    assert "steps       8 an epoch, 8 in all; 4 samples a step" in shown.text
    assert "forwards    4.0 a step of at most 2,048 tokens, " in shown.text
    adapter = next(line for line in shown.lines if "adapter" in line)
    assert re.search(r"([\d,]+) trained of \1$", adapter)
    bars = shown.lines[shown.lines.index("images of a sample, train data") + 1 :][:3]
    assert [line.split()[:2] for line in bars] == [["0", "11"], ["1", "5"], ["2", "4"]]
    assert bars[0].count("█") > bars[1].count("█") > bars[2].count("█") > 0
    titles = [line for line in shown.lines if re.match(r"(train|eval): ", line)]
    assert [re.search(r"(\w+\.jsonl), row (\d+)", title).groups() for title in titles] == [
        ("train.jsonl", "1"),
        ("second.jsonl", "1"),
        ("e.jsonl", "1"),
    ]


def test_samples_are_the_first_of_each_source_and_then_drawn(show):
    def rows(**settings):
        return re.findall(r"^train: \S+, row (\d+)", show(**settings).text, re.MULTILINE)

    drawn = rows(samples=6)
    assert drawn[0] == "1" and len(set(drawn)) == 6
    assert rows(samples=6) == drawn != rows(samples=6, seed=4)
    assert len(rows(samples=100)) == 14
    assert rows(samples=0) == []


def test_trained_text_is_marked_and_an_image_is_folded(show, tmp_path):
    image = IMAGES[0]
    row = {"messages": [*chat("What?", "This.", [image])["messages"], *chat("And?", "That.")["messages"]]}
    row["images"] = [str(image)]
    folded = f"Picture 1:[image 1: {image.name}, "
    shown = show(data__train=[write(tmp_path / "one.jsonl", [row])])
    sample = "\n".join(line.removeprefix("  │ ") for line in shown.lines if line.startswith("  │ "))
    assert re.fullmatch(
        r"<\|im_start\|>system\nYou are a helpful assistant\.<\|im_end\|>\n<\|im_start\|>user\n"
        + re.escape(folded)
        + r"\d+ tokens\]\nWhat\?<\|im_end\|>\n<\|im_start\|>assistant\n⟦This\.<\|im_end\|>⟧\n"
        r"<\|im_start\|>user\nAnd\?<\|im_end\|>\n<\|im_start\|>assistant\n⟦That\.<\|im_end\|>⟧",
        sample.strip(),
    )
    coloured = show(data__train=[write(tmp_path / "one.jsonl", [row])], colours=True)
    assert "⟦" not in coloured.text
    green = re.findall(r"\x1b\[1;32m([^\x1b]*)\x1b\[0m", coloured.text)
    assert green == ["This.", "<|im_end|>", "That.", "<|im_end|>"]


def test_problems_of_all_parts_are_told_together(show, tmp_path):
    bad = [chat(images=["gone.png"]) for _ in range(30)]
    train = write(tmp_path / "bad.jsonl", [chat(), *bad, chat(answer=" "), chat("Hi " * 3000)])
    missing = {"path": str(tmp_path / "nowhere.jsonl"), "format": "messages"}
    evaluate = {"data": [write(tmp_path / "e.jsonl", [chat(), {"messages": []}]), missing]}
    shown = show(data__train=[train], evaluate=evaluate)
    first, *refusals = shown.refused.splitlines()
    assert first == "a run would stop here:"
    assert [line.split(":")[0] for line in refusals] == ["  train data", "  eval data", "  eval data"]
    assert "31 cannot be used" in refusals[0] and "1 are too long" in refusals[0]
    assert "nowhere.jsonl" in refusals[1] and "1 cannot be used" in refusals[2]
    problems = shown.lines[shown.lines.index("32 problems in the train data") + 1 :]
    assert problems[0].split(" x ") == ["         30", "images[]: there is no file …"]
    assert sum(line.startswith(f"  {tmp_path / 'bad.jsonl'}, row ") for line in problems) == 20
    assert "  ... and 12 more" in problems
    assert "1 problem in the eval data" in shown.text
    # What is right is shown all the same.
    assert f"train: {tmp_path / 'bad.jsonl'}, row 1: " in shown.text


def test_rows_that_are_skipped_are_told_and_refuse_nothing(show, tmp_path):
    train = write(tmp_path / "bad.jsonl", [chat(), chat(answer=" "), {"messages": 3}])
    shown = show(data__train=[train], data__on_bad_row="skip")
    assert not shown.refused
    assert "2 problems in the train data, 2 rows of them skipped (on_bad_row: skip)" in shown.text
    assert "bad.jsonl, row 2, messages[1].content: is blank" in shown.text


def test_shortened_samples_are_shown_shortened(show, tmp_path):
    row = {"messages": chat("FIRST " * 30)["messages"] + chat("SECOND")["messages"]}
    train = write(tmp_path / "long.jsonl", [row])
    shown = show(data__train=[train], data__max_length=100, data__on_long="drop_turns")
    assert "shortened: 1, by 1 turns at the front" in shown.text
    assert "without its first 1 turns" in shown.text
    assert "SECOND" in shown.text and "FIRST" not in shown.text


def test_columns_with_other_names(show, tmp_path):
    rows = [{"picture": str(IMAGES[0]), "ask": "How many?", "reply": ["four", "4"]}]
    columns = {"image": "picture", "question": "ask", "answers": "reply"}
    source = write(tmp_path / "vqa.jsonl", rows, columns=columns) | {"format": "vqa", "prompt": "{question} Short:"}
    shown = show(data__train=[source])
    assert not shown.refused
    assert "How many? Short:" in shown.text and "⟦four<|im_end|>⟧" in shown.text


HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\x9b31m\u202edraob\x00<script>alert(1)</script>\ntrain: fake, row 9"


def test_control_characters_do_not_reach_the_terminal(show, tmp_path):
    file = tmp_path / "evil\x1b[31m.jsonl"
    gone = chat(images=["gone\x1b[2J\n.png"])
    train = write(file, [chat(HOSTILE, HOSTILE), gone, chat(HOSTILE, answer="")])
    for colours in (False, True):
        shown = show(data__train=[train], data__on_bad_row="skip", colours=colours)
        plain = re.sub(r"\x1b\[[\d;]*m", "", shown.text) if colours else shown.text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", plain)
        assert "a␛[2J␛]0;title␇b␍c" in plain and "evil␛[31m.jsonl" in plain
        # Lines of the data stay within the sample.
        assert not re.search(r"^train: fake", plain, re.MULTILINE)
    refused = show(data__train=[train]).refused
    assert refused and "\x1b" not in refused


def test_the_page_shows_the_same_and_data_is_text_in_it(show, tmp_path):
    grounded = chat("Where?", "<ref>it</ref><box>(100,100),(900,900)</box>", [IMAGES[0]], grounding=True)
    train = write(tmp_path / "t.jsonl", [chat(HOSTILE, "Yes <b>&"), grounded, chat(images=["<i>gone</i>.png"])])
    file = tmp_path / "pages" / "check.html"
    plain = write(tmp_path / "p.jsonl", [chat("Where?", "There", [IMAGES[0]])])
    show(data__train=[train, plain], data__on_bad_row="skip", samples=4, html=file)
    page = file.read_text()
    assert "<script" not in page.replace("&lt;script", "") and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<mark>Yes &lt;b&gt;&amp;<code" in page
    assert "&lt;i&gt;gone&lt;/i&gt;" in page and "<i>" not in page
    assert "\x1b" not in page and "\x00" not in page
    assert page.count("<svg") >= 2 and "ready to train" in page
    pictures = re.findall(r'src="(data:image/jpeg;base64,[^"]+)"', page)
    assert len(pictures) == 4 and pictures[0] != pictures[2], "the boxes are drawn on one of them"
    assert pictures[1] == pictures[3], "and not on what the model gets"


def test_a_page_that_cannot_be_written_is_told_first(show, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for html, reason in [
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "check.html", "file is a file"),
        (tmp_path / "dangling", "is a symbolic link to nowhere, which does not exist"),
        (tmp_path / ("x" * 240), "the name is too long"),
    ]:
        shown = show(html=html)
        assert shown.refused.startswith(f"cannot write the page to {html}: ") and reason in shown.refused
        assert shown.refused.endswith("with --html") and not shown.text


def test_images_are_opened_when_asked(show, tmp_path):
    good = encode(Image.new("RGB", (8, 8)))
    for name, data in {"good.png": good, "cut.png": good[:40], "text.png": b"no image at all"}.items():
        (tmp_path / name).write_bytes(data)
    rows = [chat(images=["good.png"]), chat(images=["good.png", "cut.png"]), chat(images=["text.png"])]
    settings = {"data__train": [write(tmp_path / "t.jsonl", rows)], "data__images_root": str(tmp_path)}
    shown = show(**settings, images=True)
    assert "train data: of 3 samples, 2 have images that cannot be decoded" in shown.refused
    assert "3 images opened in 0s, " in shown.text and "; 2 cannot be decoded" in shown.text
    assert re.search(r"t\.jsonl, row 2, images\[1\]: cannot be decoded: ", shown.text)
    assert re.search(r"t\.jsonl, row 3, images\[0\]: cannot be decoded: ", shown.text)


def test_a_wrong_target_is_told_with_the_data(show, tmp_path):
    shown = show(adapter__targets=["no_such_layer"], data__train=[write(tmp_path / "t.jsonl", [chat(answer="")])])
    assert "model: adapter.targets: 'no_such_layer' matches nothing" in shown.refused
    assert "train data: of 1 samples, 1 cannot be used" in shown.refused


def test_text_alone_for_the_vision_side_is_refused(show, tmp_path):
    settings = {"adapter": None, "freeze": {"vision": False, "language": True}}
    shown = show(**settings, data__train=[write(tmp_path / "t.jsonl", [chat()])])
    assert "model: only the vision side is trained, and 1 of the samples have no image" in shown.refused


SETTINGS = [
    [],
    ["adapter.train_embeddings=true"],
    ["adapter.vision_targets=[in_proj, c_fc]", "adapter.dora=true"],
    ["freeze.resampler=false"],
    ["freeze.vision=false", "adapter.init=pissa"],
    ["adapter=null", "freeze.language=false"],
    ["adapter=null", "freeze.vision=false", "freeze.resampler=false"],
]


@pytest.mark.parametrize("overrides", SETTINGS, ids=lambda overrides: ",".join(overrides) or "lora")
def test_parameters_are_counted_as_in_the_loaded_model(tmp_path, overrides):
    recipe = load_recipe(write_recipe(tmp_path), overrides)
    base = find_base(recipe.model)
    empty = build_without_weights(recipe, base)
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = make_trainable(load_model(recipe.model.path), recipe)
    counted = count_parameters(empty)
    assert counted == count_parameters(loaded)
    assert any(count.trained for count in counted.values())
    names = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in empty.named_parameters() if parameter.requires_grad} == names


@pytest.mark.parametrize(("chat_format", "trained"), [("raw", True), ("chatml", False)])
def test_auto_reads_the_checkpoints_own_settings(tmp_path, tiny_folder, chat_format, trained):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in ("config.json", "qwen.tiktoken", "tokenizer_config.json", "model.safetensors"):
        (folder / file).write_bytes((tiny_folder / file).read_bytes())
    settings = json.loads((tiny_folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"chat_format": chat_format}))
    recipe = load_recipe(write_recipe(tmp_path, model__path=str(folder)))
    counted = count_parameters(build_without_weights(recipe, find_base(recipe.model)))
    assert bool(counted["embeddings"].trained) is trained


def test_the_command_refuses_with_exit_code_2(tmp_path):
    train = write(tmp_path / "bad.jsonl", [chat(), chat(answer="")])
    recipe = write_recipe(tmp_path, data__train=[train], evaluate={"data": train})
    done = finetune("check", recipe, "--samples", "1", check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "⟦Hello<|im_end|>⟧" in done.stdout and "\x1b" not in done.stdout
    assert "row 2, messages[1].content: is blank" in done.stdout
    assert done.stderr.count("1 cannot be used") == 2 and "Traceback" not in done.stderr


def test_tokens_are_told_from_text_and_trained_from_context(show, tmp_path):
    turns = [*chat("Say <|im_end|>.", "Yes.", loss=False)["messages"], *chat("And?", "No <|im_end|>.")["messages"]]
    row = {"messages": turns, "images": [str(IMAGES[0])], "notes": "x"}
    shown = show(
        data__train=[write(tmp_path / "one.jsonl", [row])],
        data__markup_as_text=["<|im_end|>"],
        html=tmp_path / "page.html",
    )
    assert "  │ ‹context: Yes.›<|im_end|>" in shown.lines
    assert "  │ ⟦No ‹<|im_end|> as text›.<|im_end|>⟧" in shown.lines
    for line in (
        "  not read: notes",
        "  context, marked in the row as untrained: 1 reply",
        "  trained as words (data.markup_as_text): <|im_end|>",
    ):
        assert line in shown.lines
        assert line.strip().replace("<|im_end|>", "&lt;|im_end|&gt;") in (tmp_path / "page.html").read_text()
    page = (tmp_path / "page.html").read_text()
    assert '<span class="note">context, not trained</span>Yes.</span>' in page
    spelled = '<span class="spelled">&lt;|im_end|&gt;<span class="note">as text</span></span>'
    assert f'<mark>No {spelled}.<code class="token">&lt;|im_end|&gt;</code></mark>' in page
    assert page.count(spelled) == 2


def test_dropped_turns_clamped_boxes_and_images_are_named(show, tmp_path):
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "FIRST " * 30}]}
    box = chat("Where?", "<ref>it</ref><box>(1,2),(1000,4)</box>")["messages"]
    row = {"messages": [first, chat()["messages"][1], *box], "images": [str(IMAGES[0])]}
    shown = show(
        data__train=[write(tmp_path / "long.jsonl", [row])],
        data__max_length=100,
        data__on_long="drop_turns",
        data__grounding=True,
        data__box_edge="clamp",
    )
    assert "  left out for its length (on_long: drop_turns): its first turn, and with them 1 image" in shown.lines
    assert "  coordinates of 1000 are read as 999 (data.box_edge: clamp)" in shown.lines


def test_images_are_shown_as_the_model_gets_them(show, tmp_path):
    source = write(tmp_path / "one.jsonl", [chat(images=[IMAGES[0]])])
    show(data__train=[source], html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r"<figcaption>(?!<)(.*?)</figcaption>", page) == [
        IMAGES[0].name,
        "as the model gets it: 112 x 112",
    ]
    show(data__train=[source], data__views={"grid": [1, 2]}, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r"<figcaption>(?!<)(.*?)</figcaption>", page)[1:] == [
        "as the model gets it: 112 x 112",
        "part 1 of 1 x 2, as the model gets it: 112 x 112",
        "part 2 of 1 x 2, as the model gets it: 112 x 112",
    ]
    # What is shown is what the processor makes of it, but for the last bits that JPEG loses.
    first = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)[1]
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))), int)
    wanted = np.asarray(QwenVLImageProcessor(112, do_normalize=False)(IMAGES[0], return_tensors="np").pixel_values[0])
    assert np.abs(seen.transpose(2, 0, 1) - wanted).mean() < 4
