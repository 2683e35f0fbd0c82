"""Model arguments, losses, mixing, tasks with a teacher, optimiser, schedule; and what is frozen."""

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from timm.layers import is_fast_norm
from timm.layers.split_batchnorm import SplitBatchNorm2d
from timm.task import MultiLabelClassificationTask

from timm_faim import TargetMargin, faim_heads
from timm_faim.run.errors import UserError
from timm_faim.run.weights import save_config
from timm_faim.training.args import parse_args
from timm_faim.training.fits import fit_heads_to
from timm_faim.training.freeze import apply_freeze
from timm_faim.training.loss import build_criterion, build_mixup
from timm_faim.training.model import build_data_config, build_model, sync_batch_norm
from timm_faim.training.optimiser import build_optimizer, build_scheduler
from timm_faim.training.tasks import build_task

CPU = torch.device("cpu")


def options(*argv, model="test_resnet"):
    return parse_args(
        [
            "--data-dir",
            "d",
            "--model",
            model,
            "--img-size",
            "32",
            "--batch-size",
            "4",
            "--smoothing",
            "0",
            *map(str, argv),
        ]
    )


def build(*argv, model="test_resnet", classes=3):
    args = options(*argv, model=model)
    return args, build_model(args, classes)


def mixup_of(options):
    return build_mixup(options.mixing, options.loss, options.data, 3)


def images(count=4, channels=3):
    return torch.randn(count, channels, 32, 32)


# Model


def test_model_arguments_reach_timm():
    _, model = build(
        "--gp", "max", "--drop", "0.25", "--bn-momentum", "0.3", "--bn-eps", "0.01", model="test_efficientnet"
    )
    assert model.global_pool.pool_type == "max" and model.drop_rate == 0.25
    assert model.bn1.momentum == 0.3 and model.bn1.eps == 0.01


@pytest.mark.parametrize(
    ("model", "flag", "value"),
    [
        ("test_resnet", "--bn-momentum", "0.3"),
        ("faim_test_vit", "--drop-block", "0.1"),
        ("test_vit", "--bn-eps", "0.1"),
    ],
)
def test_argument_that_the_model_does_not_take(model, flag, value):
    with pytest.raises(UserError, match=rf"^{model} does not take {flag}\. Leave it out"):
        build(flag, value, model=model)


def test_dropout_of_the_model_stands_unless_given():
    assert build(model="test_resnet")[1].drop_rate == 0
    assert build("--model-kwargs", "drop_rate=0.4")[1].drop_rate == 0.4
    assert build("--model-kwargs", "drop_rate=0.4", "--drop", "0.1")[1].drop_rate == 0.1


def test_weights_in_low_precision_and_fast_norm():
    _, model = build("--model-dtype", "bfloat16", "--fast-norm", model="faim_test_vit")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and is_fast_norm()
    build()
    assert not is_fast_norm()


def test_linear_classifier_is_scaled():
    torch.manual_seed(0)
    reference = build()[1].fc
    torch.manual_seed(0)
    fc = build("--head-init-scale", "0.5", "--head-init-bias", "-2")[1].fc
    assert torch.equal(fc.weight, reference.weight * 0.5) and torch.equal(fc.bias, torch.full((3,), -2.0))


@pytest.mark.parametrize("flag", ["--head-init-scale", "--head-init-bias"])
def test_faim_head_has_no_linear_initialisation(flag):
    with pytest.raises(UserError, match=rf"{flag} is for linear classifiers"):
        build(flag, "1", model="faim_test_resnet")


@pytest.mark.parametrize("model", ["test_resnet", "faim_test_resnet"])
@pytest.mark.parametrize("classes", [3, 5])
def test_pretrained_path_loads_the_backbone_and_a_fitting_faim_head(tmp_path, model, classes):
    _, source = build(model=model)
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
    _, loaded = build("--pretrained-path", path, model=model, classes=classes)
    assert loaded.num_classes == classes
    assert torch.equal(loaded.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    if model.startswith("faim"):
        assert torch.equal(loaded.fc.mu[:3], source.fc.mu) == (classes == 3)


def test_run_that_began_with_a_file_opens_without_it(tmp_path):
    args, source = build()
    path = tmp_path / "start.safetensors"
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
    args, model = build("--pretrained-path", path)
    run = tmp_path / "run"
    run.mkdir()
    save_config(model, run / "config.json", build_data_config(args.input, model), None, pretrained=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, run / "model.safetensors")
    path.unlink()
    again = timm.create_model(f"local-dir:{run}", pretrained=True)
    x = images()
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_pretrained_path_that_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r"--pretrained-path .*nothing is no file"):
        build("--pretrained-path", tmp_path / "nothing")


