"""One full fine-tuning of a backbone under one head; on a GPU each step is one replay of a CUDA graph.

Several runs share a GPU: each replays its graph on a stream of its own, see :mod:`study`. After training every method
is measured alike: as trained, with the closed-form refits of :mod:`refits` on its own backbone (whole images and three
augmented views of the training images), and with blends of the two. FAIM's own default is one of these, fixed before.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from images import Images, augment, cut, draw_augmentation, hold_out, resized
from joint import build_head
from measures import measures
from parts import build
from refits import blends, default_refit, distance_logits, refits
from settings import ABLATIONS, SETTINGS
from torch import Tensor, nn

BATCH, WEIGHT_DECAY, REFIT_VIEWS = 32, 0.05, 3


class Run:
    """A run: ``while run.advance(): pass``, then ``run.finish()``.

    Args:
        config: ``setting``, ``method``, ``features``, ``seed``, ``selection`` (train and measure on parts of the
            training set), ``lr``, ``lr_mu`` (factor for prototypes), ``decay_mu``, ``smoothing``, ``start`` ("random"
            or "means"), ``options`` of the head; where they are not the setting's, ``resolution`` and ``steps``.
        images: of the setting's data, at its stored size.
        weights: files of the pretrained backbones.
        device: of the run.
    """

    def __init__(self, config: dict[str, Any], images: Images, weights: dict[str, Path], device: torch.device) -> None:
        setting = (SETTINGS | ABLATIONS)[config["setting"]]
        self.kind, self.resolution = setting.kind, config.get("resolution", setting.resolution)
        self.config, self.device, self.began = config, device, time.time()
        torch.manual_seed(config["seed"])
        self.generator = torch.Generator().manual_seed(config["seed"])
        pixels, labels = images.train
        kept = cut(labels, setting.shots, torch.Generator().manual_seed(1000 + config["seed"]))
        test = images.val
        if config["selection"]:
            kept, held = hold_out(kept, labels)
            test = pixels[held], labels[held]
        self.pixels, self.labels = pixels[kept].to(device), labels[kept].to(device)
        self.test = test[0].to(device), test[1].to(device)
        batches = [resized(batch, self.resolution) for batch in self.pixels.split(256)]
        self.model = build(setting, config["features"], weights, batches)
        self.classes = int(labels.max()) + 1
        self.head = self._build_head().to(device)
        self._start_head()
        self.model.train()
        self.steps = config.get("steps", min(max(400, 24 * len(kept) // BATCH), 900))
        self.step, self.order = 0, torch.empty(0, dtype=torch.long)
        self.optimizer = self._optimizer()
        self.factor = torch.zeros((), device=device)  # of the learning rates, by the schedule
        self.index = torch.zeros(BATCH, dtype=torch.long, device=device)
        self.parameters = torch.zeros(BATCH, 8, device=device)
        self.graph = self.stream = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream()
            self._capture()

    def _build_head(self) -> nn.Module:
        return build_head(self.config["method"], self.model.widths, self.classes, self.config["options"])

    def _start_head(self) -> None:
        if self.config["start"] == "means":
            self.head.start_(self.features(self.pixels), self.labels)

    def _backbone_groups(self, rate: float) -> list[tuple[list[nn.Parameter], float, float]]:
        """Parameters, learning rate and weight decay; norms, biases and scalars are not decayed."""
        body = [p for p in self.model.parameters() if p.requires_grad]
        return [([p for p in body if p.ndim > 1], rate, WEIGHT_DECAY), ([p for p in body if p.ndim <= 1], rate, 0.0)]

    def _optimizer(self) -> torch.optim.Optimizer:
        rate = self.config["lr"]
        head = [p for p in self.head.parameters() if p.requires_grad]
        groups = [  # prototypes and weights of peers are decayed
            *self._backbone_groups(rate),
            ([p for p in head if p.ndim > 1], rate * self.config["lr_mu"], self.config["decay_mu"]),
            ([p for p in head if p.ndim <= 1], rate, 0.0),
        ]
        cuda = self.device.type == "cuda"
        groups = [
            {"params": p, "base": r, "weight_decay": w, "lr": torch.zeros((), device=self.device)}
            for p, r, w in groups
            if p
        ]
        return torch.optim.AdamW(groups, fused=cuda, capturable=cuda)

    def _state(self) -> list[Tensor]:
        """All that a step changes, beside the optimizer's own."""
        return [*self.model.state_dict().values(), *self.head.state_dict().values()]

    def _capture(self) -> None:
        tensors = self._state()
        start = [t.clone() for t in tensors]
        self._feed()
        self.order, self.generator = torch.empty(0, dtype=torch.long), self.generator.manual_seed(self.config["seed"])
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # lazy initialisation is not captured
                self._train_step()
            for tensor, value in zip(tensors, start, strict=True):
                tensor.copy_(value)
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
            self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self._train_step()
        torch.cuda.synchronize()

    def _feed(self) -> None:
        while len(self.order) < BATCH:
            self.order = torch.cat([self.order, torch.randperm(len(self.labels), generator=self.generator)])
        chosen, self.order = self.order[:BATCH], self.order[BATCH:]
        self.index.copy_(chosen, non_blocking=True)
        self.parameters.copy_(draw_augmentation(BATCH, self.kind, self.generator), non_blocking=True)
        warm = min(1.0, (self.step + 1) / (0.1 * self.steps))
        factor = warm * 0.5 * (1.0 + math.cos(math.pi * self.step / self.steps))
        self.factor.fill_(factor)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["base"] * factor)

    def _train_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        target = self.labels[self.index]
        x = augment(self.pixels[self.index], self.parameters, self.resolution)
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            features = self.model(x)
        loss = self.head.loss(features.float(), target, self.config["smoothing"])
        loss.backward()
        self.optimizer.step()
        self._after_step()
        self.loss = loss.detach()

    def _after_step(self) -> None:
        """Part of the step, on weights that the optimizer has just changed."""

    def advance(self) -> bool:
        """One step; False after the last."""
        if self.graph is None:
            self._feed()
            self._train_step()
        else:
            with torch.cuda.stream(self.stream):
                self._feed()
                self.graph.replay()
        self.step += 1
        return self.step < self.steps

    @torch.no_grad()
    def features(self, pixels: Tensor, view: int | None = None) -> Tensor:
        """Features [N, D] of uint8 images in eval mode: of whole images, or of the augmented view of this number."""
        self.model.eval()
        generator, rows = torch.Generator().manual_seed(1000 * (view or 0) + self.config["seed"] + 77), []
        for batch in pixels.split(512):
            if view is not None:
                drawn = draw_augmentation(len(batch), self.kind, generator).to(self.device)
                x = augment(batch, drawn, self.resolution)
            else:
                x = resized(batch, self.resolution)
            with torch.autocast(self.device.type, torch.bfloat16):
                rows.append(self.model(x).float())
        self.model.train()
        return torch.cat(rows)

    def refit_features(self, views: Sequence[int] = range(REFIT_VIEWS)) -> tuple[Tensor, Tensor]:
        """Features [N, D] and labels [N] of the training images, whole and in augmented views of these numbers."""
        seen = [self.features(self.pixels), *(self.features(self.pixels, view) for view in views)]
        return torch.cat(seen), self.labels.repeat(len(seen))

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """The config with what :meth:`measure` finds."""
        if self.graph is not None:
            self.stream.synchronize()
        self.head.eval()
        return self.record(self.measure())

    def record(self, found: dict[str, Any]) -> dict[str, Any]:
        """The config, what was found, and what the training took."""
        took = {"steps": self.steps, "loss": self.loss.item(), "seconds": round(time.time() - self.began, 1)}
        return {**self.config, **found, **took}

    @torch.no_grad()
    def measure(self, views: Sequence[int] = range(REFIT_VIEWS)) -> dict[str, Any]:
        """``top1`` in per cent by name, and ``ece`` of the head as trained and of FAIM's fixed refit, with these views
        for the refits."""
        parts = list(self.model.widths)
        x, y = self.features(self.test[0]), self.test[1]
        found = {"trained": self.head(x)}
        if len(parts) > 1:
            found |= {f"trained {part}": logits for part, logits in self.head.logits(x).items()}
        seen, labels = self.refit_features(views)
        refitted = refits(self._by_part(seen), labels, self.classes, self._by_part(x))
        found |= refitted | blends(found["trained"], refitted, parts)
        refit = default_refit("FAIM", parts)
        return {
            "top1": {name: 100 * (scores.argmax(1) == y).float().mean().item() for name, scores in found.items()},
            "ece": {
                "trained": 100 * measures(found["trained"], y)["ece"],
                refit: 100 * measures(distance_logits(found[refit]), y)["ece"],
            },
        }

    def _by_part(self, x: Tensor) -> dict[str, Tensor]:
        widths = self.model.widths
        return dict(zip(widths, x.split(list(widths.values()), 1), strict=True))
