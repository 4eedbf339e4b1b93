"""Commands other than training: memory plan, machine check, FP8 comparison, reports, quickstart."""
