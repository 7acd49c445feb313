"""Rows of disks of other products: what depth costs, and the readers that there are.

What QEMU reads as well is served by both doors; what only a library reads is read in the process on both sides.
"""
import os
import subprocess
from pathlib import Path

from servers import fio, ours, qemu_nbd, run, timed
from table import CLOSE_ROUNDS, compare

TOOL = Path(os.environ.get("AQUIFER_FOREIGN_BENCH", Path(__file__).resolve().parents[2] / "target/release/foreign-bench"))
DISSECT = Path(os.environ.get("AQUIFER_DISSECT", Path(__file__).resolve().parents[2] / "target/peers/dissect-1.8/readers"))

# The public readers of Veeam's and Proxmox's files, driven as a library.
READ = """
import random, sys, time
from dissect.archive.vbk import VBK
from dissect.archive.vma import VMA
file = open(sys.argv[2], "rb")
if sys.argv[2].endswith(".vma"):
    found = VMA(file).devices()
else:
    found = [f for d in VBK(file).root.iterdir() if d.is_dir() for f in d.iterdir() if f.name == "DEV__dev_sda"]
disk, size = found[0].open(), found[0].size
start, done, dice = time.monotonic(), 0, random.Random(1)
if sys.argv[1] == "random":
    while time.monotonic() - start < 2:
        disk.seek(dice.randrange(size // 4096) * 4096)
        assert len(disk.read(4096)) == 4096
        done += 1
else:
    while part := disk.read(1 << 20):
        done += len(part) / 1e6
print(done / (time.monotonic() - start))
"""

# What QEMU calls a format, and what its files end with.
SHARED = (("vmdk", "vmdk"), ("vhdx", "vhdx"), ("vpc", "vhd"), ("vdi", "vdi"))


def figure(*argv, **more):
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, timeout=300, check=True, **more)
    return float(done.stdout)


def served(server, jobs):
    """4 KiB reads a second at random places of a disk that is served."""
    with server as (uri, _):
        # The map is made once, when the disk is opened or first looked at.
        run("nbdinfo", "--map", uri)
        size = run("nbdinfo", "--size", uri, stdout=subprocess.PIPE, text=True).stdout.strip()
        return fio(uri, depth=jobs, size=size)[0]


def copied(server):
    with server as (uri, _):
        return timed("nbdcopy", uri, "null:")


def beside_qemu(work, folder):
    slice_ = folder / "slice.raw"
    if not slice_.exists():
        run("qemu-img", "dd", "-f", "raw", "-O", "raw", "bs=1M", "count=1024", f"if={work / 'mix.raw'}", f"of={slice_}")
    for form, ending in SHARED:
        disk = folder / f"slice.{ending}"
        if not disk.exists():
            run("qemu-img", "convert", "-f", "raw", "-O", form, slice_, disk)
        for jobs in (1, 16):
            compare("disks of other products", f"4 KiB random read, QD{jobs}, {ending}", lambda: served(ours(disk), jobs),
                    ("qemu-nbd", 1.0, lambda: served(qemu_nbd(disk, form), jobs)), unit="IOPS", better="more", warm=[disk])
        compare("disks of other products", f"nbdcopy to null, {ending}", lambda: copied(ours(disk)),
                ("qemu-nbd", 1.0, lambda: copied(qemu_nbd(disk, form))), unit="s", better="less", warm=[disk])


def by_depth(folder):
    for name, deep, flat in (("vmdk", "hundred/99.vmdk", "one/0.vmdk"), ("vhdx", "hundred/d99.vhdx", "one/d0.vhdx")):
        for jobs in (1, 16):
            compare("chains of other products", f"4 KiB random read, QD{jobs}, {name}, depth 100", lambda: served(ours(folder / deep), jobs),
                    ("the same bytes at depth 1", 0.95, lambda: served(ours(folder / flat), jobs)), unit="IOPS", better="more",
                    warm=[f for f in folder.glob("*/*") if f.is_file()], rounds=CLOSE_ROUNDS)


def by_libraries(folder):
    environment = {**os.environ, "PYTHONPATH": str(DISSECT)}
    mine = lambda how, what: lambda: figure(TOOL, how, folder, what)  # noqa: E731
    theirs = lambda how, file: lambda: figure("python3", "-c", READ, how, folder / file, env=environment)  # noqa: E731
    for how, what, unit in (("random", "4 KiB random read", "IOPS"), ("through", "all of it", "MB/s")):
        compare("Veeam's files", f"{what}, LZ4 in blocks of 1 MiB", mine(how, "vbk"), ("dissect.archive", 1.0, theirs(how, "a.vbk")),
                unit=unit, better="more")
        compare("archives of Proxmox", f"{what}, plain", mine(how, "vma"), ("dissect.archive", 1.0, theirs(how, "a.vma")), unit=unit, better="more")
        compare("datastores of Proxmox", f"{what}, zstd in chunks of 4 MiB", mine(how, "pbs"),
                ("the chunks, by zstd and SHA-256", 0.9, mine(how, "checked")), ("the chunks, by zstd alone", None, mine(how, "chunks")),
                unit=unit, better="more")


def foreign(work):
    # Another number where TOOL makes other files.
    folder = work / "foreign-2"
    if not (folder / "made").exists():
        run(TOOL, "make", folder)
        (folder / "made").touch()
    by_depth(folder)
    beside_qemu(work, folder)
    by_libraries(folder)
