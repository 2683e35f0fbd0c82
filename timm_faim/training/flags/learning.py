"""Optimiser and schedule."""

from timm.utils import ParseKwargs

from timm_faim.run.numbers import MANY, SHARE, above, real, whole
from timm_faim.run.parser import Flag, Parser


def optimiser(parser: Parser) -> None:
    add = parser.add_argument_group("optimiser").add_argument
    add("--opt", default="sgd", help="optimiser")
    add("--opt-eps", type=SHARE, metavar="EPS", help="optimiser epsilon")
    add("--opt-betas", type=SHARE, nargs="+", metavar="B", help="optimiser betas")
    add(
        "--opt-kwargs",
        nargs="*",
        action=ParseKwargs,
        default={},
        metavar="KEY=VALUE",
        help="further arguments of timm's create_optimizer_v2",
    )
    add("--momentum", type=SHARE, default=0.9, help="optimiser momentum")
    add("--weight-decay", type=real(0, 1000), default=2e-5, help="weight decay")
    add("--clip-grad", type=above(0, 1e9), metavar="NORM", help="gradient clipping")
    add("--clip-mode", default="norm", choices=("norm", "value", "agc"), help="gradient clipping mode")
    add("--layer-decay", type=above(0, 1), metavar="F", help="layer-wise learning-rate decay")
    add("--layer-decay-min-scale", type=SHARE, default=0.0, metavar="F", help="smallest factor of layer decay")
    add("--layer-decay-no-opt-scale", type=SHARE, metavar="F", help="do not train layers whose factor is below F")
    add("--grad-accum-steps", type=whole(1), default=1, metavar="N", help="batches per update")


def schedule(parser: Parser) -> None:
    add = parser.add_argument_group("learning rate and schedule").add_argument
    add("--lr", type=real(0, 1000), help="learning rate; overrides --lr-base")
    add("--lr-base", type=real(0, 1000), default=0.1, help="learning rate for a global batch of --lr-base-size")
    add("--lr-base-size", type=whole(1, 10**9), default=256, metavar="N", help="global batch size of --lr-base")
    add(
        "--lr-base-scale",
        default="",
        choices=("", "linear", "sqrt"),
        help="how the rate follows the batch (empty: sqrt for Adam's family and LAMB, else linear)",
    )
    add(
        "--sched",
        default="cosine",
        help="schedule",
        choices=("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none"),
    )
    add("--sched-on-updates", action=Flag, default=False, help="step the schedule after every update")
    add("--epochs", type=whole(0), default=300, help="epochs; 0 with --head-init data: fit, evaluate and save only")
    add("--min-lr", type=real(0, 1000), default=0.0, help="lowest learning rate")
    add("--warmup-lr", type=real(0, 1000), default=1e-5, help="learning rate at the start of the warm-up")
    add("--warmup-epochs", type=whole(0), metavar="N", help="epochs of warm-up (default: 5, half of a shorter run)")
    add("--warmup-prefix", action=Flag, default=False, help="do not count the warm-up in --epochs")
    add("--cooldown-epochs", type=whole(0), default=0, help="epochs at the lowest rate after the schedule")
    add(
        "--decay-epochs",
        type=real(0.001, MANY),
        default=90,
        help="interval of step decay, length of the decay of wsd and rsqrt",
    )
    add("--decay-milestones", type=whole(0), nargs="+", default=[90, 180, 270], help="epochs of multistep decay")
    add("--decay-rate", "--dr", type=above(0, 100), default=0.1, help="decay rate")
    add("--patience-epochs", type=whole(0), default=10, help="patience of plateau")
    add("--lr-noise", type=SHARE, nargs="*", metavar="F", help="noise on the rate from, or between, shares of the run")
    add("--lr-noise-pct", type=real(0.01, 1), default=0.67, metavar="F", help="limit of the noise")
    add("--lr-noise-std", type=real(0, 100), default=1.0, metavar="S", help="standard deviation of the noise")
    add(
        "--lr-cycle-mul", type=real(0.01, 100), default=1.0, metavar="F", help="factor on the length of each next cycle"
    )
    add("--lr-cycle-decay", type=SHARE, default=0.5, metavar="F", help="factor on the rate of each next cycle")
    add("--lr-cycle-limit", type=whole(1), default=1, metavar="N", help="number of cycles")
    add("--lr-k-decay", type=above(0, 100), default=1.0, metavar="K", help="k-decay of cosine and poly")
    add("--lr-decay-fn", choices=("linear", "1-sqrt", "cosine", "power", "exp"), help="decay of wsd and rsqrt")
    add(
        "--lr-stable-timescale",
        type=real(0.001, MANY),
        metavar="N",
        help="timescale of rsqrt in epochs (default: the warm-up)",
    )
