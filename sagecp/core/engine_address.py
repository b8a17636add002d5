"""Addresses that are no engine's, however they are written.

Whoever registers an instance has the control plane call an address and can read
the answers: it must not be led to what only its own machine may reach, such as the
metadata services of clouds, which hand out credentials to whoever asks from there.
"""

from __future__ import annotations

import ipaddress
import re

_IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Metadata services: AWS (also over IPv6), Google Cloud over IPv6, Alibaba Cloud, Azure's wire server,
# Oracle Cloud; beside 169.254.169.254, which is link-local.
_METADATA_ADDRESSES = frozenset(
    map(
        ipaddress.ip_address,
        ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    )
)
_METADATA_NAMES = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}
)
_METADATA = "is a cloud's metadata service, which hands out credentials, and no engine's"
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")
# Networks whose addresses hold an IPv4 address: translation (RFC 6052), and 6to4 (RFC 3056).
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")


def why_no_engine(host: str) -> str:
    """Return why a host cannot be an engine's, as the end of a sentence; ``""``: it can.

    Names are taken at their word: what they stand for is looked at when a connection is made.

    Args:
        host: A name or an address; IPv4 also in the odd forms that the system's
            resolver takes, such as ``0xa9fea9fe``.
    """
    name = host.lower().rstrip(".")
    if name in _METADATA_NAMES:
        return _METADATA
    address = _address_of(name)
    return "" if address is None else _why_not(address)


def _address_of(text: str) -> _IpAddress | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return _old_ipv4(text)


def _old_ipv4(text: str) -> ipaddress.IPv4Address | None:
    """Return what ``inet_aton`` makes of a text: one to four numbers, the last of which fills up the rest."""
    parts = text.split(".")
    if not 1 <= len(parts) <= 4 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    try:
        *first, last = (_number(part) for part in parts)
    except ValueError:
        return None
    room = 4 - len(first)
    if any(number > 255 for number in first) or last >= 256**room:
        return None
    value = last
    for position, number in enumerate(first):
        value += number << (8 * (3 - position))
    return ipaddress.IPv4Address(value)


def _number(text: str) -> int:
    if text[:2] in {"0x", "0X"}:
        return int(text[2:] or "0", 16)
    return int(text, 8 if text[0] == "0" else 10)


def _why_not(address: _IpAddress) -> str:
    inner = _embedded(address)
    if inner is not None:
        return _why_not(inner)
    if address in _METADATA_ADDRESSES or str(address) == "169.254.169.254":
        return _METADATA
    if address.is_link_local:
        return "is link-local: it reaches only the machine's own services, and no engine of another one"
    if address.is_unspecified:
        return "stands for every address of a machine; give the one under which it is reached"
    if address.is_multicast or str(address) == "255.255.255.255":
        return "reaches many machines, and an engine is one"
    return ""


def _embedded(address: _IpAddress) -> ipaddress.IPv4Address | None:
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    value = int(address)
    # "::1.2.3.4", an old form; "::" and "::1" are addresses of their own.
    if address in _TRANSLATED or 1 < value < 2**32:
        return ipaddress.IPv4Address(value & 0xFFFFFFFF)
    return None
