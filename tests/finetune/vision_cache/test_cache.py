"""Looking up an image's features: by what it is known without decoding it, by its pixels, and not at all."""

import base64
import logging
import os
import pickle
import shutil
from pathlib import Path

import PIL
import pytest
import torch
from PIL import Image

from finetune.batches.image_request import ImageRequest, read_pixels
from finetune.errors import UserError
from finetune.replies.image_features import ImageStore
from finetune.vision_cache import cache as vision_cache
from finetune.vision_cache.cache import ImageHandles, VisionCache, content_key, preprocessing_of, settle
from finetune.vision_cache.store import FEATURES, FeatureStore, Record
from qwenvl import ImageAccess, QwenVLImageProcessor

ANYWHERE = ImageAccess()
FEATURE = torch.randn(256, 256)


def picture(file: Path, shade: int = 90) -> Path:
    Image.new("RGB", (40, 30), (shade, 10, 10)).save(file)
    return file


def handles(processor=None, run="run") -> ImageHandles:
    return ImageHandles(preprocessing_of(processor or QwenVLImageProcessor(28)), run)


# --- handles ---------------------------------------------------------------------------------------------------------


def test_a_file_that_was_changed_has_another_handle(tmp_path):
    file = picture(tmp_path / "a.png")
    before, made = handles().of(str(file), ANYWHERE), file.stat()
    assert handles().of("a.png", ImageAccess(root=tmp_path)) != before  # decoded once more, at worst
    # Of the same size, and with the old time put back.
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(made.st_atime_ns, made.st_mtime_ns))
    assert file.stat().st_size == made.st_size and handles().of(str(file), ANYWHERE) != before
    other = Path(shutil.copy2(file, tmp_path / "b.png"))
    assert handles().of(str(other), ANYWHERE) != handles().of(str(file), ANYWHERE)


def test_every_kind_of_source_has_a_handle(tmp_path):
    file = picture(tmp_path / "a.png")
    data = file.read_bytes()
    same = [data, {"bytes": data, "path": "a.png"}, {"bytes": data, "path": None}]
    assert len({handles().of(source, ANYWHERE) for source in same}) == 1
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    missing = str(tmp_path / "none.png")
    others = [
        data + b"x",
        uri,
        str(file),
        {"bytes": None, "path": str(tmp_path / "b.png")},
        missing,
        "\udcff.png",
        "\0",
    ]
    assert len({handles().of(source, ANYWHERE) for source in [data, *others]}) == 1 + len(others)
    assert handles().of({"bytes": None, "path": str(file)}, ANYWHERE) == handles().of(str(file), ANYWHERE)


def test_pixels_resized_in_another_order_are_not_taken_over(tmp_path):
    """Before the order of the passes was fixed, the cache told preprocessings apart in this form."""
    file = picture(tmp_path / "a.png")
    before = ImageHandles(f"{{'height': 28, 'width': 28}} 3 Pillow {PIL.__version__} 1", "run")
    assert handles().of(str(file), ANYWHERE) != before.of(str(file), ANYWHERE)


def test_what_a_url_gives_is_not_taken_from_another_run():
    url = "https://example.org/a.png"
    assert handles(run="one").of(url, ANYWHERE) == handles(run="one").of(url, ANYWHERE)
    assert handles(run="one").of(url, ANYWHERE) != handles(run="two").of(url, ANYWHERE)
    assert handles(run="one").of(b"bytes", ANYWHERE) == handles(run="two").of(b"bytes", ANYWHERE)


def test_another_preprocessing_has_other_handles(monkeypatch):
    before = handles().of(b"bytes", ANYWHERE)
    assert handles(QwenVLImageProcessor(56)).of(b"bytes", ANYWHERE) != before
    monkeypatch.setattr(vision_cache.PIL, "__version__", "99.0")
    assert handles().of(b"bytes", ANYWHERE) != before


