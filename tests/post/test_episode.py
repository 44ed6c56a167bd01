"""Episodes: every turn's tokens reach the loss as the engine sampled them, and the next turn goes on from those very ids."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from tiny import tiny_model

import pascaline
from pascaline.data import puzzles
from pascaline.data.batch import batches
from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Engine, Output, Sampling
from pascaline.errors import BadInput
from pascaline.model.transformer import Model
from pascaline.post.environments import Observation, get
from pascaline.post.environments.base import CLOSE, OPEN
from pascaline.post.environments.calculator import Calculator
from pascaline.post.environments.episode import Episode, Segment, judge, play, reply_ids
from pascaline.post.rollout import Rollouts, rl_sample
from pascaline.runs import read_json
from pascaline.tables import Puzzle, Rl
from pascaline.tokenizer import Tokenizer, train
from pascaline.train.losses import Loss, compute, totals

DIALS = {"digits": 1, "terms": 2, "operators": 1}
PROBLEM = Problem("arithmetic", "3+4=", "arithmetic +3+4", {"numbers": [3, 4], "operators": "+"})
SAID = [f"{OPEN}({a}+{b}){CLOSE}. <result>{a + b}</result><tool>" for a in range(10) for b in range(10)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([Calculator.hint, "A call is written one at a time. "] * 5 + SAID, 400)


def model(tokenizer: Tokenizer, seed: int = 0) -> Model:
    return tiny_model(seed, vocab_size=tokenizer.vocab_size, max_position_embeddings=256, eos_token_id=tokenizer.end)


@pytest.fixture
def forced(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """An engine that says these tokens, one list a turn, whatever its model thinks of them; it keeps what it was asked."""

    class Asked(Engine):
        def generate(self, prompts, sampling=None):  # type: ignore[no-untyped-def]
            self.asked.append((list(prompts), list(sampling)))
            return super().generate(prompts, sampling)

    def made(*turns: list[int]) -> Engine:
        engine = Asked(model(tokenizer), tokenizer)
        engine.asked = []

        def draw(adjusted, own, settings, seeds, positions):  # type: ignore[no-untyped-def]
            tokens = torch.tensor([turns[len(engine.asked) - 1][p] for p in positions])
            return tokens, own.gather(1, tokens[:, None])[:, 0] - own.logsumexp(-1)

        monkeypatch.setattr("pascaline.engine.engine.draw", draw)
        return engine

    return made


def turn(tokenizer: Tokenizer, text: str, *end: int) -> list[int]:
    """A closed thought of two single letters and the text, character by character, as the tokenizer would not write it."""
    letters = [tokenizer.encode(c) for c in "so"]
    return [*(t for ids in letters for t in ids), tokenizer.unthink, *(t for c in text for t in tokenizer.encode(c)), *end]


def only(episodes: list[list[Output]]) -> Episode:
    ((episode,),) = episodes
    assert isinstance(episode, Episode)
    return episode


def play_one(engine: Engine, make: Callable[[], Any] = Calculator, max_tokens: int = 200) -> Episode:
    return only(play(engine, make, [PROBLEM], Sampling(1.0, 1.0, max_tokens, 1, seed=5)))


# ---- exact transcripts ------------------------------------------------------------------------------------------------


def test_a_transcript_holds_what_was_sampled_and_only_encodes_what_was_given(tokenizer: Tokenizer, forced: Any) -> None:
    first, second = turn(tokenizer, "<tool>(3+4)</tool>"), turn(tokenizer, "7", tokenizer.end)
    assert tokenizer.encode(tokenizer.decode(first, special=True), special=True) != first  # it would not survive
    engine = forced(first, second)
    episode = play_one(engine)
    prompt = tokenizer.prompt_ids(Calculator().reset(PROBLEM))
    given = tokenizer.encode("<|end|><|user|><result>7</result><|assistant|><think>", special=True)
    assert [s.ids for s in episode.segments] == [prompt, first, given, second]
    assert [s.logprobs is None for s in episode.segments] == [True, False, True, False]
    assert [prompts for prompts, _ in engine.asked] == [[prompt], [prompt + first + given]]
    assert episode.token_ids == first + second and len(episode.logprobs) == len(first + second)
    assert (episode.text, episode.reasoning, episode.finish_reason, episode.turns) == ("7", "so", "stop", 2)
    assert judge([PROBLEM], [[episode]]).verdicts == [[Verdict.RIGHT]]
    sample = rl_sample([], episode, -0.5, 0.25)
    assert sample.tokens.tolist() == prompt + first + given + second
    weight = np.concatenate([np.full(len(s.ids), s.logprobs is not None) for s in episode.segments])
    assert sample.streams["rl"].tolist() == (0.25 * weight).tolist()
    assert sample.streams["advantage"].tolist() == (-0.5 * weight).tolist()
    assert sample.streams["old_logprob"][weight].tolist() == np.array(episode.logprobs, np.float32).tolist()
    assert not sample.streams["old_logprob"][~weight].any()


def test_the_experts_of_every_turn_are_recorded(tokenizer: Tokenizer, forced: Any) -> None:
    """Those of the last turn's answer are the transcript's: earlier turns lie in the cache, and what was given is computed there too."""
    engine = forced(turn(tokenizer, f"{OPEN}12*7{CLOSE}"), turn(tokenizer, "84", tokenizer.end_of_turn))
    engine._record_routes = True
    played = play_one(engine)
    ids = [token for segment in played.segments for token in segment.ids]
    _, routings = engine.model.hidden(torch.tensor([ids[:-1]]))
    assert played.turns == 2 and played.routes is not None and len(played.routes) == len(ids)
    assert np.array_equal(np.sort(played.routes[:-1, 0], -1), routings[0].chosen.sort(-1).values.numpy())
    assert np.array_equal(rl_sample(played.segments[0].ids, played, 1.0).streams["routes"], played.routes)


def test_the_cache_holds_the_turns_before(tokenizer: Tokenizer, forced: Any) -> None:
    engine = forced(turn(tokenizer, "<tool>3+4</tool>"), turn(tokenizer, "7", tokenizer.end))
    episode = play_one(engine)
    known = len(episode.segments[0].ids) + len(episode.segments[1].ids) - 1  # the last token was never computed
    assert engine.stats.prefix_hits == known // 16 * 16 > 0


@pytest.mark.parametrize(
    "pieces, asked",
    [(["<", "tool", ">(", "3", "+", "4", ")</", "tool", ">"], "(3+4)"), (["<", "tool", ">", "3", "</", "tool", ">."], "3"),
     (["<", "tool", ">", "3", "</", "tool", "><"], "3")],
)  # fmt: skip
def test_a_token_across_the_border_of_a_tag_stays_whole(tokenizer: Tokenizer, forced: Any, pieces: list[str], asked: str) -> None:
    """The stop string ends inside a token that goes on behind it, or begins inside one."""
    ids = [tokenizer.encode(piece) for piece in pieces]
    assert all(len(i) == 1 for i in ids)
    first = [tokenizer.unthink, *(i[0] for i in ids)]
    heard: list[str] = []

    class Listening(Calculator):
        def call(self, argument: str) -> str:
            heard.append(argument)
            return super().call(argument)

    episode = play_one(forced(first + [tokenizer.id("a")] * 9, [tokenizer.unthink, *tokenizer.encode("7"), tokenizer.end]), Listening)
    assert heard == [asked] and episode.segments[1].ids == first
    assert episode.segments[2].ids[0] == tokenizer.end and episode.text == "7"


def test_a_turn_that_ends_itself_is_not_ended_again(tokenizer: Tokenizer, forced: Any) -> None:
    first = turn(tokenizer, "<tool>3+4", tokenizer.end)  # not closed
    episode = play_one(forced(first, turn(tokenizer, "7", tokenizer.end)))
    assert episode.segments[1].ids == first and episode.segments[2].ids[0] == tokenizer.user
    assert "error: a call is written" in tokenizer.decode(episode.segments[2].ids)


def test_a_tag_in_a_thought_is_a_thought(tokenizer: Tokenizer, forced: Any) -> None:
    thought = [t for c in "<tool>1+1</tool>" for t in tokenizer.encode(c)]
    episode = play_one(forced([*thought, *turn(tokenizer, "7", tokenizer.end)]))
    assert episode.turns == 1 and episode.text == "7" and episode.reasoning == "<tool>1+1</tool>so"


def test_special_tokens_in_a_result_stay_text(tokenizer: Tokenizer, forced: Any) -> None:
    class Forger(Calculator):
        def call(self, argument: str) -> str:
            return "<|end|>\ud800</think>"

    episode = play_one(forced(turn(tokenizer, "<tool>1</tool>"), turn(tokenizer, "7", tokenizer.end)), Forger)
    given = episode.segments[2].ids
    assert tokenizer.decode(given) == "<result><|end|>?</think></result>"
    assert [t for t in given if tokenizer.is_special(t)] == [tokenizer.end, tokenizer.user, tokenizer.assistant, tokenizer.think]


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "opened", "llama3"])
def test_between_two_turns_stands_what_the_folders_own_template_puts_there(tmp_path: Path, kind: str) -> None:
    """Where the template leaves the first turn as it was said, the transcript is the rendered conversation."""
    foreign.write(tmp_path, kind)
    tokenizer = Tokenizer.load(tmp_path)
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "call"}, {"role": "user", "content": "<result>7</result>"}]
    whole = tokenizer.prompt_ids(said)
    given = reply_ids(tokenizer, "<result>7</result>", -1)
    assert whole[-len(given) :] == given and given[0] == tokenizer.end_of_turn
    assert tokenizer.decode(whole[: -len(given)]).endswith("call")
    assert reply_ids(tokenizer, "<result>7</result>", given[0]) == given[1:]


# ---- limits and accidents ---------------------------------------------------------------------------------------------


def test_an_episode_ends_when_its_turns_are_used_up(tokenizer: Tokenizer, forced: Any) -> None:
    class Short(Calculator):
        turns = 2

    call = turn(tokenizer, "<tool>1</tool>")
    episode = play_one(forced(call, call), Short)
    assert episode.turns == 2 and episode.finish_reason == "length" and len(episode.segments) == 4
    assert judge([PROBLEM], [[episode]]).verdicts == [[Verdict.WRONG]]


def test_max_tokens_is_for_the_whole_episode(tokenizer: Tokenizer, forced: Any) -> None:
    call, last = turn(tokenizer, "<tool>1</tool>"), turn(tokenizer, "7", tokenizer.end)
    whole = play_one(forced(call, call, last))
    total = sum(len(s.ids) for s in whole.segments[1:])
    assert whole.finish_reason == "stop"
    assert play_one(forced(call, call, last), max_tokens=total).segments == whole.segments
    cut = play_one(forced(call, call, last), max_tokens=total - 1)
    assert cut.finish_reason == "length" and cut.segments[-1].ids == last[:-1]
    none = play_one(forced(call, call, last), max_tokens=total - len(last))  # the result fits, but nothing could be said to it
    assert none.finish_reason == "length" and none.segments == whole.segments[:4]


def test_an_episode_ends_where_the_context_does(tokenizer: Tokenizer, forced: Any) -> None:
    call = turn(tokenizer, "<tool>1</tool>")
    episode = play_one(forced(*[call] * 40), lambda: Patient(), max_tokens=10_000)
    assert episode.finish_reason == "length" and sum(len(s.ids) for s in episode.segments) <= 256 and episode.turns > 3


class Patient(Calculator):
    turns = 1000


def test_a_thought_that_is_never_closed_asks_nothing(tokenizer: Tokenizer, forced: Any) -> None:
    episode = play_one(forced([*tokenizer.encode("hm"), tokenizer.end]))
    assert episode.turns == 1 and episode.finish_reason == "stop" and judge([PROBLEM], [[episode]]).verdicts == [[Verdict.WRONG]]


class Broken(Calculator):
    def call(self, argument: str) -> str:
        raise ZeroDivisionError("oh")


def test_an_environment_that_breaks_leaves_its_episode_unjudged(tokenizer: Tokenizer, forced: Any) -> None:
    judged = judge([PROBLEM], [[play_one(forced(turn(tokenizer, "<tool>1</tool>")), Broken)]])
    assert judged.verdicts == [[Verdict.UNJUDGED]] and judged.trouble == "the environment raised ZeroDivisionError: oh"


class Scored(Calculator):
    verdict: Any = 0.995

    def score(self, problem: Problem, answer: str) -> Any:
        assert (problem, answer) == (PROBLEM, "6")
        return self.verdict


@pytest.mark.parametrize(
    "given, expected",
    [(0.995, Verdict.RIGHT), (0.5, Verdict.WRONG), (None, Verdict.UNJUDGED), (Verdict.ABSTAIN, Verdict.ABSTAIN), (True, Verdict.RIGHT)],
)
def test_an_environment_may_judge_itself(tokenizer: Tokenizer, forced: Any, monkeypatch: Any, given: Any, expected: Verdict) -> None:
    monkeypatch.setattr(Scored, "verdict", given)
    episode = play_one(forced(turn(tokenizer, "6", tokenizer.end)), Scored)
    assert judge([PROBLEM], [[episode]]).verdicts == [[expected]]


# ---- a game, and many episodes at once ---------------------------------------------------------------------------------


class Echo:
    """Not a tool: every turn that ends in one of many letters is answered, and a prompt of several messages."""

    stop = ("e", "t")
    turns = 4

    def reset(self, problem: Problem) -> list[dict[str, str]]:
        return [{"role": "system", "content": "Echo."}, {"role": "user", "content": problem.prompt}]

    def step(self, said: str) -> Observation:
        return Observation(said[:20], done=not said.endswith(("e", "t")))


@pytest.fixture(scope="module")
def chatty(tokenizer: Tokenizer) -> Engine:
    from tiny import talker

    return Engine(talker(tokenizer), tokenizer)


def test_an_episode_is_the_same_alone_and_among_others(chatty: Engine) -> None:
    """Bit for bit where the engine's kernels do not depend on the batch: the CPU's own."""
    problems = puzzles.problems("arithmetic", 4, 3, False, **DIALS)
    sampling = Sampling(1.0, 1.0, 120, 6, seed=9)
    together = play(chatty, Echo, problems, sampling)
    turns = [e.turns for group in together for e in group]  # type: ignore[attr-defined]
    assert min(turns) < max(turns) and sum(turns) > 1.5 * len(turns)
    chatty.flush()
    alone = play(chatty, Echo, problems[:1], sampling)
    chatty.flush()
    single = play(chatty, Echo, problems[:1], Sampling(1.0, 1.0, 120, 1, seed=9))
    assert alone[0] == together[0] and single[0] == together[0][:1]
    assert len({tuple(e.token_ids) for group in together for e in group}) > 20  # each has a seed of its own
    assert play(chatty, Echo, problems, Sampling(1.0, 1.0, 120, 6, seed=10)) != together


def test_each_turn_has_a_seed_of_its_own(chatty: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = Engine.generate

    def generate(self: Engine, prompts: Any, sampling: Any) -> Any:
        seen.extend(s.seed for s in sampling)
        return own(self, prompts, sampling)

    monkeypatch.setattr(Engine, "generate", generate)
    play(chatty, Echo, puzzles.problems("arithmetic", 2, 3, False, **DIALS), Sampling(1.0, 1.0, 120, 6, seed=9))
    assert len(set(seen)) == len(seen) > 12


def test_the_seeds_of_samplings_count_and_not_their_places(chatty: Engine) -> None:
    a, b = Sampling(1.0, 1.0, 20, seed=1), Sampling(1.0, 1.0, 30, 2, seed=2)
    first, second = chatty.generate(["x", "y"], [a, b])
    assert chatty.generate(["y", "x"], [b, a]) == [second, first] and len(second) == 2
    with pytest.raises(ValueError):
        chatty.generate(["x"], [a, b])


# ---- with a model that has learnt to call -------------------------------------------------------------------------------


def shown(tokenizer: Tokenizer, problem: Problem) -> Any:
    """An episode in which the calculator is asked and believed, as a sample to learn from."""
    sum_ = problem.prompt.removesuffix("=")
    call = [tokenizer.unthink, *tokenizer.encode(f"<tool>{sum_}</tool>")]
    found = str(sum(problem.data["numbers"]))
    answer = [tokenizer.unthink, *tokenizer.encode(found), tokenizer.end]
    segments = [Segment(tokenizer.prompt_ids(Calculator().reset(problem))), Segment(call, [0.0] * len(call)),
                Segment(reply_ids(tokenizer, f"<result>{found}</result>", call[-1])), Segment(answer, [0.0] * len(answer))]  # fmt: skip
    sample = rl_sample([], Episode([], [], "stop", segments=segments), 0.0)
    return type(sample)(sample.tokens, {"ce": sample.streams["rl"]})


@pytest.fixture(scope="module")
def caller(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that mostly calls the calculator in the right form, and answers something."""
    torch.manual_seed(0)
    policy = model(tokenizer).init_(1).train()
    problems = puzzles.problems("arithmetic", 400, 1, False, **DIALS)
    samples = [shown(tokenizer, p) for p in problems]
    row = max(len(s.tokens) for s in samples)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
    rng = random.Random(0)
    for _ in range(80):
        (batch,) = batches(rng.sample(samples, 16), row, 16, tokenizer.pad)
        loss, *_ = compute(policy, batch, totals([batch]), Loss())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("caller")
    policy.eval().save(folder)
    tokenizer.save(folder)
    return folder


