"""The training images of a run as points, to show which of them are most like a new one.

Shapes: N training images, B new ones, D features, K neighbours.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_faim.retrieval.search import nearest
from timm_faim.run.errors import UserError
from timm_faim.run.files import atomic_write

FILE = "training_points.safetensors"


@dataclass(frozen=True)
class Gallery:
    """Points [N, D] as a head's metric sees them, and the names of the images."""

    points_ND: Tensor
    names: list[str]

    def save(self, folder: Path) -> None:
        """Write them into a run folder, in half precision."""
        with atomic_write(folder / FILE) as temporary:
            points = self.points_ND.to("cpu", torch.float16).contiguous()
            save_file({"points": points}, temporary, metadata={"names": json.dumps(self.names)})

    @classmethod
    def of_run(cls, folder: Path | None, device: torch.device) -> "Gallery":
        """The gallery of a run.

        Raises:
            UserError: the run has none, or it cannot be read.
        """
        if folder is None or not (folder / FILE).is_file():
            raise UserError(
                f"{folder or 'the model'} keeps no points of its training images. Fit one with timm-faim fit, which "
                "keeps them, or leave --neighbours out"
            )
        try:
            with safe_open(folder / FILE, "pt") as stored:
                return cls(stored.get_tensor("points").to(device).float(), json.loads(stored.metadata()["names"]))
        except Exception as e:  # as many ways as there are damaged files
            raise UserError(f"cannot read {folder / FILE}: {' '.join(str(e).split())}. Fit again") from e

    def nearest(self, points_BD: Tensor, k: int) -> list[list[tuple[str, float]]]:
        """The k nearest training images of each point: (name, Euclidean distance of the points), nearest first."""
        found = []
        for distances, numbers in nearest(points_BD.float(), self.points_ND, torch.cdist, min(k, len(self.names))):
            names = [[self.names[i] for i in row] for row in numbers.tolist()]
            found += [list(zip(*row, strict=True)) for row in zip(names, distances.tolist(), strict=True)]
        return found
