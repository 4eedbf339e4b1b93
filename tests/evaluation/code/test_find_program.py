"""The program in a completion: a table of what models write."""

from __future__ import annotations

import pytest

from renio_megatron.evaluation.code.programs import find_program

F = "def f(x):\n    return x + 1\n"
HEAD = 'import math\n\n\ndef f(x):\n    """One more.\n\n    >>> f(1)\n    2\n    """\n'


def run(program, entry_point="f"):
    """The value of f(1) in the program, executed as the judge does."""
    names = {"__name__": "program"}
    exec(program, names)
    found = names.get("Solution")
    return (getattr(found(), entry_point) if found else names[entry_point])(1)


def fenced(text, tag="python", fence="```"):
    text = text if text.endswith("\n") else text + "\n"
    return f"{fence}{tag}\n{text}{fence}\n"


COMPLETIONS = {
    "bare": F,
    "one block": f"Sure!\n\n{fenced(F)}\nIt adds one.",
    "no tag": f"Sure!\n\n{fenced(F, '')}\nIt adds one.",
    "capital tag": fenced(F, "Python"),
    "py tag": fenced(F, "py"),
    "python3 tag": fenced(F, "python3"),
    "attributes": fenced(F, "python title=f.py"),
    "braces": fenced(F, "{.python}"),
    "tildes": fenced(F, fence="~~~"),
    "four backticks": fenced(F, fence="````"),
    "backticks inside": fenced(
        F.replace("return", '"""\n    ```\n    f(1)\n    ```\n    """\n    return'), fence="````"
    ),
    "open fence": f"```python\n{F}",
    "open fence and prose": f"```python\n{F}\nThis adds one to x, as was asked for.",
    "carriage returns": f"Sure!\r\n\r\n{fenced(F)}".replace("\n", "\r\n"),
    "tabs": fenced(F.replace("    ", "\t")),
    "tabs and spaces": fenced("def f(x):\n    if x:\n\treturn x + 1\n    return 1\n"),
    "a closing fence behind code": f"```python\n{F.rstrip()}```\nDone.\n",
    "indented fence": "1. Write it:\n\n" + "".join(f"   {line}\n" for line in fenced(F).splitlines()),
    "quoted prose before": f"> think about it\n\n{fenced(F)}",
    "thought": f"<think>\n{fenced('def f(x): return 0')}\n</think>\n\n{fenced(F)}",
    "thought without its beginning": f"{fenced('def f(x): return 0')}\n</think>\n\n{fenced(F)}",
    "two thoughts": f"<think>a</think> No. <think>b</think>\n{fenced(F)}",
    "marked thought": f"<|begin_of_thought|>def f(x): return 0<|end_of_thought|>\n{fenced(F)}",
    "the last of two": f"{fenced('def f(x): return 0')}\nWrong. Better:\n{fenced(F)}",
    "an example behind": f"{fenced(F)}\nUse it:\n{fenced('print(f(1))')}",
    "output behind": f"{fenced(F)}\nIt prints:\n{fenced('2', '')}",
    "shell behind": f"{fenced(F)}\nRun it:\n{fenced('python f.py', 'bash')}",
    "a helper in an earlier block": f"{fenced('def more(x):' + chr(10) + '    return x + 1')}\nThen:\n"
    f"{fenced('def f(x):' + chr(10) + '    return more(x)')}",
    "a chain of helpers": f"{fenced('ONE = 1')}\n{fenced('def more(x):' + chr(10) + '    return x + ONE')}\n"
    f"{fenced('def f(x):' + chr(10) + '    return more(x)')}",
    "imports in an earlier block": f"{fenced('import math')}\n{fenced('f = lambda x: math.floor(x + 1)')}",
    "imports": fenced(f"import math\nfrom math import *\n\n{F}"),
    "main": fenced(f"{F}\nif __name__ == '__main__':\n    raise SystemExit(f(1))\n"),
    "a wrong assertion": fenced(f"{F}\nassert f(1) == 3\n"),
    "prints": fenced(f"{F}\nprint(f('a'))\nprint(undefined)\n"),
    "input": fenced(f"{F}\nn = int(input())\nprint(f(n))\n"),
    "a loop of tests": fenced(f"{F}\ntests = [(1, 3)]\nfor x, y in tests:\n    assert f(x) == y\n"),
    "a test function": fenced(f"{F}\ndef test_f():\n    assert f(1) == 3\n\ntest_f()\n"),
    "unittest": fenced(
        f"import unittest\n{F}\nclass T(unittest.TestCase):\n    def test(self):\n        f(1)\n\nunittest.main()\n"
    ),
    "a variable that is not needed": fenced(f"{F}\nresult = undefined(3)\nother: int = result\n"),
    "a chain of variables": fenced("A = 1\nB = [A]\nC, D = B, 0\nD += 0\n\ndef f(x):\n    return x + C[D]\n"),
    "a table filled later": fenced("t = {}\none = 1\nt[1] = one + 1\n\ndef f(x):\n    return t[x]\n"),
    "a name looked up": fenced("one = 1\n\ndef f(x):\n    return x + globals()['one']\n"),
    "an attribute": fenced("one = 2\n\ndef f(x):\n    return f.memo[x]\n\nf.memo = {1: one}\n"),
    "a table that is needed": fenced(
        "TABLE = {}\nfor i in range(9):\n    TABLE[i] = i + 1\n\ndef f(x):\n    return TABLE[x]\n"
    ),
    "a call that is needed": fenced(f"import sys\nsys.setrecursionlimit(5000)\n{F}"),
    "a wrapper": fenced(f"import functools\n{F}\nf = functools.lru_cache(f)\n"),
    "a memo behind": fenced("def f(x):\n    return memo[x]\n\nmemo = {1: 2}\n"),
    "a lambda": fenced("f = lambda x: x + 1\n"),
    "a decorator": fenced("from functools import cache\n\n@cache\ndef f(x):\n    return x + 1\n"),
    "a method": fenced(
        "class Solution:\n    def f(self, x: int) -> int:\n        return x + 1\n\nprint(Solution().f('a'))\n"
    ),
    "prose around no fence": f"Here is the function:\n\n{F}\nIt adds one to x.",
    "prose and imports around no fence": f"Well, let us see.\nimport math\n\n{F}\nThat's it!",
    "one fence that does not begin": f"{F}```\nDone.",
    "no new line at the end": F.rstrip(),
    "forgotten closing": f"```python\ndef g(x):\n    return 0\n\n```python\n{F}```\n",
    "odd escape": fenced(F + 'PATTERN = "\\d"\n'),
    "annotations": fenced("from typing import List\n\ndef f(x: List[int]) -> int:\n    return x + 1\n"),
}
BODIES = {
    "as it goes on": "    return x + 1\n",
    "first line without its indentation": "return x + 1\n",
    "at the margin": "y = x\nreturn y + 1\n",
    "first line bare, others not": "y = x\n    return y + 1\n",
    "fenced": fenced("    return x + 1\n"),
    "fenced at the margin": fenced("y = x\nreturn y + 1\n"),
    "prose behind": "    return x + 1\n\nThis function adds one.",
    "another function behind": "    return g(x)\n\n\ndef g(x):\n    return x + 1\n",
    "thought before": "<think>\nHm.\n</think>\n    return x + 1\n",
    "an empty line first": "\n    return x + 1\n",
    "imports of the prompt": "    return math.floor(x) + 1\n",
}


