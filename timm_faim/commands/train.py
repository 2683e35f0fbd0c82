"""Train a model on images; the options are those of timm's train.py, and more.

timm-faim train                                           # the bundled Omniglot characters
timm-faim train DIR --model faim_resnet50 --pretrained
timm-faim train ... --resume auto                         # go on where a run was interrupted
accelerate launch -m timm_faim train ...                  # several GPUs
"""

from collections.abc import Sequence


def run(words: Sequence[str]) -> None:
    """One run; its options are read where they are declared."""
    from timm_faim.train import main

    main(words, "timm-faim train")
