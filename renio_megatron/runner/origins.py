"""What a run began with: digests of its files, which must be the same when it resumes."""

from __future__ import annotations

from renio_megatron.config.schema import JobConfig
from renio_megatron.errors import ConfigError
from renio_megatron.files import user_path
from renio_megatron.runner.digests import description_parts, digest_of, file_parts, weight_parts
from renio_megatron.runner.inputs import RunInputs
from renio_megatron.runner.run_directory import DATE, DESCRIPTION


def origins(config: JobConfig, inputs: RunInputs) -> dict[str, str]:
    """Digests of all files and directories that the rest of a run depends on, by the setting that names them; and the
    date in its prompts, where they contain one.

    Contents of checkpoints are left out: the student's weights, their moving average, and adapters with the fingerprint
    of their base. Data files are read whole up to 1 GiB; of larger ones, and of weights, the size and evenly spaced
    blocks are read.

    Raises:
        ConfigError: a file that cannot be read.
    """
    places = {DESCRIPTION: description_parts(inputs.model)}
    data = config.data
    for setting, path in (("data.path", data.path), ("data.eval_path", data.eval_path)):
        if path is not None:
            places[setting] = file_parts(user_path(path))
    if (contents := inputs.stream.source.contents) is not None:
        places["data.path"] = iter([contents().encode()])
    if config.evaluates_held_out and (contents := inputs.stream.evaluation_source.contents) is not None:
        places["data.eval_path" if data.eval_path is not None else "data.eval_split"] = iter([contents().encode()])
    for one in config.teachers:
        teacher, found = one.settings, inputs.teachers[one.name]
        is_copy = teacher.model is None and not one.shares_student
        if teacher.model is not None or is_copy:
            given = config.pretrained_checkpoint if is_copy else teacher.pretrained_checkpoint
            key = "model" if given is None else "pretrained_checkpoint"
            places[key if is_copy else one.setting(key)] = weight_parts(found.weights)
        if teacher.adapter is not None:
            places[one.setting("adapter")] = weight_parts(user_path(teacher.adapter))
    try:
        digests = {setting: digest_of(parts) for setting, parts in places.items()}
        return digests if inputs.date is None else {**digests, DATE: inputs.date}
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be read: {error.strerror}. Check the file and its rights."
        ) from error
