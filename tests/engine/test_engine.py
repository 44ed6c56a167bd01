"""The engine: what it reports is what the trainer computes; answers depend on their seed, not on their neighbours."""

import numpy as np
import pytest
import torch
import transformers
from tiny import randomize_, tiny_model

from pascaline.data.batch import Sample, batches
from pascaline.engine import Engine, Sampling
from pascaline.engine.cache import batch_width, one_row_kernels
from pascaline.errors import BadInput
from pascaline.model.config import Rope
from pascaline.model.transformer import Model
from pascaline.tokenizer import Tokenizer, train
from pascaline.train import losses

transformers.utils.logging.disable_progress_bar()

YARN = Rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=4.0, mscale=0.8, mscale_all_dim=1.0)
KINDS = [dict(), dict(q_lora_rank=10, n_group=4, topk_group=2, num_experts_per_tok=3), dict(rope=YARN, tie_word_embeddings=True)]


def calm(model: Model) -> Model:
    """Flatter logits: answers of different lengths, not one token for ever."""
    with torch.no_grad():
        model.head_weight.mul_(0.3)
    return model


def prompts(count: int, longest: int = 17) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, 61, draw.integers(1, longest + 1)).tolist() for _ in range(count)]


def flat(groups):
    return [output for group in groups for output in group]


# ---- law 1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 0.9), (2.0, 1.0), (0.0, 1.0)])
def test_logprobs_are_the_trainers(kind, temperature, top_p):
    """Mixed lengths, rows ending at different times, fewer rows than requests; the trainer packs the same tokens its own way."""
    model = calm(tiny_model(**kind))
    engine = Engine(model, max_rows=4)
    asked = prompts(5)
    groups = engine.generate(asked, Sampling(temperature, top_p, max_tokens=40, n=3, seed=7))
    outputs = flat(groups)
    assert len(groups) == 5 and all(len(g) == 3 for g in groups)
    if temperature == 1.0:
        assert len({len(o.token_ids) for o in outputs}) > 3 and {o.finish_reason for o in outputs} == {"stop", "length"}
    samples = []
    for prompt, group in zip(asked, groups, strict=True):
        for output in group:
            assert len(output.logprobs) == len(output.token_ids)
            old = np.concatenate((np.zeros(len(prompt)), output.logprobs)).astype(np.float32)
            mask = np.concatenate((np.zeros(len(prompt)), np.ones(len(output.token_ids)))).astype(np.float32)
            samples.append(Sample(np.array(prompt + output.token_ids), {"rl": mask, "old_logprob": old, "advantage": mask}))
    worst = 0.0
    packed = batches(samples, 128, 2, pad=2)
    assert len(packed) > 1 and any(int(b.document_ids.max()) > 0 for b in packed)
    total = losses.totals(packed)
    model.train()
    mismatch = 0.0
    for batch in packed:
        hidden, _ = model.hidden(batch.tokens, batch.positions, batch.document_ids)
        logprob, *_ = losses.token_logprobs(hidden[:, :-1].flatten(0, 1), model.head_weight, batch.tokens[:, 1:].flatten())
        difference = (logprob.view(len(batch.tokens), -1) - batch.streams["old_logprob"][:, 1:]) * batch.streams["rl"][:, 1:]
        worst = max(worst, float(difference.detach().abs().max()))
        _, logs, _ = losses.compute(model, batch, total, losses.Loss())
        mismatch += float(logs["mismatch"])
        assert logs["clipped"] == 0  # the importance ratio of an on-policy step is 1
    assert worst < 1e-4 and mismatch < 1e-5


def test_the_trainers_loss_on_fresh_samples_is_minus_the_advantage():
    """Ratio 1: the surrogate is -A, whatever the tokens."""
    model = calm(tiny_model())
    (output,) = Engine(model).generate([[5, 6, 7]], Sampling(1.0, 1.0, max_tokens=20))[0]
    n = len(output.token_ids)
    ones, zeros = np.ones(n, np.float32), np.zeros(3, np.float32)
    streams = {"rl": np.append(zeros, ones), "advantage": np.append(zeros, 0.7 * ones),
               "old_logprob": np.append(zeros, np.array(output.logprobs, np.float32))}  # fmt: skip
    (batch,) = batches([Sample(np.array([5, 6, 7, *output.token_ids]), streams)], 32, 1, 2)
    loss, _, _ = losses.compute(model, batch, losses.totals([batch]), losses.Loss())
    assert loss.item() == pytest.approx(-0.7, abs=1e-5)


