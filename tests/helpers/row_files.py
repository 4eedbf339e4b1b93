"""Files of rows, in the formats that people have."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Sequence[dict[str, Any]], *, row_group_size: int | None = None) -> Path:
    """Writes rows as the path's name says, and returns it.

    Args:
        path: .jsonl, .jsonl.gz, .json (an array) or .parquet; without a suffix a directory of a saved data set.
        rows: the rows.
        row_group_size: rows of a group of a parquet file; None: all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    else:
        import datasets

        datasets.Dataset.from_list(list(rows)).save_to_disk(str(path))
    return path
