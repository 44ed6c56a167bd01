"""Files of weights: safetensors read as if they came from an enemy, and written a tensor at a time.

Nothing here knows a model. A header is checked in full before any of its tensors is touched, a tensor is read as a view of the mapped
file and written in pieces, so that neither direction holds more than one tensor.
"""

import json
import math
import mmap
import os
import re
import reprlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pascaline.errors import BadInput
from pascaline.model import fp8
from pascaline.runs import atomic_path

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of what is loaded
FP8 = "F8_E4M3"  # is loaded with its scales
SCALE = "_scale_inv"
STORED = DTYPES | {FP8: torch.float8_e4m3fn}
_NAMES = {dtype: name for name, dtype in STORED.items()}
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
          "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}  # fmt: skip
_OURS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_HEADER_BYTES = 10**8  # the format's own limit
_PIECE_BYTES = 2**19  # converted at once (ext4 takes pieces of 2 MiB several times more slowly), and
_BLOCK_BYTES = 2**20  # copied at once: what a core keeps close


# ---- reading


class Entry(NamedTuple):
    """Where a tensor stands: its bytes are [start, stop) of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a model folder's file. BadInput if it is missing, unreadable, no JSON, no object, or names a key twice."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path.parent} is not a model folder: it has no {path.name}.") from None
    except OSError as e:
        raise BadInput(f"{path} cannot be read ({e.strerror}).") from None
    return _parsed(content, path, f"{path} is not valid JSON")


def _parsed(content: bytes, path: Path, otherwise: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise BadInput(f"{path} names {said(key)} twice.")
            found[key] = value
        return found

    try:
        value = json.loads(content, object_pairs_hook=unique)
    except BadInput:
        raise
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{otherwise} ({e}).") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold a JSON object.")
    return value


def said(name: str) -> str:
    """A name from a file, as a sentence can hold it."""
    return name if name.isprintable() and len(name) < 120 else reprlib.repr(name)


class Weights:
    """The tensors of a folder by name, read on demand from model.safetensors or from the shards its index names."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._mapped: tuple[str, mmap.mmap] | None = None
        self._lent: tuple[int, int] | None = None  # pages of the last tensor
        if not (folder / INDEX).exists():
            self.entries = self._header("model.safetensors")
            return
        promised = read_object(folder / INDEX).get("weight_map")
        if not isinstance(promised, dict) or not all(isinstance(f, str) and f == Path(f).name for f in promised.values()):
            raise BadInput(f"{folder / INDEX}: weight_map must map tensor names to file names in the same folder.")
        for file in sorted(set(promised.values())):
            for name, entry in self._header(file).items():
                if promised.get(name) != file:
                    other = f"stands in {said(promised[name])} by the index" if name in promised else "is not in the index"
                    raise BadInput(f"{folder / file} holds {said(name)}, which {other}.")
                self.entries[name] = entry
        if lacking := sorted(set(promised) - set(self.entries)):
            raise BadInput(f"{folder / promised[lacking[0]]} lacks {said(lacking[0])}, which the index promises.")

    def _header(self, file: str) -> dict[str, Entry]:
        path = self.folder / file
        if not path.is_file():
            pickles = sorted(p.name for p in self.folder.glob("*model*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            why = f"; {pickles[0]} is a pickle, which can run code when it is read: convert it to safetensors" if pickles else ""
            raise BadInput(f"{self.folder} has no {said(file)}{why}.")
        broken = f"{path} is truncated or not a safetensors file"
        try:
            with open(path, "rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                length = int.from_bytes(opened.read(8), "little")
                if size < 8 or length > min(size - 8, _HEADER_BYTES):
                    raise BadInput(f"{broken} (a header of {length} bytes in a file of {size}).")
                header = _parsed(opened.read(length), path, f"{broken}: its header is not JSON")
        except OSError as e:
            raise BadInput(f"{path} cannot be read ({e.strerror}).") from None
        header.pop("__metadata__", None)
        found = {name: _entry(path, name, told, 8 + length) for name, told in header.items()}
        end = 8 + length
        for name, entry in sorted(found.items(), key=lambda item: item[1][3:]):
            if entry.start != end:
                raise BadInput(f"{path}: the bytes of {said(name)} overlap others or follow a gap.")
            end = entry.stop
        if end != size:
            raise BadInput(f"{broken} (its tensors end at byte {end}, the file at {size}).")
        return found

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """BadInput if the tensor of that name is missing, of another shape, or of a dtype that cannot be loaded."""
        if name not in self.entries:
            raise BadInput(f"{self.folder} lacks the tensor {name}.")
        entry = self.entries[name]
        where = f"{self.folder / entry.file}: {name}"
        if entry.shape != tuple(shape):
            raise BadInput(f"{where} has shape {entry.shape}, the config asks for {tuple(shape)}.")
        if entry.dtype in DTYPES:
            return
        scale = self.entries.get(name + SCALE)
        if entry.dtype != FP8 or len(shape) != 2 or scale is None:
            raise BadInput(f"{where} is {entry.dtype}; only {', '.join(DTYPES)} can be loaded, and matrices in {FP8} with their {SCALE}.")
        if (scale.dtype, scale.shape) != ("F32", fp8.scale_shape(shape)):
            raise BadInput(
                f"{self.folder / scale.file}: {name}{SCALE} is {scale.dtype} {scale.shape}, for blocks of {fp8.BLOCK} it must be F32 "
                f"{fp8.scale_shape(shape)}."
            )

    def take(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor as it is stored, a view of the file (do not write to it); one in fp8 dequantised to `dtype` (default: bfloat16).
        `check` it first. BadInput for a scale that is not a number."""
        if self.entries[name].dtype != FP8:
            return self._view(name)
        scale = self.scale(name)
        return fp8.dequantise_blocks(self._view(name), scale, dtype or torch.bfloat16)

    def scale(self, name: str) -> Tensor:
        """The scales of a tensor in fp8. BadInput for one that is not a number."""
        scale = self._view(name + SCALE).clone()
        if not (scale.isfinite() & (scale >= 0)).all():
            raise BadInput(f"{self.folder / self.entries[name + SCALE].file}: {name}{SCALE} holds a scale that is not finite or below 0.")
        return scale

    def _view(self, name: str) -> Tensor:
        file, dtype, shape, start, stop = self.entries[name]
        mapping = self._map(file)
        if len(mapping) < stop:
            raise BadInput(f"{self.folder / file} became shorter while it was read.")
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._lent = (first, stop - first)
        kind = STORED[dtype]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the buffer is read-only; nobody writes to it
            content = torch.frombuffer(mapping, dtype=torch.uint8, count=stop - start, offset=start)
        if content.data_ptr() % kind.itemsize:
            content = content.clone()
        return content.view(kind).view(shape)

    def _map(self, file: str) -> mmap.mmap:
        """The file in memory. The pages of the last tensor are given back (a view of it reads them again), so few are ever resident."""
        if self._mapped and self._lent:
            self._mapped[1].madvise(mmap.MADV_DONTNEED, *self._lent)
        if self._mapped is None or self._mapped[0] != file:
            with open(self.folder / file, "rb") as opened:
                self._mapped = file, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mapped[1]


def _entry(path: Path, name: str, told: Any, base: int) -> Entry:
    """The header's entry of a tensor, checked; base: where the tensors' bytes begin."""

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and len(value) < 8 and all(type(n) is int and 0 <= n < 2**63 for n in value)

    fields: dict[str, Any] = told if isinstance(told, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    place: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or not numbers(shape) or not numbers(place) or len(place) != 2:
        raise BadInput(f"{path}: the header's entry of {said(name)} is malformed.")
    start, stop = place
    if start > stop or (dtype in _BYTES and math.prod(shape) * _BYTES[dtype] != stop - start):
        claim = reprlib.repr(f"{dtype} {shape}")[1:-1]
        raise BadInput(f"{path}: {said(name)} is said to be {claim}, which does not take the {stop - start} bytes that it has.")
    return Entry(path.name, reprlib.repr(dtype)[1:-1], tuple(shape), base + start, base + stop)


# ---- writing


class Slot(NamedTuple):
    """What will be written under a name."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer:
    """Puts each tensor at its place in the shards, in any order. Files are opened for a moment each: there may be many."""

    def __init__(self, slots: dict[str, Slot]):
        self.slots = slots
        self.places: dict[str, tuple[Path, int]] = {}
        self.missing = set(slots)

    def begin(self, path: Path, shard: dict[str, Slot]) -> None:
        """A file for these slots: its header, and room. Wide dtypes come first, so that every tensor is aligned."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, slot in sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize):
            header[name] = {"dtype": _NAMES[slot.dtype], "shape": slot.shape, "data_offsets": (end, end + slot.nbytes)}
            end += slot.nbytes
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)
        self.places |= {name: (path, 8 + len(content) + header[name]["data_offsets"][0]) for name in shard}
        with open(path, "wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            file.truncate(8 + len(content) + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """The tensor in its slot's dtype, from wherever it is; for a slot in fp8 the scales as well."""
        slot, (path, offset) = self.slots[name], self.places[name]
        if tuple(tensor.shape) != slot.shape or name not in self.missing:
            raise ValueError(f"{name} {tuple(tensor.shape)} has no place, or has been written already")
        if slot.dtype == torch.float8_e4m3fn and tensor.dtype != slot.dtype:
            tensor, scale = fp8.quantise_blocks(tensor)
            self.write(name + SCALE, scale)
        self.missing.remove(name)
        rows = max(_PIECE_BYTES * slot.shape[0] // slot.nbytes, 1)
        with open(path, "rb+", buffering=0) as file:
            for piece in tensor.detach().split(rows):
                data = memoryview(piece.to("cpu", slot.dtype).contiguous().flatten().view(torch.uint8).numpy())
                _put(file.fileno(), data, offset)
                offset += len(data)

    def copy(self, name: str, file: Path, start: int) -> None:
        """The bytes of a tensor that stand in another file, from `start` on, in the slot's dtype; sooner done than by mapping them."""
        slot, (path, offset) = self.slots[name], self.places[name]
        self.missing.remove(name)
        block = memoryview(bytearray(min(_BLOCK_BYTES, slot.nbytes)))
        left = slot.nbytes
        with open(file, "rb", buffering=0) as source, open(path, "rb+", buffering=0) as target:
            source.seek(start)
            while left:
                size = source.readinto(block[:left])
                if not size:
                    raise BadInput(f"{file} became shorter while it was read.")
                _put(target.fileno(), block[:size], offset)
                offset, left = offset + size, left - size


def _put(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        offset, data = offset + done, data[done:]


@contextmanager
def writing(folder: Path, slots: dict[str, Slot], texts: dict[str, str], shard_bytes: int) -> Iterator[Writer]:
    """`with writing(...) as writer:` write every slot once. The files appear all together on leaving, `texts` (name: content) too,
    config.json last, and files of an older model go; after an error, a full disk among them, the folder is as it was."""
    shards = _shards(slots, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else "model.safetensors" for i in range(len(shards))]
    texts = dict(texts)
    if shards[1:]:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        metadata = {"total_size": sum(slot.nbytes for slot in slots.values())}
        texts[INDEX] = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1) + "\n"
    writer = Writer(slots)
    with ExitStack() as last:
        last.enter_context(atomic_path(folder / "config.json")).write_text(texts.pop("config.json"), encoding="utf-8")
        with ExitStack() as renames:
            new = [renames.enter_context(atomic_path(folder / name)) for name in texts]
            for path, content in zip(new, texts.values(), strict=True):
                path.write_text(content, encoding="utf-8")
            for name, shard in zip(names, shards, strict=True):
                new.append(renames.enter_context(atomic_path(folder / name)))
                writer.begin(new[-1], shard)
            yield writer
            if writer.missing:
                raise ValueError(f"{min(writer.missing)} was not written")
            for path in new:  # what may fail, fails before anything is renamed
                _sync(path)
            (folder / "config.json").unlink(missing_ok=True)
        for old in folder.iterdir():  # an older index or file would be read in place of the new ones
            if _OURS.fullmatch(old.name) and old.name not in names and old.name not in texts:
                old.unlink()


def _shards(slots: dict[str, Slot], shard_bytes: int) -> list[dict[str, Slot]]:
    shards: list[dict[str, Slot]] = [{}]
    size = 0
    for name, slot in slots.items():
        if size + slot.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = slot
        size += slot.nbytes
    return shards


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
