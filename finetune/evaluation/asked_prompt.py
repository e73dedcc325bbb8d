"""The prompt of an evaluation: the one that the model was trained with, unless a command says otherwise.

A model that was trained on `{question} Answer:` and is asked `{question}` scores less than it can, and nothing shows
it. So every evaluation says which prompt it took, and why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.data.formats.names import CONVERSATIONS, FIELDS
from finetune.data.formats.row_format import PROMPTS
from finetune.errors import UserError
from finetune.evaluation.task import Task
from finetune.evaluation.tasks import check_prompt, missing_in
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.sources import Source
from finetune.replies.task_replies import Style

PUBLISHED, TRAINED, TASK = "published", "trained", "task"
"""What --prompt takes besides a template."""

_ALL_PLACES = ("{question}", "{phrase}", "{options}")


@dataclass(frozen=True)
class AskedPrompt:
    """By which prompt a model is asked.

    Attributes:
        kind: whose prompt it is: the published scripts', that of training, one that was given, the task's, that of
            each source, or the data's own messages.
        text: the template, where it is the same for all sources; None where each source or row has its own.
        said: it in words, after "asked".
    """

    kind: Literal["published", "trained", "given", "task", "sources", "rows"]
    text: str | None
    said: str


@dataclass(frozen=True)
class TrainedPrompts:
    """The templates of a model's training, by the format of the data.

    Attributes:
        by_format: in training.
        preferred: those of them that the run's own evaluation asks, by format.
        found_in: the file that has them; None where there is no record.
    """

    by_format: Mapping[str, Sequence[str]]
    preferred: Mapping[str, Sequence[str]]
    found_in: str | None


def trained_prompts(model: str, recorded: Mapping[str, Sequence[str]]) -> TrainedPrompts:
    """The prompts that a model was trained with.

    Args:
        model: as given: a run folder has its recipe.
        recorded: by format, in the model's record.

    Raises:
        RecipeError: the recipe of the run is damaged.
    """
    recipe = Path(model) / "recipe.yaml"
    if not (Path(model) / "run.json").is_file() or not recipe.is_file():
        return TrainedPrompts(recorded, {}, "its record" if recorded else None)
    return recipe_prompts(load_recipe(recipe), str(recipe))


def recipe_prompts(recipe: Recipe, found_in: str = "the recipe") -> TrainedPrompts:
    """The prompts that a recipe trains with; `found_in` is what its file is called."""
    asked = _by_format(recipe.evaluate.data if recipe.evaluate is not None else ())
    return TrainedPrompts(_by_format(recipe.data.train), asked, found_in)


def asked_otherwise(recipe: Recipe, task: Task) -> str:
    """What to say where a recipe's evaluation asks by other prompts than its training does; else an empty text."""
    if recipe.evaluate is None or task.format in (*CONVERSATIONS, FIELDS):
        return ""
    asked = list(dict.fromkeys(source.prompt or task.chat_prompt for source in recipe.evaluate.data))
    trained = _fitting("", task, recipe_prompts(recipe), must_be_one=False)
    said = _otherwise(asked, trained)
    return f"asked by {_listed(asked)}{said}: set evaluate.data.prompt" if said else ""


def _by_format(sources: Sequence[Source]) -> dict[str, list[str]]:
    """Format -> the prompts of its sources, each once."""
    found: dict[str, list[str]] = {}
    for source in sources:
        if source.format in PROMPTS:
            prompts = found.setdefault(source.format, [])
            prompt = source.prompt or PROMPTS[source.format]
            if prompt not in prompts:
                prompts.append(prompt)
    return found


