"""How a model is asked, by its generation config."""

import pytest
from recipes_for_tests import TINY

from finetune.errors import InputError
from finetune.replies.model_style import stored_style


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("text", "style"),
    [('{"chat_format": "chatml"}', "chat"), ('{"chat_format": "raw"}', "base"), ("{}", None), (None, None)],
)
def test_the_generation_config_says_it(checkpoint, text, style):
    if text is not None:
        (checkpoint / "generation_config.json").write_text(text)
    assert stored_style(str(checkpoint)) == style


def test_what_is_trained_here_is_a_chat_model(checkpoint):
    (checkpoint / "generation_config.json").write_text('{"chat_format": "raw"}')
    (checkpoint / "run.json").write_text("{}")
    assert stored_style(str(checkpoint)) == "chat"


def test_a_damaged_generation_config_is_named(checkpoint):
    for text in ("[]", "{", ""):
        (checkpoint / "generation_config.json").write_text(text)
        with pytest.raises(InputError, match=r"generation_config\.json (is not JSON|holds a list)"):
            stored_style(str(checkpoint))
