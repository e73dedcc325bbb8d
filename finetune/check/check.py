"""`finetune check`: show everything that a run does before it loads weights, and report all problems together."""

from pathlib import Path

from rich.console import Console

from finetune.check.findings import look_before_training
from finetune.check.page import check_page
from finetune.check.sample_preview import one_line
from finetune.check.terminal import print_findings
from finetune.errors import UserError
from finetune.files.atomic_writes import make_folder, write_text
from finetune.files.output_paths import refuse_unwritable_file
from finetune.files.path_errors import path_errors
from finetune.recipe import Recipe
from finetune.terminal import labelled


def check(
    recipe: Recipe,
    *,
    samples: int = 3,
    html: Path | None = None,
    images: bool = False,
    console: Console | None = None,
    processes: int | None = None,
) -> None:
    """Check a recipe, its model and its data, and show what training would see.

    Args:
        recipe: the resolved recipe.
        samples: how many to show.
        html: file to write the same to, as a page.
        images: open every image too.
        console: where it is shown; stdout if None.
        processes: see `checking.look_at`.

    Raises:
        UserError: a run would stop before its first step (or at a damaged image), raised after everything was shown;
            or `html` cannot be written.
        InputError: there is no model to check the data with.
    """
    if html is not None:
        refuse_unwritable_file(html, "the page", "--html")
    console = console or Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    findings = look_before_training(recipe, samples=samples, images=images, processes=processes)
    print_findings(findings, console)
    if html is not None:
        document = check_page(findings)
        with path_errors(html, "write the page to", "Give another file with --html"):
            make_folder(html.absolute().parent)
            write_text(html, document)
        console.print(labelled("page", one_line(html)))
    if findings.refusals:
        lines = [f"  {one_line(what)}: {one_line(why)}" for what, why in findings.refusals]
        raise UserError("\n".join(["a run would stop here:", *lines]))
