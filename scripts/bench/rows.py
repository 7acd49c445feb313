"""The rows of the budget: our figure, the peer's, the ratio; both sides interleaved in one run."""
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

from servers import AQUIFER, fio, ours, qemu_nbd, resident_kib, scratch, served, timed

ROWS = []
ROUNDS = int(os.environ.get("AQUIFER_BENCH_ROUNDS", "3"))


def row(group, work, budget, unit, better, us, peer, note=""):
    """Takes the medians of interleaved samples; ratio above 1 means we are better."""
    a, b = statistics.median(us), statistics.median(peer)
    ratio = (a / b) if better == "more" else (b / a)
    ROWS.append({"group": group, "work": work, "budget": budget, "unit": unit, "ours": a, "peer": b, "ratio": ratio,
                 "ours_all": us, "peer_all": peer, "note": note})
    print(f"{group}: {work}: {a:.4g} against {b:.4g} {unit}: {ratio:.2f} x (budget {budget})", flush=True)


def alternate(us, peer):
    """Runs both in turn, several times; each is called afresh and returns one figure."""
    a, b = [], []
    for _ in range(ROUNDS):
        a.append(us())
        b.append(peer())
    return a, b


LOADS = (("QD1", 1, 1), ("QD16", 16, 1), ("QD1 x 4 connections", 1, 4))


def reads(group, budgets, our_server, peer_server, warm=False, **load):
    """Random 4 KiB reads over NBD at three loads. `warm`: touch everything before measuring."""
    for (name, depth, jobs), budget in zip(LOADS, budgets):
        if budget is None:
            continue

        def one(server):
            with server() as (uri, _):
                if warm:
                    subprocess.run(["nbdcopy", uri, "null:"], check=True, capture_output=True)
                return fio(uri, depth=depth, jobs=jobs, **load)[0]

        us, peer = alternate(lambda: one(our_server), lambda: one(peer_server))
        row(group, f"4 KiB random read, {name}", budget, "IOPS", "more", us, peer)


def native_repository(work):
    """All points of the chain of 129 files, each stored as a native increment of the one before."""
    repo = work / "repo"
    if not (repo / "done").exists():
        subprocess.run(["rm", "-rf", str(repo)], check=True)
        subprocess.run([AQUIFER, "-r", str(repo), "init"], check=True, capture_output=True)
        for image in [work / "mix.qcow2"] + [work / f"inc{n:03}.qcow2" for n in range(1, 129)]:
            subprocess.run([AQUIFER, "-r", str(repo), "backup", "mix", "--disk", f"vda={image}"], check=True, capture_output=True)
        (repo / "done").touch()
    return repo


def nbd_rows(work):
    flat, deep = work / "mix.qcow2", work / "inc128.qcow2"
    reads("depth 128 against depth 1 (ours both, windows touched)", (">= 0.95", ">= 0.95", None),
          lambda: ours(deep, cache="1MiB"), lambda: ours(flat, cache="1MiB"))
    reads("cold zstd qcow2, depth 1, against qemu-nbd", (">= 1.5", ">= 1.5", ">= 2"), lambda: ours(flat), lambda: qemu_nbd(flat))
    if os.environ.get("AQUIFER_BENCH_NATIVE", "1") != "0":
        native_repository(work)
        reads("cold native zstd, depth 1, against qemu-nbd zstd qcow2", (">= 1.5", ">= 1.5", ">= 2"),
              lambda: ours("mix@latest~128", repo=work / "repo"), lambda: qemu_nbd(flat))
        reads("cold native, depth 128, against qemu-nbd depth 129", (">= 5", ">= 8", ">= 12"),
              lambda: ours("mix@latest", repo=work / "repo"), lambda: qemu_nbd(deep))
    reads("cold zstd qcow2, depth 128, against qemu-nbd", (">= 5", ">= 8", ">= 12"), lambda: ours(deep), lambda: qemu_nbd(deep))
    reads("cached, depth 128, against qemu-nbd", (None, ">= 25", None), lambda: ours(deep, cache="4GiB"), lambda: qemu_nbd(deep), warm=True)
    raw = f"raw:{work}/mix.raw"
    reads("cached hit against qemu-nbd raw (io_uring)", (">= 1.2", ">= 1.2", ">= 2.5"), lambda: ours(raw),
          lambda: qemu_nbd(work / "mix.raw", "raw", "--aio=io_uring", "--cache=writeback"), warm=True)


