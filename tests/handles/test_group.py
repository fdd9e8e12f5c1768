"""Socket lists, joined in memory: what is said, what is counted, and what is forgotten."""

from __future__ import annotations

import gc
from collections import deque
from typing import Any

import pytest

from handleipc.handles.group import MOST_WAITING, NONSENSE, Group, SocketListSend, Tally
from handleipc.handles.tracking import SocketLists
from handleipc.texts import quoted
from handleipc.wire import codec

KEY = "4:127.0.0.1:1337"


class End:
    """One end of a link: its lists, and what has been sent to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inbox: deque[Any] = deque()
        self.said: list[Any] = []
        self.faults: list[str] = []
        self.wants_reports = 0
        self.peer: End | None = None
        self.takes_reports = True
        self.lists = SocketLists(self._send, name, self._on_report, lambda: self.takes_reports)

    def _send(self, message: Any) -> None:
        self.said.append(message)
        if self.peer is not None:
            # As it would arrive: through JSON.
            self.peer.inbox.append(codec.read(codec.spell(message), 1 << 20))

    def _on_report(self) -> None:
        self.wants_reports += 1

    def hears(self, command: str, key: Any = KEY, **fields: Any) -> str | None:
        """Have the peer say this, and return the fault found."""
        return self.lists.received({"cmd": f"NODE_SOCKET_{command}", "key": key, **fields})

    def heard(self) -> list[tuple[str, Any]]:
        """Return what was said since the last call, as (command, count)."""
        said, self.said = self.said, []
        return [(m["cmd"].removeprefix("NODE_SOCKET_"), m.get("count")) for m in said]


def link(a: str = "a", b: str = "b") -> tuple[End, End]:
    """Two ends that talk to each other."""
    one, two = End(a), End(b)
    one.peer, two.peer = two, one
    return one, two


def run(*ends: End, reports: bool = True) -> None:
    """Deliver everything, reports too, until nobody has anything to say."""
    for _ in range(1000):
        if reports:
            for end in ends:
                end.lists.flush_reports()
        if not any(end.inbox for end in ends):
            return
        for end in ends:
            for _ in range(len(end.inbox)):
                fault = end.lists.received(end.inbox.popleft())
                if fault is not None:
                    end.faults.append(fault)
    raise AssertionError("they never stop talking")


def hand_on(group: Group, sender: End, receiver: End, *, reports: bool = True) -> Group:
    """Move one connection: opened there at the acknowledgement, then counted there."""
    theirs = receiver.lists.receiver(group.key)
    theirs.opened_here()
    group.handed_on(sender.lists.sender(group, reports=reports))
    return theirs


def opened(count: int, key: str = KEY, **options: Any) -> Group:
    """A server's group with so many connections."""
    group = Group(key, **options)
    for _ in range(count):
        group.opened_here()
    return group


class Answer:
    """What a tally came to, once it did."""

    def __init__(self, group: Group) -> None:
        self.done: list[Tally] = []
        self.tally = group.count(self.done.append)

    @property
    def result(self) -> tuple[int, set[object]] | None:
        """The count and who is missing, or None while some have not answered."""
        if not self.done:
            return None
        assert self.done == [self.tally]
        return self.tally.count, {one.peer for one in self.tally.missing}


def count(group: Group, *ends: End) -> int:
    """Ask, deliver, and return the sum."""
    answer = Answer(group)
    run(*ends)
    assert answer.result is not None
    assert not answer.tally.missing
    return answer.result[0]


# -- what is said --------------------------------------------------------------------------------


def test_messages_byte_for_byte() -> None:
    """Node's four messages are spelled as Node spells them, and ours like them."""
    a, b = link()
    group = opened(1)
    theirs = hand_on(group, a, b)
    group.count(lambda _: None)
    group.when_empty(lambda: None)
    run(a, b)
    theirs.closed_here()
    run(a, b)
    assert [codec.spell(message) for message in a.said] == [
        b'{"cmd":"NODE_SOCKET_GET_COUNT","key":"4:127.0.0.1:1337"}',
        b'{"cmd":"NODE_SOCKET_NOTIFY_CLOSE","key":"4:127.0.0.1:1337"}',
    ]
    assert [codec.spell(message) for message in b.said] == [
        b'{"cmd":"NODE_SOCKET_COUNT","key":"4:127.0.0.1:1337","count":1}',
        b'{"cmd":"NODE_SOCKET_CLOSED","key":"4:127.0.0.1:1337","count":1}',
        b'{"cmd":"NODE_SOCKET_ALL_CLOSED","key":"4:127.0.0.1:1337"}',
    ]


