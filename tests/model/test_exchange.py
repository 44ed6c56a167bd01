"""Open weights in and out: the published layouts, the round trip, what stays behind, memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import open_weights
import pytest
import torch
import transformers
from commands import call, refused
from safetensors.torch import load_file, save_file
from tiny import randomize_, relative_error, tiny_config, tiny_model
from transformers import DeepseekV3ForCausalLM

from pascaline.model import exchange, fp8, hf
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model

transformers.utils.logging.disable_progress_bar()
KINDS = list(open_weights.LAYOUTS)
IN_FP8 = [kind for kind in KINDS if "quantization_config" in open_weights.LAYOUTS[kind]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """{kind: folder and what its tensors mean}. Not to be changed."""
    place = tmp_path_factory.mktemp("published")
    return {kind: (place / kind, open_weights.write(place / kind, kind)) for kind in KINDS}


def tokens(length: int = 48) -> torch.Tensor:
    return torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(0))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def theirs(folder: Path, meant: dict[str, torch.Tensor], place: Path) -> DeepseekV3ForCausalLM:
    """transformers' model of what the tensors mean, all in float32: for fp8 it needs accelerate, which the tests do not."""
    place.mkdir()
    raw = json.loads((folder / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if k not in ("quantization_config", "auto_map")}
    raw |= {"model_type": "deepseek_v3", "num_nextn_predict_layers": 0, "torch_dtype": "float32"}
    (place / "config.json").write_text(json.dumps(raw))
    main = {name: tensor.contiguous() for name, tensor in meant.items() if not name.startswith("model.layers.3.")}
    save_file(main, place / "model.safetensors", {"format": "pt"})
    model, report = DeepseekV3ForCausalLM.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


# ---- the published layouts


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_layout_gives_transformers_logits(kind, published, tmp_path):
    """Positions too: a converted model of torchtitan's (#1903, #1291) talked nonsense because its rotary pairs lay otherwise."""
    folder, meant = published[kind]
    model = hf.load(folder)
    assert relative_error(model(tokens()), theirs(folder, meant, tmp_path / "theirs")(tokens()).logits) < 1e-4
    assert model.config.num_nextn_predict_layers == ("MTP" not in kind and kind not in ("Moonlight", "Kimi-K2"))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_import_is_what_load_reads(kind, dtype, published, tmp_path):
    """Of the 16B layout too, on which torchtitan's converter ended with a KeyError (#1621)."""
    folder, meant = published[kind]
    told = exchange.import_folder(folder, tmp_path / "in", dtype, quiet=True)
    found = stored(tmp_path / "in")
    assert set(meant) <= set(found) == set(hf.layout(hf.read_config(tmp_path / "in")))
    half = dtype != "float32"
    for name, tensor in meant.items():
        wide = not half or name.endswith("e_score_correction_bias")
        assert torch.equal(found[name], tensor if wide else tensor.bfloat16()), name
    again = hf.load(tmp_path / "in", torch.bfloat16 if half else torch.float32)
    direct = hf.load(folder, torch.bfloat16 if half else torch.float32)
    assert torch.equal(again(tokens()), direct(tokens())) and again.config == direct.config
    assert told["dtype"] == json.loads((tmp_path / "in" / "config.json").read_text())["dtype"] == ("bfloat16" if half else "float32")
    assert (told["tensors"], told["files"]) == (len(found), 1)
    assert told["bytes"] == sum(tensor.nbytes for tensor in found.values())
    transformers.AutoConfig.from_pretrained(tmp_path / "in")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["V3", "R1 without copies"])
def test_mtp_modules_come_along(kind, published, tmp_path):
    folder, meant = published[kind]
    exchange.import_folder(folder, tmp_path / "in", "float32", quiet=True)
    found = stored(tmp_path / "in")
    for copy, own in hf.copies(hf.read_config(tmp_path / "in")).items():
        assert torch.equal(found[copy], found[own])
    model, again = hf.load(folder), hf.load(tmp_path / "in")
    for one, other in zip(model.mtp_hidden(*seen(model)), again.mtp_hidden(*seen(again)), strict=True):
        assert torch.equal(other[0], one[0])
    assert relative_error(model.model.layers[3].eh_proj.weight, meant["model.layers.3.eh_proj.weight"]) == 0


def seen(model):
    return model.hidden(tokens())[0], tokens()


