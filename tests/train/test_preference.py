"""The losses of pairs against formulas written out here, through a model whose documents are computed one by one."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import relative_error, tiny_model

from pascaline.data.batch import Sample, collate
from pascaline.model.transformer import RewardHead
from pascaline.train.losses import Loss, compute, totals
from pascaline.train.preference import Preference, count, pair_loss, score_loss

PROMPTS, CHOSEN, REJECTED = (2, 3, 1, 4), (4, 1, 5, 2), (3, 6, 2, 2)


def pairs(stream: str, mean: bool = False, seed: int = 0) -> list[Sample]:
    """Random pairs with a random reference; weights as pascaline.data.pairs makes them."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        before = torch.randint(3, 61, (prompt,), generator=draw)
        documents = [torch.cat([before, torch.randint(3, 61, (n,), generator=draw)]) for n in (chosen, rejected)]
        weights = []
        for sign, document in zip((1.0, -1.0), documents, strict=True):
            own = torch.zeros(len(document))
            answer = len(document) - prompt
            own[prompt:] = sign / answer if mean else sign
            if stream == "score":
                own[:-1] = 0.0
            weights.append(own)
        streams = {stream: torch.cat(weights).numpy()}
        if stream == "pair":
            streams["ref_logprob"] = -3 * torch.rand(sum(map(len, documents)), generator=draw).numpy()
        out.append(Sample(torch.cat(documents).numpy(), streams, (0, len(documents[0]))))
    return out


def step(model, batches, rule):
    """Loss, gradients and logs of one optimizer step, added up over the micro-batches as the loop does."""
    model.zero_grad()
    total = totals(batches)
    value, logs = 0.0, {}
    for batch in batches:
        loss, told, _ = compute(model, batch, total, rule)
        loss.backward()
        value += loss.item()
        logs = {name: logs.get(name, 0.0) + float(told.get(name, torch.zeros(())).sum()) for name in {*logs, *told}}
    return value, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, logs


def answers(model, sample: Sample):
    """(tokens of the document, where the answer begins, its weights, its reference) of both documents, each alone."""
    border = sample.begins[1]
    for span in (slice(0, border), slice(border, len(sample.tokens))):
        tokens = torch.from_numpy(sample.tokens[span])
        weighs = sample.streams.get("pair", sample.streams.get("score"))[span] != 0
        yield tokens, int(weighs.argmax()), torch.from_numpy(sample.streams.get("ref_logprob", weighs.astype("f4"))[span])


