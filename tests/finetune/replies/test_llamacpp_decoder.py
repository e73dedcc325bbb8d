"""Rows on llama.cpp: the replies of PyTorch, common prefixes computed once, and never more cells than there are."""

import pytest
import torch
from gguf_for_tests import UNAVAILABLE, exported, pages, replies

from finetune.errors import UserError
from finetune.llamacpp.language_model import LanguageModel
from finetune.replies.decoder import PromptRow
from finetune.replies.gguf_model import gguf_use, open_gguf
from finetune.replies.llamacpp_decoder import LlamaCppDecoder
from qwenvl.errors import InputError

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


@pytest.fixture
def model(request):
    """The nano checkpoint's export, opened for 4 rows and as many tokens as the test's marker says."""
    folder, use = gguf_use(exported())
    opened = open_gguf(folder, use, rows=4, tokens=getattr(request, "param", None), threads=1)
    yield opened
    opened.language.close()


@pytest.fixture
def computed(monkeypatch):
    """How many positions each call of llama.cpp computed."""
    counts = []
    decode = LanguageModel._decode

    def counted(self, length, at, **values):
        logits = decode(self, length, at, **values)
        counts.append(length)
        return logits

    monkeypatch.setattr(LanguageModel, "_decode", counted)
    return counts


@pytest.mark.parametrize("at_once", [1, 3])
def test_replies_are_those_of_pytorch(model, at_once):
    asked = pages(6)
    found = replies(model.decoder, model.tokenizer, model.stop_ids, [page.row for page in asked], at_once)
    assert found == [page.reply for page in asked]
    assert len({tuple(reply) for reply in found}) > 3


def test_its_own_vision_side_gives_the_same_replies(model):
    page = pages(6)[1]
    row = PromptRow(page.ids, list(model.encode(page.pixels)), ["page"])
    assert replies(model.decoder, model.tokenizer, model.stop_ids, [row], 1) == [page.reply]


def test_a_prefix_is_computed_once(model, computed):
    """Of a live row, and of one that has left; the logits are the same."""
    page = pages(1)[0]
    (first,), logits = model.decoder.join([page.row])
    assert sum(computed) == len(page.ids)
    computed.clear()
    (second,), again = model.decoder.join([page.row])
    assert computed == [1]
    torch.testing.assert_close(again, logits, atol=0.02, rtol=0)
    model.decoder.step({first: 5, second: 6})
    model.decoder.leave([first, second])
    computed.clear()
    # The next turn of the first: its prompt, its reply, and three more tokens.
    longer = PromptRow([*page.ids, 5, 7, 8, 9], page.row.features, page.row.image_keys)
    _, logits = model.decoder.join([longer])
    assert computed == [3]
    with LanguageModel(model.folder.language, cells=512, sequences=1, threads=1) as alone:
        _, expected = LlamaCppDecoder(alone, model.config, rows=1, sequences=1).join([longer])
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0)


def test_equal_tokens_with_another_image_share_only_what_is_before_it(model, computed):
    page, other = pages(2)
    model.decoder.join([page.row])
    computed.clear()
    row = PromptRow(page.ids, list(other.features), [other.image])
    before = page.ids.index(model.config.image_start_id) + 1
    _, logits = model.decoder.join([row])
    assert sum(computed) == len(page.ids) - before
    # Images without keys are nobody's.
    computed.clear()
    _, unknown = model.decoder.join([PromptRow(page.ids, list(other.features))])
    assert sum(computed) == len(page.ids) - before
    torch.testing.assert_close(unknown, logits, atol=0.02, rtol=0)


