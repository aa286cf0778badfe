"""From a folder to a Project: its prompts, its reward functions and its secrets. Files and text only, no torch."""
