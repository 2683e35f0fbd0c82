"""The losses across processes: two on the CPU learn as one with both batches."""

import pytest
import torch
from cases import random_metric
from children import in_group
from loss_formulas import LOSSES, build, mined, relative_error
from torch import distributed, nn
from torch.nn import functional as F

from timm_faim import FAIMHead
from timm_faim.losses import pairs

D = 5


def process_cases():
    """(loss, keywords of the whole batch of 12): shared and separate classes, positives that differ in number."""
    generator = torch.Generator().manual_seed(5)
    labels = {
        "shared": torch.tensor([0, 0, 1, 2, 2, 2, 1, 0, 3, 4, 4, 2]),  # 1 has one point in each half
        "separate": torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]),
        "one half without a positive": torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 7]),
        "no positive": torch.arange(12),
    }
    for name in LOSSES:
        for key, classes in labels.items():
            yield f"{name}, {key}", name, {"labels": classes}
        ref = {
            "ref_emb": torch.randn(8, D, dtype=torch.float64, generator=generator),
            "ref_labels": torch.tensor([2, 0, 4, 1, 3, 0, 0, 9]),
        }
        yield f"{name}, references", name, {"labels": labels["shared"], **ref}
        if name != "npair":
            for kind in ("pairs", "triplets"):
                halves = [mined(half, half, True, kind == "triplets", 0) for half in labels["separate"].split(6)]
                yield f"{name}, mined {kind}", name, {"labels": labels["separate"], "indices_tuple": halves}


def process_metric():
    torch.manual_seed(7)
    return random_metric(D, full_sigma=True, symmetric=False), torch.randn(12, D, dtype=torch.float64)


def _losses_of_a_process(folder, block):
    assert distributed.get_world_size() == 2
    if block:
        pairs.BLOCK = block
    results = {}
    for key, name, given in process_cases():
        metric, x = process_metric()
        leaves = {"x": x.chunk(2)[distributed.get_rank()].clone().requires_grad_()}
        call = {
            k: v[distributed.get_rank()] if k == "indices_tuple" else v.chunk(2)[distributed.get_rank()]
            for k, v in given.items()
        }
        if "ref_emb" in call:
            leaves["ref_emb"] = call["ref_emb"] = call["ref_emb"].clone().requires_grad_()
        value = build(name, metric, cross_rank=True)(leaves["x"], **call)
        value.backward()
        value = value.detach()
        distributed.all_reduce(value)
        for parameter in metric.parameters():  # as DistributedDataParallel does
            distributed.all_reduce(parameter.grad)
        results[key] = (
            value / 2,
            {k: leaf.grad / 2 for k, leaf in leaves.items()},
            [p.grad / 2 for p in metric.parameters()],
        )
    torch.save(results, folder / f"{distributed.get_rank()}.pt")


@pytest.mark.parametrize("block", [None, 24])
def test_two_processes_equal_one_with_both_batches(tmp_path, block):
    in_group(_losses_of_a_process, tmp_path, block)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    cases = list(process_cases())
    assert len(cases) == len(first) == len(second)
    for key, name, given in cases:
        metric, x = process_metric()
        leaves = {"x": x.requires_grad_()}
        if "ref_emb" in given:
            leaves["ref_emb"] = given["ref_emb"].requires_grad_()
        if "indices_tuple" in given:
            halves = given["indices_tuple"]
            given["indices_tuple"] = [torch.cat([a, b + 6]) for a, b in zip(*halves, strict=True)]
        value = build(name, metric)(leaves["x"], **given)
        value.backward()
        for results in (first, second):
            assert relative_error(results[key][0], value.detach()) <= 1e-12, key
            for got, parameter in zip(results[key][2], metric.parameters(), strict=True):
                assert relative_error(got, parameter.grad) <= 1e-11, key
        for k, leaf in leaves.items():
            got = torch.cat([results[key][1][k] for results in (first, second)])
            assert relative_error(got, leaf.grad) <= 1e-11, key
        assert (value == 0) == ("no positive" in key), key


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(3, D), FAIMHead(D, 5, learn_metric=True, lambda_init=0.1)

    def forward(self, x):
        features = self.trunk(x)
        return features, self.head(features)


def _ddp_losses(state, x, labels, folder):
    assert distributed.get_world_size() == 2
    rank = distributed.get_rank()
    results = {}
    for name in LOSSES:
        model = Classifier()
        model.load_state_dict(state)
        parallel = nn.parallel.DistributedDataParallel(model)
        loss = build(name, model.head, cross_rank=True)
        features, logits = parallel(x.chunk(2)[rank])
        y = labels.chunk(2)[rank]
        (F.cross_entropy(logits, y) + loss(features, y)).backward()
        results[name] = {key: p.grad for key, p in model.named_parameters()}
    torch.save(results, folder / f"{rank}.pt")


def test_a_model_under_ddp_learns_as_in_one_process(tmp_path):
    """The metric is used inside DDP's forward by the head, and again by the loss."""
    model = Classifier()
    x, labels = torch.randn(12, 3), torch.tensor([0, 0, 1, 2, 2, 2, 1, 0, 3, 4, 4, 2])
    in_group(_ddp_losses, model.state_dict(), x, labels, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in LOSSES:
        model.zero_grad()
        features, logits = model(x)
        (F.cross_entropy(logits, labels) + build(name, model.head)(features, labels)).backward()
        for key, parameter in ((k, p) for k, p in model.named_parameters() if p.requires_grad):
            for result in results:
                assert relative_error(result[name][key], parameter.grad.double()) <= 1e-4, (name, key)
