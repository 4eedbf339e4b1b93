"""What hostile programs would like to reach, and the marks that they leave there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.evaluation.sandbox.case import PRELUDE

SECRET = "a-secret-of-the-caller"


class Arena:
    """Files, sockets, processes and an environment of this process's user, in the reach of everybody.

    It also makes a directory of packages, which sandboxes show to programs, and the directory for temporary files.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="renio-arena-"))
        self.folder.chmod(0o755)
        self.token = f"rs{os.getpid()}"
        self.open, self.precious, home, self.temporary, site = (
            self.folder / name for name in ("open", "precious", "home", "temporary", "site")
        )
        for folder, mode in ((self.open, 0o777), (self.precious, 0o755), (home, 0o700), (self.temporary, 0o1777)):
            folder.mkdir()
            folder.chmod(mode)
        self.library = site / "renio_library.py"
        self.home_file, self.secret_file = home / "secret", self.folder / "secret"
        for path, mode in ((self.home_file, 0o600), (self.secret_file, 0o644)):
            path.write_text(SECRET)
            path.chmod(mode)
        self._renew()
        sys.path.append(str(site))
        os.environ |= {"RENIO_SECRET": SECRET, "TMPDIR": str(self.temporary), "HOME": str(home)}
        tempfile.tempdir = None
        os.chdir(self.folder)
        self._descriptor = os.open(self.secret_file, os.O_RDONLY)
        os.set_inheritable(self._descriptor, True)
        self._listen()
        self._signals: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, frame: self._signals.append(number))
        self._kept = ctypes.create_string_buffer(b"12345678")
        self.victim = self._new_victim()

    def _listen(self) -> None:
        self._sockets = {
            "TCP": socket.socket(socket.AF_INET, socket.SOCK_STREAM),
            "UDP": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "ABSTRACT": socket.socket(socket.AF_UNIX),
            "UNIX": socket.socket(socket.AF_UNIX),
        }
        addresses = {"ABSTRACT": f"\0{self.token}", "UNIX": str(self.open / "socket")}
        for name, listener in self._sockets.items():
            listener.bind(addresses.get(name, ("127.0.0.1", 0)))
            listener.setblocking(False)
            if name != "UDP":
                listener.listen(64)
        (self.open / "socket").chmod(0o777)

    def _new_victim(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "1000"], env={"RENIO_SECRET": SECRET}, start_new_session=True)

    def _renew(self) -> None:
        """Puts things back as they were."""
        for folder in (self.precious, self.library.parent):
            shutil.rmtree(folder, ignore_errors=True)
        self.precious.mkdir(0o755)
        (self.library.parent / "package.dist-info").mkdir(parents=True)
        (self.precious / "file").write_text("kept")
        (self.precious / "file").chmod(0o644)
        self.library.write_text("x = 1")
        self.library.chmod(0o644)
        for path in (self.precious / "file", self.library):
            os.utime(path, (1e9, 1e9))
        self._as_it_was = self._look()

    def _look(self) -> list[object]:
        """What of the caller's files could have been changed."""
        found: list[object] = [sorted(path.name for path in self.library.parent.iterdir())]
        for path in (self.precious / "file", self.library):
            with contextlib.suppress(OSError):
                status = path.stat()
                extended = os.listxattr(path)
                found.append(
                    (path.read_text(), status.st_mode, status.st_mtime, status.st_uid, status.st_gid, extended)
                )
                with contextlib.suppress(OSError):
                    found.append(subprocess.check_output(["lsattr", str(path)], stderr=subprocess.DEVNULL).split()[0])
        return found

    def source(self, name: str, source: str) -> str:
        """The whole text of a program."""
        values = {
            "NAME": name,
            "COMM": self.token,
            "TOKEN": self.token,
            "OPEN": str(self.open),
            "PRECIOUS": str(self.precious),
            "SECRET_FILE": str(self.secret_file),
            "HOME_FILE": str(self.home_file),
            "LIBRARY": str(self.library),
            "TCP": self._sockets["TCP"].getsockname()[1],
            "UDP": self._sockets["UDP"].getsockname()[1],
            "ABSTRACT": f"\0{self.token}",
            "UNIX": str(self.open / "socket"),
            "VICTIM": self.victim.pid,
            "CALLER": os.getpid(),
            "ADDRESS": ctypes.addressof(self._kept),
            "KEY": 0x5EB0_0000 + os.getpid() % 65536,
        }
        given = "".join(f"{key} = {value!r}\n" for key, value in values.items())
        return f"{given}{PRELUDE}{source}\nprint('DONE', flush=True)\n"

    def marks(self, output: bytes) -> list[str]:
        """What a program has left; the arena is as new afterwards."""
        found = [word for word in ("ESCAPED", SECRET) if word.encode() in output]
        for path in self.open.iterdir():
            if path.name != "socket":
                found.append(f"wrote {path.name}")
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue"):
            for path in Path(folder).glob(f"{self.token}-*"):
                found.append(f"wrote {path}")
                path.unlink()
        found += [f"left {path.name} among temporary files" for path in self.temporary.iterdir()]
        found += [f"a message on {name}" for name, listener in self._sockets.items() if self._heard(name, listener)]
        if self._signals:
            found.append("signalled the caller")
            self._signals.clear()
        if self.victim.poll() is not None or self._state(self.victim.pid) in "Tt":
            found.append("hurt another process")
            self.victim.kill()
            self.victim.wait()
            self.victim = self._new_victim()
        if self._look() != self._as_it_was:
            found.append(f"changed files of the caller: {self._look()}")
            self._renew()
        return found + self.survivors()

    def survivors(self) -> list[str]:
        """Processes that are left of programs; they are killed."""
        found = 0
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and (folder / "comm").read_text().strip() == self.token:
                    found += self._state(int(folder.name)) != "Z"
                    os.kill(int(folder.name), signal.SIGKILL)
        return [f"{found} processes live on"] if found else []

    def _state(self, pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    def _heard(self, name: str, listener: socket.socket) -> bool:
        with contextlib.suppress(BlockingIOError):
            if name == "UDP":
                return bool(listener.recv(100))
            connection, _ = listener.accept()
            connection.close()
            return True
        return False

    def close(self) -> None:
        """Ends the victim and removes everything."""
        self.survivors()
        self.victim.kill()
        self.victim.wait()
        for listener in self._sockets.values():
            listener.close()
        os.close(self._descriptor)
        os.chdir("/")
        shutil.rmtree(self.folder)


def wait_for_late_marks() -> None:
    """Time for daemons to write."""
    time.sleep(1.2)
