"""The routes: the OpenAI API, and what operators ask for. Nothing is fetched, nothing of a prompt is logged."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pascaline.errors import BadInput
from pascaline.serve import schema
from pascaline.serve.answers import Answers, first_problem, model_card
from pascaline.serve.limits import Guard, Tenant, dumps
from pascaline.serve.options import VERSION, Options
from pascaline.serve.schema import ApiError, ChatRequest, CompletionRequest, TokenizeRequest
from pascaline.serve.service import Service
from pascaline.serve.stream import EventStream, Gone, until_gone
from pascaline.serve.telemetry import Telemetry

log = logging.getLogger(__name__)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": schema.ErrorAnswer, "description": "what is wrong with the request"},
    401: {"model": schema.ErrorAnswer, "description": "no key, or not a known one"},
    404: {"model": schema.ErrorAnswer, "description": "no such model"},
    408: {"model": schema.ErrorAnswer, "description": "the body did not arrive in time"},
    413: {"model": schema.ErrorAnswer, "description": "the body is too large"},
    429: {"model": schema.ErrorAnswer, "description": "the queue is full, or the key's rate is used up"},
    "4XX": {"model": schema.ErrorAnswer, "description": "another mistake of the client"},
    500: {"model": schema.ErrorAnswer, "description": "the server failed on this request"},
    503: {"model": schema.ErrorAnswer, "description": "loading, or shutting down"},
}


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def app(engine: Any, options: Options | None = None, page: Callable[[FastAPI, Answers], None] | None = None) -> FastAPI:
    """The application. engine: an Engine, or a function that loads one (called in the engine's own thread when the server starts).

    app.state.service and app.state.answers are its parts; `page` mounts a chat page at "/", if there are no keys.
    """
    options = options or Options()
    load = engine if callable(engine) else lambda: engine
    telemetry = Telemetry(options.name, options.price_per_hour, lambda: service.engine.stats if service.engine is not None else None)
    service = Service(load, options, telemetry)
    answers = Answers(service, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()
            await service.join(30 if service.engine is not None else 0)  # who stops while it loads does not wait for it

    made = FastAPI(
        title="Pascaline", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None, separate_input_output_schemas=False
    )
    made.state.service, made.state.answers, made.state.telemetry = service, answers, telemetry
    made.state.everybody = Tenant("anonymous", "", options)
    made.add_middleware(Guard, options=options, everybody=made.state.everybody)
    _errors(made)
    _generation(made, service, answers)
    _operation(made, service, answers, telemetry)
    if page is not None and options.ui and not options.api_key_file:
        _close_methods(made)
        page(made, answers)
    return made


def _close_methods(made: FastAPI) -> None:
    """A page at "/" takes whatever no route takes, and so the other methods of our paths: they stay a 405."""
    for route in [route for route in made.routes if isinstance(route, APIRoute)]:
        allowed = {"Allow": ", ".join(sorted(route.methods or ()))}

        async def refuse(_: Request, allowed: dict[str, str] = allowed) -> Response:
            raise HTTPException(405, headers=allowed)

        made.add_route(route.path, refuse, [m for m in METHODS if m not in (route.methods or ())], include_in_schema=False)


def _errors(made: FastAPI) -> None:
    """Every error is an error object."""

    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return Json(error.body, error.status, error.headers)

    async def bad_input(_: Request, error: Exception) -> Response:
        return Json(ApiError(400, str(error)).body, 400)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return Json(first_problem(error.errors()).body, 400)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: "There is no such route.", 405: "This route does not take this method.", 400: "The body cannot be read as JSON."}
        told = ApiError(error.status_code, said.get(error.status_code, "The request is wrong."), headers=error.headers)
        return Json(told.body, told.status, told.headers)

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    made.add_exception_handler(ApiError, api_error)
    made.add_exception_handler(BadInput, bad_input)
    made.add_exception_handler(RequestValidationError, invalid)
    made.add_exception_handler(HTTPException, http_error)
    made.add_exception_handler(Gone, gone)


def _generation(made: FastAPI, service: Service, answers: Answers) -> None:
    async def answered(request: Request, body: Any, submit: Any, streamed: Any, whole: Any) -> Response:
        jobs = await until_gone(request.receive, submit(body, request.scope["tenant"].salt), service.close_all)
        if body.stream:
            return EventStream(streamed(body, jobs), partial(service.close_all, jobs))
        try:
            return Json(await until_gone(request.receive, whole(body, jobs)))
        finally:
            service.close_all(jobs)

    @made.post("/v1/chat/completions", responses={**ERRORS, 200: {"model": schema.ChatAnswer, "content": {"text/event-stream": {}}}})
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation, whole or streamed."""
        return await answered(request, body, answers.chat, answers.streamed_chat, answers.whole_chat)

    @made.post("/v1/completions", responses={**ERRORS, 200: {"model": schema.CompletionAnswer, "content": {"text/event-stream": {}}}})
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Go on with raw text or token ids, whole or streamed."""
        return await answered(request, body, answers.completion, answers.streamed_completion, answers.whole_completion)

    @made.post("/tokenize", responses={**ERRORS, 200: {"model": schema.Tokens}})
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a prompt or of a rendered conversation."""
        answers.check_model(body.model)
        service.check_room(0, 0)
        if body.messages is not None:
            chat = ChatRequest.model_construct(messages=body.messages, thinking=None, chat_template_kwargs=None)
            ids = await answers.off_loop(answers.chat_prompt, chat)
        else:
            ids = await answers.off_loop(answers.prompt_ids, body.prompt, body.add_special_tokens is not False)
        return Json({"count": len(ids), "tokens": ids, "max_model_len": answers.context})


def _operation(made: FastAPI, service: Service, answers: Answers, telemetry: Telemetry) -> None:
    @made.get("/v1/models", responses={**ERRORS, 200: {"model": schema.ModelList}})
    async def models() -> Response:
        """The one model that is served."""
        service.check_room(0, 0)
        return Json({"object": "list", "data": [model_card(answers)]})

    @made.get("/v1/models/{name:path}", responses={**ERRORS, 200: {"model": schema.ModelCard}})
    async def model(name: str) -> Response:
        """The model of this name."""
        answers.check_model(name)
        service.check_room(0, 0)
        return Json(model_card(answers))

    @made.get("/health", responses={**ERRORS, 200: {"model": schema.Status}})
    async def health() -> Response:
        """Whether the server is alive; it needs no key."""
        if not service.alive:
            raise ApiError(503, "The engine's thread has ended.")
        return Json({"status": "ok"})

    @made.get("/ready", responses={**ERRORS, 200: {"model": schema.Status}})
    async def ready() -> Response:
        """Whether it takes requests: 503 while it loads and when it shuts down."""
        service.check_room(0, 0)
        return Json({"status": "ok"})

    @made.get("/version", responses={**ERRORS, 200: {"model": schema.Version}})
    async def version() -> Response:
        return Json({"version": VERSION})

    @made.get("/metrics", responses={**ERRORS, 200: {"content": {"text/plain": {}}, "description": "Prometheus' text format"}})
    async def metrics() -> Response:
        """Counters, gauges and histograms."""
        return Response(telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
