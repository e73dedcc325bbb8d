import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.utils import logging

from finetune.files.tensor_files import INDEX_NAME, Planned, file_hash, split_into_shards, tensor_bytes, write_tensors
from qwenvl import QwenVLForConditionalGeneration

logging.disable_progress_bar()


def plan_of(tensors):
    return [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


TENSORS = {
    "b.weight": torch.randn(64, 33).bfloat16(),
    "a.weight": torch.randn(7, 5, 3),
    "half": torch.randn(9).half(),
    "scalar": torch.tensor(1.5),
    "none": torch.empty(0, 3),
    "counts": torch.arange(5),
    "flags": torch.tensor([True, False]),
    "codes": torch.arange(200, dtype=torch.uint8).reshape(100, 2),
}


def test_one_file_holds_what_was_given(tmp_path):
    hashes = write_tensors(tmp_path, plan_of(TENSORS), TENSORS.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"] == list(hashes)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    content = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert hashes["model.safetensors"] == hashlib.sha256(content).hexdigest()
    assert hashes["model.safetensors"] == file_hash(tmp_path / "model.safetensors")


def test_shards_hold_what_was_given_and_the_index_finds_it(tmp_path):
    hashes = write_tensors(tmp_path, plan_of(TENSORS), TENSORS.items(), shard_bytes=500)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()
    count = len(set(index["weight_map"].values()))
    assert count > 2
    assert set(hashes) == {path.name for path in tmp_path.iterdir()} == {INDEX_NAME, *index["weight_map"].values()}
    for name, file in index["weight_map"].items():
        assert file.endswith(f"-of-{count:05}.safetensors")
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
    assert all(file_hash(tmp_path / name) == sha256 for name, sha256 in hashes.items())


def test_transformers_loads_the_shards(tmp_path, tiny_folder, tiny_model):
    tensors = tiny_model.state_dict()
    write_tensors(tmp_path, plan_of(tensors), tensors.items(), shard_bytes=1e6)
    tiny_model.config.save_pretrained(tmp_path)
    loaded = QwenVLForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_may_come_in_pieces(tmp_path):
    tensor = torch.randn(10, 3)
    pieces = [("w", tensor[:4]), ("w", tensor[4:5]), ("w", tensor[5:]), ("v", tensor)]
    counted = []
    write_tensors(tmp_path, plan_of({"w": tensor, "v": tensor}), pieces, on_bytes=counted.append)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], tensor)
    assert sum(counted) == (tmp_path / "model.safetensors").stat().st_size


def test_memory_of_a_piece_may_be_used_anew(tmp_path):
    memory = torch.empty(2, 3)

    def pieces():
        for number in range(50):
            yield "w", memory.fill_(number)

    write_tensors(tmp_path, [Planned("w", (100, 3), torch.float32)], pieces())
    expected = torch.arange(50.0).repeat_interleave(2)[:, None].expand(100, 3)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], expected)


@pytest.mark.parametrize(
    "given",
    [
        [("w", torch.zeros(4, 3)), ("v", torch.zeros(2))],  # another name
        [("w", torch.zeros(4, 3).half()), ("x", torch.zeros(2))],  # another type
        [("w", torch.zeros(3, 4)), ("x", torch.zeros(2))],  # another shape
        [("w", torch.zeros(5, 3)), ("x", torch.zeros(2))],  # too many rows
        [("w", torch.zeros(3, 3)), ("x", torch.zeros(2))],  # too few
        [("w", torch.zeros(4, 3))],  # one missing
        [("w", torch.zeros(4, 3)), ("x", torch.zeros(2)), ("y", torch.zeros(2))],  # one too many
    ],
)
def test_what_was_not_planned_is_noticed(tmp_path, given):
    plan = [Planned("w", (4, 3), torch.float32), Planned("x", (2,), torch.float32)]
    with pytest.raises(AssertionError):
        write_tensors(tmp_path, plan, given)


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "model.safetensors").write_text("something")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path, plan_of(TENSORS), TENSORS.items())
    assert (tmp_path / "model.safetensors").read_text() == "something"


def test_shards_are_as_large_as_allowed():
    plan = [Planned(str(number), (size,), torch.uint8) for number, size in enumerate((40, 60, 1, 150, 30, 70, 0))]
    sizes = [[planned.nbytes for planned in shard] for shard in split_into_shards(plan, 100)]
    assert sizes == [[40, 60], [1], [150], [30, 70, 0]]


def test_bytes_of_a_contiguous_tensor_are_not_copied():
    tensor = torch.arange(6.0).reshape(2, 3)
    content = tensor_bytes(tensor)
    tensor[0, 0] = 9
    assert bytes(content[:4]) == torch.tensor(9.0).numpy().tobytes()
    assert bytes(tensor_bytes(tensor.T)) == tensor.T.contiguous().numpy().tobytes()


def test_everything_is_brought_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write_tensors(tmp_path, plan_of(TENSORS), TENSORS.items(), shard_bytes=500)
    shards = {path.stat().st_ino for path in tmp_path.glob("*.safetensors")}
    assert shards < set(synced)
    assert synced[-1] == tmp_path.stat().st_ino