@pytest.mark.parametrize("kind", IN_FP8)
def test_fp8_goes_in_and_out_to_the_bit(kind, published, tmp_path):
    folder, _ = published[kind]
    exchange.import_folder(folder, tmp_path / "in", "float32", quiet=True)
    exchange.export_folder(tmp_path / "in", tmp_path / "out", "fp8", quiet=True)
    before, after = stored(folder), stored(tmp_path / "out")
    assert set(before) <= set(after) and set(after) - set(before) <= set(hf.copies(hf.read_config(tmp_path / "out")))
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        if name.endswith("_scale_inv"):  # 448 times a scale, divided by 448, may be its neighbour
            assert torch.allclose(after[name], tensor, rtol=2e-7, atol=0), name
        else:
            assert torch.equal(after[name].float(), tensor.float()), name
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["quantization_config"] == open_weights.LAYOUTS["V3"]["quantization_config"] and told["dtype"] == "bfloat16"


@torch.no_grad()
@pytest.mark.parametrize("mtp", [0, 1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_the_identity(mtp, tied, tmp_path):
    """With MTP modules and without, where torchtitan's from_hf(to_hf(x)) failed (#4496); router biases too, which prime-rl exported as
    zeros (#2681)."""
    model = tiny_model(3, num_nextn_predict_layers=mtp, tie_word_embeddings=tied)
    model.save(tmp_path / "run" / "model")
    exchange.export_folder(tmp_path / "run", tmp_path / "out", quiet=True)
    exchange.import_folder(tmp_path / "out", tmp_path / "in", quiet=True)
    again = hf.load(tmp_path / "in").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items()) and len(again) == len(model.state_dict())
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert all((tmp_path / "in" / name).read_bytes() == (tmp_path / "run" / "model" / name).read_bytes() for name in names)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "fp8"])
def test_router_biases_are_exported_as_they_are(dtype, tmp_path):
    model = tiny_model(3)
    model.save(tmp_path / "model")
    exchange.export_folder(tmp_path / "model", tmp_path / "out", dtype, quiet=True)
    assert model.routers()[0].e_score_correction_bias.abs().min() > 0
    for mine, other in zip(model.routers(), hf.load(tmp_path / "out").routers(), strict=True):
        assert torch.equal(mine.e_score_correction_bias, other.e_score_correction_bias)


@torch.no_grad()
def test_an_exported_fp8_model_says_nearly_the_same(tmp_path):
    model = tiny_model(3, hidden_size=160, moe_intermediate_size=140)
    model.save(tmp_path / "model")
    exchange.export_folder(tmp_path / "model", tmp_path / "out", "fp8", quiet=True)
    found = stored(tmp_path / "out")
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    q, scale = fp8.quantise_blocks(model.model.layers[1].mlp.experts.down_proj[7])
    assert torch.equal(found[name].float(), q.float()) and torch.equal(found[name + "_scale_inv"], scale)
    plain = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight", "layernorm.weight")
    assert {t.dtype for n, t in found.items() if n.endswith(plain)} == {torch.bfloat16}
    # Its own logits with every weight rounded: a fifth of the largest is what 3 bits of mantissa and a router cost a random model.
    assert relative_error(hf.load(tmp_path / "out")(tokens()), model(tokens())) < 0.5


