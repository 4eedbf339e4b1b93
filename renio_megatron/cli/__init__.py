"""The command line: parses, checks and starts; holds no behavior of its own."""
