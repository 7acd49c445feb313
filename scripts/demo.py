#!/usr/bin/env python3
"""The whole promise in one run, on a real guest.

A Debian kernel with a small user space is put on a disk that firmware starts. It is backed up full, and three times
incrementally while it really changes files. The disk is deleted. `aquifer recover` brings the machine back from the
chain; it writes while its disk is copied beside it; the door is killed under it; it is moved onto its own disk while it
runs; the repository goes; it goes on. In the end it is turned off, its file system is checked, and every file is compared
with a folder that got the same changes and never went through Aquifer.

usage: scripts/demo.py --aquifer BINARY [--firmware uefi|bios] [--work DIR] [--noise MIB] [--keep] [--transcript FILE]
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
sys.path.insert(0, os.path.join(HERE, "guest"))

import drive  # noqa: E402
import trees  # noqa: E402

MIB = 1 << 20
ROOT_START = {"uefi": 18 * MIB, "bios": 2 * MIB}
SLOW, MARK = "12MiB/s", ".aquifer-demo"


class Demo:
    def __init__(self, options):
        self.options = options
        self.work = os.path.abspath(options.work)
        self.transcript = []
        self.steps = 0
        self.report = {}
        self.clear()
        self.environment = dict(os.environ, AQUIFER_HOME=self.path("home"), AQUIFER_REPO=self.path("repo"))

    def path(self, *parts):
        return os.path.join(self.work, *parts)

    def clear(self):
        """Takes away what an earlier run left, and only that."""
        if os.path.exists(self.work):
            if not os.path.exists(self.path(MARK)):
                raise SystemExit(f"{self.work} was not made by the demo; name another folder with --work")
            shutil.rmtree(self.work)
        os.makedirs(self.work)
        open(self.path(MARK), "w").close()

    # what the reader sees

    def say(self, text=""):
        print(text, flush=True)
        self.transcript.append(text)

    def step(self, title):
        self.steps += 1
        self.say()
        self.say(f"== {self.steps}. {title}")

    def aquifer(self, *args, show=True, binary=None):
        """Runs aquifer as a user would; returns what it said on both streams."""
        if show:
            self.say("$ aquifer " + " ".join(args))
        command = [binary or self.options.aquifer, *args]
        child = subprocess.Popen(
            command, env=self.environment, cwd=self.work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines = []
        for line in child.stdout:
            lines.append(line.rstrip("\n"))
            if show:
                self.say("  " + line.rstrip("\n"))
        if child.wait() not in (0, 1):
            raise SystemExit(f"aquifer {' '.join(args)} ended with {child.returncode}:\n" + "\n".join(lines))
        return "\n".join(lines)

    def session(self):
        """The session as it is now."""
        out = subprocess.run(
            [self.options.aquifer, "--json", "status", "guest"],
            env=self.environment, cwd=self.work, capture_output=True, text=True, check=True,
        )
        records = [json.loads(line) for line in out.stdout.splitlines()]
        return next(record for record in records if record["type"] == "session")

    def local(self):
        return sum(disk["overlay"]["hydrated"] + disk["overlay"]["written"] + disk["overlay"]["trimmed"]
                   for disk in self.session()["disks"])

    # the story

    def run(self):
        self.make_guest()
        self.back_up()
        self.lose_the_disk()
        console = self.recover()
        self.write_while_it_is_copied(console)
        self.kill_the_door(console)
        self.become_local()
        self.move(console)
        self.go_on_alone(console)
        self.compare()
        self.print_report()

    def make_guest(self):
        self.step("A real machine: Debian's kernel, GRUB, ext4; started by firmware from its own disk")
        subprocess.run(
            [os.path.join(HERE, "make-guest.sh"), "--out", self.path("disk.raw"), "--firmware", self.options.firmware,
             "--tree", self.path("expected"), "--noise", str(self.options.noise)],
            check=True,
        )
        with open(self.path("guest.toml"), "w") as file:
            file.write('version = 1\nname = "guest"\ncpus = 1\nmemory = "512MiB"\n[[disk]]\nname = "vda"\nbus = "virtio"\n')
        self.say(f"  disk.raw: 1 GiB, {os.stat(self.path('disk.raw')).st_blocks * 512 // MIB} MiB used")

    def back_up(self):
        self.step("Back it up: one full, three increments; between them the guest changes files")
        self.aquifer("init")
        self.aquifer("backup", "guest", "--disk", "vda=raw:disk.raw", "--machine", "guest.toml")
        for number in (1, 2, 3):
            machine = drive.PlainMachine(self.path("disk.raw"), self.options.firmware, self.path("plain"))
            machine.console.log_in()
            machine.console.run(f"churn / {number}")
            machine.finish()
            self.same_on_the_folder(number)
            self.say(f"  (the guest ran, changed files, round {number}, and was turned off)")
            self.aquifer("backup", "guest", "--disk", "vda=raw:disk.raw", "--machine", "guest.toml")

    def same_on_the_folder(self, number):
        """What the guest did to its disk, done to a plain folder by the same script."""
        churn = os.path.join(HERE, "guest", "churn")
        subprocess.run(["/bin/busybox", "sh", churn, self.path("expected"), str(number)], check=True)

    def lose_the_disk(self):
        self.step("Lose the disk")
        os.remove(self.path("disk.raw"))
        self.say("$ rm disk.raw")
        self.aquifer("points", "guest")

    def recover(self):
        self.step("Recover: the machine runs from its chain; nothing is copied first")
        began = time.monotonic()
        self.aquifer("recover", "guest", "--into", "vm", "--no-hydrate")
        self.report["command to running machine"] = f"{time.monotonic() - began:.1f} s"
        session = self.session()
        log = self.path("vm", "console.log")
        while not os.path.exists(log) or b"login:" not in read(log):
            if time.monotonic() - began > 300:
                raise SystemExit(f"no login prompt; the console said: {read(log)[-800:]!r}")
            time.sleep(0.05)
        self.report["command to login prompt"] = f"{time.monotonic() - began:.1f} s ({session['machine']['accel']})"
        session = self.session()
        door, size = session["door"], sum(disk["size"] for disk in session["disks"])
        read_mib, decoded_mib = door["bytes_read"] / MIB, door["cache"]["decoded_bytes"] / MIB
        self.report["fetched before the login prompt"] = (
            f"{read_mib:.1f} MiB read by the guest, {decoded_mib:.1f} MiB decoded, of a disk of {size // MIB} MiB"
        )
        screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read(log).decode(errors="replace")).replace("\r", "")
        for line in [line for line in screen.split("\n") if line.strip()][-3:]:
            self.say("  | " + line)
        console = drive.Console(session["machine"]["console"])
        console.socket.sendall(b"\n")
        console.log_in()
        last = console.run("cat /etc/last-round").strip()
        self.expect(last == "3", f"the guest is at its last backup (round {last})")
        return console

    def write_while_it_is_copied(self, console):
        self.step("The guest writes while its disk is copied beside it")
        self.aquifer("session", "set", "guest", "--rate", SLOW)
        self.aquifer("session", "resume", "guest", show=False)
        before = self.local()
        console.run("churn / 4")
        self.same_on_the_folder(4)
        session = self.session()
        missing = sum(disk["overlay"]["absent"] for disk in session["disks"])
        self.expect(missing > 0 and self.local() > before, f"round 4 written; {missing // MIB} MiB are still to come")
        self.aquifer("status", "guest")

    def kill_the_door(self, console):
        self.step("Kill the door under the running guest")
        door = self.session()["door"]["pid"]
        os.kill(door, signal.SIGKILL)
        self.say(f"$ kill -9 {door}")
        console.run("cat $(find /lib/modules -type f | head -200) | sha256sum; sync")
        after = self.session()["door"]
        self.expect(after["status"] == "running" and after["pid"] != door, f"a new door serves, process {after['pid']}")
        self.expect(self.session()["machine"]["power"] == "running", "the guest read and wrote on and saw no error")

    def become_local(self):
        self.step("Let the copy run freely")
        before, began = self.local(), time.monotonic()
        self.aquifer("session", "set", "guest", "--rate", "none", show=False)
        self.say("$ aquifer session set guest --rate none")
        self.aquifer("wait", "guest", "--for", "local", "--timeout", "10m")
        took = time.monotonic() - began
        copied = self.local() - before
        self.report["hydration"] = f"{copied / MIB / took:.0f} MiB/s, beside the guest"

    def move(self, console):
        self.step("Move the running machine onto its own disk, and end aquifer")
        beat = "while :; do cut -d' ' -f1 /proc/uptime | dd of=/srv/beat oflag=append conv=notrunc,fsync 2>/dev/null; usleep 5000; done"
        console.run(f"({beat}) > /dev/null 2>&1 & echo $! > /run/beat")
        time.sleep(1)
        out = self.aquifer("finalize", "guest", "--keep")
        time.sleep(1)
        console.run("kill $(cat /run/beat); sleep 0.1")
        gap = console.run("awk 'NR > 1 && $1 - last > most { most = $1 - last } { last = $1 } END { print most }' /srv/beat")
        console.run("rm /srv/beat")
        pauses = re.findall(r"moved onto it in ([0-9.]+ ms)", out)
        self.expect(len(pauses) == 1, "the machine was moved while it ran")
        self.report["pivot"] = f"pause {pauses[0]}; longest gap of a writer in the guest {float(gap):.2f} s"

    def go_on_alone(self, console):
        self.step("Nothing of aquifer is left; the repository goes too; the guest goes on")
        left = processes_of(self.options.aquifer)
        self.expect(not left, f"aquifer processes: {left or 'none'}")
        shutil.rmtree(self.path("repo"))
        self.say("$ rm -r repo")
        console.run("echo 3 > /proc/sys/vm/drop_caches; find / -xdev -type f | xargs cat | sha256sum")
        console.run("churn / 5")
        self.same_on_the_folder(5)
        self.say("  the guest read every file it has and wrote round 5")
        console.power_off()
        self.say("  the guest was turned off")

    def compare(self):
        self.step("Check the file system and compare every file")
        disk = f"{self.path('vm', 'disks', 'vda', 'disk.raw')}?offset={ROOT_START[self.options.firmware]}"
        check = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True)
        self.say("$ e2fsck -fn vm/disks/vda/disk.raw")
        self.say("  " + check.stdout.strip().splitlines()[-1])
        self.expect(check.returncode == 0, "the file system is clean")
        os.makedirs(self.path("found"))
        subprocess.run(["debugfs", "-R", f"rdump / {self.path('found')}", disk], check=True, capture_output=True)
        equal, size, differences = trees.compare(self.path("expected"), self.path("found"), ["lost+found"])
        for difference in differences[:10]:
            self.say("  " + difference)
        self.expect(not differences, f"{equal} files and folders, {size // MIB} MiB: all as they must be")
        self.report["compared"] = f"{equal} entries, {size // MIB} MiB, no difference"

    def expect(self, true, text):
        self.say(("  ok: " if true else "  NOT: ") + text)
        if not true:
            raise SystemExit(f"the demo failed: {text}")

    def print_report(self):
        self.say()
        self.say("== Report")
        for name, value in self.report.items():
            self.say(f"  {name:<34} {value}")


def read(path):
    with open(path, "rb") as file:
        return file.read()


def processes_of(binary):
    """Processes that run this program."""
    real, found = os.path.realpath(binary), []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.readlink(f"/proc/{entry}/exe").removesuffix(" (deleted)") == real:
                    found.append(int(entry))
            except OSError:
                pass
    return found


def main():
    parser = argparse.ArgumentParser(description="Aquifer's whole promise in one run, on a real guest.")
    parser.add_argument("--aquifer", default="target/release/aquifer", type=os.path.abspath)
    parser.add_argument("--firmware", choices=["uefi", "bios"], default="uefi")
    parser.add_argument("--work", default=os.path.join(os.path.dirname(HERE), "demo-work"))
    parser.add_argument("--noise", type=int, default=128, help="MiB of incompressible data on the guest's disk")
    parser.add_argument("--keep", action="store_true", help="leave the work folder in place")
    parser.add_argument("--transcript", help="write what was shown to this file")
    options = parser.parse_args()
    demo = Demo(options)
    try:
        demo.run()
    finally:
        end_machine(demo)
        if options.transcript:
            with open(options.transcript, "w") as file:
                file.write("\n".join(demo.transcript) + "\n")
    if not options.keep:
        shutil.rmtree(demo.work)
    demo.say("\nThe demo succeeded.")


def end_machine(demo):
    """After a failure: neither a machine nor a door stays behind."""
    record = demo.path("vm", "session.json")
    if not os.path.exists(record):
        return
    subprocess.run(
        [demo.options.aquifer, "finalize", demo.path("vm"), "--discard", "--yes"], env=demo.environment, capture_output=True
    )
    if os.path.exists(record):
        with open(record) as file:
            running = (json.load(file).get("host") or {}).get("running") or {}
        pid = running.get("process", {}).get("pid")
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if demo.work.encode() in file.read():
                    os.kill(pid, signal.SIGTERM)
        except OSError:
            pass


if __name__ == "__main__":
    main()
