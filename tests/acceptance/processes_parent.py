"""The supervisor as a process: `processes_parent.py PROCESSES DRAIN_S GRACE_S HEALTH_OR_EMPTY COMMAND...`."""

import logging
import sys
from datetime import timedelta

from exactly_once.daemon.supervisor import supervise

logging.basicConfig(level=logging.INFO, format="%(message)s")
processes, drain_s, grace_s, health, *command = sys.argv[1:]
sys.exit(
    supervise(
        [sys.executable, *command],
        processes=int(processes),
        drain_timeout=timedelta(seconds=float(drain_s)),
        grace=timedelta(seconds=float(grace_s)),
        health=health or None,
    )
)