def test_long_answers_outgrow_every_buffer():
    """Past 8 blocks the block table grows."""
    model = calm(tiny_model(eos_token_id=None, max_position_embeddings=256))
    (output,) = Engine(model).generate([[5, 6, 7]], Sampling(1.0, 1.0, max_tokens=180))[0]
    assert len(output.token_ids) == 180
    with torch.no_grad():
        logp = model(torch.tensor([[5, 6, 7, *output.token_ids]]))[0].log_softmax(-1)
    expected = logp[2:-1].gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
    assert (expected - torch.tensor(output.logprobs)).abs().max() < 1e-4


# ---- batches, seeds --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return calm(tiny_model())


HOT = Sampling(1.0, 0.95, max_tokens=30, n=3, seed=3)


@pytest.fixture(scope="module")
def reference(model):
    return Engine(model).generate(prompts(6), HOT)


def ids(groups) -> list[list[int]]:
    return [o.token_ids for o in flat(groups)]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 5, 17, 18, 512])
def test_answers_do_not_depend_on_how_many_run_at_once(model, reference, max_rows):
    found = Engine(model, max_rows=max_rows).generate(prompts(6), HOT)
    assert ids(found) == ids(reference)
    for one, other in zip(flat(found), flat(reference), strict=True):
        assert one.finish_reason == other.finish_reason and one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_answers_do_not_depend_on_their_company(model, reference):
    asked = prompts(6)
    assert ids(Engine(model).generate(asked[:1], HOT)) == ids(reference[:1])
    assert ids(Engine(model, max_rows=2).generate(asked[:3] + prompts(9)[6:], HOT))[:9] == ids(reference[:3])


@pytest.mark.parametrize("tokens", [1, 2, 7, 20])
def test_prefill_in_pieces_changes_nothing(model, reference, tokens):
    assert ids(Engine(model, max_batch_tokens=tokens).generate(prompts(6), HOT)) == ids(reference)


def test_an_engine_can_be_used_again(model, reference):
    engine = Engine(model, max_rows=4)
    engine.generate([[9] * 40], Sampling(max_tokens=50, n=2))
    for _ in range(2):
        assert ids(engine.generate(prompts(6), HOT)) == ids(reference)


def test_seeds(model, reference):
    asked = prompts(6)
    again = Sampling(1.0, 0.95, max_tokens=30, n=3, seed=4)
    assert ids(Engine(model).generate(asked, again)) != ids(reference)
    for group in reference:
        assert len({tuple(o.token_ids) for o in group}) > 1  # the n answers are different draws
    few = Sampling(1.0, 0.95, max_tokens=30, n=1, seed=3)
    assert ids(Engine(model).generate(asked, few)) == [g[0].token_ids for g in reference]  # n only adds answers
    same = Engine(model).generate([asked[0]] * 3, HOT)
    assert len({tuple(o.token_ids) for o in flat(same)}) > 5  # the same prompt twice is not the same answer twice


