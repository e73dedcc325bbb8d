"""`finetune evaluate MODEL_OR_RUN --task TASK --data PATH`"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.commands.arguments import add_base, add_dtype, add_quantization, add_style, count, views
from finetune.errors import UserError
from finetune.files.output_paths import refuse_unwritable_folder
from finetune.run.launch import is_main_process

if TYPE_CHECKING:
    from finetune.data.images.pages import Pages
    from finetune.evaluation.evaluate import EvaluationSource
    from finetune.evaluation.tasks import Task
    from finetune.recipe import Recipe
    from finetune.recipe.sources import Annotations, NamedSource
    from qwenvl.views import Views

SUMMARY = "score a model on a task, with an interval and a page of its worst replies"
WHEN_STOPPED = "the replies so far are kept: the same command goes on"
EXAMPLES = """\
finetune evaluate Qwen/Qwen-VL-Chat --task docvqa --data HuggingFaceM4/DocumentVQA --split validation
finetune evaluate Qwen/Qwen-VL-Chat --task refcoco --data lmms-lab/RefCOCO --split val --prompt published
finetune evaluate runs/docvqa_lora --recipe recipes/docvqa_lora.yaml --compare Qwen/Qwen-VL-Chat
torchrun --nproc-per-node 8 -m finetune evaluate runs/docvqa_lora --recipe recipes/docvqa_lora.yaml
finetune evaluate runs/mine --task custom --metric anls --data questions.jsonl --column answers=label"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="hub id, checkpoint, exported folder, adapter or run")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--task", help="docvqa, chartqa, textvqa, refcoco, flickr30k, ..., or custom with --metric")
    asked.add_argument("--data", metavar="PATH", help="file, folder or hub dataset id")
    asked.add_argument(
        "--recipe", type=Path, help="take task, metric, data and prompts of its evaluate section, all of its rows"
    )
    asked.add_argument("--split", help="split of a hub dataset, such as validation")
    asked.add_argument("--config", help="configuration of a hub dataset that has several")
    asked.add_argument("--format", help="what a row of custom data looks like; vqa by default")
    asked.add_argument(
        "--column", metavar="role=name", action="append", default=[], help="where the data has another name; repeat"
    )
    asked.add_argument("--layout", help="of an annotation export: coco, label_studio, labelme, cvat, via, yolo")
    asked.add_argument("--fields", metavar="NAMES", help="of task fields: invoice_no,date,total, each a column")
    asked.add_argument(
        "--reply", choices=["value", "json"], help="of task fields: a question a field (the default), or all as JSON"
    )
    asked.add_argument("--encoding", help="of a text file that is not UTF-8, such as gbk or cp1252")
    asked.add_argument(
        "--delimiter",
        type=_mark,
        metavar="MARK",
        help="between fields of a .csv, .tsv or .txt file",
    )
    asked.add_argument("--box-form", choices=["xyxy", "xywh"], help="of boxes in pixels, where the task does not say")
    asked.add_argument("--images-root", metavar="DIR", help="folder that image paths are relative to and stay in")
    asked.add_argument(
        "--pages", type=count, metavar="N", help="a file of up to N pages is shown as so many images; else name a page"
    )
    asked.add_argument("--dpi", type=count, help="of the pages of a PDF, as in training; 150 by default")
    asked.add_argument("--limit", type=count, metavar="N", help="only the first N questions")
    asked.add_argument("--sample", type=count, metavar="N", help="N questions drawn by --seed, the same every time")
    asked.add_argument("--seed", type=int, default=0, help="of --sample; 0 by default")
    asked.add_argument("--on-bad-row", choices=["error", "skip"], help="skip leaves out and lists it; or by --recipe")
    asked.add_argument(
        "--ignore", metavar="COLUMN", action="append", default=[], help="data.ignore of a recipe: left unread; repeat"
    )
    asked.add_argument(
        "--markup-as-text",
        metavar="MARKUP",
        action="append",
        default=[],
        help="data.markup_as_text of a recipe: asked as words, such as '<image>'; repeat",
    )
    asked.add_argument(
        "--bad-image",
        choices=["refuse", "wrong"],
        default="refuse",
        help="a missing or damaged image ends the evaluation, or its questions count as wrong and are listed",
    )
    how = parser.add_argument_group("how it is asked")
    how.add_argument(
        "--metric", help="of task custom: anls, relaxed_accuracy, vqa_score, exact_match, grounding, detection, .."
    )
    how.add_argument(
        "--prompt",
        metavar="TEXT|published|trained|task",
        help="text with {question} or {phrase} to fill in; published asks and scores as the published scripts do; by "
        "default the prompt of training where it is known, else the task's",
    )
    add_style(how)
    how.add_argument(
        "--shots", type=int, default=0, metavar="K", help="solved examples first, of other images; style base"
    )
    how.add_argument("--shots-from", metavar="PATH[:split]", help="take them from there, such as a training split")
    how.add_argument(
        "--views",
        type=views,
        metavar="RxC[:OVERLAP]|none",
        help="show each image as the page and its parts, 2x2 of them say; by default as each model was trained",
    )
    how.add_argument("--max-new-tokens", type=count, metavar="N", help="of a reply; by default the task's")
    add_base(how)
    add_dtype(how)
    add_quantization(how)
    how.add_argument("--batch-tokens", type=count, metavar="N", help="most tokens of a batch; 8192 by default")
    parser.add_argument("--compare", metavar="BASE", help="a second model, asked the same: shows the difference")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results go here; RUN/evaluations/TASK or runs/evaluations/MODEL-TASK"
    )


