"""A run folder: files that are whole or absent, one writer at a time, metrics, lineage, and the mark that says done.

Nothing here knows what a stage does. Every write that can fail halfway (a full disk, kill -9) leaves the old file or
the new one, never a mixture; an OSError is passed on, so that the command line can say "no space left" in one sentence.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pascaline.errors import BadInput

TEMPORARY = ".pascaline-tmp"  # ends every temporary name, so that a killed run's left-overs differ from the user's files


# ---- whole files -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with atomic_path(p) as temporary:` write the file `temporary`; on leaving it is forced to the disk and renamed
    to `path`, which holds the old content or the new, whatever happens. Makes the folder.

    Raises OSError (a full disk, no permission); the temporary name is removed then and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too must not leave a temporary file behind
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with atomic_folder(p) as temporary:` fill the folder `temporary`; on leaving it is renamed to `path`, which is whole or absent,
    whatever happens. BadInput at once if `path` is there and not an empty folder; OSError as in `atomic_path`."""
    path = Path(os.path.abspath(path))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BadInput(f"{path} exists already; name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
    try:
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (str as UTF-8) to `path` through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames in `folder` survive a power cut. File systems that cannot sync a folder are left alone."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """`obj` as JSON at `path`, atomically: insertion order, indent 1, a newline at the end, NaN and inf as null."""
    write_atomic(path, json.dumps(plain(obj), indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The JSON object at `path`, or None where there is none or it does not parse."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def plain(value: Any) -> Any:
    """`value` with only what JSON has: non-finite floats become None, paths str, arrays and tensors (nested) lists."""
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch, scalars too, without importing either
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def disk_full(error: BaseException) -> bool:
    """Whether `error` says that the device or the user's quota is full; safetensors and shutil say it only in their text."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full)


def complete(folder: str | os.PathLike[str], summary: Mapping[str, Any] | None = None) -> None:
    """Mark `folder` as done by writing done.json, which holds the summary. Write everything else first."""
    write_json(Path(folder) / "done.json", dict(summary or {}))


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether `complete` was called on this folder."""
    return read_json(Path(folder) / "done.json") is not None


# ---- one writer ------------------------------------------------------------------------------------------------------


class Lock:
    """`with Lock(folder):` one run at a time in `folder` (made if absent); the kernel frees the lock of a killed run.

    Raises BadInput naming the folder and the process that holds it. On entry it removes temporary files that a killed
    run left anywhere below the folder: the holder of the lock is the only writer there. A block that fails before it
    writes anything leaves no folder behind that was not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._fd: int | None = None
        self._new = False

    def __enter__(self) -> Self:
        self._new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise BadInput(f"{self.folder} cannot be a run folder: {error.filename or self.folder} is a file") from None
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            os.close(fd)
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise BadInput(f"{self.folder} is in use by {who}; wait for it or choose another folder") from None
        except BaseException:
            os.close(fd)
            raise
        if not os.fstat(fd).st_nlink:  # a failed run took it away just now
            os.close(fd)
            return self.__enter__()
        self._fd = fd
        try:
            os.ftruncate(fd, 0)
            os.write(fd, b"%d\n" % os.getpid())
            for left_over in self.folder.rglob(f".*{TEMPORARY}"):
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink(missing_ok=True)
        except BaseException:
            self._free()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._new and [p.name for p in self.folder.iterdir()] == [".lock"]:
            (self.folder / ".lock").unlink()
            self.folder.rmdir()
        self._free()

    def _free(self) -> None:
        # Else the file stays: there is nothing to gain from removing it, and whoever has it open would have to notice.
        if self._fd is not None:
            with contextlib.suppress(OSError):  # an emptied file only spares a later reader a stale number
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None


# ---- metrics ---------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl: one JSON object a line, one line a step. A killed run can tear at most the last line; `read`,
    `append` and `truncate_after` all cope with that."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line at once (it reaches the operating system before this returns); NaN and inf become null.

        Raises OSError on a full disk; half a line is taken back then.
        """
        line = json.dumps(plain(row), allow_nan=False).encode() + b"\n"
        if self._fd is None:
            self._fd = self._open()
        start = os.fstat(self._fd).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except BaseException:
            os.ftruncate(self._fd, start)
            raise

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            data = self.path.read_bytes()
            if not data.endswith(b"\n") and data:
                write_atomic(self.path, _joined(_lines(self.path, data)))
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def truncate_after(self, step: int) -> None:
        """For a resume from the state of `step`: drop the rows of later steps, and a torn last line."""
        self.close()
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        kept = _joined(pair for pair in _lines(self.path, data) if pair[1].get("step", step) <= step)
        if kept != data:
            write_atomic(self.path, kept)

    def sync(self) -> None:
        """Force the rows to the disk; call it when a checkpoint is written."""
        if self._fd is not None:
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """All whole rows, [] for a missing file. Raises BadInput for a broken line that is not the last."""
        path = Path(path)
        if not path.exists():
            return []
        return [row for _, row in _lines(path, path.read_bytes())]


def _lines(path: Path, data: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines = data.split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # also a UnicodeDecodeError; a whole row ends in a brace, so a torn one never parses
            row = None
        if not isinstance(row, dict):
            if number == last:
                return
            raise BadInput(f"{path}, line {number + 1} is not a JSON object; remove the line or the file")
        yield line, row


def _joined(lines: Iterator[tuple[bytes, dict[str, Any]]]) -> bytes:
    return b"".join(line + b"\n" for line, _ in lines)


# ---- lineage ---------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide numbers, None where absent; imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("pascaline", "torch", "transformers", "tokenizers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine(accelerator: str | None = None) -> dict[str, Any]:
    """{"cpu": model name, "cores": usable by this process, "memory_gib", "system", "accelerator": as passed in}."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        memory = None
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": cpu_name(), "cores": cores, "memory_gib": memory, "system": system, "accelerator": accelerator}


def cpu_name() -> str:
    """The processor's model name as the system gives it, else its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the source tree this package runs from ("-dirty" appended when files differ), None outside of one."""
    here = Path(__file__).resolve()
    # A GIT_DIR in the environment (a hook's, say) would answer for some other repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # look only, also while the user's own git command runs

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
        return done.stdout.strip()

    try:
        # A copy in a .venv inside a user's repository is untracked there: that commit says nothing about it.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def lineage(
    folder: str | os.PathLike[str],
    *,
    parents: Sequence[str | os.PathLike[str]] = (),
    seed: int | None = None,
    accelerator: str | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write folder/lineage.json: where this folder came from, and whatever facts. Returns what was written.

    parents: folders read (a Path is stored relative to `folder`, so that a moved tree still points right; a str as is).
    """
    ancestors = [parent if isinstance(parent, str) else os.path.relpath(parent, folder) for parent in parents]
    told: dict[str, Any] = {"parents": ancestors, "commit": git_commit(), "versions": versions()}
    told |= {"machine": machine(accelerator), "seed": seed, **facts}
    write_json(Path(folder) / "lineage.json", told)
    return told
