"""Runs one program shut in: started as a script by sandbox.run, with its order as JSON; it imports nothing of Pascaline.

Three processes: this one makes the namespaces; the keeper is process 1 of the new process namespace, watches the clock and kills what is
left (the kernel kills the rest with it); the program is an ordinary process below it. What became of it is written to the status pipe,
which the program never holds, one JSON object a line.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time

NOBODY = 65534
PATIENCE = 3.0  # a program that waited for a processor gets its wall clock up to this many times
BOX = "/box"  # the program's folder where it has a file system of its own
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE, DETACH = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18, 2
PDEATHSIG, DUMPABLE, SUBREAPER, NO_NEW_PRIVS = 1, 4, 36, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A function of libc that gives -1 when it fails; OSError then, and where there is no such function."""
    function = getattr(libc, name, None)
    if function is None:
        raise OSError(f"this system has no {name}")
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError):  # there is none outside Linux
        call("prctl", option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = [text.encode() if text else None for text in (source, target, kind)]
    call("mount", *encoded, ctypes.c_ulong(flags), options.encode() or None)


def main() -> None:
    order, status = json.loads(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(status, False)
    os.umask(0o022)
    prctl(PDEATHSIG, signal.SIGKILL)
    try:
        if order["mode"] == "spaces":
            make_spaces()
        prctl(DUMPABLE, 0)  # whoever shares our user can neither trace us nor write to our status pipe
        keeper = os.fork()
        if keeper == 0:
            keep(order, status)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(keeper, signal.SIGTERM))
        os.waitpid(keeper, 0)
    except OSError as error:
        tell(status, error=str(error))


def tell(pipe: int, **said: object) -> None:
    os.write(pipe, json.dumps(said).encode() + b"\n")


def make_spaces() -> None:
    """No network, no other processes, own mounts. An ordinary user gets them within a user namespace of its own."""
    spaces = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", spaces if uid == 0 else spaces | NEWUSER)
    if uid != 0:
        map_ids(uid, gid)


def map_ids(uid: int, gid: int) -> None:
    """Within the new user namespace we are nobody, so that the program loses all capabilities when it is executed."""
    for name, text in ("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1"):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def keep(order: dict, status: int) -> None:
    """The keeper's life; it does not return."""
    code = 1
    try:
        prctl(PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
        if order["mode"] == "spaces":
            own_files(order)
        else:
            prctl(SUBREAPER, 1)
        program = os.fork()
        if program == 0:
            become(order, status)
        tell(status, **watch(program, order["limits"]))
        code = 0
    except Exception as error:  # whatever it is, it belongs into the report, and a fork must not unwind into its parent's frames
        tell(status, error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def own_files(order: dict) -> None:
    """A root of its own, in memory: the interpreter and the system's libraries read-only, and an empty folder to work in."""
    root, limits = order["folder"], order["limits"]
    with open(f"{root}/program.py", "rb") as file:
        source = file.read()
    mount(None, "/", None, REC | PRIVATE)
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, f"size={4 * limits['file_size'] + len(source)},nr_inodes=4096,mode=755")
    for path in [*order["visible"], *(f"/dev/{name}" for name in ("null", "zero", "random", "urandom"))]:
        show(path, root + path)
    for path in ("/tmp", BOX, "/dev/shm"):
        os.makedirs(root + path, exist_ok=True)
        os.chmod(root + path, 0o1777)
    os.makedirs(f"{root}/proc")
    with contextlib.suppress(OSError):  # a container that hides parts of /proc permits no new one; then there is none
        mount("proc", f"{root}/proc", "proc", NOSUID | NODEV | NOEXEC)
    with open(f"{root}{BOX}/program.py", "wb") as file:
        file.write(source)
    number = PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root's number is not known on {os.uname().machine}")
    os.chdir(root)
    call("syscall", ctypes.c_long(number), b".", b".")
    call("umount2", b".", DETACH)  # the old root lies over the new one until now
    os.chdir("/")


def show(path: str, into: str) -> None:
    """Bind a file or folder read-only; a link is made again."""
    if os.path.lexists(into) or not os.path.exists(path):
        return
    if os.path.islink(path):
        os.symlink(os.readlink(path), into)
        return
    os.makedirs(into if os.path.isdir(path) else os.path.dirname(into), exist_ok=True)
    if not os.path.isdir(path):
        open(into, "w").close()
    mount(path, into, None, BIND | REC)
    locked = os.statvfs(into).f_flag & (NODEV | NOEXEC)  # an ordinary user may not take these off
    mount(None, into, None, BIND | REMOUNT | RDONLY | NOSUID | locked)


def become(order: dict, status: int) -> None:
    """Turn into the program; does not return."""
    try:
        spaces = order["mode"] == "spaces"
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.setsid()
        counted = user = spaces and os.geteuid() != 0
        if os.geteuid() == 0 and order["mode"] != "bare":
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            counted, user = own_count(), True
        with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
            if counted:
                file.write("0")  # the program makes no further namespaces
        limit(order["limits"], counted)
        prctl(NO_NEW_PRIVS, 1)
        prctl(PDEATHSIG, signal.SIGKILL)  # a change of user has taken it off
        os.chdir(BOX if spaces else order["folder"])
        tell(status, protections={"files": spaces, "network": spaces, "processes": spaces, "count": counted, "user": user})
        # -P -s -S and this environment do what -I does, but for the hash seed: a fixed one, so that a verdict does not hang on the
        # order of a set
        environment = {"PYTHONHASHSEED": "0"} | ({} if spaces else {"TMPDIR": order["folder"]})
        os.execve(order["python"], [order["python"], "-P", "-s", "-S", "-B", "-X", "utf8", "program.py"], environment)
    except Exception as error:  # as in keep
        tell(status, error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(127)


def own_count() -> bool:
    """A user namespace of the program's own, so that its processes are counted alone, not with all others of this user."""
    try:
        prctl(DUMPABLE, 1)  # or our files in /proc would be root's
        call("unshare", NEWUSER)
        map_ids(NOBODY, NOBODY)
    except OSError:
        return False
    return True


def limit(limits: dict, counted: bool) -> None:
    processes = limits["processes"] if counted else limits["processes"] + 256 + tasks_of(os.getuid())
    for name, value in {
        "CPU": limits["cpu"],
        "AS": limits["memory"],
        "FSIZE": limits["file_size"],
        "NOFILE": limits["open_files"],
        "NPROC": processes,
        "CORE": 0,
    }.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError):  # macOS limits no address space
            resource.setrlimit(kind, (soft, soft + 1 if name == "CPU" and hard in (-1, soft + 1) else soft))


def tasks_of(uid: int) -> int:
    count = 0
    for pid in numbers("/proc"):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def watch(program: int, limits: dict) -> dict:
    """Wait for the program's end or for a reason to end it, kill whatever it left behind, and say what became of it.

    The wall clock stands still while the program waits for a processor that others use (/proc/PID/schedstat): a loaded machine costs it
    nothing. A sleeping program does not wait for a processor; its clock runs.
    """
    start = time.monotonic()
    wake, ended, left = start + limits["wall"], "", None
    cpu = waited = elapsed = 0.0
    while not ended and left is None:
        signalled = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, max(0.0, wake - time.monotonic()))
        elapsed = time.monotonic() - start
        cpu, waited = times()
        if signalled is None:
            if cpu >= min(limits["cpu"], limits["wall"]):  # of all its processes; each has its own limit besides
                ended = "cpu"
            elif elapsed - waited >= limits["wall"]:
                ended = "wall"
            elif elapsed >= PATIENCE * limits["wall"]:
                ended = "starved"
            wake = start + min(max(limits["wall"] + waited, elapsed + 0.05), PATIENCE * limits["wall"])
        elif signalled.si_signo == signal.SIGTERM:
            ended = "stopped"
        else:
            left = reap(program)
    kill_all(program)
    status = None
    if left is not None:
        status = os.waitstatus_to_exitcode(left[0])
        spent = status == -signal.SIGXCPU or (status == -signal.SIGKILL and left[1] >= limits["cpu"])
        ended = "exit" if status >= 0 else "cpu" if spent else "signal"
    return {"ended": ended, "status": status, "seconds": elapsed - waited}


def numbers(folder: str) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir(folder) if name.isdigit()]
    return []


