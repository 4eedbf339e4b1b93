"""The process that `warm.py` asks for others: imports once, forks for every request, tells how each child ended.

python -m tests.helpers.warm_server SOCKET      says `ready`; ends, and kills its children, when its standard input does
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import selectors
import signal
import socket
import sys
from pathlib import Path

from tests.helpers.warm import NUMBER
from tests.helpers.warm_child import become, remember_filters

IMPORTS = (
    "torch.distributed.launcher.api",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.transformer.moe.token_dispatcher",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.generation.utils",
    "peft",
    "yaml",
    "rich.table",
    "matplotlib.figure",
)
"""What takes long. Nothing of renio_megatron: every child imports the package itself, and finds torch as it is."""


def serve(address: str) -> None:
    """Answers until standard input ends."""
    children: dict[int, socket.socket] = {}  # by process id
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen(64)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, or nothing would wake the selector
        signal.set_wakeup_fd(wake_write)
        for file in (listener, 0, wake_read):
            selector.register(file, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    for process in children:
                        os.kill(process, signal.SIGKILL)
                    return
                if key.fileobj == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                elif key.fileobj is listener:
                    connection = listener.accept()[0]
                    process = _fork(connection)
                    children[process] = connection
                    selector.register(connection, selectors.EVENT_READ, process)
                    connection.sendall(NUMBER.pack(process))
                else:  # whoever asked for it is gone, or does not want it any more
                    selector.unregister(key.fileobj)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(key.data, signal.SIGKILL)
            for process in _ended():
                connection = children.pop(process[0])
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(NUMBER.pack(process[1]))
                connection.close()


def _ended() -> list[tuple[int, int]]:
    """Children that ended since the last call: process id and exit code, negative for a signal."""
    found = []
    with contextlib.suppress(ChildProcessError):
        while (result := os.waitpid(-1, os.WNOHANG))[0]:
            found.append((result[0], os.waitstatus_to_exitcode(result[1])))
    return found


def _fork(connection: socket.socket) -> int:
    """Reads a request and forks; returns in the parent only."""
    size, outputs, _, _ = socket.recv_fds(connection, NUMBER.size, 3)
    text = b""
    while len(text) < NUMBER.unpack(size)[0]:
        text += connection.recv(1 << 20)
    process = os.fork()
    if process == 0:
        become(**pickle.loads(text), outputs=outputs)
    for output in outputs:
        os.close(output)
    return process


def _import() -> None:
    import importlib

    gc.disable()  # what an import makes stays: to look through it again and again takes a quarter of the time
    for name in IMPORTS:
        with contextlib.suppress(ImportError):  # an extra that is not here
            importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        print(f"imports left {threads} threads, and a fork takes one of them")
        raise SystemExit(1)
    remember_filters()
    gc.collect()
    gc.freeze()  # pages of what is imported stay shared
    gc.enable()


if __name__ == "__main__":
    _import()
    serve(sys.argv[1])
