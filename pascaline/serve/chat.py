"""The chat page: thoughts that open while they are thought, votes of several answers, a Stop that stops. Nothing is loaded from elsewhere.

The browser holds the conversation and sends it back with each question; the server keeps nothing of it.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pascaline.errors import BadInput
from pascaline.serve.conversation import Backend, Branch, Conversation, Turn, answer, read

try:
    import gradio as gr
except ImportError:
    raise BadInput('the chat page needs gradio: pip install "pascaline[ui]", or serve with --no-ui.') from None

HERE = Path(__file__).parent
MAX_BRANCHES = 16
# All that the page asks for. Gradio has more routes (files, uploads, proxies, its API); they are not served.
ROUTES = re.compile(
    r"/|/(assets|static)/[\w./-]+|/theme\.css|/favicon\.ico|/manifest\.json|/pwa_icon|/config"
    r"|/gradio_api/(queue/join|queue/data|run/predict|heartbeat/\w+|startup-events|reset|cancel)/?"
)
PREFIX = re.compile(r"(/[\w.~-]+)+", re.ASCII)
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
}
# A dial of the machine that this is named after.
ICON = (
    "<link rel='icon' href=\"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'>"
    "<circle cx='16' cy='16' r='14' fill='%238a6116'/><circle cx='16' cy='16' r='9.5' fill='none' stroke='white' stroke-width='2.5' "
    "stroke-dasharray='4 1.97'/><path d='M16 16 L21 10' stroke='white' stroke-width='3' stroke-linecap='round'/></svg>\">"
)
BRASS = ("#fbf6ea", "#f4e9cd", "#ead5a3", "#dfbf78", "#d0a54f", "#b58732", "#8a6116", "#6f4d12", "#573c10", "#46300e", "#281b07")
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


def mount(app: FastAPI, backend: Backend) -> None:
    """Serve the page at "/" of `app`; call it last, for it takes every path that no route before it takes."""
    theme = gr.themes.Base(primary_hue=gr.themes.Color(*BRASS), neutral_hue="stone", font=SANS, font_mono=MONO)
    css = (HERE / "page.css").read_text(encoding="utf-8")
    extras: dict[str, Any] = {"head": ICON, "footer_links": [], "run_history": False, "mcp_server": False, "pwa": False, "ssr_mode": False}
    gr.mount_gradio_app(app, page(backend), "/", theme=theme, css=css, show_error=False, max_file_size=1, **extras)
    route = app.router.routes[-1]
    route.app = guarded(route.app)  # type: ignore[attr-defined]


def page(backend: Backend) -> gr.Blocks:
    """The page without its looks, which `mount` adds."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    with gr.Blocks(title=f"{backend.model} - Pascaline", analytics_enabled=False, fill_width=True) as blocks:
        new, system, settings = _panel()
        custom: dict[str, Any] = {"html_template": "", "js_on_load": script, "apply_default_css": False, "model": backend.model}
        talk = gr.HTML(Conversation().model_dump(), elem_id="talk", **custom)
        with gr.Row(elem_id="composer"):
            shape: dict[str, Any] = {"lines": 1, "max_lines": 8, "submit_btn": True, "autofocus": True, "elem_id": "box"}
            box = gr.Textbox(label="Question", show_label=False, placeholder="Ask something", **shape)
        _wire(backend, talk, box, new, [system, *settings])
    return blocks


