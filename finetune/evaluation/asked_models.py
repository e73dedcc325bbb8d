"""The models of an evaluation, and how each is asked."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from finetune.errors import UserError
from finetune.evaluation.asked_prompt import PUBLISHED, TASK, AskedPrompt, choose_prompt, trained_prompts
from finetune.evaluation.evaluation import Evaluation, EvaluationSource
from finetune.evaluation.tasks import published_task
from finetune.replies.model_style import ModelUse, find_use
from finetune.replies.task_replies import Style
from finetune.terminal import Say

Role = Literal["model", "compared"]


class Asking(NamedTuple):
    """What decides how the questions read; models that have it in common share them.

    `prompt` is None where each source or row has its own, `system` for the default system message. With `grounding`,
    markup in all texts is read as tokens.
    """

    style: Style
    prompt: str | None
    system: str | None
    grounding: bool


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

    Both get the same questions, each in its own way: style, prompt and system message are those of its training. A
    model to compare with that has no prompt of its own is asked by that of the first.

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
        models.append(EvaluatedModel(role, use, prompt, Asking(use.style, prompt.text, system, grounding)))
        say(role, f"{name}, {use}")
        say("prompt", f"asked {prompt.said}" + (f", after its system message {system!r}" if system else ""))
    return models


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
