"""Attention to blocks: the plain form against attention token by token, the Triton kernel against the plain form."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from paged_cases import BLOCK, SHAPES, case
from tiny import relative_error

from pascaline.model.paged import attend_paged, attend_paged_plain, heads_of_entries, lacking

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def token_by_token(q, pool, tables, row, position, value_width, scale):
    """softmax(q K^T) V of each head of each token, from the entries one after the other."""
    K = heads_of_entries(pool, q.shape[-1], value_width)
    out = torch.zeros(*q.shape[:2], value_width)
    for i in range(len(q)):
        seen = [pool[tables[row[i], at // BLOCK], at % BLOCK].float() for at in range(position[i] + 1)]
        for head in range(q.shape[1]):
            k = head // (q.shape[1] // K)
            key = slice(k * q.shape[-1], (k + 1) * q.shape[-1])
            value = slice(0, value_width) if pool.shape[-1] == q.shape[-1] else slice(K * q.shape[-1] + k * value_width, None)
            scores = torch.stack([q[i, head].float() @ entry[key] * scale for entry in seen])
            out[i, head] = scores.softmax(0) @ torch.stack([entry[value][:value_width] for entry in seen])
    return out


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "V3"])
def test_the_plain_form_is_attention_token_by_token(name):
    """And what lies in blocks beyond a row's end does not get in, not even NaN."""
    arguments = case(name, torch.float32, tokens=3)
    found = attend_paged_plain(*arguments)
    assert found.isfinite().all() and relative_error(found, token_by_token(*arguments)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_kernel_the_plain_form_runs(dtype, monkeypatch):
    arguments = case("grouped", dtype)
    assert lacking(torch.device("cpu")) == "cpu has no kernel for it"
    found = attend_paged(*arguments)
    assert found.dtype == dtype and torch.equal(found, attend_paged_plain(*arguments))
    monkeypatch.setitem(sys.modules, "pascaline.model.paged_triton", None)
    lacking.cache_clear()
    assert "cannot be imported" in lacking(torch.device("cuda"))
    lacking.cache_clear()


# ---- Triton ----------------------------------------------------------------------------------------------------------------


@cache
def interpreted() -> dict[str, float]:
    """Triton decides at its import whether it interprets, so another process does all cases."""
    settings = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, (*sys.path, Path(__file__).parent.parent)))}
    asked = [sys.executable, str(Path(__file__).parent / "paged_cases.py")]
    run = subprocess.run(asked, env=settings, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_is_the_plain_form(name):
    """One pass, and cut into parts, of which some are empty."""
    pytest.importorskip("triton")
    errors = {label: error for label, error in interpreted().items() if label.startswith(f"{name}, ")}
    assert len(errors) >= 2
    for label, error in errors.items():
        assert error < (2e-3 if "float16" in label else 1e-5), label


def compiled(arch: int, memory: int, number: str, group: int, key: int, value: int, heads: int = 0):
    """The kernel as ptxas makes it for a GPU that need not be here, and its tiles."""
    import triton
    from triton.backends.compiler import GPUTarget

    from pascaline.model import paged_triton as kernels

    first, rest, latent = kernels.power_of_two(value), kernels.power_of_two(key - value), not heads
    tiles = kernels.choose_tiles(group, first + rest, (1 if latent else 2) * first + rest, int(number[2:]) // 8, memory)
    fixed = dict(H=group * (heads or 1), GROUP=group, C=key, R=value, WIDTH=heads * (key + value) or key, BLOCK=BLOCK, HEADS=tiles.heads,
                 POSITIONS=tiles.positions, FIRST=first, REST=rest, STAGES=tiles.stages)  # fmt: skip
    kinds = dict(q=f"*{number}", pool=f"*{number}", tables="*i32", rows="*i32", positions="*i32", out="*fp32", log_sums="*fp32",
                 scale="fp32", table_width="i32", **dict.fromkeys(fixed, "constexpr"))  # fmt: skip
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 5, 6)}
    source = triton.compiler.ASTSource(kernels._attend, {n: kinds[n] for n in kernels._attend.arg_names}, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=tiles.warps)), tiles


@pytest.mark.parametrize("arch, memory", [(89, 101_376), (90, 232_448)])  # L4 and H100
def test_the_kernel_compiles_into_the_memory_of_gpus(arch, memory, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    widest = {89: 16, 90: 64}[arch]
    for number, group, key, value, heads in (("bf16", 128, 576, 512, 0), ("fp16", 8, 128, 128, 8), ("fp32", 16, 576, 512, 0)):
        kernel, tiles = compiled(arch, memory, number, group, key, value, heads)
        assert kernel.metadata.shared <= memory and kernel.asm["cubin"]
        assert tiles.heads == (widest if group == 128 else 16)
    assert arch != 90 or "wgmma" in compiled(arch, memory, "bf16", 128, 576, 512)[0].asm["ptx"]


def test_tiles_are_as_wide_as_the_memory():
    kernels = pytest.importorskip("pascaline.model.paged_triton")
    chosen = [tuple(kernels.choose_tiles(128, 576, 576, 2, memory))[:2] for memory in (232_448, 166_912, 101_376, 49_152)]
    assert chosen == [(64, 64), (64, 32), (16, 32), (16, 16)]
    assert kernels.choose_tiles(8, 128, 256, 2, 166_912).heads == 16 and kernels.choose_tiles(128, 576, 576, 4, 232_448) == kernels.SMALL


def test_few_tokens_are_cut_into_parts_and_many_are_not():
    kernels = pytest.importorskip("pascaline.model.paged_triton")
    assert kernels.choose_parts(2, 32768, 132) == 66  # a token of V3 on an H100: every processor has something to do
    assert kernels.choose_parts(2, 1024, 132) == 16 and kernels.choose_parts(2, 16, 132) == 1
    assert kernels.choose_parts(256, 32768, 132) == 2 and kernels.choose_parts(1000, 32768, 132) == 1


# ---- on an accelerator --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_cuda_runs_the_kernel(name, dtype):
    from pascaline.model.paged_triton import TILES, attend_paged_triton

    assert not lacking(torch.device("cuda", torch.cuda.current_device()))
    arguments = case(name, dtype, "cuda", tokens=5)
    expected = attend_paged_plain(*arguments)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    found = attend_paged(*arguments)
    assert found.dtype == dtype and relative_error(found, expected) < tolerance
    for parts in (1, 2, 9):
        assert relative_error(attend_paged_triton(*arguments, parts=parts), expected) < tolerance
    if dtype != torch.float32:
        assert relative_error(attend_paged_triton(*arguments, tiles=TILES[-1]), expected) < tolerance
