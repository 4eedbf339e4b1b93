"""Notices: what a run says once where its metrics show a setting without the intended effect, or a mistake."""
