"""The pictures of ReGL's analysis, drawn from runs that are done: `fedkeel figures`.

Yao: Recovering Global Data Distribution Locally in Federated Learning. 2024, arXiv 2409.14063. `classes` is Fig. 7,
`tsne` Figs. 4 and 6, `sheets` Fig. 8. Each picture is a PNG file with the numbers behind it in a JSON file of the same
name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedkeel.data.dataset import Dataset
from fedkeel.errors import ConfigError, DataError, nearest
from fedkeel.files import write_json
from fedkeel.generators.store import Pool
from fedkeel.report import classes as class_figure
from fedkeel.report import embedding
from fedkeel.report.finished import Finished, open_run
from fedkeel.report.plots import FAKE, INK, REAL, heading, paper, save, shorten, words
from fedkeel.report.runs import methods, read_runs
from fedkeel.report.sheets import strip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("classes", "tsne", "sheets")
GROUPS = {"real": REAL, "vanilla": "#9A6700", "adapted": "#009E73"}
"""Groups of images and the colours of their names."""
SHOWN = 8
"""Images of a class in each group of a contact sheet."""
ROWS = 20
"""Classes on one contact sheet."""


@dataclass(frozen=True)
class Asked:
    """What to draw.

    what: of KINDS. number: the round of `classes`, None for the last recorded. each: images of a class in a t-SNE
    picture; shown: in a group of a contact sheet. clip: a folder with CLIP's weights, or a name that is in the hub's
    cache, whose features replace those of a classifier of all clients' real images where images are compared.
    """

    what: Sequence[str] = KINDS
    client: int = 0
    number: int | None = None
    each: int = 40
    shown: int = SHOWN
    clip: str | None = None


def write_figures(
    folders: Sequence[Path | str],
    out: Path | str,
    asked: Asked | None = None,
    data: Dataset | None = None,
    device: str | None = None,
) -> list[Path]:
    """Writes the pictures of these runs (a folder of runs stands for all in it; of repetitions of one method the first
    seed) and what stands behind them; returns the PNG files.

    Runs beside each other in one picture must agree on who holds what; those of a method that pools all data are left
    out beside others. Where nobody trains on synthetic images there
    are no pictures of them. Raises ConfigError for an unknown kind or client, CheckpointError for a run that is not
    done, DataError for runs that do not go together or when nothing can be drawn.
    """
    asked, out = asked or Asked(), Path(out)
    for kind in asked.what:
        if kind not in KINDS:
            raise ConfigError("what", kind, f"must be some of {', '.join(KINDS)}", nearest(kind, KINDS))
    found = {method.key: method for method in methods(read_runs(folders))}
    runs = {key: open_run(method.runs[0].folder, method.label, data, device) for key, method in found.items()}
    runs = {key: run for key, run in runs.items() if not run.job.method.pooled} or runs
    _same(list(runs.values()))
    for run in runs.values():
        run.held(asked.client)
    written = []
    for name, figure, numbers in _figures(runs, asked):
        path = out / f"{name}-client{asked.client}.png"
        save(figure, path)
        write_json(path.with_suffix(".json"), numbers)
        written.append(path)
    if not written:
        raise DataError(f"nothing to draw: client {asked.client} of these runs trains on no synthetic images")
    return written


def _figures(runs: Mapping[str, Finished], asked: Asked) -> Iterator[tuple[str, Figure, object]]:
    where = {key: {"run": str(run.folder), "seed": run.job.config.seed} for key, run in runs.items()}
    if "classes" in asked.what:
        changes = {key: class_figure.change(run, asked.client, asked.number) for key, run in runs.items()}
        numbers = [{**where[key], **one.as_json()} for key, one in changes.items()]
        yield "classes", class_figure.draw(list(changes.values())), numbers
    if "tsne" in asked.what:
        pairs = {key: embedding.update_clouds(run, asked.client, asked.each) for key, run in runs.items()}
        numbers = [{**where[key], **cloud.as_json()} for key, pair in pairs.items() for cloud in pair]
        clouds = [cloud for pair in pairs.values() for cloud in pair]
        yield "tsne-update", embedding.draw(clouds, next(iter(runs.values())).classes, 2), numbers
    if not {"tsne", "sheets"} & set(asked.what):
        return
    making = [(key, run) for key, run in runs.items() if pools(run, asked.client)]
    for key, run in making if "tsne" in asked.what else ():
        cloud = images(run, asked.client, asked.each, asked.clip)
        if cloud is not None:
            yield f"tsne-images-{key}", embedding.draw([cloud], run.classes), {**where[key], **cloud.as_json()}
    for key, run in making if "sheets" in asked.what else ():
        one = sheet(run, asked.client, asked.shown)
        for at, figure in enumerate(one.draw()):
            yield f"sheet-{key}" + (f"-{at + 1}" if at else ""), figure, {**where[key], **one.as_json()}


def _same(runs: Sequence[Finished]) -> None:
    """A client's number must mean the same client in all runs."""
    for run in runs[1:]:
        for what, here, there in (
            ("classes", run.classes, runs[0].classes),
            ("data", run.job.fingerprint, runs[0].job.fingerprint),
            ("partition", run.job.partition.hash, runs[0].job.partition.hash),
        ):
            if here != there:
                raise DataError(f"{run.folder} and {runs[0].folder} differ in their {what}: draw them one by one")


