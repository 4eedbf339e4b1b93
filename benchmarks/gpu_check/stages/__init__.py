"""The stages, one file each: a file's `units(setting)` are what the stage measures, the most telling first."""
