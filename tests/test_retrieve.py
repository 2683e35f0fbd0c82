"""Retrieval: exact search, Recall@K, mAP@R and NMI against loops, and the command from images to files."""

import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import make_images, train_tiny
from sklearn.metrics import normalized_mutual_info_score

from timm_faim import PRESETS, FAIMHead
from timm_faim.commands import build_parser, main
from timm_faim.retrieval import (
    average_precision_at_r,
    clustering_nmi,
    command,
    count_positives,
    distances_of,
    lloyd,
    nearest,
    rank,
)
from timm_faim.retrieval import images as retrieval_images
from timm_faim.retrieval.distances import euclidean
from timm_faim.retrieval.sheet import Tile, choose_rows, draw_sheet, sheet_size
from timm_faim.run.errors import UserError
from timm_faim.run.weights import save_config, save_weights

FLAT = PRESETS["flat"] | {"lambda_init": 0.8}
HEADS = {
    "default": {},
    "flat": FLAT,
    "full": FLAT | {"full_sigma": True},
    "randers": FLAT | {"symmetric": False},
    "sphere": {"space": "sphere"},
    "full randers on the sphere": {"full_sigma": True, "symmetric": False, "space": "sphere"},
}


def odd_head(D=6, **options):
    """A head whose metric is far from its start."""
    head = FAIMHead(D, 3, **{"lambda_init": 0.8, **options})
    with torch.no_grad():
        for parameter in head.metric.parameters():
            if head.is_flat or parameter is not head.metric.log_sigma_diag:
                parameter.add_(0.3 * torch.randn_like(parameter))
        head.metric.beta.copy_(torch.randn(D))
    return head


def labelled(N=41, D=6):
    """Features that cluster loosely by class, with 6 classes of 3 to 11."""
    labels = (torch.arange(N) + 1).double().sqrt().long() - 1
    return torch.randn(6, D)[labels] + torch.randn(N, D), labels


def whole(found):
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def brute_force(query, gallery, literal_distance, k, exclude_self):
    """Neighbours by a loop over queries: distances in float32, equal ones by number."""
    chosen = []
    for i, row in enumerate(literal_distance(query, gallery).float().tolist()):
        pairs = sorted((d, j) for j, d in enumerate(row) if not (exclude_self and i == j))
        chosen.append([j for _, j in pairs[:k]])
    return torch.tensor(chosen)


def literal(name, head):
    """The distance [B, N] of raw features [B, D] and [N, D], in float64, by its definition."""

    def of(x, y):
        if name == "FAIM":
            return head.metric.reference(head.embed(x), head.embed(y))
        if name == "Euclidean":
            return (x[:, None] - y).norm(dim=-1)
        return 1 - torch.nn.functional.cosine_similarity(x[:, None], y, dim=-1).float()

    return of


# Search


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@torch.no_grad()
def test_search_is_brute_force_whatever_the_chunk(options, chunk):
    head, (features, _) = odd_head(**options), labelled()
    x = features.double()
    for distance in distances_of(head, torch.device("cpu")):
        points = distance.embed(x)
        for exclude_self, query in ((True, x), (False, x[5:17] + 0.1)):
            d, index = whole(nearest(distance.embed(query), points, distance.between, 9, exclude_self, chunk))
            expected = brute_force(query, x, literal(distance.name, head), 9, exclude_self)
            assert torch.equal(index, expected), distance.name
            assert (d.diff(dim=1) >= 0).all()
            if exclude_self:
                assert not (index == torch.arange(len(x))[:, None]).any()


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_equal_distances_are_ordered_by_number(chunk):
    gallery = torch.tensor([[0.3], [1.1], [0.3], [1.1], [0.3], [-0.5]], dtype=torch.float64) * torch.randn(5).double()
    d, index = whole(nearest(gallery, gallery, euclidean, 5, True, chunk))
    assert index[0].tolist() == [2, 4, 1, 3, 5] and index[2].tolist() == [0, 4, 1, 3, 5]
    assert d[0, :2].tolist() == [0, 0] and index[3, 0] == 1


def test_search_orders_negative_numbers_too():
    values = torch.tensor([[-1.0], [2.0], [-3.0], [0.0], [-1.0], [math.inf]])
    _, index = whole(nearest(torch.zeros(1, 1), values, lambda x, y: y.t().expand(len(x), -1), 6))
    assert index.tolist() == [[2, 0, 4, 3, 1, 5]]


