"""What is evaluated, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune.batches.budget import REPLY_BATCH_TOKENS
from finetune.data.images.pages import Pages
from finetune.evaluation.task import Task
from finetune.recipe.document_fields import Prompts
from finetune.recipe.sources import Annotations, NamedSource, Part
from finetune.replies.task_replies import Style
from qwenvl.views import Views

NO_VIEWS: Literal["none"] = "none"
"""Each image by itself, whatever a model was trained with."""


@dataclass(frozen=True)
class EvaluationSource:
    """A dataset to ask from; see `data.sources.sources.Location`. `format` None is the task's.

    `name` is what its score goes by where there are several; None is the name of its file.
    """

    path: str
    format: str | None = None
    config: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    box_form: str | None = None
    weight: float = 1.0
    limit: int | None = None
    streaming: bool = False
    encoding: str | None = None
    delimiter: str | None = None
    part: Part | None = None
    name: str | None = None
    annotations: Annotations | None = None
    fields: tuple[str, ...] = ()
    reply: Literal["value", "json"] = "value"
    missing: Literal["write_null", "leave_out"] | None = None
    nested: tuple[str, ...] = ()
    prompts: Prompts | None = None


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how.

    Attributes:
        model: whatever `qwenvl.load_model` takes.
        task: with the most new tokens of a reply.
        sources: what is asked, one after the other; several are scored apart as well.
        compare: a second model, asked the same; None for none.
        base: of an adapter, where it is not where the adapter says; None for where it says.
        images_root, allow_urls: what images may be reached.
        limit: use only the first `limit` questions; None is all.
        sample: number of them to draw by `seed`, in equal shares of all sources; None is all.
        style: None is each model's own.
        prompt: a template, or "published", "trained" or "task", see `asked_prompt`; None is the prompt of training
            where that is known, else the task's. A source's own prompt comes before these two only.
        shots: solved examples before each question, for style base.
        shots_from: where they are drawn from; None is the source of the question.
        dtype: as `load_model` takes it; "auto" is the device's own.
        quantization: "nf4" or "none" for both models; None is each model's own, as it was trained.
        batch_tokens: see `replies.Decoding`.
        grounding, box_edge: read markup in all texts as tokens, and coordinates of 1000, see `Questions`.
        pages: how files of several pages become several images; None refuses them unless a page is named.
        views: what pictures an image becomes for both models; "none" is itself alone, None what each was trained with.
        recipe_views: of the recipe that says what is asked, for models whose training is not recorded.
        on_bad_row: what happens to a row that cannot be asked.
        ignore, markup_as_text: as in a recipe's `data`.
        on_bad_image: what happens to an image that is missing or damaged; "wrong" counts its questions as wrong.
        out: where results go; None is `runs/evaluations/MODEL-TASK`, or in a run's own folder.
    """

    model: str
    task: Task
    sources: tuple[EvaluationSource | NamedSource, ...]
    compare: str | None = None
    base: str | None = None
    images_root: str | None = None
    allow_urls: bool = False
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    style: Style | None = None
    prompt: str | None = None
    shots: int = 0
    shots_from: EvaluationSource | None = None
    dtype: str = "auto"
    quantization: str | None = None
    batch_tokens: int = REPLY_BATCH_TOKENS
    grounding: bool = False
    box_edge: Literal["error", "clamp"] = "error"
    pages: Pages | None = None
    views: Views | Literal["none"] | None = None
    recipe_views: Views | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    ignore: tuple[str, ...] = ()
    markup_as_text: tuple[str, ...] = ()
    on_bad_image: Literal["refuse", "wrong"] = "refuse"
    out: Path | None = None
