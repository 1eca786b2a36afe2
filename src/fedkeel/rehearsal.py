"""A client's round on random images, few steps long: what it sends and how long it takes, before there is a client."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedkeel.records import Reply, Samples, Server

if TYPE_CHECKING:
    from fedkeel.job import Job
    from fedkeel.local import Worker


def rehearsed(job: Job, server: Server, client: int, samples: int, steps: int) -> Reply:
    """The reply of `client` if it had so many samples, of all classes in turn, and made no more than `steps` steps."""
    return rehearsing(job, samples, steps).fit(server, client, None, None, job.mail(server, client))


def rehearsing(job: Job, samples: int, steps: int) -> Worker:
    """The job's worker for clients that have so many samples, of all classes in turn, and make no more than `steps`
    steps. It borrows the worker's network, which is loaded anew for each client; nothing else changes."""
    worker, shape = copy.copy(job.worker), job.data.shape
    labels = torch.arange(samples) % len(job.data.classes)
    noise = torch.randint(256, (samples, *shape), dtype=torch.uint8, generator=job.streams("rehearsal"))

    def images(client: int, counts: Tensor, first: int) -> Samples:
        y = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return Samples.fake_ones(torch.zeros((len(y), *shape), dtype=torch.uint8), y)

    worker.data = lambda client: Samples.real_ones(noise, labels)
    worker.images = images
    worker.training = replace(worker.training, max_steps=steps)
    return worker
