"""Plan, doctor, precision, reports."""
