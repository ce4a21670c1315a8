"""`python -m minivlm`, and what the script `minivlm` calls: the command line."""

import sys


def main() -> int:
    """Run one command and return its exit code."""
    try:
        from minivlm import cli

        return cli.main()
    except KeyboardInterrupt:  # in the first moments, while modules are imported
        print("minivlm: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
