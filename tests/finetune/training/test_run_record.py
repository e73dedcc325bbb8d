"""What run.json says of a run that fails, whatever happens to the file meanwhile."""

import json

import pytest

from finetune.errors import Interrupted, UserError
from finetune.run.folder import RunFolder
from finetune.training.phases import Phases
from finetune.training.run_record import record_failure


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.write_run({"status": "running", "identity": {"base": "a"}})
    return folder


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("no"), "failed"), (Interrupted(15, True), "interrupted")])
def test_a_failure_is_noted_and_the_rest_stays(run, error, status):
    with pytest.raises(type(error)), record_failure(run, Phases("read")):
        raise error
    described = json.loads(run.run_file.read_text())
    assert described["status"] == status and described["identity"] == {"base": "a"} and "read" in described["phases"]


@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_the_failure_itself_is_raised_where_it_cannot_be_noted(run, damage):
    with pytest.raises(RuntimeError, match="the cause"), record_failure(run, Phases("read")):
        run.run_file.unlink() if damage == "gone" else run.run_file.write_text("{")
        raise RuntimeError("the cause")


def test_a_run_that_is_gone_is_not_begun_again_by_a_note(run):
    run.run_file.unlink()
    with pytest.raises(UserError, match="has been deleted"):
        run.update_run({"status": "finished"})
    assert not run.run_file.exists()