@pytest.mark.parametrize("command", ["GET_COUNT", "COUNT", "NOTIFY_CLOSE", "ALL_CLOSED", "CLOSED"])
@pytest.mark.parametrize("key", [None, 5, True, ["k"], {"k": 1}])
def test_wrong_key(command: str, key: object) -> None:
    """Each message needs a string as its key; what is wrong is said, and nothing is answered."""
    end = End("a")
    assert end.hears(command, key) == f"the peer sent NODE_SOCKET_{command} without a key"
    assert end.lists.received({"cmd": f"NODE_SOCKET_{command}"}) is not None
    assert end.said == []
    assert not len(end.lists)


@pytest.mark.parametrize("command", ["NODE_HANDLE", "NODE_SOCKET_", "NODE_SOCKET_COUNTS", 5, None])
def test_other_internal_messages(command: object) -> None:
    """An internal message of another name is none of ours, whatever its key."""
    end = End("a")
    assert end.lists.received({"cmd": command, "key": 5}) is None
    assert end.said == []


def test_key_never_seen() -> None:
    """Of it there are none: 0, and all closed at once. Node would not answer at all."""
    end = End("a")
    assert end.hears("GET_COUNT") is None
    assert end.hears("NOTIFY_CLOSE") is None
    assert end.heard() == [("COUNT", 0), ("ALL_CLOSED", None)]
    assert not len(end.lists)


def test_keys_do_not_mix() -> None:
    """Two servers over one channel are counted apart, and an odd key is a key like others."""
    a, b = link()
    one, two = opened(2, "x"), opened(1, '\ud800 \n"')
    for _ in range(2):
        hand_on(one, a, b)
    hand_on(two, a, b)
    assert (count(one, a, b), count(two, a, b)) == (2, 1)
    assert len(a.lists) == len(b.lists) == 2
    assert a.faults == b.faults == []


# -- nonsense ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonsense", ["7", -1, True, None, 1.5, 2.0, [1], {}])
def test_nonsense_count(nonsense: object) -> None:
    """A count that is no number is a fault; its sender is missing, and others are counted."""
    a, good = link("a", "good")
    bad = End("bad")
    group = opened(3)
    hand_on(group, a, good)
    hand_on(group, bad, End("silent"))
    answer = Answer(group)
    run(a, good)
    fault = bad.hears("COUNT", count=nonsense)
    assert fault is not None
    assert quoted(nonsense, 40) in fault
    assert answer.result == (2, {"bad"})


def test_no_count_at_all() -> None:
    """A COUNT without a count is nonsense too."""
    a = End("a")
    group = opened(1)
    hand_on(group, a, End("b"))
    answer = Answer(group)
    assert "makes no sense" in str(a.hears("COUNT"))
    assert answer.result == (0, {"a"})


def test_answers_in_order_of_the_questions() -> None:
    """Nonsense as one answer spoils one question, and not the next."""
    a = End("a")
    group = opened(1)
    hand_on(group, a, End("b"))
    first, second = Answer(group), Answer(group)
    assert a.hears("COUNT", count="1") is not None
    assert first.result == (0, {"a"})
    assert second.result is None
    assert a.hears("COUNT", count=1) is None
    assert second.result == (1, set())


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("COUNT", {"count": 1}),
        ("ALL_CLOSED", {}),
        ("CLOSED", {"count": -1}),
        ("CLOSED", {"count": "1"}),
        ("CLOSED", {}),
    ],
)
def test_unsolicited(command: str, fields: dict[str, object]) -> None:
    """A reply to no question, and the end of more than there are, is a fault and changes nothing."""
    a = End("a")
    group = opened(1)
    hand_on(group, a, End("b"))
    fault = a.hears(command, **fields)
    assert fault is not None
    assert command in fault
    assert (group.known, group.is_empty) == (1, False)


