"""Child processes that end with us."""
