"""The nano's comparisons in text: true, in the form of those about two pages, and trained on."""

import re

from examples.nano.making.comparisons import TURNS, conversation, write_comparisons
from finetune.data.checks.checking import check_samples
from finetune.data.samples import Samples
from finetune.recipe import Source

UNITS = {"kg": 1000.0, "g": 1.0, "lb": 453.6, "t": 1e6}


def amount(text: str) -> float:
    """What a printed value is worth, read from it anew."""
    number = float(re.search(r"\d+(?:[.,]\d+)?", text)[0].replace(",", "."))
    return number * UNITS.get(text.split()[-1], 1.0)


def test_the_picture_that_has_more_is_named():
    chosen = []
    for index in range(40):
        messages = conversation(f"0/{index}")
        assert len(messages) == 2 * TURNS
        for asked, said in zip(messages[::2], messages[1::2], strict=True):
            one, two, number = re.fullmatch(r"(.+) and (.+): Picture ([12])", said["content"]).groups()
            assert re.fullmatch(rf"{re.escape(one)} or {re.escape(two)}: which is (higher|larger)\?", asked["content"])
            assert (amount(one) > amount(two)) == (number == "1"), said
            chosen.append(number)
    assert 0.4 < chosen.count("1") / len(chosen) < 0.6


def test_rows_are_trained_on(tmp_path, published_tokenizer):
    write_comparisons(6, tmp_path / "deep" / "rows.jsonl", seed=3)
    source = Source(path=str(tmp_path / "deep" / "rows.jsonl"), format="messages")
    found = check_samples(Samples([source]), published_tokenizer, max_length=2048)
    assert len(found.kept) == found.total == 6
    assert not found.images.any()
    before = (tmp_path / "deep" / "rows.jsonl").read_bytes()
    write_comparisons(6, tmp_path / "again.jsonl", seed=3)
    assert (tmp_path / "again.jsonl").read_bytes() == before
