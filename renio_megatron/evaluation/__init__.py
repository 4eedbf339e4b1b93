"""How good the student's completions are."""
