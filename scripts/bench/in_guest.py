"""One guest with the same raw image on several doors, and fio inside it: the doors are measured as a machine sees them.

The doors: ours over vhost-user-blk, ours over NBD behind QEMU's virtio-blk with an I/O thread of its own, and
qemu-storage-daemon's vhost-user-blk export.
"""
import selectors
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from servers import AQUIFER, environment, run, running, scratch, site

SCRIPTS = Path(__file__).resolve().parents[1]
SECONDS = 4
OURS, NBD, QSD = "vda", "vdb", "vdc"


class Guest:
    """A guest that answers figures."""

    def __init__(self, process):
        self.process = process

    def wait_for(self, word, seconds):
        """What the guest says behind `guest: WORD `."""
        said, end = [], time.monotonic() + seconds
        watch = selectors.DefaultSelector()
        watch.register(self.process.stdout, selectors.EVENT_READ)
        while time.monotonic() < end:
            if not watch.select(timeout=1):
                continue
            line = self.process.stdout.readline().decode(errors="replace").strip()
            if not line and self.process.poll() is not None:
                break
            said.append(line)
            if line.startswith(f"guest: {word} "):
                return line.split(maxsplit=2)[2]
            if line.startswith("guest: FAILED"):
                break
        raise RuntimeError(f"the guest did not say {word}: {said[-6:]}")

    def reads(self, disk, depth):
        """4 KiB random reads per second."""
        self.process.stdin.write(f"{disk} {depth} {SECONDS}\n".encode())
        self.process.stdin.flush()
        return float(self.wait_for("IOPS", 120))


@contextmanager
def guest(image):
    """A guest with `image` on all three doors."""
    with scratch() as folder, ExitStack() as stack:
        boot = folder / "boot"
        run(SCRIPTS / "make-memory-guest.sh", "--out", boot, "--init", SCRIPTS / "guest/fio-init", "--with", "fio")
        doors, nbd, qsd = folder / "doors", folder / "n.sock", folder / "q.sock"
        ours = [AQUIFER, "-c", site(folder, "64MiB"), "mount", f"raw:{image}", "--nbd", f"unix:{nbd}", "--vhost-user", doors]
        stack.enter_context(running(ours, lambda: nbd.exists() and any(doors.glob("*.sock")), env=environment(folder / "home")))
        daemon = ["qemu-storage-daemon", "--object", "iothread,id=io", "--blockdev",
                  f"driver=file,node-name=d,filename={image},read-only=on,aio=io_uring",
                  "--export", f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={qsd},writable=off,iothread=io"]
        stack.enter_context(running(daemon, qsd.exists))
        vhost, name = next(doors.glob("*.sock")), Path(image).stem
        machine = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "512",
                   "-object", "memory-backend-memfd,id=m,size=512M,share=on", "-machine", "q35,memory-backend=m",
                   "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", boot / "vmlinuz", "-initrd", boot / "initrd",
                   "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
                   "-chardev", f"socket,id=c1,path={vhost}", "-device", "vhost-user-blk-pci,chardev=c1,num-queues=1",
                   "-object", "iothread,id=io", "-blockdev",
                   f"driver=nbd,node-name=n,read-only=on,server.type=unix,server.path={nbd},export={name}",
                   "-device", "virtio-blk-pci,drive=n,iothread=io,num-queues=1",
                   "-chardev", f"socket,id=c2,path={qsd}", "-device", "vhost-user-blk-pci,chardev=c2,num-queues=1"]
        argv = [str(a) for a in machine]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
        try:
            there = Guest(process)
            there.wait_for("READY", 180)
            yield there
        finally:
            process.kill()
            process.wait()
