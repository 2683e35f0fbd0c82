"""The model, its head, what of it learns, and the losses."""

from timm.utils import ParseKwargs

from timm_faim.run.numbers import SHARE, Number, above, real, whole
from timm_faim.run.parser import Flag, Parser


def model(parser: Parser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="faim_resnet50", metavar="NAME", help="a timm name with the prefix faim_, or without it")
    add("--pretrained", action=Flag, default=False, help="start from timm's pretrained weights")
    add(
        "--pretrained-head",
        default="keep",
        choices=("keep", "fresh"),
        help="what becomes of the classes of pretrained weights that have as many as the data: kept (a linear "
        "classifier is converted in closed form), or a fresh head (default: keep)",
    )
    add("--pretrained-path", metavar="FILE", help="start from this file as if it were the pretrained weights")
    add("--initial-checkpoint", default="", metavar="FILE", help="load these weights into the new model")
    add("--num-classes", type=whole(1, 10_000_000), metavar="N", help="number of classes (default: that of the data)")
    add("--gp", metavar="POOL", help="global pooling, for example avg, max, avgmax, catavgmax (default: the model's)")
    add("--drop", type=SHARE, metavar="P", help="dropout before the classifier (default: the model's)")
    add("--drop-path", type=SHARE, metavar="P", help="stochastic depth")
    add("--drop-block", type=SHARE, metavar="P", help="DropBlock, for ResNet's family")
    add("--bn-momentum", type=SHARE, metavar="M", help="batch-norm momentum, for EfficientNet's family")
    add("--bn-eps", type=above(0, 1), metavar="EPS", help="batch-norm epsilon, for EfficientNet's family")
    add("--head-init-scale", type=real(0, 1e6), metavar="F", help="factor on a linear classifier's initial weights")
    add("--head-init-bias", type=real(-1e6, 1e6), metavar="B", help="a linear classifier's initial bias")
    add(
        "--model-kwargs",
        nargs="*",
        action=ParseKwargs,
        default={},
        metavar="KEY=VALUE",
        help="further arguments of timm.create_model",
    )
    add("--grad-checkpointing", action=Flag, default=False, help="recompute activations to save memory")
    add("--channels-last", action=Flag, default=False, help="channels-last memory layout")
    add("--fast-norm", action=Flag, default=False, help="norm layers in low precision under --amp")


def faim(parser: Parser) -> None:
    add = parser.add_argument_group("FAIM head").add_argument
    add(
        "--faim-cfg",
        nargs="*",
        action=ParseKwargs,
        default=None,
        metavar="KEY=VALUE",
        help="options of the head, for example space=sphere margin=0.2; replaces those of the recipe",
    )
    add(
        "--faim-blocks",
        type=whole(0, 10_000),
        metavar="N",
        help="log and exp maps around the last N blocks; the same as --faim-cfg blocks=N",
    )
    add(
        "--head-init",
        choices=("random", "data"),
        default="random",
        help="data: class means and within-class variance of the backbone's features, evaluated as epoch 0",
    )
    add(
        "--head-refit",
        type=whole(-1, 10_000),
        metavar="N",
        help="after the last epoch set centre, prototypes and Σ in closed form, from all training images and N "
        "augmented epochs; -1: not, where a recipe does",
    )


def freezing(parser: Parser) -> None:
    add = parser.add_argument_group("what learns, and how fast").add_argument
    add("--freeze", nargs="*", metavar="GLOB", help="freeze the modules of these names, for example layer1 'blocks.*'")
    add("--head-only", action=Flag, default=False, help="train the classifier only")
    add(
        "--train-last",
        type=whole(1, 10_000),
        metavar="N",
        help="train the classifier, the last N blocks and the norm after them",
    )
    add("--cache-features", action=Flag, default=False, help="with --head-only: compute the features once")
    add(
        "--cache-views",
        type=whole(0, 10_000),
        default=0,
        metavar="N",
        help="augmented views per image to cache; 0: one view without augmentation",
    )
    for part, of in (
        ("backbone", "the backbone"),
        ("mu", "the prototypes μ, or a plain model's classifier"),
        ("scalars", "λ, γ and the prior"),
    ):
        add(
            f"--lr-scale-{part}",
            type=above(0, 1e6),
            default=1.0,
            metavar="F",
            help=f"factor on the learning rate of {of}",
        )


def loss(parser: Parser) -> None:
    add = parser.add_argument_group("loss").add_argument
    add(
        "--smoothing",
        type=Number(float, 0, 1, below=True),
        metavar="S",
        help="label smoothing (default: 0.1; 0 with --multi-label)",
    )
    add(
        "--loss",
        choices=("ce", "bce", "asl", "poly", "jsd", "twoway", "zlpr"),
        help="timm's losses (default: ce; bce with --multi-label)",
    )
    add("--bce-loss", action=Flag, default=False, help="the same as --loss bce")
    add("--bce-sum", action=Flag, default=False, help="sum the bce loss over the classes")
    add("--bce-target-thresh", type=SHARE, metavar="P", help="soft targets above P are 1 in the bce loss, others 0")
    add("--bce-pos-weight", type=above(0, 1e6), metavar="W", help="weight of the positives in the bce loss")
    add("--jsd-loss", action=Flag, default=False, help="the same as --loss jsd; needs --aug-splits")


def contrastive(parser: Parser) -> None:
    add = parser.add_argument_group("contrastive losses under the head's metric").add_argument
    add(
        "--contrastive",
        nargs="*",
        metavar="NAME:WEIGHT",
        help="add losses on the features: infonce, supcon, triplet, npair, for example infonce:0.1",
    )
    add("--views", type=whole(1, 64), default=1, metavar="N", help="augmented views of each image in a batch")
    add(
        "--samples-per-class",
        type=whole(0),
        default=0,
        metavar="K",
        help="batches of K images each of --batch-size/K classes",
    )
    add(
        "--contrastive-temperature",
        type=above(0, 1000),
        default=0.1,
        metavar="T",
        help="temperature of infonce, supcon and npair",
    )
    add(
        "--contrastive-margin",
        type=above(0, 1000),
        default=0.2,
        metavar="M",
        help="margin of triplet, in units of the distance",
    )


def distillation(parser: Parser) -> None:
    add = parser.add_argument_group("distillation").add_argument
    add("--kd-model-name", metavar="NAME", help="teacher: a pretrained timm name, local-dir:RUN or hf-hub:NAME")
    add(
        "--kd-distill-type",
        default="logit",
        choices=("logit", "feature", "token"),
        help="what is matched: logits, pooled features, or the distillation head of models like DeiT",
    )
    add("--kd-loss-type", default="kl", choices=("kl",), help="loss between logits")
    add("--kd-temperature", type=above(0, 1000), default=4.0, metavar="T", help="temperature of the softmax")
    add("--kd-token-distill-type", default="soft", choices=("soft", "hard"), help="target of the distillation head")
    add("--kd-student-feature-dim", type=whole(1), metavar="D", help="width of the student's features (default: found)")
    add("--kd-teacher-feature-dim", type=whole(1), metavar="D", help="width of the teacher's features (default: found)")
    add(
        "--distill-loss-weight",
        type=real(0, 1e6),
        metavar="W",
        help="weight of distillation (default: 1, or 1 - the other)",
    )
    add("--task-loss-weight", type=real(0, 1e6), metavar="W", help="weight of the classification loss (default: 1)")
