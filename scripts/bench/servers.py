"""Starts the servers that are compared, each on its own Unix socket, and the clients that load them.

Nothing here waits for ever: every program has a time limit, and a server that does not answer is an error.
"""
import json
import os
import re
import signal
import socket as sockets
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

AQUIFER = os.environ.get("AQUIFER_BIN", str(Path(__file__).resolve().parents[2] / "target/release/aquifer"))
LIMIT_SECONDS = 300


def run(*argv, **kw):
    """Runs a program to its end; what it said on stderr is in the error."""
    kw = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "timeout": LIMIT_SECONDS, **kw}
    done = subprocess.run([str(a) for a in argv], **kw)
    if done.returncode != 0:
        said = (done.stderr or b"")
        said = said if isinstance(said, str) else said.decode(errors="replace")
        raise RuntimeError(f"{Path(argv[0]).name} ended with {done.returncode}: {said.strip().splitlines()[-3:]}")
    return done


def timed(*argv, **kw):
    start = time.monotonic()
    run(*argv, **kw)
    return time.monotonic() - start


# A process inherits the peak of the one that forked it, so a small one stands between.
PEAK = """
import os, sys
sys.stdout.flush()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ,
    file_actions=[(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_WRONLY, 0) for fd in (1, 2)])
_, status, used = os.wait4(child, 0)
print(used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_kib(*argv, env):
    """The most memory a program had at once; a few MiB at least, which is what the process beside it has."""
    run = [sys.executable, "-S", "-c", PEAK, *[str(a) for a in argv]]
    done = subprocess.run(run, stdout=subprocess.PIPE, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"{argv[0]} ended with {done.returncode}")
    return int(done.stdout)


def synced(path):
    """Seconds until a file is durable."""
    start = time.monotonic()
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return time.monotonic() - start


@contextmanager
def scratch():
    with tempfile.TemporaryDirectory(prefix="aquifer-bench-", dir=os.environ.get("AQUIFER_BENCH_SCRATCH", "/var/tmp")) as folder:
        yield Path(folder)


@contextmanager
def running(argv, ready, **kw):
    """Runs a server until the block ends; it is there when `ready()` says so."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([str(a) for a in argv], stdout=subprocess.DEVNULL, stderr=said, **kw)
        try:
            end = time.monotonic() + 30
            while not ready():
                if process.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    raise RuntimeError(f"{Path(argv[0]).name} does not serve: {said.read()[-400:].decode(errors='replace')}")
                time.sleep(0.005)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def environment(home):
    return {**os.environ, "AQUIFER_HOME": str(home), "TMPDIR": str(home.parent)}


def site(folder, cache):
    path = folder / "site.toml"
    path.write_text(f'version = 1\ncache = "{cache}"\n')
    return path


@contextmanager
def ours(source, *options, repo=None, cache="256MiB"):
    """Our NBD door on a source; yields (uri, process)."""
    with scratch() as folder:
        socket = folder / "a.sock"
        argv = [AQUIFER, "-c", site(folder, cache)] + (["-r", repo] if repo else []) + ["mount", source, "--nbd", f"unix:{socket}", *options]
        with running(argv, socket.exists, env=environment(folder / "home")) as process:
            yield f"nbd+unix:///?socket={socket}", process


@contextmanager
def qemu_nbd(image, form="qcow2", *options, write=False):
    """qemu-nbd on an image; yields (uri, process)."""
    with scratch() as folder:
        socket = folder / "q.sock"
        argv = ["qemu-nbd", "-k", socket, "-f", form, "--shared=0", "-t", *options] + ([] if write else ["-r"]) + [image]
        with running(argv, socket.exists) as process:
            yield f"nbd+unix:///?socket={socket}", process


@contextmanager
def our_fuse(source, cache="256MiB"):
    """Our FUSE door on a source; yields the disk's file."""
    with scratch() as folder:
        mount = folder / "m"
        mount.mkdir()
        argv = [AQUIFER, "-c", site(folder, cache), "mount", source, "--fuse", mount]
        with running(argv, lambda: any(mount.iterdir()), env=environment(folder / "home")):
            yield next(mount.iterdir())


