"""Names of one model asked at once, through the engine, while an adapter is loaded and dropped."""

import threading
import time

import pytest
import torch
from adapters_for_tests import make_adapter
from recipes_for_tests import IMAGES, TINY
from requests_for_tests import image_part, text_part, user
from safetensors.torch import load_file, save_file

from finetune.serve.asked import Asked, ChoiceToken, Ended
from finetune.serve.engine import Engine
from finetune.serve.opened_model import open_served

MESSAGES = [user(image_part(IMAGES[0]), text_part("What is this?"))]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters; the second one changes vision too, and by more."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    make_adapter(folder / "first")
    make_adapter(folder / "second", target_modules=["c_attn", "in_proj"])
    file = folder / "second" / "adapter_model.safetensors"
    save_file({name: 3 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def asking(engine, served, tokens):
    """Ask a name; what gives the reply's tokens once it has ended."""
    ended, ids = threading.Event(), []

    def take(event):
        if isinstance(event, ChoiceToken):
            ids.append(event.token.id)
        else:
            assert isinstance(event, Ended), event
            ended.set()

    prompt = served.render(MESSAGES)
    engine.submit(Asked(prompt.ids, tokens, (), prompt.images, served.adapter), take)

    def reply():
        assert ended.wait(60)
        return ids

    return reply


def test_names_that_are_asked_at_once_reply_as_one_after_another(adapters):
    opened, names = open_served(str(TINY), name="bare", adapters={"first": str(adapters / "first")})
    engine = Engine(opened)
    try:
        bare, first = names.get("bare"), names.get("first")
        alone = {name: asking(engine, names.get(name), 60)() for name in ("bare", "first")}
        second = names.load("second", str(adapters / "second"), engine.run_between_steps)
        alone["second"] = asking(engine, second, 60)()
        assert len(set(map(tuple, alone.values()))) == 3
        encoded = engine.state.pictures_encoded
        assert encoded == 2  # the first adapter leaves vision as it is
        names.drop("second", engine.run_between_steps)
        again = asking(engine, bare, 60), asking(engine, first, 60)
        second = names.load("second", str(adapters / "second"), engine.run_between_steps)
        last = asking(engine, second, 60)
        assert [reply() for reply in (*again, last)] == [alone["bare"], alone["first"], alone["second"]]
        assert engine.state.pictures_encoded == encoded + 1  # those of the dropped adapter were not taken for it
    finally:
        engine.close(0)


def test_an_adapter_is_dropped_when_its_last_request_has_ended(adapters):
    opened, names = open_served(str(TINY), name="bare", adapters={"first": str(adapters / "first")})
    engine = Engine(opened)
    try:
        expected = asking(engine, names.get("first"), 200)()
        with names.lease("first") as served:
            reply = asking(engine, served, 200)
            names.drop("first", engine.run_between_steps)
            assert names.get("first") is None
            assert reply() == expected
        end = time.monotonic() + 30
        while any(".lora_" in name for name, _ in opened.decoder._forward.base.named_parameters()):
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        engine.close(0)
