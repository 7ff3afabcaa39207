"""The engine for people and programs: an OpenAI-compatible server, asyncio streams, and the terminal."""
