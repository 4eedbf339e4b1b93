"""The table of metrics: names, units, and reductions over ranks."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Definition of a metric.

    Attributes:
        unit: without brackets; `1` for a pure number or a share.
        reduction: over micro-batches and ranks, `mean` (sum of numerators over sum of denominators; a number that is
            equal on every rank is its own mean), `root_mean` (its square root, of sums of squares) or `max`.
        description: one line of explanation.
    """

    unit: str
    reduction: str
    description: str


METRICS: dict[str, Metric] = {
    "step": Metric("steps", "max", "optimizer steps done; 0 is the state before training"),
    "loss": Metric("nats/token", "mean", "weighted divergence: mean over sequences of weight x mean over tokens"),
    "grad_norm": Metric("1", "mean", "norm of the whole gradient, before clipping"),
    "lr": Metric("1", "mean", "learning rate of the step"),
    "weight/mean": Metric("1", "mean", "normalized sample weight, mean over sequences"),
    "weight/max": Metric("1", "max", "largest normalized sample weight of the step"),
    "weight/ess_frac": Metric("1", "mean", "effective share of the batch: (sum w)^2 / (B sum w^2)"),
    "weight/cap_frac": Metric("1", "mean", "share of sequences whose weight was cut at the cap"),
    "weight/token_mean": Metric("1", "mean", "weight of a token, mean over completion tokens"),
    "weight/token_max": Metric("1", "max", "largest weight of a token"),
    "weight/token_ess_frac": Metric("1", "mean", "effective share of the completion tokens: (sum w)^2 / (N sum w^2)"),
    "renio/unit_weight_frac": Metric("1", "mean", "share of sequences without a pivotal token (raw weight exactly 1)"),
    "renio/raw_weight_mean": Metric("1", "mean", "ReNIO's weight before normalization, mean over sequences"),
    "renio/pivotal_frac": Metric("1", "mean", "share of completion tokens that are pivotal"),
    "renio/ceiling_frac": Metric("1", "mean", "share of sequences whose raw weight is exp(ceiling / temperature)"),
    "renio/pivot_gradient_frac": Metric(
        "1",
        "root_mean",
        "norm of the gradient at pivotal tokens under entry_clip, over that without it; first micro-batch",
    ),
    "renio/auc_wrong": Metric("1", "mean", "AUC of the raw weight against wrong completions; 0.5 is chance"),
    "loss/entry_clip_frac": Metric(
        "1", "mean", "share of completion tokens at which entry_clip cut a vocabulary entry"
    ),
    "loss/kl": Metric("nats/token", "mean", "unweighted divergence, mean over completion tokens"),
    "rollout/accuracy": Metric("1", "mean", "share of the step's completions that are correct"),
    "rollout/no_answer_frac": Metric("1", "mean", "share of the step's completions in which no answer was found"),
    "rollout/grader_error_frac": Metric("1", "mean", "share of the step's completions on which the grader failed"),
    "rollout/length": Metric("tokens", "mean", "length of a completion, also behind rollout.prefix_length"),
    "rollout/truncated_frac": Metric("1", "mean", "share of completions that were cut before their end token"),
    "rollout/distinct": Metric("1", "mean", "number of different completions of the step"),
    "time/step_s": Metric("s", "max", "whole step, on the first rank"),
    "time/rollout_s": Metric("s", "max", "sampling of the completions, on the first rank"),
    "time/teacher_s": Metric("s", "max", "scoring by the teacher after all are drawn, on the first rank"),
    "time/score_s": Metric("s", "max", "the student's pass over its completions before the update, where there is one"),
    "time/train_s": Metric("s", "max", "forward, backward and optimizer, on the first rank"),
    "teacher/*/sequences_frac": Metric(
        "1", "mean", "of several teachers: share of the step's sequences that it scored"
    ),
    "teacher/*/kl": Metric("nats/token", "mean", "of several teachers: divergence at its sequences, mean over tokens"),
    "teacher/*/weight_mean": Metric("1", "mean", "of several teachers: normalized weight, mean over its sequences"),
    "teacher/*/raw_weight_mean": Metric("1", "mean", "of several teachers: ReNIO's raw weight, mean over them"),
    "teacher/*/no_answer_frac": Metric(
        "1", "mean", "of several teachers: share of its sequences in which no answer was found"
    ),
    "teacher/*/accuracy": Metric("1", "mean", "of several teachers: share of its sequences that are correct"),
    "teacher/payload_sent_mb": Metric("MiB", "max", "teacher's hidden states that ranks sent each other in a step"),
    "memory/teacher_payload_mb": Metric("MiB", "max", "device memory that the teacher's hidden states took at a time"),
    "moe/aux_loss": Metric(
        "1", "mean", "load-balancing loss without its coefficient, mean over sequences and layers; 1 is an even load"
    ),
    "moe/load_max_over_mean": Metric(
        "1", "max", "tokens of a layer's busiest expert over the mean of its experts, in the worst layer"
    ),
    "moe/idle_frac": Metric("1", "mean", "share of experts, over all layers, that no token of the step went to"),
    "moe/router_entropy": Metric("nats", "mean", "entropy of a router's probabilities, mean over tokens and layers"),
    "train/skipped_frac": Metric("1", "mean", "1 where the step was left out because its gradient was not finite"),
    "rollout/tokens": Metric("tokens", "mean", "completion tokens of the step that are learned from, of all ranks"),
    "tokens_per_s": Metric("tokens/s", "mean", "`rollout/tokens` over the time of the step"),
    "eval/accuracy_greedy": Metric("1", "mean", "accuracy on held-out problems, most likely tokens"),
    "eval/accuracy_sampled": Metric("1", "mean", "accuracy on held-out problems, sampled completions"),
    "eval/*/avg_at_n": Metric("1", "mean", "of a benchmark: share of right completions, mean over problems"),
    "eval/*/interval_low": Metric("1", "mean", "of a benchmark: lower end of avg_at_n's 95 % interval over problems"),
    "eval/*/interval_high": Metric("1", "mean", "of a benchmark: its upper end"),
    "eval/*/pass_at_n": Metric("1", "mean", "of a benchmark: share of problems with a right completion among n"),
    "eval/*/majority_at_n": Metric("1", "mean", "of a benchmark: problems whose most frequent answer is right"),
    "eval/*/length": Metric("tokens", "mean", "of a benchmark: length of a completion"),
    "eval/*/cut_frac": Metric("1", "mean", "of a benchmark: share of completions that were cut"),
    "eval/*/unparsable_frac": Metric("1", "mean", "of a benchmark: share of the others in which no answer was found"),
}

