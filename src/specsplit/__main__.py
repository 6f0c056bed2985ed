"""`python -m specsplit` is the `specsplit` command."""

from specsplit.cli.main import main

if __name__ == "__main__":
    main()
