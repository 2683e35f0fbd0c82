"""Frozen feature maps of whole images, cached, and the parts of features made of them.

Shapes: N images, c channels, H × W positions, D features of a part.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from features import hash_file, load_backbone
from images import load_images, resized
from parts import COMPONENTS, STEPS
from settings import LITE0, STAGES
from torch import Tensor

from timm_faim.moments import Moments

Split = tuple[Tensor, Tensor]  # of training and validation images


@dataclass(frozen=True)
class View:
    """What the network sees of an image: its whole at this side, mirrored or not."""

    side: int = 160
    flip: bool = False


class Frozen:
    """Maps of one data set under one backbone, computed when they are first asked for."""

    def __init__(self, folder: Path, weights: Path, backbone: str, cache: Path, stages: tuple[str, ...] = ()) -> None:
        self.folder, self.weights, self.backbone, self.cache = folder, weights, backbone, cache
        self.stages = stages or (STAGES[backbone],)
        images = self._images(View())
        self.train_N, self.val_N, self.data_hash = images.train[1], images.val[1], images.data_hash
        self._at_hand: dict[tuple[View, str], Split] = {}

    def _images(self, view: View):
        return load_images(self.folder, round(1.15 * view.side), self.cache)

    def of(self, view: View, name: str) -> Split:
        """Maps [N, c, H, W] of a stage in half precision; for "mean" the pooled features [N, D]."""
        if (view, name) not in self._at_hand:
            prefix = f"{self.data_hash[:12]}-{hash_file(self.weights)[:12]}-{view.side}{'-flip' * view.flip}"
            files = {each: self.cache / f"{prefix}-{each}.pt" for each in ("mean", *self.stages)}
            if not all(file.exists() for file in files.values()):
                self._extract(view, files)
            self._at_hand[view, name] = torch.load(files[name])
        return self._at_hand[view, name]

    @torch.inference_mode()
    def _extract(self, view: View, files: dict[str, Path]) -> None:
        model, images, taken = load_backbone(self.weights, self.backbone), self._images(view), {}
        for stage in self.stages:
            model.get_submodule(stage).register_forward_hook(
                lambda module, inputs, output, stage=stage: taken.__setitem__(stage, output.half())
            )
        rows: dict[str, list[Split]] = {name: [] for name in files}
        for pixels, _ in (images.train, images.val):
            found: dict[str, list[Tensor]] = {name: [] for name in files}
            for batch in pixels.split(64):
                taken["mean"] = model(resized(batch.flip(-1) if view.flip else batch, view.side))
                for name in files:
                    found[name].append(taken[name].contiguous())
            for name in files:
                rows[name].append(torch.cat(found[name]).clone())
        for name, file in files.items():
            torch.save(tuple(rows[name]), file)


@dataclass(frozen=True)
class Recipe:
    """What features are made of; the default is FAIM's own."""

    views: tuple[View, ...] = (View(),)
    stage: str = STAGES[LITE0]
    components: int = COMPONENTS
    steps: int = STEPS

    def but(self, **changed) -> "Recipe":
        return replace(self, **changed)


def second_moments(moments: Moments, maps: Tensor) -> Tensor:
    """[N, D] of maps in half precision."""
    return torch.cat([moments(batch.float()) for batch in maps.split(256)])


def fitted_moments(trains: list[Tensor], recipe: Recipe) -> Moments:
    """Moments with the principal components of maps [N, c, H, W] of each view."""
    channels = trains[0].shape[1]
    moments = Moments(channels, min(recipe.components, channels))
    moments.steps = recipe.steps  # 0: no root
    return moments.fit_(batch.float() for train in trains for batch in train.split(256))


@torch.no_grad()
def parts_of(frozen: Frozen, kept: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Parts of the kept training images, views one after the other, and of the validation images by view.

    Principal components are those of the kept training images.
    """
    maps = [frozen.of(view, recipe.stage) for view in recipe.views]
    means = [frozen.of(view, "mean") for view in recipe.views]
    moments = fitted_moments([train[kept] for train, _ in maps], recipe)
    seen = {
        "mean": torch.cat([train[kept] for train, _ in means]),
        "moments": torch.cat([second_moments(moments, train[kept]) for train, _ in maps]),
    }
    test = [
        {"mean": mean[1], "moments": second_moments(moments, each[1])} for mean, each in zip(means, maps, strict=True)
    ]
    return seen, test
