"""What a run says once where its metrics show a mistake, or a setting without effect."""
