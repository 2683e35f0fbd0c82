"""FAIMDistance in pytorch-metric-learning, and that library's miners, reducers and memory with our losses."""

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
from cases import FORMS, flat, random_metric
from loss_formulas import MARGIN, MATRIX_LOSSES, TEMPERATURE, build, oracle, oracle_ntxent, relative_error
from torch.nn import functional as F

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from timm_faim import FAIMDistance, FAIMHead, FAIMInfoNCELoss, FAIMNPairLoss, FAIMTripletLoss

DOCS = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
D = 5
LABELS = torch.tensor([0, 2, 0, 1, 0, 1, 2, 3, 2, 2])

ACCEPTS, REFUSES, NONE, SIMILARITY = "accepts it", "refuses it", "takes no distance", "reads a similarity"
EXPECTED = {
    name: (verdict, instead)
    for verdict, instead, names in [
        (
            ACCEPTS,
            "",
            """
        ContrastiveLoss GeneralizedLiftedStructureLoss IntraPairVarianceLoss LiftedStructureLoss MarginLoss
        MultiSimilarityLoss NCALoss NPairsLoss NTXentLoss NormalizedSoftmaxLoss ProxyAnchorLoss ProxyNCALoss
        RankedListLoss SupConLoss TripletMarginLoss BatchEasyHardMiner BatchHardMiner HDCMiner MultiSimilarityMiner
        PairMarginMiner TripletMarginMiner UniformHistogramMiner""",
        ),
        (
            REFUSES,
            "FAIMMarginLoss",
            """
        ArcFaceLoss CosFaceLoss InstanceLoss LargeMarginSoftmaxLoss SoftTripleLoss SphereFaceLoss
        SubCenterArcFaceLoss""",
        ),
        (REFUSES, "FAIMInfoNCELoss", "CircleLoss FastAPLoss PNPLoss SmoothAPLoss"),
        (REFUSES, "FAIMTripletLoss", "AngularLoss"),
        (REFUSES, "FAIMTripletLoss(soft_margin=True)", "DynamicSoftMarginLoss"),
        (REFUSES, "FAIMNPairLoss", "TupletMarginLoss"),
        (REFUSES, "ContrastiveLoss", "SignalToNoiseRatioContrastiveLoss ThresholdConsistentMarginLoss"),
        (REFUSES, "TripletMarginMiner", "AngularMiner"),
        (REFUSES, "BatchHardMiner or MultiSimilarityMiner", "DistanceWeightedMiner"),
        (SIMILARITY, "FAIMInfoNCELoss", "HistogramLoss"),
        (SIMILARITY, "FAIMMarginLoss", "ManifoldLoss"),
        (NONE, "", "EmbeddingsAlreadyPackagedAsTriplets P2SGradLoss VICRegLoss"),
    ]
    for name in names.split()
}
ABSTRACT = {"BaseMetricLossFunction", "GenericPairLoss", "BaseMiner"}
SAYS_NOTHING = {"SoftTripleLoss"}  # a bare assert

CLASSES, WIDTH = 5, 8
ARGUMENTS = dict(
    num_classes=CLASSES, embedding_size=WIDTH, descriptors_dim=WIDTH, l=WIDTH, K=CLASSES, margin=0.2, Tn=1.0
)  # what constructors of the library ask for


class CountingDistance(FAIMDistance):
    calls = 0

    def compute_mat(self, query_emb, ref_emb):
        self.calls += 1
        return super().compute_mat(query_emb, ref_emb)

    def pairwise_distance(self, query_emb, ref_emb):
        self.calls += 1
        return super().pairwise_distance(query_emb, ref_emb)


def library_classes():
    found = {**vars(losses), **vars(miners)}
    bases = (losses.BaseMetricLossFunction, miners.BaseMiner)
    return {name: c for name, c in found.items() if inspect.isclass(c) and issubclass(c, bases)}


def construct(cls, distance):
    """An object with what its constructors must be told."""
    needed = {
        name
        for c in cls.__mro__
        for name, p in inspect.signature(c.__init__).parameters.items()
        if p.default is inspect.Parameter.empty or name == "K"
    }
    return cls(distance=distance, **{name: ARGUMENTS[name] for name in needed & set(ARGUMENTS)})


def call(function, x, labels):
    try:
        return function(x, labels)
    except ValueError:  # no labels are taken, but classes in their place
        return function(x, indices_tuple=labels)


