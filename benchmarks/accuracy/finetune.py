"""One full fine-tuning of a backbone under one head; on a GPU each step is one replay of a CUDA graph.

Several runs share a GPU: each replays its graph on a stream of its own, see :mod:`study`. After training every head,
the peers too, is measured three times: as it is, and with its backbone's class means and a within-class Σ put in its
place in closed form (on centre crops and three augmented views of the training images), on the indicatrix of Σ and
of Σ = I. The second is FAIM's refit, the third its ablation.
"""

import math
import time
from typing import Any

import timm
import torch
from features import load_backbone
from heads import METHODS
from images import Images, augment, centre, cut, draw_augmentation, hold_out
from measures import measures
from torch import Tensor
from torch.nn import functional as F

import timm_faim

BATCH, WEIGHT_DECAY, REFIT_VIEWS = 32, 0.05, 3
SETTINGS = {  # name -> data, images a class (0: all), backbone, kind of augmentation, resolution, base learning rate
    "grocery81": ("grocery81", 0, "pretrained", "photo", 160, 4e-4),
    "grocery81-5": ("grocery81", 5, "pretrained", "photo", 160, 4e-4),
    "grocery81-3": ("grocery81", 3, "pretrained", "photo", 160, 4e-4),
    "leaf99": ("leaf99", 0, "pretrained", "photo", 160, 4e-4),
    "leaf99-3": ("leaf99", 3, "pretrained", "photo", 160, 4e-4),
    "omniglot242": ("omniglot242", 0, "resnet10t", "drawing", 56, 4e-3),
}


def stored_size(setting: str) -> int:
    """Resolution at which the images of a setting are kept."""
    resolution = SETTINGS[setting][4]
    return round(resolution * 1.15) if SETTINGS[setting][3] == "photo" else resolution


class Run:
    """A run: ``while run.advance(): pass``, then ``run.finish()``.

    Args:
        config: ``setting``, ``method``, ``seed``, ``selection`` (train and measure on parts of the training set),
            ``lr``, ``lr_mu`` (factor for prototypes), ``smoothing``, ``start`` ("random" or "means"), ``options`` of
            the head.
        images: of the setting's data, at :func:`stored_size`.
        weights: file of the pretrained backbone.
        device: of the run.
    """

    def __init__(self, config: dict[str, Any], images: Images, weights: str, device: torch.device) -> None:
        _, shots, backbone, self.kind, self.resolution, _ = SETTINGS[config["setting"]]
        self.config, self.device, self.began = config, device, time.time()
        torch.manual_seed(config["seed"])
        self.generator = torch.Generator().manual_seed(config["seed"])
        pixels, labels = images.train
        kept = cut(labels, shots, torch.Generator().manual_seed(1000 + config["seed"]))
        test = images.val
        if config["selection"]:
            kept, held = hold_out(kept, labels)
            test = pixels[held], labels[held]
        self.pixels, self.labels = pixels[kept].to(device), labels[kept].to(device)
        self.test = test[0].to(device), test[1].to(device)
        pretrained = backbone == "pretrained"
        self.model = load_backbone(weights) if pretrained else timm.create_model(backbone, num_classes=0)
        self.model.train().to(device, memory_format=torch.channels_last)
        self.classes = int(labels.max()) + 1
        builder = METHODS[config["method"]][0]
        self.head = builder(self.model.num_features, self.classes, **config["options"]).to(device)
        if config["start"] == "means":
            features = self.features(self.pixels)
            if isinstance(self.head, timm_faim.FAIMHead):
                timm_faim.fit_(self.head, [(features, self.labels)])
            else:
                self.head.start_(features, self.labels)
        self.steps = min(max(400, 24 * len(kept) // BATCH), 900)
        self.step, self.order = 0, torch.empty(0, dtype=torch.long)
        self.optimizer = self._optimizer()
        self.index = torch.zeros(BATCH, dtype=torch.long, device=device)
        self.parameters = torch.zeros(BATCH, 8, device=device)
        self.graph = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream()
            self._capture()

    def _optimizer(self) -> torch.optim.Optimizer:
        rate = self.config["lr"]
        body = [p for p in self.model.parameters() if p.requires_grad]
        head = [p for p in self.head.parameters() if p.requires_grad]
        groups = [  # norms, biases and scalars are not decayed, prototypes and weights of peers are
            ([p for p in body if p.ndim > 1], rate, WEIGHT_DECAY),
            ([p for p in body if p.ndim <= 1], rate, 0.0),
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

    def _capture(self) -> None:
        tensors = [*self.model.state_dict().values(), *self.head.state_dict().values()]
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
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["base"] * factor)

    def _train_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        target = self.labels[self.index]
        x = augment(self.pixels[self.index], self.parameters, self.resolution)
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            features = self.model(x)
        loss = F.cross_entropy(self.head(features.float(), target), target, label_smoothing=self.config["smoothing"])
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()

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
        """Features [N, D] of uint8 images in eval mode: centre crops, or the augmented view of this number."""
        self.model.eval()
        generator, rows = torch.Generator().manual_seed(1000 * (view or 0) + self.config["seed"] + 77), []
        for batch in pixels.split(512):
            if view is not None:
                drawn = draw_augmentation(len(batch), self.kind, generator).to(self.device)
                x = augment(batch, drawn, self.resolution)
            else:
                x = centre(batch, self.resolution)
            with torch.autocast(self.device.type, torch.bfloat16):
                rows.append(self.model(x).float())
        self.model.train()
        return torch.cat(rows)

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Top-1 in per cent and ECE of the head, of the refit on the indicatrix and of its ablations."""
        if self.graph is not None:
            self.stream.synchronize()
        self.head.eval()
        x, y = self.features(self.test[0]), self.test[1]
        result = {**self.config, **percent("", self.head(x), y), "steps": self.steps, "loss": self.loss.item()}
        crops = [self.features(self.pixels)]
        crops += [self.features(self.pixels, view) for view in range(REFIT_VIEWS)]
        seen, labels = torch.cat(crops), self.labels.repeat(len(crops))
        for name, full, lmbda in (("refit", True, 0.0), ("refit_beta", True, 0.3), ("refit_identity", False, 0.0)):
            head = timm_faim.FAIMHead(x.shape[1], self.classes, lambda_init=lmbda, full_sigma=full).to(self.device)
            timm_faim.fit_(head, [(seen, labels)], shrinkage=0.3 if full else 1.0)
            result |= percent(name + "_", head.eval()(x), y)
        result["seconds"] = round(time.time() - self.began, 1)
        return result


def percent(prefix: str, logits: Tensor, target: Tensor) -> dict[str, float]:
    """The measures in per cent, by prefixed name."""
    return {prefix + name: 100 * value for name, value in measures(logits, target).items()}