def _panel() -> tuple[gr.Button, gr.Textbox, list[Any]]:
    """The side panel: "New chat", the system prompt, and how many answers, followed by the settings in the order of `_settings`."""
    with gr.Sidebar(open=False, width=320, elem_id="panel"):
        new = gr.Button("New chat", elem_id="new")
        system = gr.Textbox(label="System prompt", lines=3, max_lines=12, placeholder="none", elem_id="system")
        thinking = gr.Checkbox(True, label="Think before answering", elem_id="thinking")
        budget = gr.Slider(0, 32768, 0, step=64, label="Thinking budget", info="tokens of a thought at most; 0: no limit")
        branches = gr.Slider(1, MAX_BRANCHES, 1, step=1, label="Answers to vote", info="samples of a question, side by side", elem_id="k")
        temperature = gr.Slider(0, 2, 0.6, step=0.05, label="Temperature")
        top_p = gr.Slider(0.01, 1, 0.95, step=0.01, label="Top-p")
        max_tokens = gr.Slider(1, 32768, 2048, step=1, label="Tokens at most", info="thought and answer together")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53)
    return new, system, [branches, temperature, top_p, max_tokens, thinking, budget, seed]


def _settings(temperature: float, top_p: float, max_tokens: float, thinking: bool, budget: float, seed: float) -> dict[str, Any]:
    return {
        "temperature": float(temperature), "top_p": float(top_p), "max_tokens": int(max_tokens), "thinking": bool(thinking),
        "max_thinking_tokens": int(budget) or None, "seed": int(seed or 0),
    }  # fmt: skip


def _wire(backend: Backend, talk: gr.HTML, box: gr.Textbox, new: gr.Button, told: list[Any]) -> None:
    """What happens on Enter, Stop and New chat. told: the panel's components."""
    running: dict[str | None, asyncio.Event] = {}  # by session: set when the reader presses Stop

    async def ask(request: gr.Request, question: str, value: Any, system: str, branches: float, *settings: Any) -> AsyncIterator[Any]:
        if not question.strip():
            yield gr.skip(), gr.skip()
            return
        session, turn, conversation = request.session_hash, _turn(question, branches), _conversation(value)
        messages = conversation.messages(system or "", turn.question)
        conversation.turns.append(turn)
        stopped = running[session] = asyncio.Event()
        yield conversation.model_dump(), gr.Textbox(value="", submit_btn=False, stop_btn=True)
        try:
            async with aclosing(answer(backend, messages, turn, _settings(*settings), stopped.is_set)) as ticks:
                async for _ in ticks:
                    yield conversation.model_dump(), gr.skip()
        finally:
            if running.get(session) is stopped:
                del running[session]
        yield conversation.model_dump(), gr.Textbox(submit_btn=True, stop_btn=False)

    def stop(request: gr.Request) -> None:
        if request.session_hash in running:
            running[request.session_hash].set()

    def clear(value: Any) -> tuple[Any, ...]:
        return Conversation(number=_conversation(value).number + 1).model_dump(), gr.Textbox(submit_btn=True, stop_btn=False)

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    asked = box.submit(ask, [box, talk, *told], [talk, box], concurrency_limit=None, **hidden)
    box.stop(stop, queue=False, **hidden)
    new.click(clear, [talk], [talk, box], cancels=[asked], queue=False, **hidden)


def _turn(question: str, branches: float) -> Turn:
    count = min(max(int(branches), 1), MAX_BRANCHES)
    return Turn(question=question.strip(), branches=[Branch() for _ in range(count)])


def _conversation(value: Any) -> Conversation:
    try:
        return read(value)
    except BadInput as error:
        raise gr.Error(str(error), print_exception=False) from None


def guarded(app: ASGIApp) -> ASGIApp:
    """`app` with the page's headers; 404 for what is not one of ROUTES, 403 for what another site's page asks for beside the page itself.

    A proxy that serves the page under a path says so in X-Forwarded-Prefix.
    """

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not ROUTES.fullmatch(path):
            raise HTTPException(404)
        asked = Headers(scope=scope)
        if path != "/" and asked.get("sec-fetch-site") == "cross-site":
            raise HTTPException(403)
        prefix = asked.get("x-forwarded-prefix", "").rstrip("/")
        if PREFIX.fullmatch(prefix):
            scope = {**scope, "root_path": prefix, "path": prefix + path}

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                for name in [name for name in headers if name.startswith("access-control-")]:  # Gradio allows every origin
                    del headers[name]
            await send(message)

        await app(scope, receive, told)

    return served