def test_first_tokens_have_the_models_frequencies(model):
    """End to end: n answers to one prompt are draws from the model's distribution."""
    outputs = Engine(model).generate([[5, 6, 7]], Sampling(1.0, 1.0, max_tokens=1, n=4000, seed=1))[0]
    with torch.no_grad():
        p = model(torch.tensor([[5, 6, 7]]))[0, -1].softmax(-1).double().numpy()
    found = np.bincount([o.token_ids[0] for o in outputs], minlength=61)
    large = p * 4000 >= 5
    statistic = ((found - 4000 * p)[large] ** 2 / (4000 * p)[large]).sum()
    cells = int(large.sum())
    assert statistic < cells + 4 * (2 * cells) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_transformers_greedy(kind, tmp_path):
    # Another end token in each model, one that it says after a few tokens.
    model = tiny_model(seed=1, eos_token_id=17, **kind)
    with torch.no_grad():
        model.head_weight.mul_(3.0)  # clear winners: no draw between two implementations' roundings
    model.save(tmp_path)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    asked = prompts(5)
    found = Engine(tmp_path, tokenizer=small_tokenizer(), device="cpu", max_rows=3).generate(asked, Sampling(0.0, max_tokens=24))
    for prompt, (output,) in zip(asked, found, strict=True):
        tokens = torch.tensor([prompt])
        greedy = dict(do_sample=False, temperature=None, top_p=None)
        expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, **greedy)
        assert output.token_ids == expected[0, len(prompt) :].tolist()
    assert len({tuple(o.token_ids) for o in flat(found)}) > 1


def test_greedy_ignores_seed_and_n(model):
    (group,) = Engine(model).generate([[5, 6]], Sampling(0.0, max_tokens=10, n=3, seed=5))
    assert len({tuple(o.token_ids) for o in group}) == 1
    assert ids(Engine(model).generate([[5, 6]], Sampling(0.0, max_tokens=10, seed=6))) == [group[0].token_ids]


def test_new_weights_are_seen_at_once():
    """RL: the optimizer writes into the same tensors that the engine reads."""
    model = calm(tiny_model())
    engine = Engine(model)
    greedy = Sampling(0.0, max_tokens=12)
    before = ids(engine.generate([[5, 6, 7]], greedy))
    randomize_(model, 5)
    after = ids(engine.generate([[5, 6, 7]], greedy))
    assert after != before and after == ids(Engine(model).generate([[5, 6, 7]], greedy))


def test_generating_leaves_the_model_ready_to_train():
    model = calm(tiny_model()).train()
    Engine(model).generate([[5, 6, 7]], HOT)
    assert model.training and not torch.is_inference(model.lm_head.weight)
    model(torch.tensor([[5, 6]])).sum().backward()
    assert model.lm_head.weight.grad is not None


# ---- ends ------------------------------------------------------------------------------------------------------------


def scripted(rule: dict[int, int], vocab: int, **changes) -> Model:
    """A model whose next token depends on the last one alone: rule[last], or last itself."""
    model = tiny_model(vocab_size=vocab, hidden_size=vocab, num_hidden_layers=1, first_k_dense_replace=1, **changes)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(vocab))
        model.lm_head.weight.zero_()
        for last in range(vocab):
            model.lm_head.weight[rule.get(last, last), last] = 9.0
    return model


COUNT = {i: i + 1 for i in range(3, 30)}  # 3, 4, 5, ...
GREEDY = Sampling(0.0, max_tokens=8)


def test_length_and_stop():
    engine = Engine(scripted(COUNT, 40))
    ((output,),) = engine.generate([[3]], GREEDY)
    assert output.token_ids == [4, 5, 6, 7, 8, 9, 10, 11] and output.finish_reason == "length"
    ((output,),) = engine.generate([[3]], Sampling(0.0, max_tokens=8, stop_ids=(6, 35)))
    assert output.token_ids == [4, 5, 6] and output.finish_reason == "stop"
    ((output,),) = engine.generate([[3]], Sampling(0.0, max_tokens=3, stop_ids=(6,)))
    assert output.token_ids == [4, 5, 6] and output.finish_reason == "stop"  # both at once: it said what it had to say
    ((output,),) = engine.generate([[3]], Sampling(0.0, max_tokens=1))
    assert output.token_ids == [4] and output.finish_reason == "length"


@pytest.mark.parametrize("eos, expected", [(7, [4, 5, 6, 7]), ([9, 6], [4, 5, 6]), (None, [4, 5, 6, 7, 8, 9, 10, 11])])
def test_the_models_own_end_tokens(eos, expected):
    ((output,),) = Engine(scripted(COUNT, 40, eos_token_id=eos)).generate([[3]], GREEDY)
    assert output.token_ids == expected and output.finish_reason == ("stop" if eos else "length")


