"""The command `exactly-once`. `command` finds the verb; each verb is a module of this folder."""

from exactly_once.cli.command import main

__all__ = ["main"]
