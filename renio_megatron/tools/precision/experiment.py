"""The experiment of `renio compare-precision`: the same rollouts in several precisions, then a table.

Models are built one after the other; in addition to a student and its gradient there are at most a teacher's weights,
the teachers' final hidden states, and one copy of the gradient on the host.
"""

from __future__ import annotations

import datetime
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from renio_megatron.config import PrecisionConfig
from renio_megatron.config.schema import DistillationConfig
from renio_megatron.errors import CheckpointError, ConfigError, on_every_rank
from renio_megatron.parallel.collectives import gather_objects
from renio_megatron.runner.device_env import set_hardware_variables_of
from renio_megatron.runner.recipe import checked_recipe

if TYPE_CHECKING:
    import torch

    from renio_megatron.parallel.layout import ParallelLayout
    from renio_megatron.parallel.vocab import LmHead
    from renio_megatron.runner.inputs import RunInputs
    from renio_megatron.tools.precision.errors import Scores
    from renio_megatron.training.targets import TeacherTargets
    from renio_megatron.types import MicroBatch, Rollout

NOISE = "bf16 against fp32"
"""The column without FP8: the error between fp32 and bf16 on the same rollouts."""


@dataclass(frozen=True)
class Precisions:
    """The recipe in the precisions that are compared.

    Attributes:
        baseline: the recipe without FP8; its student draws the rollouts.
        fp8: the recipe with student and teacher in FP8.
        other: the baseline in fp32 where that is bf16, and in bf16 where it is fp32.
    """

    baseline: DistillationConfig
    fp8: DistillationConfig
    other: DistillationConfig


def precisions_of(config: DistillationConfig, *, has_fp8: bool) -> Precisions:
    """The precisions to compare for a recipe: its own FP8 settings where it has them, else `hybrid` with `tensorwise`.

    Args:
        config: the recipe's settings.
        has_fp8: whether the device has FP8 products; otherwise they are emulated.

    Raises:
        ConfigError: delayed scaling has to be emulated.
    """
    plain: dict[str, Any] = {}
    in_fp8: dict[str, Any] = {}
    for name in ("precision", "teacher_precision"):
        section: PrecisionConfig = getattr(config, name)
        # Transformer Engine's FP8 is for bf16 models; fp32 ones are emulated.
        emulates = section.emulate_fp8 or section.backend == "local" or not (has_fp8 and config.train.bf16)
        backend = "local" if emulates else section.backend  # the baseline's, too: kernels are not to be compared
        in_fp8[name] = replace(section, fp8=section.fp8 or "hybrid", emulate_fp8=emulates, backend=backend)
        plain[name] = replace(section, fp8=None, emulate_fp8=False, backend=backend)
    baseline = replace(
        config,
        **plain,
        # Gradients are read whole, and no step is taken.
        parallel=replace(
            config.parallel, use_distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False
        ),
        teacher=replace(config.teacher, payload_device="host"),
        evaluate=replace(config.evaluate, every=0),
    )
    is_bf16 = config.train.bf16
    other = replace(baseline, train=replace(config.train, bf16=not is_bf16))
    if is_bf16:
        other = replace(other, head=replace(config.head, logits_dtype="fp32"))
    return Precisions(baseline, replace(baseline, **in_fp8), other)


def compare_precision(path: str, overrides: Sequence[str], output: str | None) -> int:
    """Prints the table on the first rank, and writes precision.json into `output` where that is given; 0.

    Raises:
        ConfigError, DataError: as for `renio train`; or FP8 that can be neither computed nor emulated.
        NumericsError: a precision in which a score or a gradient is not finite.
        CheckpointError: `output` cannot be written.
    """
    recipe = checked_recipe("train", path, overrides)
    assert isinstance(recipe.config, DistillationConfig)
    _refuse(recipe.config)
    set_hardware_variables_of(recipe.config)

    from rich.console import Console

    from renio_megatron.megatron.runtime.initialize import check_transformer_engine, start, stop
    from renio_megatron.parallel.devices import backend_and_device, device_name
    from renio_megatron.runner.environment import versions
    from renio_megatron.runner.inputs import read_inputs
    from renio_megatron.runner.run import on_the_same_day
    from renio_megatron.tools.precision.table import precision_table

    with on_every_rank():
        _make(output)
        has_fp8 = backend_and_device(0)[1].type == "cuda" and check_transformer_engine()
        precisions = precisions_of(recipe.config, has_fp8=has_fp8)
        inputs = read_inputs(precisions.baseline)
    train = recipe.config.train
    layout = start(precisions.baseline.parallel, seed=train.seed, deterministic_mode=train.deterministic_mode)
    inputs = on_the_same_day(precisions.baseline, inputs, layout)
    found = _Comparison(precisions, inputs, layout).run()
    if layout.is_main:
        facts = {
            "recipe": path,
            "settings": list(overrides),
            "date": datetime.date.today().isoformat(),
            "versions": versions(),
            "device": f"{layout.world_size} x {device_name(layout.device)}",
            "baseline": "bf16" if train.bf16 else "fp32",
            "student": describe(precisions.fp8.precision),
            "teacher": describe(precisions.fp8.teacher_precision),
        }
        Console().print(precision_table({**facts, **found}))
        if output is not None:
            file = Path(output) / "precision.json"
            file.write_text(json.dumps({**facts, **found}, indent=2) + "\n", encoding="utf-8")
            print(f"{file} holds all figures", flush=True)
    stop()
    return 0


