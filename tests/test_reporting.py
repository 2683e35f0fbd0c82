"""The report: its numbers against the metric, its choices, and the page on tiny, large and odd cases."""

import base64
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from runs import make_images
from timm.data import create_dataset, create_loader

from timm_faim import PRESETS, FAIMHead, faim_heads
from timm_faim.images.pictures import Pictures, head_features
from timm_faim.report import examples as examples_of
from timm_faim.report import plots
from timm_faim.report.distances import HeadDistances
from timm_faim.report.evaluation import Evaluation, collect
from timm_faim.report.names import class_name, short_name
from timm_faim.report.page import write_report

FLAT = PRESETS["flat"] | {"lambda_init": 0.4}
HEADS = {
    "default": {},
    "flat": FLAT,
    "full": FLAT | {"full_sigma": True},
    "randers": FLAT | {"symmetric": False},
    "full randers on the sphere": {"full_sigma": True, "symmetric": False, "space": "sphere"},
    "sphere with prior": {"space": "sphere", "prior": True},
    "no 1-form": FLAT | {"lambda_init": 0.0},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def loader_of(images, split, channels=3, size=32, batch_size=4):
    dataset = create_dataset("", root=str(images), split=split, input_img_mode="L" if channels == 1 else "RGB")
    mean = (0.4, 0.5, 0.6)[:channels]
    return create_loader(
        dataset,
        (channels, size, size),
        batch_size,
        num_workers=0,
        mean=mean,
        std=mean,
        crop_pct=1.0,
        device=torch.device("cpu"),
    )


def odd_head(options, C=5, D=12):
    """A head in float64 whose parameters are far from their start."""
    head = FAIMHead(D, C, **{"lambda_init": 0.4, **options}).double().eval()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            of_frame = name == "metric.log_sigma_diag" and not head.is_flat
            if name != "scale" and not of_frame and not (name == "metric.lmbda" and options.get("lambda_init") == 0.0):
                parameter.add_(0.5 * torch.randn_like(parameter))
    return head


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_two_parts_are_the_literal_ones_and_sum_to_the_distance(options):
    head, x = odd_head(options), torch.randn(20, 12, dtype=torch.float64)
    k = torch.arange(20) % 5
    embedded = head.embed(x)
    riemannian, form = HeadDistances(head).parts(embedded, k)

    logits = head(x).detach()
    if head.prior is not None:
        logits = logits - head.prior.detach()
    torch.testing.assert_close(
        riemannian + form, -(logits / head.gamma().detach())[torch.arange(20), k], rtol=1e-9, atol=1e-9
    )
    v = embedded - head.project(head.mu.detach())[k]
    literal = (torch.einsum("nd,de,ne->n", v, head.metric.sigma().detach(), v) + head.metric.eps).sqrt()
    torch.testing.assert_close(riemannian, literal)
    if head.metric.symmetric:
        assert (form >= 0).all()
    else:
        assert (form < 0).any()


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_geometry_is_that_of_the_dense_metric(options):
    head = odd_head(options)
    geometry = HeadDistances(head).geometry()
    sigma = head.metric.sigma().detach()
    torch.testing.assert_close(geometry.spectrum, torch.linalg.eigvalsh(head.sigma().detach()).flip(0))
    # the metric's own 1-form on the unit vectors, without smoothing: (F(v) - F(-v)) / 2 of a Randers one
    beta = head.metric.beta.detach()
    if not head.metric.symmetric:
        eye = torch.eye(12, dtype=torch.float64)
        beta = ((head.metric.norm(eye) - head.metric.norm(-eye)) / (2 * head.metric.lmbda.abs())).detach()
    dual = (beta @ torch.linalg.solve(sigma, beta)).sqrt()
    torch.testing.assert_close(torch.tensor(geometry.dual_norm, dtype=torch.float64), dual)
    torch.testing.assert_close(geometry.whitened.norm(), dual)
    torch.testing.assert_close(geometry.beta, beta.abs().sort(descending=True).values)
    assert geometry.strongest == pytest.approx(float(head.metric.lmbda.detach().abs()) * float(dual))
    if not head.metric.symmetric:
        assert geometry.strongest < 1  # positive by construction


def test_pictures_give_the_models_input_and_the_image(images):
    loader = loader_of(images, "val")
    pictures = Pictures.of(loader)
    straight = torch.cat([x for x, _ in loader])
    order = [5, 0, 3]
    batches = list(pictures.batches(order))
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), straight[order])
    assert torch.cat([t for _, t in batches]).tolist() == pictures.targets()[order].tolist()
    assert pictures[5].shape == (32, 32, 3) and pictures[5].dtype == np.uint8
    mean = torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(
        (torch.from_numpy(pictures[5]).float() / 255 - mean) / mean, straight[5].permute(1, 2, 0), rtol=1e-4, atol=1e-4
    )
    assert Pictures.of(None) is None
    assert (
        Pictures.of(
            SimpleNamespace(dataset=timm.data.IterableImageDataset.__new__(timm.data.IterableImageDataset), mean=0)
        )
        is None
    )


