"""A Flower app that is not fedkeel's: it says what it was given. For tests of deployment without a run."""

from __future__ import annotations

import json
import os
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server_app = ServerApp()
client_app = ClientApp()


@client_app.query("told")
def told(message: Message, context: Context) -> Message:
    """The node's configuration and what marks its process."""
    known = {**context.node_config, "mark": os.environ.get("FEDKEEL_NODE", "")}
    return Message(RecordDict({"told": ConfigRecord({"json": json.dumps(known)})}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Asks each node what it was told; fails or takes its time when the run's name says so."""
    text = str(context.run_config["config"])
    if 'name = "fails"' in text:
        raise RuntimeError("this run fails")
    if 'name = "waits"' in text:
        time.sleep(600)
    messages = [Message(RecordDict(), node, "query.told") for node in grid.get_node_ids()]
    for reply in grid.send_and_receive(messages, timeout=120):
        print("TOLD", reply.content["told"]["json"])  # type: ignore[index]  # noqa: T201
    print("RUN", json.dumps(dict(context.run_config)))  # noqa: T201
