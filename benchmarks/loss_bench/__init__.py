"""The parts of benchmarks/loss.py: problems and their exact answers, schemes, measurements, tables, bars."""
