"""One rank of `multiprocess.Ranks`: `python -m tests.helpers.rank FOLDER RANK`.

It imports torch only when it runs: a process that a library of the rank starts imports this file again.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import traceback
from pathlib import Path

LAUNCH = "launch.pickle"
"""The file in FOLDER with what all ranks are given: environment, path, seconds that a call may take."""


def main(folder: Path, rank: int) -> None:
    """One rank's whole life: a call for each line of standard input, until that ends.

    It reads NUMBER.call and leaves NUMBER.RANK.result; or RANK.error, and RANK.stack where it is sent SIGUSR1.
    """
    gc.set_threshold(20_000, 20, 20)  # tiny models, and imports, spend much of their time in collections
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from renio_megatron.parallel.gloo import share_gloo_device

    stack = (folder / f"{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    environment, path, timeout = pickle.loads((folder / LAUNCH).read_bytes())
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    tempfile.tempdir = None
    sys.path[:] = path
    torch.set_num_threads(1)
    calls = os.fdopen(os.dup(0))  # nothing that a call starts may read them
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        share_gloo_device()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=int(environment["WORLD_SIZE"]),
            timeout=timedelta(seconds=timeout),
        )
        for number, _ in enumerate(calls):
            function, args = pickle.loads((folder / f"{number}.call").read_bytes())
            unfinished = folder / f"{number}.{rank}.unfinished"
            unfinished.write_bytes(pickle.dumps(function(*args)))
            unfinished.rename(folder / f"{number}.{rank}.result")
            dist.barrier()  # nobody goes on, or leaves, while a peer still talks to it
        # Groups are left to the end of the process: to take hundreds of them apart takes seconds.
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)  # no clean-up that could wait for a peer


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
