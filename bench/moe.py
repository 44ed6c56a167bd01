"""Experts against a dense model with the same active parameters, so the same FLOPs a token: held-out loss at equal tokens, and in the time
that the dense one takes; each at the best of five learning rates, three seeds, 95 % intervals of paired differences. A byte-level model
on Python's standard library."""

import statistics
from collections.abc import Callable
from itertools import pairwise

from _common import alternate, finish
from _text import CONFIG, PAD, ROW, ROWS, Arm, Texts, command_line, interval, reached, texts, train, tune

from pascaline.data.loader import ListSamples, Loader
from pascaline.model.transformer import Model
from pascaline.tables import Stage
from pascaline.train import losses
from pascaline.train.loop import active_parameters
from pascaline.train.optim import Optimizer

STEPS, EVERY = 400, 20
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
WIDTH = (CONFIG.num_experts_per_tok + CONFIG.n_shared_experts) * CONFIG.moe_intermediate_size  # of the experts that a token meets
EXPERTS = CONFIG.model_copy(update={"intermediate_size": WIDTH})
DENSE = EXPERTS.model_copy(update={"first_k_dense_replace": CONFIG.num_hidden_layers})
ARMS = {"experts": Arm(lambda: Model(EXPERTS)), "dense": Arm(lambda: Model(DENSE))}


def stepper(arm: Arm, data: Texts) -> Callable[[], int]:
    """A function that does one optimizer step."""
    model = arm.model().init_(0)
    optimizer = Optimizer(model, Stage(), model.dtype)
    (batch,) = Loader(ListSamples(data[0]), ROW, ROWS, ROWS, PAD, 0).step(0)

    def step() -> int:
        loss, _, loads = losses.compute(model, batch, losses.totals([batch]), losses.Loss())
        loss.backward()
        optimizer.collect()
        optimizer.step(1e-3, optimizer.norm())
        for router, load in zip(model.routers(), loads, strict=True):
            router.balance(load, 1e-3)
        return 1

    return step


def at(curve: dict[int, float], step: float) -> float:
    """A curve's loss at a step, between two measurements in a straight line."""
    for (before, high), (after, low) in pairwise(sorted(curve.items())):
        if step <= after:
            return high + (low - high) * (step - before) / (after - before)
    return curve[max(curve)]


def main() -> None:
    parser = command_line(__doc__ or "", STEPS)
    parser.add_argument("--rounds", type=int, default=30, help="of one step each, to compare the seconds")
    options = parser.parse_args()
    data, steps = texts(), options.steps
    tuning = {kind: tune(arm, RATES, data, steps, every=EVERY) for kind, arm in ARMS.items()}
    rates = {kind: next(iter(found)) for kind, found in tuning.items()}
    curves = {kind: [train(arm, rates[kind], seed, data, steps, every=EVERY) for seed in options.seeds] for kind, arm in ARMS.items()}
    pairs = list(zip(curves["experts"], curves["dense"], strict=True))
    speed = alternate({kind: stepper(arm, data) for kind, arm in ARMS.items()}, options.rounds)
    seconds = {kind: 1 / statistics.median(values) for kind, values in speed.items()}
    slower = statistics.median(dense / experts for dense, experts in zip(speed["dense"], speed["experts"], strict=True))
    models = {kind: arm.model() for kind, arm in ARMS.items()}
    finish(
        {
            "equal_tokens": interval([experts[steps] - dense[steps] for experts, dense in pairs]),
            "equal_seconds": interval([at(experts, steps / slower) - dense[steps] for experts, dense in pairs]),
            "steps_ratio": interval([reached(experts, dense[steps]) / steps for experts, dense in pairs]),
            "step_time_ratio": slower,
            "seconds_a_step": seconds,
            "final": {kind: [round(curve[steps], 4) for curve in curves[kind]] for kind in ARMS},
            "parameters": {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()},
            "active_parameters": {kind: active_parameters(model) for kind, model in models.items()},
            "rates": rates,
            "tuning": {kind: {f"{rate:g}": round(loss, 4) for rate, loss in tuning[kind].items()} for kind in ARMS},
            "steps": steps,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