RENAMED_METRICS = {
    "renio/weight_mean": "weight/mean",
    "renio/weight_max": "weight/max",
    "renio/ess_frac": "weight/ess_frac",
    "renio/cap_frac": "weight/cap_frac",
}
"""Name in runs of earlier versions -> current name."""

# Names with a placeholder stay out of accumulators, whose ranks must all know the same names.
MEANS = tuple(name for name, metric in METRICS.items() if metric.reduction in ("mean", "root_mean") and "*" not in name)
MAXIMA = tuple(name for name, metric in METRICS.items() if metric.reduction == "max" and "*" not in name)
ORDER = {name: number for number, name in enumerate(METRICS)}


def family_of(name: str) -> str:
    """The key of `METRICS` for a name: the name itself, or the one with a placeholder in its middle."""
    first, middle, last = (*name.split("/"), "", "")[:3]
    return name if not (middle and last) else f"{first}/*/{last}"


def metric_of(name: str) -> Metric:
    """The metric of a name; for an unknown one raises a KeyError that suggests the nearest."""
    if name in RENAMED_METRICS:
        raise KeyError(f"the metric {name!r} is called {RENAMED_METRICS[name]!r} now.")
    if name not in METRICS:
        nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
        raise KeyError(f"unknown metric {name!r}; the nearest one is {nearest!r}. New ones go into metrics.METRICS.")
    return METRICS[name]