def describe(precision: PrecisionConfig) -> str:
    """An FP8 section as text.

    >>> describe(PrecisionConfig(fp8="hybrid", emulate_fp8=True))
    'hybrid, tensorwise, emulated'
    """
    words = [str(precision.fp8), precision.fp8_recipe]
    if precision.first_last_layers_bf16:
        start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
        words.append(f"but the first {start} and the last {end} layers")
    return ", ".join([*words, "emulated" if precision.emulate_fp8 else "Transformer Engine"])


def _refuse(config: DistillationConfig) -> None:
    """Raises `ConfigError` for a recipe that cannot be compared."""
    if config.teacher.routes:
        raise ConfigError(
            "renio compare-precision compares one teacher, and the recipe has teacher.routes. Give one of them as "
            "teacher.kind and teacher.model."
        )
    if any(one.has_own_layout for one in config.teachers):
        raise ConfigError(
            "renio compare-precision holds the teacher in the student's layout; the recipe gives it one of its own. "
            "Compare with teacher.ranks=colocated and the keys of teacher.parallel null."
        )
    if config.lora.r is not None:
        raise ConfigError(
            f"renio compare-precision: FP8 products beside adapters are not built (lora.r={config.lora.r}). "
            "Compare with lora.r=null, or with the merged model."
        )
    if more := sorted(config.weighting.needs - {"student_logp", "teacher_logp"}):
        raise ConfigError(
            "renio compare-precision makes weights of log-probabilities alone; "
            f"weighting={config.weighting.name} needs {', '.join(more)}. Compare with weighting=renio."
        )
    if config.teacher.follows_student:
        raise ConfigError(
            f"renio compare-precision: teacher.kind={config.teacher.kind} is the student in its own precision. "
            "Compare with teacher.kind=initial, which it is at the first step."
        )


def _make(output: str | None) -> None:
    if output is None:
        return
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"--output: {output!r} cannot be made: {error.strerror or error}. Choose another directory."
        ) from error


def _no_head() -> LmHead:
    raise AssertionError("the loss is computed where the last stage is")


