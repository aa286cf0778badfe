"""Drawing completions from the student."""
