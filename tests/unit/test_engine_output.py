"""What is kept of a supervised engine's output, and what is passed on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sagecp.agent.engine_output import open_pump

TIMEOUT_S = 10.0


def run(tmp_path: Path, *pieces: bytes, secrets: tuple[str, ...] = ()) -> tuple[tuple[str, ...], bytes]:
    """Write pieces; return the lines kept and what was passed on."""
    log = tmp_path / "engine.log"
    pump, write_fd = open_pump(log, secrets)
    for piece in pieces:
        os.write(write_fd, piece)
    os.close(write_fd)
    return pump.finish(TIMEOUT_S), log.read_bytes()


def test_the_last_twenty_lines_are_kept_and_all_are_passed_on(tmp_path: Path) -> None:
    output = b"".join(b"line %d\n" % number for number in range(100))
    lines, passed_on = run(tmp_path, output)
    assert lines == tuple(f"line {number}" for number in range(80, 100))
    assert passed_on == output


@pytest.mark.parametrize(
    ("output", "kept"),
    [
        (b"", ()),
        (b"no newline", ("no newline",)),
        (b"\n\n  \n", ()),
        (b"\x1b[1;32mINFO\x1b[0m ready\r\n", ("INFO ready",)),
        (b"a\tb\x00c\x07d\n", ("a b c d",)),
        (b"\xff\xfe bytes\n", ("\ufffd\ufffd bytes",)),
        (b"x" * 1000 + b"\n", ("x" * 256,)),
        (b"started with --api-key s3cret, key=s3cret\n", ("started with --api-key ***, key=***",)),
        (b"request r-1: prompt: 'my diagnosis', max 5\n", ("request r-1: prompt: ...",)),
        (b'{"prompt_text": "my diagnosis"}\n', ('{"prompt_text": ...',)),
        (b'INFO: 127.0.0.1:59612 - "GET /metrics HTTP/1.1" 200 OK\n', ()),
        (
            b'INFO: 127.0.0.1:59612 - "GET /health HTTP/1.1" 503\n',
            ('INFO: 127.0.0.1:59612 - "GET /health HTTP/1.1" 503',),
        ),
        (b"Avg prompt throughput: 12.0 tokens/s\n", ("Avg prompt throughput: 12.0 tokens/s",)),
    ],
)
def test_lines_are_made_fit_to_be_shown(tmp_path: Path, output: bytes, kept: tuple[str, ...]) -> None:
    assert run(tmp_path, output, secrets=("", "s3cret"))[0] == kept


def test_an_endless_line_is_cut(tmp_path: Path) -> None:
    lines, passed_on = run(tmp_path, *[b"x" * 60_000] * 20, b"\nend\n")
    assert lines == ("x" * 256, "end")
    assert len(passed_on) == 1_200_005


def test_lines_may_come_in_pieces(tmp_path: Path) -> None:
    assert run(tmp_path, b"one li", b"ne\ntw", b"o", b"\nthree")[0] == ("one line", "two", "three")


def test_the_log_is_appended_to(tmp_path: Path) -> None:
    run(tmp_path, b"first\n")
    assert run(tmp_path, b"second\n")[1] == b"first\nsecond\n"


def test_without_its_log_the_output_goes_on_to_standard_output(tmp_path: Path) -> None:
    pump, write_fd = open_pump(tmp_path, ())
    os.write(write_fd, b"hello\n")
    os.close(write_fd)
    assert pump.finish(TIMEOUT_S) == ("hello",)


def test_a_log_that_cannot_be_written_does_not_hold_up_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    pump, write_fd = open_pump(full, ())
    for _ in range(10):
        os.write(write_fd, b"x" * 60_000 + b"\n")
    os.close(write_fd)
    assert len(pump.finish(TIMEOUT_S)) == 10