@pytest.mark.parametrize("model", ["test_resnet", "faim_test_efficientnet"])
def test_split_batch_norm_keeps_statistics_apart(model):
    _, model = build("--split-bn", "--aug-splits", "2", model=model)
    norm = next(m for m in model.modules() if isinstance(m, SplitBatchNorm2d))
    model.train()(torch.cat([images(), 5 + images()]))
    assert not torch.allclose(norm.running_mean, norm.aux_bn[0].running_mean)


class FakeAccelerator:
    def __init__(self, processes, device):
        self.num_processes, self.device = processes, torch.device(device)


def test_synchronised_batch_norm_only_over_processes():
    args, model = build("--sync-bn", model="faim_test_efficientnet")
    assert sync_batch_norm(args.device, model, FakeAccelerator(1, "cpu")) is model and args.device.dist_bn == "reduce"
    with pytest.raises(UserError, match="--sync-bn works on GPUs only"):
        sync_batch_norm(args.device, model, FakeAccelerator(2, "cpu"))
    synced = sync_batch_norm(args.device, model, FakeAccelerator(2, "cuda"))
    norms = [m for m in synced.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms) and args.device.dist_bn == ""
    assert list(faim_heads(synced)) == ["classifier"]


# Loss and mixing


LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
INDEX = torch.tensor([0, 1])
HOT = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])


