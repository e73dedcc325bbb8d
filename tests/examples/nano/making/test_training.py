"""The making of the nano checkpoint: its vocabulary, the symbols of pages, its first weights, the warm starts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.nano.making import ablation, scores
from examples.nano.making.__main__ import DATA, RECIPES, STAGES, WORK, finished
from examples.nano.making.arithmetic import autocast, matrix_dtype
from examples.nano.making.checkpoint import at_resolution, mix, publish, put_together
from examples.nano.making.documents.conversations import Conversation
from examples.nano.making.documents.document import make_document
from examples.nano.making.documents.families import HELD_OUT, LARGE
from examples.nano.making.documents.write import Plan, conversations_of
from examples.nano.making.optimizer import MuonAndAdamW
from examples.nano.making.page_symbols import (
    LETTERS,
    PARTS,
    SLOTS,
    WIDTHS,
    page_features,
    page_symbols,
    symbol_features,
)
from examples.nano.making.scores import Scored, score, table
from examples.nano.making.start import PLACE_CHANNELS, WIDTH, look_ahead, nano_config, place_weights, write_start
from examples.nano.making.texts import asked_texts
from examples.nano.making.vocabulary import RANKS, train_vocabulary
from examples.nano.making.warm_start import language, vision
from examples.nano.making.warm_start.dense_page import dense_page
from finetune.model.components import component_of
from finetune.recipe import load_recipe
from qwenvl import QwenVLForConditionalGeneration, load_model, load_processor
from qwenvl.model.resampler import resize_grid
from qwenvl.text.chat import DEFAULT_SYSTEM
from qwenvl.text.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "start"
    write_start(folder, train_vocabulary(asked_texts(40)), seed=0)
    return folder


def test_merges_are_the_most_frequent_pairs_and_never_cross_words():
    vocabulary = Vocabulary(train_vocabulary(["abab abab cd"] * 3, ranks=259))
    # Pieces are "abab", " abab", " cd": "ab" comes 12 times, then "abab" 6 times, then " c", "cd" and " abab" 3 times.
    assert vocabulary.token_bytes[256:259] == [b"ab", b"abab", b" abab"]
    assert vocabulary.encode("abab cd", ()) == [257, 32, 99, 100]


def test_the_same_texts_give_the_same_vocabulary():
    texts = list(asked_texts(20))
    assert train_vocabulary(texts) == train_vocabulary(reversed(texts))
    assert not any("<box>" in text for text in texts)


def test_what_every_conversation_has_is_one_token_a_word(start):
    processor = load_processor(str(start))
    encode = processor.tokenizer.encode
    assert [len(encode(text)) for text in ("system", "user", "assistant", "\n")] == [1, 1, 1, 1]
    assert len(encode(DEFAULT_SYSTEM)) == 6


@pytest.mark.parametrize("family", ["words", "form", "table", "chart"])
def test_every_letter_is_a_symbol_of_the_patch_it_stands_in(family):
    for index in range(10):
        page = make_document(family, seed=5, split="train", index=index, difficulty=0.0)
        printed = sorted(letter for line in page.lines for letter in line if letter != " ")
        assert sorted(letter for letter, _, _ in page.letters) == printed
        symbols = page_symbols(page)
        read = [LETTERS[number - 1] for number in symbols[:, :SLOTS].flatten() if number]
        # Narrow letters may share a quarter of a patch; hardly any is lost.
        assert len(read) >= 0.97 * len(printed)
        for letter, x, y in page.letters:
            patch = symbols[int(y // 14) * 10 + int(x // 14)]
            assert any(patch[:SLOTS]), (letter, x, y)


def test_letters_stand_where_their_ink_is():
    page = make_document("words", seed=5, split="train", index=3, difficulty=0.0)
    grey = np.asarray(page.image.convert("L"), np.int16)
    paper = np.median(grey)
    for letter, x, y in page.letters:
        if letter not in ".,-:'":
            around = grey[int(y) - 6 : int(y) + 7, max(int(x) - 3, 0) : int(x) + 4]
            assert np.abs(around - paper).max() > 60, letter


def test_features_tell_every_symbol_of_every_part_apart():
    tables = symbol_features(WIDTH)
    for name, symbols in zip(PARTS, tables, strict=True):
        assert not symbols[0].any()
        distances = torch.cdist(symbols, symbols) + 100 * torch.eye(len(symbols))
        assert distances.min() > 0.2, name
    # Parts have channels of their own, so that features of several are read one by one.
    used = torch.stack([symbols.abs().sum(0) > 0 for symbols in tables])
    assert used.sum(0).max() == 1
    assert used.sum() == sum(WIDTHS.values()) - WIDTHS["place"] == WIDTH - WIDTHS["place"]
    symbols = torch.tensor([[1] * len(PARTS), [0] * len(PARTS)])
    features = page_features(symbols, tables, torch.eye(2)[:1])
    assert torch.equal(features[0, : -WIDTHS["place"]], sum(one[1] for one in tables)[: -WIDTHS["place"]])


def test_features_of_a_row_are_alike_in_their_place():
    symbols = torch.zeros(100, len(PARTS), dtype=torch.int64)
    places = page_features(symbols, symbol_features(WIDTH), torch.eye(100))[:, -WIDTHS["place"] :]
    row, column = places.reshape(10, 10, 2, -1).unbind(2)
    assert torch.equal(row[3, 0], row[3, 9]) and torch.equal(column[0, 3], column[9, 3])
    assert torch.cdist(places, places).add(torch.eye(100)).min() > 0.3


def test_the_adapter_first_looks_straight_ahead():
    model = QwenVLForConditionalGeneration(nano_config(400))
    resampler = model.transformer.visual.attn_pool
    look_ahead(resampler)
    own = place_weights(resampler, 100)
    assert own.diagonal().min() > 0.9
    # At the lower resolution the nearest of 8 x 8 patches.
    low = place_weights(resampler, 64).argmax(-1).reshape(10, 10)
    assert low[0, 0] == 0
    assert low[9, 9] == 63
    assert low[0, 9] == 7
    # And what is there comes through, whatever it is.
    patches = torch.randn(2, 100, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        normal = torch.nn.functional.layer_norm(patches, (WIDTH,))
        likeness = torch.nn.functional.cosine_similarity(resampler(patches), normal, dim=-1)
    assert likeness.median() > 0.9


def test_a_start_is_a_checkpoint_of_the_published_layout(start):
    model = load_model(str(start))
    assert 4e6 < model.num_parameters() < 5e6
    processor = load_processor(str(start))
    assert processor.tokenizer.image_token_id == model.config.image_token_id == RANKS + 216
    assert model.generation_config.chat_format == "chatml"


def test_patches_know_their_places_and_see_ink_not_paper(start):
    visual = load_model(str(start), dtype=torch.float32).transformer.visual
    codes = torch.nn.functional.normalize(resize_grid(visual.positional_embedding, patches=100), dim=-1)
    likeness = (codes @ codes.T).unflatten(0, (10, 10)).unflatten(-1, (10, 10))
    patch = likeness[4, 4]
    assert patch[4, 4] > patch[4, 5] > patch[4, 6] and patch[4, 4] > patch[5, 4] > patch[6, 4]
    # The same step is the same turn of the code, wherever it begins.
    assert (likeness[4, 4, 4, 5] - likeness[7, 2, 7, 3]).abs() < 0.02
    with torch.no_grad():
        paper = visual.conv1(torch.full((1, 3, 140, 140), 1.9))
        ink = visual.conv1(torch.randn(1, 3, 140, 140, generator=torch.Generator().manual_seed(0)))
    assert paper.abs().max() < 1e-4 and 0.5 < ink[:, PLACE_CHANNELS:].std() < 10


def test_a_dense_page_shows_more_letters_than_documents_do():
    pages = [dense_page(f"page {number}", 140, 0.0) for number in range(8)]
    documents = [make_document("form", seed=5, split="train", index=index) for index in range(8)]
    assert sum(len(page.letters) for page in pages) > 1.5 * sum(len(page.letters) for page in documents)
    again = dense_page("page 0", 140, 0.0)
    assert again.letters == pages[0].letters and again.image.tobytes() == pages[0].image.tobytes()
    assert {letter for page in pages for letter, _, _ in page.letters} <= set(LETTERS)
    for page in pages:
        assert all(0 <= x < 140 and 0 <= y < 140 for _, x, y in page.letters)


def test_weights_that_were_updated_are_used_within_one_context():
    linear, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with autocast(torch.device("cpu")):
        before = linear(x)
        assert before.dtype == matrix_dtype(torch.device("cpu"))
        with torch.no_grad():
            linear.weight += 1
        assert (linear(x) - before).min() > 3


def stopped_after(monkeypatch, module, steps):
    """Make a warm start end as if killed, after its state of `steps` was saved."""
    save = module.save_state

    def save_then_stop(path, state):
        save(path, state)
        if state.get("step") == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_state", save_then_stop)


@pytest.mark.parametrize("module, warm", [(vision, "warm_vision"), (language, "warm_language")])
def test_a_warm_start_learns_and_goes_on_where_it_was_stopped(module, warm, start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    monkeypatch.setattr("examples.nano.making.warm_start.progress.SECONDS", 0.0)
    monkeypatch.setattr(module, "LOW_EVERY", 3)
    for name in ("BATCH", "DOCUMENTS"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, 2)
    run = getattr(module, warm)
    run(start, tmp_path / "whole.pt", 5, 0)
    first, *_, last = [float(line.split()[4]) for line in capsys.readouterr().out.splitlines()]
    assert last < first
    with monkeypatch.context() as patched:
        stopped_after(patched, module, 2)
        with pytest.raises(KeyboardInterrupt):
            run(start, tmp_path / "parts.pt", 5, 0)
    run(start, tmp_path / "parts.pt", 5, 0)
    whole, parts = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "parts.pt")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_language_model_transcribes_before_it_answers(start, tmp_path, monkeypatch):
    asked = []

    def conversations_of(plan, index):
        made = conversations_of_plan(plan, index)
        asked.append((made[0].kind, len(made[0].messages)))
        return made

    conversations_of_plan = language.conversations_of
    monkeypatch.setattr(language, "conversations_of", conversations_of)
    monkeypatch.setattr(language, "DOCUMENTS", 2)
    monkeypatch.setattr(language, "READING", 0.5)
    language.warm_language(start, tmp_path / "language.pt", 6, 0)
    assert asked[:6] == [("transcribe", 2)] * 6  # one question and its answer
    assert max(turns for _, turns in asked[6:]) > 2


def test_parts_are_put_together_resized_and_published(start, tmp_path):
    model = load_model(str(start))
    torch.manual_seed(1)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    vision = {name: value for name, value in state.items() if ".visual." in name}
    language = {name: value for name, value in state.items() if ".visual." not in name}
    torch.save(vision, tmp_path / "vision.pt")
    torch.save(language, tmp_path / "language.pt")
    put_together(start, [tmp_path / "vision.pt", tmp_path / "language.pt"], 112, tmp_path / "low")
    at_resolution(tmp_path / "low", 140, tmp_path / "high")
    publish(tmp_path / "high", tmp_path / "done", {"stage1": 3.0})
    assert load_processor(str(tmp_path / "low")).image_processor.size == {"height": 112, "width": 112}
    done = load_model(str(tmp_path / "done"), dtype="auto")
    assert done.dtype == torch.bfloat16
    assert load_processor(str(tmp_path / "done")).image_processor.size == {"height": 140, "width": 140}
    for name, value in done.state_dict().items():
        assert torch.equal(value.float(), state[name].to(torch.bfloat16).float()), name


def test_weights_are_mixed_part_of_the_way_back(start, tmp_path):
    model = load_model(str(start), dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    model.save_pretrained(tmp_path / "after")
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copy(start / name, tmp_path / "after" / name)
    mix(start, tmp_path / "after", 0.25, tmp_path / "mixed")
    mixed = load_model(str(tmp_path / "mixed"), dtype=torch.float32)
    for name, parameter in mixed.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] + 0.75)


def test_replies_are_scored_by_kind():
    plan = Plan("test", ("form",), ("transcribe", "question", "ground"), 1, per_image=3)
    made = {one.kind: one for one in conversations_of(plan, 0)}
    answer = made["question"].answers[0]
    assert score(made["question"], answer) == {"anls": 1.0, "exact": 1.0}
    assert score(made["ground"], made["ground"].answers[0]) == {"iou 0.5": 1.0}
    assert score(made["ground"], "<box>(0,0),(1,1)</box>") == {"iou 0.5": 0.0}
    text = made["transcribe"].answers[0]
    assert score(made["transcribe"], text[:-2]) == {"errors": 2, "characters": len(text)}
    pair = Conversation("two_images", [], (), ["3 and 5: Picture 2"])
    assert score(pair, "3 and 5: Picture 2") == {"anls": 1.0, "exact": 1.0, "choice": 1.0}
    assert score(pair, "4 and 5: Picture 2")["exact"] == 0.0
    choices = [score(pair, said)["choice"] for said in ("4 and 5: Picture 2", "3 and 5: Picture 1", "5")]
    assert choices == [1.0, 0.0, 0.0]
    shown = table([Scored(one, reply, score(one, reply)) for one, reply in ((made["transcribe"], text[:-2]),)])
    assert f"| transcribe | 1 |  |  |  | {2 / len(text):.1%} |  |" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["x", "--families", "forms"], "no family 'forms'"),
        (["x", "--families", "shapes", "--kinds", "question"], "shapes has none of question"),
    ],
)
def test_wrong_arguments_of_the_scores_are_told(arguments, told, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["scores", *arguments])
    with pytest.raises(SystemExit) as stopped:
        scores.main()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_a_row_of_the_ablation_has_means_by_kind():
    def scored(kind, reply, answer):
        conversation = Conversation(kind, [], (), [answer])
        return Scored(conversation, reply, score(conversation, reply))

    said = [
        scored("question", "12.40", "12.40"),
        scored("question", "xx", "12.40"),
        scored("two_turn", "Ada", "Ada"),
        scored("two_images", "8 and 9: Picture 1", "7 and 5: Picture 1"),
        scored("two_images", "7 and 5: Picture 2", "7 and 5: Picture 1"),
        scored("two_images", "19:00", "19:00"),
        scored("transcribe", "abcx", "abcd"),
    ]
    assert ablation.row("after", said) == "| after | 0.500 | 1.000 | 1.000 | 0.500 | 25.0% |"


def test_components_are_trained_at_rates_of_their_own(start):
    named = list(load_model(str(start)).named_parameters())
    optimizer = MuonAndAdamW(named, 1e-3, {"vision": 1e-4, "resampler": 3e-4, "language": None})
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rates) == len(named)
    for name, parameter in named:
        assert rates[parameter] == {"vision": 1e-4, "resampler": 3e-4}.get(component_of(name), 1e-3), name


def test_stages_train_on_what_is_made_for_them_and_follow_each_other():
    recipes = [load_recipe(RECIPES / f"{name}.yaml") for name in STAGES]
    assert sorted(STAGES) == list(STAGES) == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert {source.path for recipe in recipes for source in recipe.data.train} == {
        *(str(WORK / "data" / name / "train") for name in DATA),
        str(WORK / "data" / "stage2-comparisons.jsonl"),
    }
    assert [Path(recipe.model.path) for recipe in recipes] == [WORK / "warm", finished("stage1"), finished("stage2")]
    assert [Path(recipe.output) for recipe in recipes] == [WORK / f"stage{number}" for number in (1, 2, 3)]
    trained = [[part for part in ("vision", "resampler", "language") if not getattr(r.freeze, part)] for r in recipes]
    assert trained == [["vision", "resampler"], ["vision", "resampler", "language"], ["resampler", "language"]]


def test_no_stage_sees_what_is_held_out():
    assert not {family for plan in DATA.values() for family in plan.families} & {*HELD_OUT, *LARGE}


def test_a_page_is_asked_about_in_one_conversation():
    plan = Plan("train", ("form",), ("transcribe", "question", "two_images"), 6, per_image=4, joined=1.0)
    for index in range(plan.count):
        joined, *apart = conversations_of(plan, index)
        assert joined.kind == "joined"
        assert all(len(one.documents) == 2 for one in apart)
        images = [part["type"] for message in joined.messages for part in message["content"]].count("image")
        assert images == 1
        assert [message["role"] for message in joined.messages] == ["user", "assistant"] * (len(joined.messages) // 2)
        assert joined.answers[0].count("\n") > 1  # the transcription comes last


def test_two_pages_are_asked_about_in_one_conversation():
    plan = Plan("train", ("receipt",), ("two_images",), 6, per_image=4, joined=1.0)
    for index in range(plan.count):
        (joined,) = conversations_of(plan, index)
        assert joined.kind == "joined" and len(joined.documents) == 2
        assert [part["type"] for message in joined.messages for part in message["content"]].count("image") == 2
        assert [message["role"] for message in joined.messages] == ["user", "assistant"] * 4
