"""`exactly-once send`: sends one message from the command line, or those of a file, and prints a receipt for each."""

import os
from datetime import timedelta
from typing import Annotated

import typer

from exactly_once.app import ExactlyOnce
from exactly_once.cli.recorded import BadLine, Progressing, messages, open_input, size_of
from exactly_once.cli.reference import TransportOption
from exactly_once.errors import ConfigurationError, TransportError
from exactly_once.message import Message
from exactly_once.transports.contract import Receipt
from exactly_once.transports.producer import Producer
from exactly_once.wording.text import escaped

__all__ = ["command"]


def command(
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE.jsonl]", help="One message a line as JSON; - is standard input.")
    ] = None,
    transport: TransportOption = None,
    topic: Annotated[str | None, typer.Option("--topic", help="Of the message, or for lines that name none.")] = None,
    body: Annotated[
        str | None, typer.Option("--body", help="The body of one message: the bytes as you type them.")
    ] = None,
    tag: Annotated[str | None, typer.Option("--tag")] = None,
    key: Annotated[str | None, typer.Option("--key", help="The message key.")] = None,
    ordering_key: Annotated[str | None, typer.Option("--ordering-key")] = None,
    properties: Annotated[
        list[str] | None, typer.Option("--property", metavar="NAME=VALUE", help="May be repeated.")
    ] = None,
    delay: Annotated[
        float | None, typer.Option("--delay", min=0, metavar="SECONDS", help="Deliver not before.")
    ] = None,
) -> None:
    """Send one message (--topic, --body), or those of a file; print a receipt for each that the broker has stored.

    Exits 1 if one could not be sent; standard error says which.
    """
    if (file is None) == (body is None):
        raise ConfigurationError("Give either a FILE.jsonl, or --topic and --body for one message.")
    if body is not None and not topic:
        raise ConfigurationError("--body needs --topic.")
    after = None if delay is None else timedelta(seconds=delay)
    bad = 0
    eo = ExactlyOnce()
    if str(transport or eo.config.transport.value or "").startswith("memory:"):
        raise ConfigurationError(
            "memory:// lives in one process: what this command sent would be gone with it. For a try without a broker"
            " write --transport sql://"
        )
    with eo.producer(transport) as producer:
        if body is not None:
            one = Message(
                topic or "",
                os.fsencode(body),  # the bytes as they were typed, also if they are not UTF-8
                tag=tag,
                key=key,
                ordering_key=ordering_key,
                properties=_properties(properties),
            )
            receipt = producer.send(one, delay=after)
            typer.echo(f"{receipt.topic}\t{receipt.message_id}")
            return
        assert file is not None
        with open_input(file) as stream, Progressing(size_of(file), "send") as progress:
            sent = 0
            for line, read, message in messages(stream, topic, file=file, verb="send", done="sent"):
                answer = message if isinstance(message, BadLine) else _sent(producer, message, after)
                if isinstance(answer, Receipt):
                    sent += 1
                    typer.echo(f"{answer.topic}\t{answer.message_id}")
                else:
                    bad += 1
                    typer.echo(f"line {line}: not sent: {escaped(str(answer), 400)}", err=True)
                progress.show(read, sent)
    typer.echo(f"{sent} sent, {bad} not", err=True)
    if bad:
        raise SystemExit(1)


def _sent(producer: Producer, message: Message, after: timedelta | None) -> Receipt | TransportError:
    try:
        return producer.send(message, delay=after)
    except TransportError as error:
        return error


def _properties(given: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given or ():
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--property {escaped(each)!r}: it looks like NAME=VALUE")
        found[name] = value
    return found
