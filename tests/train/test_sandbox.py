"""Programs that mean harm, each contained: by namespaces where the kernel has them, by limits in any case."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UsageError
from train import sandbox
from train.sandbox import MIB, Limits, refusal, run

REASON = refusal()
isolated = pytest.mark.skipif(bool(REASON), reason=f"the kernel refuses namespaces: {REASON}")
MODES = [pytest.param("namespaces", marks=isolated), "none"]
SHORT = Limits(seconds=20.0, memory=256 * MIB)


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path, monkeypatch):
    """No folder, no zombie and no process stays behind."""
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path / "jobs"))
    (tmp_path / "jobs").mkdir()
    yield
    assert list((tmp_path / "jobs").iterdir()) == []
    try:
        assert os.waitpid(-1, os.WNOHANG) == (0, 0), "a zombie"
    except ChildProcessError:
        pass  # no child at all


def alive(seconds: str) -> bool:
    """Whether a program of this file that sleeps so long is among the processes."""
    said = (path.joinpath("cmdline") for path in Path("/proc").iterdir() if path.name.isdigit())
    found = []
    for file in said:
        try:
            found.append(seconds.encode() in file.read_bytes())
        except OSError:  # ended meanwhile
            pass
    return any(found)


@pytest.mark.parametrize("mode", MODES)
def test_a_program_reads_writes_and_ends(mode):
    ended = run(
        "import sys\nprint(input()[::-1], '中')\nprint('e', file=sys.stderr)\nsys.exit(3)", "abc\n", SHORT, mode
    )
    assert (ended.stdout, ended.stderr, ended.code, ended.timed_out, ended.ok) == ("cba 中\n", "e\n", 3, False, False)
    ended = run("open('x', 'w').write('a'); print(open('x').read())", limits=SHORT, isolation=mode)
    assert (ended.stdout, ended.ok) == ("a\n", True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("source", "hung"),
    [
        ("while True: pass", True),
        ("import time; time.sleep(60)", True),
        ("import signal, time\nfor s in (1, 2, 3, 13, 14, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)", True),
        ("x = bytearray(2**30)", False),
        ("x = []\nwhile True: x.append(bytes(2**20))", False),
        ("import sys\nwhile True: sys.stdout.write('x' * 10000)", False),
        ("import os, sys\nwhile True:\n    try: os.write(2, b'x' * 10000)\n    except OSError: pass", True),
        ("open('big', 'wb').write(bytes(2 * 2**20))", False),
        (
            "import resource\nfor r in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE): resource.setrlimit(r, (-1, -1))",
            False,
        ),
    ],
    ids=["loop", "sleep", "ignores signals", "memory", "memory in pieces", "output", "errors", "file", "lifts limits"],
)
def test_limits(source, hung, mode):
    start = time.monotonic()
    seconds = 0.4 if hung else 20.0  # a program that ends by itself has time to, also on a busy machine
    ended = run(source, limits=Limits(seconds=seconds, memory=256 * MIB), isolation=mode)
    assert not ended.ok
    assert ended.timed_out == hung
    assert len(ended.stdout) <= MIB
    assert len(ended.stderr) <= MIB
    assert not hung or time.monotonic() - start < 15


@pytest.mark.parametrize("mode", MODES)
def test_what_inherits_from_us_is_nothing(mode, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with open(__file__) as held:
        os.set_inheritable(held.fileno(), True)
        source = (
            "import os; print(sorted(os.environ)); print([n for n in range(3, 60) if os.path.exists(f'/dev/fd/{n}')])"
        )
        said = run(source, limits=SHORT, isolation=mode).stdout
    assert "secret" not in said
    assert "HF_TOKEN" not in said


@isolated
def test_no_network():
    for address in ("127.0.0.1", "1.1.1.1"):
        ended = run(f"import socket; socket.create_connection(('{address}', 53), 0.5)", limits=SHORT)
        assert not ended.ok
        assert "OSError" in ended.stderr or "refused" in ended.stderr


@isolated
def test_no_service_of_this_machine_is_reached():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        port = server.getsockname()[1]
        assert not run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 0.5)", limits=SHORT).ok
        with pytest.raises(TimeoutError):
            server.accept()


@isolated
def test_no_file_outside_is_read_or_written(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    secret.chmod(0o666)
    source = f"""
import os
for act in (
    lambda: print(open({str(secret)!r}).read()), lambda: open({str(secret)!r}, "w"), lambda: open("/etc/passwd"),
    lambda: open("/x", "w"), lambda: open("/usr/x", "w"), lambda: os.listdir("/proc"), lambda: os.mkdir("/dev/x"),
):
    try:
        print("done", act())
    except OSError as error:
        print(type(error).__name__)
