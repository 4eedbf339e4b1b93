"""A process that compares mathematical expressions with math-verify, each pair in a child with limits.

math-verify limits time with SIGALRM, in whole seconds and in a main thread only, and takes other timers of its process
away. An expression such as 2^(10^10) ends neither in time nor in memory. So it runs here: the process imports
math-verify once (seconds), and each pair is compared in a fork of it that is killed at its limit.

The process reads a JSON object a line, `{"expected": ..., "given": ..., "limit_s": ...}`, LaTeX without dollars, and
answers each with `{"same": true | false | null, "reason": ...}`; null where it could not be told.
It ends at the end of its input.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

MEMORY_BYTES = 4 * 2**30
_MAX_ANSWER_BYTES = 1000
_WARM_UP = (
    (r"\frac{x^2 - 1}{2}", r"\frac{(x - 1)(x + 1)}{2}"),
    (r"3\sqrt{2} + \pi", r"\pi + \sqrt{18}"),
    ("y = 2x + 3", "2x - y + 3 = 0"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac{4}{2} \end{pmatrix}"),
    ("6 - 5i", r"\{1, 2\}"),
)


def compare(expected: str, given: str) -> bool:
    """Whether math-verify takes `given` for `expected`; it raises what math-verify raises."""
    from math_verify import parse, verify

    sides = []
    for text in (expected, given):
        sides.append(parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True))
    if not all(sides):
        return False
    return bool(verify(sides[0], sides[1], timeout_seconds=None, raise_on_error=True))


def _limited(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request, from a child process."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            answer: dict[str, Any] = {"same": compare(request["expected"], request["given"]), "reason": ""}
        except BaseException as error:  # whatever it is, the child must answer and end
            answer = {"same": None, "reason": f"math-verify raised {type(error).__name__}"}
        os.write(writable, json.dumps(answer).encode())
        os._exit(0)
    os.close(writable)
    try:
        return _read(readable, time.monotonic() + request["limit_s"], request["limit_s"])
    finally:
        os.close(readable)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _read(readable: int, deadline: float, limit_s: float) -> dict[str, Any]:
    ready, _, _ = select.select([readable], [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        return {"same": None, "reason": f"math-verify took more than {limit_s:g} s"}
    # At most PIPE_BUF bytes are written at once, so they arrive at once.
    written = os.read(readable, _MAX_ANSWER_BYTES)
    return json.loads(written) if written else {"same": None, "reason": "math-verify's process died"}


def main() -> None:
    """Answers requests until the end of the input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what math-verify or sympy print must not stand among the answers
    for expected, given in _WARM_UP:  # imports math-verify, and fills the caches that the children inherit
        compare(expected, given)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_limited(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