def test_search_says_what_it_cannot_do():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"1\.\.4, the number of gallery points, got 5"):
        nearest(x, x, euclidean, 5)
    with pytest.raises(ValueError, match=r"1\.\.3, the number of gallery points besides the query, got 4"):
        nearest(x, x, euclidean, 4, exclude_self=True)
    with pytest.raises(ValueError, match="4 points, got 2"):
        nearest(x[:2], x, euclidean, 1, exclude_self=True)
    with pytest.raises(ValueError, match="chunk must be >= 1, got 0"):
        nearest(x, x, euclidean, 1, chunk=0)


def test_a_randers_distance_goes_from_the_query_to_the_gallery():
    head = odd_head(symmetric=False)
    faim = distances_of(head, torch.device("cpu"))[0]
    query, gallery = torch.randn(8, 6).double(), torch.randn(30, 6).double()
    with torch.no_grad():
        there = head.metric.norm(query[:, None] - gallery)
        back = head.metric.norm(gallery - query[:, None])
        d, index = whole(nearest(query, gallery, faim.between, 30))
    torch.testing.assert_close(d, there.sort(1).values.float())
    assert torch.equal(index, there.argsort(1)) and not torch.equal(index, back.argsort(1))


# Metrics


def by_loops(neighbours, query_labels, gallery_labels, at, exclude_self):
    """Recall@K and mAP@R from ordered neighbours, query by query."""
    hits, precisions = {k: [] for k in at}, []
    for i, label in enumerate(query_labels.tolist()):
        R = sum(int(g == label) for g in gallery_labels.tolist()) - exclude_self
        if R == 0:
            continue
        right = [gallery_labels[j] == label for j in neighbours[i].tolist()]
        for k in at:
            hits[k].append(any(right[:k]))
        precisions.append(sum(sum(right[: n + 1]) / (n + 1) for n in range(R) if right[n]) / R)
    return {k: np.mean(h) for k, h in hits.items()}, np.mean(precisions)


@pytest.mark.parametrize("chunk", [1, 8, None])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_recall_and_map_are_those_of_a_loop(chunk, exclude_self):
    x, labels = labelled()
    labels[3], labels[7] = 8, 9  # classes of a single image
    query, query_labels = (x, labels) if exclude_self else (x[::2] + 0.3, labels[::2].where(x[::2, 0] > -1, 7))
    order = torch.cdist(query, x)
    if exclude_self:
        order.fill_diagonal_(math.inf)
    expected = by_loops(order.argsort(1), query_labels, labels, (1, 2, 10), exclude_self)
    found = rank(query.double(), query_labels, x.double(), labels, euclidean, (1, 2, 10), 3, exclude_self, chunk)
    assert found.recall() == pytest.approx(expected[0]) and found.map_at_r() == pytest.approx(expected[1])
    assert torch.equal(found.first_QK, order.argsort(1)[:, :3])
    assert ((found.positives_Q == 0).sum() > 0) and not found.hits_QM[found.positives_Q == 0].any()


def test_map_is_that_of_pytorch_metric_learning():
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator").AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        kmeans_func=len,
        device=torch.device("cpu"),
        knn_func=lambda q, k, r, same: whole(nearest(q, r, euclidean, k, same)),
    )
    x, labels = labelled()
    labels[3] = 8  # alone
    theirs = calculator.get_accuracy(x, labels)
    ours = rank(x, labels, x, labels, euclidean, (1,), exclude_self=True)
    assert ours.recall()[1] == pytest.approx(theirs["precision_at_1"])
    assert ours.map_at_r() == pytest.approx(theirs["mean_average_precision_at_r"])


def test_average_precision_at_r_of_cases_by_hand():
    correct = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    positives = torch.tensor([3, 2, 2, 4, 0])
    assert average_precision_at_r(correct, positives).tolist() == pytest.approx([(1 + 2 / 3) / 3, 0.25, 0, 1, 0])
    assert count_positives(torch.tensor([0, 2, 4]), torch.tensor([0, 0, 2]), False).tolist() == [2, 1, 0]


def lloyd_by_loops(points, initial, embed, literal_distance):
    centres, labels = points[initial], None
    for _ in range(50):
        d = literal_distance(points, centres).tolist()
        new = [min(range(len(row)), key=lambda c, row=row: (np.float32(row[c]), c)) for row in d]
        if new == labels:
            break
        labels = new
        for c in range(len(centres)):
            own = [x for x, label in zip(points, labels, strict=True) if label == c]
            if own:
                centres[c] = embed(torch.stack(own).mean(0))
    return labels