def test_all_closed_without_any_notify_after_one() -> None:
    """One NOTIFY allows one ALL_CLOSED."""
    a = End("a")
    group = opened(1)
    hand_on(group, a, End("b"))
    group.when_empty(lambda: None)
    assert a.hears("ALL_CLOSED") is None
    assert "makes no sense" in str(a.hears("ALL_CLOSED"))


def test_late_answers() -> None:
    """Of a key that was forgotten, or never was, a reply is no fault."""
    a = End("a")
    for command in ("COUNT", "ALL_CLOSED", "CLOSED"):
        assert a.hears(command, count=1) is None


def test_huge_count() -> None:
    """A count beyond any machine word is a count like others."""
    a = End("a")
    group = opened(1)
    hand_on(group, a, End("b"))
    answer = Answer(group)
    assert a.hears("COUNT", count=10**30) is None
    assert answer.result == (10**30, set())


# -- waiting for the last ------------------------------------------------------------------------


def test_notify_twice() -> None:
    """A peer that asks twice is told twice, once the last has closed."""
    end = End("a")
    group = end.lists.receiver(KEY)
    group.opened_here()
    end.hears("NOTIFY_CLOSE")
    end.hears("NOTIFY_CLOSE")
    assert end.heard() == []
    assert group.waiting == 2
    group.closed_here()
    assert end.heard() == [("CLOSED", 1), ("ALL_CLOSED", None), ("ALL_CLOSED", None)]
    assert group.waiting == 0


def test_notify_once_however_many_wait() -> None:
    """Several that wait here ask the peer once, and are all told."""
    a, b = link()
    group = opened(1)
    theirs = hand_on(group, a, b)
    told: list[int] = []
    for i in range(3):
        group.when_empty(lambda i=i: told.append(i))
    assert a.heard() == [("NOTIFY_CLOSE", None)]
    theirs.closed_here()
    run(a, b)
    assert told == [0, 1, 2]
    run(a, b)
    assert told == [0, 1, 2]


def test_nobody_to_ask() -> None:
    """With none open it is empty at once, and a peer that has none is not asked."""
    a, b = link()
    group = opened(1)
    hand_on(group, a, b).closed_here()
    run(a, b)
    a.heard()
    told: list[bool] = []
    group.when_empty(lambda: told.append(True))
    assert told == [True]
    assert a.heard() == []


def test_waiting_peers_are_bounded() -> None:
    """A peer that asks for ever does not fill our memory."""
    end = End("a")
    group = end.lists.receiver(KEY)
    group.opened_here()
    faults = [end.hears("NOTIFY_CLOSE") for _ in range(MOST_WAITING + 10)]
    assert faults[:MOST_WAITING] == [None] * MOST_WAITING
    assert all("more often" in fault for fault in faults[MOST_WAITING:])
    assert group.waiting == MOST_WAITING
    group.closed_here()
    assert len(end.heard()) == MOST_WAITING + 1


def test_questions_of_a_peer_are_bounded() -> None:
    """A peer that asks for counts, while a process behind us is silent, does not fill our memory."""
    end, on = End("asks"), End("silent")
    group = end.lists.receiver(KEY)
    group.opened_here()
    group.handed_on(on.lists.sender(group, reports=True))
    for _ in range(10 * MOST_WAITING):
        end.hears("GET_COUNT")
    assert len(on.said) <= 2 * MOST_WAITING
    assert len(group._tallies) <= 2 * MOST_WAITING


def test_handed_on_while_waiting() -> None:
    """What goes to a peer after the server has closed is waited for there."""
    a, b = link()
    group = opened(1)
    told: list[bool] = []
    group.when_empty(lambda: told.append(True))
    theirs = hand_on(group, a, b)
    run(a, b)
    assert not told
    assert a.heard() == [("NOTIFY_CLOSE", None)]
    theirs.closed_here()
    run(a, b)
    assert told == [True]


def test_handed_on_while_all_closed_is_on_its_way() -> None:
    """ALL_CLOSED speaks of those before; the next one is asked for again."""
    a, b = link()
    group = opened(2)
    first = hand_on(group, a, b)
    told: list[bool] = []
    group.when_empty(lambda: told.append(True))
    run(a, b)
    first.closed_here()  # ALL_CLOSED is on its way
    assert a.inbox
    # The acknowledgement of the second comes behind it.
    second = b.lists.receiver(KEY)
    second.opened_here()
    run(a, b)
    assert not told
    group.handed_on(a.lists.sender(group, reports=True))
    run(a, b)
    assert not told
    second.closed_here()
    run(a, b)
    assert told == [True]