def test_grey_pictures_have_no_channel_axis(images):
    assert Pictures.of(loader_of(images, "val", channels=1))[0].shape == (32, 32)


def test_features_are_what_the_head_gets(images):
    model = timm.create_model("faim_test_resnet", num_classes=3, faim_cfg={"space": "sphere"}).train()
    loader = loader_of(images, "train")
    features, labels = head_features(model, Pictures(loader), range(12))
    assert model.training and not model.fc._forward_pre_hooks
    model.eval()
    x = torch.cat([x for x, _ in loader])
    with torch.no_grad():
        expected = model.fc.embed(model.forward_head(model.forward_features(x), pre_logits=True).double())
    torch.testing.assert_close(features["fc"], expected, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_typical_images_are_the_nearest_of_the_class():
    head, features = odd_head({}), torch.randn(40, 12, dtype=torch.float64)
    labels, pool = np.arange(40) % 4, 100 + np.arange(40)
    typical = examples_of.typical_images(HeadDistances(head), features, pool, labels, [1, 4])
    d = head.metric.reference(features, head.project(head.mu.detach()))[:, 1].detach()
    own = np.flatnonzero(labels == 1)
    nearest = own[np.argsort(d[own].numpy())][:3]
    assert typical[1].indices.tolist() == (100 + nearest).tolist()
    np.testing.assert_allclose(typical[1].distances, d[nearest])
    assert len(typical[4].indices) == 0


def evaluation_of(correct, confidence, C=100):
    N = len(correct)
    target = np.arange(N) % C
    return Evaluation(
        C,
        np.arange(N),
        target,
        np.where(correct, target, (target + 1) % C),
        np.array(confidence),
        np.ones(N),
        np.ones(N),
        np.array(correct),
    )


def test_examples_are_a_mix_of_sure_unsure_and_wrong():
    rng = np.random.default_rng(0)
    evaluation = evaluation_of(rng.random(60) < 0.6, rng.random(60))
    chosen = examples_of.choose_examples(evaluation)
    right, wrong = np.flatnonzero(evaluation.correct), np.flatnonzero(~evaluation.correct)
    by_confidence = sorted(right, key=lambda i: -evaluation.confidence[i])
    assert set(chosen[:3]) == set(by_confidence[:3]) and set(chosen[3:5]) == set(by_confidence[-2:])
    assert set(chosen[5:]) == set(sorted(wrong, key=lambda i: -evaluation.confidence[i])[:3])


@pytest.mark.parametrize(
    ("correct", "count"),
    [([True] * 20, 8), ([False] * 20, 8), ([True] * 2 + [False], 3), ([True] * 3 + [False] * 9, 8), ([True], 1)],
)
def test_examples_fill_up_from_what_there_is(correct, count):
    chosen = examples_of.choose_examples(evaluation_of(correct, np.linspace(0.1, 0.9, len(correct))))
    assert len(set(chosen.tolist())) == len(chosen) == count


def test_examples_prefer_different_classes():
    chosen = examples_of.choose_examples(evaluation_of([True] * 60, np.linspace(0.1, 0.9, 60), C=4))
    assert sorted(chosen[:3] % 4) == [1, 2, 3]


def test_pool_holds_the_classes_that_are_shown():
    targets = np.repeat(np.arange(10), 500)
    pool = examples_of.choose_pool(targets, len(targets), [2, 7])
    assert set(targets[pool]) == {2, 7} and len(pool) == 128 and len(set(pool)) == 128
    assert pool.min() == 1000 and pool.max() == 3999  # spread over the class
    many = examples_of.choose_pool(np.arange(5000), 5000, range(5000))
    assert len(many) == 2000
    assert len(examples_of.choose_pool(None, 7, [0])) == 7 and len(examples_of.choose_pool(None, 9999, [0])) == 2000
    assert len(examples_of.choose_pool(targets, len(targets), [11])) == 0


def test_rival_is_the_true_class_or_the_second_choice():
    head, features = odd_head({}), torch.randn(6, 12, dtype=torch.float64)
    order = (-head.metric(features, head.project(head.mu))).argsort(1, descending=True).numpy()
    target = order[:, 0].copy()
    target[4:] = order[4:, 3]
    evaluation = Evaluation(5, np.arange(6), target, order[:, 0], *[np.ones(6)] * 4)
    rivals = examples_of.Examples.of(np.arange(6), features, HeadDistances(head), evaluation).rivals
    assert rivals.tolist() == [*order[:4, 1], *target[4:]]


class Read(HTMLParser):
    """Pictures, texts and references of a page; checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.images, self.text, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert not {"href", "onload"} & set(attrs) and tag not in ("script", "link", "iframe")
        if tag == "img":
            self.images.append(attrs)
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def report_of(tmp_path, images, name, history=(), channels=3, label_names=("bird", "cat", "dog"), **options):
    model = timm.create_model(name, num_classes=3, in_chans=channels, **options).eval()
    train, val = (
        loader_of(
            images,
            split,
            channels,
            timm.data.resolve_model_data_config(model)["input_size"][-1] if "vit" in name or "deit" in name else 32,
        )
        for split in ("train", "val")
    )
    evaluation = collect(model, val, Accelerator(cpu=True))
    (tmp_path / "args.yaml").write_text("model: x\nscale: [0.1, 1.0]\nfaim_cfg: {margin: 0.2}\namp: true\n")
    page = write_report(
        tmp_path,
        model,
        history,
        label_names=label_names,
        evaluation=evaluation,
        train_images=train,
        val_images=val,
        options=tmp_path / "args.yaml",
    )
    assert page == tmp_path / "report.html"
    return Read(page.read_text(encoding="utf-8")), {p.name for p in tmp_path.rglob("*.png")}


HISTORY = [
    {
        "epoch": str(e + 1),
        "train_loss": str(3 - e),
        "eval_loss": str(3.1 - e),
        "train_top1": "1",
        "eval_top1": str(e),
        "eval_top5": "90",
        "lr": "0.01",
        "train_lr_head": "0.1",
        "train_lr_backbone": "0.001",
        "train_lambda": "0.1",
        "train_gamma": "10",
    }
    for e in range(4)
]


def test_page_is_whole_and_needs_no_other_file(images, tmp_path):
    page, files = report_of(tmp_path, images, "faim_test_resnet", HISTORY, label_names=["<b>bird", "c$a$t", "犬"])
    assert files >= {"learning_curve.png", "confusion.png", "calibration.png", "head.png", "prototypes.png"}
    assert len(page.images) == len(files)
    for image in page.images:
        head, data = image["src"].split(",")
        assert head == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
        assert len(image["alt"]) > 20
    text = " ".join(page.text)
    assert "<b>bird" in text  # escaped, or the parser would have met a tag
    assert all(word in text for word in ("top-1", "margin=0.2", "0.1 1.0", "full Σ, on the indicatrix", "true"))
    assert not re.search(r"\bnan\b|1-form|λ", text, re.IGNORECASE)  # there is none


def test_pictures_of_the_evaluation_are_not_drawn_twice(images, tmp_path):
    (tmp_path / "eval").mkdir()
    for name in ("confusion.png", "calibration.png"):
        (tmp_path / "eval" / name).write_bytes(b"\x89PNG" + name.encode())
    page, _ = report_of(tmp_path, images, "faim_test_resnet")
    assert not {p.name for p in (tmp_path / "report").iterdir()} & {"confusion.png", "calibration.png"}
    embedded = [base64.b64decode(image["src"].split(",")[1]) for image in page.images]
    assert b"\x89PNGconfusion.png" in embedded


def test_page_of_a_full_directed_metric_on_the_sphere(images, tmp_path):
    options = {"full_sigma": True, "symmetric": False, "space": "sphere", "lambda_init": 2.0}
    page, files = report_of(tmp_path, images, "faim_test_resnet", faim_cfg=options)
    assert {"head.png", "prototypes.png"} <= files and "learning_curve.png" not in files
    assert "Σ = I, Randers, on the sphere" in page.text and "λ √(βᵀΣ⁻¹β)" in page.text


def test_page_of_a_linear_model_has_curves_and_confusion_only(images, tmp_path):
    page, files = report_of(tmp_path, images, "test_resnet", HISTORY, label_names=None)
    assert not {"head.png", "prototypes.png"} & files
    assert {"learning_curve.png", "confusion.png", "calibration.png"} <= files
    assert "FAIM head" not in " ".join(page.text)


def test_page_of_two_heads_shows_both(images, tmp_path):
    model = "faim_deit_tiny_distilled_patch16_224"
    history = [
        {"train_lambda_head": 0.1, "train_gamma_head": 9, "train_lambda_head_dist": 0.2, "train_gamma_head_dist": 8}
    ]
    page, files = report_of(tmp_path, images, model, history, depth=1, embed_dim=24, num_heads=2)
    assert {"head0.png", "head1.png", "prototypes.png"} <= files
    assert "head_dist" in page.text


def test_page_of_grey_images_and_of_a_transformer(images, tmp_path):
    _, files = report_of(tmp_path, images, "faim_test_vit", channels=1)
    assert "prototypes.png" in files


def test_report_measures_the_share_on_the_predicted_prototypes(images, tmp_path, monkeypatch):
    """The number in the table is the mean of λ|β'v| / d over all 7 images."""
    model = timm.create_model("faim_test_resnet", num_classes=3, faim_cfg={"preset": "flat", "lambda_init": 0.8}).eval()
    val = loader_of(images, "val")
    evaluation = collect(model, val, Accelerator(cpu=True))
    page = write_report(tmp_path, model, [], evaluation=evaluation, val_images=val)
    (head,) = faim_heads(model).values()
    with torch.no_grad():
        x = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in val])
        v = (x - head.mu[torch.from_numpy(evaluation.prediction)]).double()
        form = 0.8 * ((v @ head.metric.beta.double()).square() + 1e-6).sqrt()
        share = 100 * (form / head.metric.norm(v)).mean()
    assert f"<td>{share:.2f} %</td>" in page.read_text(encoding="utf-8")
    assert not (tmp_path / "report" / "prototypes.png").exists()  # no training images were given


