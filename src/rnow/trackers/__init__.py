"""Trackers: the numbers of a run shown elsewhere, beside its own files."""