def test_node_peer_reports_only_the_end() -> None:
    """From a peer that reports no close, ALL_CLOSED alone makes the group empty."""
    a, b = link()
    group = opened(2)
    theirs = [hand_on(group, a, b, reports=False) for _ in range(2)]
    for one in theirs:
        one.closed_here()
    b.takes_reports = False
    b.lists.flush_reports()
    run(a, b, reports=False)
    assert group.known == 0
    assert not group.is_empty
    told: list[bool] = []
    group.when_empty(lambda: told.append(True))
    run(a, b, reports=False)
    assert told == [True]
    assert b.heard() == [("ALL_CLOSED", None)]


# -- reports -------------------------------------------------------------------------------------


def test_closes_of_one_turn_are_one_report() -> None:
    """The channel is asked to flush; what closed until then is one message for each key."""
    a, b = link()
    x, y = opened(3, "x"), opened(1, "y")
    theirs = [hand_on(x, a, b) for _ in range(3)] + [hand_on(y, a, b)]
    for one in theirs:
        one.closed_here()
    assert b.wants_reports == 4
    assert b.heard() == []
    run(a, b)
    assert b.heard() == [("CLOSED", 3), ("CLOSED", 1)]
    assert x.known == y.known == 0
    run(a, b)
    assert b.heard() == []


def test_reports_come_before_replies() -> None:
    """A count never includes what the report after it says has closed."""
    a, b = link()
    group = opened(2)
    theirs = hand_on(group, a, b)
    hand_on(group, a, b)
    theirs.closed_here()
    assert count(group, a, b) == 1
    assert b.heard() == [("CLOSED", 1), ("COUNT", 1)]
    assert group.known == 1


def test_on_shrunk_hears_of_every_close() -> None:
    """Each connection that closes, here, there or with its process, is told of once."""
    shrunk: list[int] = []
    a, b = link()
    group = opened(5, on_shrunk=shrunk.append)
    group.closed_here()
    theirs = [hand_on(group, a, b) for _ in range(4)]
    theirs[0].closed_here()
    theirs[1].closed_here()
    run(a, b)
    a.lists.ended()
    assert shrunk == [1, 2, 2]
    assert group.is_empty


def test_known_counts_peers_that_report() -> None:
    """What a node peer holds is not known; it is once the channel has become native."""
    group = opened(3)
    a, b = link()
    hand_on(group, a, b, reports=False)
    assert group.known == 2
    hand_on(group, a, b, reports=True)
    assert group.known == 3
    hand_on(group, a, b, reports=False)
    assert group.known == 3


# -- ends ----------------------------------------------------------------------------------------


def test_ended_channel_answers_for_its_peer() -> None:
    """Every question ends with the channel: the peer holds none, and is not missing."""
    a = End("a")
    group = opened(2)
    hand_on(group, a, End("b"))
    first, second = Answer(group), Answer(group)
    told: list[bool] = []
    group.when_empty(lambda: told.append(True))
    a.lists.ended()
    assert first.result == second.result == (1, set())
    assert not group.lists
    assert not len(a.lists)
    assert not told
    group.closed_here()
    assert told == [True]


def test_peer_end_is_the_last_close() -> None:
    """A server that waits for a process which dies is told then."""
    a = End("a")
    group = opened(1)
    hand_on(group, a, End("b"))
    told: list[bool] = []
    group.when_empty(lambda: told.append(True))
    a.lists.ended()
    assert told == [True]


def test_ended_channel_says_nothing() -> None:
    """What closes after the channel has ended is counted, and reported to nobody."""
    b = End("b")
    group = b.lists.receiver(KEY)
    for _ in range(2):
        group.opened_here()
    b.hears("NOTIFY_CLOSE")
    group.closed_here()
    b.lists.ended()
    b.lists.flush_reports()
    assert len(b.lists) == 1
    asked = b.wants_reports
    group.closed_here()
    assert b.heard() == []
    assert b.wants_reports == asked
    assert not len(b.lists)
    assert b.hears("GET_COUNT") is None
    assert b.heard() == []