@pytest.mark.parametrize("model", [256], indirect=True)
def test_cells_are_used_to_the_last_and_no_further(model):
    decoder = model.decoder
    assert decoder.most_tokens == 256
    (first,), _ = decoder.join([PromptRow(range(100))])
    (second,), _ = decoder.join([PromptRow([*range(100), *range(300, 400)])])  # shares 100 cells
    with pytest.raises(torch.OutOfMemoryError, match="256 tokens of memory, 200 are in use, and 57 more are needed"):
        decoder.join([PromptRow(range(600, 657))])
    (third,), _ = decoder.join([PromptRow(range(600, 655))])
    with pytest.raises(torch.OutOfMemoryError, match="255 are in use, and 3 more"):
        decoder.step({first: 1, second: 2, third: 3})
    decoder.leave([second])
    # What it alone has is given up; the cells that it shares stay.
    logits = decoder.step({first: 1, third: 3})
    with LanguageModel(model.folder.language, cells=256, sequences=1, threads=1) as alone:
        _, expected = LlamaCppDecoder(alone, model.config, rows=1, sequences=1).join([PromptRow([*range(100), 1])])
    torch.testing.assert_close(logits[:1], expected, atol=0.02, rtol=0)
    decoder.join([PromptRow(range(500, 599))])  # 157 are in use


@pytest.mark.parametrize("model", [256], indirect=True)
def test_a_prompt_that_does_not_fit_leaves_the_others_as_they_were(model):
    decoder = model.decoder
    (kept,), _ = decoder.join([PromptRow(range(60))])
    with pytest.raises(torch.OutOfMemoryError):
        decoder.join([PromptRow(range(100, 200)), PromptRow(range(300, 450))])
    _, (logits, _) = decoder.join([PromptRow(range(100, 200)), PromptRow(range(300, 390))])
    decoder.step({kept: 4, kept + 2: 5, kept + 3: 6})
    assert logits.isfinite().all()


def test_rows_come_and_go_beyond_the_sequences(model):
    """With more rows than sequences, over time, the oldest that are kept make room."""
    live = []
    for number in range(30):
        if len(live) == 4:
            model.decoder.leave([live.pop(0)])
        (row,), _ = model.decoder.join([PromptRow([number, 7, 8, 9])])
        live.append(row)
    assert live == [26, 27, 28, 29]
    with pytest.raises(torch.OutOfMemoryError, match="opened for 4 rows"):
        model.decoder.join([PromptRow([1, 2])])


def test_with_as_many_sequences_as_rows_a_kept_one_goes_on(model):
    with LanguageModel(model.folder.language, cells=256, sequences=1, threads=1) as alone:
        decoder = LlamaCppDecoder(alone, model.config, rows=1, sequences=1)
        (row,), _ = decoder.join([PromptRow(range(50))])
        decoder.leave([row])
        _, found = decoder.join([PromptRow([*range(30), 5, 6])])
    _, expected = model.decoder.join([PromptRow([*range(30), 5, 6])])
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_what_it_cannot_do_is_refused(model):
    page = pages(1)[0]
    with pytest.raises(UserError, match=r"llama.cpp runs no adapters, and contracts is one"):
        model.decoder.join([PromptRow(page.ids, page.row.features, adapter="contracts")])
    with pytest.raises(UserError, match=r"the prompt has 2,049 tokens, and llama\.cpp takes 2,048"):
        model.decoder.join([PromptRow([1] * 2049)])
    with pytest.raises(InputError, match=r"1 whole image span\(s\), and features of 0"):
        model.decoder.join([PromptRow(page.ids)])
    (row,), _ = model.decoder.join([PromptRow([1] * 2048)])
    with pytest.raises(UserError, match=r"have 2,048 tokens: llama\.cpp takes no more"):
        model.decoder.step({row: 1})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "equal"), [("f16", 100), ("q8_0", 98), ("q4_k_m", 97), ("q4_0", 90)])
def test_replies_to_a_hundred_pages(kind, equal):
    """Measured: f16 100 of 100, q8_0 99, q4_k_m 99, q4_0 94."""
    folder, use = gguf_use(exported(kind))
    model = open_gguf(folder, use, rows=4, threads=1)
    asked = pages(100)
    rows = [PromptRow(page.ids, list(model.encode(page.pixels)), [page.image]) for page in asked]
    found = replies(model.decoder, model.tokenizer, model.stop_ids, rows, 4)
    model.language.close()
    assert sum(one == page.reply for one, page in zip(found, asked, strict=True)) >= equal
