"""The checkpoint directory of a run: complete, current, partial and deleted checkpoints.

    iter_0000004/                           one complete checkpoint
    .iter_0000006.partial-1f2e3d4c/         one being written, or left by a job that was killed
    .iter_0000002.deleted/                  one being deleted
    latest_checkpointed_iteration.txt       the step of the current one

Only the first rank changes anything here.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import uuid
import zipfile
from pathlib import Path

from renio_megatron.errors import CheckpointError, ConfigError
from renio_megatron.files import remove_directory, sync_directory, sync_files, user_path, write_atomically

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"


def step_directory(root: Path, step: int) -> Path:
    """The directory of a step's checkpoint, as Megatron names it."""
    return root / f"iter_{step:07d}"


def step_of(directory: Path) -> int | None:
    """The step in the name of a checkpoint's directory; None for any other name."""
    found = re.fullmatch("iter_([0-9]+)", directory.name)
    return int(found[1]) if found else None


def steps(root: Path) -> list[int]:
    """Steps of the existing checkpoints, ascending, without partial and deleted ones."""
    found = [step_of(path) for path in root.glob("iter_*") if path.is_dir()]
    return sorted(step for step in found if step is not None)


def latest_step(root: Path) -> int | None:
    """Step of the current checkpoint; None where there is none.

    Without a tracker it is the newest: a job that dies between renaming its first checkpoint and writing the tracker
    leaves a complete one behind, and a copied directory may lack the file.

    Raises:
        CheckpointError: the tracker names a checkpoint that does not exist.
    """
    tracker = root / TRACKER
    if not tracker.is_file():
        return max(steps(root), default=None)
    text = tracker.read_text(errors="replace").strip()
    if not re.fullmatch("[0-9]+", text) or not step_directory(root, int(text)).is_dir():
        raise CheckpointError(
            f"{tracker} names the checkpoint {text[:40]!r}, which is not beside it. Write the number of an iter_ "
            f"directory that is there ({_listed(steps(root))}) into the file, or start again with --fresh."
        )
    return int(text)


def adopt(root: Path, step: int) -> None:
    """Writes the missing tracker, so that the checkpoint of `step` is the current one.

    Raises:
        OSError: the disk cannot be written.
    """
    if not (root / TRACKER).is_file():
        logger.warning("%s is missing; resuming from the newest checkpoint next to it, step %d", root / TRACKER, step)
        write_atomically(root / TRACKER, f"{step}\n")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint for `checkpoint.load`: an iter_ directory, or the current one of a run or of its checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    path = user_path(path)
    if path.is_dir() and step_of(path.resolve()) is not None:
        return path.resolve()
    for root in (path, path / "checkpoints"):
        step = latest_step(root)
        if step is not None:
            return step_directory(root, step).resolve()
    raise CheckpointError(
        f"checkpoint.load={str(path)!r} holds no checkpoint: there is no iter_ directory in it or in its "
        "`checkpoints`, and it is none itself. Give a run's output_dir, its checkpoints directory, or one iter_ "
        "directory."
    )