@torch.no_grad()
def test_clusters_are_those_of_a_loop_for_every_distance():
    x, labels = labelled()
    for options in ({}, {"symmetric": False, "space": "sphere"}):
        head = odd_head(**options)
        for distance in distances_of(head, torch.device("cpu")):
            points = distance.embed(x.double())
            generator = torch.Generator().manual_seed(1)
            initials = [torch.randperm(len(x), generator=generator)[:6] for _ in range(2)]
            expected = [
                lloyd_by_loops(points, initial, distance.embed, literal(distance.name, head)) for initial in initials
            ]
            assert [lloyd(points, distance, initial).tolist() for initial in initials] == expected, distance.name
            nmi = np.mean([normalized_mutual_info_score(labels, clusters) for clusters in expected])
            assert clustering_nmi(points, labels, distance, restarts=2, seed=1) == pytest.approx(nmi)


def test_nmi_of_separate_classes_is_one_and_an_empty_cluster_stays_empty():
    centres = torch.tensor([[0.0, 5], [5, 0], [-5, 0]], dtype=torch.float64)
    labels = torch.arange(3).repeat_interleave(4)
    points = centres[labels] + 0.01 * torch.randn(12, 2).double()
    for distance in distances_of(odd_head(2), torch.device("cpu")):
        clusters = lloyd(points, distance, torch.tensor([0, 4, 8]))
        assert normalized_mutual_info_score(labels, clusters) == pytest.approx(1)
    same = torch.ones(4, 2, dtype=torch.float64)
    assert lloyd(same, distances_of(odd_head(2), torch.device("cpu"))[1], torch.tensor([0, 1])).tolist() == [0] * 4


# Sheet


def test_half_of_the_rows_are_random_and_half_wrong():
    right = np.arange(40) % 4 != 0
    has_positives = np.arange(40) < 36
    random, wrong = choose_rows(has_positives, right, 8, seed=3)
    assert len(random) == len(wrong) == 4 and not set(random) & set(wrong)
    assert not right[wrong].any() and max(random + wrong) < 36
    assert choose_rows(has_positives, right, 8, seed=3) == (random, wrong) != choose_rows(has_positives, right, 8, 4)
    random, wrong = choose_rows(has_positives, np.ones(40, bool), 8, 0)
    assert len(random) == 8 and wrong == []
    random, wrong = choose_rows(has_positives[:3], np.zeros(3, bool), 8, 0)
    assert sorted(random + wrong) == [0, 1, 2]


