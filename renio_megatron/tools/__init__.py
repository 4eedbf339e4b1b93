"""What people ask of a recipe beside training it: memory, a fit machine, FP8, tables and curves, the quickstart."""
