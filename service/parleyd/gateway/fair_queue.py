"""Who is next among those that wait: by priority; among equals clients take turns; a client's own by deadline."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

# Who names no deadline is taken to be this patient, so that those who do cannot keep them out for ever.
_PATIENCE_S = 300.0
# Of clients that have nothing in the queue, those that have had most are remembered.
_MAX_IDLE = 256


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What a request wants: a slot for each of its sequences, and `num_tokens` prefilled.

    `deadline` is on the monotonic clock, in seconds.
    """

    client: str = ""
    priority: int = 0
    num_sequences: int = 1
    num_tokens: int = 0
    deadline: float | None = None


@dataclass(eq=False)
class Waiter:
    """A ticket in the queue; `turn` is set to the number of slots that it gets."""

    ticket: Ticket
    turn: asyncio.Future[int]
    rank: tuple[int, float, int]  # among its client's: the smaller, the sooner


@dataclass
class _Client:
    """One client's waiters, by rank, and how much it has had: the virtual time of start-time fair queueing.

    Source: Goyal, Vin, Cheng: Start-time fair queueing, SIGCOMM 1996.
    """

    waiters: list[Waiter] = field(default_factory=list)
    finished: float = 0.0


class FairQueue:
    """A client that sends a thousand requests waits behind one that sends one, but for the first of the thousand."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._clients: dict[str, _Client] = {}
        self._num_waiters = 0
        self._virtual_time = 0.0
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return self._num_waiters

    def push(self, ticket: Ticket) -> Waiter:
        """Takes a ticket into the queue."""
        rank = (*_rank_but_for_arrival(ticket), next(self._arrivals))
        waiter = Waiter(ticket, asyncio.get_running_loop().create_future(), rank)
        client = self._clients.setdefault(ticket.client, _Client())
        insort(client.waiters, waiter, key=attrgetter("rank"))
        self._num_waiters += 1
        self.num_tokens += ticket.num_tokens
        return waiter

    def first(self) -> Waiter:
        """The next in turn. Raises ValueError if nobody waits."""
        waiting = [client for client in self._clients.values() if client.waiters]
        return min(waiting, key=self._turn).waiters[0]

    def pop(self) -> Waiter:
        """Takes the next in turn out."""
        waiter = self.first()
        client = self._clients[waiter.ticket.client]
        self._virtual_time = self._start(client)
        client.finished = self._virtual_time + waiter.ticket.num_sequences
        self.remove(waiter)
        return waiter

    def remove(self, waiter: Waiter) -> bool:
        """Takes one out; False if it is not in."""
        client = self._clients.get(waiter.ticket.client)
        if client is None or waiter not in client.waiters:
            return False
        client.waiters.remove(waiter)
        self._num_waiters -= 1
        self.num_tokens -= waiter.ticket.num_tokens
        self._forget_idle_clients()
        return True

    def to_displace(self, ticket: Ticket, max_waiters: int, max_tokens: int) -> list[Waiter] | None:
        """Whose places `ticket` may have where the queue is too full for it; None where it has no right to enough.

        Each is the last of the client that then has most in the queue, and more than the ticket's own would have.
        """
        found: list[Waiter] = []
        num_kept = {name: len(client.waiters) for name, client in self._clients.items() if client.waiters}
        tokens_kept = {name: _num_tokens(self._clients[name].waiters) for name in num_kept}
        num_more, tokens_more = 1, ticket.num_tokens
        while sum(num_kept.values()) and (
            (by_tokens := sum(tokens_kept.values()) + tokens_more > max_tokens)
            or sum(num_kept.values()) + num_more > max_waiters
        ):
            kept, more = (tokens_kept, tokens_more) if by_tokens else (num_kept, num_more)
            greediest = max(kept, key=lambda name: kept[name])
            if kept[greediest] <= kept.get(ticket.client, 0) + more:
                return None
            num_kept[greediest] -= 1
            last = self._clients[greediest].waiters[num_kept[greediest]]
            tokens_kept[greediest] -= last.ticket.num_tokens
            found.append(last)
        return found if max_waiters else None

    def num_ahead(self, ticket: Ticket) -> int:
        """At least how many get their turn before `ticket` would: its client's own of no lower rank, and of each other
        client those that have a turn while those of them that have its priority have theirs."""
        own = self._clients.get(ticket.client, _Client())
        num_own = bisect_right(own.waiters, _rank_but_for_arrival(ticket), key=lambda waiter: waiter.rank[:2])
        equal = [one.ticket for one in own.waiters[:num_own] if one.ticket.priority == ticket.priority]
        begin = self._start(own)
        end = begin + sum(one.num_sequences for one in equal)
        num_ahead = num_own
        for client in self._clients.values():
            virtual_time = max(begin, self._start(client))
            for waiter in client.waiters if client is not own else ():
                if waiter.ticket.priority < ticket.priority or virtual_time >= end:
                    break
                num_ahead += 1
                virtual_time += waiter.ticket.num_sequences
        return num_ahead

    def clear(self) -> Iterator[Waiter]:
        """Takes all out."""
        clients, self._clients = self._clients, {}
        self._num_waiters = self.num_tokens = 0
        for client in clients.values():
            yield from client.waiters

    def _turn(self, client: _Client) -> tuple[int, float, tuple[int, float, int]]:
        rank = client.waiters[0].rank
        return rank[0], self._start(client), rank

    def _start(self, client: _Client) -> float:
        """The virtual time of the client's next turn."""
        return max(client.finished, self._virtual_time)

    def _forget_idle_clients(self) -> None:
        """All that have nothing here, but for those that have had most, and more than the others.

        The virtual time does not pass them all: it stands still while each request is a new client's.
        """
        if len(self._clients) <= 2 * (self._num_waiters + _MAX_IDLE):
            return
        ahead = {
            name: client.finished
            for name, client in self._clients.items()
            if not client.waiters and client.finished > self._virtual_time
        }
        remembered = set(heapq.nlargest(_MAX_IDLE, ahead, key=ahead.__getitem__))
        self._clients = {name: client for name, client in self._clients.items() if client.waiters or name in remembered}


def _rank_but_for_arrival(ticket: Ticket) -> tuple[int, float]:
    return -ticket.priority, time.monotonic() + _PATIENCE_S if ticket.deadline is None else ticket.deadline


def _num_tokens(waiters: list[Waiter]) -> int:
    return sum(waiter.ticket.num_tokens for waiter in waiters)
