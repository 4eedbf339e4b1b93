"""The program that runs a candidate inside the sandbox: it sends outputs to the judge, and judges nothing.

It is sent as text, behind the text of `values.py`, and uses the standard library only. The request is one JSON object
on standard input; records go to the result pipe, one JSON object a line, the first of them `{"ready": 1}`.

A candidate shares the process with this code and may do anything to it. That is no danger to a verdict: no expected
output is here, and the judge believes a record only in so far as it equals what was expected.
"""

import base64
import builtins
import contextlib
import gc
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

from renio_megatron.evaluation.code.values import LONG_TEXT, MAX_CHARS, build, encode

RESULT_FD = 3
_TOLD_CHARS = 300  # of an exception's message
_CHUNK = 1 << 16
_STDERR_TAIL = 4096
_GRACE_S = 2.0
_ENCODE_S = 60.0  # for a large value on a busy machine; its size is bounded
_POLL_S = 0.002
_exit, _write, _clock = os._exit, os.write, time.perf_counter
_KEPT = [sys.stdin, sys.stdout, sys.stderr]  # the first streams would close their descriptors when collected


def send(record: str) -> None:
    """Writes one line to the result pipe."""
    data = (record + "\n").encode("ascii")
    while data:
        data = data[_write(RESULT_FD, data) :]


def send_fields(**fields: Any) -> None:
    """Writes a record of plain fields."""
    send("{" + ",".join(f'"{name}":{encode(value)}' for name, value in fields.items()) + "}")


def told(error: BaseException) -> str:
    """The exception's type and message, shortened; the message may be the candidate's own code."""
    name = type.__dict__["__name__"].__get__(type(error))
    try:
        message = str.__str__(str(error))
    except BaseException:
        message = "(no message)"
    return f"{name}: {message}"[:_TOLD_CHARS]


@contextlib.contextmanager
def time_limit(seconds: float, number: int) -> Iterator[None]:
    """Ends the process with a record where the scope takes longer; `number` is the test's, or -1 for the program."""

    def too_late(signum: int, frame: Any) -> None:
        # No exception: the candidate could catch it.
        send_fields(n=number, late=seconds)
        _exit(1)

    signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # One call into C (a power, a regular expression) keeps Python's handlers waiting: this signal's default kills.
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * seconds + _GRACE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def compiled(source: str) -> Any:
    """The program's code; None, with a record, where it has none."""
    try:
        return compile(source, "<program>", "exec", dont_inherit=True)
    except BaseException as error:  # too deep, too large, a null byte
        send_fields(n=-1, error=told(error) if isinstance(error, SyntaxError) else f"SyntaxError: {told(error)}")
        return None


def set_streams(errors: str) -> None:
    """New standard streams, in UTF-8, on descriptors that have changed."""
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False, encoding="utf-8", errors=errors)  # noqa: SIM115  # as long as the process
        for number, mode in enumerate("rww")
    )


def silence() -> None:
    """Prints go nowhere and reads end at once: what a function prints is no part of its result."""
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        set_streams("replace")


def function_of(module: types.ModuleType, entry_point: str, method: bool) -> Any:
    """What calls the entry point: a function of the program or, for a `method`, that of a new `Solution`."""
    solution = module.__dict__.get("Solution") if method else None
    if solution is not None and hasattr(solution, entry_point):
        return lambda *arguments: getattr(solution(), entry_point)(*arguments)
    if entry_point not in module.__dict__:
        raise NameError(f"the program defines no {entry_point!r}")
    return module.__dict__[entry_point]


def new_module(name: str) -> types.ModuleType:
    """An empty module; it gets the real builtins, of which this code uses a copy."""
    module = sys.modules[name] = types.ModuleType(name)  # dataclasses look their module up
    module.__dict__["__builtins__"] = builtins
    return module


def run_calls(request: dict[str, Any]) -> None:
    """Executes the program once and calls its entry point with each input; stops at the first that fails."""
    code = compiled(request["source"])
    if code is None:
        return None
    silence()
    for library in ("OMP", "OPENBLAS", "MKL"):  # threads of theirs would use up the time of one
        os.environ[f"{library}_NUM_THREADS"] = "1"
    module = new_module("program")
    try:
        with time_limit(request["load_s"], -1):
            exec(request["prelude"], module.__dict__)
            exec(code, module.__dict__)
            function = function_of(module, request["entry_point"], request["method"])
    except BaseException as error:
        return send_fields(n=-1, error=told(error))
    for number, (arguments, seconds) in enumerate(zip(request["inputs"], request["seconds"], strict=True)):
        inputs = build(arguments)
        try:
            with time_limit(seconds, number):
                start = _clock()
                value = function(*inputs)
                spent = _clock() - start
            with time_limit(seconds + _ENCODE_S, number):
                text = encode(value, MAX_CHARS, LONG_TEXT)
        except BaseException as error:
            return send_fields(n=number, error=told(error))
        send(f'{{"n":{number},"s":{spent:.6f},"value":{text}}}')
    return None


