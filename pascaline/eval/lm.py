"""lm-eval's tasks on a model in this process: the harness asks, the same modules as everywhere answer. Needs the extra `eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pascaline.engine import Engine, Output, Sampling
from pascaline.errors import BadInput
from pascaline.eval.plan import Plan, measured

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise BadInput("lm-eval is not installed; pip install pascaline[eval].") from None

MAX_NEW_TOKENS = 256  # where a task does not say how many it wants, as in lm-eval
BATCH_TOKENS = 8192
GREEDY = ("do_sample", "temperature", "top_p", "until", "max_gen_toks", "max_new_tokens")  # what is understood of generation_kwargs


class EngineLM(TemplateLM):
    """lm-eval's interface to an engine: lm_eval.simple_evaluate(model=EngineLM(engine), tasks=[...]).

    Log-likelihoods are float32 log-softmax sums of the model's own forward pass, texts are the engine's. A thought is no part of a text,
    and one that is never closed leaves none (lm-eval #3438, lighteval #790). Token ids are those that lm-eval's Hugging Face model would
    make of the same strings.
    """

    def __init__(self, engine: Engine, seed: int = 0):
        super().__init__()
        if engine.tokenizer is None:
            raise BadInput("lm-eval asks in words; the model needs a tokenizer.")
        self.engine, self.own, self.seed = engine, engine.tokenizer, seed
        self.room = engine.model.config.max_position_embeddings
        self.chats = False

    @property
    def eot_token_id(self) -> int:
        return self.own.end

    @property
    def prefix_token_id(self) -> int:
        return (self.own.prefix or [self.own.end])[0]

    @property
    def tokenizer_name(self) -> str:
        return "pascaline"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        return self.own.encode(string, special=True)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self.chats = True
        return self.own.render(chat_history, add_generation_prompt=add_generation_prompt)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Any], **more: Any) -> list[tuple[float, bool]]:
        """(sum of the log-probabilities of the continuation's tokens, whether each is the most likely one) of each request; what is longer
        than the context loses its beginning."""
        rows = [(list(before) + list(said))[-(self.room + 1) :] for _, before, said in requests]
        found: dict[int, tuple[float, bool]] = {}
        waiting = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while waiting:
            width = len(rows[waiting[0]])
            now, waiting = waiting[: max(BATCH_TOKENS // width, 1)], waiting[max(BATCH_TOKENS // width, 1) :]
            # Rows are filled up behind their end, where a causal model does not look from before it.
            ids_BT = torch.tensor([rows[i][:-1] + [self.own.end] * (width - len(rows[i])) for i in now], device=self.engine.model.device)
            hidden_BTD, _ = self.engine.model.hidden(ids_BT)
            for i, hidden_TD in zip(now, hidden_BTD, strict=True):
                said = torch.tensor(rows[i][-len(requests[i][2]) :], device=hidden_TD.device)
                end = len(rows[i]) - 1
                log_p = self.engine.model.head(hidden_TD[end - len(said) : end]).float().log_softmax(-1)
                total = log_p.gather(1, said[:, None]).sum()
                found[i] = (float(total), bool((log_p.argmax(-1) == said).all()))
        return [found[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in windows of the context's length that each begin where the last one ended."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.room, 1)
            totals.append(sum(p for p, _ in self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to their first stop string; requests of the same settings are answered in one go."""
        said: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for places in alike.values():
            settings = requests[places[0]].args[1]
            stops, sampling = self._sampling(settings)
            ids = [self.tok_encode(requests[i].args[0])[-(self.room - sampling.max_tokens) :] for i in places]
            outputs = self.engine.generate(list(ids), sampling)
            said |= {i: _cut(group[0], stops) for i, group in zip(places, outputs, strict=True)}
        return [said[i] for i in range(len(requests))]

    def _sampling(self, settings: dict[str, Any]) -> tuple[list[str], Sampling]:
        """Stop strings, and how to sample. A stop string that stands in a thought stops nothing, so a chat is cut afterwards."""
        if unknown := [key for key in settings if key not in GREEDY]:
            raise BadInput(f"lm-eval's task asks for {unknown[0]} in its generation_kwargs; understood are {', '.join(GREEDY)}.")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = int(settings.get("max_gen_toks", settings.get("max_new_tokens", MAX_NEW_TOKENS)))
        if limit >= self.room:
            raise BadInput(f"lm-eval's task wants {limit} new tokens, but the model's context has {self.room}; lower max_gen_toks.")
        greedy = not settings.get("do_sample", False)
        temperature = 0.0 if greedy else float(settings.get("temperature", 1.0))
        early = () if self.chats else tuple(stops)
        return stops, Sampling(temperature, float(settings.get("top_p", 1.0)), limit, 1, seed=self.seed, stop=early)


def _cut(output: Output, stops: Sequence[str]) -> str:
    return output.text[: min((at for stop in stops if stop and (at := output.text.find(stop)) >= 0), default=None)]


def task(engine: Engine, plan: Plan, watch: Callable[[int, int], None]) -> dict[str, Any]:
    """`lm:TASK`: one of lm-eval's tasks by its name, or a task's .yaml file. Dials: num_fewshot, chat (use the chat template).

    The values are the documents' own of the task's first metric (acc, exact_match, ...); `metrics` has all of them.
    """
    file = Path(plan.argument)
    known = {"num_fewshot": None, "chat": False}
    if unknown := [key for key in plan.dials if key not in known]:
        raise BadInput(f"task {plan.task} has no dial '{unknown[0]}', only {', '.join(known)}.")
    dials = known | plan.dials
    manager = TaskManager(include_path=str(file.parent)) if file.suffix == ".yaml" else TaskManager()
    name = file.stem if file.suffix == ".yaml" else plan.argument
    if name not in manager.all_tasks:
        raise BadInput(f"lm-eval has no task '{name}'; lm_eval ls tasks lists them, and a path that ends in .yaml names one of your own.")
    watch(0, 1)
    told = lm_eval.simple_evaluate(
        model=EngineLM(engine, plan.seed), tasks=[name], task_manager=manager, num_fewshot=dials["num_fewshot"], limit=plan.problems,
        apply_chat_template=bool(dials["chat"]), system_instruction=plan.system or None, bootstrap_iters=0, log_samples=True,
        random_seed=plan.seed, fewshot_random_seed=plan.seed, verbosity="ERROR",
    )  # fmt: skip
    watch(1, 1)
    assert told is not None
    rows = [(sub, row) for sub, rows in told["samples"].items() for row in rows]
    metric = rows[0][1]["metrics"][0]
    values = [float(row[metric]) for _, row in rows]
    numbers = {sub: {k: v for k, v in found.items() if isinstance(v, int | float)} for sub, found in told["results"].items()}
    return measured(values, [f"{sub} {row['doc_hash']}" for sub, row in rows], metric=metric, metrics=numbers, versions=told["versions"])
