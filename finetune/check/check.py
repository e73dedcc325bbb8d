"""`finetune check`: everything that a run does before it loads weights, shown, and all that is wrong told together."""

from pathlib import Path

from rich.console import Console

from finetune.check.findings import look_before_training
from finetune.check.page import check_page
from finetune.check.sample_preview import one_line
from finetune.check.terminal import print_findings
from finetune.errors import UserError
from finetune.files.atomic_writes import make_folder, write_text
from finetune.recipe import Recipe


def check(
    recipe: Recipe,
    *,
    samples: int = 3,
    html: Path | None = None,
    images: bool = False,
    console: Console | None = None,
    processes: int | None = None,
):
    """Look at a recipe, its model and its data, and show what training would see.

    Args:
        recipe: the resolved recipe.
        samples: how many to show.
        html: a file for the same as a page.
        images: open every image too.
        console: where it is shown; stdout if None.
        processes: see `checking.look_at`.

    Raises:
        UserError: a run would stop before its first step (or at a damaged image), told after everything was shown.
        ValueError, FileNotFoundError: there is no model to check the data against.
    """
    console = console or Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    findings = look_before_training(recipe, samples=samples, images=images, processes=processes)
    print_findings(findings, console)
    if html is not None:
        make_folder(html.absolute().parent)
        write_text(html, check_page(findings))
        console.print(f"page        {one_line(html)}")
    if findings.refusals:
        lines = [f"  {one_line(what)}: {one_line(why)}" for what, why in findings.refusals]
        raise UserError("\n".join(["a run would stop here:", *lines]))
