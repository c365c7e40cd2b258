"""The command `exactly-once`. `command` finds the subcommand; each subcommand is a module of this package."""

from exactly_once.cli.command import main

__all__ = ["main"]
