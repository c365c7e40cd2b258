"""A shop whose one handler writes down what it was given, for processes that a message may kill. Told by its environment."""

import os
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce

eo = ExactlyOnce(os.environ["SHOP_DATABASE"], group=os.environ["SHOP_GROUP"])
ledger = Path(os.environ["SHOP_LEDGER"])


@eo.handler(os.environ["SHOP_TOPIC"], tag=os.environ.get("SHOP_TAG") or None, key="no")
def reserve(session: Session, order: dict[str, Any]) -> None:
    with ledger.open("a") as file:
        file.write(f"{order['no']}\n")
