"""What a run trains its model as: the record beside the adapter or the weights, see `qwenvl.checkpoint.record`."""

from finetune.data.checks.checked import Checked
from finetune.data.checks.rules import trained_labels
from finetune.data.formats.row_format import PROMPTS
from finetune.data.reading import views_of
from finetune.model.base import Base
from finetune.recipe import Recipe
from qwenvl.checkpoint.identity import BaseIdentity
from qwenvl.checkpoint.record import BaseNote, ModelRecord


def record_of_run(recipe: Recipe, base: Base, base_identity: BaseIdentity, checked: Checked) -> ModelRecord:
    """The record of the model that a recipe trains.

    Args:
        base, base_identity: the checkpoint that training starts from.
        checked: the training data.
    """
    tokenizer = base.processor.tokenizer
    return ModelRecord(
        base=BaseNote(recipe.model.path, base_identity),
        quantize=base.quantized,
        chat_format="chatml",
        stop_ids=(tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id),
        prompts=_prompts(recipe),
        system=checked.system,
        views=views_of(recipe),
        grounding=recipe.data.grounding,
        labels=trained_labels(recipe.data.labels, recipe.data.train_on),
    )


def _prompts(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """The templates of each format, in the order of the sources; none for a format whose rows bring the prompts."""
    prompts: dict[str, tuple[str, ...]] = {}
    for source in recipe.data.train:
        template = source.prompt or PROMPTS.get(source.format)
        known = prompts.get(source.format, ())
        prompts[source.format] = tuple(dict.fromkeys([*known, *([] if template is None else [template])]))
    return prompts