def family() -> list[int]:
    """All processes below the keeper, grandchildren that left for sessions of their own too."""
    everyone = numbers("/proc")
    if os.getpid() == 1:
        return [pid for pid in everyone if pid != 1]
    parents = {}
    for pid in everyone:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            parents[pid] = int(file.read().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def times() -> tuple[float, float]:
    """(seconds that all processes had a processor, seconds that the one that waited longest waited for one)."""
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, waited = ours.ru_utime + ours.ru_stime, 0.0
    for pid in family():
        for task in numbers(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/task/{task}/schedstat") as file:
                ran, queued, _ = file.read().split()
                cpu, waited = cpu + int(ran) / 1e9, max(waited, int(queued) / 1e9)
    return cpu, waited


def reap(program: int) -> tuple[int, float] | None:
    """Bury all dead children; (status, CPU seconds) of the program if it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (dead := os.wait4(-1, os.WNOHANG))[0]:
            if dead[0] == program:
                found = dead[1], dead[2].ru_utime + dead[2].ru_stime
    return found


def kill_all(program: int) -> None:
    """Until there is no child left; orphans are our children, as we are process 1 or their subreaper."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if os.getpid() == 1:
                os.kill(-1, signal.SIGKILL)
            else:
                os.killpg(program, signal.SIGKILL)
        for pid in family():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        reap(program)
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        time.sleep(0.001)


if __name__ == "__main__":
    main()
