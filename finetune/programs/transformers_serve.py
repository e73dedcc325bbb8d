"""`transformers serve` on this model family: what its server must be told, in memory, before it starts.

What Transformers 5.23 needs beyond the registration of `import qwenvl`:

- the model's class by its name, and its kind in a table of names (`class_names`);
- `<ref>` and `<box>` as text of a reply, though other special tokens are left out of it;
- the tokenizer of the library `tokenizers` ready before the first request, as building it takes seconds;
- the tokenizer in place of a processor for a text-only checkpoint.

What is changed for safety and plain speech: a client's images are data URIs, and neither files of this machine nor
addresses to be fetched; a model that was not trained on ChatML is not asked in it; and an error in a request is
answered with status 400 and its message, in OpenAI's form.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import InputError, UserError
from finetune.programs.class_names import expose_class_names
from finetune.programs.internals import require_parameters
from qwenvl import QwenVLConfig
from qwenvl.loading import find_source

CHAT_OPTIONS = ("grounding", "numbered")
"""Options of `processor.apply_chat_template` that a client may give, as `chat_template_kwargs`."""


def prepare_serve() -> None:
    """Fit the family into Transformers' server.

    Raises:
        UserError: the server's packages are missing, or Transformers is another than is known here.
    """
    from transformers.utils import import_utils

    if not import_utils.is_serve_available():
        raise UserError(
            'run transformers serve: its packages are not all installed: pip install "qwenvl-finetune[serve]" openai'
        )
    from transformers.cli.serving import server, utils
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler

    expose_class_names()
    load = getattr(ModelManager, "_load_processor", None)
    require_parameters("transformers", "ModelManager._load_processor", load, ["self", "model_id_and_revision"])
    ModelManager._load_processor = ready_processor(load)  # type: ignore[method-assign]
    for handler in (ChatCompletionHandler, ResponseHandler):
        resolve = getattr(handler, "_resolve_model", None)
        require_parameters("transformers", f"{handler.__name__}._resolve_model", resolve, ["self", "body"])
        handler._resolve_model = refusing_raw_models(resolve)  # type: ignore[method-assign]
        read = getattr(handler, "get_processor_inputs_from_messages", None)
        require_parameters(
            "transformers", f"{handler.__name__}.get_processor_inputs_from_messages", read, ["messages", "modality"]
        )
        contained = staticmethod(refusing_references(read))
        handler.get_processor_inputs_from_messages = contained  # type: ignore[method-assign]
    use = getattr(utils.GenerationState, "use_continuous_batching", None)
    require_parameters("transformers", "GenerationState.use_continuous_batching", use, ["self", "model", "modality"])
    utils.GenerationState.use_continuous_batching = refusing_batches(use)  # type: ignore[method-assign]
    build = getattr(server, "build_server", None)
    require_parameters("transformers", "cli.serving.server.build_server", build, ["model_manager"])
    server.build_server = answering_errors(build)


def ready_processor(load: Any) -> Any:
    """`ModelManager._load_processor`, with what the family needs done before the first request."""

    def load_ready(self: Any, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        from transformers import AutoConfig, AutoTokenizer

        path, _, revision = model_id_and_revision.rpartition("@")
        if kwargs.get("gguf_file") is not None or args:
            return load(self, model_id_and_revision, *args, **kwargs)
        refuse_unmerged(path)
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=self.trust_remote_code)
        if isinstance(config, QwenVLConfig) and config.visual is None:
            processor = AutoTokenizer.from_pretrained(path, revision=revision)
        else:
            processor = load(self, model_id_and_revision, *args, **kwargs)
        if isinstance(config, QwenVLConfig):
            tokenizer = getattr(processor, "tokenizer", processor)
            tokenizer._tokenizer  # noqa: B018  # builds it
            with_boxes = functools.partial(tokenizer.decode, keep_grounding=True)
            tokenizer.decode = with_boxes  # type: ignore[method-assign]
        return processor

    return load_ready


def refuse_unmerged(path: str) -> None:
    """Check that a folder is a checkpoint, and neither an adapter nor a run.

    Raises:
        InputError: it is one of these, or there is nothing to load.
    """
    if not Path(path).is_dir() or Path(path, "config.json").is_file():
        return
    source = find_source(path)
    if source.adapter is not None:
        raise InputError(
            f"{path} is an adapter, and transformers serve takes whole checkpoints: merge it (finetune merge), or "
            "serve it by finetune serve"
        )
    raise InputError(f"{path} is a run, and transformers serve takes its checkpoint: give {source.base}")


def refusing_raw_models(resolve: Any) -> Any:
    """`_resolve_model` of a handler of conversations, which refuses a model that was trained on none."""

    def resolve_trained(self: Any, body: dict[str, Any]) -> Any:
        found = resolve(self, body)
        _name, model, _processor = found
        if isinstance(model.config, QwenVLConfig):
            refuse_unknown_options({**self.chat_template_kwargs, **(body.get("chat_template_kwargs") or {})})
            chat_format = getattr(model.generation_config, "chat_format", None)
            if chat_format != "chatml":
                said = (
                    "was trained on raw text" if chat_format == "raw" else "does not say that it was trained on chats"
                )
                raise InputError(
                    f"{model.name_or_path} {said} (chat_format), so it is not asked in ChatML: send a prompt to "
                    "/v1/completions, or serve a chat model"
                )
        return found

    return resolve_trained


def refusing_batches(use: Any) -> Any:
    """`GenerationState.use_continuous_batching`, which Transformers has for text alone."""

    def use_batches(self: Any, model: Any, modality: Any) -> bool:
        wanted: bool = use(self, model, modality)
        if wanted and isinstance(model.config, QwenVLConfig):
            raise InputError(
                "continuous batching knows neither dynamic NTK nor log-n attention, so replies beyond seq_length "
                "would be wrong: start the server without --continuous-batching"
            )
        return wanted

    return use_batches


def refuse_unknown_options(options: Mapping[str, Any]) -> None:
    """Check the options of rendering that the server, or a client, gives.

    Raises:
        InputError: one that is not `CHAT_OPTIONS`, such as a file of this machine in place of an image.
    """
    unknown = sorted(set(options) - set(CHAT_OPTIONS))
    if unknown:
        raise InputError(
            f"chat_template_kwargs: {', '.join(unknown)}: Qwen-VL's form of a conversation has only "
            f"{' and '.join(CHAT_OPTIONS)}. Leave it out (the server's --chat-template-kwargs and --reasoning too)"
        )


def refusing_references(read: Any) -> Any:
    """`get_processor_inputs_from_messages`, which lets only images through that are in the request itself."""

    def read_contained(messages: Sequence[Any], modality: Any) -> list[dict[str, Any]]:
        inputs: list[dict[str, Any]] = read(messages, modality)
        for message in inputs:
            content = message.get("content")
            for part in content if isinstance(content, list) else []:
                reference = part.get("url")
                if reference is not None and not str(reference).startswith("data:"):
                    raise InputError(
                        f"the {part.get('type')} {str(reference)[:80]!r} is no data URI: send it in the request, as "
                        "data:image/png;base64,...; this server reads no files and fetches no addresses"
                    )
        return inputs

    return read_contained


def answering_errors(build: Any) -> Any:
    """`build_server`, whose application answers an `InputError` with its message."""

    def build_answering(*args: Any, **kwargs: Any) -> Any:
        from fastapi.responses import JSONResponse

        app = build(*args, **kwargs)

        async def answer(_request: Any, error: Exception) -> JSONResponse:
            said = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": said}, status_code=400)

        app.add_exception_handler(InputError, answer)
        return app

    return build_answering