def test_sheet_shows_grey_tall_and_oddly_named_pictures(tmp_path):
    grey, tall = np.full((20, 30), 128, np.uint8), np.full((90, 1, 3), 255, np.uint8)
    row = [
        Tile(grey, "a name that is much longer than two lines of a small picture can hold", None),
        Tile(tall, "", True),
        Tile(grey, "$x$ 猫 é", False),
    ]
    draw_sheet(tmp_path / "sheet.png", [("first", [row, row]), ("none", []), ("last", [row])], 2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == sheet_size([2, 0, 1], 2) and sheet.size == sheet_size([2, 1], 2)
        colors = {color for _, color in sheet.getcolors(2**20)}
    assert {(0x2E, 0x8B, 0x57), (0xC0, 0x39, 0x2B), (128, 128, 128)} <= colors
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


# The command


@pytest.fixture(autouse=True)
def one_thread():
    """More only get in each other's way on tiny images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, images):
    """A run folder."""
    return train_tiny(images, tmp_path_factory.mktemp("runs"), "--epochs", "1", model="faim_test_resnet")


@pytest.fixture
def retrieve(checkpoint, tmp_path):
    """Run the command in this process, by default on the checkpoint."""

    def retrieve(*argv, checkpoint=checkpoint, output=tmp_path / "out"):
        words = (*argv, "--model", checkpoint, "--output", output, "--workers", 0, "--recall-at", 1, 2)
        return command.retrieve(build_parser("retrieve").parse_args([str(word) for word in words]))

    return retrieve


def saved(folder, model="faim_test_resnet", **options):
    """A tiny model with fresh weights, saved as a folder that timm opens."""
    model = timm.create_model(model, num_classes=3, **options)
    folder.mkdir()
    save_config(model, folder / "config.json", timm.data.resolve_input_data_config(model), None, pretrained=False)
    save_weights(model.state_dict(), folder, is_best=True)
    return folder


def test_leave_one_out_from_the_command_line_to_the_files(checkpoint, images, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "timm-faim",
            "retrieve",
            str(images / "train"),
            "--model",
            str(checkpoint),
            "--workers",
            "0",
            "--recall-at",
            "1",
            "5",
            "11",
            "--sheet-rows",
            "4",
        ],
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "12 queries of 3 classes, each against all others" in said and "directed" not in said
    folder = checkpoint / "retrieval"
    assert {p.name for p in folder.iterdir()} == {"retrieval.json", "neighbours.png"}
    facts = json.loads((folder / "retrieval.json").read_text(), parse_constant=pytest.fail)
    assert facts["leave_one_out"] and facts["queries"] is None and facts["architecture"] == "faim_test_resnet"
    assert (facts["gallery_images"], facts["gallery_classes"], facts["queries_without_positives"]) == (12, 3, 0)
    assert list(facts["results"]) == ["FAIM", "Euclidean", "cosine"]
    table = said.splitlines()[-5:-1]
    assert (
        table[0].split()[2:] == list(facts["results"]["FAIM"]) == ["Recall@1", "Recall@5", "Recall@11", "mAP@R", "NMI"]
    )
    for line, (name, scores) in zip(table[1:], facts["results"].items(), strict=True):
        assert line.split() == [name, *(f"{score:.2f}" for score in scores.values())]
        assert 0 < scores["Recall@1"] <= scores["Recall@5"] <= scores["Recall@11"] == 100
    with Image.open(folder / "neighbours.png") as sheet:
        assert sheet.width == sheet_size([1], 8)[0]
        assert sheet.height in [sheet_size(split, 8)[1] for split in ([4], [3, 1], [2, 2])]


def test_scores_are_those_of_the_head_on_its_input(retrieve, checkpoint, images):
    """The whole way by hand: timm's transform, the head's input, the literal metric, loops."""
    facts = retrieve(images / "train", "--no-sheet")
    model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    paths = sorted((images / "train").rglob("*.png"))
    labels = torch.tensor([("bird", "cat", "dog").index(path.parent.name) for path in paths])
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(path)) for path in paths])
        x = model.forward_head(model.forward_features(batch), pre_logits=True).double()
        d = model.get_classifier().metric.reference(x, x).fill_diagonal_(math.inf)
    recall, precision = by_loops(d.argsort(1), labels, labels, (1, 2), True)
    scores = facts["results"]["FAIM"]
    assert scores["Recall@1"] == pytest.approx(100 * recall[1], abs=1e-3)
    assert scores["mAP@R"] == pytest.approx(100 * precision, abs=1e-3)


def test_queries_of_a_folder_of_their_own_with_a_class_that_the_gallery_lacks(retrieve, images, tmp_path, capsys):
    query = make_images(tmp_path / "query", train=1, val=2, classes=("cat", "eel")) / "val"
    facts = retrieve(images / "train", "--queries", query, "--sheet-rows", 3)
    assert (facts["query_images"], facts["gallery_images"], facts["queries_without_positives"]) == (5, 12, 2)
    assert not facts["leave_one_out"]
    said = capsys.readouterr().out
    assert "5 queries of 2 classes, against 12 gallery images of 3 classes" in said
    assert "2 queries have no positives and are left out" in said and "that the gallery lacks (eel)" in said


def test_a_class_of_one_image_is_left_out(retrieve, tmp_path, capsys):
    images = make_images(tmp_path / "images") / "train"
    for path in sorted((images / "dog").iterdir())[1:]:
        path.unlink()
    assert retrieve(images, "--no-sheet")["queries_without_positives"] == 1
    assert "1 queries have no positives" in (said := capsys.readouterr().out) and "a single image (dog)" in said


def test_grey_randers_model_under_amp(retrieve, images, tmp_path, capsys):
    model = saved(tmp_path / "grey", in_chans=1, faim_cfg={"symmetric": False, "space": "sphere"})
    facts = retrieve(images / "val", "--amp", checkpoint=f"local-dir:{model}")
    assert facts["symmetric"] is False and facts["amp"] is True
    assert "directed (Randers): d_F(query, gallery) = F(query - gallery)" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "neighbours.png") as sheet:
        assert sheet.width == sheet_size([1], 6)[0]  # 7 images: 6 neighbours


def test_unreadable_images_are_named_or_left_out(retrieve, tmp_path, capsys):
    images = make_images(tmp_path / "images") / "train"
    (images / "cat" / "9.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read image .*cat/9\.png .*--skip-unreadable"):
        retrieve(images)
    assert retrieve(images, "--skip-unreadable")["gallery_images"] == 12
    assert "1 images of the gallery cannot be read and are left out" in capsys.readouterr().out


def test_features_that_are_not_finite_name_the_image(retrieve, images, monkeypatch):
    whole_mean = retrieval_images.pooled

    def poisoned(x, width):
        x = whole_mean(x, width).clone()
        x[-1] = math.nan
        return x

    monkeypatch.setattr(retrieval_images, "pooled", poisoned)
    with pytest.raises(UserError, match=r"features of .*cat/1\.png are not finite"):
        retrieve(images / "train", "--batch-size", 6)


def one_class(root):
    for name in ("bird", "dog"):
        for path in (root / name).iterdir():
            path.unlink()


def single_images(root):
    for folder in root.iterdir():
        for path in sorted(folder.iterdir())[1:]:
            path.unlink()


def no_images(root):
    for path in root.rglob("*.png"):
        path.unlink()


def flat(root):
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        path.rename(root / f"{i}.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_class, r"DIR .* has one class \(cat\).*at least two"),
        (flat, r"DIR .* has one class \(train\)"),
        (single_images, r"every class of DIR .* has a single image.*--queries"),
        (no_images, r"cannot open the images of DIR .*Found 0 images"),
    ],
)
def test_folders_without_an_answer(retrieve, tmp_path, change, message):
    root = make_images(tmp_path / "images") / "train"
    change(root)
    with pytest.raises(UserError, match=message):
        retrieve(root)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{images}/none"], r"DIR .*/none is no folder"),
        (["{images}/train", "--queries", "{images}/none"], r"--queries .*/none is no folder"),
        (["{images}/train", "--queries", "{images}/val/../train"], "is the gallery itself"),
        (["{images}/train", "--queries", "{other}/val"], r"no class in common \(queries: ape, eel; gallery: bird, cat"),
        (["{images}/train", "--batch-size", "0"], "--batch-size must be .* got 0"),
        (["{images}/train", "--sheet-rows", "0"], "--sheet-rows must be .* got 0"),
        (["{images}/train", "--device", "toaster"], "--device toaster cannot be used"),
    ],
)
def test_wrong_options_are_one_line(retrieve, images, tmp_path, argv, message):
    other = make_images(tmp_path / "other", classes=("ape", "eel"))
    with pytest.raises(UserError, match=message) as error:
        retrieve(*(word.format(images=images, other=other) for word in argv))
    assert "\n" not in str(error.value)


def test_more_neighbours_than_images(checkpoint, images, tmp_path):
    with pytest.raises(UserError, match=r"Recall@10 needs as many gallery images.*there are 6\. .*--recall-at"):
        command.retrieve(
            build_parser("retrieve").parse_args(
                [str(images / "val"), "--model", str(checkpoint), "--output", str(tmp_path)]
            )
        )


def test_models_without_the_head_that_is_needed(retrieve, images, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no folder and no timm model. Did you mean .*faim_test_resnet"):
        retrieve(images / "train", checkpoint="faim_test_resnets")
    with pytest.raises(UserError, match=r"cannot open --model .*config\.json"):
        retrieve(images / "train", checkpoint=tmp_path)
    with pytest.raises(UserError, match="has no FAIM head"):
        retrieve(images / "train", checkpoint=saved(tmp_path / "linear", "test_resnet"))
    broken = timm.create_model("faim_test_resnet")
    torch.nn.init.constant_(broken.get_classifier().metric.beta, math.nan)
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: broken)
    with pytest.raises(UserError, match="parameters that are not finite"):
        retrieve(images / "train", checkpoint="faim_test_resnet")
    monkeypatch.undo()
    two = timm.create_model("faim_deit_tiny_distilled_patch16_224", num_classes=3, depth=1)
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: two)
    with pytest.raises(UserError, match=r"has 2 FAIM heads \(head, head_dist\)"):
        retrieve(images / "train", checkpoint="faim_test_resnet")


def test_an_error_is_one_line_and_status_1(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["retrieve", str(tmp_path), "--model", "nothing", "--output", str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith("timm-faim retrieve: error: --model nothing is no folder")
    assert said.count("\n") == 1
