import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pascaline import device
from pascaline.errors import BadInput


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PASCALINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "device.json"


def fixed(monkeypatch: pytest.MonkeyPatch, *speedups: float) -> list[float]:
    """Replaces the measurement by given answers; what is left in the list was not asked for."""
    left = list(speedups)
    monkeypatch.setattr(device, "_speedup", lambda _: left.pop(0))
    return left


def test_choose() -> None:
    assert device.choose("cpu") == device.choose(torch.device("cpu")) == torch.device("cpu")
    assert device.choose().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "mps", "gpu", "cuda:x", "", "cpu:3", "meta", "xpu"])
def test_a_missing_device_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(BadInput) as caught:
        device.choose(name)
    assert f"'{name}'" in str(caught.value) and "'auto'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_cuda_device_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.choose("auto") == torch.device("cuda")
    assert device.choose("cuda:1") == torch.device("cuda:1")
    with pytest.raises(BadInput, match="has 2 CUDA devices"):
        device.choose("cuda:2")


def test_dtype_follows_the_measurement_which_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = fixed(monkeypatch, 3.0, 1.05)
    assert device.best_dtype("cpu") == device.best_dtype("cpu") == torch.bfloat16
    assert left == [1.05]
    (key,) = json.loads(cache.read_text())
    assert device.cpu_name() in key and torch.__version__ in key and f"{torch.get_num_threads()} threads" in key
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert device.best_dtype("cpu") == torch.float32  # a tie goes to the exact format
    assert left == [] and len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a', b"\xff\xfe", b'{"KEY": "fast"}', b'{"KEY": -1}', b'{"KEY": NaN}'])
def test_a_broken_cache_is_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    fixed(monkeypatch, 2.0)
    device.best_dtype("cpu")
    (key,) = json.loads(cache.read_text())
    cache.write_bytes(content.replace(b"KEY", key.encode()))
    left = fixed(monkeypatch, 0.5)
    assert device.best_dtype("cpu") == torch.float32
    assert left == [] and json.loads(cache.read_text())[key] == 0.5


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/nowhere")):
        monkeypatch.setenv("PASCALINE_CACHE", str(place))
        fixed(monkeypatch, 2.0)
        assert device.best_dtype("cpu") == torch.bfloat16
    (tmp_path / "device.json").mkdir()
    monkeypatch.setenv("PASCALINE_CACHE", str(tmp_path))
    fixed(monkeypatch, 2.0)
    assert device.best_dtype("cpu") == torch.bfloat16
    assert {path.name for path in tmp_path.iterdir()} == {"file", "device.json"}


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PASCALINE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert device.cache_folder() == Path("/x/pascaline")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert device.cache_folder() == Path("/h/.cache/pascaline")


def test_the_measurement_itself(cache: Path) -> None:
    state = torch.get_rng_state()
    assert device.best_dtype("cpu") in (torch.float32, torch.bfloat16)
    speedup = device._speedup(torch.device("cpu"))
    assert 0.001 < speedup < 100
    assert torch.equal(state, torch.get_rng_state())  # a resumed run, which does not measure, must draw the same numbers


def test_the_peak_is_measured_once_and_not_when_forbidden(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [{"float32": 50.04, "bfloat16": 0.0}, {"float32": 70.0, "bfloat16": 9.0}]
    monkeypatch.setattr(device, "measure", lambda _: left.pop(0))
    assert device.peak("cpu", measured=False) == {} and len(left) == 2
    assert device.peak("cpu") == device.peak("cpu") == device.peak("cpu", measured=False) == {"float32": 50.0, "bfloat16": 0.0}
    assert len(left) == 1 and len(json.loads(cache.read_text())) == 1
    fixed(monkeypatch, 3.0)
    assert device.best_dtype("cpu") == torch.bfloat16  # both in one file
    assert device.peak("cpu", again=True) == device.peak("cpu") == {"float32": 70.0, "bfloat16": 9.0} and device.best_dtype("cpu")
    cache.write_text(json.dumps({key: {"float32": "fast"} for key in json.loads(cache.read_text())}))
    left.append({"float32": 1.0, "bfloat16": 1.0})
    assert device.peak("cpu") == {"float32": 1.0, "bfloat16": 1.0}


def test_measure_gives_gflops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PEAK_CPU", ((1, 256, 256, 256), (2, 128, 128, 128)))
    peak = device.measure("cpu")
    assert set(peak) == {"float32", "bfloat16"} and all(0.05 < value < 1e5 for value in peak.values())
    monkeypatch.setattr(device, "_product", lambda *_: lambda: 0.001)
    assert device.measure("cpu")["float32"] == pytest.approx(2 * 256**3 / 0.001 / 1e9)


def test_a_device_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    real = device._product

    def product(place: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> object:
        if dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return real(place, dtype, (1, 8, 8, 8))

    monkeypatch.setattr(device, "_product", product)
    assert device._speedup(torch.device("cpu")) < 1
    assert device.measure("cpu")["bfloat16"] == 0 < device.measure("cpu")["float32"]


def test_light_import() -> None:
    code = "import sys, pascaline.device; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
