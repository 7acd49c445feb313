#!/usr/bin/env python3
"""Folds what tests counted (JSON lines, see tests/src/ledger.rs) into docs/proofs.md.

usage: scripts/proofs.py SHORT.jsonl [LONG.jsonl] > docs/proofs.md
The second file is of the long form (AQUIFER_TEST_SCALE above 1, scripts/fuzz.py), where that was run.
"""
import json
import subprocess
import sys

WHAT = {
    "crash states in memory": "Random lives of an overlay cut at every write and sync, with any subset of what was not synced lost or torn at 512 bytes; recovery cut in the same way. Each state is recovered by the real code and compared sector by sector.",
    "calls failed in memory": "Every read, write, punch, reserve and sync of a history fails once: EIO, ENOSPC, EINTR, half a write. Then the next process, and a loss of power.",
    "damages of an overlay": "A bit in every byte that map and journal say, and in a sample of the guest's bytes; ends cut off.",
    "damages of a native layer": "Bits flipped all over a sealed layer; whole blocks put in the place of others; blocks and whole layers of an older time put back; ends cut off or blank, and what is salvaged then.",
    "crash images of a guest's file system": "ext4, XFS and Btrfs on a served overlay under a loop device; the power is cut at syncs and between; our recovery, then theirs: every synced file is there, and their own checker is content.",
    "crash images of a host's file system": "An overlay on ext4, XFS and Btrfs whose writes QEMU logs; the power is cut at flushes and between, with any subset of what was not flushed; their recovery, then ours.",
    "crashes of a repository": "The real calls of real processes that back up, forget and sweep: the power is cut at each of them, with any subset of bytes and names that were not synced lost or torn; processes killed, the next one too; what was announced is there, nothing by half, and the next job goes on.",
    "calls of a repository failed": "Every call of such a process that makes something durable, and a part of the others, fails once; then the next process, and a loss of power.",
    "kills while serving, hydrating and resuming": "kill -9 of a process that writes beside a hydrator, and of the processes that resume it.",
    "kills while draining and handing over": "kill -9 around the pivot, twice on each overlay.",
    "kills of a backup of images": "kill -9 of the command, the worker or the service that backs images up: after each kill every listed point of both repositories is compared with what the disk was, none is missing and none is there twice, and the run ends well in other hands.",
    "kills of a backup of a running machine": "The same of a machine that QEMU runs, read by its bitmaps; QEMU itself is killed as well, and the command together with the guard that clears up after it. The machine's own disk is compared, too.",
    "kills of a copy": "The same of a copy into another repository with other blocks.",
    "kills of a health check": "The same of a check that can repair from the other repository.",
    "kills of retention": "The same in the moments after a new point was made, while older ones are given up, merged and deleted.",
    "kills of a replication from backups": "Two kills in each round, of whoever makes a replica from two repositories in turn: after each, every point of the replica is compared with what production was then; then the run ends well, and its newest point is the newest backup.",
    "kills of a replication from production": "The same of a replica that is made of production itself.",
    "kills of takeovers and ways home": "Takeover or planned takeover, failback, change of sides, commit or undo: in each step whoever carries it out is killed (the command, a worker, the service), or every machine is; the replica has a way on after each, the command typed again leads to its end, both sides are equal, and every restore point is what it was.",
    "kills of takeovers made final": "The same while a takeover is made final: one image is left, and it holds what the machine had.",
    "outages under a writing client": "The source falls silent or dies under a client that writes, flushes and reads back: no error, parked reads are listed and answered by themselves, and all that is fetched a second time is what a reader asked for beside the copy, or what was on its way when the server died.",
    "fuzzing": "Mutated seeds for every parser of foreign bytes, in a process of bounded memory, with a bound on time for each input.",
    "planted bugs": "Bugs compiled in behind a feature of the tests, each of which the tests above must catch.",
}


def fold(path):
    """Sums of counts, seeds and seconds for each proof, in order of first appearance."""
    out = {}
    for line in open(path, encoding="utf-8"):
        entry = json.loads(line)
        if "target" in entry:
            continue
        proof = out.setdefault(entry["proof"], {"counts": {}, "seeds": [], "seconds": 0.0, "runs": 0})
        for name, count in entry["counts"].items():
            proof["counts"][name] = proof["counts"].get(name, 0) + count
        if entry["seeds"] not in proof["seeds"]:
            proof["seeds"].append(entry["seeds"])
        proof["seconds"] += entry["seconds"]
        proof["runs"] += 1
    return out


def table(folded):
    rows = ["| Proof | Counts | Seeds | Seconds |", "|---|---|---|---|"]
    order = [name for name in WHAT if name in folded] + [name for name in folded if name not in WHAT]
    for name in order:
        proof = folded[name]
        counts = ", ".join(f"{count:,} {what}" for what, count in proof["counts"].items())
        if proof["runs"] > 1:
            counts += f" in {proof['runs']} runs"
        rows.append(f"| {name} | {counts} | {', '.join(proof['seeds'])} | {proof['seconds']:.0f} |")
    return "\n".join(rows)


def fuzzed(paths):
    """The runs under libFuzzer, one row for each target: sums over runs, the highest of memory, the last of coverage."""
    targets = {}
    for entry in (json.loads(line) for path in paths for line in open(path, encoding="utf-8")):
        if "target" in entry:
            targets.setdefault(entry["target"], []).append(entry)
    if not targets:
        return None
    rows = ["| Target | Executions | Wall seconds | Processor seconds | Peak memory, MiB | Edges | Inputs | Findings | Commits |",
            "|---|---|---|---|---|---|---|---|---|"]
    for name, runs in sorted(targets.items()):
        total = lambda key: sum(run[key] for run in runs)
        cells = [name, f"{sum(run['counts']['executions'] for run in runs):,}", f"{total('seconds'):,.0f}",
                 f"{total('cpu_seconds'):.0f}", f"{max(run['peak_rss_bytes'] for run in runs) / (1 << 20):.0f}",
                 f"{runs[-1]['edges']:,}", f"{runs[-1]['corpus']:,}", str(total("findings")),
                 ", ".join(dict.fromkeys(run["commit"] for run in runs))]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    short = fold(sys.argv[1])
    print("# Proofs\n")
    print("Generated by `make proofs`; do not edit. What the tests looked at, counted by the tests themselves. A test that")
    print("finds a violation fails, so every figure stands for that many cases without one. The seconds are wall time on a")
    print("machine that may have had other work.\n")
    print(f"Commit {commit}.\n")
    print("## In every run of `make test`\n")
    print(table(short) + "\n")
    if len(sys.argv) > 2:
        print("## Long form\n")
        print(table(fold(sys.argv[2])) + "\n")
    if table_of_targets := fuzzed(sys.argv[1:]):
        print("## Fuzz targets under libFuzzer\n")
        print("`make fuzz-long`. Side by side on few processors the targets share them, hence both times.\n")
        print(table_of_targets + "\n")
    print("## What each of them does\n")
    for name, what in WHAT.items():
        print(f"- **{name}**: {what}")
    print("\n## To repeat one\n")
    print("`AQUIFER_TEST_SCALE` multiplies the cases (100 gives 10^8 crash states, 30 gives 3,000 images, 9 gives 2,000 kills);")
    print("`AQUIFER_TEST_SEED` names the first seed, so that parts of a long form differ; a failure prints seed, point and cut. Lines of")
    print("counts go to the file that `AQUIFER_LEDGER` names.")


if __name__ == "__main__":
    main()