def run_programs(request: dict[str, Any]) -> bool:
    """Runs the program once for each text of standard input; stops at the first that fails. True in a child."""
    code = compiled(request["source"])
    if code is None:
        return False
    gc.freeze()  # pages stay shared with the children
    for number, (text, cap) in enumerate(zip(request["stdins"], request["caps"], strict=True)):
        given = text.encode("utf-8", "surrogatepass")
        try:
            child, pipes = start_child()
        except OSError as error:  # at the beginning it worked
            send_fields(n=number, error=told(error))
            return False
        if child == 0:
            run_as_main(code)
            return True
        start = _clock()
        output, errors, end = watch(child, pipes, given, request["seconds"], cap)
        last = (errors.decode("utf-8", "replace").strip().splitlines() or [""])[-1][:_TOLD_CHARS]
        out = base64.b64encode(output).decode("ascii")
        send_fields(n=number, s=_clock() - start, end=end, last=last, out=out)
        if end != "0":
            return False
    return False


def check_forking() -> None:
    """Raises OSError where no child can be started: before a candidate can have a part in that."""
    child = os.fork()
    if child == 0:
        _exit(0)
    os.waitpid(child, 0)


def start_child() -> tuple[int, tuple[int, int, int]]:
    """Forks: (child, its standard input's, output's and error's other ends); the child sees itself as 0."""
    # A pipe and no file for the input: files of a sandbox have limits of their own.
    pairs = os.pipe(), os.pipe(), os.pipe()
    theirs = (pairs[0][0], pairs[1][1], pairs[2][1])
    child = os.fork()
    if child == 0:
        os.setsid()
        for target, source in enumerate(theirs):
            os.dup2(source, target)
        os.closerange(RESULT_FD, max(map(max, pairs)) + 1)
    else:
        for descriptor in theirs:
            os.close(descriptor)
    return child, (pairs[0][1], pairs[1][0], pairs[2][0])


def run_as_main(code: Any) -> None:
    """Executes the program as `__main__`; what it raises ends the interpreter in the ordinary way."""
    _KEPT.append(sys.modules["__main__"])
    set_streams("surrogateescape")
    sys.argv = ["program.py"]
    exec(code, new_module("__main__").__dict__)


def feed(pipe: int, text: memoryview) -> memoryview:
    """Writes what the pipe takes; what is left, or nothing where nobody reads any more."""
    try:
        return text[os.write(pipe, text[:_CHUNK]) :]
    except BlockingIOError:
        return text
    except BrokenPipeError:
        return text[len(text) :]


def watch(child: int, pipes: tuple[int, int, int], text: bytes, seconds: float, cap: int) -> tuple[bytes, bytes, str]:
    """What the child writes to its two pipes, and how it ends: its exit code as text, `late` or `cut`."""
    deadline, output, errors, end = _clock() + seconds, bytearray(), bytearray(), ""
    given, left, status = pipes[0], memoryview(text), None
    readable, writable = list(pipes[1:]), [given]
    os.set_blocking(given, False)
    while not end:
        ready, free, _ = select.select(readable, writable, [], 0 if status is not None else _POLL_S)
        if free and not (left := feed(given, left)):
            writable.clear()
            os.close(given)
        for pipe in ready:
            data = os.read(pipe, _CHUNK)
            if not data:
                readable.remove(pipe)
            elif pipe == pipes[1]:
                output += data
            else:
                errors = (errors + data)[-_STDERR_TAIL:]
        if len(output) > cap:
            end = "cut"
        elif status is not None and not ready:  # a grandchild may hold the pipes open: they have been read empty
            end = str(os.waitstatus_to_exitcode(status))
        elif _clock() > deadline:
            end = "late"
        elif status is None and (not ready or not readable):
            ended, code = os.waitpid(child, os.WNOHANG)
            status = code if ended else None
    for kill in (os.killpg, os.kill) if status is None else (os.killpg,):
        with contextlib.suppress(OSError):
            kill(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    for pipe in (*writable, *pipes[1:]):
        os.close(pipe)
    return bytes(output[:cap]), bytes(errors), end


def main() -> None:
    """Reads the request, and obeys it."""
    request = json.loads(sys.stdin.buffer.read())
    for name in ("exit", "quit"):  # an interpreter that was started without `site` has none
        if not hasattr(builtins, name):
            setattr(builtins, name, sys.exit)
    with contextlib.suppress(OSError, ValueError):
        most = resource.getrlimit(resource.RLIMIT_STACK)[1]  # deep recursion is honest
        resource.setrlimit(resource.RLIMIT_STACK, (most, most))
    try:
        if request["kind"] == "programs":
            check_forking()
    except OSError as error:
        send_fields(fault=told(error))
        _exit(1)
    send_fields(ready=1)
    if request["kind"] == "programs":
        if run_programs(request):
            return
    else:
        run_calls(request)
    _exit(0)  # nothing of the candidate's runs on the way out


if __name__ == "__main__":
    main()
