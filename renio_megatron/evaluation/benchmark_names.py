"""The benchmarks that have a name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from renio_megatron.errors import ConfigError


@dataclass(frozen=True)
class Known:
    """A benchmark that has a name.

    Attributes:
        name: its name here.
        what: what it is, in a few words.
        spellings: other names for it, in small letters and without separators; its files' names may begin with them.
        hub_id, config, split: the public data set, its configuration (empty: the only one), and its part.
        columns: the columns that a file of it needs, for messages.
        short: names that lead to it, but not to its files.
        release: file of the maker's release, where the data set cannot be used; else empty.
    """

    name: str
    what: str
    spellings: tuple[str, ...]
    hub_id: str
    split: str
    columns: str
    config: str = ""
    short: tuple[str, ...] = ()
    release: str = ""

    @property
    def to_fetch(self) -> str:
        """What to download, for messages."""
        if self.release:
            return f"{self.release} ({self.columns})"
        config = f"configuration {self.config}, " if self.config else ""
        return f"the data set {self.hub_id} ({config}split {self.split}; {self.columns})"


_PLUS_COLUMNS = "columns task_id, prompt, entry_point, canonical_solution, base_input, plus_input, atol"
KNOWN: dict[str, Known] = {
    known.name: known
    for known in (
        Known(
            "math500",
            "MATH-500: 500 problems of competitions",
            (),
            "HuggingFaceH4/MATH-500",
            "test",
            "columns problem, answer",
        ),
        Known(
            "aime24",
            "AIME 2024, I and II: 30 problems",
            ("aime2024",),
            "HuggingFaceH4/aime_2024",
            "train",
            "columns problem, answer",
        ),
        Known(
            "aime25",
            "AIME 2025, I and II: 30 problems",
            ("aime2025",),
            "math-ai/aime25",
            "test",
            "columns problem, answer",
        ),
        Known(
            "hmmt25",
            "HMMT, February 2025: 30 problems",
            ("hmmt2025", "hmmtfeb2025", "hmmtfeb25", "hmmtfebruary2025"),
            "MathArena/hmmt_feb_2025",
            "train",
            "columns problem, answer",
        ),
        Known(
            "gsm8k",
            "GSM8K, its test part: 1319 word problems",
            (),
            "openai/gsm8k",
            "test",
            "columns question, answer",
            config="main",
        ),
        Known(
            "humanevalplus",
            "HumanEval+ of EvalPlus: 164 functions",
            (),
            "evalplus/humanevalplus",
            "test",
            _PLUS_COLUMNS,
            short=("humaneval",),
            release="HumanEvalPlus.jsonl.gz of the EvalPlus release v0.1.10 of HumanEval+",
        ),
        Known(
            "mbppplus",
            "MBPP+ of EvalPlus: 378 functions",
            (),
            "evalplus/mbppplus",
            "test",
            _PLUS_COLUMNS,
            short=("mbpp",),
            release="MbppPlus.jsonl.gz of the EvalPlus release v0.2.0 of MBPP+",
        ),
    )
}

NAMES: dict[str, str] = {known.name: known.what for known in KNOWN.values()}
"""Name of a benchmark -> what it is. `humaneval` and `mbpp` lead to the plus sets, whose base tests they are."""


def plain_name(name: str) -> str:
    """A name in small letters and without separators.

    >>> plain_name("MATH-500"), plain_name("HumanEval+"), plain_name("mbpp_plus")
    ('math500', 'humanevalplus', 'mbppplus')
    """
    return re.sub(r"[-_\s]", "", name.lower().replace("+", "plus"))


def known_benchmark(name: str) -> Known:
    """The benchmark of a name, whatever its capitals and separators, or of its public data set.

    >>> known_benchmark("AIME 2024").name, known_benchmark("humaneval").name
    ('aime24', 'humanevalplus')

    Raises:
        ConfigError: an unknown name; the message has the nearest ones.
    """
    spellings = {
        spelling: known
        for known in KNOWN.values()
        for spelling in (known.name, *known.spellings, *known.short, plain_name(known.hub_id))
    }
    if (found := spellings.get(plain_name(name))) is not None:
        return found
    near = difflib.get_close_matches(plain_name(name), spellings, n=4, cutoff=0.6)
    nearest = {spellings[spelling].name for spelling in near}
    meant = [name for name in KNOWN if name in nearest]
    advice = f" Did you mean {' or '.join(meant)}?" if meant else ""
    raise ConfigError(
        f"there is no benchmark {name!r}.{advice} Known names: {', '.join(KNOWN)}. Of any other benchmark give the "
        "path of a file: JSON lines (.jsonl, .jsonl.gz), a JSON array, or parquet."
    )
