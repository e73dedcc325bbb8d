"""The API as an ASGI application."""

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from finetune.serve.api.access import Access
from finetune.serve.api.api import Api
from finetune.serve.api.chat import chat_router
from finetune.serve.api.errors import ApiError
from finetune.serve.api.models import models_router


def build_app(api: Api) -> FastAPI:
    """The application; every error of it is in the form of OpenAI's API."""
    # No pages of documentation: they load scripts of other hosts.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(chat_router(api))
    app.include_router(models_router(api))
    app.include_router(_operations_router(api))
    app.add_middleware(Access, keys=api.settings.keys, hosts=api.settings.hosts)
    if api.settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=api.settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )

    @app.exception_handler(ApiError)
    async def on_api_error(_request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path[:200]}"
        message = f"there is no {what} here" if error.status_code in (404, 405) else str(error.detail)
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def on_fault(_request: Request, _error: Exception) -> Response:
        # It is logged, and no word of it is sent.
        headers = {"x-should-retry": "false"}
        return ApiError(500, "a fault of the server, which is in its log", code="fault", headers=headers).response()

    return app


def _operations_router(api: Api) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        status = "failed" if api.replier.failed else "stopping" if api.replier.is_closing else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(api.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
