"""The rows of the budget, one function for each group of them; every peer is measured in the same run as ours.

`cold` reads go through a cache of 1 MiB, so each one decodes; the files themselves are in the page cache on both sides.
"""
import json
import socket as sockets
import subprocess
import time

import aggressors
import corpus
import foreign
import in_guest
import replicas
import second_boot
import table
from servers import (AQUIFER, environment, fio, first_byte, forget_pages, our_fuse, ours, peak_kib, qemu_fuse, qemu_nbd, resident_kib, run, running,
                     scratch, site, synced, timed)
from table import compare, limit

COLD = "1MiB"
QD1, QD16, FOUR = ("QD1", 1, 1), ("QD16", 16, 1), ("QD16 x 4 connections", 16, 4)


def chain_files(work):
    return [work / "mix.qcow2", *sorted(work.glob("inc*.qcow2"))]


def reads(group, our_server, peer_name, peer_server, budgets, files, warm=False, touch=False):
    """Random 4 KiB reads over NBD. `files` are in the page cache; `warm`: everything is read once first; `touch`: the
    map's windows are."""
    for (name, depth, jobs), budget in budgets:

        def one(server):
            with server() as (uri, _):
                if warm:
                    run("nbdcopy", uri, "null:")
                if touch:
                    run("nbdinfo", "--map", uri)
                return fio(uri, depth=depth, jobs=jobs)[0]

        compare(group, f"4 KiB random read, {name}", lambda: one(our_server), (peer_name, budget, lambda: one(peer_server)),
                unit="IOPS", better="more", warm=files)


def depth(work):
    flat, deep = work / "mix.qcow2", work / "inc128.qcow2"
    reads("depth 128 against depth 1", lambda: ours(deep, cache=COLD), "ours at depth 1", lambda: ours(flat, cache=COLD),
          ((QD1, 0.95), (QD16, 0.95), (FOUR, 0.95)), chain_files(work), touch=True)


def cold(work):
    flat, deep, native = work / "mix.qcow2", work / "inc128.qcow2", corpus.native(work)
    files = [*chain_files(work), *native.rglob("*.aql")]
    one, many = ((QD1, 1.5), (QD16, 1.5), (FOUR, 2.0)), ((QD1, 5.0), (QD16, 8.0), (FOUR, 12.0))
    reads("cold zstd qcow2, depth 1", lambda: ours(flat, cache=COLD), "qemu-nbd", lambda: qemu_nbd(flat), one, files)
    reads("cold native point, depth 1", lambda: ours("mix@latest~128", repo=native, cache=COLD), "qemu-nbd, zstd qcow2",
          lambda: qemu_nbd(flat), one, files)
    reads("cold zstd qcow2, depth 128", lambda: ours(deep, cache=COLD), "qemu-nbd", lambda: qemu_nbd(deep), many, files)
    reads("cold native point, depth 128", lambda: ours("mix@latest", repo=native, cache=COLD), "qemu-nbd, qcow2 chain",
          lambda: qemu_nbd(deep), many, files)


def hot(work):
    deep, raw = work / "inc128.qcow2", work / "mix.raw"
    reads("cached", lambda: ours(deep, cache="4GiB"), "qemu-nbd, chain of 129", lambda: qemu_nbd(deep), ((QD16, 25.0),), chain_files(work), warm=True)
    reads("cached", lambda: ours(deep, cache="4GiB"), "qemu-nbd, raw, io_uring",
          lambda: qemu_nbd(raw, "raw", "--aio=io_uring", "--cache=writeback"), ((QD1, 1.2), (QD16, 1.2), (FOUR, 2.5)),
          [*chain_files(work), raw], warm=True)


def sequential(work):
    for name, image, by_copy, by_convert in (("depth 1", work / "mix.qcow2", 2.0, 3.0), ("depth 128", work / "inc128.qcow2", 2.0, 8.0)):

        def copy(server):
            with server() as (uri, _):
                return timed("nbdcopy", uri, "null:")

        def convert(server):
            with server() as (uri, _):
                return timed("qemu-img", "convert", "-n", "-f", "raw", uri, "--target-image-opts",
                             "driver=raw,file.driver=null-co,file.size=4294967296")

        for what, how, budget in (("nbdcopy to null", copy, by_copy), ("qemu-img convert from the door", convert, by_convert)):
            compare("sequential", f"{what}, {name}", lambda: how(lambda: ours(image, cache="64MiB")),
                    ("qemu-nbd zstd", budget, lambda: how(lambda: qemu_nbd(image))), unit="s", better="less", warm=chain_files(work))


