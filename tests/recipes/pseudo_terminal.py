"""A program at a terminal that a test types at: a pty, its screen as raw text, and waiting for words with a time limit."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time


class PseudoTerminal:
    """Runs `command` in a terminal of the given size. `wait` reads until a pattern shows up; everything read is in `seen`."""

    def __init__(self, command, env, columns=80, rows=24):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            # cursor positions are not answered here; prompt_toolkit is told not to ask
            env={**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **env},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.seen = ""
        self._from = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text):
        os.write(self._master, text.encode())

    def wait(self, pattern, seconds=20):
        """Read until `pattern` stands behind what was waited for before; the match."""
        end = time.monotonic() + seconds
        while not (match := re.compile(pattern, re.DOTALL).search(self.seen, self._from)):
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen[self._from :]!r}"
            if select.select([self._master], [], [], left)[0]:
                try:
                    data = os.read(self._master, 65536)
                except OSError:  # Linux says so when the program has closed the terminal
                    data = b""
                assert data, f"ended without {pattern!r}: {self.seen[self._from :]!r}"
                self.seen += data.decode("utf-8", "replace")
        self._from = match.end()
        return match

    def echoes(self):
        """Whether keys are echoed by the terminal: True in ordinary mode."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def interrupt(self):
        """Ctrl-C while the terminal is in ordinary mode."""
        os.killpg(self.process.pid, signal.SIGINT)

    def exit_code(self, seconds=20):
        """The exit code, once it has ended by itself."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self._master], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self._master, 65536).decode("utf-8", "replace")
                except OSError:
                    break
        return self.process.wait(timeout=max(0.1, end - time.monotonic()))
