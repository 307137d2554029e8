"""Entry point of the `svl` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run what the command line asks for; Ctrl-C ends in one line from the first import on."""
    try:
        from svl.run.application import app, run_in_one_line

        if sys.argv[1:2] == ["doctor"]:
            from svl.doctor.command import run_doctor

            run_in_one_line(run_doctor)
        else:
            run_in_one_line(app)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
