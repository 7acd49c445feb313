#!/usr/bin/env python3
"""Measures every row of the budget against its peer on this machine and writes docs/benchmarks.md with its charts.

Usage: main.py [--docs DIR] [GROUP ...]
Groups: depth cold hot sequential fuse write hydration latency aggressor trace backup wide memory doors replica foreign; all of them if none is named.

Named groups replace their own rows of an earlier run and leave the others. AQUIFER_BENCH_DIR holds the disks that are
read (made once, 9 GB), AQUIFER_BENCH_SCRATCH what is written, AQUIFER_BENCH_ROUNDS how often each side runs (3),
AQUIFER_BIN the program. On a machine that others use, `--priority 15` gives the whole run that much precedence over
their sessions (0 to 19, as root); the page says so.
"""
import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import corpus  # noqa: E402
import page  # noqa: E402
import rows  # noqa: E402
import table  # noqa: E402
from servers import AQUIFER, machine  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(os.environ.get("AQUIFER_BENCH_DIR", "/var/tmp/aquifer-bench"))


def about(runs, strangers):
    when = sorted(f"{run['at']}, {run['groups']}: load average {run['load']}" +
                  (f", {run['rounds']} rounds" if run["rounds"] else "") +
                  (f", precedence {run['priority']} over other sessions" if run["priority"] else "") for run in runs)
    return [f"Machine: {machine()}.", "",
            f"Command: `make bench`, or `scripts/bench/main.py GROUP ...` for a part; each side as often as its run says, once where a side",
            f"takes more than {table.LONG_SECONDS} s. Over all rows others took {strangers:.0%} of the machine. Runs:", "",
            *(f"- {line}" for line in when), "",
            "Disks: `mix`, 4 GiB with 40 % used (a Debian tree, half-random and random blocks); `tree`, a Debian tree alone; a chain of 129 qcow2",
            "files, and the same as native points; 1 TiB virtual with 100 increments. `scripts/bench/corpus.py` makes them, `scripts/bench/rows.py`",
            "holds each command. Files are in the page cache of both sides unless a row says otherwise; all writes end in a sync."]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--docs", type=Path, default=ROOT / "docs")
    options.add_argument("--priority", type=int, default=0)
    options.add_argument("groups", nargs="*", metavar="GROUP", choices=[[], *rows.GROUPS])
    chosen = options.parse_args()
    if not os.access(AQUIFER, os.X_OK):
        sys.exit(f"{AQUIFER} is not there: make build")
    if chosen.priority:
        # Sessions are scheduled against each other first; a process's own niceness counts only inside its session.
        Path("/proc/self/autogroup").write_text(str(-chosen.priority))
        os.nice(-chosen.priority)
    groups = chosen.groups or list(rows.GROUPS)
    corpus.prepare(WORK)
    store = WORK / "rows.json"

    def earlier():
        return {entry["key"]: entry for entry in json.loads(store.read_text())} if store.exists() else {}

    if not chosen.groups:
        store.unlink(missing_ok=True)
    for key in groups:
        before = os.getloadavg()
        del table.ROWS[:], table.FAILED[:]
        started = time.strftime("%Y-%m-%d %H:%M")
        try:
            rows.GROUPS[key](WORK)
        except Exception as error:  # for example a corpus that cannot be made
            table.lost(key, "the group", error)
        load = f"{before[0]:.1f} to {os.getloadavg()[0]:.1f}"
        # Read again: another run may have measured other groups meanwhile.
        old = earlier()
        old[key] = {"key": key, "at": started, "load": load, "priority": chosen.priority, "rounds": table.ROUNDS, "rows": list(table.ROWS), "failed": list(table.FAILED)}
        entries = [old[k] for k in rows.GROUPS if k in old]
        # After each group, so that an interruption loses one group only.
        store.write_text(json.dumps(entries, indent=1))
        every = [row for entry in entries for row in entry["rows"]]
        failed = [row for entry in entries for row in entry["failed"]]
        strangers = sum(r["strangers"] for r in every) / max(len(every), 1)
        runs = [{"at": e["at"], "groups": e["key"], "load": e["load"], "priority": e["priority"], "rounds": e.get("rounds")} for e in entries]
        page.write(chosen.docs, every, failed, about(runs, strangers))
        for data in (WORK / f"{name}.json" for name in old):
            if data.exists():
                shutil.copy(data, chosen.docs / "benchmarks" / data.name)
    missed = [r for k in groups for r in old[k]["rows"] if r["met"] is False]
    print(f"{len(missed)} budgets missed, {sum(len(old[k]['failed']) for k in groups)} rows not measured; {chosen.docs}/benchmarks.md")


if __name__ == "__main__":
    main()