def test_ended_twice() -> None:
    """The second end finds nothing to end."""
    a = End("a")
    group = opened(1)
    hand_on(group, a, End("b"))
    a.lists.ended()
    a.lists.ended()
    assert group.is_empty


def test_receiving_group_goes_with_its_last_connection() -> None:
    """No key stays once none of its connections is here, and a new one begins anew."""
    end = End("a")
    for _ in range(3):
        group = end.lists.receiver(KEY)
        assert end.lists.receiver(KEY) is group
        group.opened_here()
        group.opened_here()
        group.closed_here()
        assert len(end.lists) == 1
        group.closed_here()
        assert not len(end.lists)
    end.lists.flush_reports()
    assert end.heard() == [("CLOSED", 6)]


def test_server_end_forgets_its_lists() -> None:
    """Nothing of a server that has ended stays in the channel."""
    a, b = link()
    group = opened(1)
    hand_on(group, a, b).closed_here()
    run(a, b)
    assert len(a.lists) == 1
    (one,) = group.lists
    one.forget()
    assert not len(a.lists)
    assert not group.lists
    held = [found for value in vars(a.lists).values() for found in gc.get_referents(value)]
    assert not any(isinstance(found, Group | SocketListSend) for found in held)


def test_new_server_with_an_old_key() -> None:
    """A list that the server's end forgot is not taken for the next server's."""
    a, b = link()
    old = opened(1)
    hand_on(old, a, b).closed_here()
    run(a, b)
    for one in list(old.lists):
        one.forget()
    new = opened(1)
    hand_on(new, a, b)
    assert count(new, a, b) == 1


# -- tallies -------------------------------------------------------------------------------------


def test_nobody_to_count() -> None:
    """Without peers the answer is there at once."""
    assert Answer(opened(3)).result == (3, set())


def test_tally_given_up() -> None:
    """Who has not answered by then is missing; the others and those here are counted."""
    a, quick = link("a", "quick")
    slow = End("slow")
    group = opened(3)
    hand_on(group, a, quick)
    hand_on(group, slow, End("b"))
    answer = Answer(group)
    run(a, quick)
    assert answer.result is None
    answer.tally.give_up()
    assert answer.result == (2, {"slow"})
    answer.tally.give_up()
    assert answer.result == (2, {"slow"})
    assert not group._tallies


def test_answer_after_giving_up() -> None:
    """A late answer changes nothing, and is no answer to the next question."""
    slow = End("slow")
    group = opened(1)
    hand_on(group, slow, End("b"))
    first = Answer(group)
    first.tally.give_up()
    second = Answer(group)
    assert slow.hears("COUNT", count=7) is None
    assert first.result == (0, {"slow"})
    assert second.result is None
    assert slow.hears("COUNT", count=1) is None
    assert second.result == (1, set())


def test_end_after_giving_up() -> None:
    """A channel that ends later changes nothing either."""
    slow = End("slow")
    group = opened(1)
    hand_on(group, slow, End("b"))
    answer = Answer(group)
    answer.tally.give_up()
    slow.lists.ended()
    assert answer.result == (0, {"slow"})


def test_questions_to_a_silent_peer_are_bounded() -> None:
    """Asking a hung peer again and again, and giving up each time, does not fill our memory."""
    hung = End("hung")
    group = opened(1)
    hand_on(group, hung, End("b"))
    for _ in range(10 * MOST_WAITING):
        Answer(group).tally.give_up()
    (one,) = group.lists
    assert len(one._requests) <= 2 * MOST_WAITING
    assert len(hung.said) <= 2 * MOST_WAITING


@pytest.mark.parametrize("answered", ["before", "after", "both"])
def test_handed_on_during_a_tally(answered: str) -> None:
    """A connection that moves while we count is counted once, on whichever side of the answer."""
    a, quick = link("a", "quick")
    slow, _ = link("slow", "x")
    group = opened(3)
    hand_on(group, a, quick)
    hand_on(group, slow, slow.peer)
    answer = Answer(group)
    if answered != "after":
        run(a, quick)  # its answer does not count what comes now
    hand_on(group, a, quick)
    run(a, quick)
    if answered == "both":
        group.opened_here()
    run(slow, slow.peer)
    assert answer.result == (4 if answered == "both" else 3, set())


