"""Episodes: turns of the model and of its environment, as token ids that are never decoded and encoded again.

A transcript is a list of segments, each sampled or given. The engine continues from those very ids, so that its cache holds most of them
already, and they go to the loss as they are; only what the environment says is encoded, behind what was sampled (law 4; trl 5224, verl
6719). A thought of an earlier turn stays in the transcript, for the model has read it (verl 6854), even where the chat template would
leave it out. All episodes of a step are played side by side: one call of the engine for each turn.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pascaline.data.puzzles import Problem, Verdict
from pascaline.data.turns import readable, reply_ids
from pascaline.engine import Engine, Output, Sampling
from pascaline.errors import BadInput
from pascaline.post import verifiers
from pascaline.post.environments.base import TURNS, Environment, opening
from pascaline.post.verifiers import Judged
from pascaline.post.verifiers.base import RIGHT
from pascaline.post.verifiers.sandbox import run_many


@dataclass(frozen=True)
class Segment:
    """Token ids that follow each other; logprobs: the engine's, of what the model said, None for what it was given."""

    ids: list[int]
    logprobs: list[float] | None = None


@dataclass
class Episode(Output):
    """An answer of several turns. token_ids and logprobs: all that the model said; reasoning and text: of the last turn; segments: the
    whole transcript, the prompt first; prompt and messages: the same as text, the model's turns and the environment's. finish_reason:
    "length" also for one that used up its turns. verdict: where the environment has judged it itself, or broke (`trouble`)."""

    segments: list[Segment] = field(default_factory=list)
    turns: int = 0
    prompt: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    verdict: Verdict | None = None
    trouble: str = ""


def transcript(prompt: list[int], output: Output) -> list[Segment]:
    """The segments of an answer, of one turn or of several; the prompt is that of one turn."""
    return output.segments if isinstance(output, Episode) else [Segment(prompt), Segment(output.token_ids, output.logprobs)]


def play(engine: Engine, make: Callable[[], Environment], problems: Sequence[Problem], sampling: Sampling) -> list[list[Output]]:
    """For each problem sampling.n episodes, each in an environment that `make` makes. sampling.max_tokens is for a whole episode, what it
    was given after the prompt included; every turn's seed follows from sampling.seed, the problem's place, the episode's and the turn,
    whoever else is still playing."""
    groups = [
        [_Player(engine, make(), problem, sampling, f"episode {sampling.seed} {g} {i}") for i in range(sampling.n)]
        for g, problem in enumerate(problems)
    ]
    players = [player for group in groups for player in group]
    while going := [player for player in players if not player.over]:
        outputs = engine.generate([player.ids for player in going], [player.sampling() for player in going])
        for player, (output,) in zip(going, outputs, strict=True):
            player.hear(output)
        run_many(_Player.act, [player for player in going if not player.over])
    return [[player.episode() for player in group] for group in groups]


def judge(problems: Sequence[Problem], episodes: Sequence[Sequence[Output]]) -> Judged:
    """Verdicts on the last turns: the environment's where it has given one, else the verifier's."""
    own = [[getattr(episode, "verdict", None) for episode in group] for group in episodes]
    settled = Output([], [], "error")  # asks no verifier
    rest = [[e if v is None else settled for e, v in zip(*pair, strict=True)] for pair in zip(episodes, own, strict=True)]
    judged = verifiers.judge(problems, rest)
    verdicts = [[a if b is None else b for a, b in zip(*pair, strict=True)] for pair in zip(judged.verdicts, own, strict=True)]
    broken = [episode.trouble for group in episodes for episode in group if isinstance(episode, Episode) and episode.trouble]
    return Judged(verdicts, judged.trouble or next(iter(broken), ""))


def whole(prompt: list[int], output: Output) -> list[int]:
    """All ids of an answer's transcript: a reward model, say, must read what the model read."""
    return [token for segment in transcript(prompt, output) for token in segment.ids]


