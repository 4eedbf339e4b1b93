"""Memory plan of a run for each rank: arithmetic over its recipe, with nothing allocated."""
