"""The application: every endpoint, in the order of the table in docs/serve.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

import launcher
from launcher.config.adapter_folder import adapter_label
from launcher.inference.server.completions import create_chat_completion, create_completion
from launcher.inference.server.engine_client import EngineClient
from launcher.inference.server.protocol import GENERATION_ENDPOINTS, DetokenizeBody, RequestBody, TokenizeBody
from launcher.inference.server.requests import check_vocabulary, decode, encode, encode_chat, encode_json, parse_body
from launcher.inference.server.responses import ApiError, invalid

_ENDPOINT_BODIES: dict[str, type[RequestBody]] = {
    **GENERATION_ENDPOINTS,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
_REFS = "#/components/schemas/{model}"


def make_app(client: EngineClient) -> FastAPI:
    """Return the application for one model."""
    app = FastAPI(title="launcher", version=launcher.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_generation(app, client)
    _add_tokenize(app, client)
    _add_info(app, client)
    _add_error_handlers(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, client: EngineClient) -> None:
    @app.post("/v1/completions", summary="Continue a text", response_model=None)
    async def completions(request: Request) -> Response:
        return await create_completion(client, request)

    @app.post("/v1/chat/completions", summary="Answer in a conversation", response_model=None)
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(client, request)

    adapters = client.limits.adapters

    @app.get("/v1/models", summary="The model that is served, and its adapters")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(client, name) for name in (client.limits.name, *adapters)]}

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> dict[str, Any]:
        if name != client.limits.name and name not in adapters:
            raise ApiError(404, f"there is no model {name[:100]!r}", param="model", code="model_not_found")
        return _model(client, name)


def _add_tokenize(app: FastAPI, client: EngineClient) -> None:
    @app.post("/tokenize", summary="Tokens of a text or a conversation", response_model=None)
    async def tokenize(request: Request) -> Response:
        body = await parse_body(TokenizeBody, await request.body(), client.body_limits())
        tokenizer = client.tokenizer_for(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        if body.chat_template is not None and body.messages is None:
            raise invalid("is for messages", "chat_template")
        if body.messages is not None:
            images = await client.prepare_images(body.messages, field="messages")
            client.release_images(images)
            texts = [each.text for each in images]
            ids = await encode_chat(tokenizer, body.messages, images=texts, template=body.chat_template)
        else:
            assert body.prompt is not None
            ids = await encode(tokenizer, body.prompt, special=body.add_special_tokens)
        content = await encode_json({"count": len(ids), "max_model_len": client.pool.max_model_len, "tokens": ids})
        return Response(content, media_type="application/json")

    @app.post("/detokenize", summary="Text of tokens", response_model=None)
    async def detokenize(request: Request) -> Response:
        body = await parse_body(DetokenizeBody, await request.body(), client.body_limits())
        tokenizer = client.tokenizer_for(body.model)
        check_vocabulary(body.tokens, tokenizer.vocab_size, field="tokens")
        return JSONResponse({"prompt": await decode(tokenizer, body.tokens)})


def _add_info(app: FastAPI, client: EngineClient) -> None:
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live", summary="Whether the process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health/ready", summary="Whether requests will be answered", response_model=None)
    async def ready() -> Response:
        why = client.not_ready()
        if why:
            return JSONResponse({"status": "not ready", "why": why}, status_code=503, headers={"retry-after": "2"})
        return JSONResponse({"status": "ready", "engines": client.pool.ready})

    @app.get("/metrics", summary="Metrics for Prometheus", response_model=None)
    async def metrics() -> Response:
        return Response(client.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", summary="The version of this program")
    async def version() -> dict[str, str]:
        return {"version": launcher.__version__}

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page.replace("{{model}}", _escape(client.limits.name)))


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        said = f"{request.method[:20]} {request.url.path[:200]}: {error.detail}"
        if error.status_code == 404:
            said += "; GET /openapi.json lists the paths of this server"
        answer = ApiError(error.status_code, said, code="not_found" if error.status_code == 404 else None)
        answer.headers.update(error.headers or {})
        return answer.response()


def _model(client: EngineClient, name: str) -> dict[str, Any]:
    """Return an entry of ``/v1/models``.

    ``root`` and ``parent`` are as in vLLM, but name no path of this machine.
    """
    base, folder = client.limits.name, client.limits.adapters.get(name)
    about = {"id": name, "object": "model", "created": client.created, "owned_by": "launcher"}
    origin = {"root": base, "parent": None} if folder is None else {"root": adapter_label(folder), "parent": base}
    return {**about, **origin, "max_model_len": client.pool.max_model_len}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description, with the bodies that the endpoints parse themselves."""
    if app.openapi_schema is None:
        tree = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, schemas = models_json_schema(
            [(body, "validation") for body in _ENDPOINT_BODIES.values()], ref_template=_REFS
        )
        tree.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        for path, body in _ENDPOINT_BODIES.items():
            ref = {"$ref": _REFS.format(model=body.__name__)}
            tree["paths"][path]["post"]["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": ref}},
            }
        app.openapi_schema = tree
    return app.openapi_schema


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
