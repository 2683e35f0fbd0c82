"""Backbones whose features are parts side by side: the mean of the last map, second moments of a middle one.

Shapes: B images, c channels of a map, d components, D features of all parts.
"""

from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from features import load_backbone
from settings import STAGES, Setting
from torch import Tensor, nn

from timm_faim.moments import Moments, matrix_root

FEATURES = ("mean", "moments", "covariance")  # "moments": the mean and the moments
COMPONENTS, STEPS, ISQRT_STEPS = 112, 6, 5


class Backbone(nn.Module):
    """Images to [pooled features, moments of a stage's map], or to the pooled features alone.

    The moments are centred and divided by one number, both from the training images at the start, so that heads
    without a centre of their own are not at a loss.

    ``widths`` has the width of each part by name.
    """

    def __init__(self, model: nn.Module, stage: str | None) -> None:
        super().__init__()
        self.model, self.widths, self.moments = model, {"mean": model.num_features}, None
        self._map: list[Tensor] = []
        if stage:
            model.get_submodule(stage).register_forward_hook(lambda module, inputs, output: self._map.append(output))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.model(x)
        if self.moments is None:
            return pooled
        v = self.moments(self._map.pop()).float()
        return torch.cat([pooled.float(), (v - self.centre) * self.factor], 1)

    @torch.no_grad()
    def start_(self, batches: list[Tensor]) -> None:
        """Principal components, centre and scale of the moments, from network inputs."""
        maps = []
        for x in batches:
            self.model(x)
            maps.append(self._map.pop().float())
        channels = maps[0].shape[1]
        self.moments = Moments(channels, min(channels, COMPONENTS), steps=STEPS).to(maps[0].device).fit_(maps)
        v = torch.cat([self.moments(each) for each in maps])
        self.widths["moments"] = v.shape[1]
        self.register_buffer("centre", v.mean(0))
        self.register_buffer("factor", 1.0 / (v - self.centre).square().mean().sqrt())


class Covariance(nn.Module):
    """iSQRT-COV (Li et al. 2018, arXiv:1712.01034): the last map at twice the usual resolution, reduced to d channels,
    its covariance, and the root by five steps as a vector."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, d = model, COMPONENTS
        self.reduce = nn.Sequential(nn.Conv2d(model.num_features, d, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU())
        rows, columns = torch.triu_indices(d, d)
        self.register_buffer("entries", rows * d + columns, persistent=False)
        self.widths = {"covariance": len(self.entries)}

    def forward(self, x: Tensor) -> Tensor:
        f_BdN = self.reduce(self.model.forward_features(x)).flatten(2).float()
        f_BdN = f_BdN - f_BdN.mean(2, keepdim=True)
        with torch.autocast(x.device.type, enabled=False):
            covariance_Bdd = f_BdN @ f_BdN.transpose(1, 2) / f_BdN.shape[2]
            return matrix_root(covariance_Bdd, ISQRT_STEPS, ridge=0.0).flatten(1)[:, self.entries]


@torch.no_grad()
def settle_(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Running statistics of a network from scratch, so that its features in eval mode are those of training."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for x in batches:
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def build(setting: Setting, features: str, weights: dict[str, Path], batches: list[Tensor]) -> nn.Module:
    """The backbone of a setting with these features in eval mode, its moments fitted to ``batches`` of inputs."""
    stride = {"output_stride": 16} if features == "covariance" else {}
    if setting.pretrained:
        model = load_backbone(weights[setting.backbone], setting.backbone, **stride)
    else:
        model = timm.create_model(setting.backbone, num_classes=0, **stride)
    stage = (setting.stage or STAGES[setting.backbone]) if features == "moments" else None
    whole = Covariance(model) if features == "covariance" else Backbone(model, stage)
    whole.to(batches[0].device, memory_format=torch.channels_last)
    if not setting.pretrained:
        settle_(model, batches)
        if stage:
            whole._map.clear()
    whole.eval()
    if stage:
        whole.start_(batches)
    return whole
