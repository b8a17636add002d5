"""Client and command line over TLS and mutual TLS, with certificates made for the test."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from sagecp import client
from sagecp.cli.exit_codes import ExitCode
from sagecp.client import NO_RETRY, SageClient, TlsOptions
from sagecp.config import ServerConfig, TlsConfig
from sagecp.rpc.server import ControlPlaneServer
from tests.support.processes import SAGECP


@dataclass
class Secured:
    """A server that asks for client certificates, and the files to speak to it."""

    address: str
    ca_file: str
    certificate_file: str
    private_key_file: str

    @property
    def options(self) -> TlsOptions:
        return TlsOptions(
            ca_file=self.ca_file,
            certificate_file=self.certificate_file,
            private_key_file=self.private_key_file,
        )


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[Secured]:
    authority = trustme.CA()
    files = {"ca": tmp_path / "ca.pem"}
    authority.cert_pem.write_to_path(files["ca"])
    for name, issued in (
        ("server", authority.issue_cert("localhost", "127.0.0.1")),
        ("client", authority.issue_cert("someone@example.com")),
    ):
        files[f"{name}_cert"], files[f"{name}_key"] = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        files[f"{name}_cert"].write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(files[f"{name}_key"])
    tls = TlsConfig(
        certificate_file=str(files["server_cert"]),
        private_key_file=str(files["server_key"]),
        client_ca_file=str(files["ca"]),
    )
    server = ControlPlaneServer(ServerConfig(listen="127.0.0.1:0", tls=tls).validate())
    await server.start()
    try:
        yield Secured(server.address, str(files["ca"]), str(files["client_cert"]), str(files["client_key"]))
    finally:
        await server.stop(0.0)


async def test_mutual_tls(secured: Secured) -> None:
    async with SageClient(secured.address, tls=secured.options, token="secret") as sage:
        assert (await sage.get_status()).accepting


async def test_a_name_that_differs_from_the_address(secured: Secured) -> None:
    options = TlsOptions(
        ca_file=secured.ca_file,
        certificate_file=secured.certificate_file,
        private_key_file=secured.private_key_file,
        server_name="localhost",
    )
    async with SageClient(secured.address, tls=options) as sage:
        assert (await sage.get_status()).accepting


async def test_who_shows_no_certificate_is_not_let_in(secured: Secured) -> None:
    for tls in (None, True, TlsOptions(ca_file=secured.ca_file)):
        async with SageClient(secured.address, tls=tls, retry=NO_RETRY, timeout_s=5) as sage:
            with pytest.raises(client.UnavailableError):
                await sage.get_status()


async def run(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        SAGECP,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1"},
    )
    output, complaint = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), complaint.decode()


async def test_the_command_line(secured: Secured) -> None:
    files = (
        "--ca-cert",
        secured.ca_file,
        "--cert",
        secured.certificate_file,
        "--key",
        secured.private_key_file,
    )
    code, output, complaint = await run("status", "-s", secured.address, *files)
    assert code == ExitCode.OK, complaint
    assert "SERVING" in output
    code, _, complaint = await run("status", "-s", secured.address)
    assert code == ExitCode.UNREACHABLE
    assert "hint: " in complaint
    code, _, complaint = await run("status", "-s", secured.address, *files[:4])
    assert code == ExitCode.INVALID
    assert "private key go together" in complaint


@pytest.mark.parametrize("name", ["ca_file", "certificate_file"])
def test_files_that_cannot_be_read(name: str) -> None:
    given = {"private_key_file": "/does/not/exist"} if name == "certificate_file" else {}
    with pytest.raises(ValueError, match="/does/not/exist"):
        SageClient("127.0.0.1:1", tls=TlsOptions(**{name: "/does/not/exist"}, **given))
