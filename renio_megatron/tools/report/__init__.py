"""Reports of finished runs: comparison table and curves."""
