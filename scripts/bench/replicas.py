"""Replicas against what people use instead: copying the whole disk, or comparing it block by block.

What is timed is one run of the job, from the command to its end, which is after everything was made durable; the peers end in
a sync. Between the runs of an incremental replica the disk is changed at 64 places of 64 KiB each and backed up, untimed.
"""
import json
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import table
from servers import AQUIFER, environment, run, scratch, synced, timed
from table import compare

BLOCK, PLACES = 64 << 10, 64
GROUP = "replicas"

SITE = """version = 1
[host]
dr = {{ kind = "qemu", images = "{folder}/dr" }}
[repository]
nas = {{ url = "{folder}/repo" }}
[machine]
m = {{ disks = {{ {disks} }} }}
[job.dr]
kind = "replication"
machines = ["m"]
source = {source}
target = {{ host = "dr" }}
parallel_disks = {parallel}
block_size = "1MiB"
"""


class Site:
    """A folder with a repository, a host for replicas and a job between them."""

    def __init__(self, folder, disks, source='{ from = "backup", repositories = ["nas"] }', parallel=4):
        self.folder, self.disks = folder, disks
        self.file, self.env = folder / "site.toml", environment(folder / "home")
        (folder / "dr").mkdir()
        named = ", ".join(f'{name} = "raw:{path}"' for name, path in disks.items())
        self.file.write_text(SITE.format(folder=folder, disks=named, source=source, parallel=parallel))
        run(AQUIFER, "-r", folder / "repo", "init", env=self.env)

    def back_up(self):
        named = [word for name, path in self.disks.items() for word in ("--disk", f"{name}=raw:{path}")]
        run(AQUIFER, "-r", self.folder / "repo", "backup", "m", *named, env=self.env)

    def replicate(self):
        """Seconds of a run, and what it reported."""
        out = self.folder / "run.json"
        with out.open("wb") as said:
            seconds = timed(AQUIFER, "-c", self.file, "run", "dr", "--json", env=self.env, stdout=said)
        records = [json.loads(line) for line in out.read_text().splitlines()]
        return seconds, next(record for record in records if record["type"] == "replicated")

    def forget(self):
        run(AQUIFER, "-c", self.file, "replicas", "m_replica", "--delete", "--yes", env=self.env)

    def newest(self, disk):
        layers = (self.folder / "dr/m_replica" / disk).glob("*.qcow2")
        return max(layers, key=lambda layer: int(layer.stem))


def change(disk, dice):
    blocks = disk.stat().st_size // BLOCK
    with disk.open("r+b") as file:
        for place in dice.sample(range(blocks), PLACES):
            file.seek(place * BLOCK)
            file.write(dice.randbytes(BLOCK))


@contextmanager
def copy_of(disk):
    with scratch() as folder:
        copy = folder / "disk.raw"
        run("cp", "--sparse=always", disk, copy)
        yield folder, copy


def incremental(work):
    """A replica brought up to date, against copying the disk anew and against rsync."""
    dice = random.Random(11)
    with copy_of(work / "tree.raw") as (folder, disk):
        site = Site(folder, {"vda": disk})
        site.back_up()
        site.replicate()
        # The peer has a disk of its own, changed before each of its runs: ours may be run less often.
        origin, mirror, image = folder / "origin.raw", folder / "mirror.raw", folder / "copy.qcow2"
        for copy in (origin, mirror):
            run("cp", "--sparse=always", disk, copy)

        def mine():
            change(disk, dice)
            site.back_up()
            seconds, report = site.replicate()
            moved = report["bytes_written"]
            if not 0 < moved <= PLACES * BLOCK:
                raise RuntimeError(f"{moved} bytes were written for {PLACES * BLOCK} that were changed")
            return seconds

        def convert():
            image.unlink(missing_ok=True)
            return timed("qemu-img", "convert", "-W", "-f", "raw", "-O", "qcow2", disk, image) + synced(image)

        def rsync():
            change(origin, dice)
            seconds = timed("rsync", "--inplace", "--no-whole-file", "--ignore-times", origin, mirror) + synced(mirror)
            run("cmp", origin, mirror)
            return seconds

        peers = [("qemu-img convert -W of the whole disk", 5.0, convert)]
        if shutil.which("rsync"):
            peers.append(("rsync --inplace", 10.0, rsync))
        else:
            table.lost(GROUP, "an increment, against rsync --inplace", RuntimeError("rsync is not installed"))
        compare(GROUP, f"1 GiB disk, {PLACES} blocks changed", mine, *peers, unit="s", better="less", warm=[disk])
        # Whoever is fast has to be right as well.
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk, site.newest("vda"))


def digests(work):
    """Everything is read and compared by digests, against the tool that only computes them."""
    b3sum = shutil.which("b3sum") or str(Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo")) / "bin/b3sum")
    if not os.access(b3sum, os.X_OK):
        return table.lost(GROUP, "digest scan, against b3sum", RuntimeError("b3sum is not installed: cargo install b3sum"))
    with copy_of(work / "tree.raw") as (folder, disk):
        used = disk.stat().st_blocks * 512
        site = Site(folder, {"vda": disk}, source='{ from = "production" }')
        site.replicate()

        def mine():
            seconds, report = site.replicate()
            if report["bytes_written"]:
                raise RuntimeError("something differs in a disk that nobody changed")
            return report["bytes_read"] / seconds / (1 << 20)

        compare(GROUP, "digest scan of a disk, the whole run", mine,
                ("b3sum of the same file", 0.5, lambda: used / timed(b3sum, disk) / (1 << 20)), unit="MiB/s", better="more", warm=[disk])


def parallel(work):
    """Four disks of a machine at once, against one after another."""
    disk = work / "tree.raw"
    disks = {f"vd{letter}": disk for letter in "abcd"}
    with scratch() as together, scratch() as single:
        sites = [Site(together, disks), Site(single, disks, parallel=1)]
        for site in sites:
            site.back_up()

        def first(site):
            seconds, _ = site.replicate()
            site.forget()
            return seconds

        compare(GROUP, "first run of 4 disks, at once", lambda: first(sites[0]), ("one by one", None, lambda: first(sites[1])),
                unit="s", better="less", warm=[disk])


def replica(work):
    incremental(work)
    digests(work)
    parallel(work)