def test_handed_on_to_a_new_peer_during_a_tally() -> None:
    """So is one that moves to a process that was not asked, since it had none before."""
    a, b = link()
    new, there = link("new", "there")
    group = opened(2)
    hand_on(group, a, b)
    answer = Answer(group)
    hand_on(group, new, there)
    run(a, b, new, there)
    assert answer.result == (2, set())


def test_closed_during_a_tally() -> None:
    """What closes here while we wait is not counted."""
    a, b = link()
    group = opened(2)
    hand_on(group, a, b)
    answer = Answer(group)
    group.closed_here()
    run(a, b)
    assert answer.result == (1, set())


def test_peer_dies_during_a_tally() -> None:
    """The rest is counted, and the dead peer is not missing."""
    a, b = link()
    dying, _ = link("dying", "x")
    group = opened(3)
    hand_on(group, a, b)
    hand_on(group, dying, dying.peer)
    answer = Answer(group)
    dying.lists.ended()
    run(a, b)
    assert answer.result == (2, set())


def test_server_ends_during_a_tally() -> None:
    """A question that is under way when the server's lists are forgotten is answered, with 0."""
    a, b = link()
    group = opened(1)
    theirs = hand_on(group, a, b)
    group.when_empty(lambda: [one.forget() for one in list(group.lists)])
    run(a, b)
    answer = Answer(group)
    theirs.closed_here()  # ALL_CLOSED comes before the answer
    run(a, b)
    assert not len(a.lists)
    assert answer.result == (0, set())


# -- chains --------------------------------------------------------------------------------------


def chain() -> tuple[End, End, End, End]:
    """A process in the middle: its channel to the server's, and the one onwards."""
    return *link("server", "up"), *link("down", "far")


def test_middle_answers_for_those_it_handed_on() -> None:
    """The server asks its child alone; that child asks its own."""
    server, up, down, far = chain()
    group = opened(3)
    middle = [hand_on(group, server, up) for _ in range(2)][0]
    theirs = hand_on(middle, down, far)
    assert (group.local, middle.local, theirs.local) == (1, 1, 1)
    assert count(group, server, up, down, far) == 3
    assert group.known == 3
    theirs.closed_here()
    run(server, up, down, far)
    assert (count(group, server, up, down, far), group.known) == (2, 2)


def test_middle_hands_on_while_it_is_asked() -> None:
    """It waits for the far answer, and counts what it handed on meanwhile once."""
    server, up, down, far = chain()
    group = opened(3)
    middle = [hand_on(group, server, up) for _ in range(3)][0]
    hand_on(middle, down, far)
    answer = Answer(group)
    run(server, up)
    assert answer.result is None
    hand_on(middle, down, far)
    run(down, far)
    assert answer.result is None
    run(server, up)
    assert answer.result == (3, set())


def test_middle_says_all_closed_after_the_far_end() -> None:
    """The server's end is the last close anywhere."""
    server, up, down, far = chain()
    group = opened(2)
    middle = [hand_on(group, server, up) for _ in range(2)][0]
    theirs = hand_on(middle, down, far)
    told: list[bool] = []
    group.when_empty(lambda: told.append(True))
    run(server, up, down, far)
    middle.closed_here()
    run(server, up, down, far)
    assert not told
    theirs.closed_here()
    run(server, up, down, far)
    assert told == [True]


def test_far_end_dies() -> None:
    """The middle reports what went with it."""
    server, up, down, far = chain()
    group = opened(2)
    middle = [hand_on(group, server, up) for _ in range(2)][0]
    hand_on(middle, down, far)
    answer = Answer(group)
    run(server, up)
    down.lists.ended()
    run(server, up)
    assert answer.result == (1, set())
    assert group.known == 1
    assert not len(down.lists)


def test_middle_dies() -> None:
    """What it handed on is out of the server's sight; the far end goes on for itself."""
    server, up, down, far = chain()
    group = opened(1)
    middle = hand_on(group, server, up)
    theirs = hand_on(middle, down, far)
    for end in (server, up, down, far):
        end.lists.ended()
    assert group.is_empty
    assert theirs.local == 1
    theirs.closed_here()
    assert not len(far.lists)
    assert not len(server.lists)