def sequential_rows(work):
    flat, deep = work / "mix.qcow2", work / "inc128.qcow2"
    for name, image, budget in (("depth 1", flat, ">= 3"), ("depth 128", deep, ">= 8")):

        def pull(server, argv):
            with server() as (uri, _):
                return timed(*[a.format(uri=uri) for a in argv])

        copy = ["nbdcopy", "{uri}", "null:"]
        us, peer = alternate(lambda: pull(lambda: ours(image), copy), lambda: pull(lambda: qemu_nbd(image), copy))
        row("sequential", f"nbdcopy to null, {name}", ">= 2" if image == flat else "-", "s", "less", us, peer)
        null = 'json:{{"driver":"null-co","size":4294967296}}'
        convert = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "{uri}", null]
        us, peer = alternate(lambda: pull(lambda: ours(image), convert), lambda: pull(lambda: qemu_nbd(image), convert))
        row("sequential", f"qemu-img convert from the door, {name}", budget, "s", "less", us, peer)


def fuse_rows(work):
    def load(path, depth, jobs):
        argv = ["fio", "--name=b", "--ioengine=io_uring", f"--filename={path}", "--rw=randread", "--bs=4k", f"--iodepth={depth}",
                f"--numjobs={jobs}", "--direct=1", "--runtime=2", "--time_based", "--size=1g", "--group_reporting", "--readonly", "--output-format=json"]
        out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        return json.loads(out[out.index("{"):])["jobs"][0]["read"]["iops"]

    def mounted(source, depth):
        with scratch() as folder:
            mount = folder / "m"
            mount.mkdir()
            argv = [AQUIFER, "mount", source, "--fuse", mount]
            process = subprocess.Popen([str(a) for a in argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       env={**os.environ, "AQUIFER_HOME": str(folder / "home")})
            try:
                for _ in range(500):
                    files = [f for f in mount.iterdir()]
                    if files:
                        break
                    time.sleep(0.01)
                return load(files[0], depth, 1)
            finally:
                process.terminate()
                process.wait(15)

    def daemon(image, form, depth):
        with scratch() as folder:
            point, pid = folder / "f", folder / "pid"
            point.touch()
            argv = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image},read-only=on", "--blockdev",
                    f"driver={form},node-name=d,file=f,read-only=on", "--export", f"type=fuse,id=e,node-name=d,mountpoint={point},writable=off",
                    "--pidfile", pid]
            with served(argv, pid):
                time.sleep(0.2)
                return load(point, depth, 1)

    for what, source, image, form, budgets in (("hot, raw", f"raw:{work}/mix.raw", work / "mix.raw", "raw", (">= 2", ">= 2.5")),
                                               ("cold zstd", work / "mix.qcow2", work / "mix.qcow2", "qcow2", (">= 1.5", ">= 1.5"))):
        for depth, budget in zip((1, 16), budgets):
            us, peer = alternate(lambda: mounted(source, depth), lambda: daemon(image, form, depth))
            row("FUSE against qemu-storage-daemon", f"{what}, 4 KiB random read, QD{depth}", budget, "IOPS", "more", us, peer)


