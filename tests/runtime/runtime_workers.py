"""Small workers for the tests of groups; they are imported by the actors too."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from pathlib import Path


class Recorder:
    """Answers calls; notes that it was closed in `closed` (a list, or a file's path)."""

    def __init__(self, info, *, offset=0, closed=None, close_s=0.0, fail=False, function=None, model=None):
        if fail:
            raise ValueError("the constructor refuses")
        self.info, self.offset, self.closed, self.function, self.model = info, offset, closed, function, model
        self.close_s = close_s
        self.noted = []

    def add(self, a, b=1):
        return self.offset + a + b + self.info.rank

    def note(self, item):
        self.noted.append(item)
        return list(self.noted)

    def double(self, value):
        return 2 * value

    def boom(self):
        raise ValueError("a bad value")

    def stubborn(self):
        class Stubborn(Exception):
            def __init__(self, *, reason):
                super().__init__(reason)

        raise Stubborn(reason="cannot be pickled")

    def warn(self):
        logging.getLogger("rlhf.test").warning("take care")

    def sleep(self, seconds):
        time.sleep(seconds)

    def apply(self, value):
        return self.function(value)

    def forward(self, x):
        return self.model(x).detach()

    def where(self):
        return {
            "info": self.info,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "cwd": os.getcwd(),
            "env": {
                name: os.environ.get(name)
                for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONPATH")
            },
        }

    def shadowed(self):
        """Whether a top-level `kernels` is visible as a regular package of ours."""
        import rlhf

        root = Path(rlhf.__file__).resolve().parent.parent
        try:
            import kernels
        except ModuleNotFoundError:
            return False
        return kernels.__file__ is not None and Path(kernels.__file__).is_relative_to(root)

    def lose_a_peer(self):
        """Rank 1 is killed; the others fail because it is gone, before anybody reports the death."""
        if self.info.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ConnectionError("connection reset by peer")

    def terminate_self(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return "still here"

    def close(self):
        time.sleep(self.close_s)
        if isinstance(self.closed, list):
            self.closed.append(self.info.group)
        elif self.closed is not None:
            Path(self.closed).write_text("closed")
