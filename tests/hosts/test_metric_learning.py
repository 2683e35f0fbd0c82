"""What pytorch-metric-learning does with a distance, with heads and metrics under it."""

import copy
import pickle

import pytest
import torch
from habits import FORMS, close
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import losses, miners, testers, trainers
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel, MatchFinder

from timm_faim import FAIMDistance, FAIMHead, FAIMMarginLoss, FAIMMetric
from timm_faim.models.config import of_heads, resolve_faim_cfg

D = 8


DISTANCES = {
    "theirs": lambda: LpDistance(normalize_embeddings=False),
    "owned": lambda: FAIMDistance(in_features=D),
    "metric": lambda: FAIMDistance(FAIMMetric(D, True, False)),
} | {
    form: lambda form=form: FAIMDistance(FAIMHead(D, 5, **of_heads(resolve_faim_cfg(FORMS[form]))))
    for form in ("default", "founding", "randers")
}


def points(count=12, dtype=torch.float32):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1)).to(dtype), torch.arange(count) % 3


def keeps_the_dtype_of_the_queries(distance):
    halves = () if isinstance(distance, LpDistance) else (torch.float16, torch.bfloat16)  # theirs cannot on the CPU
    for dtype in (*halves, torch.float32, torch.float64):
        x, _ = points(dtype=dtype)
        assert distance(x).dtype == distance(x, x[:3]).dtype == distance.pairwise_distance(x, x).dtype == dtype


def under_autocast(distance):
    x, labels = points()
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.TripletMarginLoss(distance=distance)(x.requires_grad_(), labels)
    loss.backward()
    assert torch.isfinite(x.grad).all()


def in_losses(distance):
    x, labels = points()
    x.requires_grad_()
    for loss in (
        losses.TripletMarginLoss,
        losses.ContrastiveLoss,
        losses.NTXentLoss,
        losses.MultiSimilarityLoss,
        losses.MarginLoss,
        losses.SupConLoss,
        losses.LiftedStructureLoss,
    ):
        try:
            value = loss(distance=distance)(x, labels)
        except AssertionError:  # of a loss that asks for another distance by name
            continue
        value.backward()
        assert torch.isfinite(value), loss


def in_half_precision(distance):
    if isinstance(distance, LpDistance):
        return
    x, labels = points(dtype=torch.bfloat16)
    x.requires_grad_()
    losses.TripletMarginLoss(distance=distance)(x, labels).backward()
    assert x.grad.dtype == torch.bfloat16


def with_mined_pairs(distance):
    x, labels = points()
    for miner in (miners.TripletMarginMiner(distance=distance), miners.BatchHardMiner(distance=distance)):
        assert torch.isfinite(losses.TripletMarginLoss(distance=distance)(x, labels, miner(x, labels)))


def with_a_memory(distance):
    x, labels = points()
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(distance=distance), D, memory_size=20)
    for _ in range(2):
        assert torch.isfinite(memory(x, labels))


def with_proxies(distance):
    x, labels = points()
    assert torch.isfinite(losses.ProxyNCALoss(3, D, distance=distance)(x, labels))


def copied_pickled_and_saved(distance):
    x, _ = points()
    close(copy.deepcopy(distance)(x), distance(x))
    close(pickle.loads(pickle.dumps(distance))(x), distance(x))
    loss = losses.TripletMarginLoss(distance=distance)
    loss.load_state_dict(loss.state_dict())


def moved(distance):
    loss = losses.TripletMarginLoss(distance=distance).to(torch.float64)
    assert torch.isfinite(loss(*points(dtype=torch.float64)))


def of_matches(distance):
    x, _ = points()
    finder = InferenceModel(
        nn.Identity(), match_finder=MatchFinder(distance=distance, threshold=1e3), knn_func=CustomKNN(distance)
    )
    assert finder.is_match(x[:3], x[:3]).all()
    distances, indices = CustomKNN(distance)(x[:4], 2, x, False)
    assert torch.isfinite(distances).all() and (indices[:, 0] == torch.arange(4)).all()


def collecting_statistics(distance):
    distance.collect_stats = True
    x, labels = points()
    losses.TripletMarginLoss(distance=distance)(x, labels)


def in_a_trainer(distance):
    x, labels = points(24)
    trunk = nn.Linear(D, D)
    models = {"trunk": trunk, "embedder": nn.Linear(D, D)}
    optimizers = {"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.01)}
    loss = {"metric_loss": losses.ContrastiveLoss(distance=distance)}
    trainers.MetricLossOnly(
        models,
        optimizers,
        12,
        loss,
        TensorDataset(x, labels),
        dataloader_num_workers=0,
        iterations_per_epoch=2,
        data_device="cpu",
    ).train(num_epochs=1)
    tester = testers.GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0, data_device="cpu", accuracy_calculator=calculator(distance)
    )
    assert tester.test({"val": TensorDataset(x, labels)}, 0, trunk, models["embedder"])["val"]


def calculator(distance):
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    return AccuracyCalculator(include=("precision_at_1",), knn_func=CustomKNN(distance), device=torch.device("cpu"))


HABITS = [
    value
    for value in list(globals().values())
    if getattr(value, "__module__", "") == __name__
    and getattr(value, "__code__", None)
    and value.__code__.co_varnames[:1] == ("distance",)
    and value is not calculator
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", DISTANCES)
@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)
def test_habit(habit, form):
    habit(DISTANCES[form]())


def test_a_loss_with_a_head_of_its_own_is_one_of_theirs():
    loss = FAIMMarginLoss(3, D)
    x, labels = points()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    loss(x, labels).backward()
    optimizer.step()
    close(pickle.loads(pickle.dumps(loss))(x, labels), loss(x, labels))