@pytest.mark.parametrize("case", COMPLETIONS)
@pytest.mark.parametrize("prompt", [None, HEAD], ids=["whole", "continued"])
def test_a_whole_program_is_found(case, prompt):
    assert run(find_program(COMPLETIONS[case], "f", prompt)) == 2


@pytest.mark.parametrize("case", BODIES)
def test_a_body_continues_the_prompt(case):
    assert run(find_program(BODIES[case], "f", HEAD)) == 2


@pytest.mark.parametrize("prompt", [None, HEAD], ids=["whole", "continued"])
@pytest.mark.parametrize(
    "completion",
    ["", "   \n", "<think>\n" + fenced(F), f"<think>a</think> Wait. <think>\n{fenced(F)}", "```python\n```\n"],
)
def test_no_program(completion, prompt):
    assert find_program(completion, "f", prompt) is None
    assert find_program(completion, None, None) is None


def test_prose_is_no_program():
    assert find_program("I cannot say. It depends on many things, sadly!", "f", None) is None
    assert find_program("I cannot say.\nIt depends on many things, sadly!", None, None) is None


def test_a_program_that_does_not_parse_is_kept_for_its_verdict():
    program = find_program(fenced("def f(x):\n    return (x + \n"), "f", None)
    with pytest.raises(SyntaxError):
        compile(program, "f", "exec")


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        (fenced("n = int(input())\nprint(n)\n"), "n = int(input())\nprint(n)\n"),
        (f"{fenced('print(input())')}\nFor\n{fenced('3', '')}\nit prints\n{fenced('YES', '')}", "print(input())\n"),
        (f"{fenced('def g(): return 1')}\n{fenced('print(g())')}", "def g(): return 1\n\nprint(g())\n"),
        ("Read, then write.\n\nn = int(input())\nprint(n)\n\nIt prints n!", "n = int(input())\nprint(n)\n"),
        (fenced("print(1)\n", ""), "print(1)\n"),
        (
            fenced("def main():\n    print(input())\n\nif __name__ == '__main__':\n    main()\n"),
            "def main():\n    print(input())\n\nif __name__ == '__main__':\n    main()\n",
        ),
    ],
)
def test_whole_programs_keep_what_they_do(completion, program):
    assert find_program(completion, None, None).rstrip() == program.rstrip()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "x = 1\n" * 12_000,
        "f(" * 30_000,
        "a" + ".b" * 60_000,
        "-" * 60_000 + "1",
        "def f(x):\n" * 6_000,
        "import it, and\n" * 10_000,
        "\0\n" * 1_000,
        "```python\n" * 10_000,
        "def f(x): return '\ud800'",
        "def f(): return a1999\n" + "".join(f"a{n}=a{n - 1}\n" for n in reversed(range(2000))),
        "def f(): 0\n" + "".join(f"def a{n}(): a{n - 1}()\n" for n in reversed(range(1000))) + "a0=f",
        "a," * 30_000,
        "a<" * 30_000 + "1",
        "@a\n" * 20_000 + "def f(): 0",
        "if x:\n" + "".join(" " * n + "if x:\n" for n in range(1, 300)),
    ],
    ids=range(16),
)
def test_hostile_texts_end(text):
    find_program(text, "f", HEAD)
    find_program(fenced(text), "f", None)
