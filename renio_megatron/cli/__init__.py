"""The command line: parses, checks and starts; holds no behaviour of its own."""
