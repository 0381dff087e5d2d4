"""What waits to be told in a room: in order, and never the stale beside the new. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from src.orchestrator.rooms.captions import AgentCaption, AgentState, Telling, UserCaption
from src.rpc.ws_events import ReplyText, ServerEvent


@dataclass(frozen=True, slots=True)
class Packet:
    """A session event for the user's own client, word for word."""

    event: ServerEvent


Item = Telling | Packet


class Outgoing:
    """A bounded queue in which a state and a user's caption take the place of those before them,
    and text that goes on is one piece with the text it goes on from. States go first.

    Overflow: a waiting partial makes room. Without one, nothing is taken.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[Hashable, Item] = OrderedDict()
        self._numbered = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: Item) -> bool:
        """False: it is full, and the item was not taken."""
        key = self._key(item)
        before = self._waiting.get(key)
        if before is None and len(self) >= self._limit and not self._drop_partial():
            return False
        self._waiting[key] = _together(before, item)
        if isinstance(item, AgentState):
            self._waiting.move_to_end(key, last=False)
        return True

    def pop(self, *, states_only: bool = False) -> Item | None:
        """The next one; of `states_only`, the state if one waits."""
        if not self._waiting:
            return None
        key, first = next(iter(self._waiting.items()))
        if states_only and not isinstance(first, AgentState):
            return None
        del self._waiting[key]
        return first

    def drop_packet(self) -> bool:
        """Let go of the oldest event."""
        return self._drop(lambda item: isinstance(item, Packet))

    def _drop_partial(self) -> bool:
        return self._drop(lambda item: isinstance(item, UserCaption) and not item.final)

    def _drop(self, unwanted: Callable[[Item], bool]) -> bool:
        key = next((key for key, item in self._waiting.items() if unwanted(item)), None)
        if key is None:
            return False
        del self._waiting[key]
        return True

    def _key(self, item: Item) -> Hashable:
        match item:
            case AgentState():
                return "state"
            case UserCaption(segment_id):
                return "user", segment_id
            case AgentCaption(segment_id):
                return "agent", segment_id
            case Packet(event):
                if not self._goes_on(event):
                    self._numbered += 1
                return self._numbered

    def _goes_on(self, event: ServerEvent) -> bool:
        """It is more of the reply whose text is the last thing in the queue."""
        last = self._waiting[next(reversed(self._waiting))] if self._waiting else None
        return (
            isinstance(last, Packet)
            and isinstance(last.event, ReplyText)
            and isinstance(event, ReplyText)
            and last.event.utterance_id == event.utterance_id
        )


def _together(before: Item | None, item: Item) -> Item:
    match before, item:
        case AgentCaption(segment_id, text), AgentCaption(_, more, final):
            return AgentCaption(segment_id, text + more, final)
        case Packet(ReplyText() as old), Packet(ReplyText() as new):
            return Packet(new.model_copy(update={"text": old.text + new.text}))
    return item
