"""Disks to measure on: the same bytes every time for the same machine image, kept between runs.

mix   4 GiB, 40 % used: a Debian tree on ext4, half-random blocks, a few fully random ones.
tree  a Debian tree alone, the honest corpus for compression.

Chains of either: a zstd qcow2, a backing chain of 129 files, and a native repository of as many points.

wide  1 TiB virtual with a block in every 16 MiB, and 100 increments: as native points, the newest with every leaf
      changed, and as a backing chain.
"""
import hashlib
import os
import random
import shutil
from pathlib import Path

from servers import AQUIFER, environment, run

GIB = 1 << 30
TIB = 1 << 40
BLOCK = 64 << 10
LEAF = 256 * BLOCK
STEPS = 100


def tree_image(path, size, limit):
    """An ext4 file system of `size` bytes holding part of /usr, at most `limit` bytes of it."""
    stage = path.with_suffix(".stage")
    stage.mkdir(exist_ok=True)
    used = 0
    for top in ("/usr/bin", "/usr/share", "/usr/lib"):
        for folder, _, names in os.walk(top):
            for name in sorted(names):
                file = os.path.join(folder, name)
                try:
                    if os.path.islink(file) or not os.path.isfile(file):
                        continue
                    length = os.path.getsize(file)
                    if used + length > limit:
                        continue
                    target = stage / file.lstrip("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.link(file, target) if os.stat(file).st_dev == os.stat(stage).st_dev else run("cp", file, target)
                    used += length
                except OSError:
                    continue
            if used > limit * 0.98:
                break
    path.unlink(missing_ok=True)
    run("mkfs.ext4", "-q", "-F", "-d", stage, path, f"{size >> 20}M")
    run("rm", "-rf", stage)


def mix(path):
    """4 GiB: the tree in the first fifth of the used space, then half-random and random blocks, then holes."""
    tree_image(path, 512 << 20, 330 << 20)
    rng = random.Random(20)
    text = b"".join(hashlib.sha256(str(i).encode()).hexdigest().encode() for i in range(1024))
    with open(path, "r+b") as disk:
        disk.truncate(4 * GIB)
        at, blocks = 512 << 20, 20_700
        places = sorted(rng.sample(range((at // BLOCK), 4 * GIB // BLOCK), blocks))
        for place in places:
            if rng.random() < 0.05:
                data = rng.randbytes(BLOCK)
            else:
                pages = [rng.randbytes(4096) if rng.random() < 0.5 else (text * 2)[rng.randrange(60_000):][:4096] for _ in range(16)]
                data = b"".join(p.ljust(4096, b"\0") for p in pages)
            disk.seek(place * BLOCK)
            disk.write(data)


def zstd_qcow2(raw, out):
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", raw, out)


def increments(depth):
    """What changes in each of `depth` increments of mix: the 64 KiB that are written, and the places in bytes."""
    rng = random.Random(depth)
    donor = rng.randbytes(32 << 10) + (b"the quick brown fox " * 2000)[: 32 << 10]
    return donor, [[place * BLOCK for place in rng.sample(range(4 * GIB // BLOCK), 24)] for _ in range(depth)]


def chain(base, folder, depth):
    """`depth` increments on `base`, each with 24 clusters of real bytes."""
    donor, steps = increments(depth)
    (folder / "donor.bin").write_bytes(donor)
    below = base
    for n, places in enumerate(steps, 1):
        top = folder / f"inc{n:03}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "-b", below.name, "-F", "qcow2", top, cwd=folder)
        script = "".join(f"write -q -c -s {folder}/donor.bin {place} {BLOCK}\n" for place in places)
        run("qemu-io", "-f", "qcow2", top, input=script.encode())
        below = top


def once(folder, name):
    """Whether `name` still has to be made; an unfinished one is taken away."""
    made = folder / name
    if (made / "done").exists():
        return False
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    return True


def backup(repo, *argv):
    run(AQUIFER, "-r", repo, "backup", *argv, env=environment(repo.parent / "home"))


def native(folder):
    """The same disk and the same 128 changes as the backing chain, each stored as a native increment."""
    made = folder / "native-1"
    repo, disk = made / "repo", made / "disk.qcow2"
    if once(folder, made.name):
        run(AQUIFER, "-r", repo, "init", env=environment(made / "home"))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "mix.raw", disk)
        count(disk, 1)
        backup(repo, "mix", "--disk", f"vda={disk}")
        for n, places in enumerate(increments(128)[1], 1):
            script = "".join(f"write -q -s {folder}/donor.bin {place} {BLOCK}\n" for place in places)
            step(repo, "mix", disk, n, script)
        disk.unlink()
        (made / "done").touch()
    return repo


def count(disk, n):
    """Begins the bitmap of increment `n`: it has to count before the point is made that it counts from."""
    run("qemu-img", "bitmap", "--add", "--enable", disk, f"b{n}")


def step(repo, machine, disk, n, script):
    """Changes a disk under a bitmap and backs up what has changed."""
    run("qemu-io", "-f", "qcow2", "-t", "writeback", disk, input=script.encode())
    count(disk, n + 1)
    backup(repo, machine, "--disk", f"vda={disk}", "--bitmap", f"b{n}")
    run("qemu-img", "bitmap", "--remove", disk, f"b{n}")


def pages(n):
    """Where increment `n` of the wide disk writes, in bytes: 16 scattered places, its own."""
    return [((n * 7919 + k * 104729) % (TIB // LEAF)) * LEAF + (1 + n % 200) * BLOCK for k in range(16)]


def sparse(path, value):
    """1 TiB, 4 KiB of it written at the start of every leaf."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as disk:
        disk.truncate(TIB)
        for leaf in range(TIB // LEAF):
            os.pwrite(disk.fileno(), bytes([value]) * 4096, leaf * LEAF)


def wide(folder):
    """101 points of 1 TiB and one more in which every leaf differs."""
    made = folder / "wide-1"
    repo, disk, raw = made / "repo", made / "disk.qcow2", made / "disk.raw"
    if once(folder, made.name):
        run(AQUIFER, "-r", repo, "init", env=environment(made / "home"))
        sparse(raw, 1)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, disk)
        count(disk, 1)
        backup(repo, "wide", "--disk", f"vda={disk}")
        for n in range(1, STEPS + 1):
            step(repo, "wide", disk, n, "".join(f"write -q -P {1 + n} {place} 4k\n" for place in pages(n)))
        disk.unlink()
        sparse(raw, 2 + STEPS)
        backup(repo, "wide", "--disk", f"vda=raw:{raw}")
        raw.unlink()
        (made / "done").touch()
    return repo


def wide_chain(folder):
    """A backing chain of 101 qcow2 files of 1 TiB; the newest is w100.qcow2."""
    made = folder / "wide-chain-1"
    if once(folder, made.name):
        for n in range(STEPS + 1):
            top = made / f"w{n}.qcow2"
            below = ["-b", f"w{n - 1}.qcow2", "-F", "qcow2", top] if n else [top, "1T"]
            run("qemu-img", "create", "-q", "-f", "qcow2", *below, cwd=made)
            script = "".join(f"write -q -P {1 + n} {place} 64k\n" for place in pages(n))
            run("qemu-io", "-f", "qcow2", "-t", "writeback", top, input=script.encode())
        (made / "done").touch()
    return made


def prepare(folder):
    """All corpora in `folder`; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "corpus-1"
    if done.exists():
        return
    mix(folder / "mix.raw")
    tree_image(folder / "tree.raw", 1 * GIB, 800 << 20)
    for name in ("mix", "tree"):
        zstd_qcow2(folder / f"{name}.raw", folder / f"{name}.qcow2")
    chain(folder / "mix.qcow2", folder, 128)
    done.touch()


if __name__ == "__main__":
    import sys
    prepare(Path(sys.argv[1]))
