"""Environments over a whole chain: worked episodes are learnt token for token as they are played, measured, accepted and learnt again."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from tiny import tiny_model

from pascaline.data import chats, pairs, puzzles
from pascaline.data.chats import Chat, documents
from pascaline.data.puzzles import Problem, Trace
from pascaline.data.puzzles.families import Family
from pascaline.engine import Engine, Sampling
from pascaline.errors import BadInput
from pascaline.eval.report import report_html, table_text
from pascaline.post import distil, evaluation, reject, sft
from pascaline.post.check_chain import check_chain
from pascaline.post.environments import Observation, get, worked
from pascaline.post.environments.calculator import Calculator
from pascaline.post.environments.episode import Episode, calls, play, thoughts
from pascaline.post.environments.python import Python
from pascaline.post.reference import Reference
from pascaline.post.stage import Run
from pascaline.recipe import Recipe, load, parse
from pascaline.tables import Distil, Puzzle
from pascaline.tokenizer import Tokenizer, train

DIALS = {"arithmetic": {"digits": 3, "operators": 3}, "chain": {}, "countdown": {}}
TEXTS = [Calculator.hint, Python.hint, "Make 12 from 6, 6. The answer is 12.", "<tool>12*7</tool> <result>84</result>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS * 3, 400)


def problem(name: str, seed: int = 1) -> Problem:
    return puzzles.problems(name, 1, seed, False, **DIALS.get(name, {}))[0]


def worked_chat(name: str, environment: str = "calculator", seed: int = 1) -> Chat:
    family = Family(name, Puzzle(dials=DIALS[name]))
    return next(worked.episodes(family, [problem(name, seed)], environment, seed))


def scripted(tokenizer: Tokenizer, said: list[list[int]], monkeypatch: pytest.MonkeyPatch, room: int = 1024) -> Engine:
    """An engine that says these tokens, a list for each turn it is asked for, over its real stop strings and its real cache."""
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=room, eos_token_id=tokenizer.end_of_turn)
    turns: list[int] = []

    class Asked(Engine):
        def generate(self, prompts: Any, sampling: Any = None) -> Any:
            turns.append(len(turns))
            return super().generate(prompts, sampling)

    def draw(adjusted: Any, own: torch.Tensor, settings: Any, seeds: Any, positions: Any) -> Any:
        tokens = torch.tensor([said[turns[-1]][p] for p in positions])
        return tokens, own.gather(1, tokens[:, None])[:, 0] - own.logsumexp(-1)

    monkeypatch.setattr("pascaline.engine.engine.draw", draw)
    return Asked(model, tokenizer)


def replayed(
    tokenizer: Tokenizer, chat: Chat, monkeypatch: pytest.MonkeyPatch, make: Any = Calculator, name: str = "arithmetic"
) -> Episode:
    """The episode of a model that says, token for token, what the chat teaches."""
    (sample,) = documents(chat, tokenizer, ["assistant"])
    said = sample.streams["ce"] > 0
    starts = np.flatnonzero(np.diff(np.concatenate([[0], said.astype(int), [0]])))
    turns = [[*sample.tokens[a:b].tolist(), 0] for a, b in zip(starts[::2], starts[1::2], strict=True)]
    engine = scripted(tokenizer, turns, monkeypatch)
    ((episode,),) = play(engine, make, [problem(name)], Sampling(1.0, 1.0, 900, 1, seed=3))
    assert isinstance(episode, Episode)
    return episode


# ---- what is learnt is what is played ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arithmetic", "chain", "countdown"])
@pytest.mark.parametrize("environment", ["calculator", "python"])
def test_a_model_that_says_what_it_was_taught_plays_the_very_tokens_it_learnt(
    tokenizer: Tokenizer, monkeypatch: Any, name: str, environment: str
) -> None:
    """By our own template, which takes the thoughts of earlier turns back when it writes a conversation anew."""
    chat = worked_chat(name, environment)
    (sample,) = documents(chat, tokenizer, ["assistant"])  # one document, with every thought in it
    episode = replayed(tokenizer, chat, monkeypatch, get(environment), name)
    assert [t for s in episode.segments for t in s.ids] == sample.tokens.tolist()
    said = np.concatenate([np.full(len(s.ids), s.logprobs is not None) for s in episode.segments])
    assert (sample.streams["ce"] > 0).tolist() == said.tolist()
    assert episode.finish_reason == "stop" and [*episode.prompt, *episode.messages] == chat.messages
    text = tokenizer.decode(sample.tokens.tolist(), special=True)
    assert all(m["reasoning_content"] in text for m in chat.messages if m["role"] == "assistant")
    assert puzzles.get(name).verify(problem(name), episode.text).value == "right"
    assert calls([[episode]]) == len(chat.messages) // 2 - 1 > 0
    assert thoughts(episode).count("<result>") == len(chat.messages) // 2 - 1


@pytest.mark.parametrize("kind", ["qwen3", "opened", "llama3"])
def test_a_folders_own_template_gives_the_same_tokens_to_both(tmp_path: Path, monkeypatch: Any, kind: str) -> None:
    foreign.write(tmp_path, kind)
    own, chat = Tokenizer.load(tmp_path), worked_chat("chain")
    (sample,) = documents(chat, own, ["assistant"])
    episode = replayed(own, chat, monkeypatch, name="chain")
    assert [t for s in episode.segments for t in s.ids] == sample.tokens.tolist() and episode.turns > 2


def test_results_are_the_environments_and_not_the_puzzles() -> None:
    results = [m["content"] for m in worked_chat("arithmetic").messages if m["role"] == "user"][1:]
    asked = problem("arithmetic")
    assert results == [f"<result>{puzzles.get('arithmetic').solve(asked)}</result>"]
    assert worked_chat("arithmetic").messages[0]["content"] == f"{Calculator.hint}\n{asked.prompt}"
    for environment, form in (("calculator", "<tool>{}</tool>"), ("python", "<tool>print({})</tool>")):
        assert worked_chat("arithmetic", environment).messages[1]["content"] == form.format(asked.prompt.removesuffix("="))


@pytest.mark.parametrize("name", ["arithmetic", "chain", "countdown"])
def test_worked_episodes_fit_the_turns_and_are_right(name: str) -> None:
    family = Family(name, Puzzle(dials={**DIALS[name], **({"steps": 5} if name == "chain" else {})}))
    asked = family.problems(150, 3, held_out=False)
    for one, chat in zip(asked, worked.episodes(family, asked, "calculator", 3), strict=True):
        assert puzzles.get(name).verify(one, chat.messages[-1]["content"]).value == "right"
        assert "error" not in "".join(m["content"] for m in chat.messages)


class Guess:
    """No tool: a turn ends itself, and the prompt has an answer of its own."""

    turns = 3

    def reset(self, problem: Problem) -> list[dict[str, str]]:
        shown = [{"role": "user", "content": "Say 5."}, {"role": "assistant", "content": "5"}]
        return [*shown, {"role": "user", "content": problem.prompt}]

    def step(self, said: str) -> Observation:
        return Observation(done=True) if said == "7" else Observation("More.")


def test_a_turn_that_ends_itself_says_its_end(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    asked = problem("arithmetic")
    chat = worked.played(f"{__name__}:Guess", asked, [Trace("low", "3"), Trace("so", "7")], "x")
    assert chat.completion_from == 3 and chat.stops == ()
    (sample,) = documents(chat, tokenizer, ["assistant"])
    said = sample.tokens[sample.streams["ce"] > 0]
    assert (said == tokenizer.end).sum() == 2  # and not the one in the prompt
    episode = replayed(tokenizer, chat, monkeypatch, Guess)
    assert [t for s in episode.segments for t in s.ids] == sample.tokens.tolist()


@pytest.mark.parametrize(
    "turns, says",
    [([Trace("", "7"), Trace("", "7")], "is over with turn 1 of the 2"), ([Trace("", "3")], "is not over with turn 1 of the 1"),
     ([Trace("", "3")] * 4, "3 turns at most, and the worked episode 4"), ([], "3 turns at most, and the worked episode 0")],
)  # fmt: skip
def test_a_worked_episode_that_cannot_be_played_is_refused(turns: list[Trace], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        worked.played(f"{__name__}:Guess", problem("arithmetic"), turns, "x")


# ---- recipes ----------------------------------------------------------------------------------------------------------


def recipe(chain: list[str], **tables: Any) -> Recipe:
    raw: dict[str, Any] = {"chain": chain, "puzzles": {"arithmetic": {"examples": 3, "traces": 3}}, **tables}
    raw |= {name: {"puzzles": ["arithmetic"], **tables.get(name, {})} for name in chain if name.split("-")[0] in ("rl", "reject")}
    return parse({**raw, "eval": {"puzzles": ["arithmetic"]}}, "x")


def test_a_stage_acts_where_the_one_before_did_unless_it_says_otherwise() -> None:
    chain = ["sft", "rl", "reject", "sft-restart", "rl-all", "rl-bare"]
    found = recipe(
        chain, sft={"environment": "calculator"}, **{"sft-restart": {"start": "pretrain", "data": ["reject"], "examples": False}},
        **{"rl-all": {"environment": "python"}, "rl-bare": {"environment": "none"}},
    )  # fmt: skip
    assert [found.environment(name) for name in ("pretrain", *chain)] == ["", *["calculator"] * 4, "python", ""]
    check_chain(found)
    assert all(recipe(["sft", "rl"]).environment(name) == "" for name in ("sft", "rl"))


@pytest.mark.parametrize(
    "tables, says",
    [
        ({"rl": {"plain": True}}, "rl.plain is text without chat tokens.*rl.environment = 'none'"),
        ({"puzzles": {"needle": {"examples": 2}}}, "puzzle 'needle' writes no worked episodes"),
        ({"sft": {"environment": f"{__name__}:Guess"}}, "no worked calls for environment"),
        ({"sft": {"environment": "calculater"}}, "no environment 'calculater'; did you mean"),
    ],
)
def test_what_cannot_be_played_is_said_before_anything_runs(tables: dict[str, Any], says: str) -> None:
    merged = {"sft": {"environment": "calculator"}, **tables}
    with pytest.raises(BadInput, match=says):
        check_chain(recipe(["sft", "rl"], **merged))


def test_puzzle_chats_are_episodes_where_the_stage_has_an_environment(tokenizer: Tokenizer) -> None:
    tables = {"arithmetic": Puzzle(examples=20, dials=DIALS["arithmetic"])}
    plain, found = (list(sft.puzzle_chats(tables, 1, environment)) for environment in ("", "calculator"))
    asked = [chat.messages[0]["content"] for chat in plain]
    assert [chat.messages[0]["content"].removeprefix(f"{Calculator.hint}\n") for chat in found] == asked  # the same problems
    samples = chats.gather(found, tokenizer, ["assistant"], 1000)
    assert len(samples.lengths) == len(samples.names) == 20
    assert not len(chats.gather(found, tokenizer, ["user"], 1000).names)


# ---- evaluation, rejection, distillation ------------------------------------------------------------------------------


@pytest.fixture
def believing(tokenizer: Tokenizer, monkeypatch: Any) -> Any:
    """An engine of which every other episode asks the calculator and is right; the others answer 0 at once."""
    chat = worked_chat("arithmetic")
    (sample,) = documents(chat, tokenizer, ["assistant"])
    said = sample.streams["ce"] > 0
    starts = np.flatnonzero(np.diff(np.concatenate([[0], said.astype(int), [0]])))
    call, answer = (sample.tokens[a:b].tolist() for a, b in zip(starts[::2], starts[1::2], strict=True))
    wrong = [*tokenizer.encode("no"), tokenizer.unthink, *tokenizer.encode("0"), tokenizer.end]
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, eos_token_id=tokenizer.end)
    now: list[list[int]] = []

    class Forced(Engine):
        def generate(self, prompts: Any, sampling: Any = None) -> Any:
            first = all(len(p) <= shortest for p in prompts)
            now[:] = [call if i % 2 == 0 else wrong for i in range(len(prompts))] if first else [answer] * len(prompts)
            return super().generate(prompts, sampling)

    shortest = len(tokenizer.prompt_ids(Calculator().reset(problem("arithmetic"))))

    going: list[int] = []  # the requests under way, by their places in `now`

    def draw(adjusted: Any, own: torch.Tensor, settings: Any, seeds: Any, positions: Any) -> Any:
        if all(p == 0 for p in positions):
            going[:] = range(len(now))
        tokens = torch.tensor([now[i][p] for i, p in zip(going, positions, strict=True)])
        going[:] = [i for i, p in zip(going, positions, strict=True) if p + 1 < len(now[i])]
        return tokens, own.gather(1, tokens[:, None])[:, 0] - own.logsumexp(-1)

    monkeypatch.setattr("pascaline.engine.engine.draw", draw)
    return Forced(model, tokenizer)


def test_the_evaluation_plays_and_counts_what_the_model_said(believing: Engine) -> None:
    sampling = Sampling(1.0, 1.0, 200, 4, seed=1)
    part = evaluation._protocol(believing, [problem("arithmetic")], sampling, evaluation.How(acting="calculator"))
    assert part["accuracy"] == 0.5 and part["calls"] == 0.5 and part["truncated"] == 0
    (episodes,) = play(believing, Calculator, [problem("arithmetic")], sampling)
    assert part["mean_tokens"] == np.mean([len(e.token_ids) for e in episodes])
    assert "<result>" in part["examples"][0]["thought"] and part["examples"][0]["verdict"] == "right"
    judge = SimpleNamespace(scores=lambda chats: [len(ids) for ids in chats], model=believing.model)
    votes = evaluation._votes(believing, lambda: judge, [problem("arithmetic")], sampling, evaluation.How(acting="calculator"), None)
    assert votes["best_of"][-1] == 1.0
    assert votes["worth"] == [sum(len(s.ids) for s in episodes[0].segments)]  # a reward model reads the whole transcript


def test_the_report_has_a_column_of_calls_where_some_were_made() -> None:
    row = {"model": "rl", "puzzle": "arithmetic", "temperature": 0.6, "samples": 4, "accuracy": 0.5, "n": 8, "mean_tokens": 9}
    with_calls, without = {"protocols": [row | {"calls": 1.25}, row]}, {"protocols": [row]}
    assert "calls" in table_text(with_calls) and "1.25" in table_text(with_calls) and "calls" not in table_text(without)
    assert "<th>calls</th>" in report_html(with_calls, {}) and "<th>calls</th>" not in report_html(without, {})


def test_accepted_episodes_are_learnt_again_as_the_same_tokens(
    believing: Engine, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(reject, "_models", lambda *_: (believing, None))
    monkeypatch.setattr(reject, "drawn", lambda *_: [problem("arithmetic")])
    found = recipe(["sft", "reject"], sft={"environment": "calculator"}, reject={"prompts": 1, "samples": 4, "max_tokens": 200})
    run = Run(found, tmp_path, torch.device("cpu"), torch.float32, quiet=True)
    reject.reject(run, "reject")
    folder = run.folder("reject")
    (episodes,) = play(believing, Calculator, [problem("arithmetic")], Sampling(1.0, 1.0, 200, 4, seed=1))
    (row,) = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "user", "assistant"] and row["stops"] == ["</tool>"]
    (chat,) = chats.read(folder / "chats.jsonl")
    assert chat.messages == worked_chat("arithmetic").messages
    (sample,) = documents(chat, tokenizer, ["assistant"])
    assert sample.tokens.tolist() == [t for s in episodes[0].segments for t in s.ids]
    assert sample.streams["ce"].sum() == len(episodes[0].token_ids)
    told = json.loads((folder / "reject.json").read_text())
    assert told["exact"] == told["kept"] == 1 and told["answers"]["right"] == told["answers"]["wrong"] == 2
    (pair,) = pairs.read(folder / "pairs.jsonl")
    both = pairs.sample(pair, tokenizer, "sum")
    one, other = pairs.documents([both])
    assert [one.tolist(), other.tolist()] == [[t for s in e.segments for t in s.ids] for e in episodes[:2]]
    weights = both.streams["pair"]
    assert (weights > 0).sum() == len(episodes[0].token_ids) and (weights < 0).sum() == len(episodes[1].token_ids)
    mean = pairs.sample(pair, tokenizer, "mean").streams["pair"]
    assert mean[mean > 0].sum() == pytest.approx(1) and mean[mean < 0].sum() == pytest.approx(-1)
    last = np.flatnonzero(pairs.sample(pair, tokenizer, "last").streams["score"])
    assert last.tolist() == [len(one) - 1, len(one) + len(other) - 1]


def test_a_teacher_scores_what_the_student_said_and_nothing_else(believing: Engine, tokenizer: Tokenizer, tmp_path: Path) -> None:
    teacher = tiny_model(5, vocab_size=tokenizer.vocab_size, max_position_embeddings=512, eos_token_id=tokenizer.end)
    teacher.save(tmp_path)
    stage = Distil(teacher="", puzzles=["arithmetic"], prompts=1, samples=2, max_tokens=200)
    source = distil.Taught(believing, stage, {"arithmetic": Puzzle()}, 1, Reference(believing.model, tmp_path, tmp_path, 0, 0))
    source.acting = "calculator"
    source.problems = lambda step: [problem("arithmetic")]  # type: ignore[method-assign]
    (batch,) = source.step(0)
    (episodes,) = play(believing, Calculator, [problem("arithmetic")], Sampling(1.0, 1.0, 200, 2, seed=1))
    said = batch.streams["rl"] > 0
    assert int(said.sum()) == sum(len(e.token_ids) for e in episodes)
    assert not batch.streams["advantage"][~said].any() and batch.streams["advantage"][said].abs().min() > 0
    tokens = torch.tensor([[t for s in episodes[0].segments for t in s.ids]])
    with torch.no_grad():
        logprob = teacher(tokens)[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    mask = torch.tensor(np.concatenate([np.full(len(s.ids), s.logprobs is not None) for s in episodes[0].segments])[1:])
    expected = logprob[mask] - torch.tensor(episodes[0].logprobs)
    row, start = next((r, s) for r in range(len(batch.tokens)) for s in range(batch.tokens.shape[1])
                      if batch.tokens[r, s : s + tokens.shape[1]].tolist() == tokens[0].tolist())  # fmt: skip
    found = batch.streams["advantage"][row, start + 1 : start + tokens.shape[1]][mask]
    assert torch.allclose(found, expected, atol=1e-4) and source.facts["calls"] == 0.5


def test_stops_that_are_no_list_of_texts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}], "stops": 3}) + "\n")
    with pytest.raises(BadInput, match=r"chats\.jsonl:1: stops"):
        chats.read(path)
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}] * 2, "stops": []}) + "\n")
    with pytest.raises(BadInput, match="in alternation"):
        documents(chats.read(path)[0], train(TEXTS, 400), ["assistant"])


def test_the_recipe_of_a_chain_with_tools_loads(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'chain = ["sft", "rl"]\n[puzzles.arithmetic]\nexamples = 2\n[sft]\nenvironment = "calculator"\n[rl]\npuzzles = ["arithmetic"]\n'
    )
    found = load(path)
    assert found.environment("rl") == "calculator" and found.rl.environment == ""