def write_rows(work):
    flat = work / "mix.qcow2"

    def our_writes(depth):
        with scratch() as folder, ours(flat, "--writable", "--overlay", folder / "overlay") as (uri, _):
            return fio(uri, rw="randwrite", depth=depth, fsync=1, size="4g")[0]

    def overlay_writes(depth):
        with scratch() as folder:
            top = folder / "top.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", flat, "-F", "qcow2", top], check=True)
            with qemu_nbd(top, "qcow2", "--cache=writeback", write=True) as (uri, _):
                return fio(uri, rw="randwrite", depth=depth, fsync=1, size="4g")[0]

    def raw_writes(depth):
        with scratch() as folder:
            top = folder / "top.raw"
            subprocess.run(["qemu-img", "create", "-q", "-f", "raw", top, "4G"], check=True)
            with qemu_nbd(top, "raw", "--cache=writeback", "--aio=io_uring", write=True) as (uri, _):
                return fio(uri, rw="randwrite", depth=depth, fsync=1, size="4g")[0]

    for depth, over, raw in ((1, ">= 2.5", ">= 1.3"), (16, ">= 8", ">= 4")):
        us, peer = alternate(lambda: our_writes(depth), lambda: overlay_writes(depth))
        row("flushed 4 KiB writes", f"against a qcow2 overlay, QD{depth}", over, "IOPS", "more", us, peer)
        us, peer = alternate(lambda: our_writes(depth), lambda: raw_writes(depth))
        row("flushed 4 KiB writes", f"against raw under qemu-nbd, QD{depth}", raw, "IOPS", "more", us, peer)


def hydrate(source, folder):
    """Seconds until a machine-less session over `source` is all local and durable."""
    out = subprocess.run([AQUIFER, "bench", "hydrate", str(source), "--json"], check=True, capture_output=True, text=True,
                         env={**os.environ, "AQUIFER_HOME": str(folder / "home"), "TMPDIR": str(folder)}).stdout
    for line in out.splitlines():
        data = json.loads(line)
        if "seconds" in data:
            return data["seconds"]
    raise RuntimeError(f"no result in {out}")


def hydration_rows(work):
    def convert(image):
        with scratch() as folder:
            out = folder / "o.raw"
            seconds = timed("qemu-img", "convert", "-W", "-m", "4", "-f", "qcow2", "-O", "raw", image, out)
            return seconds + timed("sync", "-d", out)

    def stream(image):
        with scratch() as folder:
            top = folder / "top.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top], check=True)
            return qmp_stream(top, folder)

    def mine(image):
        with scratch() as folder:
            return hydrate(image, folder)

    for name, image, over_stream, over_convert in (("depth 1", work / "mix.qcow2", ">= 4", ">= 2"), ("depth 128", work / "inc128.qcow2", "-", ">= 10")):
        us, peer = alternate(lambda: mine(image), lambda: convert(image))
        row("bulk hydration, synced", f"against qemu-img convert -W, {name}", over_convert, "s", "less", us, peer)
        if over_stream != "-":
            us, peer = alternate(lambda: mine(image), lambda: stream(image))
            row("bulk hydration, synced", f"against block-stream, {name}", over_stream, "s", "less", us, peer)


def qmp_stream(top, folder):
    """Seconds of QEMU's block-stream of the whole backing chain into `top`, synced."""
    import socket as sockets
    path = folder / "qmp"
    argv = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={top}", "--blockdev", "driver=qcow2,node-name=d,file=f",
            "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"]
    with served(argv, path):
        with sockets.socket(sockets.AF_UNIX) as s:
            s.connect(str(path))
            stream = s.makefile("rw")
            stream.readline()
            start = time.monotonic()
            for command in ({"execute": "qmp_capabilities"}, {"execute": "block-stream", "arguments": {"job-id": "j", "device": "d"}}):
                stream.write(json.dumps(command) + "\n")
                stream.flush()
            for line in stream:
                message = json.loads(line)
                if "error" in message or message.get("data", {}).get("error"):
                    raise RuntimeError(line)
                if message.get("event") == "BLOCK_JOB_COMPLETED":
                    break
            seconds = time.monotonic() - start
    return seconds + timed("sync", "-d", top)


def backup_rows(work):
    for name in ("mix", "tree"):
        raw, sizes = work / f"{name}.raw", {}

        def mine():
            with scratch() as folder:
                repo = folder / "repo"
                subprocess.run([AQUIFER, "-r", str(repo), "init"], check=True, capture_output=True)
                seconds = timed(AQUIFER, "-r", repo, "backup", "m", "--disk", f"vda=raw:{raw}")
                seconds += timed("sync", "-f", repo)
                sizes["ours"] = sum(f.stat().st_size for f in repo.rglob("*.aql"))
                return seconds

        def peer(*options):
            with scratch() as folder:
                out = folder / "o.qcow2"
                seconds = timed("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", *options, raw, out)
                sizes["peer"] = out.stat().st_size
                return seconds + timed("sync", "-d", out)

        us, other = alternate(mine, peer)
        row("full backup, synced", f"{name}: against qemu-img convert -c zstd", ">= 3", "s", "less", us, other)
        us, other = alternate(mine, lambda: peer("-m", "16", "-W"))
        row("full backup, synced", f"{name}: against its -m 16 -W", ">= 2", "s", "less", us, other)
        row("full backup, synced", f"{name}: size against qemu's", ">= 0.98 (size <= 1.02 x)", "bytes", "less", [sizes["ours"]], [sizes["peer"]])