def fuse(work):
    def load(file, depth, warm):
        with file() as path:
            if warm:
                timed("dd", f"if={path}", "of=/dev/null", "bs=1M", "count=1024", "iflag=direct")
            return fio(path, depth=depth)[0]

    raw, zstd = work / "mix.raw", work / "mix.qcow2"
    peer = "qemu-storage-daemon"
    for depth, hot_budget in ((1, 2.0), (16, 2.5)):
        compare("FUSE", f"hot, raw, QD{depth}", lambda: load(lambda: our_fuse(f"raw:{raw}"), depth, True),
                (peer, hot_budget, lambda: load(lambda: qemu_fuse(raw, "raw"), depth, True)), unit="IOPS", better="more", warm=[raw])
        compare("FUSE", f"cold zstd, QD{depth}", lambda: load(lambda: our_fuse(zstd, COLD), depth, False),
                (peer, 1.5, lambda: load(lambda: qemu_fuse(zstd, "qcow2"), depth, False)), unit="IOPS", better="more",
                warm=[zstd])


def write(work):
    flat = work / "mix.qcow2"

    def load(server, depth):
        with server as (uri, _):
            return fio(uri, rw="randwrite", depth=depth, fsync=1, size="4g")[0]

    def mine(depth):
        with scratch() as folder:
            return load(ours(flat, "--writable", "--overlay", folder / "overlay"), depth)

    def overlay(depth):
        with scratch() as folder:
            top = folder / "top.qcow2"
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", flat, "-F", "qcow2", top)
            return load(qemu_nbd(top, "qcow2", "--cache=writeback", write=True), depth)

    def raw(depth):
        with scratch() as folder:
            top = folder / "top.raw"
            run("qemu-img", "create", "-q", "-f", "raw", top, "4G")
            return load(qemu_nbd(top, "raw", "--cache=writeback", "--aio=io_uring", write=True), depth)

    for depth, over_overlay, over_raw in ((1, 2.5, 1.3), (16, 8.0, 4.0)):
        compare("flushed writes", f"4 KiB random write, a FLUSH after each, QD{depth}", lambda: mine(depth),
                ("qemu-nbd, qcow2 overlay", over_overlay, lambda: overlay(depth)),
                ("qemu-nbd, raw, io_uring", over_raw, lambda: raw(depth)), unit="IOPS", better="more", warm=[flat])


def bench_hydrate(source, *options, key="seconds"):
    """What `aquifer bench hydrate` says: a throw-away overlay is filled, made durable, and compared with nothing."""
    with scratch() as folder:
        argv = [AQUIFER, "bench", "hydrate", source, "--json", *options]
        out = run(*argv, stdout=subprocess.PIPE, text=True, env=environment(folder / "home")).stdout
    return next(data[key] for data in map(json.loads, out.splitlines()) if data.get(key) is not None)


def hydration(work):
    def convert(image):
        with scratch() as folder:
            out = folder / "o.raw"
            return timed("qemu-img", "convert", "-W", "-m", "4", "-f", "qcow2", "-O", "raw", image, out) + synced(out)

    for name, image, over_stream, over_convert in (("depth 1", work / "mix.qcow2", 4.0, 2.0), ("depth 128", work / "inc128.qcow2", 10.0, 10.0)):
        compare("bulk hydration, synced", name, lambda: bench_hydrate(image), ("qemu-img convert -W", over_convert, lambda: convert(image)),
                ("block-stream", over_stream, lambda: block_stream(image)), unit="s", better="less", warm=chain_files(work))


def block_stream(image):
    """Seconds of QEMU's block-stream of a whole chain into a new image, synced."""
    with scratch() as folder:
        top, path = folder / "top.qcow2", folder / "qmp"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top)
        argv = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={top}", "--blockdev", "driver=qcow2,node-name=d,file=f",
                "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"]
        with running(argv, path.exists), sockets.socket(sockets.AF_UNIX) as s:
            s.settimeout(120)
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
        return seconds + synced(top)


