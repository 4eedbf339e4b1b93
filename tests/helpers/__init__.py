"""What several tests use: ranks, jobs, warm processes, models."""
