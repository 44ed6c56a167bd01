"""What stands before every route: sizes, keys, rates. It reads the whole body itself, so no route sees one that is too large or endless."""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pascaline.errors import BadInput
from pascaline.serve.options import Options
from pascaline.serve.schema import ApiError

log = logging.getLogger(__name__)
OPEN = frozenset({"/health"})  # needs no key
PAID = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize"})  # counts for rate and concurrency
FEWEST = 8  # characters of a key


def escaped(text: str) -> str:
    """One line of printable ASCII, whatever a client has sent: CR, LF and control characters become escapes."""
    return text[:500].encode("unicode_escape").decode("ascii")


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys of a file, one a line; empty lines and those that begin with # are left out. BadInput if it cannot be read or has none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--api-key-file {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise BadInput(f"--api-key-file {path} holds no key; write one on each line.")
    if any(len(key) < FEWEST or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise BadInput(f"--api-key-file {path}: a key must be at least {FEWEST} characters of ASCII without blanks.")
    return tuple(key.encode() for key in keys)


class Tenant:
    """The holder of a key, or everybody where there are no keys. salt: prefixes are reused only within it."""

    def __init__(self, name: str, salt: str, options: Options):
        self.name, self.salt, self.options = name, salt, options
        self.running = 0
        self._tokens, self._since = max(1.0, options.rate), time.monotonic()

    def enter(self) -> None:
        """Count a request in; ApiError 429 if it is one too many."""
        o, now = self.options, time.monotonic()
        if o.concurrency and self.running >= o.concurrency:
            raise ApiError(429, f"This key has {self.running} requests running, which is its limit; try again later.",
                           code="concurrency_limit_exceeded", headers={"retry-after": "1"})  # fmt: skip
        if o.rate:  # a bucket that holds a minute's requests
            self._tokens = min(max(1.0, o.rate), self._tokens + (now - self._since) * o.rate / 60)
            self._since = now
            if self._tokens < 1:
                wait = int((1 - self._tokens) * 60 / o.rate) + 1
                raise ApiError(429, f"This key may send {o.rate:g} requests a minute; try again in {wait} s.",
                               code="rate_limit_exceeded", headers={"retry-after": str(wait)})  # fmt: skip
            self._tokens -= 1
        self.running += 1

    def leave(self) -> None:
        self.running -= 1


class Guard:
    """The outermost ASGI layer. Deny by default: every route but /health needs a key if there are keys."""

    def __init__(self, app: ASGIApp, options: Options, everybody: Tenant):
        self.app, self.options = app, options
        keys = read_keys(options.api_key_file) if options.api_key_file else ()
        self._tenants = {key: Tenant(f"key-{i + 1}", hashlib.sha256(key).hexdigest()[:16], options) for i, key in enumerate(keys)}
        self._everybody = everybody

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            else:  # there are no web sockets here
                await send({"type": "websocket.close", "code": 1008})
            return
        sending = _Sending(send)
        began = time.perf_counter()
        entered: Tenant | None = None
        try:
            tenant = scope["tenant"] = self._check(scope)
            if scope["path"] in PAID and scope["method"] == "POST":
                tenant.enter()
                entered = tenant
            await self.app(scope, await self._whole_body(scope, receive), sending)
        except ApiError as error:
            await sending.error(error)
        except Exception:
            if sending.broken:  # the client is gone, which is no failure
                return
            log.exception("a request failed")
            await sending.error(ApiError(500, "The server failed on this request; its log says why."))
        finally:
            if entered is not None:
                entered.leave()
            who = scope["tenant"].name if "tenant" in scope else "unknown"
            seconds = time.perf_counter() - began
            log.info("%s %s %s %s %.3f s", who, escaped(scope["method"]), escaped(scope["path"]), sending.status or "-", seconds)

    def _check(self, scope: Scope) -> Tenant:
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope.get("query_string", b"")) > self.options.max_headers:
            raise ApiError(400, f"The request's headers are larger than {self.options.max_headers} bytes.", code="headers_too_large")
        if not self._tenants:
            return self._everybody
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        found = None
        for own, tenant in self._tenants.items():  # over all of them, so that the time tells nothing
            if hmac.compare_digest(own, key.strip()):
                found = tenant
        if found is not None and scheme.lower() == b"bearer":
            return found
        if scope["path"] in OPEN:
            return self._everybody
        raise ApiError(401, "This needs a key: send the header 'Authorization: Bearer KEY'.", code="invalid_api_key",
                       headers={"www-authenticate": "Bearer"})  # fmt: skip

    async def _whole_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, up to its limit and within its time; returns a `receive` that gives it again and goes on with the client's."""
        most = self.options.max_body
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = ApiError(413, f"The request's body is larger than {most} bytes.", code="body_too_large")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.options.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return _replayed([message], receive)
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    more = message.get("more_body", False)
                    if size > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"The request's body did not arrive within {self.options.body_seconds:g} s.") from None
        return _replayed([{"type": "http.request", "body": b"".join(chunks), "more_body": False}], receive)


def _replayed(first: list[Message], receive: Receive) -> Receive:
    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


class _Sending:
    """`send` that knows whether the answer has begun, and whose answers nobody takes for another type."""

    def __init__(self, send: Send):
        self._send = send
        self.status = 0
        self.broken = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
        try:
            await self._send(message)
        except OSError:
            self.broken = True
            raise

    async def error(self, error: ApiError) -> None:
        if self.status:  # too late: the connection is closed by the server
            raise error
        body = dumps(error.body)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
        if error.status in (408, 413):
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def dumps(value: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8. A lone surrogate, which has no such form, becomes a question mark; ValueError for a number that JSON has not."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
