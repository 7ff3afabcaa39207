"""The HTTP interface: routes, the key, errors, streams, what happens when a client goes away.

Here: HTTP. Not here: what answers hold (`rlhf.serving.completions`, `rlhf.serving.chat`), sockets and signals
(`rlhf.serving.server`).
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf.serving import metrics
from rlhf.serving.async_engine import AsyncEngine
from rlhf.serving.bodies import ChatBody, CompletionBody, DetokenizeBody, Part, TokenizeBody
from rlhf.serving.chat import Chat, chat_prompt
from rlhf.serving.completions import Completions
from rlhf.serving.errors import ApiError, as_api_error
from rlhf.serving.model import Served

_log = logging.getLogger(__name__)
_MOST_BODY_BYTES = 32 << 20
B = TypeVar("B", bound=Part)
T = TypeVar("T")


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _json(content)


class Server:
    """The routes over one model."""

    def __init__(self, served: Served, engine: AsyncEngine) -> None:
        self._served, self._engine = served, engine
        self._started = int(time.time())

    def app(self, *, api_key: str | None, host: str) -> ASGIApp:
        """The application; without a key it answers those only who call it by a name of this machine."""
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]
        handlers: Mapping[Any, Any] = {HTTPException: _http_error, Exception: _any_error}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), api_key=api_key, host=host)

    async def health(self, request: Request) -> Response:
        if not self._engine.is_healthy:
            return Json({"status": "the engine fails"}, status_code=503)
        return Json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        text = self._engine.metrics.text(self._engine.load)
        return PlainTextResponse(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._model(name) for name in self._names]})

    async def one_model(self, request: Request) -> Response:
        try:
            self._check_name(request.path_params["name"])
        except ApiError as error:
            return _answer(error)
        return Json(self._model(request.path_params["name"]))

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionBody, Completions)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatBody, Chat)

    async def tokenize(self, request: Request) -> Response:
        async def answer() -> Response:
            body, tokenizer = await self._body(request, TokenizeBody), self._served.tokenizer
            if body.messages is not None:
                ids = chat_prompt(tokenizer, body.messages, add_generation_prompt=body.add_generation_prompt)
            else:
                ids = tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
            return Json({"tokens": ids, "count": len(ids), "max_model_len": self._served.most_tokens})

        return await _caught(answer)

    async def detokenize(self, request: Request) -> Response:
        async def answer() -> Response:
            body = await self._body(request, DetokenizeBody)
            bad = [token for token in body.tokens if token >= self._served.vocab]
            if bad:
                raise ApiError(
                    f"tokens: {bad[0]} is no token; the model knows {self._served.vocab}", param="tokens"
                )
            return Json({"prompt": self._served.tokenizer.decode(body.tokens)})

        return await _caught(answer)

    async def _generate(
        self, request: Request, kind: type[B], make: Callable[[B, Served, AsyncEngine], Any]
    ) -> Response:
        async def answer() -> Response:
            call = make(await self._body(request, kind), self._served, self._engine)
            return await _first(_answered(call), _left(request.receive))

        return await _caught(answer)

    async def _body(self, request: Request, kind: type[B]) -> B:
        content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content != "application/json":
            raise ApiError(f"the content type is {content!r}; send application/json", status=415)
        raw = bytearray()
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > _MOST_BODY_BYTES:
                raise ApiError(f"the body has more than {_MOST_BODY_BYTES} bytes", status=413)
        body = kind.model_validate_json(bytes(raw))
        if body.model is not None:  # type: ignore[attr-defined]
            self._check_name(body.model)  # type: ignore[attr-defined]
        return body

    @property
    def _names(self) -> tuple[str, ...]:
        """Of the model and its adapters."""
        return (self._served.name, *self._served.engine.adapters)

    def _check_name(self, name: str) -> None:
        if name not in self._names:
            raise ApiError(
                f"the model {name!r} is not here; this server has {', '.join(map(repr, self._names))}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _model(self, name: str) -> dict[str, Any]:
        of_adapter = {"root": self._served.name, "parent": self._served.name}  # as vLLM says it
        return {
            **(of_adapter if name != self._served.name else {}),
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "rlhf",
            "max_model_len": self._served.most_tokens,
        }


class EventStream(Response):
    """Server-sent events of a call that has begun; the call is closed at the end, or when the client goes away."""

    def __init__(self, call: Completions | Chat) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _first(self._send(send), _gone(receive))
        finally:
            self._call.generation.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._call.events()) as all_events:
                async for events in all_events:
                    if events:
                        data = b"".join(b"data: " + _json(event) + b"\n\n" for event in events)
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            data = b"data: [DONE]\n\n"
        except Exception as error:  # the answer has begun: it is told as an event
            data = b"data: " + _json(_as_answer(error).body) + b"\n\n"
        await send({"type": "http.response.body", "body": data, "more_body": False})


class Guard:
    """Lets those in who have the key; without one, those who call this machine by its own name, so that no web page
    can reach it under another."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, host: str) -> None:
        self._app, self._host = app, host
        self._digest = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            headers = dict(scope["headers"])
            if self._digest is None and not self._is_own_name(headers.get(b"host", b"")):
                error = ApiError("the Host header names another machine", status=403)
                return await _answer(error)(scope, receive, send)
            if self._digest is not None and not self._has_key(headers.get(b"authorization", b"")):
                error = ApiError(
                    "the API key is missing or wrong; send Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                )
                error.headers = {"WWW-Authenticate": "Bearer"}
                return await _answer(error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _has_key(self, header: bytes) -> bool:
        kind, _, given = header.partition(b" ")
        same = secrets.compare_digest(_digest(given.strip()), self._digest or b"")
        return same and kind.lower() == b"bearer"

    def _is_own_name(self, header: bytes) -> bool:
        name = header.decode("latin-1").rsplit(":", 1)[0] if not header.endswith(b"]") else header.decode()
        name = name.strip("[]").lower()
        if name in ("localhost", self._host.lower()):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _digest(text: bytes) -> bytes:
    """Of one length, so that comparing tells nothing."""
    return hashlib.sha256(text).digest()


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _answer(error: ApiError) -> Response:
    return Json(error.body, status_code=error.status, headers=error.headers)


def _as_answer(error: Exception) -> ApiError:
    found = as_api_error(error)
    if found is None:
        _log.error("a request failed", exc_info=error)
        found = ApiError(f"the server failed: {type(error).__name__}", status=500, code="internal_error")
    return found


async def _caught(answer: Callable[[], Awaitable[Response]]) -> Response:
    try:
        return await answer()
    except ClientDisconnect:  # while it was sending; nobody reads this
        return Response(status_code=499)
    except Exception as error:  # declared boundary: one request's failure is its own
        return _answer(_as_answer(error))


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    found = ApiError(message, status=error.status_code)
    found.headers = dict(error.headers or {})
    return _answer(found)


async def _any_error(request: Request, error: Exception) -> Response:
    return _answer(_as_answer(error))


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _left(receive: Receive) -> Response:
    """What nobody reads, when the client has gone away."""
    await _gone(receive)
    return Response(status_code=499)


async def _answered(call: Completions | Chat) -> Response:
    await call.generation.begin()
    if call.is_streaming:
        return EventStream(call)
    try:
        return Json(await call.whole())
    finally:
        call.generation.close()


async def _first(wanted: Awaitable[T], other: Awaitable[T]) -> T:
    """The result of whichever is there first; the other is cancelled, and has ended."""
    tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else tasks[1].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
