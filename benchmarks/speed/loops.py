"""Federated averaging without a library: what a researcher writes, and the best loop that we know of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from needs import Need, Needs
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import EVALUATED, Workload, network, normalised

Round = Callable[[], int]
"""Does one round, the evaluation included, and says how many steps of SGD it was."""


def bare(work: Workload) -> Round:
    """The plain eager loop: nn.Module, torch.optim.SGD, state dictionaries, a batch by indexing, nothing rearranged."""
    xs, ys, test_x, test_y = normalised(work)
    model, rng = network(work), torch.Generator().manual_seed(1)
    world = {name: value.clone() for name, value in model.state_dict().items()}

    def one_round() -> int:
        nonlocal world
        steps, total = 0, {name: torch.zeros_like(value) for name, value in world.items()}
        for client in torch.randperm(work.clients, generator=rng)[: work.cohort].tolist():
            x, y = xs[client], ys[client]
            model.load_state_dict(world)
            model.train()
            optimiser = torch.optim.SGD(model.parameters(), lr=work.lr)
            for _ in range(work.epochs):
                for rows in torch.randperm(len(y), generator=rng).split(work.batch):
                    optimiser.zero_grad()
                    F.cross_entropy(model(x[rows]), y[rows]).backward()
                    optimiser.step()
                    steps += 1
            for name, value in model.state_dict().items():
                total[name] += value
        world = {
            name: value / work.cohort if value.is_floating_point() else value // work.cohort
            for name, value in total.items()
        }
        model.load_state_dict(world)
        evaluate(model, test_x, test_y)
        return steps

    return one_round


def limit(work: Workload, bf16: bool = False, needs: Needs | None = None) -> Round:
    """The best bare loop: channels_last, parameters and gradients as views of one vector and one `add_` for the step,
    images normalised ahead and gathered once an epoch; bf16: autocast; needs: what is done beside FedAvg."""
    xs, ys, test_x, test_y = normalised(work)
    xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    test_x = test_x.contiguous(memory_format=torch.channels_last)
    model, rng = network(work), torch.Generator().manual_seed(1)
    need = needs(model, work) if needs else Need(lambda x, y: F.cross_entropy(model(x), y))
    trained = [*model.parameters(), *(need.own.parameters() if need.own else ())]
    params = flat(trained)
    grad = torch.zeros_like(params)
    for parameter, view in zip(trained, views(grad, trained), strict=True):
        parameter.grad = view
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    world, statistics = params.clone(), [buffer.clone() for buffer in buffers]

    def one_round() -> int:
        nonlocal world, statistics
        steps, moved = 0, torch.zeros_like(world)
        sums = [torch.zeros_like(buffer) for buffer in buffers]
        model.train()
        for client in torch.randperm(work.clients, generator=rng)[: work.cohort].tolist():
            params.copy_(world)
            for buffer, value in zip(buffers, statistics, strict=True):
                buffer.copy_(value)
            for _ in range(work.epochs):
                order = torch.randperm(len(ys[client]), generator=rng)
                x, y = xs[client][order], ys[client][order]
                for xb, yb in zip(x.split(work.batch), y.split(work.batch), strict=True):
                    grad.zero_()
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        loss = need.loss(xb, yb)
                    loss.backward()
                    params.add_(grad, alpha=-work.lr)
                    steps += 1
            moved.add_(params)
            for total, buffer in zip(sums, buffers, strict=True):
                total.add_(buffer)
        world, statistics = moved.div_(work.cohort), [total.div_(work.cohort) for total in sums]
        params.copy_(world)
        for buffer, value in zip(buffers, statistics, strict=True):
            buffer.copy_(value)
        need.server()
        for _ in range(need.evaluated):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                evaluate(model, test_x, test_y)
        return steps

    return one_round


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Accuracy."""
    model.eval()
    with torch.inference_mode():
        parts = zip(x.split(EVALUATED), y.split(EVALUATED), strict=True)
        return sum(int((model(xb).argmax(1) == yb).sum()) for xb, yb in parts) / len(y)


def flat(parameters: list[nn.Parameter]) -> Tensor:
    """One vector, of which the parameters become views."""
    vector = torch.empty(sum(parameter.numel() for parameter in parameters))
    for parameter, view in zip(parameters, views(vector, parameters), strict=True):
        view.copy_(parameter.data)
        parameter.data = view
    return vector


def views(vector: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Views of the vector by parameter; kernels of convolutions lie there in channels_last order."""
    parts = vector.split([parameter.numel() for parameter in parameters])
    shaped = []
    for part, parameter in zip(parts, parameters, strict=True):
        if parameter.dim() == 4:
            out, inner, height, width = parameter.shape
            shaped.append(part.view(out, height, width, inner).permute(0, 3, 1, 2))
        else:
            shaped.append(part.view(parameter.shape))
    return shaped
