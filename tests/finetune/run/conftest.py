"""A run folder, and no launcher around the tests."""

import pytest

from finetune.run.folder import RunFolder


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "first")
    folder.path.mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def not_distributed(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
