"""Self-reports: asked behind the very tokens that were sampled, rewarded by a proper score, and sealed off from the task."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_rollout import documents
from tiny import CLOCK, talker

from pascaline.data import puzzles
from pascaline.data.batch import Batch
from pascaline.data.puzzles import Problem, Trace, Verdict
from pascaline.engine import Engine, Output
from pascaline.errors import BadInput
from pascaline.eval import suite
from pascaline.eval.honesty import auc, told
from pascaline.eval.plan import Plan
from pascaline.post import confession
from pascaline.post.check import check
from pascaline.post.confession import NO, UNCLEAR, YES, Report, advantages, confess, confession_samples, facts, read, transcript, turn
from pascaline.post.rollout import Rollouts
from pascaline.recipe import load, parse
from pascaline.runs import Metrics
from pascaline.tables import Confession, Puzzle
from pascaline.tokenizer import MARK, Tokenizer, train
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss, compute, totals

TINY = Path(__file__).parent.parent.parent / "recipes" / "tiny.toml"
NAME = f"{__name__}:puzzle"


class Odd:
    """Right is an answer of an odd number of letters; "none" gives up."""

    LEVELS: ClassVar[dict[str, Any]] = {}

    def generate(self, rng: random.Random) -> Problem:
        number = rng.randrange(10_000)
        return Problem("odd", f"Odd {number}?", f"odd {number}", {})

    def trace(self, problem: Problem, rng: random.Random) -> Trace:
        return Trace("toss", "7" + "a" * 2 * rng.randrange(3))

    def solve(self, problem: Problem) -> str:
        return "a"

    def verify(self, problem: Problem, answer: str) -> Verdict:
        return Verdict.ABSTAIN if "none" in answer else Verdict.RIGHT if len(answer) % 2 else Verdict.WRONG


def puzzle() -> Odd:
    return Odd()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["yes", "no", "Make 12 from 6, 6."] * 3, 300)


def speaker(tokenizer: Tokenizer) -> Engine:
    """A random model that says letters, and often yes or no."""
    model = talker(tokenizer, closes=150, ends=300)
    (yes,), (no,) = tokenizer.encode("yes"), tokenizer.encode("no")
    with torch.no_grad():
        model.lm_head.weight[[yes, no], 0] = torch.tensor([300.0, 300.0]).log() / 4
    return Engine(model, tokenizer)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    return speaker(tokenizer)


def rollouts(engine: Engine, **settings: Any) -> Rollouts:
    keys = {"puzzles": [NAME], "prompts": 8, "samples": 4, "max_tokens": 24, "sequence_length": 128, "micro_tokens": 1024, **settings}
    recipe = load(TINY, {"puzzles": {NAME: {}}, "eval.puzzles": [NAME], **{f"rl.{key}": value for key, value in keys.items()}})
    return Rollouts(engine, recipe.rl, recipe.puzzles, 5)


ASKED = {"confession": {"share": 1.0, "weight": 0.5}}


def report(said: str, belief: float, logprobs: Sequence[float] = (-0.5, -0.1)) -> Report:
    return Report([3, 4, 5], Output([8] * len(logprobs), list(logprobs), "stop", said), said, belief)


# ---- the question ----------------------------------------------------------------------------------------------------


def test_the_question_stands_behind_the_sampled_ids(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.prompt_ids("12?")
    odd = [i for letter in "yes" for i in tokenizer.encode(letter)]  # not the ids that the tokenizer makes of the word
    answer = [*odd, tokenizer.unthink, *odd]
    assert tokenizer.encode("yes") != odd
    between = turn(tokenizer)
    for ids in (transcript(tokenizer, between, prompt, [*answer, tokenizer.end]), transcript(tokenizer, between, prompt, answer)):
        assert ids[: len(prompt) + len(answer)] == prompt + answer
        said = tokenizer.decode(ids, special=True)
        assert said == (
            f"<|begin|><|user|>12?<|assistant|><think>yes</think>yes<|end|><|user|>{confession.QUESTION}<|assistant|><think></think>"
        )


CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer._parsing.to_str(), tokenizer.config, template)


def test_another_templates_turns_are_written_its_way(tokenizer: Tokenizer) -> None:
    other = with_template(tokenizer, CHATML)
    chat = [{"role": "user", "content": "12?"}, {"role": "assistant", "content": "abc"}, {"role": "user", "content": confession.QUESTION}]
    ids = transcript(other, turn(other), other.prompt_ids("12?"), [*other.encode("abc"), other.end_of_turn])
    assert ids == other.prompt_ids(chat)  # where no thought is taken away, appending is what rendering gives


def test_a_thought_that_a_template_always_opens_is_closed(tokenizer: Tokenizer) -> None:
    opening = with_template(tokenizer, CHATML.replace("assistant\n{%", "assistant\n<think>\n{%"))
    assert opening.decode(turn(opening), special=True).endswith("<think>\n</think>\n\n")


def test_a_template_of_single_questions_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="nobody can be asked about an answer"):
        turn(with_template(tokenizer, "<|user|>{{ messages[-1].content }}"))
    assert MARK not in confession.QUESTION


# ---- reading and rewarding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"), [("yes", YES), (" No.", NO), ("YES!", YES), ("", UNCLEAR), ("yes and no", UNCLEAR), ("n", UNCLEAR)]
)
def test_a_report_is_one_word(text: str, said: str) -> None:
    assert read(Output([1], [-1.0], "stop", text)) == said
    assert read(Output([1], [-1.0], "length", text)) == UNCLEAR  # it was going to say more


def test_the_reward_teaches_the_chance_of_being_right() -> None:
    """The expected policy gradient is that of Brier's score, for every belief and verdict, and 0 at the calibrated one."""
    for z in np.linspace(-4, 4, 9):
        q = 1 / (1 + math.exp(-z))
        slope = q * (1 - q)  # dq/dz
        found = {}
        for right in (True, False):
            # sum over words of P(word) dlogP(word)/dz reward(word)
            found[right] = q * (1 - q) * report(YES, q).reward(right) + (1 - q) * -q * report(NO, q).reward(right)
            assert found[right] == pytest.approx(-2 * (q - right) * slope, abs=1e-12)
        assert q * found[True] + (1 - q) * found[False] == pytest.approx(0, abs=1e-12)
    assert report(UNCLEAR, 0.5).reward(True) == report(UNCLEAR, 0.5).reward(False) == -1


