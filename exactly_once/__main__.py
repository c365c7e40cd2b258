"""`python -m exactly_once`: the same as the command `exactly-once`."""

from exactly_once.cli.command import main

if __name__ == "__main__":
    main()
