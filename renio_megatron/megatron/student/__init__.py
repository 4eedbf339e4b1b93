"""The student: its update and its completions."""
