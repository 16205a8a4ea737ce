"""``python -m cupaged doctor``: what this machine has, and what is missing."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m cupaged", description="cupaged's command line")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say what was found, what works, and what to install for the rest")
    parser.parse_args(arguments)

    from cupaged.doctor import doctor

    return doctor()


if __name__ == "__main__":
    sys.exit(main())