def calls(outputs: Sequence[Sequence[Output]]) -> float:
    """How often the environment answered in an episode, on average."""
    return float(np.mean([len(getattr(output, "messages", [])) // 2 for group in outputs for output in group]))


def thoughts(output: Output) -> str:
    """All that stands before an answer, to be read: its thought, and of an episode the turns before, each part in a line of its own."""
    before = output.messages[:-1] if isinstance(output, Episode) else []
    lines = [part for m in before for part in (m.get("reasoning_content"), m["content"])]
    return "\n".join(part for part in (*lines, output.reasoning) if part)


class _Player:
    """An episode under way."""

    def __init__(self, engine: Engine, environment: Environment, problem: Problem, sampling: Sampling, seed: str):
        if engine.tokenizer is None:
            raise BadInput("an environment speaks in text; this engine has no tokenizer.")
        self.tokenizer, self.environment, self.problem, self.seed = engine.tokenizer, environment, problem, seed
        self.prompt, self.messages = opening(environment.reset(problem)), list[dict[str, Any]]()
        self.segments = [Segment(self.tokenizer.prompt_ids(self.prompt))]
        self.ids = list(self.segments[0].ids)
        self.limit = min(len(self.ids) + sampling.max_tokens, engine.model.config.max_position_embeddings)  # of the transcript
        self.settings = replace(sampling, n=1, stop=(*sampling.stop, *getattr(environment, "stop", ())))
        self.turn, self.most = 0, getattr(environment, "turns", TURNS)
        self.said, self.over, self.trouble = "", "", ""  # over: the finish reason, once there is one
        self.reasoning: str | None = None
        self.routes: np.ndarray | None = None
        self.verdict: Verdict | None = None

    def sampling(self) -> Sampling:
        """This turn's."""
        seed = random.Random(f"{self.seed} {self.turn}").getrandbits(48)
        return replace(self.settings, seed=seed, max_tokens=max(self.limit - len(self.ids), 1))

    def hear(self, output: Output) -> None:
        """What the model said in this turn; it is over if that was no answer."""
        self.turn += 1
        self.reasoning, said = self.tokenizer.thought(self.ids, output.token_ids)
        self.said = said or ""
        thought = {} if self.reasoning is None else {"reasoning_content": self.reasoning}
        self.messages.append({"role": "assistant", **thought, "content": self.said})
        self._add(Segment(output.token_ids, output.logprobs))
        self.routes = output.routes
        if output.finish_reason != "stop" or (self.reasoning is not None and not self.said):
            self.over = output.finish_reason

    def act(self) -> None:
        """What the environment says to it."""
        try:
            seen = self.environment.step(self.said)
            if seen.done:
                self.over, self.verdict = "stop", _verdict(self.environment, self.problem, self.said)
        except BadInput:  # of the recipe or the machine: no answer is at fault
            raise
        except Exception as error:  # of a user's environment
            self.over, self.verdict = "error", Verdict.UNJUDGED
            self.trouble = f"the environment raised {type(error).__name__}: {error}"
        if self.over:
            return
        given = reply_ids(self.tokenizer, seen.text, self.ids[-1])
        if self.turn >= self.most or len(self.ids) + len(given) >= self.limit:
            self.over = "length"
        else:
            self.messages.append({"role": "user", "content": readable(seen.text)})
            self._add(Segment(given))

    def _add(self, segment: Segment) -> None:
        self.segments.append(segment)
        self.ids = self.ids + segment.ids

    def episode(self) -> Episode:
        said = [(segment.ids, segment.logprobs) for segment in self.segments if segment.logprobs is not None]
        ids, logprobs = [t for part, _ in said for t in part], [p for _, part in said for p in part]
        told = (self.prompt, self.messages, self.verdict, self.trouble)
        return Episode(ids, logprobs, self.over, self.said, self.reasoning, [], self.segments, self.turn, *told, routes=self.routes)


def _verdict(environment: Environment, problem: Problem, answer: str) -> Verdict | None:
    """The environment's own, if it scores."""
    score = getattr(environment, "score", None)
    if score is None:
        return None
    found = score(problem, answer)
    if found is None or isinstance(found, Verdict):
        return found or Verdict.UNJUDGED
    return Verdict.RIGHT if found >= RIGHT else Verdict.WRONG
