"""A Flower Grid that calls the client app in this process.

The only file that uses Flower's internals (a server Message needs a task identity), so flwr is pinned and
tested. Messages, records and apps are Flower's public API, unchanged.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


def quiet_flower() -> None:
    """Flower logs every round at INFO; the federation has its own log."""
    logging.getLogger("flwr").setLevel(logging.WARNING)


class InProcessGrid(Grid):
    """Nodes 1 .. n with partition-ids 0 .. n - 1, each with its own Context; a client's exception is an error reply."""

    def __init__(self, client_app: ClientApp, n_nodes: int):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._run = Run.create_empty(1)
        self._app = client_app
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": n_nodes},
                state=RecordDict(),
                run_config={},
            )
            for node in range(1, n_nodes + 1)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(uuid.uuid4().hex)
            self._replies[ids[-1]] = self._answer(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(Error(code=0, reason=repr(error)), reply_to=message)
