"""Decides. Pure: events in, effects out; no I/O, no clock reads, no asyncio, no grpc."""
