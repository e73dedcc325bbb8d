"""`/v1/models`, and adapters that are loaded and dropped while the server runs."""

from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool

from finetune.errors import InputError
from finetune.serve.api.api import Api
from finetune.serve.api.errors import ApiError, closed, invalid
from finetune.serve.api.request_body import read_body, read_object
from finetune.serve.asked import EngineClosed
from finetune.serve.served_name import ServedName
from finetune.serve.served_names import NameTaken, UnknownName

MOST_BYTES = 100_000


class LoadAdapter(BaseModel):
    """Attributes:
    lora_name: the name to serve it under.
    lora_path: its folder.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str
    lora_path: str


class UnloadAdapter(BaseModel):
    """Attributes:
    lora_name: the name that it is served under.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str


Body = TypeVar("Body", LoadAdapter, UnloadAdapter)


def models_router(api: Api) -> APIRouter:
    """The routes; those that change adapters are there where settings allow them."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(api, name) for name in api.names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        served = api.names.get(name)
        if served is None:
            raise ApiError(404, str(UnknownName(name, [one.name for one in api.names])), code="model_not_found")
        return JSONResponse(_model(api, served))

    if not api.settings.adapter_folders or api.between_steps is None:
        return router
    between_steps = api.between_steps

    @router.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> Response:
        asked = await _read(request, LoadAdapter)
        folder = _allowed_folder(asked.lora_path, api.settings.adapter_folders)
        try:
            served = await run_in_threadpool(api.names.load, asked.lora_name, str(folder), between_steps)
        except NameTaken as error:
            raise ApiError(400, str(error), param="lora_name", code="name_taken") from None
        except InputError as error:
            raise invalid(str(error), "lora_path") from None
        except EngineClosed:
            raise closed() from None
        return JSONResponse(_model(api, served))

    @router.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> Response:
        asked = await _read(request, UnloadAdapter)
        try:
            await run_in_threadpool(api.names.drop, asked.lora_name, between_steps)
        except UnknownName as error:
            raise ApiError(404, str(error), param="lora_name", code="model_not_found") from None
        except InputError as error:
            raise invalid(str(error), "lora_name") from None
        except EngineClosed:
            raise closed() from None
        return JSONResponse({"id": asked.lora_name, "object": "model", "deleted": True})

    return router


def _model(api: Api, name: ServedName) -> dict[str, Any]:
    return {
        "id": name.name,
        "object": "model",
        "created": name.created,
        "owned_by": "qwenvl-finetune",
        "max_model_len": api.settings.max_model_len,
        "takes_images": name.takes_images,
        "default_temperature": api.settings.temperature,
    }


async def _read(request: Request, kind: type[Body]) -> Body:
    try:
        return kind.model_validate(read_object(await read_body(request, MOST_BYTES)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:80]
        raise invalid(f"{place}: {first['msg']}", place) from None


def _allowed_folder(path: str, allowed: tuple[Path, ...]) -> Path:
    """A folder in one of those that adapters are loaded from, links followed.

    Raises:
        ApiError: it is not in one, or is none; both in the same words, so that nothing is learned of other folders.
    """
    try:
        folder = Path(path).resolve(strict=True)
        if folder.is_dir() and any(folder.is_relative_to(one) for one in allowed):
            return folder
    except (OSError, ValueError, RuntimeError):
        pass  # there is none, it may not be looked at, or links lead in a circle
    raise ApiError(
        403,
        f"lora_path: there is no folder {path[:200]!r} among those that this server loads adapters from "
        "(--allow-adapter-changes)",
        param="lora_path",
        code="folder_not_allowed",
    )