def test_report_without_anything_or_matplotlib(tmp_path, monkeypatch):
    model = timm.create_model("faim_test_resnet", num_classes=3)
    page = write_report(tmp_path, model, [])
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"head.png"} and page.exists()
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert write_report(tmp_path / "b", model, HISTORY) is None and not (tmp_path / "b").exists()
    assert plots.draw_learning_curve(tmp_path / "c.png", HISTORY) is False


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 3000, "args.yaml cannot be read: nested too deeply"),
        (b"\xff\xfe\x00", "args.yaml cannot be read"),
        (b"- <b>", "&lt;b&gt;"),
    ],
)
def test_options_of_no_use_are_said_to_be_so(tmp_path, content, said):
    (tmp_path / "args.yaml").write_bytes(content)
    page = write_report(tmp_path, timm.create_model("test_resnet", num_classes=3), [], options=tmp_path / "args.yaml")
    assert said in page.read_text(encoding="utf-8")


def drawn(monkeypatch, draw, *args):
    """The figure that a draw_* function would save."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, dpi=100: figures.append(figure))
    assert draw(*args) is True
    return figures[0]


def test_curves_show_rates_and_the_best_epoch(monkeypatch):
    _, top1, rates = drawn(monkeypatch, plots.draw_learning_curve, "x.png", HISTORY).axes
    labels = [line.get_label() for line in top1.get_lines()]
    assert "best: 3.00 % (epoch 4)" in labels and "validation, top-5" in labels
    assert {line.get_label() for line in rates.get_lines()} >= {"head", "backbone"}
    assert rates.get_yscale() == "log"


def test_curves_leap_over_epochs_without_validation(monkeypatch):
    rows = [
        {"epoch": 1, "train_loss": 2.0, "eval_loss": ""},
        {"epoch": 2, "train_loss": 1.0, "eval_loss": 1.5},
        {"epoch": 3, "train_loss": 0.5, "eval_loss": None},
        {"epoch": 4, "train_loss": 0.4, "eval_loss": 1.0},
    ]
    loss, _ = drawn(monkeypatch, plots.draw_learning_curve, "x.png", rows).axes
    (validation,) = [line for line in loss.get_lines() if line.get_label() == "validation"]
    assert validation.get_xdata().tolist() == [2, 4] and validation.get_ydata().tolist() == [1.5, 1.0]


def test_curves_of_other_metrics(monkeypatch):
    rows = [{"train_loss": 1.0, "eval_loss": 1.0, "eval_map": 40 + e, "eval_samples": 7} for e in range(2)]
    _, metrics = drawn(monkeypatch, plots.draw_learning_curve, "x.png", rows).axes
    assert [line.get_label() for line in metrics.get_lines()] == ["map"]


def test_curve_needs_rows(tmp_path):
    assert plots.draw_learning_curve(tmp_path / "x.png", []) is False and not (tmp_path / "x.png").exists()
    assert plots.draw_learning_curve(tmp_path / "x.png", [{}]) is True


def test_names_for_pictures():
    assert class_name(["a"], 0) == "a" and class_name(["a"], 3) == "3" and class_name(None, 2) == "2"
    assert short_name(["x" * 30 + "end"], 0, 11) == "xxxxx…xxend"
    assert short_name(["5$"], 0) == r"5\$"