def classify(cls):
    """(verdict, what the library or we say to use instead), by trying."""
    distance = CountingDistance(in_features=WIDTH)
    labels = torch.arange(CLASSES).repeat_interleave(3)
    try:
        made = construct(cls, distance)
    except AssertionError as e:
        said = re.search("not FAIMDistance. Use (.*) instead", str(e))
        return REFUSES, said.group(1) if said else str(e)
    except ValueError as e:
        assert "cannot use a distance" in str(e)
        return NONE, ""
    centers = 2 * F.normalize(torch.randn(CLASSES, WIDTH), dim=1)
    x = (centers[labels] + 0.02 * torch.randn(len(labels), WIDTH)).requires_grad_()
    if isinstance(made, miners.BaseMiner):
        made(x, labels)
        return (ACCEPTS if distance.calls else NONE), ""
    with torch.no_grad():  # proxies, where there are any, at the centres
        for name, parameter in made.named_parameters():
            if not name.startswith("distance."):
                parameter.copy_(centers if parameter.shape == centers.shape else centers.t())
        good, bad = (call(made, x, classes) for classes in (labels, labels.roll(1)))
    if not distance.calls:
        return NONE, ""
    if not good < bad:  # classes that are clusters must be better than classes across clusters
        return SIMILARITY, ""
    points = torch.randn(len(labels), WIDTH, requires_grad=True)
    call(made, points, labels).backward()
    assert points.grad.any() and all(torch.isfinite(p.grad).all() for p in (points, *made.parameters()))
    assert distance.metric.beta.grad.any()
    return ACCEPTS, ""


def test_every_loss_and_miner_of_the_library_is_classified():
    newcomers = set(library_classes()) - set(EXPECTED) - ABSTRACT
    assert not newcomers, f"try them, and add them to EXPECTED and to docs/losses.md: {sorted(newcomers)}"


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("name", [n for n in EXPECTED if n in library_classes()])
def test_what_the_library_does_with_our_distance(name):
    verdict, said = classify(library_classes()[name])
    expected, instead = EXPECTED[name]
    assert verdict == expected
    if verdict == REFUSES:
        assert said == ("" if name in SAYS_NOTHING else instead)


def test_the_table_in_the_docs_is_the_classification():
    table = DOCS[DOCS.index("| with FAIMDistance |") :]
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", table, re.MULTILINE)[1:]
    listed = {
        name: (verdict.strip(), instead.replace("`", "").strip())
        for verdict, instead, names in rows
        for name in names.split(", ")
    }
    assert listed == EXPECTED
    assert len(listed) == sum(len(names.split(", ")) for _, _, names in rows)


def test_the_code_in_the_docs_runs():
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL):
        exec(code, scope)
    assert scope["indices"].shape == (16, 3) and torch.isfinite(scope["embeddings"].grad).all()
    assert len(scope["memory"].embedding_memory) == 4096


def test_a_refusal_of_another_distance_is_as_it_was():
    with pytest.raises(AssertionError) as caught:
        losses.ArcFaceLoss(num_classes=3, embedding_size=D, distance=losses.TripletMarginLoss().distance)
    assert "FAIM" not in str(caught.value)


# The distance


@pytest.mark.parametrize(("full", "symmetric"), FORMS)
def test_matrix_and_pairs_are_the_literal_distance_of_query_and_reference(full, symmetric):
    metric = random_metric(D, full, symmetric)
    x, y = torch.randn(6, D, dtype=torch.float64), torch.randn(6, D, dtype=torch.float64)
    distance = FAIMDistance(metric)
    expected = metric.reference(x, y)
    assert relative_error(distance(x, y), expected) <= 1e-12
    assert relative_error(distance(x), metric.reference(x, x)) <= 1e-5  # rounding of the zeros on the diagonal
    assert relative_error(distance.pairwise_distance(x, y), expected.diagonal()) <= 1e-12
    assert relative_error(FAIMDistance(metric, power=2)(x, y), expected**2) <= 1e-12
    backwards = relative_error(distance(y, x).t(), expected)
    assert backwards <= 1e-12 if symmetric else backwards > 1e-2


def test_it_normalises_as_a_head_does():
    head = FAIMHead(D, 3, space="sphere")
    distance = FAIMDistance(head, collect_stats=True)
    x = torch.randn(4, D)
    assert torch.allclose(-head.gamma() * distance(x, head.mu), head(x), atol=1e-5)
    assert distance.final_avg_query_norm == pytest.approx(1) != distance.initial_avg_query_norm
    zero = torch.zeros(2, D, requires_grad=True)
    distance(zero, head.mu).sum().backward()
    assert zero.grad.norm() < 1e6


@pytest.mark.parametrize("normalize", [False, True])
def test_half_precision_is_widened_before_it_is_subtracted(normalize):
    metric = random_metric(D, full_sigma=True, dtype=torch.float32)
    distance = FAIMDistance(metric, normalize_embeddings=normalize)
    x, y = (1 + torch.randn(64, D)).bfloat16(), (10 + torch.randn(64, D)).bfloat16()
    wide = distance(x.float(), y.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(x, y), wide.bfloat16())
    if not normalize:
        assert torch.equal(distance.pairwise_distance(x, y), wide.diagonal().bfloat16())


