"""Links in folders: followed within a folder and within a repository's cache, and out of it for weights alone."""

import shutil

import pytest
from folder_changes import copy_tiny, link_out

from qwenvl import InputError, load_model, load_processor
from qwenvl.checkpoint.own_files import is_own_file, own_root
from qwenvl.loading import require_loadable

SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken")


@pytest.fixture
def copy(tmp_path):
    return copy_tiny(tmp_path / "copy")


def cached(folder, tmp_path, repository: str = "models--Qwen--Qwen-VL"):
    """The folder as the hub's cache has it: links to files that are named by their hash."""
    root = tmp_path / "hub" / repository
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, root / "blobs" / f"{number:040}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040}")
    return snapshot


def test_a_snapshot_of_the_hub_is_its_own(copy, tmp_path):
    snapshot = cached(copy, tmp_path)
    assert own_root(snapshot) == snapshot.parent.parent.resolve()
    require_loadable(snapshot)
    load_processor(snapshot)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_snapshot_that_links_into_another_repository_is_refused(copy, tmp_path, name):
    snapshot = cached(copy, tmp_path)
    other = tmp_path / "hub" / "models--someone--private" / "blobs"
    other.mkdir(parents=True)
    shutil.copyfile(copy / name, other / "0")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to("../../../models--someone--private/blobs/0")
    with pytest.raises(InputError, match=rf"{name} is a link to .*private/blobs/0, outside of its folder: put a copy"):
        load_processor(snapshot)


def test_weights_may_be_on_another_disk(copy, tmp_path):
    link_out("model.safetensors")(copy)
    assert (copy / "model.safetensors").is_symlink()
    load_model(copy)


def test_a_link_to_the_folder_and_links_within_it_are_followed(copy, tmp_path):
    (copy / "generation_config.json").rename(copy / "generation.json")
    (copy / "generation_config.json").symlink_to("generation.json")
    (tmp_path / "link").symlink_to("copy")
    require_loadable(tmp_path / "link")
    load_processor(tmp_path / "link")


def test_what_is_own(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "file").write_text("x")
    (folder / "inside").symlink_to("file")
    (folder / "outside").symlink_to("../secret")
    (folder / "back").symlink_to("../folder/file")
    (folder / "nowhere").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
    (folder / "device").symlink_to("/dev/null")
    own = {
        name
        for name in ("file", "inside", "outside", "back", "nowhere", "loop", "device", "none")
        if is_own_file(folder / name, folder)
    }
    assert own == {"file", "inside", "back"}
