"""What a request may ask for: penalties, bias, stops, budgets of thinking, log-probabilities of alternatives and of the prompt."""

import math

import pytest
import torch
import transformers
from tiny import tiny_model

from pascaline.engine import Engine, Sampling
from pascaline.errors import BadInput
from pascaline.tokenizer import Tokenizer, train

PROMPT = [5, 6, 7, 5]


@pytest.fixture(scope="module")
def model():
    found = tiny_model()
    with torch.no_grad():
        found.head_weight.mul_(0.3)
    return found


def logits_after(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


def greedy_by(model, rule, count: int = 25) -> list[int]:
    """Greedy with the logits that a rule makes of the model's: rule(logits, said)."""
    said: list[int] = []
    for _ in range(count):
        said.append(int(rule(logits_after(model, PROMPT + said).clone(), said).argmax()))
    return said


def said_by(engine_or_model, **settings) -> list[int]:
    engine = engine_or_model if isinstance(engine_or_model, Engine) else Engine(engine_or_model)
    return engine.generate([PROMPT], Sampling(**{"temperature": 0.0, "max_tokens": 25, "ignore_eos": True} | settings))[0][0].token_ids


def test_presence_and_frequency(model):
    """OpenAI's formula: logit - presence * [said] - frequency * times said."""

    def rule(logits, said):
        for token in set(said):
            logits[token] -= 0.7 + 0.4 * said.count(token)
        return logits

    expected = greedy_by(model, rule)
    assert said_by(model, presence_penalty=0.7, frequency_penalty=0.4) == expected != said_by(model)


def test_repetition_is_transformers(model):
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = greedy_by(model, lambda logits, said: processor(torch.tensor([PROMPT + said]), logits[None])[0])
    assert said_by(model, repetition_penalty=1.3) == expected != said_by(model)


def test_logit_bias(model):
    assert set(said_by(model, logit_bias=((9, 100.0),))) == {9}
    assert 9 not in said_by(model, logit_bias=((9, -100.0),), temperature=1.0, top_p=1.0, max_tokens=200)


def test_min_tokens_keeps_every_end_away(model):
    for settings in (dict(), dict(stop_ids=(11, 12, 13))):
        outputs = Engine(model).generate([PROMPT] * 20, Sampling(1.0, 1.0, max_tokens=40, min_tokens=17, seed=3, **settings))
        lengths = [len(group[0].token_ids) for group in outputs]
        assert min(lengths) >= 18 and any(group[0].finish_reason == "stop" for group in outputs)


def test_ignore_eos(model):
    assert len(Engine(model).generate([PROMPT], Sampling(1.0, 1.0, max_tokens=90, ignore_eos=True))[0][0].token_ids) == 90


def test_logprobs_are_the_models_whatever_the_settings(model):
    settings = Sampling(0.7, 0.8, max_tokens=20, logit_bias=((9, 5.0),), frequency_penalty=1.0, top_logprobs=3, ignore_eos=True)
    output = Engine(model).generate([PROMPT], settings)[0][0]
    assert len(output.top_logprobs) == len(output.token_ids) == 20
    for i, (token, logprob, top) in enumerate(zip(output.token_ids, output.logprobs, output.top_logprobs, strict=True)):
        log_p = logits_after(model, PROMPT + output.token_ids[:i]).log_softmax(-1)
        assert logprob == pytest.approx(float(log_p[token]), abs=1e-4)
        best = log_p.topk(3)
        assert [t for t, _ in top] == best.indices.tolist() and [p for _, p in top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("budget", [3, 300])
@pytest.mark.parametrize("max_tokens, n", [(0, 1), (2, 1), (2, 3)])
def test_log_probabilities_of_the_prompt(model, budget, max_tokens, n):
    """In chunks or whole, warm or cold; nothing need be said (lm-eval's loglikelihood)."""
    engine, prompt = Engine(model, max_batch_tokens=budget), list(range(3, 50))
    for _ in range(2):
        group = engine.add(prompt, Sampling(0.0, max_tokens=max_tokens, prompt_logprobs=True, top_logprobs=2, n=n, ignore_eos=True))
        while engine.busy:
            engine.step()
        with torch.no_grad():
            log_p = model(torch.tensor([prompt]))[0].log_softmax(-1)
        expected = log_p[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        for request in group:
            assert request.prompt_logprobs[0] is None and request.prompt_top[0] == []
            assert request.prompt_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-4)
            assert [t for t, _ in request.prompt_top[5]] == log_p[4].topk(2).indices.tolist()
            assert request.finish_reason == "length" and len(request.token_ids) == max_tokens


# ---- text ------------------------------------------------------------------------------------------------------------


def talker(script: str, tokenizer: Tokenizer) -> Engine:
    """An engine that answers with the script's characters one after the other, by position; "^" is the end of the thought."""
    ids = [tokenizer.unthink if c == "^" else tokenizer.encode(c)[0] for c in script] + [tokenizer.end]
    prompt = tokenizer.prompt_ids("abc")
    model = tiny_model(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.end)
    head = model.hidden

    def hidden(tokens, positions=None, documents=None, cache=None):
        _, routings = head(tokens, positions, documents, cache)
        at = (positions - len(prompt) + 1).clamp(0, len(ids) - 1)
        return torch.nn.functional.one_hot(torch.tensor(ids)[at], tokenizer.vocab_size).float() * 30, routings

    model.hidden = hidden
    model.head = lambda h, cache: h
    return Engine(model, tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    return train(["abc"], 270)


def test_a_stop_string_ends_the_answer_but_not_the_thought(tokenizer):
    """Complaint 4: stop strings must not fire inside the reasoning."""
    output = talker("xSTOPy^abSTcSTOPdef", tokenizer).generate(["abc"], Sampling(0.0, max_tokens=40, stop=("STOP",)))[0][0]
    assert (output.reasoning, output.text, output.finish_reason) == ("xSTOPy", "abSTc", "stop")
    assert tokenizer.decode(output.token_ids).endswith("STOP")  # what was computed is all there


@pytest.mark.parametrize("stop, text", [(("e",), "abcd"), (("f", "bc"), "a"), (("zz", "defg"), "abcdef"), (("abc",), "")])
def test_the_first_stop_string_counts(tokenizer, stop, text):
    output = talker("^abcdef", tokenizer).generate(["abc"], Sampling(0.0, max_tokens=40, stop=stop))[0][0]
    assert output.text == text and output.finish_reason == "stop"


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thought_ends_when_its_budget_does(tokenizer, budget):
    engine = talker("abcdefgh" * 5, tokenizer)
    output = engine.generate(["abc"], Sampling(0.0, max_tokens=20, max_thinking_tokens=budget))[0][0]
    assert output.token_ids.index(tokenizer.unthink) == budget and len(output.reasoning) == budget and output.text
    assert math.isfinite(output.logprobs[budget]) and output.logprobs[budget] < -5  # the model's own: it would not have said it


def test_a_thought_that_ends_in_time_is_let_be(tokenizer):
    output = talker("ab^cd", tokenizer).generate(["abc"], Sampling(0.0, max_tokens=20, max_thinking_tokens=3))[0][0]
    assert (output.reasoning, output.text) == ("ab", "cd")


def test_an_answer_without_a_thought(tokenizer):
    engine = talker("abc", tokenizer)
    (request,) = engine.add("abc", Sampling(0.0, max_tokens=9, thinking=False))
    assert request.prompt == tokenizer.prompt_ids("abc", thinking=False)
    while engine.busy:
        engine.step()
    assert request.output.reasoning is None and request.output.text


@pytest.mark.parametrize("settings", [dict(stop=("x",)), dict(max_thinking_tokens=3)])
def test_words_need_a_tokenizer(model, settings):
    with pytest.raises(BadInput, match="tokenizer"):
        Engine(model).generate([PROMPT], Sampling(**settings))


@pytest.mark.parametrize("settings", [dict(stop_ids=(61,)), dict(logit_bias=((61, 1.0),))])
def test_tokens_that_the_vocabulary_has_not(model, settings):
    with pytest.raises(BadInput, match="vocabulary has 61"):
        Engine(model).add(PROMPT, Sampling(**settings))