DENSE = dict(vocab_size=61, hidden_size=150, num_hidden_layers=2, num_attention_heads=4, intermediate_size=140, num_key_value_heads=2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_families_go_out_and_in(family, tied, tmp_path):
    model = Model(ModelConfig(model_type=family, head_dim=34, tie_word_embeddings=tied, **DENSE)).eval()
    randomize_(model)
    model.save(tmp_path / "model")
    assert {name: tuple(tensor.shape) for name, tensor in stored(tmp_path / "model").items()} == hf.layout(model.config)
    exchange.export_folder(tmp_path / "model", tmp_path / "out", quiet=True)
    exchange.import_folder(tmp_path / "out", tmp_path / "in", quiet=True)
    assert torch.equal(hf.load(tmp_path / "in")(tokens()), model(tokens()))
    exchange.export_folder(tmp_path / "model", tmp_path / "fp8", "fp8", quiet=True)
    assert stored(tmp_path / "fp8")["model.layers.0.self_attn.v_proj.weight_scale_inv"].shape == (1, 2)
    assert relative_error(hf.load(tmp_path / "fp8")(tokens()), model(tokens())) < 0.2


# ---- what comes along, and where it goes


def test_known_files_come_along_and_nothing_else(published, tmp_path):
    folder, _ = published["Moonlight"]
    exchange.import_folder(folder, tmp_path / "in", quiet=True)
    assert sorted(os.listdir(tmp_path / "in")) == sorted([*exchange.COMPANIONS, "config.json", "model.safetensors"])
    for name in set(exchange.COMPANIONS) - {"tokenizer_config.json"}:
        assert (tmp_path / "in" / name).read_text() == (folder / name).read_text()
    assert json.loads((tmp_path / "in" / "tokenizer_config.json").read_text()) == {"model_max_length": 128}
    assert "auto_map" not in (tmp_path / "in" / "config.json").read_text()


def test_a_snapshot_in_the_hubs_cache(published, tmp_path, monkeypatch, capsys):
    """Its files are links into ../../blobs."""
    folder, _ = published["Moonlight"]
    snapshot = tmp_path / "hub" / "models--moonshotai--Moonlight" / "snapshots" / "0123abc"
    shutil.copytree(folder, tmp_path / "hub" / "models--moonshotai--Moonlight" / "blobs")
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, "import", snapshot)
    assert code == 0 and out.startswith("models/Moonlight: ") and out.count("\n") == 1
    assert "import: done" in err
    assert all(not path.is_symlink() for path in (tmp_path / "models" / "Moonlight").iterdir())


def test_a_folder_without_a_tokenizer_says_so(published, tmp_path, monkeypatch, capsys):
    shutil.copytree(published["Moonlight"][0], tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").unlink()
    code, _, err = call(monkeypatch, capsys, "import", tmp_path / "in", "--to", tmp_path / "out")
    assert code == 0 and "has no tokenizer.json" in err


def test_json_is_one_object(published, tmp_path, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "import", published["V3"][0], "--to", tmp_path / "in", "--dtype", "bfloat16", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out) | {"seconds": 0} == {
        "folder": str(tmp_path / "in"), "dtype": "bfloat16", "tensors": 135, "bytes": json.loads(out)["bytes"], "files": 1, "seconds": 0,
    }  # fmt: skip
    code, out, err = call(monkeypatch, capsys, "export", tmp_path / "in", "--to", tmp_path / "out", "--dtype", "fp8", "--json")
    assert (code, err) == (0, "") and json.loads(out)["dtype"] == "fp8" and json.loads(out)["tensors"] > 135


@pytest.mark.parametrize("what", ["file", "folder", "the source itself"])
def test_nothing_is_written_over(what, published, tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "in", tmp_path / "x"
    shutil.copytree(published["Moonlight"][0], source)
    if what == "file":
        target.write_text("thesis")
    elif what == "folder":
        target.mkdir()
        (target / "thesis").touch()
    else:
        target = source
    before = sorted(tmp_path.rglob("*"))
    said = refused(monkeypatch, capsys, "import", source, "--to", target)
    assert "exists already" in said and sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_a_fine_target(published, tmp_path):
    (tmp_path / "x").mkdir()
    exchange.import_folder(published["Moonlight"][0], tmp_path / "x", quiet=True)
    assert hf.load(tmp_path / "x")


@pytest.mark.parametrize("verb, dtype", [("import", "fp8"), ("import", "bfloat17"), ("export", "int8")])
def test_an_unknown_dtype(verb, dtype, published, tmp_path, monkeypatch, capsys):
    assert f"--dtype {dtype} is unknown" in refused(monkeypatch, capsys, verb, published["V3"][0], "--to", tmp_path / "x", "--dtype", dtype)


@pytest.mark.parametrize("verb", ["import", "export"])
def test_ctrl_c_and_a_full_disk_leave_nothing(verb, published, tmp_path, monkeypatch, capsys):
    pwrite, calls = os.pwrite, 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", interrupted)
    code, out, err = call(monkeypatch, capsys, verb, published["V3"][0], "--to", tmp_path / "x", "--json")
    assert (code, out) == (130, "") and err.count("\n") == 1 and f"stopped the {verb} at tensor" in err and "run the same command" in err
    assert not list(tmp_path.iterdir())

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert "no space left on the device" in refused(monkeypatch, capsys, verb, published["V3"][0], "--to", tmp_path / "x", "--json")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_said_first(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 1000))
    monkeypatch.setattr(os, "pwrite", None)
    assert "1e-06 GB left" in refused(monkeypatch, capsys, "import", published["V3"][0], "--to", tmp_path / "x")
    assert not list(tmp_path.iterdir())


# ---- streams


def test_save_takes_one_tensor_at_a_time_in_any_order(tmp_path):
    """Sizes and files follow from the config before the first tensor is there; a tensor is gone when the next is asked for."""
    model = tiny_model(2, num_nextn_predict_layers=1)
    hf.save(tmp_path / "a", model.config, model.state_dict().items(), torch.bfloat16, shard_bytes=8000)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(sizes) > 3
    asked, alive = [], []

    def stream():
        for name, tensor in reversed(list(model.state_dict().items())):
            assert all(reference() is None for reference in alive)
            assert sorted(path.stat().st_size for path in (tmp_path / "b").glob(".model-*.safetensors.[0-9]*")) == sizes
            fetched = tensor.clone()
            asked.append(name)
            alive.append(weakref.ref(fetched))
            yield name, fetched
            del fetched

    hf.save(tmp_path / "b", model.config, stream(), torch.bfloat16, shard_bytes=8000)
    assert sorted(asked) == sorted(model.state_dict())
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}