def test_its_metric_is_shared_or_owned():
    head = flat(D, 3)
    shared = losses.NTXentLoss(distance=FAIMDistance(head.metric))
    assert not list(shared.parameters())
    shared(torch.randn(10, D), LABELS).backward()
    assert all(p.grad.any() for p in head.metric.parameters())
    owned = losses.NTXentLoss(distance=FAIMDistance(in_features=D))
    assert len(list(owned.parameters())) == 3
    x = torch.randn(10, D)
    for other in (copy.deepcopy(owned), pickle.loads(pickle.dumps(owned))):
        assert torch.equal(other(x, LABELS), owned(x, LABELS)) and other.distance.metric is not owned.distance.metric
    with pytest.raises(ValueError, match="in_features.*neither"):
        FAIMDistance()
    with pytest.raises(ValueError, match="in_features.*both"):
        FAIMDistance(head.metric, D)
    with pytest.raises(ValueError, match="is_inverted"):
        FAIMDistance(in_features=D, is_inverted=True)
    with pytest.raises(ValueError, match=rf"\[\.\.\., {D}\]"):
        FAIMDistance(in_features=D)(torch.randn(4, D + 1))


@pytest.mark.parametrize("batch_size", [None, 3])
def test_nearest_neighbours_are_those_by_brute_force(batch_size):
    metric = random_metric(D, full_sigma=True, symmetric=False, dtype=torch.float32)
    query, reference = torch.randn(8, D), torch.randn(20, D)
    distances, indices = CustomKNN(FAIMDistance(metric), batch_size=batch_size)(query, 4, reference)
    expected = metric.reference(query, reference).sort(1)
    assert torch.equal(indices, expected.indices[:, :4])
    assert torch.allclose(distances, expected.values[:, :4], atol=1e-5)
    assert not torch.equal(indices, metric.reference(reference, query).t().argsort(1)[:, :4])


def test_accuracies_without_faiss():
    metric = random_metric(D, full_sigma=False, dtype=torch.float32)
    x, labels = torch.randn(30, D), torch.arange(30) % 4
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision"), device=torch.device("cpu"), knn_func=CustomKNN(FAIMDistance(metric))
    )
    got = calculator.get_accuracy(x, labels)
    nearest = metric.reference(x, x).fill_diagonal_(torch.inf).argsort(1)
    right = labels[nearest] == labels[:, None]
    counts = [int((labels == label).sum()) - 1 for label in labels]
    assert got["precision_at_1"] == pytest.approx(right[:, 0].float().mean().item())
    r_precision = sum(right[i, :r].float().mean().item() for i, r in enumerate(counts)) / 30
    assert got["r_precision"] == pytest.approx(r_precision)


# Our losses are theirs where the definitions coincide


@pytest.mark.parametrize(("full", "symmetric"), FORMS)
@pytest.mark.parametrize("setup", ["own", "ref", "pairs", "triplets"])
def test_our_losses_equal_those_of_the_library(full, symmetric, setup):
    metric = random_metric(D, full, symmetric)
    distance = FAIMDistance(metric)
    x = torch.randn(len(LABELS), D, dtype=torch.float64, requires_grad=True)
    given = (LABELS,)
    if setup == "ref":
        given = (LABELS, None, torch.randn(7, D, dtype=torch.float64), torch.tensor([1, 4, 0, 0, 2, 1, 2]))
    elif setup == "pairs":
        given = (LABELS, miners.MultiSimilarityMiner(distance=distance)(x, LABELS))
    elif setup == "triplets":
        given = (LABELS, miners.TripletMarginMiner(margin=1.0, distance=distance)(x, LABELS))
    both = [
        (FAIMTripletLoss(metric, margin=MARGIN, mining="all"), losses.TripletMarginLoss(MARGIN, distance=distance)),
        (
            FAIMTripletLoss(metric, mining="all", soft_margin=True),
            losses.TripletMarginLoss(0.0, smooth_loss=True, distance=distance),
        ),
    ]
    if setup != "triplets":  # there a pair counts as often as it comes; here once
        both += [
            (FAIMInfoNCELoss(metric, temperature=0.3), losses.NTXentLoss(0.3, distance=distance)),
            (FAIMInfoNCELoss(metric, temperature=0.3, form="supcon"), losses.SupConLoss(0.3, distance=distance)),
        ]
    if setup == "own":
        both.append((FAIMNPairLoss(metric, temperature=1.0), losses.NPairsLoss(distance=distance)))
    inputs = (x, *metric.parameters())
    for ours, theirs in both:
        values = ours(x, *given), theirs(x, *given)
        assert values[1] > 0
        assert relative_error(values[0], values[1]) <= 1e-9, ours
        for got, want in zip(*(torch.autograd.grad(v, inputs) for v in values), strict=True):
            assert relative_error(got, want) <= 1e-8, ours


