"""Says whether other members of a RocketMQ group have another subscription than this program: then the broker loses messages.

A group has one offset in a queue, and one member at a time reads a queue. What that member's tags leave out is
skipped for the whole group. If the last subscription lacks a topic, nobody reads a part of that topic. Brokers do
not refuse such a group, so we ask them. Returns sentences; called by the RocketMQ transports.

A member of the remoting protocol reports its own subscription, through the broker. A member behind a gRPC proxy
does not. But the broker keeps the last subscription that it received for the whole group, and we check that, too.
"""

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Final

from exactly_once.transports.contract import Subscription
from exactly_once.transports.remoting import Admin, Wanted
from exactly_once.wording.steady_log import steady

__all__ = ["subscribed_otherwise"]

_log = steady("exactly_once.transports.members")

ASK_FOR_S: Final = 10.0  # members that were not asked by then are left out, because a start waits for this
_NAMED: Final = 3


def subscribed_otherwise(admin: Admin, group: str, wanted: Sequence[Subscription]) -> Sequence[str]:
    """Return a sentence if other members want other topics or tags; nothing if no server tells. Raises nothing.

    Args:
        admin: Requests to their cluster.
        group: Its name on the broker.
        wanted: What this program subscribes to, with the topics' names on the broker.
    """
    mine: Wanted = {each.topic: " || ".join(sorted(each.tags)) or "*" for each in wanted}
    others: dict[str, Wanted] = {}
    try:
        addresses = {queue.address for topic in mine for queue in admin.queues(topic)}
        for address in sorted(addresses):
            others |= _others(admin, address, group, mine)
    except Exception as error:  # also an answer in the form of another release: a start must not depend on this
        _log.debug("Nobody told whether others of group %s subscribe otherwise: %s", group, error)
    if not others:
        return ()
    named = [f"{name} wants {_told(told)}" for name, told in sorted(others.items())[:_NAMED]]
    more = f", and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    text = (
        f"Programs of the RocketMQ group {group} subscribe differently, and so the group LOSES MESSAGES: the broker skips, for"
        f" the whole group, what the member that reads a queue does not want. This program wants {_told(mine)}; "
        f"{'; '.join(named)}{more}. Give each program a group of its own. Where the others are an older release that is being"
        " replaced, this ends with them; what they skip until then does not come again."
    )
    return (text,)


def _others(admin: Admin, address: str, group: str, mine: Wanted) -> Mapping[str, Wanted]:
    members, last = admin.members(address, group)
    found: dict[str, Wanted] = {}
    deadline = monotonic() + ASK_FOR_S
    for member in members:
        # The name of a gRPC member has four parts; the proxy does not forward the question.
        if member.count("@") >= 3 or monotonic() > deadline:
            continue
        told = admin.subscription(address, group, member)
        if told is not None and told != mine:
            found[f"member {member}"] = told
    if last and last != mine and last not in found.values():
        found["the last member that joined"] = last
    return found


def _told(wanted: Wanted) -> str:
    return ", ".join(f"{topic} ({tags})" for topic, tags in sorted(wanted.items())) or "nothing"