def test_a_file_that_was_just_written_is_waited_for(tmp_path, monkeypatch):
    """Until a later change cannot have the same time any more; one that is old, or no file, is not."""
    waited = []
    monkeypatch.setattr(vision_cache.time, "sleep", waited.append)
    file = picture(tmp_path / "a.png")
    settle(str(file), ANYWHERE)
    assert len(waited) == 1 and 0 < waited[0] <= 2.0
    os.utime(file, (0, 0))
    for source in (str(file), b"bytes", "https://example.org/a.png", str(tmp_path / "none.png"), "data:,"):
        settle(source, ANYWHERE)
    assert len(waited) == 1


def test_the_pixels_are_the_content():
    pixels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    keys = [
        content_key(one)
        for one in (pixels, pixels.clone(), pixels.reshape(3, 4, 16), pixels ^ (pixels == pixels[0, 0, 0]))
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    assert content_key(pixels.transpose(1, 2)) == content_key(pixels.transpose(1, 2).contiguous())


# --- lookups ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def request_of(tmp_path):
    return ImageRequest(str(picture(tmp_path / "a.png")), ANYWHERE, "rows.jsonl, row 3")


@pytest.fixture
def cache(tmp_path, request_of):
    """With the one image in it."""
    processor = QwenVLImageProcessor(28)
    known = handles(processor)
    store = FeatureStore(tmp_path / "cache", Record((256, 256), torch.float32))
    handle = known.of(request_of.source, request_of.access)
    store.add([(handle, content_key(read_pixels(request_of, processor)))], FEATURE[None])
    return VisionCache(store, known, processor, complete=True)


def incomplete(cache: VisionCache) -> VisionCache:
    return VisionCache(cache.store, cache.handles, cache.image_processor, complete=False)


def test_a_known_image_is_not_opened(cache, request_of, monkeypatch):
    monkeypatch.setattr(vision_cache, "read_pixels", lambda *_: pytest.fail("it was decoded"))
    assert torch.equal(cache.get(request_of), FEATURE)
    assert torch.equal(pickle.loads(pickle.dumps(cache)).get(request_of), FEATURE)


def test_an_image_that_was_touched_is_found_by_its_pixels(cache, request_of):
    os.utime(request_of.source, (1, 1))
    assert torch.equal(cache.get(request_of), FEATURE)


def test_an_image_that_was_changed_is_no_longer_that_one(cache, request_of):
    picture(Path(request_of.source), 91)
    with pytest.raises(UserError, match=r"rows.jsonl, row 3: it is not what it was .* Start the run again"):
        cache.get(request_of)
    pixels = incomplete(cache).get(request_of)
    assert torch.equal(pixels, read_pixels(request_of, cache.image_processor)) and pixels.dtype == torch.uint8


def test_damage_is_told_and_encoded_anew_where_that_can_be(cache, request_of, tmp_path, caplog):
    (file,) = (tmp_path / "cache").glob(f"*{FEATURES}")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"row 3: its features are damaged \(.*record 0.* this image is encoded again"):
        cache.get(request_of)
    with caplog.at_level(logging.WARNING):
        pixels = incomplete(cache).get(request_of)
    assert torch.equal(pixels, read_pixels(request_of, cache.image_processor))
    assert "row 3: its features are damaged" in caplog.text


def test_replies_take_features_from_the_cache_and_encode_the_rest(cache, request_of, tmp_path, tiny_model):
    other = ImageRequest(str(picture(tmp_path / "b.png", 200)), ANYWHERE, "row 4")
    with ImageStore(tiny_model, cache.image_processor, cache=incomplete(cache)) as store:
        found = store.features({"a": request_of, "b": other})
        assert store.encoded == 1
    assert torch.equal(found["a"], FEATURE)
    with torch.no_grad():
        expected = tiny_model.get_image_features(read_pixels(other, cache.image_processor)[None])[0]
    assert torch.equal(found["b"], expected)
