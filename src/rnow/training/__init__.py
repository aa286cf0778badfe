"""The loop, and what happens around each of its steps."""