print(os.listdir("."))
"""
    said = run(source, limits=SHORT).stdout.splitlines()
    assert len(said) == 8
    assert not any(line.startswith(("done", "hidden")) for line in said)
    assert said[-1] == "['main.py']"
    assert secret.read_text() == "hidden"


@isolated
def test_a_fork_bomb_is_a_few_processes():
    source = "import os\nn = 0\nwhile True:\n    try: os.fork()\n    except OSError: os.write(1, b'full ')"
    start = time.monotonic()
    ended = run(source, limits=Limits(seconds=0.5))
    assert ended.timed_out
    assert "full" in ended.stdout
    assert time.monotonic() - start < 15
    assert run("print(1)", limits=SHORT).ok


@isolated
@pytest.mark.parametrize("daemon", [True, False])
def test_nothing_outlives_the_program(daemon):
    mark = f"{time.time_ns() % 10**9 + 1000}"
    fork = "os.setsid()\n    if os.fork(): os._exit(0)" if daemon else "pass"
    source = f"""
import os, sys, time
if os.fork() == 0:
    {fork}
    os.execv({sys.executable!r}, [{sys.executable!r}, "-c", "import time; time.sleep(600)", "{mark}"])
time.sleep(0.3)
print("left")
"""
    ended = run(source, limits=Limits(seconds=20.0))
    assert ended.stdout == "left\n"
    assert ended.ok
    assert not alive(mark)


@isolated
def test_other_processes_are_out_of_reach():
    source = f"""
import os, signal
for pid in (os.getppid(), {os.getpid()}, 1):
    try:
        os.kill(pid, signal.SIGKILL)
        print("sent", pid)
    except (ProcessLookupError, PermissionError):
        print("no")
print("end")
"""
    ended = run(source, limits=SHORT)  # we are alive to see it
    assert ended.stdout.endswith("end\n")
    assert f"sent {os.getpid()}" not in ended.stdout


@isolated
def test_the_disk_is_small_and_goes():
    source = """
import os
full = 0
for i in range(100):
    try: open(f"f{i}", "wb").write(bytes(2**20 - 4096))
    except OSError: full += 1
print(full)
"""
    ended = run(source, limits=Limits(seconds=20.0, disk=8 * MIB))
    assert 85 < int(ended.stdout) < 97


@isolated
def test_no_privilege_inside():
    source = """
import ctypes, os
libc = ctypes.CDLL(None)
print(libc.mount(b"none", b"/sandbox", b"tmpfs", 0, b""), libc.umount(b"/usr"), libc.sethostname(b"x", 1))
print(os.getuid() > 0)
"""
    assert run(source, limits=SHORT).stdout == "-1 -1 -1\nTrue\n"


def test_without_namespaces_nothing_runs_unless_that_is_written(monkeypatch):
    monkeypatch.setattr(sandbox, "refusal", lambda: "unshare: Operation not permitted")
    with pytest.raises(UsageError, match=r"the kernel refuses the sandbox \(unshare: .*write sandbox: none"):
        run("print(1)")
    assert run("print(1)", limits=SHORT, isolation="none").stdout == "1\n"


def test_the_refusal_is_the_kernels(monkeypatch):
    """Where a name space cannot be made (here: an argument that is none) the reason is given, and nothing is run."""
    broken = Path(sandbox.jail.__file__).read_text().replace("0x40000000", "0x1")
    path = Path(sandbox.tempfile.gettempdir()) / "jail.py"
    path.write_text(broken)
    monkeypatch.setattr(sandbox.jail, "__file__", str(path))
    try:
        assert refusal.__wrapped__().startswith("unshare: ")
    finally:
        path.unlink()


@isolated
def test_killing_who_waits_ends_the_program():
    mark = f"{time.time_ns() % 10**9 + 1000}"
    inner = (
        f"import os; os.execv({sys.executable!r}, [{sys.executable!r}, '-c', 'import time; time.sleep(600)', '{mark}'])"
    )
    ours = f"import sys; sys.path[:] = {sys.path!r}\nfrom train.sandbox import Limits, run"
    code = f"{ours}\nrun({inner!r}, '', Limits(60.0))"
    with subprocess.Popen([sys.executable, "-c", code]) as outer:
        end = time.monotonic() + 10
        while not (found := alive(mark)) and time.monotonic() < end:
            time.sleep(0.05)
        outer.kill()
    assert found
    end = time.monotonic() + 5
    while alive(mark) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(mark)
    for left in Path(sandbox.tempfile.gettempdir()).glob("purestep-*"):
        sandbox.shutil.rmtree(left)
