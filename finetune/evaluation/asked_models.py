"""The models of an evaluation, and how each is asked."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from finetune.errors import UserError
from finetune.evaluation.asked_prompt import PUBLISHED, TASK, AskedPrompt, choose_prompt, trained_prompts
from finetune.evaluation.evaluation import NO_VIEWS, Evaluation, EvaluationSource
from finetune.evaluation.tasks import published_task
from finetune.replies.model_style import ModelUse, find_use
from finetune.replies.task_replies import Style
from finetune.terminal import Say
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.views import Views

Role = Literal["model", "compared"]


class Asking(NamedTuple):
    """What decides how the questions read; models that have it in common share them.

    `prompt` is None where each source or row has its own, `system` for the default system message. With `grounding`,
    markup in all texts is read as tokens; `views` is what pictures an image becomes.
    """

    style: Style
    prompt: str | None
    system: str | None
    grounding: bool
    views: Views | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """One of the models: its role, and how it is asked and loaded."""

    role: Role
    use: ModelUse
    prompt: AskedPrompt
    asking: Asking

    @property
    def name(self) -> str:
        return self.use.name

    @property
    def style(self) -> Style:
        return self.use.style


def find_models(evaluation: Evaluation, say: Say) -> list[EvaluatedModel]:
    """The model, and the one it is compared with.

    Both get the same questions, each in its own way: style, prompt, system message and views are those of its
    training. A model to compare with that has no prompt of its own is asked by that of the first.

    Raises:
        InputError: there is no such model, or its style or its prompt is unknown.
    """
    given: list[tuple[Role, str, str | None]] = [("model", evaluation.model, evaluation.base)]
    if evaluation.compare:
        given.append(("compared", evaluation.compare, None))
    models: list[EvaluatedModel] = []
    published = evaluation.task.published
    for role, name, base in given:
        use = find_use(name, base=base, style=evaluation.style, quantization=evaluation.quantization)
        if published:
            use = replace(use, asked_by="--prompt published")
        prompt = choose_prompt(
            name,
            evaluation.task,
            use.style,
            trained_prompts(name, use.record.prompts),
            given=evaluation.prompt,
            of_sources=[source.prompt for source in evaluation.sources],
            like=models[0].prompt if models else None,
        )
        system = use.record.system if use.style == "chat" and prompt.kind != "rows" else None
        # Markup that was tokens in training is tokens to both models, or they would get other questions.
        grounding = models[0].asking.grounding if models else evaluation.grounding
        grounding = grounding or (not models and not published and use.record.grounding)
        views, said = choose_views(evaluation, use.record, like=models[0].asking.views if models else None)
        asking = Asking(use.style, prompt.text, system, grounding, views)
        models.append(EvaluatedModel(role, use, prompt, asking))
        say(role, f"{name}, {use}")
        if said:
            say("views", said)
        say("prompt", f"asked {prompt.said}" + (f", after its system message {system!r}" if system else ""))
    return models


def choose_views(evaluation: Evaluation, record: ModelRecord, *, like: Views | None) -> tuple[Views | None, str]:
    """What pictures a model is shown of an image, and that in words; empty where there are no views anywhere.

    Those that are given, else those of its training. A model whose training is not recorded, such as a published one,
    is shown the same as the model that it is compared with, else what the recipe says.

    Args:
        record: of the model.
        like: of the model that this one is compared with.
    """
    trained = record.labels is not None or record.views is not None
    given, of_recipe = evaluation.views, evaluation.recipe_views
    if evaluation.task.published:
        otherwise = _unlike(None, record.views, "it was trained with")
        return None, otherwise and f"{_shown(None)}, as the published scripts do{otherwise}"
    if given is not None:
        views = None if given == NO_VIEWS else given
        otherwise = _unlike(views, record.views, "it was trained with") if trained else ""
        return views, f"{_shown(views)} (--views){otherwise}"
    if trained:
        otherwise = "" if of_recipe is None else _unlike(record.views, of_recipe, "the recipe has")
        views, why = record.views, f"as it was trained{otherwise}"
    elif like is not None:
        views, why = like, "as the model that it is compared with"
    else:
        views, why = of_recipe, "by data.views of the recipe"
    return views, "" if views is None and of_recipe is None else f"{_shown(views)}, {why}"


def _shown(views: Views | None) -> str:
    return f"each image as {'itself alone' if views is None else views}"


def _unlike(views: Views | None, other: Views | None, whose: str) -> str:
    return "" if views == other else f", though {whose} {'none' if other is None else other}"


def with_prompt_given(evaluation: Evaluation) -> Evaluation:
    """The evaluation with what follows from a given prompt: it replaces those of the sources, and with "published" all
    is as in the published scripts.

    Raises:
        UserError: the scripts have no such task, or style chat.
    """
    if evaluation.prompt in (None, TASK):
        return evaluation
    sources = tuple(
        replace(source, prompt=None)
        if isinstance(source, EvaluationSource)
        else source.model_copy(update={"prompt": None})
        for source in evaluation.sources
    )
    if evaluation.prompt != PUBLISHED:
        return replace(evaluation, sources=sources)
    if evaluation.style == "chat":
        raise UserError("--prompt published asks every model in raw text, a chat model too: leave out --style chat")
    return replace(evaluation, task=published_task(evaluation.task), style="base", sources=sources)
