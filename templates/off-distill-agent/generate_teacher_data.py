"""Ask a teacher the questions of prompts.jsonl, and write its answers as train.jsonl.

    python generate_teacher_data.py                     # the tiny teacher in this folder
    python generate_teacher_data.py --teacher Qwen/Qwen3-32B sampler.backend=vllm
    python generate_teacher_data.py --url https://api.openai.com/v1 --model gpt-4o \
        --max-cost 5 --price-in 2.50 --price-out 10     # the key is OPENAI_API_KEY, in .env or exported
    python generate_teacher_data.py --help              # everything else

Called again, it asks only what has no answer yet: after an interruption, with more prompts, with -n 4 instead of 1. It is
`rnow generate` with the defaults below; whatever is given wins over them.
"""

import sys
from pathlib import Path

from rnow.cli.main import run_command_line

FOLDER = Path(__file__).resolve().parent
DEFAULTS = {
    "--dir": str(FOLDER),
    "--prompts": "prompts.jsonl",
    "--output": "train.jsonl",
    "--keep-if": "reward>=1",  # rewards.py: only conversations that end with the right answer become rows
}
TEACHER = {"--teacher": "teacher"}


def command(arguments: list[str]) -> list[str]:
    """The command line of `rnow` for these arguments."""
    given = {argument.partition("=")[0] for argument in arguments}
    defaults = DEFAULTS if given & {"--teacher", "-t", "--url"} else DEFAULTS | TEACHER
    return ["generate", *(word for pair in defaults.items() for word in pair), *arguments]


if __name__ == "__main__":
    sys.exit(run_command_line(command(sys.argv[1:])))