def cross_entropy_by_hand(logits, target):
    return -(target * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()


def bce_by_hand(logits, target, pos_weight=1.0):
    p = logits.sigmoid()
    return -(pos_weight * target * p.log() + (1 - target) * (1 - p).log())


@pytest.mark.parametrize(
    ("argv", "target", "expected"),
    [
        ([], INDEX, lambda y: cross_entropy_by_hand(LOGITS, y)),
        (["--smoothing", "0.3"], INDEX, lambda y: cross_entropy_by_hand(LOGITS, 0.7 * y + 0.1)),
        (["--bce-loss"], INDEX, lambda y: bce_by_hand(LOGITS, y).mean()),
        (["--loss", "bce", "--smoothing", "0.3"], INDEX, lambda y: bce_by_hand(LOGITS, 0.7 * y + 0.1).mean()),
        (["--bce-loss", "--bce-sum"], INDEX, lambda y: bce_by_hand(LOGITS, y).sum(1).mean()),
        (["--bce-loss", "--bce-pos-weight", "3"], INDEX, lambda y: bce_by_hand(LOGITS, y, 3.0).mean()),
        (
            ["--bce-loss", "--mixup", "1", "--bce-target-thresh", "0.2"],
            torch.tensor([[0.7, 0.3, 0], [0.1, 0.9, 0]]),
            lambda y: bce_by_hand(LOGITS, torch.tensor([[1.0, 1, 0], [0, 1, 0]])).mean(),
        ),
        (
            ["--mixup", "1", "--smoothing", "0.1"],
            torch.tensor([[0.7, 0.3, 0], [0.1, 0.9, 0]]),
            lambda y: cross_entropy_by_hand(LOGITS, y),
        ),
        (["--multi-label", "--dataset", "hfds/x"], HOT, lambda y: bce_by_hand(LOGITS, y).mean()),
        (
            ["--multi-label", "--dataset", "hfds/x", "--smoothing", "0.2"],
            HOT,
            lambda y: bce_by_hand(LOGITS, 0.8 * y + 0.1).mean(),
        ),
    ],
)
def test_loss_is_what_the_options_say(argv, target, expected):
    args, model = build(*argv)
    dense = F.one_hot(target, 3).float() if target.ndim == 1 else target
    torch.testing.assert_close(build_criterion(args, model)(LOGITS, target), expected(dense))


def test_jsd_loss_by_hand():
    args, model = build("--jsd-loss", "--aug-splits", "2", "--aa", "rand-m9")
    other = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    p, q = LOGITS.softmax(1), other.softmax(1)
    mixture = (p + q) / 2
    divergence = sum((part * (part / mixture).log()).sum(1).mean() for part in (p, q)) / 2
    expected = cross_entropy_by_hand(LOGITS, F.one_hot(INDEX, 3)) + 12 * divergence
    loss = build_criterion(args, model)(torch.cat([LOGITS, other]), INDEX.repeat(2))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("argv", [[], ["--bce-loss"], ["--jsd-loss", "--aug-splits", "2", "--aa", "rand-m9"]])
def test_losses_see_the_margin_of_a_faim_head_in_training(argv):
    args, model = build("--faim-cfg", "margin=0.5", "scale_init=4.0", *argv, model="faim_test_resnet")
    plain, _ = build(*argv)
    with_margin = build_criterion(args, model.train())
    without = build_criterion(plain, build(*argv)[1])
    moved = LOGITS - 4.0 * 0.5 * F.one_hot(INDEX, 3)
    torch.testing.assert_close(with_margin(LOGITS, INDEX).detach(), without(moved, INDEX))
    model.eval()
    torch.testing.assert_close(with_margin(LOGITS, INDEX), without(LOGITS, INDEX))


@pytest.mark.parametrize("loss", ["asl", "poly", "twoway", "zlpr"])
def test_other_losses_of_timm_have_gradients(loss):
    many = [] if loss in ("asl", "poly") else ["--multi-label", "--dataset", "hfds/x"]
    args, model = build("--loss", loss, *many)
    logits = LOGITS.clone().requires_grad_()
    build_criterion(args, model)(logits, HOT if many else INDEX).backward()
    assert logits.grad.abs().sum() > 0


def test_mixup_of_index_and_of_dense_targets():
    args, _ = build("--cutmix-minmax", "0.4", "0.6", "--smoothing", "0.3")
    mixed, target = mixup_of(args)(images(), torch.tensor([0, 1, 2, 0]))
    assert target.shape == (4, 3) and torch.allclose(target.sum(1), torch.ones(4)) and target.min() >= 0.1 - 1e-6
    args, _ = build("--mixup", "1", "--multi-label", "--dataset", "hfds/x")
    mixup = mixup_of(args)
    mixup.mixup_enabled = False
    assert torch.equal(mixup(images(2), HOT)[1], HOT)
    assert mixup_of(options()) is None


# Tasks


@pytest.fixture
def teacher(tmp_path):
    """A trained model with 3 classes, by the name under which it opens."""

    def save(model="test_resnet", **kwargs):
        folder = tmp_path / f"teacher_{model}_{len(kwargs)}"
        folder.mkdir()
        net = timm.create_model(model, num_classes=3, **kwargs)
        config = {
            "input_size": (kwargs.get("in_chans", 3), 32, 32),
            "mean": (0.2,) * kwargs.get("in_chans", 3),
            "std": (0.5,) * kwargs.get("in_chans", 3),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
        }
        save_config(net, folder / "config.json", config, None, pretrained=False)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")
        return f"local-dir:{folder}"

    return save


def task_of(*argv, model="test_resnet"):
    args, net = build(*argv, model=model)
    return build_task(args, net, build_criterion(args, net), CPU), net


def test_plain_and_multi_label_tasks():
    task, net = task_of("--loss", "bce")
    x = images()
    task.eval()
    torch.testing.assert_close(task(x, torch.tensor([0, 1, 2, 0]))["output"], net(x))
    task, _ = task_of("--multi-label", "--dataset", "hfds/x", "--multilabel-threshold", "0.3")
    assert isinstance(task, MultiLabelClassificationTask) and task.create_evaluator().threshold == 0.3
    assert task.eval()(x, torch.zeros(4, 3))["loss"] > 0


def test_logit_distillation_by_hand(teacher):
    name = teacher()
    task, net = task_of(
        "--kd-model-name", name, "--kd-temperature", "2", "--task-loss-weight", "0.25", "--mean", "0.4", "--std", "0.3"
    )
    task.train()
    net.eval()
    master = timm.create_model(name, pretrained=True).eval()
    x, y = images(), torch.tensor([0, 1, 2, 0])
    theirs = ((x * 0.3 + 0.4) - 0.2) / 0.5  # the student's normalisation taken back, the teacher's put on
    p, log_q = (master(theirs) / 2).softmax(1), (net(x) / 2).log_softmax(1)
    distilled = 4 * (p * (p.log() - log_q)).sum(1).mean()
    expected = 0.25 * F.cross_entropy(net(x), y) + 0.75 * distilled
    torch.testing.assert_close(task(x, y)["loss"], expected, atol=1e-5, rtol=1e-4)


def test_grey_images_are_distilled(teacher):
    task, net = task_of("--kd-model-name", teacher(in_chans=1), "--in-chans", "1", "--mean", "0.9", "--std", "0.25")
    assert task.student_mean.shape == (1, 1, 1, 1) and task.teacher.mean_kd.shape == (1, 1, 1, 1)
    task(images(channels=1), torch.tensor([0, 1, 2, 0]))["loss"].backward()
    assert net.conv1[0].weight.grad is not None


def test_feature_distillation_trains_a_projection_and_no_teacher(teacher):
    task, net = task_of(
        "--kd-model-name", teacher("test_vit", img_size=32), "--kd-distill-type", "feature", model="faim_test_resnet"
    )
    trainable = task.get_trainable_module()
    assert trainable.projection.out_features == task.teacher.model.num_features
    task.train()(images(), torch.tensor([0, 1, 2, 0]))["loss"].backward()
    assert trainable.projection.weight.grad.abs().sum() > 0 and net.fc.mu.grad.abs().sum() > 0
    assert all(p.grad is None for p in task.teacher.parameters())


def test_distillation_in_low_precision(teacher):
    task, net = task_of(
        "--kd-model-name", teacher(), "--kd-distill-type", "feature", "--model-dtype", "bfloat16", model="faim_test_vit"
    )
    task.train()(images().bfloat16(), torch.tensor([0, 1, 2, 0]))["loss"].backward()
    assert net.head.mu.grad.dtype == torch.bfloat16


DISTILLED = "faim_deit_tiny_distilled_patch16_224"


def test_token_distillation_gives_each_head_its_own_part(teacher):
    task, net = task_of(
        "--kd-model-name",
        teacher(),
        "--kd-distill-type",
        "token",
        "--kd-token-distill-type",
        "hard",
        "--faim-cfg",
        "margin=0.5",
        "scale_init=4.0",
        "--distill-loss-weight",
        "2",
        model=DISTILLED,
    )
    with torch.no_grad():
        net.head_dist.scale.mul_(3)  # another γ, which the main head's margin must not see
    net.train()
    x, y = images(), torch.tensor([0, 1, 2, 0])
    main, distilled = net(x)
    master = task.teacher(task.teacher.normalize_input(x, task.student_mean, task.student_std)).argmax(1)
    expected = F.cross_entropy(main - 2.0 * F.one_hot(y, 3), y) + 2 * F.cross_entropy(distilled, master)
    torch.testing.assert_close(task(x, y)["loss"], expected, atol=1e-5, rtol=1e-5)


def test_margin_of_a_tuple_output_is_each_heads_own():
    _, net = build("--faim-cfg", "margin=0.5", "scale_init=4.0", model=DISTILLED)
    with torch.no_grad():
        net.head_dist.scale.mul_(3)
    seen = TargetMargin(lambda output, target: output, net.train())((LOGITS, LOGITS), INDEX)
    hot = F.one_hot(INDEX, 3)
    torch.testing.assert_close(seen[0], LOGITS - 2 * hot)
    torch.testing.assert_close(seen[1], LOGITS - 6 * hot)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt50", r"unknown --kd-model-name 'resnt50'\..*resnet50"),
        ("vit_base_patch16_18x2_224", "vit_base_patch16_18x2_224: .*no pretrained weights"),
        ("resnet50.no_such_tag", r"Invalid pretrained tag \(no_such_tag\)"),
        ("local-dir:/no/such/run", r"cannot open the teacher --kd-model-name local-dir:/no/such/run"),
    ],
)
def test_teachers_that_cannot_be_opened(name, message):
    with pytest.raises(UserError, match=message) as raised:
        task_of("--kd-model-name", name)
    assert "\n" not in str(raised.value)


