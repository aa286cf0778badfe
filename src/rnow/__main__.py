"""``python -m rnow`` and the ``rnow`` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from rnow.cli.leave import leave
        from rnow.cli.main import run_command_line
    except KeyboardInterrupt:  # while the program itself is being read
        raise SystemExit(130) from None
    leave(run_command_line())


if __name__ == "__main__":
    main()
