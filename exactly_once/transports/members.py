"""Whether other members of a RocketMQ group subscribe otherwise than this program: the broker then loses messages.

A group has one place in a queue, and a queue is read by one member at a time. What that member's tags leave out is
skipped for all of the group; and a topic that the last subscription does not name is read by nobody in part. Brokers do
not refuse such a group, so they are asked. Asks and returns sentences; called by the RocketMQ transports.

A member of the remoting protocol tells its subscription itself, through the broker. One that came through a gRPC proxy
does not; the broker keeps the last subscription that it heard of the whole group, and that is looked at, too.
"""

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Final

from exactly_once.transports.contract import Subscription
from exactly_once.transports.remoting import Admin, Wanted
from exactly_once.wording.steady_log import steady

__all__ = ["subscribed_otherwise"]

_log = steady("exactly_once.transports.members")

ASK_FOR_S: Final = 10.0  # then those that were not asked yet are left out: a start waits for this
_NAMED: Final = 3


def subscribed_otherwise(admin: Admin, group: str, wanted: Sequence[Subscription]) -> Sequence[str]:
    """Return a sentence if other members want other topics or tags; nothing where no server tells. Raises nothing.

    Args:
        admin: Their cluster.
        group: Its name on the broker.
        wanted: What this program subscribes to, with the names that topics have on the broker.
    """
    mine: Wanted = {each.topic: " || ".join(sorted(each.tags)) or "*" for each in wanted}
    others: dict[str, Wanted] = {}
    try:
        addresses = {queue.address for topic in mine for queue in admin.queues(topic)}
        for address in sorted(addresses):
            others |= _others(admin, address, group, mine)
    except Exception as error:  # also an answer in a form that another release gives: a start does not rest on this
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
        # the name of a gRPC member has four parts; the proxy does not pass the question on
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
