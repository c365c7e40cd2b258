"""`exactly-once run`: a worker, or several processes of it, until a stop signal."""

import logging
import sys
from contextlib import ExitStack
from datetime import timedelta
from typing import Annotated, TextIO

import typer

from exactly_once.cli.reference import TransportOption, application
from exactly_once.configuration.config import said_afterwards

__all__ = ["command"]


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the present `sys.stderr`: the progress line replaces it, and redraws itself below each log line."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Never set."""


def log_to_stderr() -> None:
    """Send log lines to standard error if the application has configured no logging. Called after the application is imported."""
    if logging.getLogger().handlers:
        return
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)


def command(
    app: Annotated[str, typer.Argument(metavar="MODULE:NAME", help="The application, such as shop.consumers:eo")],
    transport: TransportOption = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", "-c", min=1, help="Messages at once.")] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", "-p", min=1, help="Processes, restarted if one dies.")
    ] = None,
    drain_timeout: Annotated[
        float | None, typer.Option("--drain-timeout", min=0, metavar="SECONDS", help="For running messages to finish.")
    ] = None,
    health: Annotated[str | None, typer.Option("--health", metavar="HOST:PORT", help="Serve /live and /ready.")] = None,
) -> None:
    """Run a worker until SIGTERM or Ctrl-C: receive, handle, acknowledge.

    Log lines go where the application's own logging sends them; if it configures none, to standard error.
    Exits 0 when stopped, 1 when messages were given back unfinished, 143 on a second signal.
    """
    with said_afterwards():
        eo = application(app)
        serving = eo.worker(
            transport,
            concurrency=concurrency,
            drain_timeout=None if drain_timeout is None else timedelta(seconds=drain_timeout),
        )
        log_to_stderr()  # `imports=` are imported by now, too
    number = processes or eo.config.processes.value
    address = health or eo.config.health.value
    if number > 1:
        from exactly_once.daemon.supervisor import child_command, supervise

        raise SystemExit(
            supervise(
                child_command(sys.argv[1:]), processes=number, drain_timeout=serving.drain_timeout, health=address
            )
        )
    from exactly_once.configuration.supervised import is_supervised
    from exactly_once.daemon.health import Health
    from exactly_once.daemon.progress import Progress
    from exactly_once.daemon.signals import leave, run_until_signal

    supervised = is_supervised()
    with ExitStack() as beside:
        if address and not supervised:  # one port answers for all processes, and the supervisor has it
            beside.enter_context(Health(serving, address))
        progress = Progress(lambda: serving.counts)

        def start() -> None:
            serving.start()
            progress.start()
            beside.callback(progress.stop)

        code = run_until_signal(serving, start=start)
    # At once: a native client library's threads must not keep the interpreter from ending.
    leave(code)