def latency(work):
    """A 500 IOPS reader beside hydration that runs flat out, against the same reader alone."""
    def guest(*options):
        return bench_hydrate(work / "mix.qcow2", "--victim", "500", *options, key="victim_p99_us")

    compare("guest beside hydration", "p99 of 500 IOPS of 4 KiB reads", guest,
            ("the same, nothing hydrating", 0.5, lambda: guest("--paused", "--duration", "3s")), unit="us", better="less", warm=[work / "mix.qcow2"])


def aggressor(work):
    """A victim of 500 operations a second beside each greedy client of the same recovery; the budget is twice its quiet tail."""
    group, what, image = "a victim beside an aggressor", "p99 of 500 IOPS beside", work / "mix.qcow2"
    with aggressors.recovery(image) as (uri, verb), aggressors.recovery(image) as (unrelated, _), aggressors.qcow2_overlay(image) as theirs:
        for each in (uri, unrelated, theirs):
            aggressors.read_once(each)
        for name in aggressors.AGGRESSORS:
            budget = None if name == aggressors.HOG else 0.5
            compare(group, f"{what} {name}", lambda: aggressors.beside(uri, name), ("ours, quiet", budget, lambda: aggressors.tail(uri)),
                    ("ours, while another recovery has it", None, lambda: aggressors.beside(uri, name, unrelated)),
                    ("qemu-nbd, qcow2 overlay", None, lambda: aggressors.beside(theirs, name)), unit="us", better="less", warm=[image])

        def hydrating():
            verb("session", "resume", "beside")
            return aggressors.tail(uri)

        def quiet():
            verb("session", "pause", "beside")
            return aggressors.tail(uri)

        compare(group, f"{what} bulk hydration", hydrating, ("ours, quiet", 0.5, quiet), unit="us", better="less", warm=[image])


def trace(work):
    """The second start of a guest over a thin source, with the boot trace that the first one left, against the first."""
    group, disk = "second boot, over 25 Mbit/s and 20 ms", work / "guest.raw"
    if not disk.exists():
        second_boot.guest(disk)
    starts = [second_boot.both(disk, AQUIFER) for _ in range(table.ROUNDS)]
    (work / "trace.json").write_text(json.dumps(starts, indent=1) + "\n")

    def side(name, key):
        return [start[name][key] for start in starts], []

    for what, key, unit, budget in (("reads that waited for the source", "misses", "reads", 3.0), ("command to login prompt", "seconds", "s", None)):
        # None at all counts as one.
        ours, first = (([max(1, figure) for figure in figures], []) for figures, _ in (side("with", key), side("without", key)))
        table.add(group, what, "without the trace", budget, unit, "less", ours, first, 0.0)


def backup(work):
    for name in ("mix", "tree"):
        raw, sizes = work / f"{name}.raw", {}

        def mine():
            with scratch() as folder:
                repo, home = folder / "repo", {"env": environment(folder / "home")}
                run(AQUIFER, "-r", repo, "init", **home)
                seconds = timed(AQUIFER, "-r", repo, "backup", "m", "--disk", f"vda=raw:{raw}", **home) + synced(repo)
                sizes["ours"] = sum(f.stat().st_size for f in repo.rglob("*.aql"))
                return seconds

        def peer(*options):
            with scratch() as folder:
                out = folder / "o.qcow2"
                seconds = timed("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", *options, raw, out)
                sizes["peer"] = out.stat().st_size
                return seconds + synced(out)

        compare("full backup, synced", name, mine, ("qemu-img convert -c zstd", 3.0, peer),
                ("the same, -m 16 -W", 2.0, lambda: peer("-m", "16", "-W")), unit="s", better="less", warm=[raw])
        if len(sizes) == 2:
            table.add("full backup, synced", f"{name}: stored bytes", "qemu-img convert -c zstd", 1 / 1.02, "bytes", "less",
                      ([sizes["ours"]], []), ([sizes["peer"]], []), 0.0)


