"""A full fine-tuning that keeps more or less of what the pretrained backbone knows, the same for every head.

Shapes: N images, D features of all parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from finetune import REFIT_VIEWS, WEIGHT_DECAY, Run
from images import Images, augment, draw_augmentation
from joint import build_head
from parts import settle_
from timm.layers import freeze_batch_norm_2d
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

SHARES = (0.25, 0.5, 0.75)  # of the end in weights between start and end
KEPT = ("faim_indicatrix", "isomax_plus")  # heads whose features are
EMA_WINDOW = 0.1  # of the steps: 1 / (1 - decay)
PROBE_STEPS, PROBE_RATE, PROBE_DECAY = 300, 2e-3, 0.01


def probe_(head: nn.Module, x: Tensor, y: Tensor, smoothing: float) -> None:
    """A peer's head trained on frozen features [N, D] of classes [N] with its own loss, from its own start: AdamW, all
    of them in each step."""
    head.start_(x, y)
    head.train()
    parameters = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, PROBE_RATE, weight_decay=PROBE_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PROBE_STEPS)
    for _ in range(PROBE_STEPS):
        optimizer.zero_grad(set_to_none=True)
        head.loss(x, y, smoothing).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)


class TunedRun(Run):
    """A run whose config has ``how`` among its ``options``, a dict of none, one or several of

    * ``probe``: the head starts as trained on the features of the start (LP-FT, Kumar et al. 2022, arXiv:2202.10054);
    * ``rate``: factor for all learning rates;
    * ``pull``: share by which a step at full learning rate pulls the backbone towards its start, instead of decaying it
      (L2-SP, Li et al. 2018, arXiv:1802.01483, decoupled from Adam's moments as AdamW's decay is);
    * ``layer_decay``: factor for the learning rate of each block before the next;
    * ``norms``: "frozen": statistics, weights and biases of batch norms stay those of the start.

    Measured are the weights at the end ("end") and, where the config says ``averages``, their moving average over a
    tenth of the steps ("ema") and points between start and end ("wise 0.5": half of each; WiSE-FT, Wortsman et al.
    2022, arXiv:2109.01903), heads and running statistics of batch norms alike. Where ``how`` is empty also the start,
    and "wise 0.5" with the statistics of batch norms taken again, and the features of its end are kept in the folder
    ``keep`` if one is named.
    """

    def __init__(
        self,
        config: dict[str, Any],
        images: Images,
        weights: dict[str, Path],
        device: torch.device,
        keep: Path | None = None,
    ) -> None:
        self.how, self.keep = config["options"]["how"], keep
        super().__init__(config, images, weights, device)
        for average, start in zip(self.average, self.start, strict=True):
            average.copy_(start)  # a capture has changed it

    def _build_head(self) -> nn.Module:
        options = {name: value for name, value in self.config["options"].items() if name != "how"}
        return build_head(self.config["method"], self.model.widths, self.classes, options)

    def _start_head(self) -> None:
        if self.how.get("norms") == "frozen":
            self.model.model = freeze_batch_norm_2d(self.model.model)
        if self.how.get("probe"):
            seen, labels = self.refit_features()
            probe_(self.head, seen, labels, self.config["smoothing"])
        else:
            super()._start_head()
        self.live = [t for t in super()._state() if t.is_floating_point()]
        self.start, self.average = ([t.detach().clone() for t in self.live] for _ in range(2))
        self.pulled = list(self.model.parameters())
        self.anchors = [p.detach().clone() for p in self.pulled]

    def _backbone_groups(self, rate: float) -> list[tuple[list[nn.Parameter], float, float]]:
        decay = 0.0 if "pull" in self.how else WEIGHT_DECAY
        if "layer_decay" not in self.how:
            return [(p, r, min(w, decay)) for p, r, w in super()._backbone_groups(rate)]
        groups = param_groups_layer_decay(self.model.model, decay, layer_decay=self.how["layer_decay"])
        return [(group["params"], rate * group["lr_scale"], group["weight_decay"]) for group in groups]

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = super()._optimizer()
        for group in optimizer.param_groups:
            group["base"] *= self.how.get("rate", 1.0)
        return optimizer

    @torch.no_grad()
    def _after_step(self) -> None:
        if "pull" in self.how:
            back = torch._foreach_sub(self.anchors, self.pulled)
            torch._foreach_mul_(back, self.factor * self.how["pull"])
            torch._foreach_add_(self.pulled, back)
        torch._foreach_lerp_(self.average, self.live, 1.0 / max(1.0, EMA_WINDOW * self.steps))

    def measure(self) -> dict[str, Any]:
        """``top1`` and ``ece`` in per cent by point, each by name of the measure."""
        end = [t.clone() for t in self.live]
        points = {"end": end}
        if self.config["averages"]:
            points |= {"ema": self.average}
            points |= {f"wise {a}": torch._foreach_lerp(self.start, end, a) for a in SHARES}
        if not self.how:
            points |= {"start": self.start}
        if self.keep and not self.how and self.config["method"] in KEPT:
            self._save_features()
        found = {}
        for point, values in points.items():
            with self._at(values, end):
                found[point] = super().measure()
        if not self.how:
            with self._at(points["wise 0.5"], end):
                settle_(self.model, self._views())
                found["wise 0.5, batch norms again"] = super().measure()
        return {value: {point: each[value] for point, each in found.items()} for value in ("top1", "ece")}

    @contextmanager
    def _at(self, values: list[Tensor], end: list[Tensor]) -> Iterator[None]:
        torch._foreach_copy_(self.live, values)
        yield
        torch._foreach_copy_(self.live, end)

    def _views(self) -> Iterator[Tensor]:
        """Augmented training images [B, 3, R, R] in random order, as batch norms saw them in training."""
        generator = torch.Generator().manual_seed(self.config["seed"])
        for _ in range(REFIT_VIEWS):
            order = torch.randperm(len(self.pixels), generator=generator).to(self.device)
            for index in order.split(256):
                drawn = draw_augmentation(len(index), self.kind, generator).to(self.device)
                yield augment(self.pixels[index], drawn, self.resolution)

    def _save_features(self) -> None:
        """Half precision: by part of the training images, of each view of them and of what is measured on; logits of
        the head on the latter."""
        names = ("train", *(f"view {view}" for view in range(REFIT_VIEWS)), "test")
        features = [self.features(self.pixels), *(self.features(self.pixels, view) for view in range(REFIT_VIEWS))]
        features.append(self.features(self.test[0]))
        parts = {
            name: {part: x.half().cpu() for part, x in self._by_part(each).items()}
            for name, each in zip(names, features, strict=True)
        }
        labels = {"train": self.labels.cpu(), "test": self.test[1].cpu()}
        what = [self.config[name] for name in ("setting", "features", "method", "seed")]
        file = "-".join(map(str, [*what, "held-out" if self.config["selection"] else "val"])) + ".pt"
        self.keep.mkdir(parents=True, exist_ok=True)
        torch.save({"parts": parts, "labels": labels, "logits": self.head(features[-1]).half().cpu()}, self.keep / file)
