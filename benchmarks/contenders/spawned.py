"""``multiprocessing`` as it starts a process: ``python spawned.py N``. Imports nothing else."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from typing import Any


def echo(pipe: Any) -> None:
    """Answer once."""
    pipe.send(pipe.recv())


def main(n: int) -> None:
    """Start n processes, one after the other; each is up when it has answered."""
    context = multiprocessing.get_context("spawn")
    laps = []
    for _ in range(n):
        lap = time.perf_counter()
        ours, theirs = context.Pipe()
        process = context.Process(target=echo, args=(theirs,))
        process.start()
        ours.send("warm")
        assert ours.recv() == "warm"
        laps.append(time.perf_counter() - lap)
        process.join()
    print(json.dumps({"count": n, "laps": laps}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
