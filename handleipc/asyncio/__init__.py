"""The asyncio front: channels, processes and servers on an event loop (uvloop too)."""
