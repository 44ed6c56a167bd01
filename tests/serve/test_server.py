"""The process: how it starts, what it refuses, how it ends."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import forked
import pytest

HERE = Path(__file__).parent
PROGRAM = """
import sys
sys.path.insert(0, {here!r})
from fake import FakeEngine
from pascaline.serve.options import Options
from pascaline.serve.server import serve
serve(lambda: FakeEngine(lambda *_: "x" * 400, delay=0.005), Options(port=0, ui=False, drain_seconds={drain}))
"""


class Process:
    def __init__(self, drain: float) -> None:
        code = PROGRAM.format(here=str(HERE), drain=drain)
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.said = [self.process.stdout.readline(), self.process.stdout.readline()]
        self.base = self.said[1].split()[2].removesuffix("/v1")

    def post(self, **body: Any) -> tuple[int, str]:
        request = urllib.request.Request(
            f"{self.base}/v1/chat/completions",
            json.dumps({"messages": [{"role": "user", "content": "hi"}], **body}).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except http.client.HTTPException:  # cut off
            return 0, ""

    def begin(self, **body: Any) -> tuple[threading.Thread, list[tuple[int, str]]]:
        """A request in a thread, once it runs."""
        answers: list[tuple[int, str]] = []
        thread = threading.Thread(target=lambda: answers.append(self.post(**body)))
        thread.start()
        while 'num_requests_running{model_name="model"} 1.0' not in urllib.request.urlopen(f"{self.base}/metrics").read().decode():
            time.sleep(0.01)
        return thread, answers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end(number):
    """SIGTERM and Ctrl-C: new requests get 503, running ones their whole answer, the exit status is 0."""
    server = Process(drain=30)
    assert server.said[0] == "Model model on cpu: 576 bytes of cache a token, room for 16,000 tokens.\n"
    assert server.said[1].startswith("Ready on http://127.0.0.1:")
    thread, answers = server.begin(max_tokens=150)
    os.kill(server.process.pid, number)
    time.sleep(0.3)
    code, text = server.post()
    assert code == 503 and json.loads(text)["error"]["type"] == "unavailable_error"
    thread.join(30)
    assert answers[0][0] == 200 and json.loads(answers[0][1])["usage"]["completion_tokens"] == 150
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.process.stderr.read()


def test_the_deadline_cuts_what_still_runs():
    """After --drain-seconds a stream is told so, and the exit status is 0 all the same."""
    server = Process(drain=0.2)
    thread, answers = server.begin(max_tokens=4000, stream=True)
    os.kill(server.process.pid, signal.SIGTERM)
    thread.join(30)
    assert answers[0][0] == 200 and '"error":{"message":"The server is shutting down."' in answers[0][1]
    assert server.process.wait(30) == 0


def test_a_second_ctrl_c_ends_it_at_once_and_says_nothing():
    server = Process(drain=60)
    thread, _ = server.begin(max_tokens=400, stream=True)
    os.kill(server.process.pid, signal.SIGINT)
    time.sleep(0.3)
    os.kill(server.process.pid, signal.SIGINT)
    _, said = server.process.communicate(timeout=30)
    thread.join()
    assert "Traceback" not in said and server.process.returncode in (0, 130, -signal.SIGINT)


def test_what_cannot_be_served_is_said_in_a_sentence(tmp_path):
    def refused(*words: Any) -> str:
        code, _, told = forked.call(tmp_path, "serve", *words)
        assert code == 2 and told.count("\n") == 1 and "Traceback" not in told, told
        return told

    model = tmp_path / "model"
    model.mkdir()
    assert "has no config.json" in refused(model)
    (model / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be used: address already in use" in refused(model, "--port", port)
    assert "api-key-file" in refused(model, "--api-key-file", tmp_path / "absent")
    assert "--dtype int4 is not known" in refused(model, "--dtype", "int4")
    assert "'much' is no size" in refused(model, "--cache-memory", "much")
    assert "is no address of this machine" in refused(model, "--host", "no.such.host.invalid", "--port", 0)
    assert "model" in refused(model, "--port", 0, "--no-ui")  # found while loading, with the server up


def test_a_host_that_others_reach_without_keys_is_warned_about(tmp_path):
    from pascaline.errors import BadInput
    from pascaline.serve.options import Options
    from pascaline.serve.server import serve

    def no_model() -> Any:
        raise BadInput("no model")

    (tmp_path / "keys").write_text("a-long-key\n")
    for host, keys, warned in (
        ("0.0.0.0", None, True),
        ("127.0.0.1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", tmp_path / "keys", False),
    ):
        said: list[str] = []
        with pytest.raises(BadInput, match="no model"):
            serve(no_model, Options(host=host, port=0, api_key_file=keys, ui=False), said.append)
        assert bool(said) == warned


def test_every_option_is_documented():
    import typer.main

    from pascaline.cli import app

    text = (HERE.parent.parent / "docs" / "serving.md").read_text()
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    names = {next(o for o in (*p.secondary_opts, *p.opts) if o.startswith("--")) for p in command.params if p.param_type_name == "option"}
    assert "--max-queue" in names and len(names) > 15
    assert not [name for name in names if f"`{name}`" not in text]