def test_belief_is_the_models_own(engine: Engine, tokenizer: Tokenizer) -> None:
    """Against the trainer's forward: P(yes) over P(yes) + P(no), each with the tokens that begin the word."""
    ids = transcript(tokenizer, turn(tokenizer), tokenizer.prompt_ids("12?"), tokenizer.encode("abc"))
    (found,) = confession.ask(engine, [ids], 4, seed=0)
    with torch.no_grad():
        p = engine.model(torch.tensor([ids]))[0, -1].softmax(-1)
    yes = sum(float(p[tokenizer.encode(t)[0]]) for t in ("yes", "ye", "y", "YES"[:1]) if len(tokenizer.encode(t)) == 1)
    no = sum(float(p[tokenizer.encode(t)[0]]) for t in ("no", "n", "N"))
    assert 0.05 < found.belief < 0.95
    assert found.belief == pytest.approx(yes / (yes + no), abs=2e-3)  # rarer spellings are not among the likeliest tokens
    silent = Output([1], [-1.0], "stop", top_logprobs=[[(tokenizer.encode("a")[0], -0.1)]])
    assert confession.belief(tokenizer, silent, {}) == 0.5


def test_facts_are_those_worked_out_by_hand() -> None:
    reports = [report(YES, 0.9), report(YES, 0.8), report(NO, 0.3), report(NO, 0.4), report(UNCLEAR, 0.5)]
    right = np.array([True, False, False, True, False])
    assert facts(reports, right) == pytest.approx({
        "reports": 5,
        "confession_reward": (0.1 - 0.8 + (1 - 0.7) - 0.6 - 1) / 5,
        "unclear": 0.2,
        "brier": (0.01 + 0.64 + 0.09 + 0.36 + 0.25) / 5,
        "confessed": 1 / 3,
        "false_alarm": 1 / 2,
    })  # fmt: skip
    assert facts([], np.array([], bool)) == {"reports": 0}
    assert "confessed" not in facts(reports[:1], right[:1])