@contextmanager
def qemu_fuse(image, form):
    """qemu-storage-daemon's FUSE export of an image; yields the file."""
    with scratch() as folder:
        point = folder / "f"
        point.touch()
        argv = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image},read-only=on",
                "--blockdev", f"driver={form},node-name=d,file=f,read-only=on",
                "--export", f"type=fuse,id=e,node-name=d,mountpoint={point},writable=off"]
        with running(argv, lambda: point.stat().st_size > 0):
            yield point


def fio(target, rw="randread", depth=1, jobs=1, seconds=2, size="1g", fsync=0, block="4k", extra=()):
    """One run of fio on an NBD URI or a file; returns (IOPS, p50 us, p99 us)."""
    nbd = str(target).startswith("nbd")
    where = ["--ioengine=nbd", f"--uri={target}"] if nbd else ["--ioengine=io_uring", f"--filename={target}", "--direct=1"]
    argv = ["fio", "--name=b", *where, f"--rw={rw}", f"--bs={block}", f"--iodepth={depth}", f"--numjobs={jobs}", f"--runtime={seconds}",
            "--time_based", f"--size={size}", "--group_reporting", "--output-format=json", "--randrepeat=1", "--norandommap", *extra]
    argv += [f"--fsync={fsync}"] if fsync else []
    argv += ["--readonly"] if "read" in rw else []
    out = run(*argv, stdout=subprocess.PIPE, text=True).stdout
    job = json.loads(out[out.index("{"):])["jobs"][0]
    side = job["read" if "read" in rw else "write"]
    tail = side["clat_ns"].get("percentile", {})
    return side["iops"], tail.get("50.000000", 0) / 1e3, tail.get("99.000000", 0) / 1e3


def first_byte(argv, socket, offset=0, **kw):
    """Seconds from starting a server to 4 KiB read from it; and its resident KiB then."""
    start = time.monotonic()
    process = subprocess.Popen([str(a) for a in argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kw)
    try:
        with sockets.socket(sockets.AF_UNIX) as s:
            while True:
                try:
                    s.connect(str(socket))
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    if process.poll() is not None or time.monotonic() - start > 60:
                        raise RuntimeError(f"does not serve: {argv}")
                    time.sleep(0.0002)
            s.settimeout(60)
            stream = s.makefile("rwb")
            stream.read(18)
            stream.write(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))  # fixed newstyle, no zeroes; the default export
            stream.flush()
            stream.read(10)
            stream.write(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, offset, 4096))
            stream.flush()
            if len(stream.read(16 + 4096)) != 16 + 4096:
                raise RuntimeError("the first read was cut short")
            seconds = time.monotonic() - start
            return seconds, resident_kib(process.pid, "VmRSS")
    finally:
        process.terminate()
        process.wait(20)


def resident_kib(pid, what="VmHWM"):
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", text).group(1))


def warm_pages(*paths):
    """Reads what these files hold, so that it is in the page cache: machines reclaim it between rows."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            at, size = 0, os.fstat(fd).st_size
            while at < size:
                try:
                    at = os.lseek(fd, at, os.SEEK_DATA)
                except OSError:  # nothing but a hole follows
                    break
                end = os.lseek(fd, at, os.SEEK_HOLE)
                while at < end:
                    at += len(os.pread(fd, min(end - at, 4 << 20), at))
        finally:
            os.close(fd)


def forget_pages(*paths):
    """Drops what the page cache holds of these files."""
    for path in paths:
        for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def machine():
    def version(*argv):
        return subprocess.run(argv, capture_output=True, text=True).stdout.splitlines()[0]

    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()).group(1)
    memory = round(int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1)) / (1 << 20))
    return (f"{os.cpu_count()} cores ({cpu}), {memory} GiB, Linux {os.uname().release}; "
            f"{version('qemu-img', '--version')}; {version('fio', '--version')}; {version('nbdcopy', '--version')}")
