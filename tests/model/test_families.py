"""llama, qwen2 and qwen3: transformers' models are the oracle, both ways, for logits, losses, gradients and files."""

import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_hf_parity import edit, files, tokens
from tiny import randomize_, relative_error
from transformers import AutoConfig, AutoModelForCausalLM

from pascaline.data.batch import Batch
from pascaline.engine import Engine, Sampling
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.model.config import ModelConfig, Rope
from pascaline.model.transformer import Model
from pascaline.tables import Optim
from pascaline.train import losses
from pascaline.train.optim import Optimizer
from pascaline.train.qkclip import QKClip

FAMILIES = ("llama", "qwen2", "qwen3")
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=4.0)
ROPES = [
    dict(rope_theta=10000.0),
    dict(rope_theta=500.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    dict(rope_theta=100.0, **YARN),
    dict(rope_theta=10000.0, **YARN, attention_factor=0.7, truncate=False),
    dict(rope_theta=500.0, **YARN, mscale=0.8, mscale_all_dim=1.0),
]  # fmt: skip
CASES = [(family, number) for family in FAMILIES for number in range(10)]


def shape(family: str, number: int) -> dict:
    """Configuration `number` of a covering design: tied or not, heads shared or not, a head_dim of its own, biases, every rope."""
    draw = random.Random(number)
    kv_heads = (1, 2, 4)[number % 3]
    heads = kv_heads * draw.choice([1, 2, 3])
    biases = {"llama": ("attention_bias", "mlp_bias"), "qwen2": (), "qwen3": ("attention_bias",)}[family]
    own = number % 2 == 1 and family != "qwen2"  # a head_dim that is not hidden / heads
    return dict(
        vocab_size=draw.randint(40, 70), hidden_size=heads * 8, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=draw.choice([24, 40]), max_position_embeddings=128,
        rms_norm_eps=draw.choice([1e-6, 1e-5]), tie_word_embeddings=number % 4 < 2,
        **({"head_dim": 12 if own else 8} if family != "qwen2" else {}),
        **{name: number // 2 % 2 == i for i, name in enumerate(biases)},
    )  # fmt: skip


def ours(family: str, number: int) -> Model:
    model = Model(ModelConfig(model_type=family, rope=Rope(**ROPES[number % len(ROPES)]), **shape(family, number)))
    randomize_(model, number)
    return model.eval()


def theirs(family: str, number: int):
    rope = {"rope_type": "default", **ROPES[number % len(ROPES)]}
    config = AutoConfig.for_model(family, rope_parameters=rope, **shape(family, number))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize_(model, number)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def load_theirs(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["unexpected_keys"] and not report["missing_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("family, number", CASES)
@torch.no_grad()
def test_their_folder_gives_their_logits_here(family, number, tmp_path):
    model = theirs(family, number)
    model.save_pretrained(tmp_path)
    batch = tokens(number, model.config.vocab_size)
    assert relative_error(hf.load(tmp_path)(batch), model(batch).logits) < 1e-4


@pytest.mark.parametrize("family, number", CASES)
@torch.no_grad()
def test_our_folder_gives_our_logits_there_and_comes_back_to_the_byte(family, number, tmp_path):
    model = ours(family, number)
    model.save(tmp_path / "a")
    batch = tokens(number, model.config.vocab_size)
    assert relative_error(load_theirs(tmp_path / "a")(batch).logits, model(batch)) < 1e-4
    again = hf.load(tmp_path / "a")
    assert again.config == model.config
    assert torch.equal(again(batch), model(batch))
    again.save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_covering_design_covers():
    for family in FAMILIES:
        shapes = [shape(family, number) for number in range(10)]
        assert {s["tie_word_embeddings"] for s in shapes} == {True, False}
        assert {s["num_attention_heads"] // s["num_key_value_heads"] for s in shapes} == {1, 2, 3}
        assert {s["num_key_value_heads"] for s in shapes} == {1, 2, 4}
        assert {s.get("attention_bias") for s in shapes} == ({None} if family == "qwen2" else {True, False})
    assert {s["mlp_bias"] for s in (shape("llama", n) for n in range(10))} == {True, False}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [1, 4])
def test_a_training_step_has_their_loss_and_gradients(family, number, tmp_path):
    model = theirs(family, number)
    model.save_pretrained(tmp_path)
    own = hf.load(tmp_path).train()
    batch = tokens(number, model.config.vocab_size)
    expected = F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    expected.backward()
    B, T = batch.shape
    streams = {"ce": torch.ones(B, T)}
    packed = Batch(batch, torch.arange(T).expand(B, T), torch.arange(B)[:, None].expand(B, T).contiguous(), streams)
    total = losses.totals([packed])
    loss, *_ = losses.compute(own, packed, total, losses.Loss())
    loss.backward()
    assert abs(float(loss.detach()) - float(expected.detach())) < 1e-5
    gradients = {n: p.grad for n, p in own.named_parameters()}
    disk = {name: part for n, g in gradients.items() for name, part in hf.on_disk(own.config, n, g)}
    named = {name: p.grad for name, p in model.named_parameters()}
    assert set(disk) == set(named)
    for name, gradient in named.items():
        assert relative_error(disk[name], gradient) < 1e-4, name


@pytest.mark.parametrize("family, number", [(f, n) for f in FAMILIES for n in (2, 3, 6)])
def test_the_engine_says_what_they_say_and_its_logprobs_are_the_trainers(family, number, tmp_path):
    model = ours(family, number)
    with torch.no_grad():
        model.head_weight.mul_(0.3)
    model.save(tmp_path)
    prompts = [[5, 9, 3], [7, 7, 2, 11, 30, 4, 8], [1]]
    answers = Engine(model, max_rows=2).generate(prompts, Sampling(temperature=0.0, max_tokens=20))
    peer = load_theirs(tmp_path)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        asked = torch.tensor([prompt])
        said = peer.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=20, do_sample=False, pad_token_id=2)
        assert answer.token_ids == said[0, len(prompt) :].tolist()
        whole = torch.tensor([prompt + answer.token_ids])
        logprob = model(whole)[0].detach().log_softmax(-1)
        expected = [float(logprob[len(prompt) - 1 + i, token]) for i, token in enumerate(answer.token_ids)]
        assert max(abs(a - b) for a, b in zip(answer.logprobs, expected, strict=True)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_a_row_do_not_see_each_other(family):
    model = ours(family, 2)
    a, b = tokens(1, model.config.vocab_size, 10)[:1], tokens(2, model.config.vocab_size, 7)[:1]
    row = torch.cat((a, b), 1)
    positions = torch.cat((torch.arange(10), torch.arange(7)))[None]
    documents = torch.tensor([[0] * 10 + [1] * 7])
    together = model(row, positions, documents)
    assert relative_error(together[:, :10], model(a)) < 1e-4 and relative_error(together[:, 10:], model(b)) < 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_learn(family, optimizer):
    """In bf16 with float32 masters, fresh weights: the loss on one batch falls to a fraction."""
    config = ModelConfig(model_type=family, **{**shape(family, 3), "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2})
    model = Model(config).init_(1).train()
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    optim = Optimizer(model, Optim(optimizer=optimizer, lr=1e-2), torch.bfloat16)
    batch, history = tokens(0, config.vocab_size), []
    for _ in range(40):
        loss = F.cross_entropy(model(batch)[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        optim.collect()
        optim.step(1e-2, optim.norm())
        history.append(float(loss.detach()))
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize("family, number", [("llama", 0), ("qwen2", 1)])
def test_qk_clip_brings_the_largest_logit_of_each_head_to_tau(family, number):
    model = ours(family, number).train()
    optim = Optimizer(model, Optim(), torch.float32)
    clipping = QKClip(model, optim, 0.5)
    batch = tokens(0, model.config.vocab_size)

    def largest() -> torch.Tensor:
        clipping.watch()
        model(batch)
        return torch.stack([layer.max_logit_H for layer in clipping.layers.values()])

    before = largest()
    assert (before[0] > 0.5).any()
    clipping.clip()
    after = largest()
    assert torch.allclose(after[0], before[0].clamp(max=0.5), atol=1e-5)  # of the first layer: its input has not changed


def test_qk_clip_says_that_it_does_nothing_under_norms():
    model = ours("qwen3", 0)
    with pytest.raises(BadInput, match="qwen3"):
        QKClip(model, Optimizer(model, Optim(), torch.float32), 100.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_on_disk(family, tmp_path):
    ours(family, 2).cast_(torch.bfloat16).save(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert load_theirs(tmp_path).config.model_type == family


@pytest.mark.parametrize(
    "family, changes, words",
    [
        ("llama", {"model_type": "mistral"}, ["'mistral'", "llama"]),
        ("llama", {"sliding_window": 64}, ["sliding_window"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["longrope"]),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, ["factor is missing"]),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}}, ["low_freq_factor"]),
        ("llama", {"num_key_value_heads": 5}, ["num_key_value_heads 5"]),
        ("llama", {"head_dim": 7}, ["head_dim is 7", "even"]),
        ("llama", {"kv_lora_rank": 8}, ["kv_lora_rank"]),
        ("llama", {"intermediate_size": ...}, ["intermediate_size"]),
        ("llama", {"rope_interleaved": True}, ["rope_interleaved"]),
        ("qwen2", {"use_mrope": True}, ["use_mrope"]),
        ("qwen2", {"use_sliding_window": True}, ["use_sliding_window"]),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, ["layer_types"]),
        ("qwen3", {"mlp_bias": True}, ["mlp_bias"]),
        ("qwen3", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
    ],
)
def test_what_is_another_model_is_refused_by_name(family, changes, words, tmp_path):
    ours(family, 4).save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(BadInput) as error:
        hf.load(tmp_path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_their_hub_folders_carry_is_understood(tmp_path):
    """Fields of published config.json files that change nothing: window sizes of windows that are off, no head_dim, null ids."""
    ours("qwen2", 0).save(tmp_path / "qwen2")
    edit(
        tmp_path / "qwen2",
        use_sliding_window=False,
        sliding_window=131072,
        max_window_layers=28,
        use_mrope=...,
        transformers_version="4.43",
    )
    ours("llama", 0).save(tmp_path / "llama")
    edit(tmp_path / "llama", rope_interleaved=False, is_llama_config=True, **{"transformers.js_config": {"dtype": "q4"}})
    edit(tmp_path / "llama", head_dim=..., pretraining_tp=1, bos_token_id=128000, eos_token_id=[128001, 128009], torch_dtype="bfloat16")
    assert hf.load(tmp_path / "qwen2").config.model_type == "qwen2"
    config = hf.load(tmp_path / "llama").config
    assert config.head_dim == 8 and config.eos_token_id == [128001, 128009]


def test_a_qwen3_folder_without_head_dim_has_theirs(tmp_path):
    """transformers reads 128 there, not hidden / heads."""
    config = ModelConfig(model_type="qwen3", **{**shape("qwen3", 0), "head_dim": 128})
    Model(config).init_(0).save(tmp_path)
    edit(tmp_path, head_dim=...)
    assert hf.load(tmp_path).config == config


def test_extending_a_dense_family_turns_its_queries_up(tmp_path):
    """The temperature of YaRN is in cos and sin there, as transformers has it; in the softmax scale it would be V3's."""
    model = ours("qwen2", 0)
    model.reposition_(model.config.extended(256)).save(tmp_path)
    batch = tokens(3, model.config.vocab_size, 200)
    with torch.no_grad():
        assert relative_error(load_theirs(tmp_path)(batch).logits, model(batch)) < 1e-4
    assert model.config.rope.amplitude > 1 and model.config.attention_scale == model.config.qk_head_dim**-0.5
    with pytest.raises(BadInput, match="already"):
        ours("llama", 1).config.extended(256)
