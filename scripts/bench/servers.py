"""Starts the servers that are compared, each on its own Unix socket, and the clients that load them."""
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

AQUIFER = os.environ.get("AQUIFER_BIN", str(Path(__file__).resolve().parents[2] / "target/release/aquifer"))


def wait_for(path, process, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if Path(path).exists():
            return
        if process.poll() is not None:
            raise RuntimeError(f"server ended with {process.returncode}: {process.args}")
        time.sleep(0.01)
    raise RuntimeError(f"no socket {path} after {seconds} s")


@contextmanager
def served(argv, socket, **kw):
    """Runs a server until the block ends; yields (uri, process)."""
    Path(socket).unlink(missing_ok=True)
    process = subprocess.Popen([str(a) for a in argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kw)
    try:
        wait_for(socket, process)
        yield f"nbd+unix:///?socket={socket}", process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        Path(socket).unlink(missing_ok=True)


@contextmanager
def scratch():
    with tempfile.TemporaryDirectory(prefix="aqb", dir="/var/tmp") as folder:
        yield Path(folder)


@contextmanager
def ours(source, *options, repo=None, cache="256MiB"):
    with scratch() as folder:
        socket, site = folder / "a.sock", folder / "site.toml"
        site.write_text(f'cache = "{cache}"\n')
        argv = [AQUIFER, "-c", site] + (["-r", repo] if repo else []) + ["mount", source, "--nbd", f"unix:{socket}", *options]
        with served(argv, socket, env={**os.environ, "AQUIFER_HOME": str(folder / "home")}) as (uri, process):
            yield uri, process


@contextmanager
def qemu_nbd(image, form="qcow2", *options, write=False):
    with scratch() as folder:
        socket = folder / "q.sock"
        argv = ["qemu-nbd", "-k", socket, "-f", form, "--shared=0", "-t", *options] + ([] if write else ["-r"]) + [image]
        with served(argv, socket) as (uri, process):
            yield uri, process


def fio(uri, rw="randread", depth=1, jobs=1, seconds=2, size="1g", fsync=0, block="4k", extra=()):
    """One run of fio's nbd engine; returns (IOPS, p50 us, p99 us)."""
    argv = ["fio", "--name=b", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={block}", f"--iodepth={depth}",
            f"--numjobs={jobs}", f"--runtime={seconds}", "--time_based", f"--size={size}", "--group_reporting",
            "--output-format=json", "--randrepeat=1", "--norandommap", *extra]
    if fsync:
        argv.append(f"--fsync={fsync}")
    out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    job = json.loads(out[out.index("{"):])["jobs"][0]
    side = job["read" if "read" in rw else "write"]
    tail = side["clat_ns"].get("percentile", {})
    return side["iops"], tail.get("50.000000", 0) / 1e3, tail.get("99.000000", 0) / 1e3


def timed(*argv, **kw):
    start = time.monotonic()
    subprocess.run([str(a) for a in argv], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kw)
    return time.monotonic() - start


def resident_kib(pid):
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", text).group(1))


def machine():
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()).group(1)
    version = lambda *a: subprocess.run(a, capture_output=True, text=True).stdout.splitlines()[0]
    kernel = os.uname().release
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1)) >> 20
    return f"{os.cpu_count()} cores ({cpu}), {memory} GiB, Linux {kernel}; {version('qemu-img', '--version')}; {version('fio', '--version')}; {version('nbdcopy', '--version')}"
