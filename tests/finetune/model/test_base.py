"""What is said of the checkpoint that training starts from."""

from finetune.model.base import Base
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.views import Views

FOUR = Views(page=True, grid=(2, 2), overlap=0.1)
TWO = Views(page=True, grid=(1, 2), overlap=0.1)


def test_other_views_than_those_of_the_checkpoint_are_said(tiny_processor):
    trained = Base("m", (), tiny_processor, record=ModelRecord(views=FOUR))
    assert trained.notes(FOUR) == ()
    assert trained.notes(None) == (
        f"The checkpoint was trained on images as {FOUR}; this run shows them alone (data.views).",
    )
    assert trained.notes(TWO)[0].endswith(f"this run shows them as {TWO} (data.views).")
    assert Base("m", (), tiny_processor).notes(FOUR) == ()
