"""The fingerprint of weights: the same however they are stored, another for every bit."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qwenvl.checkpoint import fingerprint
from qwenvl.checkpoint.fingerprint import (
    sampled_fingerprint,
    stored_bytes,
    vocabulary_fingerprint,
    weights_fingerprint,
)
from qwenvl.errors import InputError, MissingFileError


def write(folder, tensors, *, form="safetensors"):
    folder.mkdir(exist_ok=True)
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def of(tmp_path, tensors, form="safetensors") -> str:
    folder = tmp_path / f"{form} {len(list(tmp_path.iterdir()))}"
    return weights_fingerprint(write(folder, tensors, form=form))


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(fingerprint, "PIECE_VALUES", 7)


def test_of_the_tiny_checkpoint(tiny_folder):
    """Records of adapters and runs hold these: a change of the definition would refuse the bases of all of them."""
    assert weights_fingerprint(tiny_folder) == "f850e95b11173322e6f9783b66fb4695"
    assert sampled_fingerprint(tiny_folder) == "060c0116d844ce37c6979ee37c2ff1c9"
    assert vocabulary_fingerprint(tiny_folder) == "cc3c7eb8fd4568836d3c285d1c7f10c5"


def test_the_definition(tmp_path, small_pieces):
    """Computed here once more, value by value."""
    wide = [float(n) / 3 for n in range(16)]
    narrow = [float(n) for n in range(-4, 4)]
    tensors = {"b": torch.tensor(narrow), "a": torch.tensor(wide).reshape(2, 8), "n": torch.arange(3)}

    def hashed(values):
        halves = [struct.unpack("<HH", struct.pack("<f", value)) for value in values]
        lower, upper = (b"".join(struct.pack("<H", pair[side]) for pair in halves) for side in (0, 1))
        found = [hashlib.sha256(upper).hexdigest()]
        return ":".join(found + ([hashlib.sha256(lower).hexdigest()] if any(lower) else []))

    lines = [
        f"a [2, 8] float {hashed(wide[:7])} {hashed(wide[7:14])} {hashed(wide[14:])}\n",
        f"b [8] float {hashed(narrow[:7])} {hashed(narrow[7:])}\n",
        f"n [3] torch.int64 {hashlib.sha256(struct.pack('<qqq', 0, 1, 2)).hexdigest()}\n",
    ]
    assert of(tmp_path, tensors) == hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


@pytest.mark.parametrize("pieces", [7, 1 << 23])
def test_every_format_and_lossless_type_is_the_same(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr(fingerprint, "PIECE_VALUES", pieces)
    values = torch.arange(-60.0, 60.0).reshape(8, 15) / 8  # which each of the types holds
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    seen = {
        of(tmp_path, {"w": values.to(kind), "s": torch.tensor(0.5, dtype=kind), "e": torch.empty(0, 3)}, form)
        for kind in kinds
        for form in ("safetensors", "bin")
    }
    seen |= {weights_fingerprint(folder, page_cache=True) for folder in tmp_path.iterdir()}
    transposed = {"w": values.T.contiguous().T, "s": torch.tensor(0.5), "e": torch.empty(0, 3)}
    seen.add(of(tmp_path, transposed, "bin"))
    assert len(seen) == 1
    eighths = torch.tensor([1.0, -0.5, 0.0, 416.0])
    assert of(tmp_path, {"w": eighths.to(torch.float8_e4m3fn)}, "bin") == of(tmp_path, {"w": eighths})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool]
)
def test_every_bit_of_every_value_counts(tmp_path, small_pieces, dtype):
    """In the middle of a piece, at its ends, and in the last one; 0.0, infinity and NaN are among the values."""
    count, size = 9, dtype.itemsize
    start = torch.tensor([0, 1, torch.inf, torch.nan, *range(5)]) if dtype.is_floating_point else torch.arange(9)
    values = start.to(dtype).view(torch.uint8)
    seen, tried = set(), 0
    for place in range(count):
        for bit in range(8 * size if dtype != torch.bool else 1):
            changed = values.clone()
            changed[place * size + bit // 8] ^= 1 << bit % 8
            seen.add(weights_fingerprint(write(tmp_path / "one", {"w": changed.view(dtype)})))
            tried += 1
    seen.add(weights_fingerprint(write(tmp_path / "one", {"w": values.view(dtype)})))
    assert len(seen) == tried + 1


def test_every_float16_is_its_float32():
    """NaNs too, whose bits a processor may change on the way."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    ours = fingerprint._as_float32(torch.from_numpy(codes.view(np.int16)).view(torch.float16))
    bits = ours.view(np.uint32)
    assert len(set(bits.tolist())) == 1 << 16
    finite = ~np.isnan(codes.view(np.float16))
    assert np.array_equal(ours[finite], codes.view(np.float16)[finite].astype(np.float32))
    assert np.isnan(ours[~finite]).all()


def test_names_and_shapes_count_and_the_order_does_not(tmp_path):
    values = torch.arange(12.0)
    tensors = {"a": values.reshape(3, 4), "b": values.clone()}
    first = of(tmp_path, tensors)
    assert of(tmp_path, dict(reversed(tensors.items())), "bin") == first
    others = [
        {"a": values.reshape(4, 3), "b": values.clone()},
        {"a": values.clone(), "b": values.reshape(3, 4)},
        {"a": values.reshape(3, 4), "c": values.clone()},
        {"a": values.reshape(3, 4)},
        {**tensors, "e": torch.empty(0)},
        {**tensors, "e": torch.empty(0, 2)},
        {"a": values.reshape(3, 4).int(), "b": values.clone()},
        {"a": values.reshape(3, 4).long(), "b": values.clone()},
    ]
    assert len({first, *(of(tmp_path, other) for other in others)}) == 9


def test_progress_is_of_all_bytes(tmp_path, small_pieces):
    tensors = {"w": torch.ones(5, 9).bfloat16(), "t": torch.ones(4, 6).T, "n": torch.arange(20), "e": torch.empty(0)}
    folder, done = write(tmp_path / "folder", tensors, form="bin"), []
    weights_fingerprint(folder, done.append)
    assert sum(done) == stored_bytes(folder) == 90 + 96 + 160 and len(done) > 6


def test_a_file_that_is_cut_while_it_is_hashed_is_named(tmp_path, small_pieces, monkeypatch):
    folder = write(tmp_path / "folder", {f"w{n}": torch.ones(100) for n in range(50)})
    located = fingerprint.locate_tensors(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"model\.safetensors ends before w\d+ does"):
        fingerprint.hash_tensors(located)
    with pytest.raises(MissingFileError, match="no weights here"):
        weights_fingerprint(tmp_path)


def test_the_sampled_values_are_few(tmp_path):
    values = torch.zeros(1000)
    first = of(tmp_path, {"w": values}), sampled_fingerprint(tmp_path / "safetensors 0")
    values[300] = 1
    assert of(tmp_path, {"w": values}) != first[0]
    assert sampled_fingerprint(tmp_path / "safetensors 1") == first[1]


def test_a_vocabulary_is_its_lines(tmp_path):
    seen = {}
    for name, content in {
        "lf": b"IQ== 0\nIg== 1\n",
        "crlf": b"IQ== 0\r\nIg== 1\r\n",
        "open": b"IQ== 0\nIg== 1",
        "other": b"IQ== 0\nIw== 1\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "qwen.tiktoken").write_bytes(content)
        seen[name] = vocabulary_fingerprint(tmp_path / name)
    assert seen["lf"] == seen["crlf"] == seen["open"] != seen["other"]
    assert vocabulary_fingerprint(tmp_path) is None
