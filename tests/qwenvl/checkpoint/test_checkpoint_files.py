import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl.base_check import check_base
from qwenvl.checkpoint.checkpoint_files import locate_tensors, stored_tensors, tensors_in, weight_files
from qwenvl.checkpoint.direct_reading import SLACK
from qwenvl.checkpoint.record import BASE_FILE, read_record
from qwenvl.errors import InputError, MissingFileError

TENSORS = {
    "matrix": torch.arange(40, dtype=torch.float32).reshape(8, 5),
    "half": torch.linspace(-1, 1, 24).bfloat16().reshape(2, 3, 4),
    "counts": torch.tensor([[1, 2], [3, 4]]),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 4),
}


def write(file, tensors):
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_every_tensor_is_read_as_it_was_stored(tmp_path, name):
    found = {tensor.name: tensor for tensor in tensors_in(write(tmp_path / name, TENSORS))}
    assert set(found) == set(TENSORS)
    for key, tensor in TENSORS.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tuple(tensor.shape)
        assert found[key].nbytes == tensor.nbytes
        assert torch.equal(found[key].read(), tensor)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_rows_are_read_by_themselves(tmp_path, name):
    matrix = next(tensor for tensor in tensors_in(write(tmp_path / name, TENSORS)) if tensor.name == "matrix")
    assert torch.equal(matrix.read(2, 5), TENSORS["matrix"][2:5])
    assert torch.equal(matrix.read(6, 99), TENSORS["matrix"][6:])
    memory = torch.zeros(SLACK + 1000, dtype=torch.uint8)
    rows = matrix.read(1, 3, memory)
    assert torch.equal(rows, TENSORS["matrix"][1:3])
    assert memory.data_ptr() <= rows.data_ptr() < memory.data_ptr() + SLACK


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_values_are_read_by_their_place(tmp_path, name):
    for tensor in tensors_in(write(tmp_path / name, TENSORS)):
        flat = TENSORS[tensor.name].reshape(-1)
        for start, stop in ((0, 3), (1, 2), (len(flat) // 2, len(flat) + 9), (len(flat), len(flat) + 1)):
            assert torch.equal(tensor.flat(start, stop), flat[start:stop])


def test_pickled_tensors_may_be_transposed_and_share_memory(tmp_path):
    whole = torch.arange(30.0).reshape(6, 5)
    tensors = {"transposed": whole.T, "part": whole[2:4], "column": whole[:, 3]}
    found = {tensor.name: tensor for tensor in tensors_in(write(tmp_path / "pytorch_model.bin", tensors))}
    for key, tensor in tensors.items():
        assert torch.equal(found[key].read(), tensor)
        assert torch.equal(found[key].read(1, 2), tensor[1:2])
    assert found["transposed"].strided
    assert not found["part"].strided


def test_a_cut_file_is_named(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = write(tmp_path / name, TENSORS)
        file.write_bytes(file.read_bytes()[:-200])
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            tensors_in(file)
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            dict(stored_tensors(tmp_path))
        file.unlink()
        with pytest.raises(MissingFileError, match=f"{name} does not exist"):
            tensors_in(file)
        with pytest.raises(MissingFileError, match="no weights here"):
            weight_files(tmp_path)


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    file = write(tmp_path / "model.safetensors", {"matrix": TENSORS["matrix"]})
    (matrix,) = tensors_in(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"model\.safetensors ends before matrix does"):
        matrix.read()


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("a pickle ran",))


def test_nothing_in_a_pickle_runs(tmp_path):
    torch.save({"weight": torch.ones(2), "payload": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        tensors_in(tmp_path / "pytorch_model.bin")
    torch.save({"weight": torch.ones(2), "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="step, which is no tensor"):
        tensors_in(tmp_path / "pytorch_model.bin")
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds a list"):
        tensors_in(tmp_path / "pytorch_model.bin")


def test_a_checkpoint_is_located_whole(tiny_folder):
    stored = load_file(tiny_folder / "model.safetensors")
    located = locate_tensors(tiny_folder)
    assert set(located) == set(stored)
    assert all(torch.equal(located[name].read(), tensor) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, reason):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=rf"index\.json {reason}"):
        weight_files(tmp_path)


def test_what_is_neither_a_folder_nor_on_the_hub_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="absent: no folder here"):
        weight_files(tmp_path / "absent")


def test_a_damaged_note_of_the_base_is_named(tiny_folder, tmp_path):
    assert not check_base(tmp_path, tiny_folder)
    write(tmp_path / "model.safetensors", TENSORS)
    for content, reason in (
        ("", "is empty"),
        ('{"base": "elsewhere"}', "does not name a base, its fingerprint"),
    ):
        (tmp_path / BASE_FILE).write_text(content)
        for read in (lambda: check_base(tmp_path, tiny_folder), lambda: read_record(tmp_path)):
            with pytest.raises(InputError, match=rf"base\.json:? .*{reason}"):
                read()
