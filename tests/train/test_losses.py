"""The loss against independent formulas: values, gradients, normalisation, and what must have no influence."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import relative_error, tiny_model

from pascaline.data.batch import Batch, Sample, collate
from pascaline.model.moe import Routing
from pascaline.train import losses
from pascaline.train.losses import Loss, compute, router_entropy, sequence_balance, token_logprobs, totals
from pascaline.train.policy import Policy


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the chunked head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 512])
@pytest.mark.parametrize("m", [1, 16, 17, 40])
def test_token_logprobs_are_cross_entropy(m, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    target = torch.randint(0, 61, (m,), generator=torch.Generator().manual_seed(1))
    slope = randn(m, seed=3)

    def run(function):
        hidden, weight = randn(m, 24).requires_grad_(), randn(61, 24, seed=2).requires_grad_()
        logprob = function(hidden, weight)
        (logprob * slope).sum().backward()
        return logprob.detach(), hidden.grad, weight.grad

    def z(h, w):
        logprob, log_z, _ = token_logprobs(h, w, target)
        return logprob + 0.3 * log_z.square()

    plain = {
        "logprob": lambda h, w: -F.cross_entropy(F.linear(h, w), target, reduction="none"),
        "z": lambda h, w: plain["logprob"](h, w) + 0.3 * F.linear(h, w).logsumexp(-1).square(),
    }
    for name, ours in {"logprob": lambda h, w: token_logprobs(h, w, target)[0], "z": z}.items():
        for one, other in zip(run(ours), run(plain[name]), strict=True):
            assert one.shape == other.shape and relative_error(one, other) < 1e-5


@pytest.mark.parametrize("chunk", [3, 512])
def test_entropy_is_that_of_the_distribution_and_has_no_gradient(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    hidden, weight = randn(10, 24).requires_grad_(), randn(61, 24, seed=2)
    logprob, _, entropy = token_logprobs(hidden, weight, torch.zeros(10, dtype=torch.long), with_entropy=True)
    expected = torch.distributions.Categorical(logits=F.linear(hidden, weight)).entropy()
    assert relative_error(entropy, expected) < 1e-5
    assert logprob.requires_grad and not entropy.requires_grad


def test_token_logprobs_in_bf16_are_float32_and_near():
    hidden, weight = randn(40, 24).bfloat16(), randn(61, 24, seed=2).bfloat16()
    target = torch.arange(40)
    logprob, _, entropy = token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), target, with_entropy=True)
    assert logprob.dtype == entropy.dtype == torch.float32
    logprob.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    (-F.cross_entropy(F.linear(*exact), target, reduction="sum")).backward()
    assert relative_error(hidden.grad.float(), exact[0].grad) < 2e-2 and relative_error(weight.grad.float(), exact[1].grad) < 2e-2


# ---- batches of random streams ---------------------------------------------------------------------------------------


def random_sample(length: int, seed: int, names=("ce",)) -> Sample:
    draw = np.random.default_rng(seed)
    streams = {}
    for name in names:
        weight = draw.integers(0, 2, length) * draw.uniform(0.5, 2, length)
        weight[-1] = 1.0
        streams[name] = weight.astype(np.float32)
    if "rl" in names:
        streams["advantage"] = draw.normal(size=length).astype(np.float32)
        streams["old_logprob"] = -draw.uniform(2, 7, length).astype(np.float32)
    if "kl" in names:
        streams["ref_logprob"] = -draw.uniform(2, 7, length).astype(np.float32)
    return Sample(draw.integers(3, 61, length), streams)


def random_rows(names=("ce",), rows: int = 4) -> list[list[Sample]]:
    """Rows of 24 with different documents and padding."""
    draw = np.random.default_rng(9)
    return [[random_sample(int(n), 10 * r + i, names) for i, n in enumerate(draw.integers(2, 8, 3))] for r in range(rows)]


ALL = ("ce", "rl", "kl")
RULE = Loss(policy=Policy(kl=0.3))


def gradients(model, micro_batches: list[Batch], rule: Loss = RULE):
    """Loss, gradients, logs and loads of one optimizer step over micro-batches, as the loop adds them up."""
    model.zero_grad(set_to_none=True)
    total = totals(micro_batches)
    value, logs, load = 0.0, {}, 0
    for batch in micro_batches:
        loss, parts, loads = compute(model, batch, total, rule)
        loss.backward()
        value += loss.item()
        logs = {name: logs.get(name, 0.0) + float(part.sum()) for name, part in parts.items()}
        load = load + loads
    return value, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, logs, load


def assert_same(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).abs().max() < tolerance * expected[name].abs().max() + 1e-8, name


def by_hand(model, rows: list[list[Sample]], rule: Loss) -> torch.Tensor:
    """The whole loss, document by document, from the model's plain logits and the papers' formulas."""
    sums = dict.fromkeys(ALL, torch.zeros(()))
    weights = dict.fromkeys(ALL, 0.0)
    for sample in (s for row in rows for s in row):
        logp = model(torch.from_numpy(sample.tokens)[None])[0].log_softmax(-1)
        for t in range(1, len(sample.tokens)):
            lp = logp[t - 1, sample.tokens[t]]
            s = {name: float(v[t]) for name, v in sample.streams.items()}
            if "ce" in s:
                sums["ce"] = sums["ce"] - s["ce"] * lp
            if "rl" in s:
                ratio = (lp - s["old_logprob"]).exp()
                clipped = ratio.clamp(1 - rule.policy.clip_low, 1 + rule.policy.clip_high)
                sums["rl"] = sums["rl"] + s["rl"] * torch.maximum(-s["advantage"] * ratio, -s["advantage"] * clipped)
            if "kl" in s:
                log_ratio = s["ref_logprob"] - lp
                sums["kl"] = sums["kl"] + s["kl"] * (log_ratio.exp() - 1 - log_ratio)
            for name in ALL:
                weights[name] += s.get(name, 0.0)
    scale = {"ce": 1.0, "rl": 1.0, "kl": rule.policy.kl}
    return torch.stack([scale[n] * sums[n] / weights[n] for n in ALL if weights[n]]).sum()


@pytest.mark.parametrize("names", [("ce",), ("rl",), ("rl", "kl"), ALL])
def test_the_whole_loss_is_the_formula_document_by_document(names):
    model = tiny_model()
    rows = random_rows(names)
    value, found, logs, _ = gradients(model, [collate(rows, 24, 2)])
    model.zero_grad(set_to_none=True)
    expected = by_hand(model, rows, RULE)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-4)
    assert_same(found, {n: p.grad for n, p in model.named_parameters()})
    assert sum(logs[name] for name in names) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("names", [("ce",), ("rl",), ALL])
@pytest.mark.parametrize("pieces", [2, 4])
def test_micro_batches_add_up(names, pieces):
    """Each micro-batch is divided by the weight of the whole step, not by its own."""
    model = tiny_model()
    rows = random_rows(names)
    value, expected, logs, load = gradients(model, [collate(rows, 24, 2)])
    size = len(rows) // pieces
    split = [collate(rows[i : i + size], 24, 2) for i in range(0, len(rows), size)]
    assert len({tuple(totals([b]).values()) for b in split}) > 1
    found_value, found, found_logs, found_load = gradients(model, split)
    assert found_value == pytest.approx(value, rel=1e-5)
    assert_same(found, expected)
    assert found_logs == pytest.approx(logs, rel=1e-4, abs=1e-7) and torch.equal(found_load, load)


def test_packing_does_not_change_the_loss():
    """One document a row, or all in one: the same gradient."""
    model = tiny_model()
    samples = [s for row in random_rows(ALL) for s in row]
    value, expected, *_ = gradients(model, [collate([samples], 120, 2)])
    found_value, found, *_ = gradients(model, [collate([[s] for s in samples], 24, 2)])
    assert found_value == pytest.approx(value, rel=1e-5)
    assert_same(found, expected)


def test_a_micro_batch_without_weight_adds_nothing():
    """Documents of one token, say: they happen."""
    model = tiny_model()
    rows = random_rows()
    expected_value, expected, *_ = gradients(model, [collate(rows, 24, 2)])
    empty = Sample(np.array([5, 6, 7]), {"ce": np.zeros(3, np.float32)})
    value, found, *_ = gradients(model, [collate(rows, 24, 2), collate([[empty]], 24, 2)])
    assert value == pytest.approx(expected_value, rel=1e-6)
    assert_same(found, expected, 1e-5)


def test_totals_are_exact_sums_over_all_micro_batches():
    rows = random_rows(ALL)
    found = totals(collate([row], 24, 2) for row in rows)
    for name in ALL:
        assert found[name] == pytest.approx(sum(float(s.streams[name][1:].astype(np.float64).sum()) for row in rows for s in row), rel=1e-6)
    assert found["tokens"] == sum(len(s.tokens) for row in rows for s in row)
    assert set(found) == {*losses.WEIGHTS, "tokens"}  # what is no weight is not counted


# ---- what must have no influence -------------------------------------------------------------------------------------


def test_padding_has_no_influence():
    model = tiny_model()
    rows = random_rows(ALL)
    value, expected, logs, _ = gradients(model, [collate(rows, 24, 2)])
    for pad, length in ((50, 24), (2, 40)):
        found_value, found, found_logs, _ = gradients(model, [collate(rows, length, pad)])
        assert found_value == pytest.approx(value, rel=1e-5) and found_logs == pytest.approx(logs, rel=1e-4, abs=1e-7)
        touched = {n: g for n, g in found.items() if "embed" not in n}
        assert_same(touched, {n: expected[n] for n in touched})
    assert not gradients(model, [collate(rows, 24, 2)])[1]["model.embed_tokens.weight"][2].any()  # the pad token learns nothing


@pytest.mark.parametrize("stream", ["advantage", "old_logprob", "ref_logprob", "token"])
def test_masked_targets_have_no_influence(stream):
    """Whatever stands at a token of zero weight: prompts, tool outputs, the last token of a masked document."""
    model = tiny_model()
    rows = random_rows(("rl", "kl"))
    for row in rows:
        for s in row:
            masked = np.arange(len(s.tokens)) < len(s.tokens) // 2
            s.streams["rl"][:], s.streams["kl"][:] = ~masked, ~masked
    before = gradients(model, [collate(rows, 24, 2)])
    for row in rows:
        for s in row:
            masked = s.streams["rl"] == 0
            if stream == "token":
                # The last token is the input of nothing that counts: mask it, and it may be anything.
                s.streams["rl"][-1] = s.streams["kl"][-1] = 0.0
            else:
                s.streams[stream][masked] += 1000.0
    if stream == "token":
        before = gradients(model, [collate(rows, 24, 2)])
        for row in rows:
            for s in row:
                s.tokens[-1] = (s.tokens[-1] + 7) % 61
        after = gradients(model, [collate(rows, 24, 2)])
        assert after[0] == pytest.approx(before[0], rel=1e-5)
        return
    after = gradients(model, [collate(rows, 24, 2)])
    assert after[0] == before[0] and after[2] == before[2]
    assert all(torch.equal(after[1][n], before[1][n]) for n in after[1])


def test_weights_of_targets_do_matter():
    """The counterpart: the same change at a token that counts is seen."""
    model = tiny_model()
    rows = random_rows(("rl",))
    before = gradients(model, [collate(rows, 24, 2)])[0]
    rows[0][0].streams["advantage"][-1] += 1.0
    assert gradients(model, [collate(rows, 24, 2)])[0] != pytest.approx(before, rel=1e-4)


def test_the_first_token_of_a_document_is_never_a_target():
    """It would be predicted from another document."""
    model = tiny_model()
    rows = [[Sample(np.array([5, 6, 7]), {"ce": np.ones(3, np.float32)}), Sample(np.array([8, 9]), {"ce": np.ones(2, np.float32)})]]
    batch = collate(rows, 8, 2)
    assert totals([batch]) == {**dict.fromkeys(losses.WEIGHTS, 0.0), "ce": 3.0, "tokens": 5}
    assert gradients(model, [batch])[0] == pytest.approx(by_hand(model, rows, RULE).item(), rel=1e-4)


# ---- policy gradient -------------------------------------------------------------------------------------------------


def test_rl_logs():
    """entropy, clipped share and mismatch are means over the rl weight."""
    model = tiny_model()
    rows = random_rows(("rl",))
    _, _, logs, _ = gradients(model, [collate(rows, 24, 2)])
    weight = entropy = mismatch = 0.0
    with torch.no_grad():
        for s in (s for row in rows for s in row):
            logp = model(torch.from_numpy(s.tokens)[None])[0].log_softmax(-1)
            for t in range(1, len(s.tokens)):
                w = float(s.streams["rl"][t])
                weight += w
                entropy -= w * float((logp[t - 1].exp() * logp[t - 1]).sum())
                mismatch += w * abs(float(logp[t - 1, s.tokens[t]]) - float(s.streams["old_logprob"][t]))
    assert logs["entropy"] == pytest.approx(entropy / weight, rel=1e-4)
    assert logs["mismatch"] == pytest.approx(mismatch / weight, rel=1e-4)
    assert 0 < logs["clipped"] < 1


# ---- multi-token prediction ------------------------------------------------------------------------------------------


def mtp_by_hand(model, rows: list[list[Sample]], name: str = "ce") -> torch.Tensor:
    """Each document alone: depth k predicts token t + 1 + k from position t (arXiv 2412.19437 eq. 24), over the stream's weight in the
    step."""
    total = sum(float(s.streams[name][1:].sum()) for row in rows for s in row)
    depth = model.config.num_nextn_predict_layers
    sums = [torch.zeros(()) for _ in range(depth)]
    for s in (s for row in rows for s in row):
        tokens = torch.from_numpy(s.tokens)[None]
        hidden = model.hidden(tokens)[0]
        for k, (states, _) in enumerate(model.mtp_hidden(hidden, tokens), 1):
            logp = model.head(states)[0].log_softmax(-1)
            for t in range(len(s.tokens) - 1 - k):
                sums[k - 1] = sums[k - 1] - float(s.streams[name][t + 1 + k]) * logp[t, s.tokens[t + 1 + k]]
    return torch.stack(sums).mean() / total


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_loss_and_gradient_are_the_formula(depth):
    """Packed documents against each alone: no prediction crosses a border."""
    model = tiny_model(num_nextn_predict_layers=depth)
    rows = random_rows()
    rule = Loss(mtp=0.3)
    value, found, logs, load = gradients(model, [collate(rows, 24, 2)], rule)
    model.zero_grad(set_to_none=True)
    mtp = mtp_by_hand(model, rows)
    expected = by_hand(model, rows, rule) + 0.3 * mtp
    expected.backward()
    assert logs["mtp"] == pytest.approx(0.3 * mtp.item(), rel=1e-4) and value == pytest.approx(expected.item(), rel=1e-4)
    assert_same(found, {n: p.grad for n, p in model.named_parameters()})
    assert load.shape == (len(model.routers()), 8)


def test_mtp_weight_zero_leaves_the_modules_alone():
    model = tiny_model(num_nextn_predict_layers=1)
    _, found, logs, _ = gradients(model, [collate(random_rows(), 24, 2)], Loss())
    assert "mtp" not in logs and not any(name.startswith("model.layers.2.") for name in found)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [("rl",), ALL])
def test_mtp_apart_learns_the_sampled_tokens_and_leaves_the_rest_its_gradient(names, tied):
    model = tiny_model(num_nextn_predict_layers=2, tie_word_embeddings=tied)
    rows, packed = random_rows(names), [collate([row], 24, 2) for row in random_rows(names)]
    plain, expected, *_ = gradients(model, packed, Loss(policy=Policy(kl=0.3), balance=0.1))
    value, found, logs, load = gradients(model, packed, Loss(policy=Policy(kl=0.3), balance=0.1, mtp=0.3, mtp_apart=True))
    own = {name for name in found if name.startswith(("model.layers.2.", "model.layers.3."))}
    assert found.keys() - own == expected.keys() and load.shape == (len(model.routers()), 8)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    alone = gradients(model, packed, Loss(mtp=0.3, mtp_apart=True))[1]
    model.zero_grad(set_to_none=True)
    mtp = 0.3 * mtp_by_hand(model, rows, "rl")
    mtp.backward()
    assert logs["mtp"] == pytest.approx(mtp.item(), rel=1e-4) and value > plain
    assert_same({n: alone[n] for n in own}, {n: p.grad for n, p in model.named_parameters() if n in own})


def test_mtp_over_micro_batches():
    model = tiny_model(num_nextn_predict_layers=1)
    rows, rule = random_rows(), Loss(mtp=0.3)
    value, expected, *_ = gradients(model, [collate(rows, 24, 2)], rule)
    found_value, found, *_ = gradients(model, [collate([row], 24, 2) for row in rows], rule)
    assert found_value == pytest.approx(value, rel=1e-5)
    assert_same(found, expected)


# ---- balance ---------------------------------------------------------------------------------------------------------


def routing(rows: int, length: int, experts: int = 4, k: int = 2, seed: int = 0) -> Routing:
    logits = randn(rows * length, experts, seed=seed)
    return Routing(logits.requires_grad_(), logits.detach().topk(k).indices)


def test_the_sequence_balance_loss_is_the_papers():
    """Equations 17 to 20 of the V3 report, written out token by token."""
    found = routing(3, 7)
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, 5:] = False
    real[2] = False  # a row of padding alone
    scores = found.logits.detach().sigmoid().view(3, 7, 4)
    chosen = found.chosen.view(3, 7, 2)
    expected = 0.0
    for b in range(2):
        tokens = [t for t in range(7) if real[b, t]]
        for i in range(4):
            f = 4 / (2 * len(tokens)) * sum(i in chosen[b, t].tolist() for t in tokens)
            P = sum(float(scores[b, t, i] / scores[b, t].sum()) for t in tokens) / len(tokens)
            expected += f * P * len(tokens)
    loss = sequence_balance(found, real)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert found.logits.grad[:12].abs().sum() > 0 and not found.logits.grad[12:].any()


def test_an_even_choice_has_balance_loss_one_a_token_and_full_entropy():
    even = Routing(torch.zeros(8, 4), torch.tensor([[0, 1], [2, 3]]).repeat(4, 1))
    real = torch.ones(1, 8, dtype=torch.bool)
    assert sequence_balance(even, real).item() == pytest.approx(8.0)
    assert router_entropy(even, real).item() == pytest.approx(8 * math.log(4), rel=1e-6)
    one_sided = Routing(torch.tensor([[9.0, 9.0, -9.0, -9.0]]).repeat(8, 1), torch.tensor([[0, 1]]).repeat(8, 1))
    assert sequence_balance(one_sided, real).item() == pytest.approx(16.0, rel=1e-3)
    assert router_entropy(one_sided, real).item() == pytest.approx(8 * math.log(2), rel=1e-2)


def test_balance_and_z_do_not_depend_on_the_micro_batches():
    model = tiny_model()
    rows = random_rows()
    rule = Loss(balance=0.1, z=0.01)
    value, expected, logs, _ = gradients(model, [collate(rows, 24, 2)], rule)
    again, found, split, _ = gradients(model, [collate([row], 24, 2) for row in rows], rule)
    assert again == pytest.approx(value, rel=1e-5) and split.keys() == logs.keys() >= {"balance", "z", "router_entropy"}
    assert_same(found, expected)
    assert np.allclose(split["router_entropy"], logs["router_entropy"], rtol=1e-5)
    without = gradients(model, [collate(rows, 24, 2)], Loss())[0]
    assert value == pytest.approx(without + logs["balance"] + logs["z"], rel=1e-5)


def test_activation_checkpointing_changes_nothing():
    """Neither a gradient nor, as in peers that count in the forward, a load."""
    batch = collate(random_rows(), 24, 2)
    plain = gradients(tiny_model(num_nextn_predict_layers=1), [batch], Loss(mtp=0.3, balance=0.1))
    model = tiny_model(num_nextn_predict_layers=1)
    model.activation_checkpointing = True
    again = gradients(model, [batch], Loss(mtp=0.3, balance=0.1))
    assert again[0] == plain[0] and torch.equal(again[3], plain[3])
    assert all(torch.equal(again[1][n], plain[1][n]) for n in plain[1]) and again[1].keys() == plain[1].keys()