def test_an_advantage_is_over_the_other_reports_and_not_scaled() -> None:
    rewards = [0.1, -0.8, 0.3]
    assert advantages(rewards) == pytest.approx([r - (sum(rewards) - r) / 2 for r in rewards])


# ---- the seal --------------------------------------------------------------------------------------------------------


def test_a_token_is_taught_by_one_reward_only(engine: Engine, tokenizer: Tokenizer) -> None:
    found = documents(rollouts(engine, **ASKED).step(0))
    question = tokenizer.encode(confession.QUESTION)
    answers = [d for d in found if d["rl"].any()]
    reports = [d for d in found if d["report"].any()]
    assert len(answers) >= 8 and len(reports) >= 4 and len(answers) + len(reports) == len(found)
    for d in answers:
        assert not d["report"].any() and confession.QUESTION not in tokenizer.decode(d["tokens"].tolist())
    for d in reports:
        tokens, on = d["tokens"].tolist(), d["report"] > 0
        begin = next(i for i in range(len(tokens)) if tokens[i : i + len(question)] == question) + len(question)
        assert on.nonzero()[0].tolist() == list(range(begin + 3, len(tokens)))  # <|assistant|><think></think>, then the report
        assert not d["rl"].any() and not d["advantage"][~on].any() and len(set(d["advantage"][on].tolist())) == 1


def test_the_answers_and_their_samples_are_the_same_with_reports_and_without(engine: Engine) -> None:
    without, with_ = rollouts(engine), rollouts(engine, **ASKED)
    plain = documents(without.step(0))
    kept = [d for d in documents(with_.step(0)) if d["rl"].any()]

    def key(d: dict[str, np.ndarray]) -> Any:
        return tuple((name, tuple(d[name].tolist())) for name in ("tokens", "rl", "advantage", "old_logprob"))

    assert sorted(map(key, plain)) == sorted(map(key, kept)) and len(plain) >= 8
    told = ("reward", "accuracy", "flat_groups", "truncated", "unjudged")
    assert [with_.facts[name] for name in told] == [without.facts[name] for name in told]
    assert with_.facts["rollout_tokens"] > without.facts["rollout_tokens"] and "reports" not in without.facts


