"""What `renio evaluate` evaluates: a model's directory, a run, or a server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from renio_megatron.errors import ConfigError
from renio_megatron.files import user_path
from renio_megatron.models.shipped import SHIPPED, model_directory
from renio_megatron.runner.saved_run import SavedRun, is_run, read_run


@dataclass(frozen=True)
class ServerTarget:
    """A server that speaks OpenAI's protocol.

    Attributes:
        url: its address with the path, for example `http://localhost:8000/v1`.
        model: the model's name there.
    """

    url: str
    model: str

    @property
    def name(self) -> str:
        """Its name, for a directory."""
        return _as_name(self.model)


@dataclass(frozen=True)
class ModelTarget:
    """Weights on this machine.

    Attributes:
        directory: the Hugging Face directory; of a run, the one it started from.
        run: the run's checkpoint; None: the weights in `directory`.
        name: its name, for a directory.
    """

    directory: Path
    run: SavedRun | None
    name: str


def resolve_target(text: str, *, model: str | None = None, step: int | None = None) -> ServerTarget | ModelTarget:
    """The target that a command line names.

    Args:
        text: a directory, the name of a shipped model, or a URL.
        model: a model's name on a server.
        step: a checkpoint of a run; None: the newest.

    Raises:
        ConfigError, CheckpointError: there is none, or an option does not fit it.
    """
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text):
        return _server(text, model, step)
    if model is not None:
        raise ConfigError(f"--model names a model of a server, and {text!r} is no URL. Leave it out.")
    directory = user_path(text)
    if text not in SHIPPED and is_run(directory):
        run = read_run(directory, step)
        return ModelTarget(run.model, run, f"{_as_name(directory.resolve().name)}-step-{run.step}")
    if step is not None:
        raise ConfigError(f"--step names a checkpoint of a run, and {text!r} is none (no config.yaml). Leave it out.")
    found = model_directory(text, "TARGET")
    return ModelTarget(found, None, _as_name(text if text in SHIPPED else found.resolve().name))


def _server(url: str, model: str | None, step: int | None) -> ServerTarget:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{url!r} is no address of a server. Give one such as http://localhost:8000/v1.")
    if step is not None:
        raise ConfigError("--step names a checkpoint of a run; a server has none. Leave it out.")
    if not model:
        raise ConfigError(
            f"a server may have several models: name one with --model NAME (GET {url}/models lists them)."
        )
    return ServerTarget(url.rstrip("/"), model)


def _as_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "model"
