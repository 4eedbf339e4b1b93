"""The repository: its house, pages, scripts, packaging, and the tests' own machinery."""
