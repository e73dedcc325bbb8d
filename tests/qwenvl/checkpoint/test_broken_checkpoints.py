"""Malformed folders by the hundred: each is refused in one sentence, by an error that a command ends with."""

import shutil

import pytest
from adapters_for_tests import make_adapter
from broken_adapters import broken_adapters
from broken_checkpoints import broken_checkpoints
from folder_changes import Case, copy_tiny

from qwenvl import InputError, load_model, load_processor
from qwenvl.loading import require_loadable

CHECKPOINTS, ADAPTERS = broken_checkpoints(), broken_adapters()
# The kinds of damage come in the same order for every file, 29 of each: another step meets them all.
THINNED = 5


@pytest.fixture(scope="module")
def good_adapter(tmp_path_factory):
    # Without a record, whose base would be taken where adapter_config.json names one that is nowhere.
    folder = tmp_path_factory.mktemp("good") / "adapter"
    make_adapter(folder, own=False)
    return folder


def test_the_cases_are_many_and_different():
    for cases, at_least in ((CHECKPOINTS, 1000), (ADAPTERS, 150)):
        assert len({name for name, _ in cases}) == len(cases) >= at_least


def refusals(folder, *reads) -> list[str]:
    """What each reader says, where it refuses; any other exception is a fault."""
    said = []
    for read in reads:
        try:
            read(str(folder))
        except InputError as error:
            said.append(str(error))
    return said


def check_refused(folder, *reads):
    said = refusals(folder, *reads)
    assert said, f"nothing of {[read.__name__ for read in reads]} refuses this folder"
    for message in said:
        assert "\n" not in message and len(message) < 700
        assert folder.name in message or "config" in message


def check_checkpoint(case: Case, folder):
    case[1](copy_tiny(folder))
    check_refused(folder, require_loadable, load_processor)


@pytest.mark.parametrize("case", CHECKPOINTS[::THINNED], ids=lambda case: case[0])
def test_a_malformed_checkpoint_is_refused(case, tmp_path):
    check_checkpoint(case, tmp_path / "checkpoint")


@pytest.mark.parametrize("case", ADAPTERS[::THINNED], ids=lambda case: case[0])
def test_a_malformed_adapter_is_refused(case, tmp_path, good_adapter):
    shutil.copytree(good_adapter, tmp_path / "adapter")
    case[1](tmp_path / "adapter")
    check_refused(tmp_path / "adapter", load_model)


@pytest.mark.slow
def test_every_malformed_checkpoint_is_refused(tmp_path):
    for number, case in enumerate(CHECKPOINTS):
        check_checkpoint(case, tmp_path / str(number) / "checkpoint")
        shutil.rmtree(tmp_path / str(number))


@pytest.mark.slow
def test_every_malformed_checkpoint_is_refused_when_it_is_loaded(tmp_path):
    for number, case in enumerate(CHECKPOINTS):
        folder = copy_tiny(tmp_path / str(number) / "checkpoint")
        case[1](folder)
        for message in refusals(folder, load_model):
            assert "\n" not in message, case[0]
        shutil.rmtree(folder.parent)


@pytest.mark.slow
def test_every_malformed_adapter_is_refused(tmp_path, good_adapter):
    for number, case in enumerate(ADAPTERS):
        folder = tmp_path / str(number) / "adapter"
        shutil.copytree(good_adapter, folder)
        case[1](folder)
        check_refused(folder, load_model)


def test_the_good_ones_are_not_refused(tmp_path, good_adapter):
    assert not refusals(copy_tiny(tmp_path / "copy"), require_loadable, load_processor)
    assert not refusals(good_adapter, require_loadable)