def independent(model, sample: Sample, method: str, beta: float) -> torch.Tensor:
    sums, means = [], []
    for tokens, begin, reference in answers(model, sample):
        logprob = model(tokens[None])[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0][begin - 1 :] - reference[begin:]
        sums.append(logprob.sum())
        means.append(logprob.mean())
    if method == "sigmoid":
        return torch.log(1 + torch.exp(-beta * (sums[0] - sums[1])))
    if method == "norm":
        return torch.log(1 + torch.exp(-beta * (means[0] - means[1])))
    return (means[0] - means[1] - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize("method", ["sigmoid", "ipo", "norm"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_loss_and_its_gradients_are_the_papers(method: str, micro: int) -> None:
    """However the pairs fall into micro-batches: the mean over all pairs of the step."""
    model, beta = tiny_model(), 0.7
    samples = pairs("pair", mean=method != "sigmoid")
    expected = torch.stack([independent(model, s, method, beta) for s in samples]).mean()
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    layout = {1: [[samples]], 2: [[samples[:1]], [samples[1:]]], 4: [[samples[:2], samples[2:3]], [samples[3:]], [[]]]}[micro]
    batches = [collate(rows, 64, 0) for rows in layout]
    rule = Loss(preference=Preference("ipo" if method == "ipo" else "sigmoid", beta))
    value, found, logs = step(model, batches, rule)
    assert totals(batches)["pair"] == 4 and value == pytest.approx(expected.item(), rel=1e-5) == logs["pair"]
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) < 2e-4 or (found[name] - gradient).abs().max() < 1e-7, name


def test_the_score_is_read_at_the_answers_last_token() -> None:
    model = tiny_model()
    model.reward_head = RewardHead(24)
    model.reward_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    samples = pairs("score")
    expected = []
    for sample in samples:
        chosen, rejected = (model.hidden(tokens[None])[0][0, -1] @ model.reward_head.weight for tokens, *_ in answers(model, sample))
        expected.append(torch.log(1 + torch.exp(rejected - chosen)))
    torch.stack(expected).mean().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    value, found, logs = step(model, [collate([samples[:3]], 64, 0), collate([samples[3:], []], 64, 0)], Loss())
    assert value == pytest.approx(float(sum(expected).detach()) / 4, rel=1e-5)
    assert found.keys() == wanted.keys() and "reward_head.weight" in found and "lm_head.weight" not in found
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) < 2e-4 or (found[name] - gradient).abs().max() < 1e-7, name
    assert logs["accuracy"] == pytest.approx(sum(float(e) < math.log(2) for e in expected) / 4)


def test_a_new_head_makes_all_answers_equal() -> None:
    model = tiny_model()
    model.reward_head = RewardHead(24)
    value, found, logs = step(model, [collate([pairs("score")], 64, 0)], Loss())
    assert value == pytest.approx(math.log(2)) and logs["accuracy"] == 0.5 and found["reward_head.weight"].abs().max() > 0


def own_reference(model, samples: list[Sample]) -> list[Sample]:
    """The same pairs with the model itself as the reference."""
    out = []
    for sample in samples:
        parts = []
        for tokens, *_ in answers(model, sample):
            logprob = model(tokens[None])[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
            parts.append(torch.cat([torch.zeros(1), logprob.detach()]))
        out.append(Sample(sample.tokens, {**sample.streams, "ref_logprob": torch.cat(parts).numpy()}, sample.begins))
    return out


def test_a_policy_that_is_the_reference_has_learnt_nothing() -> None:
    model = tiny_model()
    batch = collate([own_reference(model, pairs("pair"))], 64, 0)
    for beta in (1e-6, 0.1, 5.0):
        value, _, logs = step(model, [batch], Loss(preference=Preference("sigmoid", beta)))
        assert value == pytest.approx(math.log(2), abs=1e-4) and logs["margin"] == pytest.approx(0, abs=1e-4)
    far = collate([pairs("pair")], 64, 0)
    assert step(model, [far], Loss(preference=Preference("sigmoid", 1e-9)))[0] == pytest.approx(math.log(2), abs=1e-6)
    assert step(model, [batch], Loss(preference=Preference("ipo", 0.5)))[0] == pytest.approx(1.0, abs=1e-4)  # (0 - 1 / (2 beta))^2


def test_what_is_logged_of_pairs() -> None:
    """Both answers fallen, the chosen one less: a positive margin and the known failure at once."""
    model = tiny_model()
    samples = own_reference(model, pairs("pair"))
    for shift, sample in zip((0.1, 0.1, 0.1, -0.1), samples, strict=True):
        border = sample.begins[1]
        sample.streams["ref_logprob"][:border] += shift
        sample.streams["ref_logprob"][border:] += 1.0
    _, _, logs = step(model, [collate([samples], 64, 0)], Loss(preference=Preference(beta=0.5)))
    chosen = [-s * n for s, n in zip((0.1, 0.1, 0.1, -0.1), CHOSEN, strict=True)]
    rejected = [-float(n) for n in REJECTED]
    assert logs["chosen_change"] == pytest.approx(sum(chosen) / 4, abs=1e-4)
    assert logs["rejected_change"] == pytest.approx(sum(rejected) / 4, abs=1e-4)
    assert logs["margin"] == pytest.approx(0.5 * (sum(chosen) - sum(rejected)) / 4, abs=1e-4)
    assert logs["accuracy"] == 1.0 and logs["both_fell"] == 0.75
    assert logs["chosen_logprob"] < 0 and logs["rejected_logprob"] < 0


def test_pairs_and_cross_entropy_share_a_batch() -> None:
    """Each part is what it is alone: tokens of other streams between the answers break no pair."""
    model, rule = tiny_model(), Loss(preference=Preference(beta=0.3))
    samples = pairs("pair")
    alone, *_ = step(model, [collate([samples], 64, 0)], rule)
    both = [Sample(s.tokens, {**s.streams, "ce": abs(s.streams["pair"] - 1) / 2}, s.begins) for s in samples]
    chat = Sample(samples[0].tokens, {"ce": abs(samples[0].streams["pair"])})
    _, _, logs = step(model, [collate([[both[0], chat, *both[1:]], [chat]], 64, 0)], rule)
    assert logs["pair"] == pytest.approx(alone, rel=1e-5) and logs["ce"] > 0


def test_gradients_by_finite_differences() -> None:
    change = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for function in (lambda c: pair_loss(c, Preference("sigmoid", 0.7)), lambda c: pair_loss(c, Preference("ipo", 0.7)), score_loss):
        assert torch.autograd.gradcheck(function, change)
    assert pair_loss(change, Preference(beta=0.7))[0].item() == pytest.approx(-F.logsigmoid(0.7 * (change[0, 0] - change[0, 1])).item())


def test_far_margins_stay_finite() -> None:
    far = torch.tensor([[-1e4, 1e4], [1e4, -1e4]], requires_grad=True)
    loss = pair_loss(far, Preference(beta=1.0))
    loss.sum().backward()
    assert loss.tolist() == [2e4, 0.0] and far.grad.isfinite().all()


def test_pairs_are_counted() -> None:
    assert count(torch.tensor([])) == count(torch.zeros(5)) == 0
    assert count(torch.tensor([0, 1, 0.5, 0, -1, 2, -3, -3, 0, 1, -1])) == 3
