"""Flower's simulation: its ServerApp, its FedAvg and its ClientApp, clients in processes of Ray.

    python benchmarks/speed/adapters/flower_simulation.py WORKLOAD [CLIENTS AT ONCE, else 1]

Its rounds are taken in turns where `FedAvg.start` evaluates: that call comes at the end of each round, and once before
the first. All processes of Ray descend from this one, so that their seconds count; what they and Flower's threads use
while others have their turn does not. Ray itself starts in the round that does not count.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from functools import cache

# read when they are imported
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor
from torch.nn import functional as F
from turns import wait, workload
from workloads import EVALUATED, Workload, network, normalised

client_app, server_app = ClientApp(), ServerApp()


class Over(Exception):
    """No more rounds are asked for."""


@cache
def data(name: str) -> tuple[Workload, list[Tensor], list[Tensor]]:
    """The workload with all clients' images and labels: once in each process of Ray."""
    torch.set_num_threads(1)
    work = workload(name)
    xs, ys, _, _ = normalised(work)
    return work, xs, ys


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's epochs, batches by indexing as in `loops.bare`."""
    work, xs, ys = data(message.content["config"]["workload"])
    x, y = (each[int(context.node_config["partition-id"])] for each in (xs, ys))
    model, steps = network(work), 0
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=work.lr)
    for _ in range(work.epochs):
        for rows in torch.randperm(len(y)).split(work.batch):
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
            steps += 1
    metrics = MetricRecord({"num-examples": len(y), "steps": steps})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """The rounds. Clients that fail are missing in the count of steps."""
    torch.set_num_threads(1)
    work, steps = workload(), 0
    model, (_, _, test_x, test_y) = network(work), normalised(work)

    def counted(replies: list[RecordDict], weight: str) -> MetricRecord:
        nonlocal steps
        steps = sum(int(reply["metrics"]["steps"]) for reply in replies)
        return MetricRecord({"steps": steps})

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        nonlocal steps
        accuracy, answer = 0.0, dict[str, object](ready=True)
        if number:
            if not steps:
                raise RuntimeError("no client replied")
            model.load_state_dict(arrays.to_torch_state_dict())
            accuracy = accurate(model.eval(), test_x, test_y)
            answer, steps = {"steps": steps, "accuracy": accuracy}, 0
        if not wait(answer):
            raise Over
        return MetricRecord({"accuracy": accuracy})

    strategy = FedAvg(
        fraction_train=work.cohort / work.clients,
        min_train_nodes=work.cohort,
        fraction_evaluate=0.0,
        min_available_nodes=work.clients,
        train_metrics_aggr_fn=counted,
    )
    told = ConfigRecord({"workload": sys.argv[1]})
    with suppress(Over):
        strategy.start(grid, ArrayRecord(model.state_dict()), 10**9, train_config=told, evaluate_fn=evaluate)


def accurate(model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    with torch.inference_mode():
        parts = zip(x.split(EVALUATED), y.split(EVALUATED), strict=True)
        return sum(int((model(xb).argmax(1) == yb).sum()) for xb, yb in parts) / len(y)


def main() -> None:
    """`run_simulation` is the engine of `flwr run` without its server, which would outlive this process."""
    at_once = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        resources = {
            "init_args": {"address": "local", "num_cpus": at_once, "_temp_dir": folder},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        }
        run_simulation(server_app, client_app, workload().clients, "ray", resources)


if __name__ == "__main__":
    import flower_simulation  # by its name: what belongs to __main__ Ray sends by value with each message

    flower_simulation.main()
