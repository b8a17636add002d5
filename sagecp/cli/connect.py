"""Runs a command's conversation with a control plane."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sagecp.cli.exit_codes import ExitCode
from sagecp.cli.failures import CliError, from_client_error
from sagecp.cli.options import ServerOptions
from sagecp.client import NO_RETRY, ClientError, RetryPolicy, SageClient, TlsOptions

T = TypeVar("T")

_CALL_TIMEOUT_S = 30.0


def talk(
    options: ServerOptions,
    conversation: Callable[[SageClient], Awaitable[T]],
    retry: RetryPolicy = NO_RETRY,
) -> T:
    """Connect, have a conversation, and return its result.

    Args:
        options: Where and how.
        conversation: What to do with the client.
        retry: A person would rather know at once that the server is not there,
            and can repeat a command; long streams are resumed.

    Raises:
        CliError: It went wrong; says how and what to do.
    """
    tls: TlsOptions | None = None
    if options.tls or options.ca_file or options.certificate_file or options.private_key_file:
        tls = TlsOptions(
            ca_file=options.ca_file,
            certificate_file=options.certificate_file,
            private_key_file=options.private_key_file,
            server_name=options.server_name,
        )

    async def run() -> T:
        try:
            client = SageClient(
                options.server,
                tls=tls,
                token=options.token or None,
                timeout_s=_CALL_TIMEOUT_S if options.timeout_s is None else options.timeout_s,
                retry=retry,
            )
        except ValueError as error:
            raise CliError(str(error), exit_code=ExitCode.INVALID) from error
        async with client:
            return await conversation(client)

    try:
        return asyncio.run(run())
    except ClientError as error:
        raise from_client_error(error, server=options.server) from error