def find_pretrained(path: str | Path, setting: str) -> Path:
    """The directory that holds the tensors of a checkpoint that Megatron wrote.

    Args:
        path: a directory for Megatron-LM's --load (with its `latest_checkpointed_iteration.txt`), one iter_ directory
            in it, or a run's output_dir.
        setting: the recipe's key, for the error message.

    Raises:
        ConfigError: there is none, of another format, or with files missing.
    """
    given = user_path(path)
    if not given.is_dir():
        raise ConfigError(f"{setting}: there is no directory {str(path)!r}. Give a checkpoint that Megatron wrote.")
    directory = given
    for root in (given, given / "checkpoints"):
        if (root / TRACKER).is_file():
            text = (root / TRACKER).read_text(errors="replace").strip()
            name = step_directory(root, int(text)).name if re.fullmatch("[0-9]+", text) else text
            directory = root / name
            if "/" in name or not directory.is_dir():
                raise ConfigError(
                    f"{setting}: {root / TRACKER} names {text[:40]!r}, which is not beside it. Correct it."
                )
            break
    if any(directory.glob("mp_rank_*")):
        raise ConfigError(
            f"{setting}: {directory} is of Megatron's format `torch`, a file for each rank, which loads in one layout "
            "only. Save it again with Megatron-LM's --ckpt-convert-format torch_dist, and give what that writes."
        )
    try:
        kind = json.loads((directory / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{setting}: {directory} holds no checkpoint of Megatron's format torch_dist: no {TRACKER}, and no "
            "metadata.json that names the format. Give the directory that Megatron's --save wrote to."
        ) from error
    if kind != "torch_dist":
        raise ConfigError(
            f"{setting}: {directory} is of the format {kind!r}; torch_dist is read. Save it again as that."
        )
    if problem := damage(directory):
        raise ConfigError(f"{setting}: the checkpoint {directory} cannot be read: {problem}. Copy it again.")
    return directory.resolve()


def new_partial(root: Path, step: int) -> Path:
    """Creates the hidden directory that the checkpoint of `step` is written to, under a unique name."""
    partial = root / f".{step_directory(root, step).name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    return partial


def remove_leftovers(root: Path) -> None:
    """Deletes leftovers of a killed job under hidden names; those that cannot be deleted stay and do no harm."""
    for pattern in (".iter_*.partial*", ".iter_*.deleted"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def publish(partial: Path, root: Path, step: int, keep_last: int | None) -> None:
    """Renames a written checkpoint, makes it the current one, and then deletes those beyond the newest `keep_last`.

    At every moment the tracker names a complete checkpoint, even after a power loss.

    Raises:
        OSError: the disk cannot be written; the current checkpoint stays, unless it is the one being replaced.
    """
    target = step_directory(root, step)
    sync_files(partial)
    if target.exists():
        remove_directory(target)
    partial.rename(target)
    sync_directory(root)
    write_atomically(root / TRACKER, f"{step}\n")
    if keep_last is None:
        return
    # Those of later steps belong to a run that was reset by hand; they are replaced when this one gets there.
    for old in [there for there in steps(root) if there <= step][:-keep_last]:
        try:
            remove_directory(step_directory(root, old))
        except OSError as error:
            logger.warning("the old checkpoint %s cannot be deleted: %s", step_directory(root, old), error.strerror)


def damage(directory: Path) -> str | None:
    """Damage to the files of a checkpoint, as text that names the file; None where all have the expected size.

    Reads the index and the directory, not the tensors.
    """
    for name in ("metadata.json", ".metadata"):
        if not (directory / name).is_file():
            return f"{name} is missing"
    common = directory / "common.pt"
    try:
        intact = not common.is_file() or zipfile.is_zipfile(common)
        sizes, names = _index(directory)
    except OSError as error:
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, ValueError) as error:
        return f".metadata cannot be parsed ({type(error).__name__}: {error})"
    if not intact:
        return "common.pt is truncated"
    if not common.is_file() and not any(name.startswith("common_state") for name in names):
        return "common.pt is missing"  # newer versions of Megatron keep its content with the tensors
    for name, size in sorted(sizes.items()):
        file = directory / name
        there = file.stat().st_size if file.is_file() else None
        if there is None:
            return f"{name} is missing"
        if there < size:
            return f"{name} has {there} bytes and should have {size}"
    return None


def older_whole(directory: Path) -> Path | None:
    """The newest undamaged checkpoint of a step before that of `directory`, in the same place; None where there is
    none."""
    step = step_of(directory)
    for old in reversed([there for there in steps(directory.parent) if step is not None and there < step]):
        if damage(step_directory(directory.parent, old)) is None:
            return step_directory(directory.parent, old)
    return None


def advice(directory: Path) -> str:
    """Advice for the user where the checkpoint in `directory` cannot be used."""
    old = older_whole(directory)
    if old is None:
        return "No older checkpoint beside it is whole: start again with --fresh, or restore its files."
    return (
        f"The newest whole one before it is {old.name}: to use it, write {int(old.name[5:])} into "
        f"{directory.parent / TRACKER}; or start again with --fresh."
    )


def _index(directory: Path) -> tuple[dict[str, int], set[str]]:
    """Bytes that each data file must have at least, by name, and the keys that the files hold, from the checkpoint's
    index."""
    from torch.distributed.checkpoint import FileSystemReader

    sizes: dict[str, int] = {}
    stored = FileSystemReader(directory).read_metadata().storage_data
    for info in stored.values():
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
    return sizes, {entry.fqn for entry in stored}


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "there is none"