def test_middle_forgets_what_is_over() -> None:
    """A process that handed all on, and all closed, keeps nothing of that server."""
    server, up, down, far = chain()
    group = opened(2)
    middle = [hand_on(group, server, up) for _ in range(2)][0]
    theirs = [hand_on(middle, down, far) for _ in range(2)]
    for one in theirs:
        one.closed_here()
    run(server, up, down, far)
    assert count(group, server, up, down, far) == 0
    for one in list(group.lists):
        one.forget()
    assert [len(end.lists) for end in (server, up, down, far)] == [0, 0, 0, 0]


def test_middle_forgets_when_its_parent_has_ended() -> None:
    """So does one whose parent is gone, when the last it handed on has closed."""
    server, up, down, far = chain()
    group = opened(1)
    middle = hand_on(group, server, up)
    theirs = hand_on(middle, down, far)
    server.lists.ended()
    up.lists.ended()
    theirs.closed_here()
    run(down, far)
    assert [len(end.lists) for end in (up, down, far)] == [0, 0, 0]


def test_given_back() -> None:
    """A connection that comes back over the same channel is one connection still."""
    a, b = link()
    group = opened(1)
    theirs = hand_on(group, a, b)
    back = hand_on(theirs, b, a)
    assert back is not group
    assert count(group, a, b) == 1
    told: list[bool] = []
    group.when_empty(lambda: told.append(True))
    run(a, b)
    back.closed_here()
    run(a, b)
    assert told == [True]


def test_given_back_and_handed_out_again() -> None:
    """So it is when it goes out a second time, and the count comes to an end."""
    a, b = link()
    group = opened(1)
    back = hand_on(hand_on(group, a, b), b, a)
    again = hand_on(back, a, b)
    assert count(group, a, b) == 1
    told: list[bool] = []
    group.when_empty(lambda: told.append(True))
    run(a, b)
    again.closed_here()
    run(a, b)
    assert told == [True]


def test_given_back_and_handed_to_another() -> None:
    """A connection that one worker gave back goes to another, which has some already."""
    a, one = link("a", "one")
    b, two = link("b", "two")
    group = opened(2)
    first = hand_on(group, a, one)
    second = hand_on(group, b, two)
    back = hand_on(first, one, a)
    third = hand_on(back, b, two)
    assert count(group, a, one, b, two) == 2
    second.closed_here()
    run(a, one, b, two)
    assert count(group, a, one, b, two) == 1
    third.closed_here()
    run(a, one, b, two)
    assert count(group, a, one, b, two) == 0
    assert group.known == 0
    assert [end.faults for end in (a, one, b, two)] == [[], [], [], []]


def test_nonsense_is_no_number_of_connections() -> None:
    """The mark for nonsense can be no answer of a peer."""
    assert NONSENSE < 0


def test_came_home_while_we_count() -> None:
    """Its process counted it, then ended, and it had come back: it is not counted twice."""
    a, b = link("a", "b")
    c, slow = link("c", "slow")
    group = opened(2)
    theirs = hand_on(group, a, b)
    hand_on(group, c, slow)
    answer = Answer(group)
    run(a, b)
    back = hand_on(theirs, b, a)
    a.lists.ended()
    assert group.local == 1
    run(c, slow)
    assert answer.result == (2, set())
    back.closed_here()
    assert group.local == 0


def test_came_home_before_its_process_answered() -> None:
    """The process ended before it counted: there is nothing to take back from the sum."""
    a, b = link("a", "b")
    c, slow = link("c", "slow")
    group = opened(2)
    hand_on(hand_on(group, a, b), b, a)
    hand_on(group, c, slow)
    answer = Answer(group)
    a.lists.ended()
    run(c, slow)
    assert answer.result == (2, set())


def test_came_home_and_handed_on() -> None:
    """What came home goes out again as the server's own."""
    a, b = link("a", "b")
    c, d = link("c", "d")
    group = opened(1)
    back = hand_on(hand_on(group, a, b), b, a)
    a.lists.ended()
    theirs = hand_on(back, c, d)
    assert (group.local, count(group, c, d)) == (0, 1)
    theirs.closed_here()
    assert count(group, c, d) == 0


