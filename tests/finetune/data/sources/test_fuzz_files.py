"""Damaged files of every kind, and text in every encoding: read exactly or refused; none ends in a traceback."""

import datasets
import pytest
from broken_files import FILES, check_damaged_files, check_encodings


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(tmp_path, name):
    # Those that the datasets library converts take longer.
    count = 12 if name.endswith((".tar", ".parquet", ".xlsx")) else 150
    fates = check_damaged_files(tmp_path, name, count, 0)
    assert fates.total() == count and fates["read"] >= 1 and fates["read"] < count, fates


def test_encodings_and_marks(tmp_path):
    fates = check_encodings(tmp_path, 150, 0)
    assert min(fates["read"], fates["refused"]) > 15, fates


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_more_damaged_files(tmp_path, name):
    count = 500 if name.endswith((".tar", ".parquet", ".xlsx")) else 5000
    assert check_damaged_files(tmp_path, name, count, 1).total() == count


@pytest.mark.slow
def test_many_more_encodings_and_marks(tmp_path):
    assert check_encodings(tmp_path, 3000, 1).total() == 3000
