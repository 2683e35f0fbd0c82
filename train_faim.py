#!/usr/bin/env python3
"""Train a FAIM model, or any timm model, on real images.

    accelerate launch train_faim.py                                       # the bundled Omniglot characters
    accelerate launch train_faim.py --data-dir DIR --model faim_resnet50 --pretrained
    accelerate launch train_faim.py ... --resume auto                     # go on where a run was interrupted
    python train_faim.py --model resnet10t                                # the linear baseline, same script
    accelerate launch train_faim.py --eval-only --resume output/RUN       # or --model local-dir:… --data-dir DIR

`timm-faim train` is the same from an installed package.
"""

import sys

from timm_faim.train import main

if __name__ == "__main__":
    main(sys.argv[1:], "train_faim.py")
