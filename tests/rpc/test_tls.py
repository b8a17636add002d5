"""Who may connect: TLS, client certificates, and nobody from outside without either."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import grpc
import pytest
import trustme

from sagecp.config import ConfigError, ServerConfig, TlsConfig
from sagecp.rpc.server import ControlPlaneServer, ListenError, run_server
from sagecp.v1 import admin_service_pb2
from tests.support.rpc_rig import failure_of, running_rig, untyped
from tests.support.waiting import other_tasks

STATUS = admin_service_pb2.GetStatusRequest()


@dataclasses.dataclass
class Pki:
    """An authority with a server's certificate on disk, and what clients need."""

    authority: trustme.CA
    folder: Path
    tls: TlsConfig

    @property
    def roots(self) -> bytes:
        return self.authority.cert_pem.bytes()

    def mutual(self) -> TlsConfig:
        """The server's settings, with client certificates required."""
        path = self.folder / "clients.pem"
        self.authority.cert_pem.write_to_path(path)
        return dataclasses.replace(self.tls, client_ca_file=str(path))


def client_of(pki: Pki, authority: trustme.CA) -> grpc.ChannelCredentials:
    """Return credentials with a client certificate of an authority."""
    certificate = authority.issue_cert("agent@example.org")
    return grpc.ssl_channel_credentials(
        pki.roots, certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
    )


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    folder = tmp_path_factory.mktemp("pki")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "server.key")
    for index, pem in enumerate(certificate.cert_chain_pems):
        pem.write_to_path(folder / "server.pem", append=index > 0)
    return Pki(
        authority,
        folder,
        TlsConfig(certificate_file=str(folder / "server.pem"), private_key_file=str(folder / "server.key")),
    )


async def test_a_client_that_knows_the_authority_gets_through(pki: Pki) -> None:
    async with running_rig(tls=pki.tls, credentials=grpc.ssl_channel_credentials(pki.roots)) as rig:
        assert (await rig.admin.GetStatus(STATUS, timeout=5)).accepting


async def test_a_client_that_does_not_is_warned_off(pki: Pki) -> None:
    strangers = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
    async with running_rig(tls=pki.tls, credentials=strangers) as rig:
        error = await failure_of(rig.admin.GetStatus(STATUS, timeout=5))
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_plaintext_is_not_answered_on_a_tls_port(pki: Pki) -> None:
    async with running_rig(tls=pki.tls) as rig:
        error = await failure_of(rig.admin.GetStatus(STATUS, timeout=5))
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_certificate_of_the_authority_is_accepted(pki: Pki) -> None:
    async with running_rig(tls=pki.mutual(), credentials=client_of(pki, pki.authority)) as rig:
        assert (await rig.admin.GetStatus(STATUS, timeout=5)).accepting


@pytest.mark.parametrize("stranger", [False, True], ids=["none", "of somebody else"])
async def test_without_the_right_client_certificate_nobody_gets_through(pki: Pki, stranger: bool) -> None:
    credentials = client_of(pki, trustme.CA()) if stranger else grpc.ssl_channel_credentials(pki.roots)
    async with running_rig(tls=pki.mutual(), credentials=credentials) as rig:
        error = await failure_of(rig.admin.GetStatus(STATUS, timeout=5))
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_without_tls_only_loopback_is_served() -> None:
    with pytest.raises(ConfigError, match="--insecure-listen"):
        await run_server(ServerConfig(listen="0.0.0.0:0"))


async def test_whoever_insists_may_listen_to_everybody() -> None:
    server = ControlPlaneServer(ServerConfig(listen="0.0.0.0:0", insecure_listen=True).validate())
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = untyped(channel).unary_unary("/sagecp.v1.AdminService/GetStatus")
            assert await call(b"")
            # Channelz shows every peer's address: not to everybody.
            channelz = untyped(channel).unary_unary("/grpc.channelz.v1.Channelz/GetServers")
            error = await failure_of(channelz(b""))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(0.0)


# -- where it cannot listen ----------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_a_port_in_use_is_named(host: str) -> None:
    family = socket.AF_INET6 if "[" in host else socket.AF_INET
    with socket.socket(family) as taken:
        taken.bind((host.strip("[]"), 0))
        taken.listen()
        address = f"{host}:{taken.getsockname()[1]}"
        with pytest.raises(ListenError, match="in use") as caught:
            await ControlPlaneServer(ServerConfig(listen=address)).start()
        assert address in str(caught.value)
        assert "--listen" in str(caught.value)
        with pytest.raises(ListenError):
            await run_server(ServerConfig(listen=address))
    assert not [task for task in other_tasks() if "sagecp" in repr(task)]


async def test_two_servers_do_not_share_a_port() -> None:
    # grpc would let them, and each would get half of the calls.
    async with running_rig() as rig:
        with pytest.raises(ListenError, match="in use"):
            await ControlPlaneServer(ServerConfig(listen=rig.server.address)).start()
        assert (await rig.admin.GetStatus(STATUS)).accepting


async def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ListenError, match=r"203\.0\.113\.1"):
        await ControlPlaneServer(ServerConfig(listen="203.0.113.1:0", insecure_listen=True)).start()


async def test_a_metrics_port_in_use_is_named_and_nothing_stays_open() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = ControlPlaneServer(ServerConfig(listen="127.0.0.1:0", metrics_listen=address))
        with pytest.raises(ListenError, match="--metrics-listen") as caught:
            await server.start()
        assert address in str(caught.value)
    assert not [task for task in other_tasks() if "sagecp" in repr(task)]


@pytest.mark.parametrize("broken", ["certificate_file", "private_key_file", "client_ca_file"])
async def test_a_pem_file_that_is_none_is_refused(pki: Pki, broken: str, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("not a certificate")
    tls = dataclasses.replace(pki.mutual(), **{broken: str(garbage)})
    with pytest.raises(ListenError, match="garbage"):
        await ControlPlaneServer(ServerConfig(listen="127.0.0.1:0", tls=tls).validate()).start()


async def test_a_key_that_belongs_to_another_certificate_is_refused(pki: Pki, tmp_path: Path) -> None:
    pki.authority.issue_cert("other").private_key_pem.write_to_path(tmp_path / "other.key")
    tls = dataclasses.replace(pki.tls, private_key_file=str(tmp_path / "other.key"))
    with pytest.raises(ListenError, match="KEY_VALUES_MISMATCH"):
        await ControlPlaneServer(ServerConfig(listen="127.0.0.1:0", tls=tls)).start()


async def test_a_pem_file_that_cannot_be_read_is_named(pki: Pki, tmp_path: Path) -> None:
    tls = dataclasses.replace(pki.tls, private_key_file=str(tmp_path / "gone.pem"))
    with pytest.raises(ListenError, match=r"gone\.pem"):
        await ControlPlaneServer(ServerConfig(listen="127.0.0.1:0", tls=tls)).start()
