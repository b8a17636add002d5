"""Speaks HTTP with the engine beside the agent."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Any, Self

import aiohttp
import msgspec

from sagecp.agent.config import AgentConfig

# Larger pages than this are not an engine's.
_MAX_JSON_BYTES = 8 << 20
_MAX_REASON_LENGTH = 256
_MAX_ERROR_BYTES = 16 << 10


class EngineAnswerError(Exception):
    """The engine answered with something that an agent cannot work with; says what."""


class EngineHttp:
    """A client of one engine. Use as an asynchronous context manager.

    Args:
        config: Where the engine is, and the key that it asks for.

    Attributes:
        url: Of the engine, without a trailing slash.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.url = config.engine.url
        self._authorization = (
            {"Authorization": f"Bearer {config.engine_api_key}"} if config.engine_api_key else {}
        )
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # Idle connections go before the engine drops them after 5 s: no race for a dying one.
            connector=aiohttp.TCPConnector(limit=4, keepalive_timeout=4.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Over loopback, packing a page costs both sides more than sending it.
            headers={"Accept-Encoding": "identity"},
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def open(self, path: str) -> aiohttp.client._RequestContextManager:
        """Return a GET of a page; redirects are not followed."""
        assert self._session is not None, "use `async with`"  # noqa: S101
        return self._session.get(
            self.url + path,
            headers=self._authorization if path.startswith("/v1/") else None,
            allow_redirects=False,
        )

    async def get_json(self, path: str) -> tuple[int, Any, str]:
        """Return the status, the body where the status is 200, and the server's name.

        Raises:
            EngineAnswerError: The body is no JSON, or too large.
            aiohttp.ClientError: There was no answer.
        """
        async with self.open(path) as response:
            server = response.headers.get("Server", "")[:128]
            if response.status != 200:
                return response.status, None, server
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > _MAX_JSON_BYTES:
                    raise EngineAnswerError(
                        f"{self.url}{path} answered with more than {_MAX_JSON_BYTES} bytes"
                    )
        try:
            return 200, msgspec.json.decode(body), server
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise EngineAnswerError(f"{self.url}{path} answered with something else than JSON") from None

    async def has_page(self, path: str) -> bool:
        """Return whether there is a page that takes POST, without using it.

        A GET is refused where there is one (405), and the page not found where there is none.
        """
        async with self.open(path) as response:
            return response.status in {200, 405, 422}

    async def post(
        self,
        path: str,
        timeout_s: float,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        """Post to a page.

        Returns:
            The status, and what an error says; a status of 0: there was no answer, for that reason.
        """
        assert self._session is not None, "use `async with`"  # noqa: S101
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.post(
                    self.url + path,
                    json=body,
                    headers={**self._authorization, **(headers or {})},
                    allow_redirects=False,
                ) as response,
            ):
                answer = await response.content.read(_MAX_ERROR_BYTES)
                return response.status, "" if response.status == 200 else _error_text(answer)
        except TimeoutError:
            return 0, f"no answer within {timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return 0, describe(error)


def _error_text(body: bytes) -> str:
    """Return what an OpenAI-like error says, or the text of another one."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = body.decode("utf-8", "replace")
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    text = " ".join(str(value).split())
    return "".join(character for character in text if character.isprintable())[:_MAX_REASON_LENGTH]


def describe(error: BaseException) -> str:
    """Return an error of a connection in a few words."""
    if isinstance(error, aiohttp.ClientConnectorError):
        cause: BaseException = error.os_error
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused: nothing listens there"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {cause.reason or cause}"
        return (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__)[:_MAX_REASON_LENGTH]
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (str(error) or type(error).__name__)[:_MAX_REASON_LENGTH]