def pools(run: Finished, client: int) -> dict[str, tuple[Pool, int]]:
    """Where the images that this client trains on come from, with its lane there: "vanilla", the generator as it is,
    and "adapted", the one tuned on the client's own images, where it tunes. The server's where that makes them for all;
    none where nobody makes any for this client."""
    job = run.job
    maker = client
    if int(job.plan.fake[client].sum()) == 0:
        if not job.config.algorithm.generates:
            return {}
        maker = job.config.clients
    lane = 0 if job.images.shared else maker
    found = {"vanilla": (job.images.of(maker, tuned=False), lane)}
    return found | ({"adapted": (job.images.of(maker), lane)} if job.adapts(maker) else {})


def images(run: Finished, client: int, each: int = 40, clip: str | None = None) -> embedding.Cloud | None:
    """Real images of a client beside as many synthetic ones of the same classes, of those it holds two or more of; None
    with fewer than three. clip: as in `Asked`.

    The features are those of a classifier that knows the real images of all clients, and no synthetic one; the run's
    own network is no judge, as it was trained on some of the images.
    """
    held, own = run.held(client), run.job.samples(client)
    largest = torch.argsort(held, descending=True, stable=True)[: embedding.MOST].tolist()
    labels = sorted(c for c in largest if held[c] > 1)
    counts = {c: min(each, int(held[c])) for c in labels}
    if sum(counts.values()) < 3:
        return None
    rows = torch.cat([torch.nonzero(own.y == c)[:n, 0] for c, n in counts.items()])
    groups = {"real": (own.x[rows], own.y[rows])}
    for name, (pool, lane) in pools(run, client).items():
        x = torch.cat([pool.take(c, lane, n) for c, n in counts.items()])
        groups[name] = (x, own.y[rows])
    encode: embedding.Encode
    if clip is not None:
        from fedkeel.generators.condition import Encoder, find

        encode, by = Encoder(find(clip, False, "clip"), run.job.device), "CLIP features"
    else:
        from fedkeel.generators.quality import reference

        encode, by = embedding.encoder(run, reference(run.job)), "features of a classifier of real images"
    return embedding.image_cloud(f"{run.title}: client {client}\n{by}", groups, encode)


