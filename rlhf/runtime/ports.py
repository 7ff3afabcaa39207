"""Free ports, found on the machine that will listen."""

from __future__ import annotations

import random
import socket

# Below the range from which Linux takes the ports of outgoing connections (32768-60999), so that a connection
# made between finding a port and listening on it cannot take it; above the range of Ray's workers
# (10002-19999).
FIRST, LAST = 20500, 32500
_ATTEMPTS = 200


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nothing listens at `host` now. Raises OSError if 200 random ones are taken."""
    draw = random.SystemRandom()
    for _ in range(_ATTEMPTS):
        port = draw.randint(FIRST, LAST)
        if is_free(port, host):
            return port
    raise OSError(f"no free port on {host} among {_ATTEMPTS} tried between {FIRST} and {LAST}")


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on this port now, on `host` and on every interface."""
    for address in (host, ""):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                probe.listen(1)
            except OSError:
                return False
    return True
