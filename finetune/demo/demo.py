"""`finetune demo`: open a model, and serve a page to try it."""

from collections.abc import Sequence
from pathlib import Path

from finetune.demo.access import password_check, read_passwords
from finetune.demo.engine_model import EngineModel, close_models, open_models
from finetune.demo.run_examples import Example, find_run, read_examples
from finetune.demo.server import (
    GRACE,
    Server,
    make_app,
    page_folder,
    prepare_gradio,
    refuse_open_page,
    take_port,
)
from finetune.errors import Failed
from finetune.replies.model_style import find_use
from finetune.replies.task_replies import Style
from finetune.serve.reach import is_this_machine, own_names, url_of
from finetune.terminal import say


def run_demo(
    model: str,
    compare: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    password_file: Path | None = None,
    base: str | None = None,
    style: Style | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
) -> None:
    """Serve the page until it is stopped.

    Args:
        model: anything `qwenvl.load_model` takes; that of a run has examples.
        compare: a second model, which answers the same beside it.
        host, port: where to listen; None is the first port that is free from `FIRST_PORT`.
        password_file: lines `name:password` of those who may open the page.
        base, style, dtype, quantization: as `finetune.demo.engine_model.open_models`.

    Raises:
        InputError: an argument is wrong; found before weights are loaded.
    """
    refuse_open_page(host, password_file is not None)
    check = None if password_file is None else password_check(read_passwords(password_file))
    # With a password, a page of the web cannot ask, whatever it calls the server.
    hosts = own_names(host) if check is None else None
    with take_port(host, port) as bound, page_folder() as folder:
        prepare_gradio(folder)
        run = find_run(model)
        examples = []
        if run is not None:
            record = find_use(model, base=base, style=style, quantization=quantization).record
            examples = read_examples(run, record, folder)
        models = open_models(model, compare, base=base, style=style, dtype=dtype, quantization=quantization)
        try:
            _say_what_is_shown(models, examples, run)
            app = make_app(" and ".join(one.title for one in models), models, examples, folder, check, hosts)
            if check is not None and not is_this_machine(host):
                say("warning", "the page is not encrypted: passwords and pictures can be read on their way")

            def started() -> None:
                say("page", f"{url_of(bound)} until Ctrl-C")

            Server(app, started, lambda: any(one.replier.failed for one in models)).run([bound])
            if any(one.replier.failed for one in models):
                raise Failed("the device cannot be used any more, by the error above: start the page again")
        finally:
            close_models(models, GRACE)


def _say_what_is_shown(models: Sequence[EngineModel], examples: Sequence[Example], run: Path | None) -> None:
    for one in models:
        say("model", one.title)
        for line in one.about:
            say("", line)
    if examples:
        say("examples", f"{len(examples)} of the evaluation data of {run}")