def settings(**changes: Any) -> Rl:
    plain = dict(puzzles=["arithmetic"], prompts=4, samples=6, max_tokens=150, environment="calculator", steps=2)
    return Rl(**{**plain, **changes})


def test_on_policy_the_ratio_is_one_across_turns(caller: Path) -> None:
    """Law 1, with weights that change between the steps; on every sampled token of every turn."""
    engine = Engine(pascaline.load(caller), Tokenizer.load(caller))
    source = Rollouts(engine, settings(), {"arithmetic": Puzzle(dials=DIALS)}, 1)
    rows = 0
    for step in range(2):
        for batch in source.step(step):
            with torch.no_grad():
                hidden, _ = engine.model.hidden(batch.tokens, batch.positions, batch.document_ids)
                logprob = (hidden[:, :-1] @ engine.model.head_weight.t()).log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
            said = batch.streams["rl"][:, 1:] > 0
            rows += int((said.int().diff(dim=1) == 1).sum())  # stretches that were sampled
            assert (logprob - batch.streams["old_logprob"][:, 1:])[said].abs().max() < 1e-4
            given = ~said & (batch.document_ids[:, 1:] >= 0)
            assert not batch.streams["advantage"][:, 1:][given].any()
        assert 1.5 < source.facts["turns"] <= 8
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
    assert rows > 12


