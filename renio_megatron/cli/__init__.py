"""The command line: parses arguments, checks settings and starts ranks; no logic of its own."""
