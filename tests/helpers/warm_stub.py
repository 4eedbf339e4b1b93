"""The program that stands for Python in scripts (see warm.py): imports little, or it would not be quick."""

import os
import signal
import sys


def main(address: str, python: str) -> None:
    """Has the server run this program's arguments, and ends as that process does."""
    import array
    import pickle
    import select
    import socket
    import struct

    arguments, number = sys.argv[1:], struct.Struct("q")
    first = arguments[arguments[0] == "-u"] if arguments else "-"
    if first.startswith("-") and first not in ("-m", "-c"):
        os.execv(python, [python, *arguments])
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "directory": os.getcwd(),  # noqa: PTH109
        "new_session": False,
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    text = pickle.dumps(request)
    outputs = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    connection.sendmsg([number.pack(len(text))], outputs)
    connection.sendall(text)
    (process,) = number.unpack(connection.recv(number.size, socket.MSG_WAITALL))
    # A signal just before a call that blocks would be heard when that returns, which is when the process ends.
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(one, lambda given, _: os.kill(process, given))
    while connection not in (ready := select.select([connection, heard], [], [])[0]):
        os.read(ready[0], 64)
    (code,) = number.unpack(connection.recv(number.size, socket.MSG_WAITALL))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
