"""Adapters that are loaded and dropped by request: from where, and what a request may say."""

from pathlib import Path

import pytest
from running_api import running_api


class Holder:
    """Takes the place of the model's adapters; none of these requests comes as far."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapters")
    allowed, other = root / "allowed", root / "other"
    (allowed / "inside").mkdir(parents=True)
    (other / "adapter").mkdir(parents=True)
    (allowed / "file").write_text("")
    (allowed / "link").symlink_to(other / "adapter")
    (allowed / "circle").symlink_to(allowed / "circle")
    return allowed, other


@pytest.fixture(scope="module")
def api(folders):
    with running_api(adapters=Holder(), adapter_folders=(folders[0].resolve(),)) as running:
        yield running


def test_folders_that_adapters_are_not_loaded_from(api, folders):
    allowed, other = folders
    said = set()
    for path in (
        other / "adapter",
        allowed / "link",
        allowed / ".." / "other" / "adapter",
        allowed / "none",
        allowed / "file",
        allowed / "circle",
        "relative",
        "\0",
        "x" * 5000,
        "Qwen/Qwen-VL",
    ):
        body = {"lora_name": "new", "lora_path": str(path)}
        status, content, _ = api.request("POST", "/v1/load_lora_adapter", body)
        assert (status, content["error"]["param"]) == (403, "lora_path"), path
        said.add(content["error"]["message"].replace(repr(str(path)[:200]), "PATH"))
    assert said == {
        "lora_path: there is no folder PATH among those that this server loads adapters from (--allow-adapter-changes)"
    }


def test_a_folder_without_an_adapter(api, folders):
    body = {"lora_name": "new", "lora_path": str(folders[0] / "inside")}
    status, content, _ = api.request("POST", "/v1/load_lora_adapter", body)
    assert (status, content["error"]["param"]) == (400, "lora_path")
    assert "is no adapter" in content["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("load", {"lora_name": "new"}, 400, "lora_path: Field required"),
        ("load", {"lora_name": 5, "lora_path": "x"}, 400, "lora_name: Input should be a valid string"),
        ("load", {"lora_name": "new", "lora_path": "x", "load_inplace": True}, 400, "load_inplace: Extra inputs"),
        ("unload", {"lora_name": "other"}, 404, "there is no model 'other' here, but tiny"),
        ("unload", {"lora_name": "tiny"}, 400, "tiny is the model itself"),
        ("unload", {"lora_name": "x" * 200_000}, 413, "more than 100,000 bytes"),
    ],
)
def test_what_is_wrong_is_said(api, path, body, status, message):
    answered, content, _ = api.request("POST", f"/v1/{path}_lora_adapter", body)
    assert (answered, message in content["error"]["message"]) == (status, True), content


def test_there_is_no_such_thing_without_leave():
    with running_api(adapters=Holder()) as api:
        for path in ("load", "unload"):
            body = {"lora_name": "tiny", "lora_path": "/"}
            assert api.request("POST", f"/v1/{path}_lora_adapter", body)[0] == 404
