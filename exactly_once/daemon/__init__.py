"""The process around a worker: signals and exit codes, several processes, and their health.

`signals` stops a worker gently; `supervisor` keeps several processes, which report to it through `heartbeat`; `health`
answers an orchestrator; `progress` shows a person how far the worker is. Nothing here receives a message or opens a database.
Called by the command line, and by `eo.run` for the signals.
"""
