"""A rank's part of a model."""
