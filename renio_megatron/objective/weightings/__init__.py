"""Strategies that weight sequences and tokens, one file each; their settings name their class. No torch here."""

INPUTS = (
    *("student_logp", "teacher_logp", "sampler_logp", "student_entropy", "teacher_entropy", "divergence", "position"),
    *("finished", "verdict", "prompt_group", "sequence", "generator", "step"),
)
"""Inputs that a strategy may declare, in addition to `COLUMN` and a name; `strategy.WeightingInputs` documents each.
Lengths of sequences and owners of tokens are always available."""

LOGIT_INPUTS = frozenset(("student_entropy", "teacher_entropy", "divergence"))
"""Inputs that need the full logits, for which a run makes another forward pass over its completions."""
OF_STUDENT = frozenset(("student_logp", "student_entropy"))
"""Inputs that need the student's logits only."""

COLUMN = "column "
"""Prefix of an input that is a numeric column of the records."""
