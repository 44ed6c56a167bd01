"""Building the kernels: plain C++, by the user's own compiler, for the processor that it runs on, into the user's cache folder.

Nothing is downloaded and nothing is loaded but what was built here from the sources beside this file: the library's name is a hash of them,
of the compiler and of the processor, and it lies in a folder that only the user can write to.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from pascaline.device import cache_folder

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden", "-w")
THREADS = ("-fopenmp", "")  # the second where PyTorch's OpenMP is another than the compiler's: one thread then
SECONDS = 300.0  # for the compiler


class Unbuilt(Exception):
    """Why there is no library, in one line."""


def load() -> ctypes.CDLL:
    """The library, built first if this machine has not built it yet. Unbuilt if that cannot be."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise Unbuilt("there is no C++ compiler (c++)")
    if sys.byteorder != "little":
        raise Unbuilt("this processor stores numbers the other way round")
    folder, reason = _private_folder(), ""
    for threads in THREADS:
        path = folder / f"native-{_key(compiler, threads)}.so"
        if not path.exists():
            _compile(compiler, threads, path)
        _check_own(path)
        try:
            return ctypes.CDLL(str(path))  # GOMP_* are found in the library that PyTorch has loaded: one pool of threads, not two
        except OSError as e:
            reason = str(e).splitlines()[0]
    raise Unbuilt(f"the library does not load: {reason}")


def sources() -> list[Path]:
    return sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".cpp", ".hpp"))


def _key(compiler: str, threads: str) -> str:
    said = [*FLAGS, threads, _output([compiler, "--version"]), platform.machine(), _processor(), torch.__version__]
    digest = hashlib.sha256("\0".join(said).encode())
    for path in sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "cpu family", "model\t"))}))


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as e:
        raise Unbuilt(f"{Path(command[0]).name} does not run: {e}") from None


def _private_folder() -> Path:
    folder = cache_folder() / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        told = folder.lstat()
        if stat.S_ISDIR(told.st_mode) and told.st_uid == os.getuid() and stat.S_IMODE(told.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as e:
        raise Unbuilt(f"{folder} cannot be made: {e.strerror}") from None
    _check_own(folder)
    return folder


def _check_own(path: Path) -> None:
    told = path.lstat()
    if stat.S_ISLNK(told.st_mode) or told.st_uid != os.getuid() or told.st_mode & 0o022:
        raise Unbuilt(f"{path} is not this user's alone")


def _compile(compiler: str, threads: str, path: Path) -> None:
    """Two steps, so that no OpenMP library is linked: the process has PyTorch's."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as temporary:
        parts = [p for p in sources() if p.suffix == ".cpp"]
        objects = [str(Path(temporary) / f"{p.stem}.o") for p in parts]
        for source, target in zip(parts, objects, strict=True):
            _run([compiler, *FLAGS, *filter(None, [threads]), "-c", str(source), "-o", target])
        library = str(Path(temporary) / path.name)
        loose = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([compiler, "-shared", *loose, *objects, "-o", library])
        os.chmod(library, 0o700)
        os.replace(library, path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as e:
        raise Unbuilt(f"{Path(command[0]).name} does not run: {e}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["it said nothing"]
        raise Unbuilt(f"{Path(command[0]).name} fails: {said[0].strip()}")


class Building:
    """One build, on a thread of its own."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.lacking = "the kernels are being built"
        self.thread = threading.Thread(target=self._work, name="pascaline-native", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            library = load()
        except Unbuilt as e:
            self.lacking = str(e)
        except Exception as e:  # whatever it is, PyTorch computes the same without
            self.lacking = f"{type(e).__name__}: {e}".splitlines()[0]
        else:
            self.lacking, self.library = "", library
