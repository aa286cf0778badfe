"""From a checked plan to a running program: loads what was planned."""