def choose_prompt(
    model: str,
    task: Task,
    style: Style,
    trained: TrainedPrompts,
    *,
    given: str | None,
    of_sources: Sequence[str | None] = (),
    like: AskedPrompt | None = None,
) -> AskedPrompt:
    """The prompt to ask a model by.

    Args:
        model: its name, for messages.
        task: what it is asked; the published one if that is given.
        style: of the model.
        trained: with which prompts.
        given: a template, "published", "trained" or "task"; None takes that of training where it is known, else the
            task's.
        of_sources: the prompt of each source, which comes before all others but a given one.
        like: how the model that this one is compared with is asked: a model without a trained prompt of its own is
            asked by the same one.

    Raises:
        UserError: a prompt for data that brings its own, one without its placeholder, or "trained" where that is not
            known or not one.
    """
    if task.format == FIELDS:
        if given not in (None, TASK):
            raise UserError("--prompt: format fields has the prompts of its source: set `prompts` in the recipe")
        return AskedPrompt("rows", None, "by the prompts of its fields")
    if task.format in CONVERSATIONS:
        if given not in (None, TASK):
            raise UserError(f"--prompt: data of format {task.format} brings its own prompts, the messages of its rows")
        return AskedPrompt("rows", None, "by the messages of its rows")
    if given == PUBLISHED:
        return AskedPrompt("published", task.base_prompt, _as_published(task))
    if given not in (None, TRAINED, TASK):
        assert given is not None, "None is in the list"
        check_prompt(task, given)
        return AskedPrompt("given", given, f"by the prompt that was given: {given!r}")
    by_training = like is None and given != TASK and (given == TRAINED or not of_sources or None in of_sources)
    own = _fitting(model, task, trained, must_be_one=by_training)
    if (given == TASK and any(of_sources)) or (given is None and of_sources and None not in of_sources):
        each = list(dict.fromkeys(prompt or task.prompt(style) for prompt in of_sources))
        said = f"by the prompt of the recipe: {_listed(each)}{_otherwise(each, own)}"
        return AskedPrompt("sources", each[0] if len(each) == 1 else None, said)
    text = task.prompt(style)
    if given == TASK:
        return AskedPrompt("task", text, f"by the prompt of the task: {text!r}{_otherwise([text], own)}")
    if len(own) == 1:
        return AskedPrompt("trained", own[0], f"by the prompt it was trained with: {own[0]!r}")
    if given == TRAINED and like is None:
        raise UserError(f"--prompt trained: {model}: {_why_not(trained)}. Give the prompt itself: --prompt TEXT")
    if like is not None and like.kind == "trained":
        return AskedPrompt("given", like.text, f"by the same prompt: {like.text!r}")
    return AskedPrompt("task", text, f"by the prompt of the task: {text!r} ({_why_not(trained)})")


def _listed(prompts: Sequence[str]) -> str:
    return " and ".join(map(repr, prompts))


def _otherwise(asked: Sequence[str], trained: Sequence[str]) -> str:
    """What to say where a model is asked otherwise than it was trained."""
    return f", though it was trained with {_listed(trained)}" if trained and set(asked) - set(trained) else ""


def _as_published(task: Task) -> str:
    likelihood = ", the answer is the likeliest letter" if task.by_likelihood else ""
    return f"as the published scripts do, in raw text: {'<img>..</img>' + task.base_prompt!r}{likelihood}"


def _fitting(model: str, task: Task, trained: TrainedPrompts, must_be_one: bool) -> list[str]:
    """The prompts of training that can ask this task; with `must_be_one` no more than one."""
    own = [prompt for prompt in trained.by_format.get(task.format, ()) if _fits(task, prompt)]
    asked = [prompt for prompt in own if prompt in trained.preferred.get(task.format, ())]
    if not must_be_one or len(own) < 2:
        return own
    if len(asked) == 1:
        return asked
    listed = "\n  ".join(map(repr, own))
    raise UserError(
        f"{model} was trained with {len(own)} prompts that can ask task {task.name}:\n  {listed}\n"
        "Say which one with --prompt TEXT"
    )


def _fits(task: Task, prompt: str) -> bool:
    """Whether a prompt has the places that the task fills in, and no others."""
    unknown = [place for place in _ALL_PLACES if place in prompt and place not in task.base_prompt]
    return not missing_in(task, prompt) and not unknown


def _why_not(trained: TrainedPrompts) -> str:
    if trained.found_in is None:
        return "nothing says with which prompt it was trained"
    others = [prompt for prompts in trained.by_format.values() for prompt in prompts]
    if not others:
        return "it was trained on conversations, which have no prompt in common"
    return f"it was trained with {_listed(others)}, which cannot ask this task"
