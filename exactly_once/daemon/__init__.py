"""The process around a worker: from a signal to an exit code, several processes, and how they are doing.

`signals` ends a worker gently; `supervisor` keeps several processes, which tell it by `heartbeat` how they are; `health`
answers an orchestrator, `progress` a person. Nothing here receives a message or opens a database. Called by the command
line, and by `eo.run` for the signals.
"""
