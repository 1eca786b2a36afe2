"""FedLab, simulated in one process: its serial trainer and its synchronous server."""
# ruff: noqa: E402

from __future__ import annotations

import sys
from unittest.mock import MagicMock

import torch

# FedLab imports torchvision for data sets that are not used here; the registry's build of it does not go with torch's
for module in ("", ".datasets", ".transforms", ".models", ".utils"):
    sys.modules[f"torchvision{module}"] = MagicMock()

from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from torch.utils.data import DataLoader, TensorDataset
from turns import wait, workload
from workloads import EVALUATED, network, normalised

torch.set_num_threads(1)
work = workload()
xs, ys, test_x, test_y = normalised(work)


class Data:
    """What FedLab asks a data set for."""

    def get_dataloader(self, client: int, batch_size: int) -> DataLoader:
        return DataLoader(TensorDataset(xs[client], ys[client]), batch_size, shuffle=True)


test = DataLoader(TensorDataset(test_x, test_y), EVALUATED)
server = SyncServerHandler(network(work), global_round=10**9, sample_ratio=work.cohort / work.clients)
server.num_clients = work.clients
clients = SGDSerialClientTrainer(network(work), work.clients)
clients.setup_dataset(Data())
clients.setup_optim(work.epochs, work.batch, work.lr)
answer: dict[str, object] = {"ready": True}
while wait(answer):
    sampled = server.sample_clients()
    clients.local_process(server.downlink_package, sampled)
    for upload in clients.uplink_package:
        server.load(upload)
    model = server.model.eval()
    with torch.inference_mode():
        accuracy = sum(int((model(x).argmax(1) == y).sum()) for x, y in test) / len(test_y)
    answer = {"steps": len(sampled) * work.epochs * -(-work.samples // work.batch), "accuracy": accuracy}
