"""A server in this process: from a socket to the last answer after SIGTERM.

Not here: what it answers (`rlhf.serving.app`), and where it may listen (`rlhf.serving.settings`).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from rlhf.serving.app import Server
from rlhf.serving.async_engine import AsyncEngine
from rlhf.serving.model import Served
from rlhf.serving.settings import ServeSettings

_LAST_WORDS_S = 5.0  # for answers to be written after everything in work has ended
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Uvicorn(uvicorn.Server):
    """Leaves signals alone, and says when it listens."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()


async def serve(
    served: Served,
    settings: ServeSettings,
    bound: socket.socket,
    *,
    on_start: Callable[[], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Answer on the bound socket until `stop` is set, or SIGINT or SIGTERM comes where this is the main thread's loop.

    Then nothing new is taken; what is in work has `settings.grace_s` to finish and is ended with an error after that, or
    at a second signal.
    """
    engine = AsyncEngine(served.engine, max_waiting=settings.max_waiting)
    engine.start()
    app = Server(served, engine).app(api_key=settings.api_key, host=settings.host)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=int(settings.grace_s + _LAST_WORDS_S) + 1,
    )
    server = _Uvicorn(config, on_start)
    stop = stop or asyncio.Event()
    hurried: list[asyncio.Task[None]] = []

    def on_signal() -> None:
        if stop.is_set():
            hurried.append(asyncio.ensure_future(engine.close()))
        stop.set()

    with _signals(on_signal):
        running = asyncio.create_task(server.serve(sockets=[bound]))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        server.should_exit = True
        await engine.close(settings.grace_s)
        await running


@contextlib.contextmanager
def _signals(handler: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    try:
        for number in _SIGNALS:
            loop.add_signal_handler(number, handler)
    except (RuntimeError, ValueError):  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