def _mark(text: str) -> str:
    """The mark between fields; shells make it hard to write a tab."""
    return "\t" if text in ("\\t", "tab") else text


def run(arguments: argparse.Namespace) -> None:
    refuse_what_does_not_go_together(arguments)
    task, recipe = task_of(arguments)
    if arguments.out is not None and is_main_process():
        refuse_unwritable_folder(arguments.out, "the results", "--out", replaced=False)
    # Nothing heavy is imported before the arguments are known to be right.
    from finetune.data.reading import views_of
    from finetune.evaluation.evaluate import Evaluation, EvaluationSource, evaluate

    images_root = arguments.images_root
    sources: tuple[EvaluationSource | NamedSource, ...]
    if recipe is None:
        given = {key: getattr(arguments, key) for key in ("config", "split", "box_form", "encoding", "delimiter")}
        annotations = annotations_of(arguments.layout, task.format)
        columns = columns_of(arguments)
        source = EvaluationSource(
            arguments.data, columns=columns, annotations=annotations, **given, **fields_of(arguments)
        )
        sources = (source,)
    else:
        assert recipe.evaluate is not None, "task_of refuses such a recipe"
        # A limit bounds the time that training spends on it; here all is asked. Of a source that is cut, the limit is
        # that of the rows to train on as well, and decides what is a document.
        sources = tuple(
            source.model_copy(update={"limit": None}) if source.part is None else source
            for source in recipe.evaluate.data
        )
        images_root = images_root or recipe.data.images_root
    shots_from = None
    if arguments.shots_from is not None:
        if len(sources) > 1:
            raise UserError(f"--shots-from is read as the data is, and the recipe names {len(sources)} sources of it")
        path, split = path_and_split(arguments.shots_from)
        like = sources[0]
        shots_from = EvaluationSource(
            path,
            config=like.config,
            split=split,
            **text_file_keys(path, like),
            columns=like.columns,
            box_form=like.box_form,
            annotations=like.annotations,
            fields=like.fields,
            reply=like.reply,
            missing=like.missing,
            nested=like.nested,
            prompts=like.prompts,
        )
    optional = {"batch_tokens": arguments.batch_tokens} if arguments.batch_tokens else {}
    evaluate(
        Evaluation(
            model=arguments.model,
            task=task,
            sources=sources,
            compare=arguments.compare,
            base=arguments.base,
            images_root=images_root,
            allow_urls=bool(recipe and recipe.data.allow_urls),
            limit=arguments.limit,
            sample=arguments.sample,
            seed=arguments.seed,
            style=arguments.style,
            # A recipe's null is the format's own prompt, in its run's scores too.
            prompt=prompt_of(arguments, recipe),
            shots=arguments.shots,
            shots_from=shots_from,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            grounding=bool(recipe and recipe.data.grounding),
            box_edge="error" if recipe is None else recipe.data.box_edge,
            pages=pages_asked(arguments, recipe),
            views=views_asked(arguments.views),
            recipe_views=None if recipe is None else views_of(recipe),
            on_bad_row=arguments.on_bad_row or (recipe.data.on_bad_row if recipe else "error"),
            ignore=(*(recipe.data.ignore if recipe else ()), *arguments.ignore),
            markup_as_text=(*(recipe.data.markup_as_text if recipe else ()), *arguments.markup_as_text),
            on_bad_image=arguments.bad_image,
            out=arguments.out,
            **optional,
        )
    )