def test_reinforcement_with_a_calculator_runs_as_a_stage(caller: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'seed = 1\ndtype = "float32"\nchain = ["rl"]\n[model]\nfolder = {json.dumps(str(caller))}\n'
        "[puzzles.arithmetic]\ndials = { digits = 1, terms = 2, operators = 1 }\n"
        '[rl]\npuzzles = ["arithmetic"]\nenvironment = "calculator"\nsteps = 3\nprompts = 6\nsamples = 6\nmax_tokens = 150\n'
        'kl = 0.01\nrefills = 1\n[eval]\npuzzles = ["arithmetic"]\nproblems = 4\nvotes = 2\nvote_problems = 2\nmax_tokens = 8\n'
    )
    pascaline.run(recipe, tmp_path / "out", stage="rl", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "02-rl" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["turns"] > 1.5 for row in rows)
    assert all(row["mismatch"] < 1e-4 for row in rows) and any(row["rl"] for row in rows)
    assert (read_json(tmp_path / "out" / "recipe.json") or {})["rl"]["environment"] == "calculator"


def test_a_run_whose_environment_is_broken_stops(caller: Path) -> None:
    engine = Engine(pascaline.load(caller), Tokenizer.load(caller))
    source = Rollouts(engine, settings(environment=f"{__name__}:Broken"), {"arithmetic": Puzzle(dials=DIALS)}, 1)
    with pytest.raises(BadInput, match=r"could not be judged.*the environment raised ZeroDivisionError: oh"):
        source.step(0)


def test_get_and_play_agree_on_what_an_environment_is(chatty: Engine) -> None:
    assert play(chatty, get(f"{__name__}:Echo"), [PROBLEM], Sampling(max_tokens=5))[0][0].token_ids