def gradients(engine: Engine, batches: list[Batch], silenced: str = "") -> dict[str, torch.Tensor]:
    """Of a step's loss; without the advantage on the tokens of one stream."""
    model = engine.model
    model.zero_grad()
    for batch in batches:
        streams = dict(batch.streams)
        if silenced:
            streams["advantage"] = streams["advantage"] * streams[silenced].eq(0)
        loss, _, _ = compute(model, Batch(batch.tokens, batch.positions, batch.document_ids, streams), totals(batches), Loss())
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference over the largest gradient."""
    largest = max(float(g.abs().max()) for g in expected.values())
    return max(float((found[n] - expected[n]).abs().max()) for n in expected) / largest


def test_the_tasks_gradient_is_the_same_with_reports_and_without(engine: Engine) -> None:
    plain, both = gradients(engine, rollouts(engine).step(0)), rollouts(engine, **ASKED).step(0)
    assert apart(gradients(engine, both, silenced="report"), plain) < 1e-5
    whole, reports = gradients(engine, both), gradients(engine, both, silenced="rl")
    assert apart(whole, plain) > 1e-2  # the reports do teach
    assert apart({n: whole[n] - reports[n] for n in whole}, plain) < 1e-5


def test_the_reports_loss_is_over_the_reports_tokens(engine: Engine) -> None:
    """On-policy: minus the mean advantage of the report's tokens, and that of rl of the answers'."""
    batches = rollouts(engine, **ASKED).step(0)
    total = totals(batches)
    logs = [compute(engine.model, batch, total, Loss())[1] for batch in batches]
    for name in ("rl", "report"):
        weight = torch.cat([b.weight(name) for b in batches])
        advantage = torch.cat([b.weight("advantage") for b in batches])
        expected = float(-(weight * advantage).sum() / weight.sum())
        assert abs(expected) > 1e-3 and sum(float(log[name]) for log in logs) == pytest.approx(expected, abs=1e-5)


def test_reports_have_the_trainers_log_probabilities(engine: Engine) -> None:
    """Law 1, behind a prompt that the engine was given as ids."""
    for d in documents(rollouts(engine, **ASKED).step(1)):
        tokens = torch.from_numpy(d["tokens"])[None]
        with torch.no_grad():
            logprob = engine.model(tokens)[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].numpy()
        on = (d["report"] + d["rl"])[1:] > 0
        assert on.any() and np.abs(logprob - d["old_logprob"][1:])[on].max() < 1e-4


def test_a_steps_reports_follow_from_its_number(engine: Engine) -> None:
    first, again, other = (rollouts(engine, **ASKED) for _ in range(3))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first.step(2), again.step(2), strict=True))
    other.step(3)
    told = [{k: v for k, v in one.facts.items() if k not in CLOCK} for one in (first, again, other)]
    assert told[0] == told[1] != told[2]


# ---- who is asked ----------------------------------------------------------------------------------------------------


class Listening:
    """In the engine's place: every second report says no; all believe 0.7."""

    def __init__(self, tokenizer: Tokenizer, positions: int = 200) -> None:
        self.tokenizer, self.asked = tokenizer, list[list[int]]()
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))

    def generate(self, prompts: list[list[int]], sampling: Any) -> list[list[Output]]:
        self.asked += prompts
        (yes,), (no,) = self.tokenizer.encode("yes"), self.tokenizer.encode("no")
        top = [[(yes, math.log(0.7)), (no, math.log(0.3))]]
        return [[Output([9, 1], [-0.1, -0.1], "stop", NO if i % 2 else YES, top_logprobs=top)] for i in range(len(prompts))]


def group(*kinds: tuple[str, Verdict]) -> tuple[list[Output], list[Verdict]]:
    return [Output([20 + i, 1], [-1.0, -1.0], finish, "x", "t") for i, (finish, _) in enumerate(kinds)], [v for _, v in kinds]


PROBLEM = Problem("odd", "Odd 1?", "odd 1", {})
STOP = "stop"


def test_only_finished_claims_with_a_verdict_are_asked_about(tokenizer: Tokenizer) -> None:
    listening = Listening(tokenizer)
    outputs, verdicts = group((STOP, Verdict.RIGHT), ("length", Verdict.WRONG), (STOP, Verdict.UNJUDGED), (STOP, Verdict.ABSTAIN),
                              (STOP, Verdict.WRONG))  # fmt: skip
    samples, told = confess(listening, [PROBLEM], [outputs], [verdicts], Confession(share=1.0, weight=0.5), seed=3)  # type: ignore[arg-type]
    prompt = tokenizer.prompt_ids(PROBLEM.prompt)
    assert [ids[len(prompt)] for ids in listening.asked] == [20, 24]
    # yes on the right one earns 0.3, no on the wrong one 0.7; each is compared with the other, times the weight
    assert [s.streams["advantage"][-1] for s in samples] == pytest.approx([-0.2, 0.2])
    assert told == pytest.approx(
        {"reports": 2, "confession_reward": 0.5, "unclear": 0, "brier": (0.09 + 0.49) / 2, "confessed": 1, "false_alarm": 0}
    )


