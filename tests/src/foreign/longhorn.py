"""Restores a backup of a Longhorn store to a raw image, by the layout's facts alone: names made of digests, a list of
blocks, bodies in gzip, LZ4 or plain. It shares nothing with the reader under test, neither code nor libraries.

    python3 longhorn.py STORE VOLUME BACKUP IMAGE
"""
import gzip
import hashlib
import json
import os
import subprocess
import sys


def named(text):
    """Half a SHA-512, in digits."""
    return hashlib.sha512(text).hexdigest()[:64]


def unpacked(method, body):
    if method == "gzip":
        return gzip.decompress(body)
    if method == "lz4":
        return subprocess.run(["lz4", "-d", "-c"], input=body, stdout=subprocess.PIPE, check=True).stdout
    return body


def block(folder, name, methods):
    with open(os.path.join(folder, "blocks", name[0:2], name[2:4], name + ".blk"), "rb") as file:
        body = file.read()
    for method in methods:
        try:
            found = unpacked(method, body)
        except (OSError, EOFError, subprocess.CalledProcessError):
            continue
        if named(found) == name:
            return found
    sys.exit(f"the block {name} is damaged")


def main(store, volume, backup, image):
    place = named(volume.encode())
    folder = os.path.join(store, "backupstore", "volumes", place[0:2], place[2:4], volume)
    with open(os.path.join(folder, "volume.cfg")) as file:
        size = int(json.load(file)["Size"])
    with open(os.path.join(folder, "backups", f"backup_{backup}.cfg")) as file:
        listed = json.load(file)
    # A block that an older backup stored keeps the method of that.
    own = listed.get("CompressionMethod") or "gzip"
    methods = [own] + [method for method in ("lz4", "gzip", "none") if method != own]
    with open(image, "wb") as to:
        for entry in listed["Blocks"] or []:
            to.seek(entry["Offset"])
            to.write(block(folder, entry["BlockChecksum"], methods))
        to.truncate(size)


main(*sys.argv[1:])
