"""One rank of `multiprocess.run_ranks`: `python -m tests.rank FOLDER RANK`.

It imports torch only when it runs: a process that a library of the rank starts imports this file again.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import traceback
from pathlib import Path

LAUNCH = "launch.pickle"
"""The file in FOLDER with what all ranks are given: environment, path, pickled function with arguments, seconds."""


def main(folder: Path, rank: int) -> None:
    """One rank's whole life; leaves RANK.result, or RANK.error, and RANK.stack where it is sent SIGUSR1."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    stack = (folder / f"{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    environment, path, call, timeout = pickle.loads((folder / LAUNCH).read_bytes())
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.path[:] = path
    torch.set_num_threads(1)
    gc.set_threshold(20_000, 20, 20)  # tiny models spend a tenth of their time in collections
    try:
        function, args = pickle.loads(call)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=int(environment["WORLD_SIZE"]),
            timeout=timedelta(seconds=timeout),
        )
        result = function(*args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()  # nobody leaves while a peer still talks to it
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)  # no clean-up that could wait for a peer


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