@pytest.mark.parametrize("wrong", ["missing", "twice", "misshapen"])
def test_a_stream_that_is_not_the_models_is_an_error_and_leaves_no_folder(wrong, tmp_path):
    state = list(tiny_model().state_dict().items())
    if wrong == "missing":
        state.pop()
    elif wrong == "twice":
        state.append(state[0])
    else:
        state[0] = state[0][0], state[0][1][:-1]
    with pytest.raises(ValueError, match=r"written|no place"):
        hf.save(tmp_path / "x", tiny_config(), state, torch.float32)
    assert not list((tmp_path / "x").iterdir())


def test_layout_is_what_is_saved(tmp_path):
    for config in (tiny_config(), tiny_config(num_nextn_predict_layers=2, q_lora_rank=10), tiny_config(tie_word_embeddings=True)):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        tiny_model(**config.model_dump(include={"num_nextn_predict_layers", "q_lora_rank", "tie_word_embeddings"})).save(folder)
        assert {name: tuple(tensor.shape) for name, tensor in stored(folder).items()} == hf.layout(config)


MEMORY = """
import json, sys
from pathlib import Path
import torch
from tiny import tiny_config
from pascaline.model import exchange, hf
from pascaline.model.transformer import Model

def megabytes(key):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024

place, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
config = tiny_config(**sizes)
hf.SHARD_BYTES = 8 * 10**6
exchange.import_folder(place / "small", place / "warm", "bfloat16", quiet=True)
exchange.export_folder(place / "warm", place / "warmer", "fp8", quiet=True)

def random():
    with torch.device("meta"):
        state = Model(config).state_dict()
    for name, tensor in state.items():
        yield name, torch.zeros(tensor.shape)

def grown(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = megabytes("VmRSS")
    work()
    return megabytes("VmHWM") - before

told = {"save": grown(lambda: hf.save(place / "big", config, random(), torch.float32))}
told["as it is"] = grown(lambda: exchange.import_folder(place / "big", place / "a", quiet=True))
told["cast"] = grown(lambda: exchange.import_folder(place / "big", place / "b", "bfloat16", quiet=True))
told["to fp8"] = grown(lambda: exchange.export_folder(place / "big", place / "c", "fp8", quiet=True))
told["from fp8"] = grown(lambda: exchange.import_folder(place / "c", place / "d", quiet=True))
print(json.dumps(told))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not tell a process's peak memory")
def test_peak_memory_is_under_two_shards(tmp_path):
    sizes = dict(hidden_size=512, intermediate_size=1024, moe_intermediate_size=128, num_hidden_layers=30, first_k_dense_replace=1)
    tiny_model(hidden_size=160).save(tmp_path / "small")
    # Every large block of memory is the system's again once it is free, so that resident is what is in use.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEMORY, str(tmp_path), json.dumps(sizes)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=settings)
    assert done.returncode == 0, done.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "big").iterdir()) / 1e6
    files = len(list((tmp_path / "big").glob("*.safetensors")))
    told = json.loads(done.stdout)
    assert size > 200 and files > 20, (size, files)
    assert all(grown < 16 for grown in told.values()), told
