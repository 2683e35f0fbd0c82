"""Data, their input, augmentation and mixing."""

from timm_faim.run.numbers import SHARE, Number, above, real, whole
from timm_faim.run.parser import Flag, Off, Parser, available_cores


def data(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--data-dir",
        metavar="DIR",
        help="folder with train/ and val/, one folder of images per class in each; "
        "or tar files, with --train-split train.tar --val-split val.tar",
    )
    add(
        "--dataset",
        default="",
        metavar="TYPE/NAME",
        help="hfds/, hfids/ (streamed), wds/, tfds/ or torch/ and a name; empty: image folder or tar; omniglot242: the "
        "bundled data",
    )
    add(
        "--dataset-download",
        action=Flag,
        default=False,
        help="let a torch/ or tfds/ data set download itself, a hfids/ one download before it streams",
    )
    add("--dataset-trust-remote-code", action=Flag, default=False, help="let a hfds/ data set run its loading script")
    add("--train-split", default="train", metavar="NAME", help="training split or folder")
    add("--val-split", default="validation", metavar="NAME", help="validation split or folder; empty: no validation")
    add("--train-num-samples", type=whole(1, 10**12), metavar="N", help="training images of a streamed data set")
    add("--val-num-samples", type=whole(1, 10**12), metavar="N", help="validation images of a streamed data set")
    add("--class-map", default="", metavar="FILE", help="class names in the order of their indices")
    add("--input-img-mode", metavar="MODE", help="PIL mode of the images (default: L for one channel, else RGB)")
    add("--input-key", metavar="KEY", help="field of the image in a hfds/, hfids/, wds/ or tfds/ data set")
    add("--target-key", metavar="KEY", help="field of the label; several joined by commas: one class each")
    add(
        "--multi-label",
        action=Flag,
        default=False,
        help="any number of classes per image: targets are lists of indices, or as --target-format says",
    )
    add("--target-format", default="indices", choices=("indices", "multihot"), help="form of multi-label targets")
    add(
        "--multilabel-threshold",
        type=Number(float, 0, 1, above=True, below=True),
        default=0.5,
        metavar="P",
        help="probability from which a label counts",
    )
    add(
        "--skip-unreadable",
        action=Flag,
        default=False,
        help="go on without images that cannot be read, and count them; otherwise they are an error",
    )
    add(
        "-j",
        "--workers",
        type=whole(0, 1024),
        default=min(4, available_cores()),
        metavar="N",
        help="loader processes per training process",
    )


def input(parser: Parser) -> None:
    add = parser.add_argument_group("input size and normalisation (default: the model's)").add_argument
    add("--img-size", type=whole(1, 8192), metavar="N", help="height and width in pixels")
    add("--in-chans", type=whole(1, 4), metavar="N", help="input channels")
    add("--input-size", type=whole(1, 8192), nargs=3, metavar=("C", "H", "W"), help="channels, height and width")
    add("--crop-pct", type=real(0.05, 2), metavar="P", help="share of the resized image kept in validation")
    add("--mean", type=SHARE, nargs="+", metavar="M", help="mean of the pixels, per channel, in 0..1")
    add("--std", type=above(0, 10), nargs="+", metavar="S", help="standard deviation of the pixels, per channel")
    add("--interpolation", default="", help="resize interpolation in validation")
    add(
        "--train-interpolation",
        default="random",
        choices=("random", "bilinear", "bicubic", ""),
        help="the same in training; empty: as in validation",
    )


def augmentation(parser: Parser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add("--no-aug", action=Off, help="resize and crop only (--affine still applies)")
    add("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="random crop (default: rrc, random resized crop)")
    add(
        "--scale",
        type=above(0, 1),
        nargs=2,
        default=[0.08, 1.0],
        metavar=("MIN", "MAX"),
        help="share of area kept by crop",
    )
    add(
        "--ratio",
        type=above(0, 100),
        nargs=2,
        default=[3 / 4, 4 / 3],
        metavar=("MIN", "MAX"),
        help="aspect ratio of the crop",
    )
    add("--hflip", type=SHARE, default=0.5, metavar="P", help="horizontal flip")
    add("--vflip", type=SHARE, default=0.0, metavar="P", help="vertical flip")
    add("--color-jitter", type=real(0, 10), default=0.4, metavar="F", help="colour jitter; 0 is off")
    add("--color-jitter-prob", type=SHARE, metavar="P", help="probability of colour jitter (default: always)")
    add("--grayscale-prob", type=SHARE, metavar="P", help="probability of a grey image")
    add("--gaussian-blur-prob", type=SHARE, metavar="P", help="probability of blur")
    add("--aa", metavar="POLICY", help="AutoAugment, RandAugment or AugMix policy, for example rand-m9-mstd0.5")
    add(
        "--affine",
        type=real(0, 180),
        nargs=4,
        metavar=("DEG", "TRANSLATE", "SCALE", "SHEAR"),
        help="random affine map before the crop: rotation up to DEG degrees, shift up to a share TRANSLATE of the "
        "size, scale within 1 -+ SCALE, shear up to SHEAR degrees",
    )
    add(
        "--affine-fill", type=whole(0, 255), metavar="V", help="grey value 0..255 outside the image (default: the mean)"
    )
    add("--reprob", type=SHARE, default=0.0, metavar="P", help="random erasing")
    add("--remode", default="pixel", choices=("pixel", "rand", "const"), help="random erasing mode")
    add("--recount", type=whole(1, 1000), default=1, metavar="N", help="random erasing count")
    add("--resplit", action=Flag, default=False, help="no random erasing in the first split, or half, of the batch")
    add(
        "--aug-repeats",
        type=real(0, 100),
        default=0,
        metavar="N",
        help="augmented copies of each image over the processes (several processes only)",
    )
    add(
        "--aug-splits",
        type=whole(0, 100),
        default=0,
        metavar="N",
        help="views per image, the first one clean; 0 or at least 2",
    )
    add(
        "--epoch-repeats",
        type=real(0, 10_000),
        default=0.0,
        metavar="N",
        help="passes per epoch over hfids/ or tfds/ data",
    )


def mixing(parser: Parser) -> None:
    add = parser.add_argument_group("mixing images").add_argument
    add("--mixup", type=real(0, 1000), default=0.0, metavar="ALPHA", help="mixup")
    add("--cutmix", type=real(0, 1000), default=0.0, metavar="ALPHA", help="cutmix")
    add("--cutmix-minmax", type=SHARE, nargs="*", metavar="F", help="MIN MAX side of the pasted part; turns cutmix on")
    add("--mixup-prob", type=SHARE, default=1.0, metavar="P", help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=SHARE, default=0.5, metavar="P", help="probability of cutmix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what shares one mixing ratio")
    add("--mixup-off-epoch", type=whole(0), default=0, metavar="N", help="no mixing after N epochs; 0: never off")
