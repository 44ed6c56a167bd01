"""Folders that lie: each is one sentence that names what is wrong, exit code 2, and nothing is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_weights
import pytest
import torch
from commands import call, refused
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from pascaline.model import exchange, hf, weights


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in V3's layout. Not to be changed."""
    folder = tmp_path_factory.mktemp("published") / "V3"
    open_weights.write(folder, "V3")
    return folder


FIRST, SECOND, THIRD = (f"model-{i:05d}-of-000003.safetensors" for i in (1, 2, 3))
NORM, HEAD = "model.norm.weight", "lm_head.weight"
MATRIX = "model.layers.0.self_attn.o_proj.weight"


def raw(folder: Path, file: str, change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> None:
    """Write a file anew with header and data changed; a header of str is taken as it is."""
    content = (folder / file).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = change(json.loads(content[8 : 8 + length]), content[8 + length :])
    told = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / file).write_bytes(len(told).to_bytes(8, "little") + told + data)


def field(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change fields of a tensor's entry in its header."""

    def change(folder: Path) -> None:
        raw(folder, home(folder, name), lambda header, data: (header | {name: header[name] | changes}, data))

    return change


def home(folder: Path, name: str) -> str:
    return json.loads((folder / weights.INDEX).read_text())["weight_map"][name]


def cut(file: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:keep])


def length(file: str, number: int) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(number.to_bytes(8, "little") + (folder / file).read_bytes()[8:])


def index(**changes: Any) -> Callable[[Path], None]:
    """Change the weight_map; a value of None drops the name."""

    def change(folder: Path) -> None:
        told = json.loads((folder / weights.INDEX).read_text())
        told["weight_map"] = {k: v for k, v in (told["weight_map"] | changes).items() if v is not None}
        (folder / weights.INDEX).write_text(json.dumps(told))

    return change


def retensor(name: str, work: Callable[[torch.Tensor], torch.Tensor | None], new: str = "") -> Callable[[Path], None]:
    """Put work(tensor) in place of a tensor, or under the name `new` beside it; None drops it. The index follows."""

    def change(folder: Path) -> None:
        file = home(folder, name)
        found = load_file(folder / file)
        made = work(found[name])
        if made is None:
            del found[name]
        else:
            found[new or name] = made
        save_file(found, folder / file)
        index(**{new or name: None if made is None else file})(folder)

    return change


def twin(folder: Path) -> None:
    """A tensor that stands in two shards."""
    found = load_file(folder / FIRST)
    save_file(found | {NORM: torch.zeros(160, dtype=torch.bfloat16)}, folder / FIRST)


def twice(folder: Path) -> None:
    def change(header: dict[str, Any], data: bytes) -> tuple[str, bytes]:
        return json.dumps(header)[:-1] + f", {json.dumps(NORM)}: {json.dumps(header[NORM])}}}", data

    raw(folder, home(folder, NORM), change)


def text(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(content)


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(told | changes))

    return change