def test_rows_of_different_lengths_end_where_they_should():
    """Prompts 3..23 reach the end token 25 after 22..2 tokens; finished rows make room, in any number of rows."""
    for max_rows in (1, 2, 4, 7, 32):
        engine = Engine(scripted(COUNT, 40, eos_token_id=25), max_rows=max_rows)
        for (output,), start in zip(engine.generate([[i] for i in range(3, 24)], Sampling(0.0, max_tokens=15)), range(3, 24), strict=True):
            expected = list(range(start + 1, 26))[:15]
            assert output.token_ids == expected and output.finish_reason == ("stop" if expected[-1] == 25 else "length")


def test_an_answer_ends_with_the_context():
    engine = Engine(scripted(COUNT, 40, max_position_embeddings=10))
    ((output,),) = engine.generate([[3] * 6], GREEDY)
    assert len(output.token_ids) == 4 and output.finish_reason == "length"
    assert len(engine.generate([[3] * 9], GREEDY)[0][0].token_ids) == 1


@pytest.mark.parametrize("prompt", [[3] * 10, [3] * 11, [], [3, 40], [-1, 3]])
def test_a_prompt_that_cannot_be_answered_is_refused(prompt):
    engine = Engine(scripted(COUNT, 40, max_position_embeddings=10))
    with pytest.raises(BadInput):
        engine.generate([[3], prompt], GREEDY)
    assert len(engine.generate([[3]], GREEDY)[0][0].token_ids) == 8  # and the engine goes on


def test_text_needs_a_tokenizer():
    with pytest.raises(BadInput, match="tokenizer"):
        Engine(scripted(COUNT, 40)).generate(["hello"])


def test_an_engine_needs_a_row():
    with pytest.raises(BadInput, match="max_rows"):
        Engine(scripted(COUNT, 40), max_rows=0)


def test_no_prompts_no_answers(model):
    assert Engine(model).generate([]) == []


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_the_same_answer_piece_by_piece(model, seed):
    settings = Sampling(1.0, 0.95, max_tokens=90, seed=seed)
    ((expected,),) = Engine(model).generate([[5, 6, 7]], settings)
    assert list(Engine(model).stream([5, 6, 7], settings)) == expected.token_ids


def test_a_stream_gives_tokens_as_they_come():
    engine = Engine(scripted(COUNT, 40))
    stream = engine.stream([3], Sampling(0.0, max_tokens=8))
    assert next(stream) == 4 and engine.stats.generated == 1
    assert next(stream) == 5 and engine.stats.generated == 2
    stream.close()  # the reader went away
    assert ids(engine.generate([[3]], GREEDY)) == [[4, 5, 6, 7, 8, 9, 10, 11]]


def test_a_request_that_arrives_while_others_run():
    """What a server will do: it waits for a row, then runs like any other."""
    engine = Engine(scripted(COUNT, 40), max_rows=8)
    (first,) = engine.add([3], Sampling(0.0, max_tokens=6))
    assert engine.step() == [first]
    (second,) = engine.add([10], Sampling(0.0, max_tokens=3))
    assert engine.step() == [first, second]
    while engine.busy:
        engine.step()
    assert first.output.token_ids == [4, 5, 6, 7, 8, 9] and second.output.token_ids == [11, 12, 13]


def test_tokens_are_counted(model):
    engine = Engine(model)
    outputs = flat(engine.generate([[5, 6], [7, 8, 9]], Sampling(max_tokens=5, n=2)))
    assert engine.stats.generated == sum(len(o.token_ids) for o in outputs) and engine.stats.prefilled == 5  # a shared prompt once


# ---- thought and answer ----------------------------------------------------------------------------------------------


def small_tokenizer() -> Tokenizer:
    return train(["abcdef ghij", "abc def"], 270)


def says(text: list[int], last: int) -> dict[int, int]:
    return dict(zip([last, *text[:-1]], text, strict=True))


