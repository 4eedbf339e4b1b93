"""Files that describe a model, without its weights."""

from __future__ import annotations

from pathlib import Path


def description_files(directory: Path) -> list[Path]:
    """All files of a model directory except weights: config, generation config, tokenizer, chat template."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.suffix in (".json", ".jinja", ".txt", ".model") and not path.name.endswith(".index.json")
    ]