def test_teacher_with_other_classes(teacher):
    args, net = build("--kd-model-name", teacher(), classes=4)
    with pytest.raises(UserError, match=r"has 3 classes, the data 4\. Take a teacher trained on these"):
        build_task(args, net, build_criterion(args, net), CPU)
    args, net = build("--kd-model-name", args.distillation.kd_model_name, "--kd-distill-type", "feature", classes=4)
    build_task(args, net, build_criterion(args, net), CPU)


def test_teacher_that_cannot_take_the_images(teacher):
    with pytest.raises(UserError, match="does not take the student's images of 3x2x2"):  # smaller than a patch
        task_of("--kd-model-name", teacher("test_convnext"), "--img-size", "2")


def test_teacher_of_a_faim_run(teacher):
    task, _ = task_of("--kd-model-name", teacher("faim_test_resnet"), "--kd-loss-type", "kl")
    assert faim_heads(task.teacher.model)


def test_pretrained_faim_name_whose_head_stays_fresh_has_no_logits_to_learn_from(monkeypatch):
    create = timm.create_model  # without weights there is no classifier to convert, as with weights that only embed
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kwargs: create(name, **kwargs))
    with pytest.raises(UserError, match="a fresh FAIM head and so no logits"):
        args = options("--kd-model-name", "faim_resnet18")
        build_task(args, create("test_resnet", num_classes=1000), torch.nn.CrossEntropyLoss(), CPU)


