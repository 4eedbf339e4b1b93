"""All hostile programs, by name."""

from __future__ import annotations

from tests.evaluation.sandbox import reaching_out, using_too_much

CASES = {**reaching_out.CASES, **using_too_much.CASES}