def test_went_out_again_to_a_peer_that_reports_nothing() -> None:
    """Nobody would say that it moved on: it is not waited for where it has been."""
    a, b = link("a", "b")
    a.takes_reports = b.takes_reports = False
    c, d = link("c", "d")
    group = opened(1)
    back = hand_on(hand_on(group, a, b, reports=False), b, a, reports=False)
    theirs = hand_on(back, c, d)
    assert count(group, a, b, c, d) == 1
    theirs.closed_here()
    run(a, b, c, d)
    assert group.is_empty


def test_a_list_of_another_group_of_the_same_key() -> None:
    """A channel has one list for each key: a connection of another group counts in its owner."""
    a, b = link("a", "b")
    c, _ = link("c", "x")
    mine = opened(1)
    hand_on(mine, a, b)
    other = c.lists.receiver(KEY)
    other.opened_here()
    theirs = hand_on(other, a, b)
    assert (other.local, count(mine, a, b)) == (0, 2)
    theirs.closed_here()
    assert count(mine, a, b) == 1


def test_a_group_forgotten_twice() -> None:
    """A group of which another took the place is left alone."""
    end = End("a")
    group = end.lists.receiver(KEY)
    group.opened_here()
    group.closed_here()
    again = end.lists.receiver(KEY)
    assert again is not group
    group.check_empty()
    assert end.lists.receiver(KEY) is again


def test_a_count_asked_for_when_the_channel_ended_meanwhile() -> None:
    """Its answer goes nowhere."""
    up, _ = link("up", "x")
    down, far = link("down", "far")
    group = up.lists.receiver(KEY)
    group.opened_here()
    hand_on(group, down, far)
    up.hears("GET_COUNT")
    up.lists.ended()
    up.heard()
    run(down, far)
    assert up.heard() == []
    assert not group.counting


def test_a_close_is_noted_and_taken_later() -> None:
    """It counts at once, and nothing is told before the owner takes the notes, all at once."""
    posted: list[Any] = []
    told: list[int] = []
    group = opened(3, on_shrunk=told.append, post=posted.append)
    emptied: list[bool] = []
    group.when_empty(lambda: emptied.append(True))
    for left in (2, 1, 0):
        group.closed_here()
        assert group.local == group.known == left
    assert (len(posted), told, emptied) == (1, [], [])
    posted.pop()()
    assert (group.local, told, emptied) == (0, [3], [True])
    group.take_closes()
    assert told == [3]
    group.opened_here()
    group.closed_here()
    assert len(posted) == 1


def test_a_close_while_notes_are_taken() -> None:
    """The collector may run anywhere: what it closes is taken now, or posted anew."""
    posted: list[Any] = []
    group = opened(2, post=posted.append)
    group._on_shrunk = lambda count: group.closed_here() if count == 1 and group.local else None
    group.closed_here()
    posted.pop()()
    assert group.local == 0
    posted.pop()()
    assert group.is_empty


def test_closes_that_were_posted_to_a_loop_that_ended() -> None:
    """The lists take them when they are served again."""
    posted: list[Any] = []
    lists = SocketLists(lambda _: None, "peer", lambda: None, post=posted.append)
    group = lists.receiver(KEY)
    group.opened_here()
    group.closed_here()
    assert not group.is_empty
    lists.take_closes()
    assert group.is_empty
    assert len(lists) == 0
    posted.pop()()


def test_closed_just_before_it_came_home() -> None:
    """A close that was noted here does not come home, and one noted too late is taken there."""
    a, b = link()
    group = opened(3)
    posted: list[Any] = []
    a.lists.post = posted.append
    theirs = hand_on(hand_on(group, a, b), b, a)
    for _ in range(2):
        theirs_too = hand_on(hand_on(group, a, b), b, a)
        assert theirs_too is theirs
    theirs.closed_here()
    assert theirs.local == 2
    a.lists.ended()
    assert (theirs.local, group.local) == (0, 2)
    theirs._closes.append(None)  # by a thread that has not seen that it came home
    theirs.take_closes()
    assert (theirs.local, group.local) == (0, 1)
    theirs.closed_here()
    assert group.is_empty
