"""A well-behaved client beside a greedy one on the same disk of the same recovery.

The victim asks for 500 operations of 4 KiB a second at random places: 400 reads and 100 writes, a FLUSH after each write. What
is measured is the 99th percentile over its reads, writes and flushes together.
"""
import json
import subprocess
import time
from contextlib import contextmanager

from servers import AQUIFER, environment, qemu_nbd, run, scratch, timed

SECONDS = 5
# Nobody asks for another's places, and all lie in the part of the disk that holds data.
VICTIM, GREEDY = ("offset=512m", "size=1g"), ("offset=2g", "size=1g")

STORM = """
import nbd, random, sys, time
dice, handle = random.Random(3), nbd.NBD()
handle.connect_uri(sys.argv[1])
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    while handle.aio_in_flight() < 16:
        at = (2 << 30) + dice.randrange(4096) * (256 << 10)
        (handle.aio_trim if dice.random() < 0.5 else handle.aio_zero)(256 << 10, at)
    handle.poll(-1)
    while (cookie := handle.aio_peek_command_completed()) > 0:
        handle.aio_command_completed(cookie)
"""


def greedy(uri, rw, depth, block, *more, jobs=1):
    return ["fio", "--name=greedy", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={block}", f"--iodepth={depth}", f"--numjobs={jobs}",
            *(f"--{o}" for o in GREEDY), f"--runtime={SECONDS + 4}", "--time_based", "--norandommap", "--refill_buffers", "--output-format=json", *more]


# What each of them does for as long as the victim is measured, and somewhat longer.
AGGRESSORS = {
    "a flood of sequential writes": lambda uri: greedy(uri, "write", 16, "1m"),
    "a flood of random writes": lambda uri: greedy(uri, "randwrite", 64, "4k"),
    "a flusher": lambda uri: greedy(uri, "randwrite", 4, "4k", "--fsync=1", jobs=4),
    "a reader of depth 128": lambda uri: greedy(uri, "randread", 128, "64k", "--readonly"),
    "a storm of trims and zeros": lambda uri: ["/usr/bin/python3", "-c", STORM, uri, str(SECONDS + 4)],
}

# What nobody's door can do anything about: two threads that compute and ask for nothing.
HOG = "two threads that only compute"
AGGRESSORS[HOG] = lambda _: ["fio", "--name=hog", "--ioengine=cpuio", "--cpuload=100", "--numjobs=2", "--thread", f"--runtime={SECONDS + 4}",
                             "--time_based", "--output-format=json"]


def tail(uri):
    """Runs the victim; returns the 99th percentile of all it asked for, in microseconds."""
    argv = ["fio", "--name=victim", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bs=4k", "--iodepth=4", *(f"--{o}" for o in VICTIM),
            "--rate_iops=400,100", "--fsync=1", f"--runtime={SECONDS}", "--time_based", "--norandommap", "--randrepeat=1", "--output-format=json+"]
    out = run(*argv, stdout=subprocess.PIPE, text=True).stdout
    job = json.loads(out[out.index("{"):])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"the victim was refused: error {job['error']}")
    counts = {}
    for side in (job["read"]["clat_ns"], job["write"]["clat_ns"], job["sync"]["lat_ns"]):
        for bound, count in side.get("bins", {}).items():
            counts[int(bound)] = counts.get(int(bound), 0) + count
    left = sum(counts.values()) * 99 / 100
    for bound in sorted(counts):
        left -= counts[bound]
        if left <= 0:
            return bound / 1e3
    raise RuntimeError("nothing was measured")


def beside(uri, aggressor, at=None):
    """The victim's tail while the aggressor is at it, or at the disk `at` of another server: all they share then is the machine."""
    other = subprocess.Popen(AGGRESSORS[aggressor](at or uri), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        time.sleep(1.5)
        if other.poll() is not None:
            raise RuntimeError(f"{aggressor} ended at once: {other.stdout.read()[-300:]!r}")
        return tail(uri)
    finally:
        other.terminate()
        other.communicate()


@contextmanager
def recovery(image):
    """A recovery of a disk that no machine can start from: its QEMU idles. Yields (uri, a function that runs a verb)."""
    with scratch() as folder:
        env = {**environment(folder / "home"), "XDG_RUNTIME_DIR": str(folder / "run")}

        def verb(*words):
            return run(AQUIFER, "--json", *words, stdout=subprocess.PIPE, text=True, env=env).stdout

        verb("recover", image, "--into", folder / "into", "--name", "beside", "--no-hydrate", "--memory", "64MiB", "--cpus", "1",
             "--network", "none", "--firmware", "bios")
        try:
            lines = map(json.loads, verb("status", "beside").splitlines())
            yield next(line for line in lines if line.get("type") == "session")["disks"][0]["uri"], verb
        finally:
            verb("finalize", "beside", "--discard", "--yes")


@contextmanager
def qcow2_overlay(image):
    """qemu-nbd on a new overlay; yields its uri."""
    with scratch() as folder:
        top = folder / "top.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top)
        with qemu_nbd(top, "qcow2", "--cache=writeback", "--aio=io_uring", write=True) as (uri, _):
            yield uri


def read_once(uri):
    """The victim's part of the disk, so that each run finds the same."""
    timed("nbdcopy", uri, "null:")