def test_pretrained_faim_name_that_keeps_its_classes_teaches(monkeypatch):
    create = timm.create_model
    overlay = dict(state_dict=create("test_resnet", num_classes=3).state_dict(), num_classes=3)
    keeps = create("faim_test_resnet", pretrained=True, pretrained_cfg_overlay=overlay)
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: keeps)
    args = options("--kd-model-name", "faim_resnet18", "--kd-loss-type", "kl")
    task = build_task(args, create("test_resnet", num_classes=3), torch.nn.CrossEntropyLoss(), CPU)
    assert task.teacher.model is keeps


def test_student_without_a_distillation_head(teacher):
    with pytest.raises(UserError, match="--kd-distill-type token: .*set_distilled_training"):
        task_of("--kd-model-name", teacher(), "--kd-distill-type", "token")


# Optimiser and schedule


def test_optimiser_arguments():
    args, model = build(
        "--opt",
        "adamw",
        "--lr",
        "1e-3",
        "--opt-kwargs",
        "amsgrad=True",
        "--layer-decay",
        "0.5",
        "--layer-decay-min-scale",
        "0.2",
    )
    optimizer = build_optimizer(args.optimiser, args.schedule.lr or 0.1, model)
    assert optimizer.defaults["amsgrad"] is True
    assert min(group["lr_scale"] for group in optimizer.param_groups) == 0.2


@pytest.mark.parametrize("given", ["nonsense=1", "betas=3"])
def test_bad_optimiser_arguments(given):
    args, model = build("--opt", "adamw", "--opt-kwargs", given)
    with pytest.raises(UserError, match="^--opt adamw: "):
        build_optimizer(args.optimiser, args.schedule.lr or 0.1, model)


