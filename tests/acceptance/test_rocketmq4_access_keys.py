"""The remoting protocol against a broker that checks signatures: every request of ours and of the client's is signed."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from exactly_once.errors import TransportError
from exactly_once.message import Message
from exactly_once.outcome import Ack
from exactly_once.testing.child import wait_until
from exactly_once.transports.contract import Delivery, Receipt, Subscription, Surroundings, Transport
from exactly_once.transports.registry import transport_from
from tests.services.rocketmq import RocketMQ
from tests.services.rocketmq4_client import need_client

SECRET = "12345678"
ENDLESS = 2147483647
_PROVIDERS = "org.apache.rocketmq.auth.authentication.provider"
CHECKS_SIGNATURES: dict[str, Any] = {
    "authenticationEnabled": True,
    "authenticationProvider": f"{_PROVIDERS}.DefaultAuthenticationProvider",
    "authenticationMetadataProvider": f"{_PROVIDERS}.LocalAuthenticationMetadataProvider",
    "initAuthenticationUser": json.dumps({"username": "shop", "password": SECRET}),
    "innerClientAuthenticationCredentials": json.dumps({"accessKey": "shop", "secretKey": SECRET}),
}


def test_access_keys_are_refused_when_wrong_and_carry_a_message_there_and_back_when_right(
    rocketmq: RocketMQ, tmp_path: Path
) -> None:
    """`rocketmq` is asked for only because this machine may not be able to run one."""
    need_client()
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    with RocketMQ(tmp_path / "server", heap_mb=384) as open_to_all:
        open_to_all.create_topic("orders")
        open_to_all.create_group("inventory", retries=ENDLESS)
    with RocketMQ(tmp_path / "server", broker=CHECKS_SIGNATURES, heap_mb=384) as server:

        def ours(options: str) -> Transport:
            return transport_from(f"rocketmq4://{server.name_server}?{options}", Surroundings())

        wanted = [Subscription("orders")]
        right = f"access_key=shop&secret_key_file={tmp_path / 'secret'}"

        def problems(options: str) -> list[str]:
            try:
                return [str(problem) for problem in ours(options).check("inventory", wanted)]
            except TransportError as error:
                return [str(error)]

        wait_until(lambda: not problems(right), what="the user is known", patience_s=60)
        for wrong in ("threads=1", "access_key=shop&secret_key=wrong-secret"):
            refused = problems(wrong)
            assert refused, wrong
            assert "wrong-secret" not in str(refused)
        [unsent] = ours("access_key=shop&secret_key=wrong-secret").producer().send([Message("orders", b"wrong")])
        assert not isinstance(unsent, Receipt)

        [consumer] = ours(right).subscribe("inventory", wanted)
        producer = ours(right).producer()
        try:
            # a broker that has just started may not have told the name server of its topics yet
            right_one = Message("orders", b"right", key="A-1")
            wait_until(lambda: isinstance(producer.send([right_one])[0], Receipt), what="a receipt", patience_s=30)
            found: list[Delivery] = []

            def arrived() -> bool:
                found.extend(consumer.receive(8, timedelta(seconds=0.5)))
                return bool(found)

            wait_until(arrived, what="the message", patience_s=40)
            assert [(d.message.body, d.message.key) for d in found] == [(b"right", "A-1")]
            consumer.settle([(delivery, Ack()) for delivery in found])
        finally:
            producer.close()
            consumer.stop()
            consumer.close()
