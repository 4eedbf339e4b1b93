"""One run, from a recipe to its finished directory."""