@pytest.mark.parametrize("closed, ended", [(True, True), (True, False), (False, True), (False, False)])
def test_thought_and_answer_are_told_apart(closed, ended):
    tokenizer = small_tokenizer()
    letter = {c: tokenizer.encode(c)[0] for c in "pqrs"}
    script = [letter["p"], letter["q"], *([tokenizer.unthink] if closed else []), letter["r"], letter["s"], tokenizer.end]
    model = scripted(says(script, tokenizer.think), tokenizer.vocab_size, eos_token_id=tokenizer.end)
    length = len(script) if ended else len(script) - 1
    ((output,),) = Engine(model, tokenizer).generate(["abc"], Sampling(0.0, max_tokens=length))
    assert output.token_ids == script[:length] and output.finish_reason == ("stop" if ended else "length")
    assert output.reasoning == ("pq" if closed else "pqrs") and output.text == ("rs" if closed else "")


def test_without_a_thought_all_is_text():
    tokenizer = small_tokenizer()
    letter = {c: tokenizer.encode(c)[0] for c in "pqrs"}
    script = [letter["p"], letter["q"], tokenizer.end]
    model = scripted(says(script, letter["s"]), tokenizer.vocab_size, eos_token_id=tokenizer.end)
    ((output,),) = Engine(model, tokenizer).generate([[letter["s"]]], GREEDY)
    assert output.text == "pq" and output.reasoning is None


def test_a_message_a_conversation_and_their_ids_are_the_same_prompt(tmp_path):
    tokenizer = small_tokenizer()
    model = calm(tiny_model(vocab_size=tokenizer.vocab_size))
    model.save(tmp_path)
    tokenizer.save(tmp_path)
    engine = Engine(str(tmp_path))
    asked = ["abc def", [{"role": "user", "content": "abc def"}], tokenizer.prompt_ids("abc def")]
    found = [engine.generate([prompt], HOT) for prompt in asked]
    assert ids(found[0]) == ids(found[1]) == ids(found[2]) == ids(Engine(model, tokenizer).generate(asked[:1], HOT))


@pytest.mark.parametrize("template, settings", [(None, {"eos_token": None}), ("{{ raise_exception('no') }}", {}), ("{% broken", {})])
def test_plain_text_needs_no_chat_template(template, settings):
    own = small_tokenizer()
    tokenizer = Tokenizer(own._parsing.to_str(), {**own.config, **settings}, template)
    model = calm(tiny_model(vocab_size=own.vocab_size))
    assert ids(Engine(model, tokenizer).generate([[5, 9]], HOT)) == ids(Engine(model).generate([[5, 9]], HOT))


def test_a_turn_ends_where_the_template_ends_it_though_the_config_names_another_token():
    own = small_tokenizer()
    letter = own.encode("p")[0]
    model = scripted(says([letter, own.user], own.think), own.vocab_size, eos_token_id=own.end)
    tokenizer = Tokenizer(own._parsing.to_str(), own.config, own.template.replace("+ eos_token", "+ '<|user|>'"))
    ((output,),) = Engine(model, tokenizer).generate(["abc"], GREEDY)
    assert output.token_ids == [letter, own.user] and output.finish_reason == "stop"


def test_a_folder_without_a_model_is_refused(tmp_path):
    small_tokenizer().save(tmp_path)
    with pytest.raises(BadInput, match=r"config\.json"):
        Engine(tmp_path)


def test_a_shrinking_batch_brings_few_shapes() -> None:
    widths = [batch_width(rows) for rows in range(1, 513)]
    assert all(rows <= width <= 512 for rows, width in enumerate(widths, 1))
    assert len(set(widths)) <= 21 and widths[0] == 1


def test_kernels_for_one_row_are_chosen_for_one_row_alone() -> None:
    before = torch.backends.mkldnn.enabled
    with pytest.raises(ZeroDivisionError), one_row_kernels(1):
        assert not torch.backends.mkldnn.enabled
        raise ZeroDivisionError
    assert torch.backends.mkldnn.enabled == before
    with one_row_kernels(2):
        assert torch.backends.mkldnn.enabled == before
