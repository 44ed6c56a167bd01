"""The kernels against the modules' own forward, and their promise: a token's bits depend on that token alone."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pascaline.model import native
from tests.tiny import relative_error, tiny_model

BLOCK, LENGTH, BLOCKS = 16, 70, 64
SPARSE = dict(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3)
FAMILIES = {
    "latent": {}, "latent of a latent query": dict(q_lora_rank=20), "groups of experts": SPARSE,
    "nothing shared": dict(n_shared_experts=0, norm_topk_prob=False, routed_scaling_factor=2.5),
    "wide": dict(hidden_size=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, num_attention_heads=4,
                 moe_intermediate_size=48, intermediate_size=96),
    "llama": dict(model_type="llama", num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "qwen2": dict(model_type="qwen2"), "qwen3": dict(model_type="qwen3", num_key_value_heads=1, head_dim=20),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def kernels():
    reason = native.wait()
    if reason:
        pytest.skip(reason)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(params=FAMILIES)
def model(request, dtype):
    return tiny_model(**FAMILIES[request.param]).cast_(dtype)


class Rows:
    """A pool, and rows of it that grow."""

    def __init__(self, model, rows: int, seed: int = 0):
        config = model.config
        self.model = model
        self.pool = torch.full((config.num_hidden_layers, BLOCKS, BLOCK, config.cache_width), float("nan"), dtype=model.dtype)
        order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed))
        self.tables_rW = order[: rows * 5].view(rows, 5).to(torch.int32)  # 80 positions each, in blocks from anywhere

    def step(self, tokens, rows, positions) -> torch.Tensor:
        """Hidden states [n, D] of tokens, each the one at a position of a row."""
        row, position = torch.tensor(rows), torch.tensor(positions)
        slot = self.tables_rW[row, position // BLOCK].long() * BLOCK + position % BLOCK
        cache = SimpleNamespace(pool=self.pool, tables_rW=self.tables_rW, row_n=row.int(), position_n=position, slot_n=slot, routes=None)
        with torch.inference_mode():
            return self.model.hidden(torch.tensor([tokens]), position[None], cache=cache)[0][0]


def prompt(length: int = LENGTH, seed: int = 1) -> list[int]:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_step_computes_what_the_modules_do(model):
    tokens = prompt()
    found = Rows(model, 1).step(tokens, [0] * LENGTH, list(range(LENGTH)))
    with torch.inference_mode():
        plain = model.hidden(torch.tensor([tokens]))[0][0]
        exact = model.cast_(torch.float32).hidden(torch.tensor([tokens]))[0][0]
    if found.dtype == torch.float32:
        assert relative_error(found, plain) < 1e-5
    else:  # a token may go to another expert for its rounding: most do not, and they are as near as PyTorch's are
        off, off_plain = ((x.float() - exact).abs().amax(-1) / exact.abs().max() for x in (found, plain))
        assert off.median() < 1.2 * off_plain.median() + 1e-3


def test_a_token_does_not_depend_on_its_step(model):
    """The whole prompt at once, in chunks, one by one, beside other rows, in another order, on other pages: the same bits."""
    tokens, others = prompt(), [prompt(seed=s) for s in (2, 3)]
    whole = Rows(model, 1).step(tokens, [0] * LENGTH, list(range(LENGTH)))
    single = Rows(model, 1, seed=5)
    assert torch.equal(torch.cat([single.step([t], [0], [i]) for i, t in enumerate(tokens)]), whole)
    chunked = Rows(model, 3, seed=6)
    parts = []
    for first, last in ((0, 7), (7, 31), (31, 33), (33, LENGTH)):
        span = list(range(first, last))
        order = torch.randperm(3 * len(span), generator=torch.Generator().manual_seed(first)).tolist()
        every = [(text[i], row, i) for row, text in enumerate((others[0], tokens, others[1])) for i in span]
        found = chunked.step(*zip(*(every[at] for at in order), strict=True))
        back = [order.index(len(span) + i) for i in range(len(span))]
        parts.append(found[back])
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("threads", [2, 3])
def test_a_token_does_not_depend_on_the_threads(model, threads):
    tokens = prompt()
    before = torch.get_num_threads()
    one, many = [], []
    try:
        for count, out in ((1, one), (threads, many)):
            torch.set_num_threads(count)
            rows = Rows(model, 1)
            out += [rows.step(tokens[:-1], [0] * (LENGTH - 1), list(range(LENGTH - 1))), rows.step(tokens[-1:], [0], [LENGTH - 1])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("K", [7, 32, 100, 768])
@pytest.mark.parametrize("N", [1, 19, 130])
def test_a_product_is_its_rows(dtype, K, N):
    generator = torch.Generator().manual_seed(K * N)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((200, K), (N, K), (N,)))
    with torch.inference_mode():
        whole = native.product(x, weight, bias, cache=True)
        assert relative_error(whole.double(), F.linear(x.double(), weight.double(), bias.double())) < (
            1e-6 if dtype is torch.float32 else 4e-3
        )
        for n in (1, 2, 3, 5, 64, 129):
            assert torch.equal(native.product(x[:n], weight, bias, cache=True), whole[:n])
        assert torch.equal(native.product(x[77:78], weight, bias, cache=True), whole[77:78])


def test_a_norm_is_its_rows(dtype):
    x, weight = torch.randn(300, 100).to(dtype), torch.randn(100).to(dtype)
    with torch.inference_mode():
        whole = native.rms_norm(x, weight, 1e-6, cache=True)
        assert relative_error(whole.float(), F.rms_norm(x.float(), (100,), weight.float(), 1e-6)) < (
            1e-6 if dtype is torch.float32 else 4e-3
        )
        assert torch.equal(native.rms_norm(x[9:10], weight, 1e-6, cache=True), whole[9:10])


def test_new_weights_are_read_where_they_are(model):
    """Written to, replaced, cast: no step uses what was."""
    rows, tokens = Rows(model, 1), prompt(20)
    told = (tokens, [0] * 20, list(range(20)))
    before = rows.step(*told)
    with torch.no_grad():
        first = model.model.layers[0].self_attn.o_proj
        first.weight.mul_(0.5)
        written = rows.step(*told)
        first.weight = torch.nn.Parameter(first.weight * 2)
        replaced = rows.step(*told)
        first.weight.data = first.weight.data * 0.5
        swapped = rows.step(*told)
    assert torch.equal(before, replaced) and torch.equal(written, swapped) and not torch.equal(before, written)
    model.cast_(torch.float64)
    rows.pool = rows.pool.double()
    with pytest.raises(AttributeError):  # the modules' own forward: the stand-in lacks what that asks of a cache
        rows.step(*told)


def test_training_goes_its_own_way(model):
    layer = model.model.layers[0]
    x, turn = torch.randn(1, 3, model.config.hidden_size).to(model.dtype), torch.ones(1, 3, 1, 2, dtype=torch.complex64)
    assert native.blocks([layer], x, turn, SimpleNamespace()) is None  # with gradient
    with torch.no_grad():
        assert native.blocks([layer], x, turn, None) is None


def test_what_the_kernels_cannot_compute_they_leave(dtype):
    from pascaline.model.fp8_linear import to_fp8_

    model = tiny_model(hidden_size=128, intermediate_size=128).cast_(dtype)
    layer = model.model.layers[1]
    x, turn = torch.randn(1, 3, 128).to(dtype), torch.ones(1, 3, 1, 2, dtype=torch.complex64)
    with torch.no_grad():
        layer.mlp.experts.dispatch = lambda here, x, weight, index: x
        assert native.blocks([layer], x, turn, SimpleNamespace()) is None
        to_fp8_(model)
        assert native.blocks([model.model.layers[0]], x, turn, SimpleNamespace()) is None


def test_a_library_from_elsewhere_is_not_loaded(tmp_path, monkeypatch):
    from pascaline.model.native import build

    monkeypatch.setenv("PASCALINE_CACHE", str(tmp_path))
    folder = tmp_path / "native"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    monkeypatch.setattr(build, "_key", lambda *_: "planted")
    (folder / "native-planted.so").write_bytes(b"\x7fELF")
    (folder / "native-planted.so").chmod(0o666)
    with pytest.raises(build.Unbuilt, match="not this user's alone"):
        build.load()
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    folder.rename(tmp_path / "real")
    os.symlink(tmp_path / "real", folder)
    with pytest.raises(build.Unbuilt, match="not this user's alone"):
        build.load()


@pytest.mark.parametrize("compiler", ["missing", "false", "broken"])
def test_without_a_compiler_there_is_one_line(tmp_path, monkeypatch, compiler):
    from pascaline.model.native import build

    monkeypatch.setenv("PASCALINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler != "missing":
        script = "exit 1" if compiler == "false" else 'case $1 in --version) echo 1;; *) echo "x.cpp:1: error: no" >&2; exit 1;; esac'
        (tmp_path / "c++").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "c++").chmod(0o755)
    building = build.Building()
    building.thread.join()
    assert building.library is None and building.lacking and "\n" not in building.lacking
    assert not list(tmp_path.glob("cache/**/*.so"))
