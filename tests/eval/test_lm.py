"""lm-eval on a model in this process, against lm-eval's own Hugging Face model on the folder it was saved to."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny import tiny_folder

from pascaline.engine import Engine, Output
from pascaline.errors import BadInput
from pascaline.eval import lm
from pascaline.eval.plan import Plan

PAIRS = [
    ("the cat sat on", " the mat"),
    ("the cat sat on ", "the mat"),  # a blank at the end belongs to what follows
    ("12 from 6", ", 6. The"),
    ("", "abc def"),  # nothing before it: the begin token stands there
    ("<|user|>Make 12<|assistant|><think>", " 6</think>6+6"),  # tokens in a string are tokens
    ("日本", "é日"),
    ("the mat " * 200, "cat"),  # longer than the context
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("lm"), max_position_embeddings=128)


@pytest.fixture(scope="module")
def ours(folder: Path) -> lm.EngineLM:
    return lm.EngineLM(Engine(folder, device="cpu"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3, max_length=128)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


def test_loglikelihoods_are_those_of_the_folder_through_transformers(ours: lm.EngineLM, theirs: HFLM) -> None:
    pairs = asked("loglikelihood", *PAIRS)
    for (found, greedy), (expected, likely) in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert found == pytest.approx(expected, abs=1e-3) and greedy == likely
        assert found < -0.1


def test_the_most_likely_continuation_is_known_as_such(ours: lm.EngineLM, theirs: HFLM) -> None:
    (first,) = ours.generate_until(asked("generate_until", ("the cat", {"max_gen_toks": 3, "until": []})))
    pairs = asked("loglikelihood", ("the cat", first), ("the cat", first + "q"))
    assert [greedy for _, greedy in ours.loglikelihood(pairs)] == [greedy for _, greedy in theirs.loglikelihood(pairs)]
    assert ours.loglikelihood(pairs)[0][1]


def test_long_texts_are_measured_in_windows(ours: lm.EngineLM, theirs: HFLM) -> None:
    texts = asked("loglikelihood_rolling", ("the cat sat on the mat",), ("abc def the mat " * 60,), ("12",))
    assert len(ours.tok_encode(texts[1].args[0])) > 2 * ours.room
    expected = theirs.loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("until", [[], ["a"], ["m", "ca"], "t"])
def test_greedy_texts_are_those_of_transformers(ours: lm.EngineLM, theirs: HFLM, until: Any) -> None:
    asks = [(text, {"until": until, "max_gen_toks": 24, "do_sample": False}) for text in ("the cat", "12 from 6, 6", "abc")]
    found, expected = (model.generate_until(asked("generate_until", *asks)) for model in (ours, theirs))
    assert found == expected and any(found)


def test_a_thought_is_no_part_of_a_text_and_stops_at_no_stop_string(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval #3438: a stop string in the thought cut it, and what was read as the answer was a thought."""
    own = lm.EngineLM(Engine(folder, device="cpu"))
    text = own.apply_chat_template([{"role": "user", "content": "the cat"}])
    assert text.endswith("<|user|>the cat<|assistant|><think>")
    seen = {}

    def generate(prompts: list[list[int]], sampling: Any) -> list[list[Output]]:
        seen["stop"] = sampling.stop
        return [[Output([], [], "stop", "the answer\n\nis 4", "one\n\ntwo")], [Output([], [], "length", "", "one")]]

    monkeypatch.setattr(own.engine, "generate", generate)
    settings = {"until": ["\n\n"], "max_gen_toks": 16}
    assert own.generate_until(asked("generate_until", (text, settings), (text, settings))) == ["the answer", ""]
    assert seen["stop"] == ()


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"num_beams": 4}, "asks for num_beams"), ({"max_gen_toks": 128}, "wants 128 new tokens, but the model's context has 128")],
)
def test_what_a_task_may_not_ask_for(ours: lm.EngineLM, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        ours.generate_until(asked("generate_until", ("the cat", settings)))


@pytest.fixture(scope="module")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of one's own as lm-eval reads it, with its questions."""
    place = tmp_path_factory.mktemp("own")
    rows = [{"q": f"{what} sat on", "choices": [" the mat", " a cat 12"], "a": i % 2} for i, what in enumerate(["the cat", "a mat", "12"])]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "mats.yaml").write_text(
        f"task: mats\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {place / 'rows.jsonl'}\n"
        f"  cache_dir: {place}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{a}}"\n'
    )
    return place / "mats.yaml"


def test_a_task_is_a_measurement(ours: lm.EngineLM, theirs: HFLM, own_task: Path) -> None:
    found = lm.task(ours.engine, Plan(task=f"lm:{own_task}"), lambda done, whole: None)
    assert found["metric"] == "acc" and found["n"] == 3 and len(set(found["keys"])) == 3
    told = lm_eval.simple_evaluate(
        theirs, tasks=["mats"], task_manager=lm.TaskManager(include_path=str(own_task.parent), include_defaults=False), bootstrap_iters=0
    )
    assert found["score"] == pytest.approx(told["results"]["mats"]["acc,none"])
    assert found["metrics"]["mats"]["acc,none"] == pytest.approx(found["score"])


def test_mistakes(ours: lm.EngineLM, own_task: Path) -> None:
    with pytest.raises(BadInput, match="no task 'matz'"):
        lm.task(ours.engine, Plan(task="lm:matz"), lambda done, whole: None)
    with pytest.raises(BadInput, match="has no dial 'shots'"):
        lm.task(ours.engine, Plan(task=f"lm:{own_task}", dials={"shots": 3}), lambda done, whole: None)


def test_rows_of_a_batch_do_not_change_each_other(ours: lm.EngineLM, monkeypatch: pytest.MonkeyPatch) -> None:
    together = ours.loglikelihood(asked("loglikelihood", *PAIRS))
    monkeypatch.setattr(lm, "BATCH_TOKENS", 1)
    alone = ours.loglikelihood(asked("loglikelihood", *PAIRS))
    assert [p for p, _ in together] == pytest.approx([p for p, _ in alone], abs=1e-4)
    assert torch.tensor([g for _, g in together]).tolist() == [g for _, g in alone]
