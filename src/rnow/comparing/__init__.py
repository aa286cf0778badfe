"""Runs side by side, from what is in their folders."""
