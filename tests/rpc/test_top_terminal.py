"""`sagecp top` as a process on a real terminal: it starts, is left, and says in a line what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator

import pytest

from sagecp.cli.exit_codes import ExitCode
from tests.support.processes import ROOT, SAGECP
from tests.support.rpc_rig import Rig
from tests.support.waiting import until

WAIT_S = 60.0


class Terminal:
    """A process on a pseudo-terminal of 80x24.

    Attributes:
        process: The process.
        written: What it wrote so far.
    """

    def __init__(self, process: asyncio.subprocess.Process, leader: int) -> None:
        self.process = process
        self.written = b""
        self._leader = leader
        asyncio.get_running_loop().add_reader(leader, self._read)

    def _read(self) -> None:
        try:
            self.written += os.read(self._leader, 65536)
        except OSError:  # Linux says so that nobody writes any more.
            asyncio.get_running_loop().remove_reader(self._leader)

    async def until(self, text: str) -> None:
        """Wait until something was written."""
        await until(
            lambda: text.encode() in self.written or self.process.returncode is not None,
            f"the terminal shows {text!r}",
            WAIT_S,
        )
        assert text.encode() in self.written, self.written.decode(errors="replace")

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._leader, text.encode())

    async def end(self) -> int:
        """Return the exit code, once all that was written is read."""
        code = await asyncio.wait_for(self.process.wait(), WAIT_S)
        self._read()
        return code


@contextlib.asynccontextmanager
async def on_terminal(
    *arguments: str, program: str = str(SAGECP), **environment: str
) -> AsyncIterator[Terminal]:
    """Run `sagecp`, or another program, on a terminal until the context ends."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "COLORTERM"}}
    process = await asyncio.create_subprocess_exec(
        program, *arguments,
        stdin=follower, stdout=follower, stderr=follower, cwd=ROOT, start_new_session=True,
        env={**inherited, "TERM": "xterm-256color", **environment},
    )  # fmt: skip
    os.close(follower)
    try:
        yield Terminal(process, leader)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(leader)
        os.close(leader)


async def test_it_starts_and_leaves_the_terminal_as_it_was(rig: Rig) -> None:
    await rig.add_engine("e1")
    async with on_terminal("top", "--server", rig.server.address, COLORTERM="truecolor") as terminal:
        await terminal.until("READY")
        assert b"\x1b[?1049h" in terminal.written
        assert b"\x1b[38;2;" in terminal.written or b";38;2;" in terminal.written
        terminal.type("q")
        assert await terminal.end() == ExitCode.OK
        assert b"\x1b[?1049l" in terminal.written
        assert b"Traceback" not in terminal.written


@pytest.mark.parametrize(
    ("arguments", "environment", "colors"),
    [
        ((), {"NO_COLOR": "1", "COLORTERM": "truecolor"}, rb"(?!)"),
        (("--no-color",), {"COLORTERM": "truecolor"}, rb"(?!)"),
        ((), {"TERM": "xterm-16color"}, rb"(?:3|4|9|10)\d"),
    ],
)
async def test_colours_are_as_many_as_the_terminal_has(
    rig: Rig, arguments: tuple[str, ...], environment: dict[str, str], colors: bytes
) -> None:
    await rig.add_engine("e1")
    async with on_terminal("top", "--server", rig.server.address, *arguments, **environment) as terminal:
        await terminal.until("READY")
        terminal.type("q")
        assert await terminal.end() == ExitCode.OK
    codes = {
        code
        for sequence in re.findall(rb"\x1b\[([\d;]*)m", terminal.written)
        for code in sequence.split(b";")
        # Others than colours (bold, dim, reverse, and their ends) and the terminal's default colours.
        if code and int(code) > 29 and code not in {b"39", b"49"}
    }
    assert all(re.fullmatch(colors, code) for code in codes), codes
    assert not codes & {b"38", b"48"}


async def test_a_signal_ends_it_in_order(rig: Rig) -> None:
    async with on_terminal("top", "--server", rig.server.address) as terminal:
        await terminal.until("no instance is registered")
        terminal.process.send_signal(signal.SIGTERM)
        assert await terminal.end() == ExitCode.INTERRUPTED
        assert b"\x1b[?1049l" in terminal.written
        assert b"Traceback" not in terminal.written


async def test_a_defect_ends_it_with_a_line(rig: Rig) -> None:
    script = (
        "from sagecp.cli.top.source import Watcher\n"
        "async def fail(self):\n"
        "    raise ZeroDivisionError('a defect')\n"
        "Watcher._read_page = fail\n"
        "from sagecp.cli.main import main\n"
        "main(['top'])\n"
    )
    async with on_terminal(
        "-c", script, program=sys.executable, SAGECP_SERVER=rig.server.address
    ) as terminal:
        assert await terminal.end() == ExitCode.UNEXPECTED
    after = terminal.written.rpartition(b"\x1b[?1049l")[2]
    assert b"ZeroDivisionError('a defect')" in after
    assert b"this is a defect; run again with --debug" in after
    assert b"Traceback" not in terminal.written


async def test_a_server_that_is_not_there_is_said_in_a_line() -> None:
    async with on_terminal("top", "--server", "127.0.0.1:1") as terminal:
        assert await terminal.end() == ExitCode.UNREACHABLE
    assert b"cannot reach the control plane at 127.0.0.1:1" in terminal.written
    assert b"\x1b[?1049h" not in terminal.written


async def test_without_a_terminal_it_says_what_to_use_instead() -> None:
    process = await asyncio.create_subprocess_exec(
        SAGECP, "top", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    output, errors = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == ExitCode.INVALID
    assert output == b""
    assert b"sagecp top needs a terminal" in errors
    assert b"sagecp status -o json" in errors


async def test_without_textual_it_says_what_to_install() -> None:
    script = (
        "import importlib.abc, sys\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] == 'textual':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "sys.stdin.isatty = sys.stdout.isatty = lambda: True\n"
        "from sagecp.cli.main import main\n"
        "main(['top'])\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    _, errors = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == ExitCode.INVALID
    assert b"sagecp top needs the Python package textual, which is not installed" in errors
    assert b"pip install 'sagecp[tui]'" in errors
