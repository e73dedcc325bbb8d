"""The task's score while a model trains: greedy replies to a fixed sample of questions.

Where the evaluation data has several sources, each source also has its own score: new documents and old ones, what is
learned and what is forgotten. The score over all questions of the sample picks the best checkpoint; sources have equal
shares of the sample, hence equal weights, as long as each has enough questions.

The model's mode, its generation config and the random number generators are left as they were: training is bitwise the
same with and without it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import Trainer

from finetune.batches.image_request import VisionCache
from finetune.data.reading import pages_of, views_of
from finetune.data.shown_rows import choose_shown, document_of
from finetune.errors import UserError
from finetune.evaluation.asked_prompt import asked_otherwise
from finetune.evaluation.detection_scores import BOX_COUNTS, boxes_text
from finetune.evaluation.predictions import PREDICTIONS, keep_images, replace_records
from finetune.evaluation.question import Question
from finetune.evaluation.question_sample import QuestionPrompts, QuestionSample
from finetune.evaluation.questions import Questions
from finetune.evaluation.reply_progress import ReplyProgress
from finetune.evaluation.results import Record, Scored, record_of, score_records, with_scores
from finetune.evaluation.task import Task
from finetune.evaluation.tasks import task_of
from finetune.quantities import format_loss
from finetune.recipe import Recipe
from finetune.recipe.sources import source_names
from finetune.replies.lockstep import lockstep_of
from finetune.replies.replies import Decoding, Reply, generate_replies, plan_replies
from finetune.run.left_out import LeftOut
from qwenvl import ImageAccess, QwenVLProcessor
from qwenvl.text.chat import render_prompt

_WHEN = ("before", "after")
BATCH_TOKENS = 4096  # leaves memory for gradients and optimizer states; halved after an out-of-memory error


@dataclass(frozen=True)
class TaskScore:
    """The score at one step.

    Attributes:
        step: optimizer steps done.
        metric: of the task.
        records: one for each question, with its score; none for questions that were left out.
        scored: their scores together.
    """

    step: int
    metric: str
    records: list[Record]
    scored: Scored

    def added_to(self, summary: Mapping[str, Any], when: str) -> dict[str, Any]:
        """The score in `run.json`, with this one added as `before` or `after`: over all questions, and over those of
        each source and group, `{"sources": {"boarding": {"questions": 100, "before": 0.02}}}`; under `unread` how many
        replies could not be read as answers; and of detection, under `boxes`, the numbers of all boxes."""
        scored = self.scored
        sources = {name: (part.questions, part.score) for name, part in scored.sources.items()}
        groups = {name: (scored.counts[name], score) for name, score in scored.groups.items()}
        parts = {
            kind: {
                name: summary.get(kind, {}).get(name, {}) | {"questions": questions, when: score}
                for name, (questions, score) in found.items()
            }
            for kind, found in (("sources", sources), ("groups", groups))
            if found
        }
        unread = {**summary.get("unread", {}), when: sum("unread" in record for record in self.records)}
        total = {"metric": self.metric, "questions": len(self.records), when: scored.total}
        boxes = {}
        if scored.detection is not None:
            counts = {key: scored.detection[key] for key in BOX_COUNTS}
            boxes = {"boxes": {**summary.get("boxes", {}), when: counts}}
        return {**summary, **total, **parts, **boxes, "unread": unread}

    def metrics(self) -> dict[str, float]:
        """The scores by logged key: `eval_anls`, and one for each source and group, `eval_anls_boarding`."""
        key = f"eval_{self.metric}"
        sources = {f"{key}_{name}": part.score for name, part in self.scored.sources.items()}
        groups = {f"{key}_{name}": score for name, score in self.scored.groups.items()}
        return {key: self.scored.total, **sources, **groups}


class TaskEvaluation:
    """The task of a recipe's `evaluate` section, and the sample of its questions.

    Args:
        recipe: with an evaluate section that names a task.
        processor: of the model.
        system: the system message of the training; None for the default one.

    Attributes:
        task: the task of the questions.
        questions: the sample.
        key: the logged key of the score.
        processor: of the model.

    Raises:
        DataError: rows that cannot be asked (see `Questions`).
        UserError: no evaluate section or task, or hidden answers.
    """

    def __init__(self, recipe: Recipe, processor: QwenVLProcessor, system: str | None = None):
        evaluate, data = recipe.evaluate, recipe.data
        if evaluate is None:
            raise UserError("the recipe has no evaluate section: set evaluate.data and evaluate.task")
        root = None if data.images_root is None else Path(data.images_root)
        self.task = task_of(evaluate)
        parts = [
            Questions(
                source,
                self.task,
                images_root=root,
                access=ImageAccess(root=root, allow_urls=data.allow_urls),
                style="chat",
                system=system,
                grounding=data.grounding,
                box_edge=data.box_edge,
                on_bad_row=data.on_bad_row,
                pages=pages_of(recipe),
                views=views_of(recipe),
                ignore=data.ignore,
                markup_as_text=data.markup_as_text,
            )
            for source in evaluate.data
        ]
        self.questions = QuestionSample(
            parts,
            names=source_names(evaluate.data),
            limit=evaluate.limit,
            sample=evaluate.sample,
            seed=recipe.seed,
        )
        if not self.questions.answered:
            raise UserError("evaluate.data: its answers are hidden, so there is no score: set evaluate.task: null")
        if self.task.is_detection or self.task.reads_fields:
            _refuse_cut_replies(self.questions, self.task, processor)
        self.key = f"eval_{self.task.metric}"
        self.processor = processor
        self._otherwise = asked_otherwise(recipe, self.task)

    def __str__(self) -> str:
        """`docvqa: anls on 200 of 5,949 questions (boarding 100, before 100)`; and which prompt, where training has
        another one."""
        said = f"{self.task.name}: {self.task.metric} on {self.questions}"
        return f"{said}; {self._otherwise}" if self._otherwise else said

    def without_scores(self, log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The log history without the scores, for a summary with a separate line for the score."""
        return [{key: value for key, value in one.items() if not key.startswith(self.key)} for one in log_history]

    def write_predictions(self, score: TaskScore, count: int, run: Path, when: str) -> None:
        """Write some replies of a score for the run's report; see `evaluation.predictions` and `shown_rows`."""
        records = []
        by_number = {record["number"]: record for record in score.records}
        for number in self._shown(count):
            if number not in by_number:  # left out: its image cannot be read
                continue
            question, record = self.questions[number], by_number[number]
            answers = list(dict.fromkeys(record["answers"]))
            records.append(
                {
                    "when": when,
                    "origin": record["origin"],
                    "question": record["question"],
                    "images": keep_images(question.images, question.access, record["origin"], run),
                    "target": answers[0],
                    "others": answers[1:],
                    "prediction": record["prediction"],
                    "metric": score.metric,
                    "score": record["score"],
                    **({"source": record["source"]} if "source" in record else {}),
                }
            )
        replace_records(run / PREDICTIONS, when, records)

    def _shown(self, count: int) -> list[int]:
        """The numbers of the questions whose replies are shown, the same ones each time."""
        ends = list(accumulate(self.questions.counts.values())) or [len(self.questions)]
        parts = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        return choose_shown(parts, lambda number: document_of(self.questions[number].images), count)


