"""From a folder to a Project: its prompts, its reward functions and its secrets. Files and text only, no torch."""

from rnow.project.dataset import Dataset, load_dataset, oversized_rows_error
from rnow.project.project import Project, load_project
from rnow.project.secrets import load_secrets, redact

__all__ = [
    "Dataset",
    "Project",
    "load_dataset",
    "load_project",
    "load_secrets",
    "oversized_rows_error",
    "redact",
]
