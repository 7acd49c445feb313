#!/usr/bin/env python3
"""The same guest started twice over a thin, slow source: without a boot trace, and with the one that the first start left.

The source is nbdkit on the guest's raw disk behind its rate and delay filters (25 Mbit/s, 20 ms for each read). Measured: time
from the command to the login prompt, and reads of the guest that had to wait for the source.

usage: scripts/bench/second_boot.py [--aquifer BINARY] [--disk RAW] [--rate 25M] [--delay 20ms] [--factor 3] [--json FILE]
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIB = 1 << 20


class Site:
    """An installation of its own, whose traces nobody else has."""

    def __init__(self, aquifer, firmware, timeout, work):
        self.aquifer, self.firmware, self.timeout, self.work = aquifer, firmware, timeout, work
        self.environment = {**os.environ, "AQUIFER_HOME": str(work / "home"), "XDG_RUNTIME_DIR": str(work / "runtime")}

    def run(self, *args):
        done = subprocess.run([self.aquifer, "--json", *args], env=self.environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"aquifer {' '.join(args)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def session(self):
        return next(r for r in self.run("status", "guest") if r["type"] == "session")

    def boot(self, name, uri):
        """One recovery up to the login prompt; returns what it took."""
        began = time.monotonic()
        into = self.work / name
        self.run("recover", uri, "--into", str(into), "--name", "guest", "--firmware", self.firmware,
                 "--memory", "512MiB", "--cpus", "1", "--network", "none")
        log = into / "console.log"
        while not log.exists() or b"login:" not in log.read_bytes():
            if time.monotonic() - began > self.timeout:
                raise RuntimeError(f"no login prompt after {self.timeout} s: {log.read_bytes()[-500:]!r}")
            time.sleep(0.05)
        seconds = time.monotonic() - began
        disk = self.session()["disks"][0]
        result = {"seconds": seconds, "misses": disk["demand"]["misses"], "miss_bytes": disk["demand"]["miss_bytes"],
                  "replay": (disk.get("hydration") or {}).get("replay")}
        self.run("finalize", "guest", "--discard", "--yes")
        return result


def guest(out, firmware="bios"):
    """Makes the guest's raw disk."""
    subprocess.run([HERE.parent / "make-guest.sh", "--out", out, "--firmware", firmware, "--noise", "64"], check=True)


def both(disk, aquifer, firmware="bios", rate="25M", delay="20ms", timeout=600):
    """One start without a trace and one with it; what each took."""
    work = Path(tempfile.mkdtemp(prefix="aqb", dir="/var/tmp"))
    socket = work / "source.sock"
    source = subprocess.Popen(["nbdkit", "-f", "-r", "-U", socket, "--filter=rate", "--filter=delay", "file", disk,
                               f"rate={rate}", f"rdelay={delay}"])
    try:
        end = time.monotonic() + 30
        while not socket.exists():
            if source.poll() is not None or time.monotonic() > end:
                raise RuntimeError("nbdkit does not serve")
            time.sleep(0.05)
        site, uri = Site(aquifer, firmware, timeout, work), f"nbd+unix:///?socket={socket}"
        return {"rate": rate, "delay": delay, "without": site.boot("first", uri), "with": site.boot("second", uri)}
    finally:
        source.send_signal(signal.SIGTERM)
        source.wait()
        shutil.rmtree(work, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description="A second start of the same guest, with its boot trace.")
    parser.add_argument("--aquifer", default=os.environ.get("AQUIFER_BIN", str(HERE.parents[1] / "target/release/aquifer")))
    parser.add_argument("--disk", help="the guest's raw disk; made by make-guest.sh where none is named")
    parser.add_argument("--firmware", default="bios", choices=["bios", "uefi"])
    parser.add_argument("--rate", default="25M", help="bits each second, as nbdkit takes it")
    parser.add_argument("--delay", default="20ms")
    parser.add_argument("--factor", type=float, default=3, help="fail below this many times fewer misses")
    parser.add_argument("--timeout", type=int, default=600)
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aqb", dir="/var/tmp") as folder:
        disk = options.disk or str(Path(folder) / "disk.raw")
        if not options.disk:
            guest(disk, options.firmware)
        found = both(disk, options.aquifer, options.firmware, options.rate, options.delay, options.timeout)
    for name in ("without", "with"):
        row = found[name]
        print(f"{name:<8} the trace: login after {row['seconds']:6.1f} s, {row['misses']:5d} reads waited "
              f"({row['miss_bytes'] / MIB:.1f} MiB), replayed {row['replay']}")
    factor = found["without"]["misses"] / max(1, found["with"]["misses"])
    sooner = found["without"]["seconds"] / found["with"]["seconds"]
    print(f"{factor:.1f} times fewer misses (>= {options.factor}), login {sooner:.2f} times as soon")
    if options.json:
        Path(options.json).write_text(json.dumps(found) + "\n")
    sys.exit(0 if factor >= options.factor else 1)


if __name__ == "__main__":
    main()
