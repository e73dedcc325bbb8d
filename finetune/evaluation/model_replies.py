"""The replies of one model to the questions of an evaluation: those that are in the file already, and new ones."""

import contextlib
import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from finetune.evaluation.asked_models import EvaluatedModel
from finetune.evaluation.evaluation import Evaluation
from finetune.evaluation.question_sample import QuestionPrompts, QuestionSample
from finetune.evaluation.reply_progress import ReplyProgress
from finetune.evaluation.results import PredictionFile, Record, record_of
from finetune.evaluation.shared_replies import SharedReplies, tell_numbers
from finetune.model.computing import choose_dtype, is_random, own_device
from finetune.replies.replies import Decoding, generate_replies, plan_replies, stop_ids_of, without_adapter
from finetune.run.meeting import Meeting
from finetune.terminal import Say
from qwenvl import QwenVLForConditionalGeneration, load_model, load_processor
from qwenvl.images.images import ImageError


@dataclass(frozen=True)
class Replies:
    """The replies of one model.

    Attributes:
        records: one for each question, in their order, without scores.
        speed: of the replies that were generated now; None where all were there already.
        notes: what a reader of the numbers should know about the model.
    """

    records: list[Record]
    speed: dict[str, float] | None = None
    notes: tuple[str, ...] = ()


def reply_to(
    evaluation: Evaluation,
    model: EvaluatedModel,
    questions: QuestionSample,
    file: PredictionFile,
    meeting: Meeting | None,
    say: Say,
) -> Replies:
    """The replies to all questions: those that are in the file, and new ones, which are added to it as they come.

    Raises:
        ImageError: an image cannot be read, and that is refused.
        Failed: the device's memory does not hold a single prompt.
    """
    kept = file.open()
    numbers = [number for number in range(len(questions)) if number not in kept]
    if kept:
        say("resume", f"{len(kept):,} of {len(questions):,} replies of {model.name} are there")
    if meeting is not None:
        tell_numbers(meeting, model.role, numbers, file.identity)
        if numbers:
            say("processes", f"{meeting.processes} share the questions to {model.name}")
    new = generate(evaluation, model, questions, numbers, file, meeting) if numbers else Replies([])
    # The next model may need the memory of this one.
    free_memory()
    records = kept | {record["number"]: record for record in new.records}
    return replace(new, records=[records[number] for number in range(len(questions))])


def free_memory() -> None:
    """Give the memory of a model that nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generate(
    evaluation: Evaluation,
    model: EvaluatedModel,
    questions: QuestionSample,
    numbers: Sequence[int],
    file: PredictionFile | None,
    meeting: Meeting | None,
) -> Replies:
    """Load the model and reply to the questions with these numbers.

    Args:
        file: gets the replies as they come; None in a process that hands its own to the main one.
        meeting: of the processes that share the questions; None where this is the only one.
    """
    task, is_main = evaluation.task, file is not None
    source = model.use.source
    processor = load_processor(source.base)
    tokenizer = processor.tokenizer
    prompts = QuestionPrompts(questions, numbers, tokenizer, processor.n_queries)
    with ReplyProgress("reading questions", len(numbers), shows=is_main) as progress:
        plan = plan_replies(prompts, progress.reached)
    lengths = plan.lengths
    shared, share = None, list(range(len(numbers)))
    if meeting is not None:
        shares = plan.shares(meeting.processes)
        shared, share = SharedReplies(meeting, model.role, [*map(len, shares)]), shares[meeting.process]
        prompts = QuestionPrompts(questions, [numbers[index] for index in share], tokenizer, processor.n_queries)
        plan = plan.of(share)
        if not share and not is_main:
            return Replies([])
    loaded = load_model(
        source.base,
        adapter=source.adapter,
        dtype=choose_dtype(evaluation.dtype),
        quantization=model.use.quantization,
        quantize=model.use.quantize,
        device_map=own_device() if torch.cuda.is_available() else None,
    )
    notes = _notes(model, without_adapter(loaded), lengths)
    stop_texts = task.stop if model.style == "base" else ()
    decoding = Decoding(
        task.max_new_tokens,
        # The published scripts end replies of chat models too at <|endoftext|> alone.
        (tokenizer.eod_id,) if task.published else stop_ids_of(loaded, tokenizer, model.style),
        tuple(text for text in stop_texts if text not in tokenizer.control_tokens),
        batch_tokens=evaluation.batch_tokens,
        min_new_tokens=task.min_new_tokens,
    )
    records: list[Record] = []
    started = time.monotonic()
    with (
        ReplyProgress(f"{task.name}, {model.name}", len(numbers), shows=is_main) as progress,
        _naming_the_way_on(),
        contextlib.ExitStack() as stack,
    ):

        def keep(new: Iterable[Record]) -> None:
            for record in new:
                assert file is not None, "the main process has the file"
                records.append(record)
                file.append([record])
                progress.reached(len(records))

        if shared is not None and is_main:
            # Also when this process is stopped: what has arrived is kept.
            stack.callback(lambda: keep(shared.last_arrived()))
        for reply in generate_replies(
            loaded,
            prompts,
            plan,
            tokenizer,
            processor.image_processor,
            decoding,
            on_bad_image=evaluation.on_bad_image,
        ):
            number = numbers[share[reply.index]]
            record = record_of(task, number, questions[number], reply)
            if shared is None:
                keep([record])
            elif is_main:
                keep([record])
                keep(shared.arrived())
            else:
                shared.send(record)
        if shared is not None and is_main:
            keep(shared.rest())
    seconds = time.monotonic() - started
    speed = {
        "replies": len(records),
        "seconds": round(seconds, 2),
        "examples_per_second": round(len(records) / max(seconds, 1e-9), 3),
    }
    return Replies(records, speed, tuple(notes))


def _notes(model: EvaluatedModel, loaded: QwenVLForConditionalGeneration, lengths: Sequence[int]) -> list[str]:
    """What a reader of the numbers should know about the model, and about prompts of these lengths."""
    notes = []
    if is_random(loaded):
        notes.append(f"{model.name} has random weights: it shows that evaluation works, not that it reads.")
    trained_up_to = loaded.config.seq_length
    if beyond := sum(length > trained_up_to for length in lengths):
        views = model.asking.views
        cost = "" if views is None else f"; each image is {views.count} pictures (--views)"
        notes.append(
            f"{beyond:,} prompts of {model.name} are longer than the {trained_up_to:,} tokens that it was trained on "
            f"(seq_length), up to {max(lengths):,}: replies to them may be worse{cost}."
        )
    return notes


@contextlib.contextmanager
def _naming_the_way_on() -> Iterator[None]:
    """Raises:
    ImageError: as within, with what else can be done than to mend the image.
    """
    try:
        yield
    except ImageError as error:
        remedy = (
            f"{error.remedy}. The replies so far are kept. --bad-image wrong counts the questions on such images as "
            "wrong and lists them"
        )
        raise ImageError(error.image, error.reason, remedy) from error
