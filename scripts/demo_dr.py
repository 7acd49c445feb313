#!/usr/bin/env python3
"""A disaster and the way home, in one run, from one configuration file.

A Debian kernel with a small user space runs on the host `prod`. `aquifer serve` backs it up on schedule while it changes
files. Its replica on the host `dr` is built from the backups while production's disks are out of reach. Production is
lost; `failover` boots the replica at an older point; the guest writes. Production comes back, different. `failback` brings
home exactly the blocks that differ, in two passes; that is taken back once, and made once more; `commit`; and the next
replication run is incremental. Every disk is compared byte for byte at each stage, by QEMU's own tools and by counting
blocks; the report says how many bytes were different and how many were moved.

usage: scripts/demo_dr.py --aquifer BINARY [--work DIR] [--noise MIB] [--keep] [--transcript FILE] [--report FILE]
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
sys.path.insert(0, os.path.join(HERE, "guest"))

import demo  # noqa: E402
import drive  # noqa: E402

MIB, GRAIN = 1 << 20, 4096
SIZE_MIB = 512
RATIO_MAX = 1.05
BOOT_TIMEOUT = 400

SITE = """version = 1
[repository]
nas = {{ url = "{work}/nas", default = true }}
[host]
prod = {{ kind = "qemu", images = "{work}/prod/images", runtime = "{work}/prod/run" }}
dr = {{ kind = "qemu", images = "{work}/dr/images", runtime = "{work}/dr/run" }}
[machine]
guest = {{ from = "prod:guest" }}
[job.backup]
kind = "backup"
machines = ["guest"]
to = "nas"
schedule = {{ cron = "*/{every} * * * * *" }}
retry = {{ count = 0 }}
[job.replica]
kind = "replication"
machines = ["guest"]
source = {{ from = "backup", repositories = ["nas"], catch_up = "all" }}
target = {{ host = "dr" }}
restore_points_to_keep = 50
block_size = "64KiB"
"""

MACHINE = """version = 1
name = "guest"
firmware = "bios"
cpus = 1
memory = "512MiB"
[[disk]]
name = "vda"
bus = "virtio"
"""


class Dr(demo.Demo):
    def __init__(self, options):
        super().__init__(options)
        self.environment = dict(os.environ, AQUIFER_HOME=self.path("home"), AQUIFER_CONFIG=self.path("site.toml"))
        self.environment.pop("AQUIFER_REPO", None)
        self.machine, self.serve = None, None
        self.figures = {}

    # small things

    def records(self, *args, kind=None, codes=(0, 1)):
        done = subprocess.run(
            [self.options.aquifer, "--json", *args], env=self.environment, cwd=self.work, capture_output=True, text=True
        )
        records = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode not in codes:
            raise SystemExit(f"aquifer {' '.join(args)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return [record for record in records if kind is None or record["type"] == kind]

    def does(self, *args):
        """An operation on the replica; returns what it reports."""
        self.say("$ aquifer " + " ".join(args))
        (report,) = self.records(*args, kind="replica")
        text = f"{report['replica']} is {report['state']}"
        for name in ("first", "second"):
            if report.get(name):
                text += f"; {name} pass: {report[name]['bytes_written'] / MIB:.2f} MiB sent"
        self.say("  " + text)
        return report

    def image(self, *parts):
        return self.path(*parts)

    def layers(self):
        """The replica's layers of the disk, oldest first."""
        folder = self.path("dr", "images", "guest_replica", "vda")
        numbers = sorted(int(name.split(".")[0]) for name in os.listdir(folder) if re.fullmatch(r"\d+\.qcow2", name))
        return [os.path.join(folder, f"{number}.qcow2") for number in numbers]

    def same(self, a, b, text):
        """Two images hold the same bytes, by QEMU's own tool."""
        done = subprocess.run(["qemu-img", "compare", "-U", *a, *b], capture_output=True, text=True)
        self.expect(done.returncode == 0, f"{text}: byte for byte the same" + ("" if done.returncode == 0 else f" ({done.stdout.strip()})"))

    def raw(self, image, name):
        out = self.path(name)
        subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, out], check=True)
        return out

    def different(self, before, after):
        """Bytes in blocks of 4 KiB that differ, and of these, bytes that are not zeros afterwards."""
        zero, all_, data = bytes(GRAIN), 0, 0
        with open(before, "rb") as old, open(after, "rb") as new:
            while True:
                a, b = old.read(MIB), new.read(MIB)
                if not a and not b:
                    return all_, data
                if a == b:
                    continue
                for at in range(0, max(len(a), len(b)), GRAIN):
                    if a[at:at + GRAIN] != b[at:at + GRAIN]:
                        all_ += GRAIN
                        data += GRAIN if b[at:at + GRAIN] != zero else 0

    # the story

    def run(self):
        began = time.monotonic()
        self.make_site()
        self.protect()
        self.lose_the_site()
        self.take_over()
        self.come_home()
        self.take_back_and_come_home_again()
        self.go_on()
        self.report["in all"] = f"{time.monotonic() - began:.0f} s"
        self.print_report()

    def make_site(self):
        self.step("A site of two hosts in one file; a real guest on the first")
        subprocess.run(
            [os.path.join(HERE, "make-guest.sh"), "--out", self.path("disk.raw"), "--firmware", "bios",
             "--size", str(SIZE_MIB), "--noise", str(self.options.noise)],
            check=True,
        )
        for folder in ("prod/images/guest", "prod/run/guest", "dr/images", "dr/run"):
            os.makedirs(self.path(folder))
        self.vda = self.path("prod", "images", "guest", "vda.qcow2")
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.path("disk.raw"), self.vda], check=True)
        os.remove(self.path("disk.raw"))
        with open(self.path("prod", "images", "guest", "machine.toml"), "w") as file:
            file.write(MACHINE)
        with open(self.path("site.toml"), "w") as file:
            file.write(SITE.format(work=self.work, every=self.options.every))
        self.aquifer("config", "check")
        self.aquifer("-r", "nas", "init")
        self.start_production()

    def start_production(self):
        run = self.path("prod", "run", "guest")
        args = ["qemu-system-x86_64", "-nodefaults", "-machine", "q35", "-accel", drive.accelerator(), "-m", "512"]
        args += ["-display", "none", "-no-reboot", "-pidfile", self.path("prod", "images", "guest", "qemu.pid")]
        args += ["-qmp", f"unix:{run}/qmp.sock,server=on,wait=off"]
        args += ["-blockdev", f"driver=qcow2,node-name=disk0,discard=unmap,file.driver=file,file.filename={self.vda}"]
        args += ["-device", "virtio-blk-pci,drive=disk0,id=dev0,bootindex=0"]
        args += ["-serial", f"unix:{run}/console.sock,server=on,wait=off"]
        self.machine = subprocess.Popen(args)
        self.console = drive.Console(f"{run}/console.sock")
        self.console.log_in(BOOT_TIMEOUT)
        self.say("  production runs: " + self.console.run("cat /proc/version").split(" (")[0])

    def points(self):
        return self.records("points", "guest", kind="point", codes=(0, 1, 2))

    def protect(self):
        self.step(f"`aquifer serve` backs the running guest up every {self.options.every} s; it changes files meanwhile")
        self.say("$ aquifer serve &")
        log = open(self.path("serve.log"), "w")
        self.serve = subprocess.Popen([self.options.aquifer, "serve"], env=self.environment, cwd=self.work, stdout=log, stderr=log)
        self.rounds, self.layer_of = {}, {}
        for number in (0, 1, 2, 3):
            if number:
                self.console.run(f"churn / {number}")
            have = len(self.points())
            # A run that began before this round may hold half of it; the one after holds it all.
            self.wait(lambda: len(self.points()) >= have + 2, "two more points", 240)
            if number == 0:
                self.step("After each round: the replica, from the backups alone, with production's disks out of reach")
            self.replicate_without_production(number)
        self.serve.send_signal(signal.SIGTERM)
        self.serve.wait(timeout=60)
        self.serve = None
        self.aquifer("points", "guest")
        self.report["restore points, made by the schedule"] = str(len(self.points()))

    def replicate_without_production(self, number):
        self.aquifer("jobs", "backup", "--pause", show=False)
        self.wait(lambda: not [s for s in self.records("sessions", kind="session") if not s["ended"]], "the end of a backup", 120)
        newest = self.points()[-1]["point"]
        self.rounds[newest] = number
        os.rename(self.path("prod", "images"), self.path("prod", "out-of-reach"))
        self.say(f"  round {number} is in point {newest[:13]}; mv prod/images prod/out-of-reach")
        session = self.run_job("replica")
        os.rename(self.path("prod", "out-of-reach"), self.path("prod", "images"))
        read = session["progress"]["bytes_read_production"]
        self.expect(read == 0, "0 bytes were read from production")
        self.layer_of[newest] = self.layers()[-1]
        self.same(self.exported(newest), ["-F", "qcow2", self.layers()[-1]], f"replica and backup at {newest[:13]}")
        if number:
            self.figures.setdefault("replication_moved", []).append(session["progress"]["bytes_written"])
        self.aquifer("jobs", "backup", "--resume", show=False)

    def wait(self, look, what, timeout):
        deadline = time.monotonic() + timeout
        while not look():
            if time.monotonic() > deadline:
                raise SystemExit(f"not within {timeout} s: {what}")
            time.sleep(0.3)

    def exported(self, point):
        out = self.path("export.raw")
        if os.path.exists(out):
            os.remove(out)
        self.aquifer("export", f"guest@{point}:vda", out, show=False)
        return ["-f", "raw", out]

    def run_job(self, job):
        self.say(f"$ aquifer run {job}")
        session = self.records("run", job, kind="session")[-1]
        self.say(f"  session {session['id']}: {session['result']}, {session['progress']['bytes_written'] / MIB:.1f} MiB written")
        return session

    def lose_the_site(self):
        self.step("The site is lost")
        self.console.run("(churn / 9; sync) > /dev/null 2>&1")
        self.machine.kill()
        self.machine.wait()
        os.rename(self.path("prod", "images"), self.path("prod", "out-of-reach"))
        self.say(f"$ kill -9 {self.machine.pid}; mv prod/images prod/out-of-reach    # with writes that no backup has")

    def take_over(self):
        wanted = next(point for point, number in self.rounds.items() if number == 2)
        time_of = next(point["created"] for point in self.points() if point["point"] == wanted)
        self.step("Fail over, to an older point: round 2, before the last one went wrong")
        began = time.monotonic()
        report = self.does("failover", "guest_replica", "--to", time_of, "--reason", "the site is lost")
        self.report["command to running replica"] = f"{time.monotonic() - began:.1f} s"
        self.point_layer = self.layer_of[wanted]
        self.console = self.log_in(report["console"])
        self.report["command to login prompt"] = f"{time.monotonic() - began:.1f} s"
        last = self.console.run("cat /etc/last-round").strip()
        self.expect(last == "2", f"the replica's guest is at round {last}")
        self.same(self.exported(wanted), ["-F", "qcow2", self.point_layer], "the chosen point, which the guest runs above")
        self.console.run("churn / 3; churn / 4; sync")
        self.say("  it wrote rounds 3 and 4 of its own")

    def log_in(self, path):
        console = drive.Console(path)
        console.socket.sendall(b"\n")
        console.log_in(BOOT_TIMEOUT)
        return console

    def come_home(self):
        self.step("Production comes back, and is different; failback compares and sends, while the replica serves")
        os.rename(self.path("prod", "out-of-reach"), self.path("prod", "images"))
        for command in ("write -P 0x5a 300M 3M", "write -z 310M 1M"):
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, self.vda], check=True, stdout=subprocess.DEVNULL)
        before = self.raw(self.vda, "production-before.raw")
        report = self.does("failback", "guest_replica", "--yes")
        frozen = self.layers()[-2]
        after = self.raw(frozen, "replica-frozen.raw")
        all_, data = self.different(before, after)
        moved = report["first"]["bytes_written"]
        self.figures["pass_1"] = {"different": all_, "different_not_zero": data, "moved": moved}
        self.report["first pass: bytes different, moved"] = f"{all_}, {moved}"
        self.expect(moved == data, f"{moved} bytes were sent: every block that differs and is not zeros, and no other")
        self.same(["-f", "qcow2", frozen], ["-F", "qcow2", self.vda], "production and the replica as it was when the pass began")
        self.console.run("churn / 5; sync")
        self.say("  the replica's guest wrote round 5 meanwhile")
        report = self.change_sides("--no-start")
        self.second_pass(report, after, "second pass")
        self.expect(self.production_pid() is None, "production is off, so that it can be compared")
        self.same(["-f", "qcow2", self.layers()[-1]], ["-F", "qcow2", self.vda], "production and the replica's last state")

    def change_sides(self, *more):
        self.say("$ aquifer failback guest_replica --switch now " + " ".join(more))
        records = self.records("failback", "guest_replica", "--switch", "now", "--grace", "60s", "--yes", *more)
        for record in records:
            if record["type"] == "estimate":
                self.say(f"  estimate before anything is turned off: at most {record['bytes'] / MIB:.2f} MiB to send")
        (report,) = [record for record in records if record["type"] == "replica"]
        self.say(f"  {report['replica']} is {report['state']}; second pass: {report['second']['bytes_written'] / MIB:.2f} MiB sent")
        return report

    def second_pass(self, report, before, name):
        last = self.raw(self.layers()[-1], "replica-last.raw")
        all_, _ = self.different(before, last)
        moved = report["second"]["bytes_written"]
        ratio = moved / all_ if all_ else 0.0
        self.figures.setdefault("pass_2", []).append({"changed": all_, "moved": moved, "ratio": ratio})
        self.report[f"{name}: bytes changed, moved"] = f"{all_}, {moved} ({ratio:.3f} x)"
        self.expect(moved <= RATIO_MAX * all_, f"{moved} bytes were sent for {all_} that had changed")

    def production_pid(self):
        try:
            with open(self.path("prod", "images", "guest", "qemu.pid")) as file:
                pid = int(file.read())
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                return pid if self.work.encode() in file.read() else None
        except (OSError, ValueError):
            return None

    def take_back_and_come_home_again(self):
        self.step("Take that back: the replica serves again; then come home for good")
        report = self.does("undo", "guest_replica", "--yes")
        console = self.log_in(report["console"])
        last = console.run("cat /etc/last-round").strip()
        self.expect(last == "5", f"the replica's guest is back, at round {last}")
        report = self.does("failback", "guest_replica", "--yes")
        self.report["first pass of the second way home"] = f"{report['first']['bytes_written']} bytes moved"
        frozen = self.raw(self.layers()[-2], "replica-frozen.raw")
        self.same(["-f", "qcow2", self.layers()[-2]], ["-F", "qcow2", self.vda], "production and the replica as it was when the pass began")
        console.run("churn / 6; sync")
        report = self.change_sides()
        self.second_pass(report, frozen, "second pass of the second way home")
        downtime = report["downtime_ms"] / 1000
        self.figures["downtime_s"] = downtime
        self.report["downtime, from the stop to production's start"] = f"{downtime:.1f} s, the guest's own shutdown in it"
        console = self.log_in(report["console"])
        last = console.run("cat /etc/last-round").strip()
        self.expect(last == "6", f"production runs, at round {last}")
        self.console = console
        self.does("commit", "guest_replica", "--yes")

    def go_on(self):
        self.step("Protection goes on: the next backup, and a replication run that is incremental")
        self.console.run("churn / 7; sync")
        self.run_job("backup")
        before = self.raw(self.layers()[-1], "replica-last.raw")
        session = self.run_job("replica")
        written, read = session["progress"]["bytes_written"], session["progress"]["bytes_read_production"]
        point = self.points()[-1]["point"]
        newest = self.layers()[-1]
        self.same(self.exported(point), ["-F", "qcow2", newest], "the replica's newest point and the backup")
        all_, _ = self.different(before, self.raw(newest, "replica-newest.raw"))
        self.report["next replication: bytes changed, moved"] = f"{all_}, {written}; {read} read from production"
        self.expect(written < SIZE_MIB * MIB // 8 and read == 0, f"incremental: {written / MIB:.1f} MiB of {SIZE_MIB} MiB")
        self.figures["next_replication"] = {"changed": all_, "moved": written}


def end(dr):
    """Nothing that was started stays behind."""
    for process in (dr.machine, dr.serve):
        if process and process.poll() is None:
            process.kill()
    for folder in (("prod", "images", "guest"), ("prod", "out-of-reach", "guest"), ("dr", "images", "guest_replica")):
        try:
            with open(dr.path(*folder, "qemu.pid")) as file:
                pid = int(file.read())
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if dr.work.encode() in file.read():
                    os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError):
            pass


def main():
    parser = argparse.ArgumentParser(description="A disaster and the way home, on a real guest.")
    parser.add_argument("--aquifer", default="target/release/aquifer", type=os.path.abspath)
    parser.add_argument("--firmware", default="bios", help=argparse.SUPPRESS)
    parser.add_argument("--work", default=os.path.join(os.path.dirname(HERE), "demo-work"))
    parser.add_argument("--noise", type=int, default=32, help="MiB of incompressible data on the guest's disk")
    parser.add_argument("--every", type=int, default=10, help="seconds between two backups of the schedule")
    parser.add_argument("--keep", action="store_true", help="leave the work folder in place")
    parser.add_argument("--transcript", help="write what was shown to this file")
    parser.add_argument("--report", help="write the figures to this file, as JSON")
    options = parser.parse_args()
    dr = Dr(options)
    try:
        dr.run()
        if options.report:
            with open(options.report, "w") as file:
                json.dump(dr.figures, file, indent=1)
    finally:
        end(dr)
        if options.transcript:
            with open(options.transcript, "w") as file:
                file.write("\n".join(dr.transcript) + "\n")
    if not options.keep:
        shutil.rmtree(dr.work)
    dr.say("\nThe demo succeeded.")


if __name__ == "__main__":
    main()
