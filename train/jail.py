"""What makes the sandbox around a program: a file run by itself, in processes that the program has no hold on.

Arguments: the folder of the job (job.json, main.py). With isolation the program sees new PID, mount, network, IPC and
UTS namespaces, a root made of the interpreter's own folders (read-only), and one writable folder, a small file system
in memory that goes when it goes. Exit code 99: the kernel refuses, the reason is on standard error.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

REFUSED = 99
WORK = "/sandbox"  # the one writable folder
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_PDEATHSIG, _NO_NEW_PRIVS = 1, 38  # of prctl
_MOUNT_SETATTR, _AT_RECURSIVE, _DETACH = 442, 0x8000, 2  # a system call of one number everywhere (Linux 5.12)
FOLDERS = ("/usr", "/lib", "/lib64", "/nix/store")
FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def main(folder: str) -> None:
    """Isolate as the job says, then become the program (or wait for it)."""
    job = json.loads(Path(folder, "job.json").read_text(encoding="utf-8"))
    program = Path(folder, "main.py").read_bytes()
    if not job["isolated"]:
        os.chdir(folder)
        _become(job, "main.py")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PDEATHSIG, signal.SIGKILL)  # whoever waits for the program is gone: so is the program
    root = os.geteuid() == 0
    child = 0
    try:
        _unshare(libc, root)
        child = os.fork()
    except OSError as error:
        _refuse(error)
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
    libc.prctl(_PDEATHSIG, signal.SIGKILL)
    try:
        _enter(libc, folder, job["prefixes"], job["disk"])
        Path(f"{WORK}/main.py").write_bytes(program)
        os.chdir(WORK)
        # root is not bound by the limit on processes: the program is a user whom nobody else is
        if root:
            os.chown(WORK, job["user"], job["user"])
        child = os.fork()
    except OSError as error:
        _refuse(error)
    if not child:
        try:
            os.setsid()
            if root:
                os.setgroups([])
                os.setresgid(job["user"], job["user"], job["user"])
                os.setresuid(job["user"], job["user"], job["user"])
            libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
            _become(job, f"{WORK}/main.py")
        except OSError as error:
            _refuse(error)
    # the first process of the namespace: nothing inside can end it, and when it ends all inside do
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) % 256)


def _unshare(libc: ctypes.CDLL, root: bool) -> None:
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    uid, gid = os.geteuid(), os.getegid()
    _check(libc.unshare(flags if root else flags | _NEWUSER), "unshare")
    if not root:
        # not as 0 inside: the program must have no privilege even there
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"1000 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"1000 {gid} 1")


def _enter(libc: ctypes.CDLL, folder: str, prefixes: list[str], disk: int) -> None:
    """Make the folder a root that holds the interpreter, read-only, and a writable folder."""
    _mount(libc, "none", "/", None, _REC | _PRIVATE)
    _mount(libc, "none", folder, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    shown: list[str] = []
    for name in sorted({*FOLDERS, *prefixes}):
        inside = Path(folder + name)
        if any(name.startswith(f"{other}/") for other in shown):
            continue
        if os.path.islink(name):
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.symlink_to(os.readlink(name))
        elif os.path.isdir(name):
            inside.mkdir(parents=True, exist_ok=True)
            _mount(libc, name, str(inside), None, _BIND | _REC)
            shown.append(name)
            attributes = (ctypes.c_uint64 * 4)(_RDONLY | _NOSUID | _NODEV)
            _check(
                libc.syscall(_MOUNT_SETATTR, -1, str(inside).encode(), _AT_RECURSIVE, ctypes.byref(attributes), 32),
                "mount_setattr",
            )
    for name in filter(os.path.exists, FILES):
        inside = Path(folder + name)
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.touch()
        _mount(libc, name, str(inside), None, _BIND)
    os.mkdir(folder + WORK)
    _mount(libc, "none", folder + WORK, "tmpfs", _NOSUID | _NODEV, f"mode=700,size={disk},nr_inodes=4096")
    os.chdir(folder)
    _check(libc.pivot_root(b".", b"."), "pivot_root")
    _check(libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")
    root = (ctypes.c_uint64 * 4)(_RDONLY)
    _check(libc.syscall(_MOUNT_SETATTR, -1, b"/", 0, ctypes.byref(root), 32), "mount_setattr")


def _become(job: dict, program: str) -> None:
    for name, most in job["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    os.execv(job["python"], [job["python"], "-I", "-B", "-X", "utf8", program])


def _mount(libc: ctypes.CDLL, what: str, where: str, kind: str | None, flags: int, data: str = "") -> None:
    done = libc.mount(what.encode(), where.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(done, f"mount {what} on {where}")


def _check(done: int, what: str) -> None:
    if done != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _refuse(error: OSError) -> None:
    os.write(2, f"{error.strerror or error}".encode())
    os._exit(REFUSED)


if __name__ == "__main__":
    main(sys.argv[1])
