"""What a weighting is shown that follows from logits, against plain torch; and that nothing else is computed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from renio_megatron import VocabShard, WeightingConfig, distillation_loss, linear_distillation_loss
from renio_megatron.config import HeadConfig, LossConfig
from renio_megatron.config.sections.combined_weighting import PermutedWeighting, ProductWeighting
from renio_megatron.config.sections.weighting import (
    LengthWeighting,
    RenioWeighting,
    StudentEntropyWeighting,
    UniformWeighting,
)
from renio_megatron.data.batching.collate import BatchLayout, collate
from renio_megatron.errors import ConfigError
from renio_megatron.losses import entropy as entropy_module
from renio_megatron.losses import token_logp, vocab_passes
from renio_megatron.losses.vocab_passes import VocabParallelPasses
from renio_megatron.objective.weightings import LOGIT_INPUTS
from renio_megatron.objective.weightings.strategy import seeded
from renio_megatron.parallel.vocab import LmHead
from renio_megatron.training.algorithms.weighing import Weighing
from renio_megatron.training.targets import HiddenStateTargets
from renio_megatron.types import Prompt, Rollout
from tests.fakes.strategies import SeenWeighting, shown
from tests.helpers.vectors import worst
from tests.losses.test_weigh import LOSSES, expected_of, facts_of, problem

LOGITS_WANTED = tuple(sorted(LOGIT_INPUTS))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["logits", "hidden", "chunks"])
def test_what_follows_from_logits(form, loss, padding):
    models, tokens = problem(4)
    facts = expected_of(models, tokens, LOSSES[loss], "uniform").facts
    shard = VocabShard(0, 11 + padding, 11)
    extra = torch.full((padding, 1), torch.nan, dtype=torch.float64)  # whoever reads a padding row shows it
    hidden, head, *of_teacher = (
        torch.cat((one, extra.expand(-1, one.shape[1]))) if number % 2 else one for number, one in enumerate(models)
    )

    def run(weighting):
        arguments = (tokens.ids, tokens.owner, tokens.num_sequences, LOSSES[loss], weighting, shard)
        if form == "logits":
            distillation_loss(linear(hidden, head), linear(*of_teacher), *arguments)
        else:
            chunk_size = 5 if form == "chunks" else None
            linear_distillation_loss(hidden, head, *of_teacher, *arguments, chunk_size=chunk_size)

    for wants in (LOGITS_WANTED, *((name,) for name in LOGITS_WANTED)):
        seen = shown((*wants, "student_logp", "teacher_logp"), run)
        for name in (*wants, "student_logp", "teacher_logp"):
            assert worst(getattr(seen, name), getattr(facts, name)) <= 1e-12, name
        assert not set(LOGITS_WANTED) & seen.values.keys() - set(wants)
        assert seen.lengths.tolist() == [float(len(mine)) for mine in facts.of]


def test_the_entropy_of_impossible_columns_and_of_rows_in_blocks(monkeypatch):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    logits[:, 2] = -torch.inf
    logits[0, 1:] = -torch.inf  # certain: no entropy
    expected = torch.special.entr(logits.softmax(-1)).sum(-1)
    hidden, head = logits, LmHead(torch.eye(7, dtype=torch.float64), VocabShard(0, 7, 7))
    maximum, log_sum = logits.amax(-1), (logits - logits.amax(-1, keepdim=True)).exp().sum(-1).log()
    for size in (entropy_module.BLOCK_BYTES, 2 * 7 * 8, 1):
        monkeypatch.setattr(entropy_module, "BLOCK_BYTES", size)
        found = entropy_module.entropy(logits, maximum, log_sum, head.shard)
        assert worst(found, expected) <= 1e-14 and found[0] == 0.0
    hidden = torch.where(logits.isinf(), -900.0, logits)  # products of infinity and 0 are none
    scores = token_logp.linear_token_scores(
        hidden, head, torch.zeros(5, dtype=torch.int64), HeadConfig(chunk_size=2), with_entropy=True
    )
    assert worst(scores.entropy, expected) <= 1e-12


class Counted:
    """Calls of what the passes over logits compute beside the loss."""

    def __init__(self, monkeypatch):
        self.entropies, self.totals = [], 0
        for module in (vocab_passes, token_logp):
            monkeypatch.setattr(module, "entropy", self._counted(module.entropy))
        totals = VocabParallelPasses.totals_and_gradient

        def counted(passes, *args):
            self.totals += 1
            return totals(passes, *args)

        monkeypatch.setattr(VocabParallelPasses, "totals_and_gradient", counted)

    def _counted(self, entropy):
        def counted(logits, *args, **kwargs):
            self.entropies.append(logits.clone())
            return entropy(logits, *args, **kwargs)

        return counted


TOKENS, GENERATOR = StudentEntropyWeighting(), seeded(5, 1)
COUNTS = {  # entropies, and passes over the divergence: one is the loss's own
    "uniform": (UniformWeighting(), 0, 1),
    "renio": (RenioWeighting(), 0, 1),
    "length": (LengthWeighting(), 0, 1),
    "permuted renio": (PermutedWeighting(of=RenioWeighting()), 0, 1),
    "student entropy": (TOKENS, 1, 1),
    "a product": (ProductWeighting(factors=(RenioWeighting(), TOKENS, StudentEntropyWeighting())), 1, 1),
    "permuted entropy": (PermutedWeighting(of=TOKENS), 1, 1),
    "both entropies": (SeenWeighting(wants=("student_entropy", "teacher_entropy")), 2, 1),
    "divergence": (SeenWeighting(wants=("divergence",)), 0, 2),
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_nobody_declares_is_not_computed(name, monkeypatch):
    weighting, entropies, totals = COUNTS[name]
    models, tokens = problem(4)
    student, teacher = linear(*models[:2]), linear(*models[2:])
    arguments = (tokens.ids, tokens.owner, tokens.num_sequences, LossConfig(), weighting)
    inputs = {"position": tokens.position, "generator": GENERATOR}
    counted = Counted(monkeypatch)
    distillation_loss(student.clone().requires_grad_(), teacher, *arguments, inputs=inputs).loss.backward()
    assert (len(counted.entropies), counted.totals) == (entropies, totals)
    for logits, model in zip(counted.entropies, (student, teacher), strict=False):
        assert torch.equal(logits, model)
    counted.entropies.clear()
    counted.totals = 0
    linear_distillation_loss(*models, *arguments, inputs=inputs, chunk_size=7)  # 19 tokens are 3 chunks
    assert (len(counted.entropies), counted.totals) == (3 * entropies, 3 * totals)
    if entropies == 1:
        torch.testing.assert_close(torch.cat(counted.entropies), student)


def test_given_weights_need_no_entropy(monkeypatch):
    models, tokens = problem(4)
    counted = Counted(monkeypatch)
    weights = torch.ones(tokens.num_sequences, dtype=torch.float64)
    arguments = (tokens.ids, tokens.owner, tokens.num_sequences, LossConfig(), TOKENS)
    distillation_loss(linear(*models[:2]), linear(*models[2:]), *arguments, weights=weights)
    linear_distillation_loss(*models, *arguments, weights=weights)
    assert not counted.entropies


# The scoring pass of a training step.


class Student:
    """Learner that scores: hidden states of all completion tokens, cut into micro-batches."""

    def __init__(self, hidden, head, batches):
        self.hidden, self.head, self.batches, self.asked = hidden, head, batches, []

    def score(self, batches, more=None):
        self.asked.append(more)
        if more is None:
            return {"student_logp": torch.full((len(self.hidden),), -9.0)}
        found = {name: torch.full((len(self.hidden),), torch.nan, dtype=torch.float64) for name in more.names}
        for index, batch in enumerate(batches):
            values = more.values_of(index, batch, self.hidden[batch.token_index], self.head)
            for name in more.names:
                found[name][batch.token_index] = values[name]
        return found


def scored(weighting, *, drawn=True, recompute=False, loss=LOSSES["bounded"]):
    """(scores, the learner, facts) of seven completions, by a teacher whose hidden states are known."""
    models, tokens = problem(6)
    logp = torch.arange(len(tokens.ids)) * -1.0
    counts, rollouts, first = (4, 1, 3, 2, 5, 1, 3), [], 0
    for number, count in enumerate(counts):
        ids = tuple(tokens.ids[first : first + count].tolist())
        rollouts.append(Rollout(Prompt(number, (1,), (1,)), ids, logp[first : first + count] if drawn else None))
        first += count
    batches = collate(rollouts, audience="student", batch_layout=BatchLayout(0, 3))
    shard = VocabShard(0, 11, 11)
    student = Student(models[0], LmHead(models[1], shard), batches)
    payload = [models[2][batch.token_index] for batch in batches]
    targets = HiddenStateTargets(logp, payload, lambda: LmHead(models[3], shard))
    weighing = Weighing(weighting, None, loss, HeadConfig(chunk_size=2), recompute=recompute, seed=1)
    found = weighing.scores(rollouts, batches, student, targets)
    return found, student, facts_of(linear(*models[:2]), linear(*models[2:]), tokens, loss)


@pytest.mark.parametrize("name", ["uniform", "renio", "length"])
def test_without_need_the_student_does_not_read_again(name, monkeypatch):
    counted = Counted(monkeypatch)
    found, student, _ = scored(WeightingConfig(name=name))
    assert not student.asked and not counted.entropies and not counted.totals
    assert found.keys() == {"student_logp"} and found["student_logp"].tolist() == [-1.0 * i for i in range(19)]
    for options in ({"recompute": True}, {"drawn": False}):
        found, student, _ = scored(WeightingConfig(name=name), **options)
        assert student.asked == [None] and found["student_logp"].tolist() == [-9.0] * 19
        assert not counted.entropies and not counted.totals


@pytest.mark.parametrize("wants", [("student_entropy",), ("divergence",), ("teacher_entropy",), LOGITS_WANTED])
def test_a_scoring_pass_tells_what_is_declared_and_no_more(wants, monkeypatch):
    counted = Counted(monkeypatch)
    found, student, facts = scored(SeenWeighting(wants=(*wants, "position")))
    assert [more.names for more in student.asked] == [tuple(sorted(wants))]
    assert found.keys() == {"student_logp", *wants}
    for name in wants:
        assert worst(found[name], getattr(facts, name)) <= 1e-12, name
    assert found["student_logp"][18] == -18.0  # the sampler's, where they need not be made again
    chunks = 4 + 4 + 2  # of two tokens, in micro-batches of 8, 8 and 3
    assert len(counted.entropies) == chunks * sum("entropy" in name for name in wants)
    assert counted.totals == chunks * ("divergence" in wants)
    again, student, _ = scored(SeenWeighting(wants=wants), recompute=True)
    assert [more.names for more in student.asked] == [tuple(sorted((*wants, "student_logp")))], "one pass tells both"
    assert worst(again["student_logp"], facts.student_logp) <= 1e-12
    for name in wants:
        assert torch.equal(again[name], found[name])


def test_targets_without_hidden_states_tell_the_students_entropy_alone():
    class Sampled(HiddenStateTargets):
        token_inputs = HiddenStateTargets.__mro__[1].token_inputs

    def targets_of(*args):
        return Sampled(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "HiddenStateTargets", targets_of)
        found, _, facts = scored(StudentEntropyWeighting())
        assert worst(found["student_entropy"], facts.student_entropy) <= 1e-12
        with pytest.raises(ConfigError, match="needs divergence and teacher_entropy, which this teacher's answers"):
            scored(SeenWeighting(wants=LOGITS_WANTED))
