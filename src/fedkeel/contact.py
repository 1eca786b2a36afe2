"""A contact sheet: real samples of every class beside the synthetic ones that clients train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedkeel.files import write_tensors

if TYPE_CHECKING:
    from fedkeel.job import Job

EACH = 8
"""Samples of a class, at most."""


def write_sheet(job: Job, path: Path) -> bool:
    """Writes "real" and "fake", each [C, n, channels, H, W] uint8; False when clients train on no synthetic samples, or
    those are on other machines.

    The synthetic ones are those of the pool: nothing is generated for the sheet. n is the same for all classes.
    """
    fakes = job.plan.fake  # [K, C]
    there = job.data.train_y.bincount(minlength=fakes.shape[1])  # clients may hold the same samples
    each = min(EACH, int(fakes.amax(0).min()), int(job.counts.sum(0).min()), int(there.min()))
    if each == 0:
        return False
    owners = [int(fakes[:, label].argmax()) for label in range(fakes.shape[1])]
    fake: list[Tensor] = []
    for label, client in enumerate(owners):
        images = job.images.kept(label, client, each)
        if images is None:
            return False
        fake.append(images)
    write_tensors(path, {"real": _real(job, each), "fake": torch.stack(fake)})
    return True


def _real(job: Job, each: int) -> Tensor:
    rows = [torch.nonzero(job.data.train_y == label)[:each, 0] for label in range(len(job.data.classes))]
    return job.data.train_x[torch.stack(rows)]
