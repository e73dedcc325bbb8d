"""`finetune demo`: open a model, and serve a page to try it."""

from pathlib import Path

from finetune.demo.access import is_loopback, password_check, read_passwords
from finetune.demo.engine_model import close_models, open_models
from finetune.demo.run_examples import find_run, read_examples
from finetune.demo.server import (
    GRACE,
    address_of,
    listen,
    make_app,
    make_server,
    page_folder,
    prepare_gradio,
    refuse_open_page,
)
from finetune.replies.model_style import find_use
from finetune.replies.task_replies import Style
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
    with listen(host, port) as listening, page_folder() as folder:
        prepare_gradio(folder)
        run = find_run(model)
        record = find_use(model, base=base, style=style, quantization=quantization).record
        examples = [] if run is None else read_examples(run, record, folder)
        models = open_models(model, compare, base=base, style=style, dtype=dtype, quantization=quantization)
        try:
            for one in models:
                for line in one.about:
                    say(one.title if len(models) > 1 else "model", line)
            if examples:
                say("examples", f"{len(examples)} of the evaluation data of {run}")
            title = " and ".join(one.title for one in models)
            app = make_app(title, models, examples, folder, check)
            if not is_loopback(host):
                say("warning", "the page is not encrypted: passwords and pictures can be read on the way to it")
            make_server(app, f"{address_of(listening)} (Ctrl-C ends it)").run(sockets=[listening])
        finally:
            close_models(models, GRACE)
