"""`finetune evaluate --data FILE` reads what a recipe reads: other encodings and delimiters, also of the examples."""

import argparse

import pytest
from recipes_for_tests import TINY

from finetune.commands import evaluate as command
from finetune.data.sample import DataError
from finetune.data.sources.sources import read_source
from finetune.errors import UserError

BILL, GOLD = "\u53d1\u7968", "\u91d1\u989d"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The `Evaluation` that a command line makes, with its files in a folder."""
    made = []
    monkeypatch.setattr("finetune.evaluation.evaluate.evaluate", made.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_bytes(f"image;question;answers\na.png;{BILL};{GOLD}\n".encode("gbk"))
    (tmp_path / "shots.csv").write_text("image;question;answers\n")
    (tmp_path / "shots.jsonl").write_bytes(f'{{"question": "{BILL}"}}\n'.encode("gbk"))
    (tmp_path / "bar.csv").write_text("image;x|question|answers\na.png|Q; or|A\n")

    def run(*words):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        command.run(parser.parse_args([str(TINY), "--task", "docvqa", "--data", *words]))
        return made.pop()

    return run


def test_an_encoding_and_a_delimiter(asked):
    (source,) = asked("data.csv", "--encoding", "gbk").sources
    assert list(read_source(source)) == [{"image": "a.png", "question": BILL, "answers": GOLD}]
    with pytest.raises(DataError, match=r"data.csv: byte .* is not UTF-8"):
        read_source(asked("data.csv").sources[0])
    (source,) = asked("bar.csv", "--delimiter", "|").sources
    assert read_source(source)[0] == {"image;x": "a.png", "question": "Q; or", "answers": "A"}
    assert asked("data.csv", "--delimiter", r"\t").sources[0].delimiter == "\t"


def test_solved_examples_are_read_like_the_data(asked):
    words = "data.csv", "--encoding", "gbk", "--delimiter", ";", "--style", "base", "--shots", "1", "--shots-from"
    examples = asked(*words, "shots.csv").shots_from
    assert (examples.encoding, examples.delimiter) == ("gbk", ";")
    examples = asked(*words, "shots.jsonl").shots_from
    assert (examples.encoding, examples.delimiter) == ("gbk", None), "JSON has no delimiter"
    assert read_source(examples)[0] == {"question": BILL}
    examples = asked(*words, "lmms-lab/DocVQA:validation").shots_from
    assert (examples.split, examples.encoding, examples.delimiter) == ("validation", None, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--encoding", "guess"], "--encoding guess: it is not known; write its common name"),
        (["--encoding", "base64"], "--encoding base64: it is not known"),
        (["--delimiter", "||"], "--delimiter '||': give the one character"),
        (["--delimiter", '"'], "give the one character that is between the fields"),
        (["--layout", "coco", "--encoding", "gbk"], "--layout says how its file is read"),
    ],
)
def test_what_cannot_be(asked, words, said):
    with pytest.raises(UserError) as caught:
        asked("data.csv", *words)
    assert said in str(caught.value)


def test_a_recipe_says_it_itself(asked, tmp_path):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(UserError, match="--recipe says what is asked, and so does --encoding"):
        command.run(parser.parse_args([str(TINY), "--recipe", str(tmp_path / "r.yaml"), "--encoding", "gbk"]))
