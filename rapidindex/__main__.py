"""`python -m rapidindex`, and the command `rapidindex`."""

import sys


def main() -> None:
    """Run the command line. A signal that comes while it is imported ends it as one that comes later does."""
    try:
        from rapidindex.cli import main as run

        run()
    except KeyboardInterrupt:
        print("Interrupted; what was finished is kept. Type the same command again to go on.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