def wide_rows(work):
    """1 TiB virtual, 100 increments: first byte, memory, delta. No peer: the budget is absolute."""
    repo, folder = work / "wide", work
    base, steps = folder / "wide.raw", 100
    if not (repo / "done").exists():
        subprocess.run(["rm", "-rf", str(repo)], check=True)
        subprocess.run([AQUIFER, "-r", str(repo), "init"], check=True, capture_output=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(base), "1T"], check=True)
        for n in range(steps + 1):
            subprocess.run(["qemu-img", "bitmap", "--add", "--enable", str(base), f"b{n}"], check=True)
            writes = [x for k in range(16) for x in ("-c", f"write -q -P {n + 1} {((n * 7919 + k * 104729) % (1 << 24)) << 16} 64k")]
            subprocess.run(["qemu-io", "-f", "qcow2", *writes, str(base)], check=True, capture_output=True)
            more = ["--bitmap", f"b{n}"] if n else []
            subprocess.run([AQUIFER, "-r", str(repo), "backup", "wide", "--disk", f"vda={base}", *more], check=True, capture_output=True)
            subprocess.run(["qemu-img", "bitmap", "--remove", str(base), f"b{n}"], check=True)
        (repo / "done").touch()

    def first_byte():
        with scratch() as home:
            start = time.monotonic()
            subprocess.run([AQUIFER, "-r", str(repo), "mount", "wide", "--run", "nbdsh -u \"$uri\" -c 'h.pread(512,0)' >/dev/null; true"],
                           check=True, capture_output=True, env={**os.environ, "AQUIFER_HOME": str(home)})
            whole = time.monotonic() - start
            start = time.monotonic()
            subprocess.run(["nbdkit", "-U", "-", "null", "--run", "nbdsh -u \"$uri\" -c 'h.pread(512,0)' >/dev/null; true"], capture_output=True)
            return max(whole - (time.monotonic() - start), 0.0001)

    us = [first_byte() for _ in range(ROUNDS)]
    row("1 TiB x 100 increments", "command to first byte, over an empty nbdkit (warm)", "<= 20 ms", "s", "less", us, [0.020])
    us = []
    for _ in range(ROUNDS):
        us.append(timed(AQUIFER, "-r", repo, "diff", "wide@latest~50", "wide@latest") - timed(AQUIFER, "--version"))
    row("1 TiB x 100 increments", "delta of two points", "<= 100 ms", "s", "less", us, [0.1])
    with ours("wide", repo=repo) as (uri, process):
        fio(uri, seconds=1)
        row("1 TiB x 100 increments", "resident memory after 1 s of reads", "<= 72 MiB + cache used", "KiB", "less", [resident_kib(process.pid)], [72 << 10])


def latency_rows(work):
    """A 500 IOPS guest beside hydration that runs flat out, against the same guest alone."""
    def guest(hydrating):
        with scratch() as folder:
            out = subprocess.run([AQUIFER, "bench", "hydrate", str(work / "mix.qcow2"), "--json", "--victim", "500", *([] if hydrating else ["--paused"])],
                                 check=True, capture_output=True, text=True, env={**os.environ, "AQUIFER_HOME": str(folder / "h"), "TMPDIR": str(folder)}).stdout
        return next(d["victim_p99_us"] for d in map(json.loads, out.splitlines()) if "victim_p99_us" in d)

    us, peer = alternate(lambda: guest(True), lambda: guest(False))
    row("guest beside hydration", "p99 of a 500 IOPS reader, against the same reader alone", ">= 0.5 (p99 <= 2 x)", "us", "less", us, peer)
