"""Evaluation and grading of the student's completions."""
