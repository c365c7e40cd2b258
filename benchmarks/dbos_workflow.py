"""The same handler under DBOS, as its documentation recommends for events that must be processed exactly once.

Each message has a workflow, with the business key as its workflow id (`SetWorkflowID`). The workflow has one transaction of a
`SQLAlchemyDatasource`, which writes the handler's rows and the step's checkpoint in one commit. The isolation is READ COMMITTED,
as for our code and the hand-written code: DBOS's default, SERIALIZABLE, costs more. Its system tables are in the same database,
and fsync is on for both. A message then needs five commits (counted in DBOS 3.4): the workflow's begin, the handler's rows with
the checkpoint, the step's record, the checkpoint's deletion, the workflow's end. DBOS can also resume a workflow of many steps:
that is not needed here, but cannot be switched off.

Workflows are called directly, one message after the other, as in our measurement. `InBackground` starts several workflows and
takes their results later, on DBOS's own threads: the other way in its documentation.
"""

import json
import os
from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Final

from dbos import DBOS, DBOSConfig, SetWorkflowID, SQLAlchemyDatasource

from benchmarks.measure import Span, WrongRows
from benchmarks.shop import reserve
from exactly_once import Message

__all__ = ["InBackground", "Workflows"]

AHEAD: Final = 8  # workflows in flight; on two cores more threads do not help


class Workflows:
    """DBOS, launched in this process.

    Args:
        url: The database, for its tables and the shop's.
    """

    def __init__(self, url: str) -> None:
        config: DBOSConfig = {
            "name": "benchmark",
            "system_database_url": url,
            "log_level": "ERROR",
            "executor_id": f"benchmark-{os.getpid()}",  # else another launch takes our workflows for abandoned
        }
        DBOS(config=config)
        datasource = SQLAlchemyDatasource.create(url)
        self._ran = 0
        self._given: Sequence[Message] = ()
        self._new = 0

        @datasource.transaction(isolation_level="READ COMMITTED")
        def reserve_stock(order: dict[str, Any]) -> None:
            reserve(datasource.sql_session(), order)
            self._ran += 1

        @DBOS.workflow()
        def handle(order: dict[str, Any]) -> None:
            reserve_stock(order)

        self._handle = handle
        DBOS.launch()

    def take(self, given: Sequence[Message], new: int) -> None:
        self._given, self._new = given, new
        self._ran = 0

    def run(self) -> Span:
        began = perf_counter()
        self._work()
        ended = perf_counter()
        if self._ran != self._new:
            raise WrongRows(f"{self._ran} messages were handled as new, not {self._new}")
        return Span(len(self._given), began, ended)

    def _work(self) -> None:
        for message in self._given:
            order = json.loads(message.body or b"")
            with SetWorkflowID(order["order_no"]):
                self._handle(order)


class InBackground(Workflows):
    """Several workflows in flight."""

    def _work(self) -> None:
        under_way: deque[Any] = deque()
        for message in self._given:
            order = json.loads(message.body or b"")
            with SetWorkflowID(order["order_no"]):
                under_way.append(DBOS.start_workflow(self._handle, order))
            if len(under_way) >= AHEAD:
                under_way.popleft().get_result()
        for handle in under_way:
            handle.get_result()
