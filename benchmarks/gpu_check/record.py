"""The file of one stage: what was measured, on what, and how far the stage has come.

Written whole after every measurement, under another name first, so that a file is never half there. A stage that was
cut off goes on where it was; nothing that stands in the file is written again.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

IDENTITY = ("commit", "gpu", "toy")
"""What has to be the same for measurements to stand in one file."""
NUMBERED = 100


class Record:
    """Measurements of one stage.

    The file holds `complete` (every unit was run), `skipped` (why the stage does not run here, or null), `commit`,
    `gpu`, `driver`, `versions`, `command`, `date`, `toy`, `units` (name -> "done", or what went wrong) and
    `measurements`: objects with `name`, `value` (a number, null where there is none), `unit`, `time` (UTC), and where
    there is more to say `detail`.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Takes up the file at `path`, where it was measured with the same commit on the same GPU; else begins anew.

        A file of another commit, GPU or size is kept beside, as STAGE.1.json and so on.
        """
        self.path = path
        self.began = time.monotonic()
        fresh = {"complete": False, "skipped": None, **header, "units": {}, "measurements": []}
        found = read(path)
        if found is None or any(found.get(key) != fresh[key] for key in IDENTITY):
            if path.exists():
                path.replace(_free_name(path))
            found = fresh
        self._content = found
        self._names = {one["name"] for one in found["measurements"]}

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self._content["complete"])

    def has(self, name: str) -> bool:
        """Whether a measurement of this name stands already."""
        return name in self._names

    def value(self, name: str) -> float | None:
        """The value of a measurement that stands."""
        return next(one["value"] for one in self._content["measurements"] if one["name"] == name)

    def details(self, prefix: str = "") -> list[Any]:
        """What the measurements whose names begin so have to say besides."""
        found = self._content["measurements"]
        return [one["detail"] for one in found if one["name"].startswith(prefix) and "detail" in one]

    def add(self, name: str, value: float | None, unit: str, **detail: Any) -> None:
        """Writes a measurement, unless one of its name stands; `detail` is whatever JSON can hold."""
        if self.has(name):
            return
        one: dict[str, Any] = {"name": name, "value": value, "unit": unit, "time": now()}
        if detail:
            one["detail"] = detail
        self._content["measurements"].append(one)
        self._names.add(name)
        self._write()
        shown = "none" if value is None else f"{value:.6g}"
        said = f"  ({detail['why']})" if "why" in detail else ""
        print(f"  {name}: {shown} {unit}{said}", flush=True)

    def is_done(self, unit: str) -> bool:
        """Whether a unit has run, with or without a fault."""
        return unit in self._content["units"]

    def finish(self, unit: str, problem: str | None = None) -> None:
        """Notes that a unit has run; `problem` says what went wrong."""
        self._content["units"][unit] = problem or "done"
        self._write()

    def close(self, skipped: str | None = None) -> None:
        """Notes that the stage is complete; `skipped` says why it does not run here."""
        self._content["complete"], self._content["skipped"] = True, skipped
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def read(path: Path) -> dict[str, Any] | None:
    """What a stage's file holds; None where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("measurements"), list) else None


def problems(found: dict[str, Any]) -> dict[str, str]:
    """What went wrong, by unit."""
    return {unit: said for unit, said in found["units"].items() if said != "done"}


def now() -> str:
    """The moment, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def _free_name(path: Path) -> Path:
    return next(name for n in range(1, NUMBERED) if not (name := path.with_name(f"{path.stem}.{n}.json")).exists())
