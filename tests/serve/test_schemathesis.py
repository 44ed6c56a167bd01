"""Schemathesis against /openapi.json: whatever it sends, right or wrong, the answer is one that is declared there, and never a 5xx."""

import json
import os
from collections import Counter

import pytest
import schemathesis
from fake import FakeEngine
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.transport import DEFAULT_MAX_STREAM_EVENTS
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pascaline.serve.api import app
from pascaline.serve.options import Options

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, response_headers_conformance]
CASES = {  # (that fit the schema, that do not); a route without parameters has one case only
    "POST /v1/chat/completions": (500, 300),
    "POST /v1/completions": (2300, 2300),
    "POST /tokenize": (2000, 100),
    (NAMED := "GET /v1/models/{name}"): (2700, 0),  # the one name there is may not be drawn
}
# 4 of 5 ms of a case go into drawing it; all of them take three minutes of one core, with PASCALINE_ALL_CASES=1
PART = 1 if os.environ.get("PASCALINE_ALL_CASES") else 5


def served(**options):
    """The application's schema; a context of 64 tokens, so that no answer is long."""
    engine = FakeEngine()
    engine.model.config.max_position_embeddings = 64
    return schemathesis.openapi.from_asgi("/openapi.json", app(engine, Options(**options))), engine


def send(operation, mode: GenerationMode, count: int, **more) -> Counter:
    """Answers to so many cases of an operation, by status."""
    seen: Counter = Counter()

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case) -> None:
        if mode.is_positive and isinstance(case.body, dict) and seen.total() % 4:
            case.body = tamed(case.body) | {"stream": seen.total() % 8 == 1}
        response = case.call(**more)
        seen[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
        if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
            seen["streams"] += 1
            check_stream(response.text)

    run()
    return seen


def tamed(body: dict) -> dict:
    """Made to keep the rules that a schema does not tell, so that more gets past them."""
    body = {key: int(value) if isinstance(value, float) and value.is_integer() else value for key, value in body.items() if key != "model"}
    for message in body.get("messages") or []:
        message["role"] = "user" if message["role"] in ("system", "developer") else message["role"]
        message["content"] = message.get("content") or "hi"
    if body.get("messages") and body.get("prompt") is not None:
        del body["prompt"]
    return body


def check_stream(text: str) -> None:
    """Whole events of JSON, and [DONE], if schemathesis has read so far."""
    *events, last, empty = text.split("\n\n")
    assert empty == "" and (last == "data: [DONE]" or len(events) + 1 >= DEFAULT_MAX_STREAM_EVENTS)
    assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events)


@pytest.mark.timeout(1800)
def test_ten_thousand_cases():
    """A fifth of them, the same each time, unless all are asked for: see PART."""
    schema, engine = served()
    total: Counter = Counter()
    labels = set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        labels.add(operation.label)
        for mode, whole in zip(GenerationMode, CASES.get(operation.label, (1, 0)), strict=True):
            count = -(-whole // PART)
            seen = send(operation, mode, count) if count else Counter()
            assert not count or mode.is_negative or 200 in seen or operation.label == NAMED, (operation.label, seen)
            assert not mode.is_negative or not count or seen[400] > 0.8 * count
            total += seen
    named = schema["/v1/models/{name}"]["GET"].Case(path_parameters={"name": "model"}).call_and_validate(checks=CHECKS)
    assert named.status_code == 200
    streams = total.pop("streams")
    assert labels >= {*CASES, "GET /v1/models", "GET /health", "GET /ready", "GET /version", "GET /metrics"}
    assert total.total() >= 10_000 / PART and total[200] > 2_000 / PART and streams > 100 / PART, total
    assert set(total) <= {200, 400, 404, 413, 429}
    assert engine.empty


def test_every_route_declares_its_errors():
    schema, _ = served()
    for path, methods in schema.raw_schema["paths"].items():
        for method, operation in methods.items():
            declared = set(operation["responses"])
            assert declared >= {"200", "500", "503"} and declared & {"4XX", "400"}, (method, path)


@pytest.mark.parametrize("mode", GenerationMode)
def test_without_a_key_every_answer_is_the_declared_401(tmp_path, mode):
    (tmp_path / "keys").write_text("only-this-key")
    schema, engine = keyed(tmp_path / "keys")
    for operation in (found.ok() for found in schema.get_all_operations()):
        if mode.is_positive or CASES.get(operation.label, (0, 0))[1]:
            seen = send(operation, mode, 20)
            assert set(seen) == ({200} if operation.label == "GET /health" else {401})
    assert engine.empty and not engine.added


def keyed(path):
    schema, _ = served()
    engine = FakeEngine()
    schema.app = app(engine, Options(api_key_file=path))
    return schema, engine