def reads_fields(arguments: argparse.Namespace) -> bool:
    return arguments.task == "fields" or arguments.metric == "field_f1"


def fields_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `EvaluationSource` is told of task fields, whose prompt is the source's."""
    if not reads_fields(arguments):
        return {}
    names = tuple(name.strip() for name in (arguments.fields or "").split(",") if name.strip())
    return {"fields": names, "reply": arguments.reply or "value", "prompts": arguments.prompt}


def prompt_of(arguments: argparse.Namespace, recipe: "Recipe | None") -> str | None:
    if recipe is None and reads_fields(arguments):
        return None
    return arguments.prompt or (None if recipe is None else "task")


OF_DATA = (
    *("split", "config", "format", "layout", "column", "box_form", "pages", "dpi", "fields", "reply"),
    *("encoding", "delimiter"),
)


def text_file_keys(path: str, like: "EvaluationSource | NamedSource") -> dict[str, Any]:
    """The encoding and the delimiter of a source, for another file, as far as it is of a kind that has them."""
    from finetune.data.sources.csv_rows import DELIMITERS
    from finetune.data.sources.sources import TEXT_KINDS
    from finetune.data.sources.text_encoding import kind_of_file

    kind = kind_of_file(Path(path))
    kinds = {"encoding": TEXT_KINDS, "delimiter": DELIMITERS}
    keys = {key: getattr(like, key) for key, own in kinds.items() if kind in own}
    return {key: value for key, value in keys.items() if value is not None}


def pages_asked(arguments: argparse.Namespace, recipe: "Recipe | None") -> "Pages | None":
    """How files of several pages are read."""
    from finetune.data.images.pages import Pages
    from finetune.data.reading import pages_of
    from qwenvl.images.pdf_pages import DPI

    if recipe is not None:
        return pages_of(recipe)
    if arguments.pages is None and arguments.dpi is None:
        return None
    # A single page is what is read without --pages; one with more is refused.
    return Pages(arguments.dpi or DPI, arguments.pages or 1)


def views_asked(text: str | None) -> "Views | Literal['none'] | None":
    """What `--views` says.

    Raises:
        InputError: a grid or an overlap out of bounds.
    """
    from qwenvl.views import Views

    if text is None:
        return None
    if text == "none":
        return "none"
    grid, _, overlap = text.partition(":")
    rows, columns = map(int, grid.split("x"))
    return Views(True, (rows, columns), float(overlap) if overlap else Views.overlap)


def refuse_what_does_not_go_together(arguments: argparse.Namespace) -> None:
    """Raises:
    UserError: with the arguments that contradict each other or are missing.
    """
    if arguments.shots < 0:
        raise UserError(f"--shots must be 0 or more, not {arguments.shots}")
    if arguments.shots_from is not None and not arguments.shots:
        raise UserError("--shots-from says where solved examples come from: say how many with --shots")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError("--prompt is blank: give a text, published, trained or task")
    if arguments.views is not None and arguments.prompt == "published":
        raise UserError(
            "--prompt published shows each image by itself, as the published scripts do: leave out --views"
        )
    if arguments.recipe is not None:
        given = [name for name in ("task", "metric", "data", *OF_DATA) if getattr(arguments, name)]
        if given:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"--recipe says what is asked, and so does {named}: give one of them")
        return
    if arguments.task is None or arguments.data is None:
        raise UserError("give --task and --data, or --recipe with an evaluate section that names a task")
    if arguments.layout is not None and (arguments.column or arguments.box_form):
        raise UserError("--layout says where everything is: take out --column and --box-form")
    if arguments.layout is not None and (arguments.encoding or arguments.delimiter):
        raise UserError("--layout says how its file is read: take out --encoding and --delimiter")
    check_text_file(arguments.encoding, arguments.delimiter)
    if (arguments.task == "custom") != (arguments.metric is not None):
        raise UserError("--metric is for --task custom, and task custom needs it")
    for name in ("fields", "reply"):
        if getattr(arguments, name) is not None and not reads_fields(arguments):
            raise UserError(f"--{name} is for --task fields")
    if reads_fields(arguments) and not arguments.fields:
        raise UserError("--task fields needs --fields invoice_no,date,total: the columns of the documents' fields")
    if arguments.format is not None and arguments.task != "custom":
        raise UserError(f"--format is for --task custom: task {arguments.task} has its own")