def test_a_group_with_nothing_to_compare_teaches_nothing(tokenizer: Tokenizer) -> None:
    right, wrong = (STOP, Verdict.RIGHT), (STOP, Verdict.WRONG)
    groups = [group(right), group(wrong, right, wrong), group(("length", Verdict.WRONG))]  # said: yes, then no yes no
    samples, told = confess(
        Listening(tokenizer),
        [PROBLEM] * 3,
        [o for o, _ in groups],
        [v for _, v in groups],
        Confession(share=1.0),
        seed=3,  # type: ignore[arg-type]
    )
    assert told["reports"] == 4 and len(samples) == 3
    assert sum(s.streams["advantage"][-1] for s in samples) == pytest.approx(0, abs=1e-6)
    alike = [report(NO, 0.3), report(NO, 0.2)]
    assert confession._taught(alike, np.array([0, 0]), np.array([False, False]), 1.0) == []
    assert confession._taught([report(UNCLEAR, 0.3), report(UNCLEAR, 0.2)], np.array([0, 0]), np.array([True, False]), 1.0) == []


def test_the_share_is_of_whole_problems(tokenizer: Tokenizer) -> None:
    listening = Listening(tokenizer)
    groups = [group((STOP, Verdict.RIGHT), (STOP, Verdict.WRONG)) for _ in range(8)]
    problems = [Problem("odd", f"Odd {i}?", f"odd {i}", {}) for i in range(8)]
    confess(listening, problems, [o for o, _ in groups], [v for _, v in groups], Confession(share=0.25), seed=1)  # type: ignore[arg-type]
    asked = [tokenizer.decode(ids)[:6] for ids in listening.asked]
    assert len(asked) == 4 and len(set(asked)) == 2


def test_what_would_not_fit_is_not_asked(tokenizer: Tokenizer) -> None:
    outputs, verdicts = group((STOP, Verdict.RIGHT))
    length = len(transcript(tokenizer, turn(tokenizer), tokenizer.prompt_ids(PROBLEM.prompt), outputs[0].token_ids))
    for positions, reports in ((length + 8, 1), (length + 7, 0)):
        told = confess(Listening(tokenizer, positions), [PROBLEM], [outputs], [verdicts], Confession(max_tokens=8), seed=1)[1]  # type: ignore[arg-type]
        assert told["reports"] == reports


# ---- in a stage ------------------------------------------------------------------------------------------------------


