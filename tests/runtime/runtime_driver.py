"""A controller with a Ray cluster of its own, which the tests end in several ways."""

from __future__ import annotations

import sys
import time

from rlhf.recipe.schema import RuntimeConfig
from rlhf.runtime.groups import GroupSpec, launch

HOW = sys.argv[1]


def main() -> None:
    spec = GroupSpec("only", ("actor",), 1, 0, "runtime_workers:Recorder")
    with launch([spec], RuntimeConfig(backend="ray", bucket_mb=1)) as groups:
        print("folder", groups["only"].logs.parents[2], flush=True)
        print("pid", groups["only"].call("where")[0]["pid"], flush=True)
        if HOW == "exception":
            raise RuntimeError("the controller fails")
        if HOW == "busy":
            print("ready", flush=True)
            groups["only"].call("sleep", 600)
        if HOW == "idle":
            print("ready", flush=True)
            time.sleep(600)


main()
