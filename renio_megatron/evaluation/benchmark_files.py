"""Where a benchmark's file is found: in a folder, or in the cache of the library `datasets`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from renio_megatron.data.sources.hub import offline
from renio_megatron.data.sources.row_files import Row
from renio_megatron.errors import ConfigError, DataError
from renio_megatron.evaluation.benchmark_names import KNOWN, Known, plain_name
from renio_megatron.files import user_path

FOLDERS_VARIABLE = "RENIO_BENCHMARKS"
"""Environment variable that names the folders of benchmark files, separated as in PATH."""

_SUFFIXES = (".jsonl", ".json", ".parquet", ".gz")
_SHARD = re.compile(r"\d{5}-of-\d{5}")
_OTHER_VERSIONS = frozenset(["mini", "noextreme", "originfmt", "nov", "november"])
"""Words in a file's name that tell a part, or another set, from the one that is meant."""
_DEPTH = 3


def is_path(name_or_path: str) -> bool:
    """Whether a file is meant: by a separator, a suffix, or because it exists.

    A known data set's public name is none, unless there is such a file.
    """
    if Path(name_or_path).is_file() or name_or_path.lower().endswith(_SUFFIXES):
        return True
    is_hub_id = plain_name(name_or_path) in {plain_name(known.hub_id) for known in KNOWN.values()}
    return not is_hub_id and bool({"/", os.sep} & set(name_or_path))


def stem_of(path: Path) -> str:
    """The name of a file without the suffixes of a format.

    >>> stem_of(Path("data/HumanEvalPlus-v0.1.10.jsonl.gz"))
    'HumanEvalPlus-v0.1.10'
    """
    name = path.name
    while name.lower().endswith(_SUFFIXES) and Path(name).stem:
        name = Path(name).stem
    return name


def folders_of(folder: str | None) -> list[Path]:
    """The folders to search: the given one, or those of the environment variable.

    Raises:
        ConfigError: one of them is no directory.
    """
    variable = os.environ.get(FOLDERS_VARIABLE, "")
    given = [text for text in variable.split(os.pathsep) if text.strip()] if folder is None else [folder]
    paths = [user_path(text) for text in given]
    for path in paths:
        if not path.is_dir():
            key = "the folder of benchmarks" if folder is not None else FOLDERS_VARIABLE
            raise ConfigError(f"{key}: there is no directory {str(path)!r}. Correct it, or leave it out.")
    return paths


def find_file(known: Known, folders: list[Path]) -> tuple[Path | None, list[Path]]:
    """(the benchmark's file in the first folder that has one; files that have its name, but are another part of it).

    Raises:
        DataError: two files of a folder fit equally, or a folder cannot be read.
    """
    left_out: list[Path] = []
    for folder in folders:
        fits: dict[int, list[Path]] = {}
        for path in _files(known, folder):
            rank = _rank(known, path.relative_to(folder))
            if rank is None:
                left_out.append(path)
            else:
                fits.setdefault(rank, []).append(path)
        if fits:
            best = fits[min(fits)]
            if len(best) > 1:
                raise DataError(
                    f"benchmark {known.name}: {' and '.join(map(repr, map(str, best)))} fit equally. Give the path of "
                    "the one that is meant."
                )
            return best[0], left_out
    return None, left_out


def _files(known: Known, folder: Path) -> Iterator[Path]:
    """Files of rows in a folder, or in a folder of it, whose names begin with the benchmark's."""
    try:
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith(".") or _rest(known, stem_of(entry)) is None:
                continue
            inside = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
            for path in inside:
                parts = path.relative_to(folder).parts
                is_near = len(parts) <= _DEPTH + 1 and not any(part.startswith(".") for part in parts)
                if is_near and path.is_file() and path.name.lower().endswith(_SUFFIXES):
                    yield path
    except OSError as error:
        raise DataError(f"the folder {str(folder)!r} cannot be read: {error}.") from error


def _rest(known: Known, name: str) -> str | None:
    """What follows the benchmark's name in a file's, without separators; None where it does not begin with it."""
    plain = plain_name(_SHARD.sub("", name))
    for spelling in sorted((known.name, *known.spellings), key=len, reverse=True):
        rest = plain.removeprefix(spelling)
        is_longer_number = spelling[-1].isdigit() and rest[:1].isdigit()  # aime24 and aime2400
        if plain.startswith(spelling) and not is_longer_number:
            return rest
    return None


def _rank(known: Known, relative: Path) -> int | None:
    """0 for a name that says nothing but the benchmark and its part, 1 for a longer one; None for another part."""
    first, *others = [*relative.parts[:-1], stem_of(relative)]
    rest = (_rest(known, first) or "") + plain_name(_SHARD.sub("", "".join(others)))
    words = set(re.split(r"[^a-z0-9]+", "/".join([first, *others]).lower()))
    if words & _OTHER_VERSIONS or (known.split == "test" and "train" in rest):
        return None
    usual = [known.name, *known.spellings, known.split, known.config, "data", "default"]
    return 1 if re.sub("|".join(re.escape(word) for word in usual if word), "", rest) else 0


def cached_rows(known: Known) -> tuple[list[Row] | None, str]:
    """(the rows in the cache of the library `datasets`, or None; why not, where it holds something else of the set).

    The network is not touched.
    """
    import datasets

    with offline():
        try:
            data = datasets.load_dataset(known.hub_id, known.config or None, split=known.split)
        except OSError:  # the set is not there: datasets would ask the network now
            return None, ""
        except ValueError as error:  # another configuration or split of it is
            return None, str(error)
    return [(f"{known.hub_id}, split {known.split}, row {number}", dict(row)) for number, row in enumerate(data)], ""


def missing(known: Known, folders: list[Path], left_out: list[Path], cache: str) -> DataError:
    """The error for a benchmark that was not found: what to fetch, and where to put it."""
    looked = (
        " or ".join(map(repr, map(str, folders))) if folders else f"a folder (none is given, nor is {FOLDERS_VARIABLE})"
    )
    other = ""
    if left_out:
        names = ", ".join(repr(str(path)) for path in left_out)
        other = f" Another part or version of it is {names}: give its path to use it."
    reason = f" (The cache: {' '.join(cache.split())})" if cache else ""
    no_data_set = f" The data set {known.hub_id} lacks base_input and plus_input." if known.release else ""
    ending = ".jsonl.gz" if known.release else ".jsonl"
    return DataError(
        f"benchmark {known.name} was found neither in {looked} nor in the cache of the library datasets.{other} Fetch "
        f"{known.to_fetch}, and put it where `--benchmarks DIR` or {FOLDERS_VARIABLE} finds it, as "
        f"DIR/{known.name}{ending}; or give the path of a file.{no_data_set}{reason}"
    )
