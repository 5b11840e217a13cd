"""A terminal of a known width, so that a test sees what a person would see."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading

_CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_LOOK = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


class Screen:
    """What was written to a terminal.

    Attributes:
        raw: All of it, with escape codes; complete when the terminal is closed.
    """

    raw = ""

    @property
    def text(self):
        """What was written without colours and movements of the cursor."""
        return _CODES.sub("", self.raw)

    @property
    def lines(self):
        """The lines of `text`; a line that was written over is one of its own."""
        return [line.rstrip() for line in re.split(r"[\r\n]+", self.text)]


@contextlib.contextmanager
def open_terminal(width, height=40):
    """A terminal's slave end and its `Screen`, filled by a thread until this is left."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    screen, parts = Screen(), []

    def read():
        # the master end fails, and does not end, when the last slave end is closed
        with contextlib.suppress(OSError):
            while part := os.read(master, 65536):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield slave, screen
    finally:
        os.close(slave)
        reader.join()
        os.close(master)
        screen.raw = b"".join(parts).decode()


@contextlib.contextmanager
def on_terminal(monkeypatch, width, *streams, **environment):
    """Have `sys.stdout`, or the streams named, be a terminal while inside; yields its `Screen`."""
    with monkeypatch.context() as patch, open_terminal(width) as (slave, screen):
        for name in _LOOK:
            patch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", **environment}.items():
            patch.setenv(name, value)
        with os.fdopen(os.dup(slave), "w", encoding="utf-8") as stream:
            for name in streams or ("stdout",):
                patch.setattr(sys, name, stream)
            yield screen
            stream.flush()
