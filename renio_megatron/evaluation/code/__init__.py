"""Judging of programs that a model wrote: they run in a sandbox, and verdicts are made outside of it."""
