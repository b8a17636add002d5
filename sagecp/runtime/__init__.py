"""Does: asyncio, engines, health, monitoring. Feeds the core and performs its effects."""
