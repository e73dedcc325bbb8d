"""Batches that cannot be made: the file and row are named, from a loader worker as from this process."""

import json

import pytest
from recipes_for_tests import IMAGES, finetune, write_recipe


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named_in_one_sentence(tmp_path, workers):
    file = write_recipe(
        tmp_path, data__workers=workers, data__shuffle=False, data__images_root=str(tmp_path), train__max_steps=2
    )
    headers = "data.check_images=headers"  # which are whole
    # Enough of it for its kind, which is all that the check reads.
    (tmp_path / "cut.png").write_bytes(IMAGES[0].read_bytes()[:300])
    turns = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "no"}]
    row = {"messages": turns, "images": ["cut.png"]}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    done = finetune(file, headers, check=False)
    assert done.returncode == 2, done.stderr
    *_, said = done.stderr.strip().splitlines()
    assert "train.jsonl, row 1, image 1" in said and "cut.png" in said
    assert "Traceback" not in done.stderr and "worker process" not in done.stderr
