"""`python -m treering`."""

from treering.cli import main

if __name__ == "__main__":
    main()
