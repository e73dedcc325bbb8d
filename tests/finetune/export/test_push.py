"""Uploading to the hub, with a hub that is made here: no network."""

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from finetune.errors import Failed, UserError
from finetune.export import push as push_module
from finetune.export.export import export
from finetune.export.push import push, refuse_push
from finetune.terminal import labelled, say_nothing


class FakeApi:
    """A hub with the given repositories: name -> (private, files)."""

    def __init__(self, repositories=None, fails=None):
        self.repositories = repositories or {}
        self.fails = fails
        self.calls = []

    def model_info(self, repo):
        if self.fails == "info":
            raise HfHubHTTPError("502 Bad Gateway\nmore", response=_Response())
        if repo not in self.repositories:
            raise RepositoryNotFoundError("404", response=_Response())
        private, files = self.repositories[repo]
        return ModelInfo(id=repo, private=private, siblings=[{"rfilename": name} for name in files])

    def create_repo(self, repo, **kwargs):
        self.calls.append(("create_repo", repo, kwargs))

    def upload_folder(self, **kwargs):
        if self.fails == "upload":
            raise ConnectionError("the line is dead")
        self.calls.append(("upload_folder", kwargs))


class _Response:
    headers, request, status_code = {}, None, 502


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setattr(push_module, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "visual").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_new_repository_is_private_and_gets_the_folder(logged_in, folder):
    api, said = FakeApi(), []
    refuse_push("me/model", public=False, api=api)
    push(folder, "me/model", api=api, say=lambda *line: said.append(labelled(*line)))
    (_, repo, created), (_, uploaded) = api.calls
    assert repo == "me/model" and created["private"] is True
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/model", str(folder))
    assert "me/model (private)" in said[0] and "hf_secret" not in "".join(said)


def test_public_only_where_asked_for(logged_in, folder):
    api = FakeApi()
    push(folder, "me/model", public=True, api=api, say=say_nothing)
    assert api.calls[0][2]["private"] is False


def test_without_a_token_it_says_how_to_get_one(logged_in, monkeypatch):
    monkeypatch.setattr(push_module, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"log in \(hf auth login\), or set HF_TOKEN"):
        refuse_push("me/model", public=False, api=FakeApi())


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/mo del", "me/--x", ""])
def test_a_malformed_name_is_refused(logged_in, name):
    with pytest.raises(UserError, match="--push"):
        refuse_push(name, public=False, api=FakeApi())


def test_offline_is_told(logged_in, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        refuse_push("me/model", public=False, api=FakeApi())


def test_a_public_repository_needs_the_word(logged_in):
    api = FakeApi({"me/model": (False, [".gitattributes"])})
    with pytest.raises(UserError, match="that repository is public"):
        refuse_push("me/model", public=False, api=api)
    refuse_push("me/model", public=True, api=api)


def test_a_repository_with_files_is_refused(logged_in):
    api = FakeApi({"me/model": (True, [".gitattributes", "README.md", "model-00001-of-00009.safetensors"])})
    with pytest.raises(UserError, match=r"holds files already \(model-00001-of-00009.safetensors\)"):
        refuse_push("me/model", public=False, api=api)


def test_a_hub_that_does_not_answer_is_no_fault_of_the_user(logged_in):
    with pytest.raises(Failed, match=r"does not answer \(502 Bad Gateway\)"):
        refuse_push("me/model", public=False, api=FakeApi(fails="info"))


def test_an_upload_that_breaks_off_says_how_to_go_on(logged_in, folder):
    with pytest.raises(
        Failed, match=r"is finished, but its upload.*the line is dead.*hf upload me/model .* --private"
    ):
        push(folder, "me/model", api=FakeApi(fails="upload"), say=say_nothing)
    assert (folder / "config.json").is_file()


def test_a_link_out_of_the_folder_is_not_followed(logged_in, folder, tmp_path):
    (tmp_path / "secret.txt").write_text("mine")
    (folder / "visual" / "notes.txt").symlink_to(tmp_path / "secret.txt")
    api = FakeApi()
    with pytest.raises(UserError, match="is a link"):
        push(folder, "me/model", api=api, say=say_nothing)
    assert api.calls == []


def test_an_export_that_could_not_be_pushed_does_not_begin(tiny_folder, tmp_path):
    """Offline, as the tests are: refused before anything is written."""
    with pytest.raises(UserError, match="--push needs"):
        export(str(tiny_folder), "safetensors", out=tmp_path / "out", push="me/model", say=say_nothing)
    assert not list(tmp_path.iterdir())


def test_an_export_is_pushed_when_it_is_finished(tiny_folder, tmp_path, logged_in, monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(push_module, "HfApi", lambda: api)
    out = export(str(tiny_folder), "safetensors", out=tmp_path / "out", push="me/model", say=say_nothing)
    assert api.calls[1][1]["folder_path"] == str(out) == str(tmp_path / "out")
    assert (out / "model.safetensors").is_file()
