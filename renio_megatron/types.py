"""Data types shared by the subpackages, and the legend of shape suffixes.

Legend of the suffixes of tensor names:

    N   completion tokens of a batch, flat: sequence after sequence, without padding
    B   sequences
    V   vocabulary, always the global one (without padding columns)
    L   local width of a vocabulary shard (padding columns included)
    S   padded length of the rows of a micro-batch (prompt and completion)
    H   hidden size

Log-probabilities are natural logarithms; log ratios and divergences are in nats.

Torch is not imported: records are read, and completions are graded, in processes that have no need of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


Turn = tuple[str, str]
"""A turn of a conversation: role (system, user, assistant, ...) and text."""


@dataclass(frozen=True)
class Record:
    """One problem.

    Example: ``Record("2 + 2?", answer="4", where="train.jsonl:17")``.

    Attributes:
        problem: text of the problem.
        solution: worked solution; None where there is none.
        answer: right answer, for the grader; None where there is none.
        metadata: the other columns, for the grader.
        where: file and line, or number, for error messages.
        teacher: value of the column data.teacher_key; None where there is none.
        before: turns of the conversation before the problem, which is the user's last turn.
        teacher_turns: what the teacher sees in place of the problem and the turns before it; None: the same.
    """

    problem: str
    solution: str | None = None
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    where: str = "record"
    teacher: str | None = None
    before: tuple[Turn, ...] = ()
    teacher_turns: tuple[Turn, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """One problem as the student and the teacher see it.

    Example: modchain's ``^7+5*3=`` has ``student_ids == teacher_ids`` (7 tokens) and ``record.answer == "6"``; under
    self-distillation ``teacher_ids`` also holds the worked solution and is longer.

    Attributes:
        index: position in the run's endless order of prompts; with the seed it identifies the prompt.
        student_ids, teacher_ids: token ids of the two views, without any completion.
        record: the problem itself, for the grader.
        completion_ids: a given completion (end token included) for supervised fine-tuning; None otherwise.
        teacher: name of the teacher that scores the completions, of several; empty where there is one.
    """

    index: int
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    record: Record = Record("")
    completion_ids: tuple[int, ...] | None = None
    teacher: str = ""


@dataclass(frozen=True)
class Rollout:
    """A prompt and one completion.

    Attributes:
        prompt: the prompt that was continued.
        completion_ids: token ids, at least one; the end token is the last one where it was sampled.
        logp: log-probability of each token under the student that sampled it, at the loss temperature and before
            top-p and top-k, fp32 [len(completion_ids)] on the CPU; None where the completion was given.
        finished: whether it ended by itself (False: cut at ``max_completion_length``).
        ended_by_string: whether it ended with a stop string, which is part of the answer, rather than an end token.
        unread_ids: tokens that were drawn after `completion_ids` and are graded only: neither scored nor learned from.
    """

    prompt: Prompt
    completion_ids: tuple[int, ...]
    logp: torch.Tensor | None = None
    finished: bool = True
    ended_by_string: bool = False
    unread_ids: tuple[int, ...] = ()

    @property
    def drawn_ids(self) -> tuple[int, ...]:
        """All tokens of the completion."""
        return self.completion_ids + self.unread_ids

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The whole completion without its end token, where it has one."""
        return self.drawn_ids[:-1] if self.finished and not self.ended_by_string else self.drawn_ids

    def prefix(self, length: int | None) -> Rollout:
        """The same rollout, of which at most the first `length` tokens are scored and learned from; None: all.

        >>> cut = Rollout(Prompt(0, (1,), (1,)), (5, 6, 7)).prefix(2)
        >>> cut.completion_ids, cut.unread_ids, cut.answer_ids
        ((5, 6), (7,), (5, 6))
        """
        if length is None or len(self.completion_ids) <= length:
            return self
        ids, logp = self.completion_ids, self.logp
        return replace(
            self,
            completion_ids=ids[:length],
            logp=None if logp is None else logp[:length],
            unread_ids=ids[length:] + self.unread_ids,
        )


@dataclass(frozen=True)
class Verdict:
    """A grader's verdict on a completion.

    Attributes:
        correct: whether it is right; None where the grader failed. It counts as wrong, and is counted apart.
        answer: the answer that was read; None where there was none.
        reason: why it is not right, in a few words; may be empty.
    """

    correct: bool | None
    answer: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_p, top_k: nucleus and top-k sampling; None keeps every token.
        max_completion_length: tokens after which a completion is cut.
        micro_batch_size: sequences decoded at a time; None: all.
    """

    temperature: float
    top_p: float | None
    top_k: int | None
    max_completion_length: int
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Some of a rank's sequences as model inputs.

    A sequence is ``prompt + completion`` without the last token, from which nothing is predicted. The sequences are
    rows padded on the right [B, S], or are packed into a single row [1, S] with `boundaries`. The next-token shift
    happens once, here: the hidden state at flat position ``row_index[n]`` (row-major over `token_ids`)
    predicts ``target_ids[n]``, which belongs to sequence ``owner[n]`` of this micro-batch.

    Example: prompt (5, 6), completion (7, 8): the row is (5, 6, 7), row_index (1, 2), target_ids (7, 8).

    Under context parallelism a rank holds a piece of every sequence: its own positions and completion tokens only.

    Attributes:
        token_ids, position_ids: int64 [B, S] or [1, S], padding included; positions count 0, 1, ... in each sequence.
        row_index, target_ids, owner: int64 [N].
        token_index: index of each completion token in the flat order of all of the rank's rollouts, int64 [N].
        sequence_index: index of each sequence among the rank's rollouts, int64 [B].
        prompt_index: `Prompt.index` of each sequence, int64 [B].
        lengths: completion tokens of each whole sequence, int64 [B].
        sequence_of: sequence of each of `token_ids`, -1 for padding, int64 of the same shape.
        boundaries: starts of the packed sequences and the end of the last one, over all context-parallel ranks, B + 1
            numbers (cumulative lengths); None where each sequence has its own row.
        cp_size: context-parallel ranks that share the sequences.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    row_index: torch.Tensor
    target_ids: torch.Tensor
    owner: torch.Tensor
    token_index: torch.Tensor
    sequence_index: torch.Tensor
    prompt_index: torch.Tensor
    lengths: torch.Tensor
    sequence_of: torch.Tensor
    boundaries: tuple[int, ...] | None = None
    cp_size: int = 1

    @property
    def num_sequences(self) -> int:
        """Sequences in this micro-batch, B."""
        return len(self.lengths)

    @property
    def row_length(self) -> int:
        """Length S of the rows before context parallelism cut them."""
        return self.token_ids.shape[1] * self.cp_size

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")}
        return replace(self, **moved)