def check_text_file(encoding: str | None, delimiter: str | None) -> None:
    """Raises:
    UserError: an encoding that is unknown, or a mark that cannot be between fields.
    """
    from finetune.recipe.sources import is_text_encoding

    if encoding is not None and not is_text_encoding(encoding):
        raise UserError(f"--encoding {encoding}: it is not known; write its common name, such as gbk, big5 or cp1252")
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise UserError(f"--delimiter {delimiter!r}: give the one character that is between the fields")


def task_of(arguments: argparse.Namespace) -> "tuple[Task, Recipe | None]":
    """The task with the most new tokens of a reply, and the recipe where one says what is asked.

    Raises:
        UserError: an unknown task or metric, or a recipe without a task.
    """
    from dataclasses import replace

    from finetune.evaluation.tasks import custom_task, find_task
    from finetune.evaluation.tasks import task_of as task_of_section
    from finetune.recipe import load_recipe

    recipe = None
    if arguments.recipe is not None:
        recipe = load_recipe(arguments.recipe)
        if recipe.evaluate is None or recipe.evaluate.task is None:
            raise UserError(
                f"{arguments.recipe}: its evaluate section names no task: set evaluate.task, or give --task and --data"
            )
        task = task_of_section(recipe.evaluate)
    elif arguments.task == "custom":
        usual = "fields" if reads_fields(arguments) else "vqa"
        task = custom_task(arguments.metric, format=arguments.format or usual)
    else:
        task = find_task(arguments.task)
    if arguments.max_new_tokens is None:
        return task, recipe
    if arguments.prompt == "published" and task.metric == "multiple_choice":
        raise UserError("--max-new-tokens has no use here: published, the reply to a choice is its likeliest letter")
    return replace(task, max_new_tokens=arguments.max_new_tokens), recipe


def path_and_split(text: str) -> tuple[str, str | None]:
    """`PATH:split` or `PATH`; a path that is there is taken whole."""
    path, _, split = text.rpartition(":")
    if not path or not split or "/" in split or Path(text).exists():
        return text, None
    return path, split


def annotations_of(layout: str | None, row_format: str) -> "Annotations | None":
    """How an annotation export is read, with the classes' own names; None where there is no layout.

    Raises:
        UserError: an unknown layout, or one that is not read as the task's format.
    """
    from finetune.recipe.sources import LAYOUTS, Annotations

    if layout is None:
        return None
    if layout not in LAYOUTS:
        raise UserError(f"--layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if row_format not in LAYOUTS[layout] or row_format == "vqa":
        what = "needs the questions of a recipe: use --recipe" if row_format == "vqa" else "has no such rows"
        raise UserError(f"--layout {layout}: the task reads format {row_format}, and this layout {what}")
    return Annotations.model_validate({"layout": layout})


def columns_of(arguments: argparse.Namespace) -> dict[str, str]:
    """`role=name` pairs.

    Raises:
        UserError: one without `=`, or a role given twice.
    """
    columns: dict[str, str] = {}
    for pair in arguments.column:
        role, equals, name = pair.partition("=")
        if not (role and equals and name):
            raise UserError(f"--column {pair}: write role=name, such as question=query")
        if role in columns:
            raise UserError(f"--column {role} is given twice")
        columns[role] = name
    return columns
