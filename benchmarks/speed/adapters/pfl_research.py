"""pfl-research, simulated in one process, by its own FederatedAveraging and central evaluation."""

from __future__ import annotations

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F
from turns import wait, workload
from workloads import EVALUATED, network, normalised

torch.set_num_threads(1)
work = workload()


class Model(nn.Module):
    """The network, with the two methods that pfl asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.steps = network(work), 0

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        self.train(not eval)
        self.steps += 1
        return F.cross_entropy(self.network(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        self.eval()
        right = int((self.network(x).argmax(1) == y).sum())
        return {"accuracy": Weighted(right, len(y))}


class Turns(TrainingProcessCallback):
    """After the round, evaluation included, it is the others' turn."""

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        wait({"ready": True})
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        steps, net.steps = net.steps, 0
        return not wait({"steps": steps}), Metrics()


xs, ys, test_x, test_y = normalised(work)
users = {str(k): [x, y] for k, (x, y) in enumerate(zip(xs, ys, strict=True))}
np.random.seed(1)
data = FederatedDataset.from_slices(users, get_user_sampler("random", list(users)))
net = Model()
model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
evaluation = NNEvalHyperParams(local_batch_size=EVALUATED)
FederatedAveraging().run(
    NNAlgorithmParams(10**9, evaluation_frequency=10**9, train_cohort_size=work.cohort, val_cohort_size=0),
    SimulatedBackend(training_data=data, val_data=data),
    model,
    NNTrainHyperParams(work.batch, local_num_epochs=work.epochs, local_learning_rate=work.lr),
    evaluation,
    [CentralEvaluationCallback(Dataset((test_x, test_y)), evaluation), Turns()],
)
