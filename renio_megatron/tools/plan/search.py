"""The fewest settings that make a run fit: a search over sizes of batches, recomputation, layouts and places."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from renio_megatron.config.load import check_models, check_world
from renio_megatron.config.rules.combinations import check_combinations
from renio_megatron.config.rules.ignored import check_settings
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.errors import ConfigError
from renio_megatron.tools.plan.memory import plan_memory
from renio_megatron.tools.plan.models import PlannedModel

MOST_CHANGES = 4
"""Settings that are changed together, at the most."""
_NOTHING_FITS = float("inf")


@dataclass(frozen=True)
class Axis:
    """A setting, the values that need less and less memory, and what they cost.

    Attributes:
        key: name of the setting.
        values: from the mildest to the one that needs least.
        price: how unwelcome a change is; each further value adds a little.
        is_layout: whether other axes decide which of its values are possible, and whether they help.
    """

    key: str
    values: tuple[Any, ...]
    price: float
    is_layout: bool = False


@dataclass(frozen=True)
class Remedy:
    """Settings with which a run fits.

    Attributes:
        settings: value of each key.
        peak: bytes that the largest rank then needs.
    """

    settings: Mapping[str, Any]
    peak: float

    @property
    def arguments(self) -> list[str]:
        """The settings as a command line has them.

        >>> Remedy({"parallel.use_distributed_optimizer": True}, 1.0).arguments
        ['parallel.use_distributed_optimizer=true']
        """
        return [
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in self.settings.items()
        ]


def search(
    config: DistillationConfig,
    student: PlannedModel,
    teachers: Mapping[str, PlannedModel],
    world_size: int,
    limit: float,
    accepts: Callable[[Remedy], bool],
    fixed: Collection[str] = (),
) -> tuple[Remedy | None, Remedy]:
    """The shortest list of settings with which no rank needs more than `limit` bytes, of equally short ones the best;
    and what needs least of all that was tried.

    None of them changes what is learned, but for rounding.

    Args:
        config: the recipe, which does not fit.
        student: with config.lora.
        teachers: by their names; the student for those that are the student.
        world_size: ranks of the job.
        limit: bytes.
        accepts: has the last word on a remedy.
        fixed: keys that are not changed.

    Returns:
        (None, the least) where no `MOST_CHANGES` settings are enough.
    """
    measure = _Measure(config, student, teachers, world_size)
    axes = [axis for axis in axes_of(config, student, world_size) if axis.key not in fixed]
    for count in range(1, MOST_CHANGES + 1):
        found: list[tuple[float, Remedy]] = []
        for chosen in itertools.combinations(axes, count):
            if min(map(measure, _extremes(chosen))) <= limit:
                found += _that_fit(chosen, measure, limit)
        for _, remedy in sorted(found, key=lambda one: one[0]):
            if measure.is_valid(remedy.settings) and accepts(remedy):
                return remedy, measure.least
    return None, measure.least


def axes_of(config: DistillationConfig, student: PlannedModel, world_size: int) -> list[Axis]:
    """What may be changed of a recipe."""
    train, parallel, teacher = config.train, config.parallel, config.teacher
    trainers = world_size - config.num_teacher_ranks
    mine = train.global_batch_size // max(1, trainers // parallel.model_ranks)
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    packed = train.max_tokens_per_micro_batch
    own_teacher = any(one.settings.model is not None for one in config.teachers)
    axes = [
        Axis("rollout.micro_batch_size", _halves(config.rollout.micro_batch_size or mine), 1.0),
        Axis("parallel.use_distributed_optimizer", (True,) * (not parallel.use_distributed_optimizer), 1.5),
        Axis("train.micro_batch_size", _halves(train.micro_batch_size) if packed is None else (), 2.0),
        Axis("train.max_tokens_per_micro_batch", _halves(packed or 0, longest), 2.0),
        Axis("teacher.payload_device", _after(("host", "recompute"), teacher.payload_device), 2.5),
        Axis("parallel.sequence_parallel", (True,) * (not parallel.sequence_parallel), 2.6),
        Axis("train.recompute_granularity", _after(("selective", "full"), train.recompute_granularity), 3.0),
        Axis("teacher.offload", ("host",) * (own_teacher and teacher.offload is None), 5.0),
    ]
    own = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    sizes = (*own, "context_parallel_size", *(("expert_model_parallel_size",) if student.experts is not None else ()))
    for price, size in enumerate(sizes, start=4):
        axes.append(Axis(f"parallel.{size}", _doubles(getattr(parallel, size), trainers), price, is_layout=True))
    if any(one.has_own_layout for one in config.teachers):
        for price, size in enumerate(own, start=4):
            now = getattr(teacher.parallel, size) or getattr(parallel, size)  # null: the student's
            doubles = _doubles(now, world_size)
            axes.append(Axis(f"teacher.parallel.{size}", doubles, price + 0.5, is_layout=True))
    return sorted((axis for axis in axes if axis.values), key=lambda axis: axis.price)


class _Measure:
    """Bytes that the largest rank of a run needs with other settings; infinite where it cannot be started."""

    def __init__(
        self,
        config: DistillationConfig,
        student: PlannedModel,
        teachers: Mapping[str, PlannedModel],
        world_size: int,
    ) -> None:
        self._config, self._student, self._teachers, self._world_size = config, student, teachers, world_size
        self._known: dict[tuple[tuple[str, Any], ...], float] = {}
        self._cut: dict[tuple[Any, ...], bool] = {}

    def __call__(self, settings: Mapping[str, Any]) -> float:
        key = tuple(settings.items())
        if key not in self._known:
            self._known[key] = self._peak(settings)
        return self._known[key]

    @property
    def least(self) -> Remedy:
        """What needs least of all that was measured."""
        settings = min(self._known, key=self._known.__getitem__)
        return Remedy(dict(settings), self._known[settings])

    def is_valid(self, settings: Mapping[str, Any]) -> bool:
        """Whether a run with these settings can be started; a measurement looks at the layout alone."""
        try:
            config = changed(self._config, settings)
            check_settings(config)
            check_combinations(config)
        except ConfigError:
            return False
        return True

    def _can_be_cut(self, config: DistillationConfig) -> bool:
        """Whether the models can be cut as a layout asks; they are read once for each."""
        key = (config.parallel, config.teacher.parallel, config.train.recomputed_layers)
        if key not in self._cut:
            try:
                check_models(config)
                self._cut[key] = True
            except ConfigError:
                self._cut[key] = False
        return self._cut[key]

    def _peak(self, settings: Mapping[str, Any]) -> float:
        try:
            config = changed(self._config, settings)
            check_world(config, self._world_size)
        except ConfigError:
            return _NOTHING_FITS
        if not self._can_be_cut(config):
            return _NOTHING_FITS
        return max(rank.peak for rank in plan_memory(config, self._student, self._teachers, self._world_size))


def changed(config: DistillationConfig, settings: Mapping[str, Any]) -> DistillationConfig:
    """The settings with others in the place of some.

    Raises:
        ConfigError: a value is not possible.
    """
    for key, value in settings.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(section: Any, path: Sequence[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _replaced(getattr(section, path[0]), path[1:], value)
    return replace(section, **{path[0]: inner})


def _extremes(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """The settings that need least, as far as an axis can tell: all values of layouts, the last ones of others."""
    values = (axis.values if axis.is_layout else axis.values[-1:] for axis in axes)
    for chosen in itertools.product(*values):
        yield {axis.key: value for axis, value in zip(axes, chosen, strict=True)}


def _that_fit(axes: Sequence[Axis], measure: _Measure, limit: float) -> Iterator[tuple[float, Remedy]]:
    """(price, settings) of all values of these axes together that fit."""
    for chosen in itertools.product(*(enumerate(axis.values) for axis in axes)):
        settings = {axis.key: value for axis, (_, value) in zip(axes, chosen, strict=True)}
        if (peak := measure(settings)) <= limit:
            price = sum(axis.price + 0.2 * number for axis, (number, _) in zip(axes, chosen, strict=True))
            yield price, Remedy(settings, peak)


def _after(values: tuple[str, ...], now: str | None) -> tuple[str, ...]:
    """The values behind the one that is set; all where it is none of them.

    >>> _after(("selective", "full"), "selective"), _after(("selective", "full"), None)
    (('full',), ('selective', 'full'))
    """
    return values[values.index(now) + 1 :] if now in values else values


def _halves(size: int, least: int = 1) -> tuple[int, ...]:
    """Half of a size, a quarter and so on, down to `least`.

    >>> _halves(8), _halves(16384, 4000), _halves(1)
    ((4, 2, 1), (8192, 4096), ())
    """
    return tuple(itertools.takewhile(lambda one: one >= least, (size >> n for n in range(1, size.bit_length()))))


def _doubles(size: int, most: int) -> tuple[int, ...]:
    """Twice a size, four times and so on, up to `most`.

    >>> _doubles(2, 16), _doubles(8, 8)
    ((4, 8, 16), ())
    """
    return tuple(itertools.takewhile(lambda one: one <= most, (size << n for n in range(1, most.bit_length() + 1))))
