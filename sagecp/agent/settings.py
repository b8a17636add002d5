"""From what the command line says of several engines to one configuration for each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from sagecp.agent.config import AgentConfig, Supervision
from sagecp.agent.kv_events.address import AUTO, OFF
from sagecp.core.errors import FieldViolation, InvalidRequestError

# Where engines listen that are not told a port.
_DEFAULT_PORT = 8000
_SGLANG_PORT = 30000
_EVERY_ADDRESS = frozenset({"", "0.0.0.0", "::", "[::]"})  # noqa: S104 - read, not bound
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def engine_url_of(command: Sequence[str]) -> str:
    """Return where an engine will listen that is started by a command.

    Reads ``--port`` and ``--host`` as vLLM and SGLang do, the last of each.
    """
    is_sglang = any("sglang" in word for word in command[:8])
    values = {"port": str(_SGLANG_PORT if is_sglang else _DEFAULT_PORT), "host": ""}
    words = iter(command)
    for word in words:
        name, equals, value = word.partition("=")
        if name in {"--port", "--host"}:
            values[name[2:]] = value if equals else next(words, "")
    host = "127.0.0.1" if values["host"] in _EVERY_ADDRESS else values["host"].strip("[]")
    return f"http://[{host}]:{values['port']}" if ":" in host else f"http://{host}:{values['port']}"


def agent_configs(
    engines: Sequence[str],
    *,
    instance_id: str = "",
    advertised_urls: Sequence[str] = (),
    model_names: Sequence[str] = (),
    gpus: Sequence[tuple[str, ...]] = (),
    kv_events: Sequence[str] = (),
    supervision: Supervision | None = None,
    common: Mapping[str, Any],
) -> list[AgentConfig]:
    """Return a validated configuration for each engine of a host.

    Args:
        engines: ``URL``, or ``NAME=URL`` to name the instance.
        instance_id: Of the only engine.
        advertised_urls: None, or one for each engine, in order; the two after it likewise.
        model_names: One may also be for all.
        gpus: Of each engine.
        kv_events: Likewise; ``auto`` and ``off`` may also be for all.
        supervision: Of the only engine; without ``engines``, its command says where it is.
        common: Settings that are the same for all.

    Raises:
        InvalidRequestError: Names every flag whose value is not usable.
    """
    violations: list[FieldViolation] = []
    if supervision is not None and not engines:
        engines = [engine_url_of(supervision.command)]
    if not engines:
        violations.append(FieldViolation("--engine", "is needed: the URL of an engine"))
    named = [_split_name(text) for text in engines]
    count = len(named)
    if count > 1 and instance_id:
        violations.append(
            FieldViolation("--instance-id", "is for one engine; name several by --engine NAME=URL")
        )
    if count > 1 and supervision is not None:
        violations.append(FieldViolation("--supervise", "is for one engine; run an agent for each"))
    for flag, given, one_is_enough in (
        ("--advertise", len(advertised_urls), False),
        ("--model", len(model_names), True),
        ("--gpus", len(gpus), False),
        ("--kv-events", len(kv_events), not set(kv_events) - {AUTO, OFF}),
    ):
        if given not in {0, count} and not (one_is_enough and given == 1):
            violations.append(
                FieldViolation(flag, f"is given {given} times for {count} engines; give it once for each")
            )
    for name, _ in named:
        if name and not _NAME.fullmatch(name):
            violations.append(
                FieldViolation("--engine", f"{name!r} is no id: 1 to 128 characters of A-Z a-z 0-9 . _ : -")
            )
    if violations:
        raise InvalidRequestError(violations)
    configs = [
        AgentConfig(
            engine_url=url,
            instance_id=instance_id or name,
            advertised_url=advertised_urls[index] if advertised_urls else "",
            model_name=model_names[index % len(model_names)] if model_names else "",
            gpus=gpus[index] if gpus else None,
            kv_events=kv_events[index % len(kv_events)] if kv_events else OFF,
            supervision=supervision,
            **common,
        )
        for index, (name, url) in enumerate(named)
    ]
    for config in configs:
        try:
            config.validate()
        except InvalidRequestError as error:
            violations += [each for each in error.violations if each not in violations]
    if not violations:
        ids = [config.effective_instance_id for config in configs]
        violations += [
            FieldViolation("--engine", f"{name!r} names two engines; tell them apart by --engine NAME=URL")
            for name in sorted({name for name in ids if ids.count(name) > 1})
        ]
    if violations:
        raise InvalidRequestError(violations)
    return configs


def _split_name(text: str) -> tuple[str, str]:
    """Split ``NAME=URL``; a URL has its first ``=`` behind ``://``, if any."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and not urlsplit(name).netloc else ("", text)