class TaskScorer:
    """Scores the model in training on the questions of a `TaskEvaluation`.

    Each process replies to a share of the questions; the replies are gathered, so that all have the same score.

    Args:
        asked: the task and its questions.
        stop_ids: ids that end a reply: those of the model before Transformers' trainer changes its generation config.
        vision_cache: has the features of the images that were encoded before training; None reads every image.
        left_out: notes questions whose images cannot be read, or refuses them; None refuses them.

    Attributes:
        last: the latest score, with its step.
    """

    def __init__(
        self,
        asked: TaskEvaluation,
        stop_ids: tuple[int, ...],
        vision_cache: VisionCache | None = None,
        left_out: LeftOut | None = None,
    ):
        self.asked = asked
        self.stop_ids = stop_ids
        self.vision_cache = vision_cache
        self.left_out = left_out or LeftOut(None, "error")
        self.last: TaskScore | None = None

    def evaluate(
        self,
        model: torch.nn.Module,
        accelerator: Accelerator,
        step: int,
        *,
        bar: bool = True,
        tick: Callable[[], Any] = lambda: None,
        is_abandoned: Callable[[], bool] = lambda: False,
        agree: Callable[[], None] = lambda: None,
    ) -> TaskScore:
        """Reply to the sample and score the replies; on all processes together.

        Args:
            model: not wrapped by DDP; its mode is left as it is. It may be sharded over the processes.
            accelerator: of the trainer.
            step: optimizer steps done.
            bar: show a bar on a terminal; a trainer's live line excludes one.
            tick: called after every reply of this process.
            is_abandoned: whether this process shall make no further replies.
            agree: called by all processes together when their replies are made; raises in all where one has none.

        Raises:
            UserError: an image of the sample is damaged, or a source has the name of a group of the data.
        """
        replies = self._share(model, accelerator, bar and accelerator.is_main_process, tick, is_abandoned)
        agree()
        if accelerator.num_processes > 1:
            replies = gather_object(replies)
        replies = sorted(replies, key=lambda reply: reply.index)
        # After the gathering, so that all processes raise together and none waits for another.
        bad = [reply for reply in replies if reply.unreadable]
        if bad and (self.left_out.on_bad_row == "error" or len(bad) == len(replies)):
            lines = "\n  ".join(str(reply.unreadable) for reply in bad)
            raise UserError(f"evaluate.data: {len(bad)} of the sampled questions are on damaged images:\n  {lines}")
        questions: Sequence[Question] = self.asked.questions
        if bad:
            for reply in bad if accelerator.is_main_process else ():
                origin = str(self.asked.questions[reply.index].origin)
                self.left_out.meet("questions", reply.index, origin, str(reply.unreadable))
            replies = [reply for reply in replies if not reply.unreadable]
            questions = [self.asked.questions[reply.index] for reply in replies]
        records = [
            record_of(self.asked.task, reply.index, question, reply)
            for reply, question in zip(replies, questions, strict=True)
        ]
        scored = score_records(self.asked.task, questions, records)
        if both := scored.sources.keys() & scored.groups.keys():
            named = ", ".join(sorted(both))
            raise UserError(f"evaluate.data: {named} is the name of a source and of a group: rename the source")
        self.last = TaskScore(step, self.asked.task.metric, with_scores(records, scored), scored)
        return self.last

    def _share(
        self,
        model: torch.nn.Module,
        accelerator: Accelerator,
        bar: bool,
        tick: Callable[[], Any],
        is_abandoned: Callable[[], bool],
    ) -> list[Reply]:
        """This process's replies, to every n-th question; their index is the number in the sample."""
        numbers = list(range(accelerator.process_index, len(self.asked.questions), accelerator.num_processes))
        tokenizer = self.asked.processor.tokenizer
        prompts = QuestionPrompts(self.asked.questions, numbers, tokenizer, self.asked.processor.n_queries)
        replies = []
        with (
            ReplyProgress(f"evaluating {self.asked.task.metric}", len(numbers), bar=bar) as progress,
            lockstep_of(model, tokenizer.pad_token_id) as lockstep,
        ):
            for reply in generate_replies(
                model,
                prompts,
                plan_replies(prompts),
                tokenizer,
                self.asked.processor.image_processor,
                Decoding(self.asked.task.max_new_tokens, self.stop_ids, batch_tokens=BATCH_TOKENS),
                on_bad_image="wrong",
                vision_cache=self.vision_cache,
                lockstep=lockstep,
                is_abandoned=is_abandoned,
            ):
                replies.append(replace(reply, index=numbers[reply.index]))
                tick()
                if accelerator.is_main_process:
                    progress.reached(len(replies))
        return replies

    def score_of(self, trainer: Trainer) -> TaskScore:
        """The score of a trainer's model outside training: the latest if it is of the same step, else a new one."""
        state, step = trainer.state, trainer.state.global_step
        if step and trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            assert state.best_global_step is not None, "the trainer sets it with best_model_checkpoint"
            step = state.best_global_step
        if self.last is not None and self.last.step == step:
            return self.last
        return self.evaluate(trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator, step)


