"""What a run will hold in the memory of each rank: arithmetic over its recipe, with nothing allocated."""
