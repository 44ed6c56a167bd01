"""lm-eval's own clients of the API on a task made here: the log-likelihoods are the model's, the texts the engine's."""

import json
import os

import pytest
import torch
from live import served
from tiny import tiny_folder

import pascaline
from pascaline.engine import Engine, Sampling
from pascaline.tokenizer import Tokenizer

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):  # before the libraries are imported
    os.environ.setdefault(name, "1")

QUESTIONS = [
    {"question": f"{what} sat on", "choices": [" the mat", " a cat 12", " é日"], "answer": i % 3}
    for i, what in enumerate(["the cat", "a mat", "12 from 6", "日本", "abc def the"])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("lm-eval"))


@pytest.fixture(scope="module")
def live(folder):
    with served(Engine(folder, device="cpu"), name="tiny") as running:
        yield running


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """evaluate(kind of task, model, its arguments) -> what was asked and answered, [(arguments, answer)]."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    place = tmp_path_factory.mktemp("task")
    (place / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    manager = TaskManager(include_defaults=False)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / "questions.jsonl")}, "cache_dir": str(place)},
              "test_split": "test", "doc_to_text": "{{question}}"}  # fmt: skip
    tasks = {
        "choices": {"task": "choices", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
        "texts": {"task": "texts", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}",
                  "generation_kwargs": {"until": ["q", "\n"], "max_gen_toks": 12, "do_sample": False}},
    }  # fmt: skip

    def run(task: str, model: str, arguments: dict, **more) -> list:
        told = lm_eval.simple_evaluate(
            model, arguments, tasks=[{**common, **tasks[task]}], task_manager=manager, bootstrap_iters=0, log_samples=True, **more
        )
        found = [(ask, answer) for s in told["samples"][task] for ask, (answer,) in zip(s["arguments"], s["resps"], strict=True)]
        assert len(found) == len(QUESTIONS) * (3 if task == "choices" else 1)
        return found

    return run


def arguments(live, folder, path: str, **more) -> dict:
    own = {"model": "tiny", "base_url": f"{live.url}{path}", "max_length": 512, "max_retries": 1}
    return own | ({"tokenizer": str(folder), "tokenizer_backend": "huggingface"} if path == "/v1/completions" else {}) | more


@pytest.mark.parametrize("more", [{}, {"num_concurrent": 4}, {"batch_size": 4}])
def test_loglikelihoods_are_the_models(live, folder, evaluate, more):
    """Asked for with echo and logprobs: one by one, at once, several prompts in a request."""
    model, tokenizer = pascaline.load(folder), Tokenizer.load(folder)
    for (context, continuation), (found, greedy) in evaluate(
        "choices", "local-completions", arguments(live, folder, "/v1/completions", **more)
    ):
        whole, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
        with torch.no_grad():
            log_p = model(torch.tensor([whole]))[0, start - 1 : -1].log_softmax(-1)
        said = torch.tensor(whole[start:])
        assert float(found) == pytest.approx(float(log_p.gather(1, said[:, None]).sum()), abs=1e-4)
        assert str(greedy) == str(bool((log_p.argmax(-1) == said).all()))


def test_texts_of_completions_are_the_engines(live, folder, evaluate):
    tokenizer, engine = Tokenizer.load(folder), Engine(folder, device="cpu")
    for (context, _), answer in evaluate("texts", "local-completions", arguments(live, folder, "/v1/completions")):
        ((output,),) = engine.generate([tokenizer.encode(context)], Sampling(0.0, max_tokens=12))
        text = tokenizer.decode(output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids, special=True)
        assert answer == text.partition("q")[0]


@pytest.mark.parametrize("more", [{}, {"num_concurrent": 4}])
def test_texts_of_chats_are_the_engines(live, folder, evaluate, more):
    engine, texts = Engine(folder, device="cpu"), set()
    asked = evaluate("texts", "local-chat-completions", arguments(live, folder, "/v1/chat/completions", **more), apply_chat_template=True)
    for (chat, _), answer in asked:
        ((output,),) = engine.generate([json.loads(chat[0])], Sampling(0.0, max_tokens=12, stop=("q", "\n")))
        assert answer == output.text
        texts.add(answer)
    assert texts