def pickles_only(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def dangling(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("../../blobs/gone")


def nan(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.clone()
    scale[-1, -1] = torch.nan
    return scale


HOSTILE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated data": (cut(SECOND, -10), [SECOND, "is truncated"]),
    "truncated header": (cut(SECOND, 100), [SECOND, "is truncated"]),
    "four bytes": (cut(SECOND, 4), [SECOND, "is truncated"]),
    "nothing": (cut(SECOND, 0), [SECOND, "is truncated"]),
    "a header of 2^63 bytes": (length(FIRST, 2**63), [FIRST, str(2**63)]),
    "a header longer than the file": (length(FIRST, 10**7), [FIRST, str(10**7)]),
    "a header of nothing": (length(FIRST, 0), [FIRST, "not JSON"]),
    "bytes after the end": (lambda f: raw(f, FIRST, lambda h, d: (h, d + b"more")), [FIRST, "end at byte"]),
    "a header that is a list": (lambda f: raw(f, FIRST, lambda h, d: ("[]", d)), [FIRST, "JSON object"]),
    "a deep header": (lambda f: raw(f, FIRST, lambda h, d: ("[" * 10**5, d)), [FIRST, "not JSON"]),
    "a dtype of another width": (field(NORM, dtype="F32"), [THIRD, NORM, "said to be F32"]),
    "a dtype that is no float": (field(NORM, dtype="I16"), [THIRD, NORM, "is I16"]),
    "a dtype that is none": (field(NORM, dtype="X" * 1000), [THIRD, NORM]),
    "a dtype that is a number": (field(NORM, dtype=3), [THIRD, NORM, "malformed"]),
    "fp8 without scales": (field("model.layers.0.self_attn.o_proj.weight_scale_inv", dtype="I32"), ["o_proj.weight_scale_inv is I32"]),
    "a shape of another size": (field(NORM, shape=[159]), [THIRD, NORM, "said to be BF16 [159]"]),
    "a shape of another form": (field(HEAD, shape=[160, 61]), [HEAD, "(160, 61)", "(61, 160)"]),
    "a shape with a sign": (field(NORM, shape=[-160]), [THIRD, NORM, "malformed"]),
    "a shape that overflows": (field(NORM, shape=[2**40, 2**40, 2**40]), [THIRD, NORM]),
    "a shape that is no list": (field(NORM, shape="160"), [THIRD, NORM, "malformed"]),
    "bytes past the end": (field(NORM, data_offsets=[10**9, 10**9 + 320]), [THIRD, "overlap others or follow a gap"]),
    "bytes of another": (field(NORM, data_offsets=[0, 320]), [THIRD, "overlap"]),
    "bytes backwards": (field(NORM, data_offsets=[320, 0]), [THIRD, NORM]),
    "bytes that are not numbers": (field(NORM, data_offsets=[0.5, 320.5]), [THIRD, NORM, "malformed"]),
    "an entry that is no object": (lambda f: raw(f, THIRD, lambda h, d: (h | {NORM: 1}, d)), [THIRD, NORM, "malformed"]),
    "a tensor in two shards": (twin, [FIRST, NORM, THIRD]),
    "a tensor twice in a header": (twice, [THIRD, NORM, "twice"]),
    "a tensor twice in the index": (
        lambda f: text(weights.INDEX, (f / weights.INDEX).read_text()[:-2] + f', "{NORM}": "{FIRST}"}}}}')(f),
        [weights.INDEX, NORM, "twice"],
    ),
    "a tensor that lacks": (retensor(NORM, lambda _: None), [NORM, "lacks"]),
    "an expert that lacks": (retensor("model.layers.2.mlp.experts.7.up_proj.weight", lambda _: None), ["experts.7.up_proj"]),
    "a tensor too many": (retensor(NORM, torch.clone, new="model.extra.weight"), ["model.extra.weight", "no place"]),
    "an expert too many": (
        retensor(NORM, torch.clone, new="model.layers.1.mlp.experts.8.up_proj.weight"),
        ["experts.8.up_proj", "no place"],
    ),
    "a tensor that the index does not name": (index(**{NORM: None}), [THIRD, NORM, "not in the index"]),
    "a tensor with a name of many lines": (retensor(NORM, torch.clone, new="a\nb" * 500), ["no place"]),
    "an index that promises too much": (index(more=FIRST), [FIRST, "more", "promises"]),
    "an index that leads up": (index(**{NORM: "../x.safetensors"}), [weights.INDEX, "weight_map"]),
    "an index that leads away": (index(**{NORM: "/etc/passwd"}), [weights.INDEX, "weight_map"]),
    "an index that leads down": (index(**{NORM: "a/x.safetensors"}), [weights.INDEX, "weight_map"]),
    "an index of dots": (index(**{NORM: ".."}), ["no .."]),
    "an index of a nul": (index(**{NORM: "a\0b"}), ["no 'a"]),
    "an index of an absent file": (index(**{NORM: "absent.safetensors"}), ["absent.safetensors"]),
    "an index of a number": (index(**{NORM: 3}), [weights.INDEX, "weight_map"]),
    "a weight_map that is a list": (text(weights.INDEX, '{"weight_map": []}'), [weights.INDEX, "weight_map"]),
    "no weight_map": (text(weights.INDEX, "{}"), [weights.INDEX, "weight_map"]),
    "an index that is no JSON": (text(weights.INDEX, "{"), [weights.INDEX, "JSON"]),
    "a shard that leads nowhere": (dangling, [SECOND]),
    "a NaN scale": (retensor(MATRIX + "_scale_inv", nan), [FIRST, MATRIX + "_scale_inv", "not finite"]),
    "a scale below 0": (retensor(MATRIX + "_scale_inv", torch.neg), [MATRIX + "_scale_inv", "below 0"]),
    "a scale of another shape": (retensor(MATRIX + "_scale_inv", lambda s: s[:1].clone()), [FIRST, MATRIX + "_scale_inv", "(2, 2)"]),
    "no scale": (retensor(MATRIX + "_scale_inv", lambda _: None), [FIRST, MATRIX, "F8_E4M3"]),
    "a scale too many": (retensor(NORM, torch.clone, new=NORM + "_scale_inv"), [NORM + "_scale_inv", "no place"]),
    "an MTP copy that is none": (retensor("model.layers.3.embed_tokens.weight", lambda t: t + 1), ["3.embed_tokens", "must be a copy"]),
    "an MTP copy of another shape": (retensor("model.layers.3.shared_head.head.weight", lambda t: t[:9].clone()), ["shared_head.head"]),
    "half an MTP module": (retensor("model.layers.3.eh_proj.weight", lambda _: None), ["layers.3.eh_proj"]),
    "a config that is no JSON": (text("config.json", "{"), ["config.json", "JSON"]),
    "a config that is deep": (text("config.json", '{"a":' * 10**5), ["config.json", "JSON"]),
    "a config that says it twice": (text("config.json", '{"vocab_size": 1, "vocab_size": 2}'), ["config.json", "vocab_size", "twice"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "another quantisation": (config(quantization_config={"quant_method": "compressed-tensors"}), ["quantization_config"]),
    "other blocks": (config(quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}), ["[128, 128]"]),
    "another architecture": (config(model_type="deepseek_v2"), ["config.json", "deepseek_v2"]),
    "more layers than there are": (config(num_hidden_layers=5), ["lacks the tensor model.layers.4"]),
    "layers without end": (config(num_hidden_layers=10**9), ["holds", "tensors", "by its config"]),
    "experts without end": (config(n_routed_experts=4 * 10**12), ["holds", "tensors", "by its config"]),
    "a matrix without end": (config(intermediate_size=2**62), ["config.json", "no machine"]),
    "a number without end": (config(intermediate_size=10**40), ["config.json", "no machine"]),
    "a shape without end": (field(NORM, shape=[10**18] * 10**5), [THIRD, NORM, "malformed"]),
    "pickles only": (pickles_only, ["pytorch_model.bin", "can run code"]),
    "a tokenizer that is no JSON": (text("tokenizer.json", "{"), ["tokenizer.json", "JSON"]),
    "a chat template that is no text": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), ["chat_template.jinja", "UTF-8"]),
}  # fmt: skip


@pytest.mark.parametrize("which", HOSTILE)
def test_a_folder_that_lies_is_one_sentence_and_no_folder(which, honest, tmp_path, monkeypatch, capsys):
    shutil.copytree(honest, tmp_path / "in")
    change, words = HOSTILE[which]
    change(tmp_path / "in")
    said = refused(monkeypatch, capsys, "import", tmp_path / "in", "--to", tmp_path / "x", "--json")
    assert all(word in said for word in words), said
    assert os.listdir(tmp_path) == ["in"]


def test_the_folder_without_a_lie_is_taken(honest, tmp_path, monkeypatch, capsys):
    """What the test above changes is what is refused."""
    assert call(monkeypatch, capsys, "import", honest, "--to", tmp_path / "x", "--json")[0] == 0


def test_frequencies_that_follow_from_the_config_are_left_out(honest, tmp_path):
    shutil.copytree(honest, tmp_path / "in")
    retensor(NORM, lambda _: torch.ones(3), new="model.layers.0.self_attn.rotary_emb.inv_freq")(tmp_path / "in")
    exchange.import_folder(tmp_path / "in", tmp_path / "x", quiet=True)
    assert not any("inv_freq" in name for name in load_file(tmp_path / "x" / "model.safetensors"))


def test_a_header_of_any_length_and_misaligned_tensors_are_read(tmp_path):
    """The format allows both; others write them."""
    model = tiny_model()
    model.save(tmp_path)
    raw(tmp_path, "model.safetensors", lambda header, data: (json.dumps(header) + " " * (3 - len(json.dumps(header)) % 2), data))
    assert (int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8) % 4
    again = hf.load(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
