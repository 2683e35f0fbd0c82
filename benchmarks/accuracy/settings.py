"""Settings of the fine-tuning study: data, cut, backbone, and the map that second moments are taken of."""

from dataclasses import dataclass, replace

RESNET = "resnet10t"  # from scratch
LITE0, LITE2 = "tf_efficientnet_lite0", "tf_efficientnet_lite2"  # pretrained
STAGES = {LITE0: "blocks.4", LITE2: "blocks.4", RESNET: "layer3"}


@dataclass(frozen=True)
class Setting:
    """``shots`` images a class (0: all); ``chosen_on`` names the setting whose trials choose (default: its own)."""

    data: str
    shots: int = 0
    backbone: str = LITE0
    chosen_on: str = ""
    stage: str = ""

    @property
    def pretrained(self) -> bool:
        return self.backbone != RESNET

    @property
    def kind(self) -> str:
        """Of augmentation."""
        return "photo" if self.pretrained else "drawing"

    @property
    def resolution(self) -> int:
        return 160 if self.pretrained else 56

    @property
    def stored(self) -> int:
        """Resolution at which the images are kept."""
        return round(self.resolution * 1.15) if self.pretrained else self.resolution

    @property
    def rate(self) -> float:
        """Base learning rate."""
        return 4e-4 if self.pretrained else 4e-3


# one image a class leaves nothing to select on; what has no trials takes the choice of a setting like it
SETTINGS = {
    "grocery81": Setting("grocery81"),
    "grocery81-5": Setting("grocery81", 5),
    "grocery81-3": Setting("grocery81", 3, chosen_on="grocery81-5"),
    "grocery81-1": Setting("grocery81", 1, chosen_on="grocery81-5"),
    "leaf99": Setting("leaf99"),
    "leaf99-5": Setting("leaf99", 5, chosen_on="leaf99"),
    "leaf99-3": Setting("leaf99", 3),
    "leaf99-1": Setting("leaf99", 1, chosen_on="leaf99-3"),
    "omniglot242": Setting("omniglot242", 0, RESNET),
    "omniglot242-5": Setting("omniglot242", 5, RESNET),
    "omniglot242-3": Setting("omniglot242", 3, RESNET, chosen_on="omniglot242-5"),
    "omniglot242-1": Setting("omniglot242", 1, RESNET, chosen_on="omniglot242-5"),
}
SETTINGS |= {
    f"{name}@lite2": replace(SETTINGS[name], backbone=LITE2, chosen_on=name)
    for name in ("grocery81", "grocery81-5", "leaf99", "leaf99-3")
}
ABLATIONS = {  # by name only
    f"{name}@layer2": replace(SETTINGS[name], stage="layer2", chosen_on=name)
    for name in ("omniglot242", "omniglot242-5")
}
