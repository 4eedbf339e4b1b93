"""Strategies that weigh sequences and tokens, one file each; the settings of each name its class. No torch here."""

INPUTS = (
    *("student_logp", "teacher_logp", "sampler_logp", "student_entropy", "teacher_entropy", "divergence", "position"),
    *("finished", "verdict", "prompt_group", "sequence", "generator", "step"),
)
"""What a strategy may declare, beside `COLUMN` and a name: `strategy.WeightingInputs` says what each is. Lengths of
sequences and owners of tokens are always there."""

LOGIT_INPUTS = frozenset(("student_entropy", "teacher_entropy", "divergence"))
"""Those that follow from logits, and from nothing less: a run reads its completions once more for them."""
OF_STUDENT = frozenset(("student_logp", "student_entropy"))
"""Those that the student's logits tell alone."""

COLUMN = "column "
"""Begins the name of a numeric column of the records."""
