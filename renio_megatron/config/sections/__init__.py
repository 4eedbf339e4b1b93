"""The sections of a recipe: typed settings and their ranges."""
