"""Types at the guest's serial console and reads what it answers; starts it on a plain disk with plain QEMU."""

import os
import re
import select
import shutil
import socket
import subprocess
import time

PROMPT = re.compile(rb"/[^\n ]* # (\x1b\[6n)?$")


class Console:
    """A serial console behind a Unix socket."""

    def __init__(self, path, timeout=120):
        deadline = time.monotonic() + timeout
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError:
                self.socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.heard = b""
        self.everything = b""

    def hear(self, timeout):
        """Reads what is there; False at the end of the machine."""
        ready, _, _ = select.select([self.socket], [], [], timeout)
        if not ready:
            return True
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            return False
        self.heard += data
        self.everything += data
        return bool(data)

    def until(self, pattern, timeout=120):
        """Waits for a pattern; returns what came before its end."""
        pattern = re.compile(pattern) if isinstance(pattern, bytes) else pattern
        deadline = time.monotonic() + timeout
        while not (match := pattern.search(self.heard)):
            left = deadline - time.monotonic()
            if left <= 0 or not self.hear(left):
                raise SystemExit(f"the guest did not say {pattern.pattern!r}; last words: {self.heard[-800:]!r}")
        before, self.heard = self.heard[: match.end()], self.heard[match.end():]
        return before

    def log_in(self, timeout=120):
        """Waits for the login prompt and logs in; returns the prompt's screen."""
        screen = self.until(rb"login: ", timeout)
        self.socket.sendall(b"root\n")
        self.until(PROMPT)
        return screen

    def run(self, command, timeout=120):
        """Runs a command; returns its output. A command that fails ends the demo."""
        # The shell echoes what is typed, folded at its own width: the output lies between two marks it never echoes.
        self.socket.sendall(b"echo BE''GIN; " + command.encode() + b"; echo E''ND=$?\n")
        out = self.until(rb"END=\d+\r?\n", timeout).replace(b"\r", b"")
        self.until(PROMPT)
        out = out[out.rindex(b"BEGIN\n") + 6:]
        text, code = out[: out.rindex(b"END=")].decode(errors="replace"), int(out[out.rindex(b"END=") + 4:])
        if code != 0:
            raise SystemExit(f"in the guest: {command!r} ended with {code}: {text}")
        return text

    def power_off(self):
        """Turns the guest off and waits until its console ends."""
        self.socket.sendall(b"poweroff\n")
        deadline = time.monotonic() + 120
        while self.hear(1):
            if time.monotonic() > deadline:
                raise SystemExit("the guest did not turn off")


def accelerator():
    """`kvm` where the guest's own kernel would run on it, else `tcg`: the same caution as the product's."""
    probe = ["qemu-system-x86_64", "-nodefaults", "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-display", "none"]
    try:
        quit_at_once = b'{"execute":"qmp_capabilities"}{"execute":"quit"}'
        done = subprocess.run(probe + ["-qmp", "stdio"], input=quit_at_once, capture_output=True, timeout=5)
        return "kvm" if done.returncode == 0 else "tcg"
    except (subprocess.TimeoutExpired, OSError):
        return "tcg"


class PlainMachine:
    """The guest on a raw disk with nothing of Aquifer near it."""

    def __init__(self, disk, firmware, folder):
        self.folder = folder
        os.makedirs(folder, exist_ok=True)
        sock = os.path.join(folder, "plain.sock")
        if os.path.exists(sock):
            os.unlink(sock)
        accel = accelerator()
        args = ["qemu-system-x86_64", "-nodefaults", "-machine", "q35", "-accel", accel, "-m", "512"]
        args += ["-cpu", "host" if accel == "kvm" else "max", "-display", "none", "-no-reboot"]
        if firmware == "uefi":
            shutil.copy("/usr/share/OVMF/OVMF_VARS_4M.fd", os.path.join(folder, "plain.vars"))
            args += ["-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"]
            args += ["-drive", f"if=pflash,format=raw,file={folder}/plain.vars"]
        args += ["-blockdev", f"driver=raw,node-name=d,discard=unmap,file.driver=file,file.filename={disk}"]
        args += ["-device", "virtio-blk-pci,drive=d,bootindex=0", "-serial", f"unix:{sock},server=on,wait=off"]
        self.process = subprocess.Popen(args)
        self.console = Console(sock)

    def finish(self):
        self.console.power_off()
        if self.process.wait(timeout=60) != 0:
            raise SystemExit("QEMU ended with an error")
