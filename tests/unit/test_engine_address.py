"""Which addresses are no engine's, however they are written, and names that stand for them."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.engine_address import why_no_engine
from sagecp.core.errors import InvalidRequestError
from sagecp.core.types import ExecutionInstance
from sagecp.core.validation import check_instance
from sagecp.runtime.engines import http1_connection
from sagecp.runtime.engines.base import EngineEndpoint
from sagecp.runtime.engines.vllm import VllmEngineClient
from tests.support.scripted_engine import Request, scripted_engine


@pytest.mark.parametrize(
    ("host", "part"),
    [
        # The metadata service of most clouds, in every form that the system's resolver takes.
        ("169.254.169.254", "metadata"),
        ("2852039166", "metadata"),
        ("0xa9fea9fe", "metadata"),
        ("0XA9FEA9FE", "metadata"),
        ("025177524776", "metadata"),
        ("0251.0376.0251.0376", "metadata"),
        ("169.254.43518", "metadata"),
        ("169.16689662", "metadata"),
        ("0xa9.0xfe.0xa9.0xfe", "metadata"),
        ("::ffff:169.254.169.254", "metadata"),
        ("::ffff:a9fe:a9fe", "metadata"),
        ("::a9fe:a9fe", "metadata"),
        ("64:ff9b::a9fe:a9fe", "metadata"),
        ("2002:a9fe:a9fe::1", "metadata"),
        # Others, and names.
        ("fd00:ec2::254", "metadata"),
        ("fd20:ce:0:0::254", "metadata"),
        ("100.100.100.200", "metadata"),
        ("168.63.129.16", "metadata"),
        ("metadata.google.internal", "metadata"),
        ("Metadata.Google.Internal.", "metadata"),
        ("instance-data", "metadata"),
        # Link-local.
        ("169.254.0.1", "link-local"),
        ("169.254.170.2", "link-local"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("febf::1", "link-local"),
        # No single machine.
        ("0.0.0.0", "every address"),
        ("0", "every address"),
        ("0x0", "every address"),
        ("::", "every address"),
        ("::ffff:0.0.0.0", "every address"),
        ("224.0.0.1", "many machines"),
        ("255.255.255.255", "many machines"),
        ("ff02::1", "many machines"),
    ],
)
def test_no_engine(host: str, part: str) -> None:
    assert part in why_no_engine(host)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "10.0.0.7",
        "192.168.1.1",
        "100.64.0.1",
        "8.8.8.8",
        "::1",
        "fd12::7",
        "2001:db8::1",
        "::ffff:10.0.0.7",
        "engine-0.engines.svc.cluster.local",
        "169.254.example.com",
        "256.1.1.1",
        "1.2.3.4.5",
        "09",
        "metadata.example.com",
        "a" * 253,
    ],
)
def test_an_engine(host: str) -> None:
    assert not why_no_engine(host)


@given(st.from_regex(r"(0x[0-9a-f]{1,8}|[0-9]{1,10})(\.(0x[0-9a-f]{1,6}|[0-9]{1,8})){0,3}", fullmatch=True))
def test_odd_forms_are_read_as_the_system_reads_them(text: str) -> None:
    try:
        expected = socket.inet_ntoa(socket.inet_aton(text))
    except OSError:
        return
    assert why_no_engine(text) == why_no_engine(expected)


@pytest.mark.parametrize("host", ["169.254.169.254", "fe80::1", "metadata.google.internal", "0.0.0.0"])
def test_such_an_instance_does_not_join(host: str) -> None:
    instance = ExecutionInstance(instance_id="i", host=host, port=80, model_name="m")
    with pytest.raises(InvalidRequestError) as caught:
        check_instance(instance)
    (violation,) = caught.value.violations
    assert violation.field == "engine_url"
    assert host in violation.description


# -- when a connection is made ---------------------------------------------------------------


async def test_a_name_that_stands_for_such_an_address_is_refused_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(request: Request) -> None:
        raise AssertionError("a request was sent")

    async with scripted_engine(never) as engine:
        port = int(engine.url.rpartition(":")[2])

        async def resolved(*_: object, **__: object) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolved)
        monkeypatch.setattr(
            http1_connection, "why_no_engine", lambda host: "is nothing" if host == "127.0.0.1" else ""
        )
        client = VllmEngineClient(EngineEndpoint(f"http://innocent.example:{port}"))
        health = await client.health(5.0)
        assert not health.healthy
        assert f"innocent.example:{port} stands for 127.0.0.1, which is nothing" in health.detail
        await client.close()
        assert not engine.requests


# -- redirects -------------------------------------------------------------------------------


@pytest.mark.parametrize("location", [b"location: http://169.254.169.254/latest\r\n", b""])
async def test_a_redirect_is_a_failure_that_says_where_it_leads(location: bytes) -> None:
    async def redirect(request: Request) -> None:
        await request.send(b"HTTP/1.1 302 Found\r\n" + location + b"content-length: 0\r\n\r\n")

    where = "http://169.254.169.254/latest" if location else "an address that it does not name"
    async with scripted_engine(redirect) as engine:
        client = VllmEngineClient(EngineEndpoint(engine.url))
        for health in (await client.health(5.0), await client.probe("tiny", 5.0)):
            assert not health.healthy
            assert f"HTTP 302, which redirects to {where}; register the final address" in health.detail
        assert len(engine.requests) == 2
        await client.close()