def test_batch_hard_is_that_of_the_librarys_miner():
    metric = random_metric(D, full_sigma=True, symmetric=False)
    x, miner = torch.randn(10, D, dtype=torch.float64), miners.BatchHardMiner(distance=FAIMDistance(metric))
    ours = FAIMTripletLoss(metric, margin=2.0)
    theirs = losses.TripletMarginLoss(2.0, distance=FAIMDistance(metric), reducer=reducers.MeanReducer())
    triplets = miner(x, LABELS)
    assert relative_error(ours(x, LABELS), theirs(x, LABELS, triplets)) <= 1e-9
    assert relative_error(ours(x, LABELS, triplets), theirs(x, LABELS, triplets)) <= 1e-9


# Miners, reducers, memory

MINERS = {
    "batch hard": miners.BatchHardMiner,
    "triplet margin": lambda **options: miners.TripletMarginMiner(0.8, "semihard", **options),
    "multi-similarity": lambda **options: miners.MultiSimilarityMiner(0.05, **options),
}


@pytest.mark.parametrize("name", MATRIX_LOSSES)
@pytest.mark.parametrize("miner", MINERS)
def test_miners_feed_our_losses(name, miner):
    metric = random_metric(D, full_sigma=True, symmetric=False)
    x = torch.randn(len(LABELS), D, dtype=torch.float64)
    indices = MINERS[miner](distance=FAIMDistance(metric))(x, LABELS)
    expected = oracle(name, metric, x, LABELS, indices=indices)
    assert expected > 0
    assert relative_error(build(name, metric)(x, LABELS, indices), expected) <= 1e-9


@pytest.mark.parametrize("name", [*MATRIX_LOSSES, "npair"])
def test_reducers_reduce_our_losses(name):
    metric = random_metric(D, full_sigma=False)
    x = torch.randn(len(LABELS), D, dtype=torch.float64, requires_grad=True)
    seen = build(name, metric, reducer=reducers.DoNothingReducer())(x, LABELS)["loss"]["losses"]
    middle = seen.median().item()
    classes = LABELS if name != "npair" else torch.arange(3)
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    expected = [
        (reducers.MeanReducer(), seen.mean()),
        (reducers.SumReducer(), seen.sum()),
        (reducers.AvgNonZeroReducer(), seen[seen > 0].mean()),
        (reducers.ThresholdReducer(low=middle), seen[seen > middle].mean()),
        (reducers.ClassWeightedReducer(weights), (seen * weights[classes]).mean()),
    ]
    for reducer, want in expected:
        value = build(name, metric, reducer=reducer)(x, LABELS)
        value.backward()
        assert relative_error(value, want) <= 1e-12, reducer
        assert torch.isfinite(x.grad).all()


def test_supcon_with_the_reducer_that_leaves_zeros_out_is_supcon():
    metric, x = random_metric(D, full_sigma=False), torch.randn(10, D, dtype=torch.float64)
    with_reducer = build("supcon", metric, reducer=reducers.AvgNonZeroReducer())
    assert relative_error(with_reducer(x, LABELS), build("supcon", metric)(x, LABELS)) <= 1e-12


@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner])
def test_a_memory_of_batches_gives_references(miner):
    class Memory(losses.CrossBatchMemory):
        @staticmethod
        def supported_losses():
            return ["FAIMInfoNCELoss"]

    metric = random_metric(D, full_sigma=True, symmetric=False)
    distance = FAIMDistance(metric)
    memory = Memory(
        FAIMInfoNCELoss(metric, temperature=TEMPERATURE),
        D,
        memory_size=25,
        miner=miner and miner(epsilon=9.0, distance=distance),
    )  # so that it keeps every pair
    kept, kept_labels = torch.empty(0, D, dtype=torch.float64), torch.empty(0, dtype=torch.long)
    for step in range(4):  # 25 are full in the third
        x = torch.randn(10, D, dtype=torch.float64, requires_grad=True)
        labels = LABELS.roll(step)
        value = memory(x, labels)
        kept, kept_labels = torch.cat([kept, x.detach()])[-25:], torch.cat([kept_labels, labels])[-25:]
        own = len(kept) - 10
        positives = [[j for j in range(len(kept)) if kept_labels[j] == labels[i] and j != own + i] for i in range(10)]
        negatives = [[j for j in range(len(kept)) if kept_labels[j] != labels[i]] for i in range(10)]
        expected = oracle_ntxent(metric.reference(x, kept), positives, negatives)
        assert relative_error(value, expected) <= 1e-9
        (got,), (want,) = (torch.autograd.grad(v, x) for v in (value, expected))
        assert relative_error(got, want) <= 1e-8
