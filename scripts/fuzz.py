#!/usr/bin/env python3
"""Runs the fuzz targets under libFuzzer, and tells the ledger what they did.

usage: scripts/fuzz.py [--seconds N] [--memory MiB] [--timeout S] [--parallel N] [--keep] [TARGET ...]

Builds with coverage on the stable compiler (cargo-fuzz, installed where it is missing; no sanitizer needs nightly
then), begins with the seeds of each target and with the committed corpora, and works in target/fuzz. A finding
stays in target/fuzz/artifacts/TARGET and makes the exit code 1; the other targets run to their end.
  --seconds N    wall time of each target (1800)
  --memory MiB   resident memory of a target, and a third of its address space (512)
  --timeout S    wall time that one input may take (60)
  --parallel N   targets side by side (the number of processors)
  --keep         put the minimised corpora into fuzz/corpora, as far as they are small
Interrupted (Ctrl-C, SIGTERM), it ends the targets in order and still tells what was done.
"""
import argparse
import collections
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "fuzz"
BUILT = ROOT / "fuzz" / "target" / "x86_64-unknown-linux-gnu" / "release"
CORPORA = ROOT / "fuzz" / "corpora"
MIB = 1 << 20
# Largest input and largest corpus (packed) that are worth a place in the repository, bytes.
KEPT_INPUT_MAX = 64 << 10
KEPT_CORPUS_MAX = 96 << 10


def run(*words, **how):
    return subprocess.run(words, cwd=ROOT, check=True, **how)


def build():
    if shutil.which("cargo-fuzz") is None:
        run("cargo", "install", "--locked", "cargo-fuzz")
    run("cargo", "fuzz", "build", "--sanitizer", "none")
    run("cargo", "build", "--quiet", "-p", "aquifer-tests", "--bin", "fuzz-seeds")


def seeder():
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug" / "fuzz-seeds"


def prepare(target):
    """The folders of a target, with its seeds and what was kept of earlier runs."""
    folder = WORK / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (WORK / "artifacts" / target).mkdir(parents=True, exist_ok=True)
    seeds = WORK / "seeds" / target
    shutil.rmtree(seeds, ignore_errors=True)
    run(seeder(), target, seeds, stdout=subprocess.DEVNULL)
    kept = CORPORA / f"{target}.tar.gz"
    if kept.exists():
        run("tar", "-xzf", kept, "-C", seeds)
    return folder, seeds


class Run:
    """One target at work."""

    def __init__(self, target, args):
        self.target, self.began, self.commit = target, time.monotonic(), commit()
        corpus, seeds = prepare(target)
        self.log = WORK / f"{target}.log"
        words = [BUILT / target, corpus, seeds, f"-max_total_time={args.seconds}", f"-rss_limit_mb={args.memory}",
                 f"-malloc_limit_mb={args.memory}", f"-timeout={args.timeout}", f"-seed={args.seed}",
                 f"-artifact_prefix={WORK / 'artifacts' / target}/", "-print_final_stats=1", "-reload=0",
                 f"-max_len={KEPT_INPUT_MAX}"]
        space = 3 * args.memory * MIB

        def bounded():
            resource.setrlimit(resource.RLIMIT_AS, (space, space))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=bounded)

    def ended(self, status, usage, seed):
        """What it did, for the ledger; whether it found something."""
        said = self.log.read_text(errors="replace")
        stat = lambda name: int((re.findall(rf"stat::{name}:\s+(\d+)", said) or [0])[-1])
        executions = stat("number_of_executed_units") or int((re.findall(r"^#(\d+)", said, re.M) or [0])[-1])
        covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", said) or [(0, 0, 0)]
        code = os.waitstatus_to_exitcode(status)
        line = {
            "proof": "fuzzing by coverage", "target": self.target, "seeds": str(seed), "commit": self.commit,
            "seconds": round(time.monotonic() - self.began, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1), "peak_rss_bytes": usage.ru_maxrss * 1024,
            "counts": {"executions": executions}, "edges": int(covered[-1][0]), "corpus": int(covered[-1][2]),
            "findings": int(code != 0),
        }
        if code:
            print(f"{self.target}: ended with {code}; see {self.log} and {WORK}/artifacts/{self.target}")
            print("\n".join(said.splitlines()[-25:]))
        return line


def commit():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def fuzz(targets, args):
    """Runs them all, so many at a time; the lines for the ledger."""
    waiting, running, lines, stop = collections.deque(targets), {}, [], []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(1) or [r.process.send_signal(signal.SIGINT) for r in running.values()])
    while running or (waiting and not stop):
        while waiting and len(running) < args.parallel and not stop:
            begun = Run(waiting.popleft(), args)
            running[begun.process.pid] = begun
        # The children's own usage, which only whoever waits for them is told.
        pid, status, usage = os.wait4(-1, 0)
        if (done := running.pop(pid, None)) is None:
            continue
        line = done.ended(0 if stop else status, usage, args.seed)
        lines.append(line)
        print(json.dumps(line), flush=True)
        ledger = os.environ.get("AQUIFER_LEDGER")
        if ledger:
            with open(ledger, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    return lines


def keep(target):
    """Packs the smallest inputs that together cover what the corpus of a target covers, the small ones of them."""
    corpus, seeds, small = WORK / "corpus" / target, WORK / "seeds" / target, WORK / "minimised" / target
    shutil.rmtree(small, ignore_errors=True)
    small.mkdir(parents=True)
    subprocess.run([BUILT / target, "-merge=1", "-timeout=600", f"-max_len={KEPT_INPUT_MAX}", small, corpus], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # What was found once, and is repaired by now, stays an input of every test.
    for kind in ("crash", "oom", "timeout"):
        for found in (WORK / "artifacts" / target).glob(f"{kind}-*"):
            shutil.copy(found, small)
    inputs = sorted((path for path in small.iterdir() if path.stat().st_size <= KEPT_INPUT_MAX), key=lambda p: (p.stat().st_size, p.name))
    CORPORA.mkdir(exist_ok=True)
    packed = CORPORA / f"{target}.tar.gz"
    always = [path for path in inputs if path.name.startswith(("crash-", "oom-", "timeout-"))]
    inputs = [path for path in inputs if path not in always]
    while inputs or always:
        names = "\n".join(sorted(path.name for path in always + inputs))
        run("tar", "-C", small, "--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "-czf", packed,
            "--files-from=-", input=names.encode())
        size = packed.stat().st_size
        if size <= KEPT_CORPUS_MAX or not inputs:
            break
        inputs = inputs[: int(len(inputs) * min(0.9, KEPT_CORPUS_MAX / size))]
    print(f"{target}: {len(always) + len(inputs)} inputs kept of {len(list(small.iterdir()))}, {packed.stat().st_size} bytes; seeds {len(list(seeds.iterdir()))}")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--seconds", type=int, default=1800)
    parser.add_argument("--memory", type=int, default=512)
    parser.add_argument("--timeout", type=int, default=60)
    parser.add_argument("--parallel", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("targets", nargs="*")
    args = parser.parse_args()
    if not args.no_build:
        build()
    every = run(seeder(), capture_output=True, text=True).stdout.split()
    targets = args.targets or every
    if unknown := set(targets) - set(every):
        sys.exit(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    lines = fuzz(targets, args) if args.seconds else []
    if args.keep:
        for target in targets:
            keep(target)
    sys.exit(any(line["findings"] for line in lines) or len(lines) < len(targets) * bool(args.seconds))


if __name__ == "__main__":
    main()
