"""Where replies end, with the settings of a checkpoint and without."""

import shutil

from recipes_for_tests import TINY

from finetune.replies.stop_ids import stop_ids_as_trained
from qwenvl import QwenVLConfig, QwenVLTokenizer
from qwenvl.checkpoint.record import ModelRecord


def test_a_record_says_it_also_without_a_generation_config(tmp_path):
    tokenizer, config = QwenVLTokenizer.from_pretrained(TINY), QwenVLConfig.from_pretrained(TINY)
    bare = shutil.copytree(TINY, tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    turns = (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id)
    for folder in (TINY, bare):
        own = ModelRecord(chat_format="chatml", stop_ids=(65, *turns))
        assert stop_ids_as_trained(folder, config, own, tokenizer, "chat") == (65, *turns)
        chat = stop_ids_as_trained(folder, config, ModelRecord(chat_format="chatml"), tokenizer, "chat")
        assert set(chat) == set(turns)
        raw = ModelRecord(chat_format="raw", stop_ids=(65,))
        assert stop_ids_as_trained(folder, config, raw, tokenizer, "base") == (65, tokenizer.eod_id)
