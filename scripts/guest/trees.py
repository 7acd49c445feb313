"""Compares two folders as a backup tool must: every name, kind, mode, owner, size and byte."""

import hashlib
import os
import stat


def describe(root, skip):
    """Everything below `root`, by relative path."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if os.path.relpath(os.path.join(folder, name), root) not in skip]
        for name in folders + files:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root)
            if relative not in skip:
                found[relative] = entry(path)
    return found


def entry(path):
    meta = os.lstat(path)
    kind = stat.S_IFMT(meta.st_mode)
    owner = (meta.st_uid, meta.st_gid)
    if stat.S_ISLNK(meta.st_mode):
        return ("link", owner, os.readlink(path))
    if stat.S_ISREG(meta.st_mode):
        return ("file", owner, stat.S_IMODE(meta.st_mode), meta.st_size, digest(path))
    return (oct(kind), owner, stat.S_IMODE(meta.st_mode))


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare(expected, actual, skip=()):
    """Returns (how many are equal, bytes in files, differences)."""
    want, have = describe(expected, set(skip)), describe(actual, set(skip))
    differences = []
    for path in sorted(want.keys() | have.keys()):
        if want.get(path) != have.get(path):
            differences.append(f"{path}: expected {want.get(path)}, found {have.get(path)}")
    total = sum(item[3] for item in have.values() if item[0] == "file")
    return len(want) - len(differences), total, differences
