"""Generated tokens per second against transformers' `generate` and llama.cpp with the same weights, each side in its best dtype; and how
far the engine's log-probabilities are from the trainer's in bf16."""

from collections.abc import Callable

import _llamacpp
import torch
from _common import CONFIG, DTYPES, alternate, arguments, best, finish, twins

from pascaline.engine import Engine, Sampling
from pascaline.model import native
from pascaline.train.losses import token_logprobs

PROMPT, NEW = 32, 64
BATCHES = (1, 32, 128)


def ours(dtype: torch.dtype, tokens: torch.Tensor) -> Callable[[], int]:
    model, _ = twins()
    engine = Engine(model.cast_(dtype).eval())
    prompts = tokens.tolist()

    def work() -> int:
        engine.flush()  # no prompt is known from the round before
        outs = engine.generate(prompts, Sampling(temperature=1.0, top_p=1.0, max_tokens=NEW))
        return sum(len(o.token_ids) for group in outs for o in group)

    return work


def theirs(dtype: torch.dtype, tokens: torch.Tensor) -> Callable[[], int]:
    _, make = twins()
    model = make(dtype).eval()

    def work() -> int:
        mask = torch.ones_like(tokens)
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=mask, do_sample=True, top_k=0, temperature=1.0, top_p=1.0, min_new_tokens=NEW, max_new_tokens=NEW
            )
        return (out.shape[1] - tokens.shape[1]) * len(tokens)

    return work


def mismatch() -> float:
    """Mean |engine's - trainer's| log-probability of sampled tokens in bf16."""
    model, _ = twins()
    model.cast_(torch.bfloat16).eval()
    prompts = torch.randint(0, CONFIG.vocab_size, (16, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    outs = Engine(model).generate(prompts, Sampling(temperature=1.0, top_p=1.0, max_tokens=NEW))
    ids = torch.tensor([prompt + group[0].token_ids for prompt, group in zip(prompts, outs, strict=True)])
    with torch.no_grad():
        hidden = model.hidden(ids)[0][:, PROMPT - 1 : -1].flatten(0, 1)
        trained, *_ = token_logprobs(hidden, model.head_weight, ids[:, PROMPT:].flatten())
    sampled = torch.tensor([p for group in outs for p in group[0].logprobs])
    return float((trained - sampled).abs().mean())


def main() -> None:
    options = arguments(__doc__ or "", rounds=5)
    skipped = _llamacpp.missing()
    files = {} if skipped else {name: _llamacpp.file(kind) for name, kind in (("float32", "f32"), ("bfloat16", "bf16"))}
    result: dict[str, dict[str, object]] = {"ratio": {}, "ratio_llamacpp": {}, "tokens_per_s": {}, "best": {}}
    for size in BATCHES:
        tokens = torch.randint(0, CONFIG.vocab_size, (size, PROMPT), generator=torch.Generator().manual_seed(0))
        makers = {"pascaline": ours, "transformers": theirs}
        sides = {f"{who} {name}": make(dtype, tokens) for name, dtype in DTYPES.items() for who, make in makers.items()}
        sides |= {f"llamacpp {name}": _llamacpp.decoder(path, tokens, NEW) for name, path in files.items()}
        rates = alternate(sides, options.rounds)
        found = {who: best(rates, who) for who in (*makers, *(["llamacpp"] if files else []))}
        result["tokens_per_s"][str(size)] = {who: rate for who, (_, rate) in found.items()}
        result["best"][str(size)] = {who: name for who, (name, _) in found.items()}
        result["ratio"][str(size)] = found["pascaline"][1] / found["transformers"][1]
        if files:
            result["ratio_llamacpp"][str(size)] = found["pascaline"][1] / found["llamacpp"][1]
    lacking = {"lacking": "; ".join(filter(None, [native.lacking(), skipped]))}
    finish({**result, "bf16_logprob_mismatch": mismatch(), **lacking}, options.json)


if __name__ == "__main__":
    main()