@dataclass(frozen=True)
class Sheet:
    """A contact sheet: rows of classes, groups of images beside one another.

    held: real samples of each class that the client holds. groups: per name and class, images [n, C, H, W] uint8.
    numbers: per name and class, which they are: the row among the train images, or the image's index at the generator.
    """

    title: str
    client: int
    classes: tuple[str, ...]
    held: tuple[int, ...]
    groups: Mapping[str, Sequence[Tensor]]
    numbers: Mapping[str, Sequence[Sequence[int]]]
    fingerprints: Mapping[str, str]

    def as_json(self) -> dict[str, object]:
        """Plain values, without the pixels."""
        return {name: value for name, value in vars(self).items() if name != "groups"}

    def draw(self) -> list[Figure]:
        """ROWS classes a figure."""
        everyone = range(len(self.classes))
        return [self._draw(everyone[at : at + ROWS]) for at in range(0, len(everyone), ROWS)]

    def _draw(self, rows: Sequence[int]) -> Figure:
        across = {name: max(1, *(len(part) for part in parts)) for name, parts in self.groups.items()}
        like = next(part for parts in self.groups.values() for part in parts if len(part))
        tile = 0.42  # inches
        wide = sum(across.values()) * tile + 1.5
        figure, (axes,) = paper(wide, len(rows) * tile * like.shape[2] / like.shape[3] + 0.75, 1)
        blocks, middles, start = [], {}, 0
        for name, parts in self.groups.items():
            block = np.concatenate([strip(parts[c], across[name], like[:1]) for c in rows])
            gap = np.full((len(block), like.shape[3] // 2, 3), 255, np.uint8)
            blocks += [block, gap]
            middles[name] = start + block.shape[1] / 2
            start += block.shape[1] + gap.shape[1]
        picture = np.concatenate(blocks[:-1], axis=1)
        axes.imshow(picture, interpolation="nearest" if like.shape[3] <= 64 else "antialiased")
        high = len(picture) / len(rows)
        names = [words(shorten(self.classes[c])) + f"\n{_held(self.held[c])}" for c in rows]
        axes.set_yticks([high * (at + 0.5) for at in range(len(rows))], names, fontsize=7.5)
        for tick, c in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(INK if self.held[c] else "#B00020")
        axes.set_xticks(list(middles.values()), list(middles))
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for tick, name in zip(axes.get_xticklabels(), middles, strict=True):
            tick.set(color=GROUPS.get(name, FAKE), fontweight="bold")
        axes.spines[:].set_visible(False)
        heading(axes, f"{self.title}: client {self.client}")
        return figure


def sheet(run: Finished, client: int, each: int = SHOWN) -> Sheet:
    """Real images of every class, the client's own before others', beside synthetic ones: number for number of the same
    seeds for all generators, so that a tuned one is seen to change the very image that the plain one makes.

    Classes that the client misses show the train images of others, which only a simulation can do.
    """
    held, data = run.held(client), run.job.data
    labels = range(len(run.classes))
    mine = run.job.partition.clients[client] if not run.job.method.pooled else torch.arange(len(data.train_y))
    own = torch.zeros(len(data.train_y), dtype=torch.bool)
    own[mine] = True
    real = []
    for c in labels:
        there = data.train_y == c
        order = torch.cat([torch.nonzero(there & own)[:, 0], torch.nonzero(there & ~own)[:, 0]])
        real.append(order[:each])
    groups: dict[str, list[Tensor]] = {"real": [data.train_x[rows] for rows in real]}
    numbers: dict[str, list[list[int]]] = {"real": [rows.tolist() for rows in real]}
    prints: dict[str, str] = {}
    for name, (pool, lane) in pools(run, client).items():
        groups[name] = [pool.take(c, lane, each) for c in labels]
        numbers[name] = [pool.numbers(c, lane, each) for c in labels]
        prints[name] = pool.fingerprint
    return Sheet(run.title, client, run.classes, tuple(held.tolist()), groups, numbers, prints)


def _held(count: int) -> str:
    return f"{count:,} held" if count else "missing"