def _refuse_cut_replies(questions: Sequence[Question], task: Task, processor: QwenVLProcessor) -> None:
    """Refuse a limit of new tokens that no right reply to some questions fits into.

    Raises:
        UserError: with the number that is enough.
    """
    most, grounding = task.max_new_tokens, task.is_detection
    lengths = []
    for question in questions:
        if not question.answers:  # hidden
            continue
        answer = {"type": "text", "text": question.answers[0], "grounding": grounding}
        lengths.append(len(render_prompt([answer], processor.tokenizer).ids) + 1)  # and the end of the turn
    if long := sum(length > most for length in lengths):
        raise UserError(
            f"evaluate.max_new_tokens: the right replies to {long:,} of {len(lengths):,} questions have more than "
            f"{most} tokens, the longest {max(lengths):,}: set it to that at least"
        )


def score_line(score: Mapping[str, Any]) -> tuple[str, str]:
    """Label and text of a line: `anls`, `0.3100 -> 0.8200 on 200 questions`, from the score in `run.json`.

    With several sources ` (boarding 0.0200 -> 0.8900 on 100, before 0.9700 -> 0.9500 on 100)` follows, and where there
    are some, `; 30 -> 2 replies could not be read`.
    """
    each = [f"{name} {_course(part)}" for name, part in score.get("sources", {}).items()]
    counts = score.get("unread", {})
    unread = " -> ".join(f"{counts[when]:,}" for when in _WHEN if when in counts)
    said = f"{_course(score)} questions" + (f" ({', '.join(each)})" if each else "")
    boxes = [score["boxes"][when] for when in _WHEN if when in score.get("boxes", {})]
    if boxes:
        said += "; all boxes: " + " -> ".join(map(boxes_text, boxes))
    return score["metric"], said + (f"; {unread} replies could not be read" if any(counts.values()) else "")


def _course(score: Mapping[str, Any]) -> str:
    values = " -> ".join(format_loss(score[when]) for when in _WHEN if when in score)
    return f"{values} on {score['questions']:,}"
