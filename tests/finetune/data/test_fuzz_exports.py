"""Broken annotation exports of every layout: read, reported or refused in a sentence; none ends in a traceback."""

import pytest
from broken_exports import check_broken_exports

from finetune.recipe.sources import LAYOUTS

EXPORTS = 300


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_reported_or_refused(tmp_path, layout):
    fates = check_broken_exports(tmp_path, layout, EXPORTS, 0)
    assert fates.total() == EXPORTS
    # Each happens in numbers, or this would show nothing.
    assert min(fates[fate] for fate in ("read", "bad rows")) > EXPORTS / 50, fates
    assert fates["refused"] > 0, fates


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_more(tmp_path, layout):
    assert check_broken_exports(tmp_path, layout, 20_000, 1).total() == 20_000