def test_schedule_with_cycles_and_noise():
    args, model = build(
        "--lr",
        "1",
        "--epochs",
        "4",
        "--warmup-epochs",
        "0",
        "--lr-cycle-limit",
        "2",
        "--lr-cycle-decay",
        "0.5",
        "--sched",
        "cosine",
    )
    optimizer = build_optimizer(args.optimiser, args.schedule.lr or 0.1, model)
    scheduler, epochs = build_scheduler(args.schedule, args.run, optimizer, 10)
    assert epochs == 8
    scheduler.step(4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    args.schedule.lr_noise = [0.0]
    noisy = build_optimizer(args.optimiser, args.schedule.lr or 0.1, model)
    scheduler, _ = build_scheduler(args.schedule, args.run, noisy, 10)
    scheduler.step(4)
    assert noisy.param_groups[0]["lr"] != pytest.approx(0.5)


@pytest.mark.parametrize("argv", [["--sched", "wsd", "--epochs", "5"], ["--sched", "plateau", "--sched-on-updates"]])
def test_schedule_that_does_not_fit(argv):
    args, model = build("--lr", "1", *argv)
    with pytest.raises(UserError, match=f"^--sched {args.schedule.sched}: "):
        build_scheduler(args.schedule, args.run, build_optimizer(args.optimiser, args.schedule.lr or 0.1, model), 10)


# Freezing


FAMILIES = [
    "faim_test_resnet",
    "test_resnet",
    "faim_test_vit",
    "test_vit",
    "faim_test_convnext",
    "faim_test_efficientnet",
    "faim_test_byobnet",
]


def step(model, frozen):
    """One training step as the loop makes it; returns the names of parameters and buffers that have changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    for module in frozen:
        module.eval()
    optimizer = timm.optim.create_optimizer_v2(model, opt="momentum", lr=0.5, weight_decay=0.1)
    F.cross_entropy(model(torch.randn(4, 3, *size_of(model))), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def size_of(model):
    return model.patch_embed.img_size if hasattr(model, "patch_embed") else (32, 32)


def classifier(model):
    (name,) = faim_heads(model) or [model.pretrained_cfg["classifier"]]
    return f"{name}."


@pytest.mark.parametrize("name", FAMILIES)
def test_head_only_changes_nothing_but_the_classifier(name):
    args, model = build("--head-only", model=name)
    changed = step(model, apply_freeze(args.learning, model))
    assert changed and all(key.startswith(classifier(model)) for key in changed)


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("faim_test_resnet", ("layer4.0.", "fc.")),
        ("test_resnet", ("layer4.0.", "fc.")),
        ("faim_test_vit", ("blocks.5.", "norm.", "head.")),
        ("faim_test_convnext", ("stages.3.blocks.1.", "head.")),
        ("faim_test_efficientnet", ("blocks.4.0.", "conv_head.", "bn2.", "classifier.")),
    ],
)
def test_train_last_changes_the_last_block_the_norm_and_the_classifier(name, prefixes):
    args, model = build("--train-last", "1", model=name)
    changed = step(model, apply_freeze(args.learning, model))
    learns = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(key.startswith(prefixes) for key in changed)
    assert all(any(key.startswith(prefix) for key in learns) for prefix in prefixes)


def test_swin_keeps_blocks_and_norm_together():
    args = options("--train-last", "1", model="faim_swin_tiny_patch4_window7_224")
    model = timm.create_model(
        args.model.model,
        num_classes=3,
        img_size=32,
        window_size=1,
        embed_dim=12,
        depths=(1, 1, 1, 2),
        num_heads=(1, 1, 1, 1),
    )
    apply_freeze(args.learning, model)
    learns = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {".".join(key.split(".")[:4]) for key in learns if key.startswith("layers")} == {"layers.3.blocks.1"}
    assert "norm.weight" in learns and "head.fc.mu" in learns


def test_more_blocks_than_the_model_has():
    args, model = build("--train-last", "7", model="faim_test_vit")
    with pytest.raises(UserError, match=r"--train-last 7: faim_test_vit has 6 blocks\. Give at most 6"):
        apply_freeze(args.learning, model)
    args.learning.train_last = 6
    apply_freeze(args.learning, model)
    assert not model.patch_embed.proj.weight.requires_grad and model.blocks[0].norm1.weight.requires_grad


def test_frozen_names_and_globs():
    args, model = build("--freeze", "conv1", "layer[12]", "fc.metric", model="faim_test_resnet")
    frozen = apply_freeze(args.learning, model)
    assert {id(m) for m in frozen} == {id(m) for m in (model.conv1, model.layer1, model.layer2, model.fc.metric)}
    changed = step(model, frozen)
    assert not any(key.startswith(("conv1.", "layer1.", "layer2.", "fc.metric.")) for key in changed)
    assert {"fc.mu", "bn1.running_mean"} <= changed and any(key.startswith("layer3.") for key in changed)


def test_frozen_parameter_beside_modules():
    args, model = build("--freeze", "pos_embed", "blocks.0", model="test_vit")
    assert apply_freeze(args.learning, model) == [model.blocks[0]] and not model.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layr1", r"--freeze layr1 matches no module of the model\. Did you mean layer1.*At the top are conv1, "),
        ("*", r"leaves nothing to learn"),
    ],
)
def test_bad_names_to_freeze(name, message):
    args, model = build("--freeze", name)
    with pytest.raises(UserError, match=message):
        apply_freeze(args.learning, model)


def test_dropout_of_the_classifier_stays_that_of_the_backbone_does_not():
    args, model = build("--head-only", "--drop", "0.5", "--model-kwargs", "pos_drop_rate=0.5", model="faim_test_vit")
    frozen = {id(m) for m in apply_freeze(args.learning, model)}
    assert id(model.pos_drop) in frozen and id(model.head_drop) not in frozen


def test_nothing_is_frozen_without_options():
    args, model = build()
    assert apply_freeze(args.learning, model) == [] and all(p.requires_grad for p in model.parameters())


def test_heads_are_fitted_in_low_precision():
    args, model = build("--model-dtype", "bfloat16", model="faim_test_resnet")
    batches = [(images().bfloat16(), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    fit_heads_to(model, batches, Accelerator(cpu=True), args.head_recipe, "--head-init data")
    assert torch.isfinite(model.fc.mu).all() and torch.isfinite(model(images().bfloat16())).all()
