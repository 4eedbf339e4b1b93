"""Stand-ins for what is not here."""