def test_two_steps_of_rl_with_reports(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = speaker(tokenizer)
    source = rollouts(engine, **ASKED, steps=2)
    before = engine.model.lm_head.weight.detach().clone()
    Trainer(engine.model, source.rl, Loss(), tmp_path, "rl", torch.float32).run(source, 2, quiet=True)
    rows = Metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["loss"] == pytest.approx(row["rl"] + row["report"], abs=1e-6)
        assert 0 <= row["brier"] <= 1 and row["reports"] > 0 and {"confessed", "false_alarm", "unclear", "confession_reward"} <= set(row)
    assert not torch.equal(engine.model.lm_head.weight, before)


def test_reports_teach_where_no_answer_does(tokenizer: Tokenizer, engine: Engine) -> None:
    """All groups flat: the step has the reports' loss alone."""
    batches = [b for b in rollouts(engine, **ASKED).step(0)]
    for batch in batches:
        batch.streams["rl"].zero_()
    total = totals(batches)
    assert total["rl"] == 0 < total["report"]
    logs = [compute(engine.model, batch, total, Loss())[1] for batch in batches]
    assert all(set(log) == {"report", "router_entropy"} for log in logs)


def test_a_recipe_that_leaves_no_room_for_a_report_is_refused() -> None:
    recipe = load(TINY, {"rl.confession.share": 0.5})
    assert recipe.rl.confession == Confession(share=0.5) and load(TINY).rl.confession is None
    assert parse(recipe.model_dump(mode="json"), "").rl.confession == Confession(share=0.5)
    check(recipe)
    positions = recipe.model["max_position_embeddings"]
    with pytest.raises(BadInput, match=rf"rl\.confession: an answer .* leave no room in the model's {positions} positions"):
        check(load(TINY, {"rl.confession.share": 0.5, "rl.max_tokens": positions - 8}))


# ---- a cold start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["countdown", "chain", "arithmetic"])
def test_cold_start_samples_say_yes_to_right_answers_and_no_to_planted_wrong_ones(tokenizer: Tokenizer, name: str) -> None:
    samples = confession_samples({name: Puzzle(examples=40)}, tokenizer, 1, 0.5)
    said = []
    for sample in samples:
        on = sample.streams["ce"] > 0
        ids = sample.tokens.tolist()
        question, _, rest = tokenizer.decode(ids, special=True).removeprefix("<|begin|><|user|>").partition("<|assistant|><think>")
        answer = rest.partition("</think>")[2].partition("<|end|>")[0]
        problem = next(p for p in puzzles.problems(name, 20, 3, False) if p.prompt == question)
        word = tokenizer.decode(sample.tokens[on].tolist())
        assert sample.tokens[on].tolist() == ids[-int(on.sum()) :] == [*tokenizer.encode(word), tokenizer.end]
        assert (puzzles.get(name).verify(problem, answer) is Verdict.RIGHT) == (word == YES)
        said.append(word)
    assert 9 <= said.count(YES) <= 10 and 9 <= said.count(NO) <= 10


def test_where_no_wrong_answer_is_found_none_is_called_wrong(tokenizer: Tokenizer) -> None:
    samples = confession_samples({NAME: Puzzle(examples=6)}, tokenizer, 1, 1.0)  # all its traces are right, with any digit
    assert {tokenizer.decode(s.tokens[s.streams["ce"] > 0].tolist()) for s in samples} == {YES} and len(samples) == 3


# ---- the task honesty ------------------------------------------------------------------------------------------------


def test_the_measurement_against_numbers_worked_out_by_hand() -> None:
    """Two problems of two reports, one of one, one without: means of means."""
    reports = [report(YES, 0.9), report(NO, 0.2), report(NO, 0.4), report(YES, 0.6), report(UNCLEAR, 0.5)]
    places = [(0, True), (0, False), (1, True), (1, False), (3, False)]
    found = told(reports, places, ["a", "b", "c", "d"])
    assert found["values"] == [pytest.approx((0.01 + 0.04) / 2), pytest.approx(0.36), None, pytest.approx(0.25)]
    assert found["score"] == pytest.approx((0.025 + 0.36 + 0.25) / 3) and found["n"] == 3 and found["better"] == "lower"
    assert found["reports"] == 5 and found["accuracy"] == 0.4 and found["unclear"] == 0.2
    assert found["confessed"] == pytest.approx((1 + 0 + 0) / 3) and found["false_alarm"] == 0.5
    assert found["confessed_low"] < found["confessed"] < found["confessed_high"]
    assert found["constant"] == {"answer": "yes", "score": pytest.approx((0.5 + 0.5 + 1) / 3)}
    assert found["always_no"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["base_rate"] == pytest.approx(1 / 3 * 2 / 3)
    empty = told([], [], ["a"])
    assert empty["score"] is empty["confessed"] is empty["auc"] is empty["constant"]["score"] is None and empty["values"] == [None]


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = random.Random(1)
    pairs = [(rng.randrange(6) / 5, rng.random() < 0.4) for _ in range(60)]
    ups = [x for x, v in pairs if v]
    downs = [x for x, v in pairs if not v]
    assert auc(pairs) == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a in ups for b in downs]))
    assert auc([(0.5, True)]) is None


def test_the_task_asks_a_model(engine: Engine) -> None:
    plan = Plan(task=f"honesty:{NAME}", problems=8, samples=3, max_tokens=24, temperature=1.0)
    measure = suite.task_of(plan)
    seen = []
    found = measure(engine, plan, lambda done, of: seen.append((done, of)))
    assert found == measure(engine, plan, lambda done, of: None)
    assert len(found["keys"]) == 8 and 0 < found["n"] <= 8 and found["n"] <= found["reports"] <= 24 and seen[-1] == (8, 8)
    assert found["low"] <= found["score"] <= found["high"] and found["constant"]["score"] == pytest.approx(1 - found["accuracy"], abs=0.25)
    with pytest.raises(BadInput, match="leave out plain"):
        measure(engine, plan.model_copy(update={"plain": True}), lambda done, of: None)
