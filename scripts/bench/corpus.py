"""Disks to measure on: the same bytes every time for the same machine image, kept between runs.

mix   4 GiB, 40 % used: a Debian tree on ext4, half-random blocks, a few fully random ones.
tree  a Debian tree alone, the honest corpus for compression.

Chains of either: a zstd qcow2, a backing chain of 129 files, and native repositories of both depths.
"""
import hashlib
import os
import random
import subprocess
from pathlib import Path

GIB = 1 << 30
BLOCK = 64 << 10


def run(*argv, **kw):
    return subprocess.run([str(a) for a in argv], check=True, stdout=subprocess.DEVNULL, **kw)


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
    run("mkfs.ext4", "-q", "-F", "-d", stage, path, f"{size >> 20}M", stderr=subprocess.DEVNULL)
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


def chain(base, folder, depth):
    """`depth` increments on `base`, each with 24 clusters of real bytes; returns the files, oldest first."""
    rng = random.Random(depth)
    files = [base]
    donor = folder / "donor.bin"
    donor.write_bytes(rng.randbytes(32 << 10) + (b"the quick brown fox " * 2000)[: 32 << 10])
    size = 4 * GIB
    for n in range(1, depth + 1):
        top = folder / f"inc{n:03}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "-b", files[-1].name, "-F", "qcow2", top, cwd=folder)
        places = rng.sample(range(size // BLOCK), 24)
        argv = ["qemu-io", "-f", "qcow2"]
        for place in places:
            argv += ["-c", f"write -q -c -s {donor} {place * BLOCK} {BLOCK}"]
        run(*argv, top)
        files.append(top)
    return files


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
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "mix.raw", folder / "mix-plain.qcow2")
    done.touch()


if __name__ == "__main__":
    import sys
    prepare(Path(sys.argv[1]))