class _Comparison:
    """One rank's share of the comparison."""

    def __init__(self, precisions: Precisions, inputs: RunInputs, layout: ParallelLayout) -> None:
        """`inputs` are those of the baseline."""
        self._precisions, self._inputs, self._layout = precisions, inputs, layout
        self._rollouts: list[Rollout] = []
        self._batches: list[MicroBatch] = []

    def run(self) -> dict[str, Any]:
        """Facts about the baseline's step, and the figures of each variant; the same on every rank."""
        from renio_megatron.runner.build import build_student, sampling_params_of

        at, layout = self._precisions, self._layout
        learner, sampler = build_student(at.baseline, self._inputs, layout)
        share = at.baseline.train.global_batch_size // layout.data.size
        prompts = self._inputs.stream.batch(layout.data.rank * share, share)
        self._rollouts = sampler.sample(prompts, sampling_params_of(at.baseline), rng_stream=(1,))
        del sampler
        self._batches = learner.make_micro_batches(self._rollouts)
        teacher, fp8_teacher = self._teacher(at.baseline), self._teacher(at.fp8)
        truth, gradients = self._step(learner, at.baseline, teacher, "baseline")
        variants = {"teacher FP8": self._errors(learner, at.baseline, fp8_teacher, "teacher FP8", truth, gradients)}
        del learner
        learner = self._student(at.fp8)
        for name, one in (("student FP8", teacher), ("both FP8", fp8_teacher)):
            variants[name] = self._errors(learner, at.fp8, one, name, truth, gradients)
        del learner, teacher, fp8_teacher
        learner = self._student(at.other)
        other, other_gradients = self._step(learner, at.other, self._teacher(at.other), NOISE)
        pair = (truth, gradients), (other, other_gradients)
        found, expected = pair if at.baseline.train.bf16 else pair[::-1]
        variants[NOISE] = self._figures(found[0], expected[0], self._sums(found[1], expected[1]))
        norm = sum(sums[2] for sums in self._sums(gradients, gradients).values()) ** 0.5
        return {
            "sequences": len(truth.weights),
            "tokens": len(truth.student_logp),
            "pivotal_tokens": int(truth.is_pivotal.sum()),
            "weights_not_1": int((truth.raw_weights != 1).sum()),
            "gradient_norm": norm,
            "variants": variants,
        }

    def _student(self, config: DistillationConfig) -> Any:
        from renio_megatron.runner.build import build_student

        gc.collect()  # the last one's modules and Megatron's hooks hold each other
        return build_student(config, self._inputs, self._layout)[0]

    def _teacher(self, config: DistillationConfig) -> TeacherTargets:
        """A teacher's targets; of the teacher only its LM head is kept, where the loss is computed."""
        from renio_megatron.runner.build_teachers import build_teacher
        from renio_megatron.training.targets import HiddenStateTargets

        teacher = build_teacher(config, self._inputs, self._layout)
        targets = teacher.score(self._rollouts, self._batches)
        if not self._layout.pipeline.is_last:
            return HiddenStateTargets(targets.logp, [], _no_head)
        head = teacher.head
        return HiddenStateTargets(targets.logp, targets.payload, lambda: head)

    def _step(
        self, learner: Any, config: DistillationConfig, teacher: TeacherTargets, name: str
    ) -> tuple[Scores, dict[str, torch.Tensor]]:
        """A step as the trainer computes it, up to the optimizer: the whole batch's scores, this rank's gradients."""
        from renio_megatron.config.sections.weighting import RenioWeighting
        from renio_megatron.data.batching.collate import flat_completions
        from renio_megatron.losses.sample_weights import sample_weights
        from renio_megatron.megatron.model.schedules import broadcast_token_values
        from renio_megatron.models.param_map import local_name
        from renio_megatron.tools.precision.errors import Scores
        from renio_megatron.training.algorithms.weighted_loss import WeightedLoss

        device = self._layout.device
        _, owner, _ = flat_completions(self._rollouts)
        student_logp = learner.score(self._batches)["student_logp"]
        sample = sample_weights(
            student_logp,
            teacher.logp,
            owner.to(device),
            len(self._rollouts),
            config.weighting,
            batch_group=self._layout.data.group,
            report=config.renio_report or RenioWeighting(),
        )
        seen: dict[int, torch.Tensor] = {}
        loss = WeightedLoss(teacher, sample, config.loss, config.head, on_divergence=seen.__setitem__)
        # In another dtype the layers may have another backend, which names some parameters differently.
        gradients = {local_name(name): one for name, one in learner.gradients(self._batches, loss).items()}
        divergence = broadcast_token_values([seen[index] for index in sorted(seen)], self._batches, self._layout)
        renio = sample.renio
        assert renio is not None
        mine = Scores(student_logp, teacher.logp, divergence, renio.is_pivotal, renio.raw_weights, sample.weights)
        whole = self._whole_batch(mine)
        whole.check(name)
        return whole, gradients

    def _errors(
        self,
        learner: Any,
        config: DistillationConfig,
        teacher: TeacherTargets,
        name: str,
        truth: Scores,
        gradients: dict[str, torch.Tensor],
    ) -> dict[str, Any]:
        scores, mine = self._step(learner, config, teacher, name)
        return self._figures(scores, truth, self._sums(mine, gradients))

    def _figures(self, found: Scores, expected: Scores, sums: dict[str, list[float]]) -> dict[str, Any]:
        from renio_megatron.tools.precision.errors import gradient_errors, score_errors

        figures, worst = gradient_errors(sums)
        all_figures = {**score_errors(found, expected), **figures}
        # JSON has no NaN: there is no rank correlation where all weights are equal.
        return {key: value if value == value else None for key, value in all_figures.items()} | {"worst": worst}

    def _sums(self, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, list[float]]:
        """The `gradient_sums` of whole parameters, added up over ranks."""
        from renio_megatron.tools.precision.errors import gradient_sums

        whole: dict[str, list[float]] = {}
        for one in gather_objects(gradient_sums(found, expected)):
            for name, sums in one.items():
                whole[name] = [a + b for a, b in zip(whole.get(name, [0.0] * 4), sums, strict=True)]
        return whole

    def _whole_batch(self, mine: Scores) -> Scores:
        """Tokens and sequences of all data ranks, in the global order, on the CPU."""
        import torch

        names = [field.name for field in fields(mine)]
        own = {name: getattr(mine, name).detach().cpu() for name in names}
        data = self._layout.data
        shares = gather_objects(own, data.group) if data.size > 1 else [own]
        return type(mine)(**{name: torch.cat([share[name] for share in shares]) for name in names})
