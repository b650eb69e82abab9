"""`python -m rapidindex`."""

from rapidindex.cli import main

if __name__ == "__main__":
    main()
