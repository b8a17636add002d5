"""Values inside records, as bytes: MessagePack of the core's own types."""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from sagecp.core.prediction.step_time import StepTimeParameters
from sagecp.core.types import (
    EngineCapability,
    ExecutionInstance,
    GpuDevice,
    PromptDigest,
    RequestMetadata,
    RequestStatus,
)
from sagecp.runtime.engines.base import EngineDelta
from sagecp.runtime.store.records import (
    InstanceKept,
    OutputProduced,
    PromptTokenized,
    Record,
    RequestAccepted,
    RequestEnded,
)

# What a record and a piece take beside their contents, roughly.
_OVERHEAD_BYTES = 256
_PIECE_BYTES = 64

_encode = msgspec.msgpack.Encoder().encode
_METADATA_FIELDS = tuple(field.name for field in dataclasses.fields(RequestMetadata))
_metadata_values = operator.attrgetter(*_METADATA_FIELDS)
_decode_metadata = msgspec.msgpack.Decoder(RequestMetadata).decode
_decode_devices = functools.partial(msgspec.convert, type=tuple[GpuDevice, ...])
_decode_status = msgspec.msgpack.Decoder(RequestStatus).decode


def encode_metadata(metadata: RequestMetadata, digest: PromptDigest) -> bytes:
    """Return what was asked as bytes, with the prompt's digest, so that a restart need not make it again."""
    fields = dict(zip(_METADATA_FIELDS, _metadata_values(metadata), strict=True))
    # A copy of the metadata for this one field would cost as much as all the rest.
    fields["prompt_digest"] = digest
    return _encode(fields)


def decode_metadata(data: bytes) -> RequestMetadata:
    """Return what :func:`encode_metadata` was given."""
    return _decode_metadata(data)


def encode_status(status: RequestStatus) -> bytes:
    """Return what is told of a request as bytes."""
    return _encode(status)


def decode_status(data: bytes) -> RequestStatus:
    """Return what :func:`encode_status` was given."""
    return _decode_status(data)


def encode_instance(instance: ExecutionInstance) -> bytes:
    """Return an instance's specification as bytes."""
    return _encode(instance)


def decode_instance(data: bytes) -> ExecutionInstance:
    """Return what :func:`encode_instance` was given."""
    # Not by type: the core names one of the fields' types for checkers only.
    fields: dict[str, Any] = msgspec.msgpack.decode(data)
    fields["model_aliases"] = tuple(fields["model_aliases"])
    fields["gpu_devices"] = _decode_devices(fields.get("gpu_devices", ()))
    fields["engine_capabilities"] = frozenset(map(EngineCapability, fields.get("engine_capabilities", ())))
    if fields["step_time"] is not None:
        fields["step_time"] = StepTimeParameters(**fields["step_time"])
    return ExecutionInstance(**fields)


def pack_token_ids(token_ids: Iterable[int]) -> bytes:
    """Return token ids as four little-endian bytes each."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_token_ids(data: bytes) -> array[int]:
    """Return what :func:`pack_token_ids` was given."""
    unpacked = array("I", data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked


_decode_record: Callable[[bytes], Record] = msgspec.msgpack.Decoder(Record).decode
_decode_pieces = msgspec.msgpack.Decoder(tuple[EngineDelta, ...]).decode


def encode_record(record: Record) -> bytes:
    """Return a record as bytes, with its type."""
    return _encode(record)


def decode_record(data: bytes) -> Record:
    """Return what :func:`encode_record` was given."""
    return _decode_record(data)


def encode_pieces(pieces: tuple[EngineDelta, ...]) -> bytes:
    """Return pieces of output as bytes."""
    return _encode(pieces)


def decode_pieces(data: bytes) -> tuple[EngineDelta, ...]:
    """Return what :func:`encode_pieces` was given."""
    return _decode_pieces(data)


def approximate_byte_count(record: Record) -> int:
    """Return about what a record takes in memory and as bytes, without encoding it."""
    if isinstance(record, RequestAccepted):
        return _OVERHEAD_BYTES + len(record.metadata)
    if isinstance(record, OutputProduced):
        return _OVERHEAD_BYTES + _pieces_byte_count(record.pieces)
    if isinstance(record, RequestEnded):
        return _OVERHEAD_BYTES + len(record.status) + _pieces_byte_count(record.pieces)
    if isinstance(record, PromptTokenized):
        return _OVERHEAD_BYTES + len(record.token_ids)
    if isinstance(record, InstanceKept):
        return _OVERHEAD_BYTES + len(record.specification)
    return _OVERHEAD_BYTES


def _pieces_byte_count(pieces: tuple[EngineDelta, ...]) -> int:
    byte_count = 0
    for piece in pieces:
        byte_count += _PIECE_BYTES + len(piece.text) + 4 * piece.token_count
        if piece.raw is not None:
            byte_count += len(piece.raw)
    return byte_count