def wide(work):
    """1 TiB virtual, 100 increments: first byte, memory, delta. The budget is a figure."""
    group, repo, chain = "1 TiB, 100 increments", corpus.wide(work), corpus.wide_chain(work)
    point, foreign = ["-r", repo, "mount", "wide@latest~1"], ["mount", chain / "w100.qcow2"]
    memory = {}

    def opened(argv, cold):
        with scratch() as folder:
            if cold:
                forget_pages(repo if argv is point else chain)
            argv = [AQUIFER, "-c", site(folder, "64MiB"), *argv, "--nbd", f"unix:{folder}/a.sock"]
            seconds, memory["KiB"] = first_byte(argv, folder / "a.sock", offset=5 << 24, env=environment(folder / "home"))
            return seconds * 1e3

    def map_memory(argv):
        with scratch() as folder:
            empty = folder / "empty.raw"
            run("truncate", "-s", "1T", empty)
            opened(["mount", f"raw:{empty}"], False)
            least = memory["KiB"]
        opened(argv, False)
        return (memory["KiB"] - least) / 1024

    for what, argv in (("native point", point), ("qcow2 chain", foreign)):
        limit(group, f"{what}: command to first byte, warm", lambda: opened(argv, False), 20, "ms")
        limit(group, f"{what}: command to first byte, its files not in the page cache", lambda: opened(argv, True), 100, "ms")
        limit(group, f"{what}: resident then, beyond a door on an empty disk", lambda: map_memory(argv), 8, "MiB")

    def diff(a, b):
        with scratch() as folder:
            home = {"env": environment(folder / "home")}
            return (timed(AQUIFER, "-r", repo, "diff", a, b, **home) - timed(AQUIFER, "--version", **home)) * 1e3

    def diff_memory(a, b):
        with scratch() as folder:
            home = {"env": environment(folder / "home")}
            return (peak_kib(AQUIFER, "-r", repo, "diff", a, b, **home) - peak_kib(AQUIFER, "--version", **home)) / 1024

    points = list(repo.rglob("*.aql"))
    for what, a, b in (("50 increments apart", "wide@latest~51", "wide@latest~1"), ("every leaf different", "wide@latest~1", "wide@latest")):
        limit(group, f"delta of two points, {what}", lambda: diff(a, b), 100, "ms", warm=points)
        limit(group, f"delta of two points, {what}: resident then, beyond the program", lambda: diff_memory(a, b), 64, "MiB")


def memory(work):
    """Peak memory of a door after every block was read in parallel: cache budget + 64 MiB + 16 B a touched block."""
    budget_mib = 64

    def peak(image):
        with ours(image, cache=f"{budget_mib}MiB") as (uri, process):
            run("nbdcopy", uri, "null:")
            fio(uri, depth=16, jobs=4, size="4g")
            return resident_kib(process.pid) / 1024

    most = budget_mib + 64 + (4 << 30 >> 16) * 16 / (1 << 20)
    for name, image in (("depth 1", work / "mix.qcow2"), ("depth 128", work / "inc128.qcow2")):
        limit("resident memory", f"peak after a full copy and random reads, cache of {budget_mib} MiB, {name}", lambda: peak(image), most, "MiB")


def doors(work):
    """In one guest (its processor is emulated where there is no KVM, which hides part of every difference)."""
    raw = work / "mix.raw"
    with in_guest.guest(raw) as guest:
        for name, depth in (("QD1", 1), ("QD16", 16)):
            compare("doors inside a guest", f"4 KiB random read, vhost-user-blk, {name}", lambda: guest.reads(in_guest.OURS, depth),
                    ("our NBD door behind QEMU's virtio-blk", None, lambda: guest.reads(in_guest.NBD, depth)),
                    ("qemu-storage-daemon's vhost-user-blk", 1.0, lambda: guest.reads(in_guest.QSD, depth)),
                    unit="IOPS", better="more", warm=[raw])


GROUPS = {"depth": depth, "cold": cold, "hot": hot, "sequential": sequential, "fuse": fuse, "write": write, "hydration": hydration,
          "latency": latency, "aggressor": aggressor, "trace": trace, "backup": backup, "wide": wide, "memory": memory,
          "doors": doors, "replica": replicas.replica, "foreign": foreign.foreign}
