"""Rows of disks of other products: what depth costs, and the readers that there are. Read in the process on both sides."""
import os
import subprocess
from pathlib import Path

from servers import run
from table import compare

TOOL = Path(os.environ.get("AQUIFER_FOREIGN_BENCH", Path(__file__).resolve().parents[2] / "target/release/foreign-bench"))
DISSECT = Path(os.environ.get("AQUIFER_DISSECT", Path(__file__).resolve().parents[2] / "target/peers/dissect-1.8/readers"))

# The public reader of Veeam's files, driven as a library.
READ_VBK = """
import random, sys, time
from dissect.archive.vbk import VBK
vbk = VBK(open(sys.argv[2], "rb"))
found = [f for d in vbk.root.iterdir() if d.is_dir() for f in d.iterdir() if f.name == "DEV__dev_sda"]
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


def figure(*argv, **more):
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, timeout=300, check=True, **more)
    return float(done.stdout)


def foreign(work):
    folder = work / "foreign"
    if not (folder / "made").exists():
        run(TOOL, "make", folder)
        (folder / "made").touch()
    ours = lambda how, what: lambda: figure(TOOL, how, folder, what)  # noqa: E731
    for name in ("vmdk", "vhdx"):
        compare("chains of other products", f"4 KiB random read, {name}, depth 100", ours("random", f"{name}-100"),
                ("ours at depth 1", 0.95, ours("random", f"{name}-1")), unit="IOPS", better="more")
    environment = {**os.environ, "PYTHONPATH": str(DISSECT)}
    theirs = lambda how: lambda: figure("python3", "-c", READ_VBK, how, folder / "a.vbk", env=environment)  # noqa: E731
    for how, what, unit in (("random", "4 KiB random read", "IOPS"), ("through", "all of it", "MB/s")):
        compare("Veeam's files", f"{what}, LZ4 in blocks of 1 MiB", ours(how, "vbk"), ("dissect.archive", 1.0, theirs(how)), unit=unit, better="more")
        compare("datastores of Proxmox", f"{what}, zstd in chunks of 4 MiB", ours(how, "pbs"),
                ("the chunks, by zstd alone", 0.9, ours(how, "chunks")), unit=unit, better="more")
