"""The phase that encodes a run's images: each distinct one once, within its bound, and again where it is damaged."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from finetune.batches.image_request import ImageRequest, read_pixels
from finetune.errors import UserError
from finetune.recipe.sections import Data
from finetune.terminal import labelled
from finetune.vision_cache import encoding as vision_encoding
from finetune.vision_cache import image_groups
from finetune.vision_cache.cache import cache_folder
from finetune.vision_cache.encoding import encode_images
from finetune.vision_cache.phase import remove_vision_tower
from finetune.vision_cache.run_images import RunImages
from finetune.vision_cache.store import FEATURES, JOURNAL
from qwenvl import ImageAccess, QwenVLForConditionalGeneration, QwenVLImageProcessor

SIZE = 112
RECORD_BYTES = 256 * 256 * 4


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def pictures(folder: Path, count: int, first: int = 0) -> list[str]:
    """Different images, as if made long ago."""
    folder.mkdir(exist_ok=True)
    files = []
    for number in range(first, first + count):
        noise = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        os.utime(folder / f"{number}.png", (0, 0))
        files.append(str(folder / f"{number}.png"))
    return files


def requests(sources) -> list[list[ImageRequest]]:
    """Two a sample."""
    made = [ImageRequest(source, ImageAccess(), f"row {number}") for number, source in enumerate(sources)]
    return [made[start : start + 2] for start in range(0, len(made), 2)]


class Tower:
    """The tiny model, which counts what it encodes; and what the phase says."""

    def __init__(self, model: QwenVLForConditionalGeneration):
        self.model, self.encoded, self.said = model, 0, []
        encode = model.get_image_features

        def counted(pixels):
            # What fills a group up is the same image again.
            self.encoded += len({one.cpu().numpy().tobytes() for one in pixels})
            return encode(pixels)

        model.get_image_features = counted
        self.plain = encode

    def _say(self, label, text=""):
        self.said.append(labelled(label, text))

    def cache(self, sources, kind="disk", size=SIZE, **data):
        """The phase over these images; `said` and `encoded` are of it alone."""
        self.said, self.encoded = [], 0
        settings = Data(train={"path": "-", "format": "messages"}, vision_cache=kind, **{"workers": 0, **data})
        images = RunImages([requests(sources)])
        return encode_images(self.model, images, QwenVLImageProcessor(size), settings, self._say)


@pytest.fixture
def tower(tiny_model) -> Tower:
    return Tower(tiny_model)


def get(cache, source, name="row") -> torch.Tensor:
    return cache.get(ImageRequest(source, ImageAccess(), name))


def refuse_decoding(monkeypatch):
    monkeypatch.setattr(image_groups, "read_pixels", lambda *_: pytest.fail("an image was decoded"))


@pytest.mark.parametrize("kind", ["disk", "memory"])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_is_encoded_once(tower, tmp_path, kind, workers):
    """Wherever it is named again: under its path, as a copy, or as bytes in a row."""
    files = pictures(tmp_path / "images", 11)
    copy = shutil.copy2(files[3], tmp_path / "copy.png")
    data = Path(files[5]).read_bytes()
    cache = tower.cache([*files, files[0], copy, data, {"bytes": data, "path": "x.png"}], kind, workers=workers)
    assert tower.encoded == 11 and cache.complete
    with torch.no_grad():
        for source, file in [*zip(files, files, strict=True), (copy, files[3]), (data, files[5])]:
            pixels = read_pixels(ImageRequest(file, ImageAccess(), ""), cache.image_processor)
            assert (get(cache, source) - tower.plain(pixels[None])[0]).abs().max() <= 1e-6
    assert "13 of 13 images to encode" in tower.said[0] and "11 images encoded" in tower.said[1]
    assert "2 were there under another name" in tower.said[2]
    assert cache_folder().exists() == (kind == "disk")


def test_a_later_run_neither_encodes_nor_decodes(tower, tmp_path, monkeypatch):
    files = pictures(tmp_path / "images", 5)
    first = tower.cache(files)
    refuse_decoding(monkeypatch)
    second = tower.cache(files)
    assert tower.encoded == 0 and second.complete and len(tower.said) == 1
    assert "the features of 5 images are in" in tower.said[0]
    assert all(torch.equal(get(second, file), get(first, file)) for file in files)


def test_only_what_is_new_is_encoded(tower, tmp_path):
    files = pictures(tmp_path / "images", 5)
    tower.cache(files[:3])
    assert tower.cache(files).complete and tower.encoded == 2
    assert "2 of 5 images to encode" in tower.said[0]


def test_files_with_another_date_are_decoded_and_not_encoded(tower, tmp_path):
    files = pictures(tmp_path / "images", 3)
    tower.cache(files)
    moved = [shutil.copy(file, tmp_path / f"moved-{Path(file).name}") for file in files]
    cache = tower.cache(moved)
    assert tower.encoded == 0 and cache.complete
    assert "3 were there under another name or an earlier date" in tower.said[-1]


def test_features_do_not_depend_on_their_company(tower, tmp_path, home):
    """Bit for bit: alone, or with others, or what was left by a run that was killed."""
    files = pictures(tmp_path / "images", 9)
    cache = tower.cache(files)
    together = [get(cache, file) for file in files]
    shutil.rmtree(home)
    tower.cache(files[4:5])
    alone = tower.cache(list(reversed(files)))
    assert all(torch.equal(get(alone, file), one) for file, one in zip(files, together, strict=True))


def test_another_tower_or_preprocessing_or_image_starts_anew(tower, tmp_path):
    files = pictures(tmp_path / "images", 2)
    tower.cache(files)
    before = get(tower.cache(files), files[0])
    tower.cache(files, size=56)
    assert tower.encoded == 2
    with torch.no_grad():
        tower.model.transformer.visual.conv1.weight[0, 0, 0, 0] += 1
    changed = tower.cache(files)
    assert tower.encoded == 2 and not torch.equal(get(changed, files[0]), before)
    Image.new("RGB", (30, 30), (1, 2, 3)).save(files[0])
    os.utime(files[0], (0, 0))
    assert tower.cache(files).complete and tower.encoded == 1


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_the_bound_leaves_the_rest_out(tower, tmp_path, kind):
    files = pictures(tmp_path / "images", 12)
    cache = tower.cache([*files, files[1]], kind, vision_cache_gb=10.5 * RECORD_BYTES / 1e9)
    assert tower.encoded == 10 and not cache.complete
    assert "10 of them fit into data.vision_cache_gb: " in tower.said[1]
    assert "2 are left out for the bound" in tower.said[-1]
    kinds = [get(cache, file).dtype for file in files]
    assert kinds.count(torch.float32) == 10 and kinds.count(torch.uint8) == 2


def test_the_bound_counts_what_all_towers_have(tower, tmp_path):
    files = pictures(tmp_path / "images", 12)
    tower.cache(files[:4])
    with torch.no_grad():
        tower.model.transformer.visual.proj += 1
    bound = {"vision_cache_gb": 9.5 * RECORD_BYTES / 1e9}
    assert not tower.cache(files, **bound).complete and tower.encoded == 5
    assert not tower.cache(files, **bound).complete and tower.encoded == 0
    assert "0 of them fit" in tower.said[1]
    assert tower.cache(files).complete and tower.encoded == 7


def test_without_room_nothing_is_begun(tower, tmp_path, monkeypatch):
    files = pictures(tmp_path / "images", 5)
    monkeypatch.setattr(vision_encoding.shutil, "disk_usage", lambda _: SimpleNamespace(free=4.5 * RECORD_BYTES))
    with pytest.raises(UserError, match=r"needs 1.3 MB at .* for 5 images, and 1.2 MB are free.*vision_cache_gb"):
        tower.cache(files)
    assert not cache_folder().exists()
    monkeypatch.setattr(vision_encoding, "free_host_memory", lambda: 4.5 * RECORD_BYTES)
    with pytest.raises(UserError, match=r"memory needs 1\.3 MB of memory for 5 images"):
        tower.cache(files, "memory", vision_cache_gb=1)
    # By itself it takes half of what is free.
    cache = tower.cache(files, "memory")
    assert tower.encoded == 2 and not cache.complete and "2 of them fit into half of the free memory" in tower.said[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_told_together(tower, tmp_path, workers):
    """And what can be is kept: the next run has only those to do that were mended."""
    files = pictures(tmp_path / "images", 12)
    for number in (2, 9):
        Path(files[number]).write_bytes(b"not an image, not at all")
        os.utime(files[number], (0, 0))
    with pytest.raises(UserError, match=r"(?s)2 images cannot be encoded:\n  row [29] \(.*\n  row [29] \("):
        tower.cache(files, workers=workers)
    assert tower.encoded == 10
    pictures(tmp_path / "images", 1, first=2)
    pictures(tmp_path / "images", 1, first=9)
    assert tower.cache(files, workers=workers).complete and tower.encoded == 2


def test_a_file_that_changes_while_it_is_read(tower, tmp_path, monkeypatch):
    files = pictures(tmp_path / "images", 2)
    read = image_groups.read_pixels

    def changing(request, processor, reader):
        pixels = read(request, processor, reader)
        if request.source == files[1]:
            os.utime(files[1], (5, 5))
        return pixels

    monkeypatch.setattr(image_groups, "read_pixels", changing)
    with pytest.raises(UserError, match="row 1: it was changed while the run began"):
        tower.cache(files)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "half a line"])
def test_damaged_features_are_encoded_anew(tower, tmp_path, damage):
    files = pictures(tmp_path / "images", 6)
    whole = tower.cache(files)
    expected = [get(whole, file) for file in files]
    (features,) = cache_folder().glob(f"*/*{FEATURES}")
    journal = features.with_suffix(JOURNAL)
    content = features.read_bytes()
    if damage == "flip":
        features.write_bytes(content[:-5000] + bytes([content[-5000] ^ 4]) + content[-4999:])
    elif damage == "cut":
        features.write_bytes(content[: 4 * RECORD_BYTES + 100])
    elif damage == "remove":
        features.unlink()
    else:
        journal.write_bytes(journal.read_bytes()[:-10])
    again = tower.cache(files)
    assert tower.encoded == {"flip": 1, "cut": 2, "remove": 6, "half a line": 1}[damage]
    assert all(torch.equal(get(again, file), one) for file, one in zip(files, expected, strict=True))
    assert ("are damaged there and encoded again, such as" in "\n".join(tower.said)) == (damage == "flip")
    assert tower.cache(files).complete and tower.encoded == 0, "that is done once"


def test_two_runs_share_the_work(tower, tmp_path, tiny_folder, monkeypatch):
    """A second run that begins while the first is at it takes over what that has done, without being asked to wait."""
    files = pictures(tmp_path / "images", 40)
    other = Tower(QwenVLForConditionalGeneration.from_pretrained(tiny_folder).eval())
    monkeypatch.setattr(image_groups.secrets, "randbelow", lambda groups: 0)
    encode, begun = tower.model.get_image_features, []

    def second_run_comes(pixels):
        if not begun:
            begun.append(True)
            monkeypatch.setattr(image_groups.secrets, "randbelow", lambda groups: groups - 2)
            other.cache(files[8:])
        return encode(pixels)

    tower.model.get_image_features = second_run_comes
    cache = tower.cache(files)
    assert tower.encoded == 8 and other.encoded == 32 and cache.complete
    assert len(list(cache_folder().glob(f"*/*{FEATURES}"))) == 2


def test_random_numbers_are_those_of_a_run_without(tower, tmp_path):
    files = pictures(tmp_path / "images", 3)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tower.cache(files, workers=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_on_a_gpu(tmp_path, tiny_folder, kind):
    """Encoded there, kept on the host, and the tower's memory is free when it has gone."""
    model = QwenVLForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.bfloat16).eval()
    files = pictures(tmp_path / "images", 11)
    cache = Tower(model).cache(files, kind, workers=2)
    visual = model.transformer.visual
    assert all(tensor.is_cuda for tensor in visual.state_dict().values())
    with torch.no_grad():
        pixels = torch.stack([read_pixels(ImageRequest(f, ImageAccess(), ""), cache.image_processor) for f in files])
        expected = model.transformer.get_image_features(pixels.cuda()).float().cpu()
    found = torch.stack([get(cache, file) for file in files])
    assert found.device.type == "cpu" and found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= 0.02 * expected.abs().max()
    tower, held = sum(tensor.nbytes for tensor in visual.state_dict().values()), torch.cuda.memory_allocated()
    del visual
    remove_vision_tower(model)
    assert held - torch.cuda.memory_allocated() >= tower > 0
