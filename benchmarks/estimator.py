"""FAIMClassifier beside scikit-learn's classifiers of feature vectors, on frozen features of tf_efficientnet_lite0.

    python benchmarks/estimator.py --weights lite0.safetensors --data leaf99=DIR grocery81=DIR

Data, features and their cache are those of accuracy/features.py: DIR holds train/ and val/. Every choice is made by
3-fold cross-validation on train/, C of logistic regression also on L2-normalised features. Times are processor seconds
(of one core with OMP_NUM_THREADS=1) of the whole fit, search included, and of prediction for val/. Cross entropy is
that of predict_proba; of k-NN, which says 0, it is infinite.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import sklearn
import torch
from accuracy.features import data_arguments, frozen_features, named_folders
from machine import headline
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from timm_faim import FAIMClassifier

SHRINKAGES = (0.03, 0.1, 0.3, 0.6, 1.0)
FOLDS = 3
COMMAND = "python benchmarks/estimator.py --weights lite0.safetensors --data leaf99=DIR grocery81=DIR"
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def searched(estimator: object, **grid: tuple) -> GridSearchCV:
    return GridSearchCV(estimator, {name: list(values) for name, values in grid.items()}, cv=FOLDS)


METHODS: dict[str, Callable[[], object]] = {
    "FAIMClassifier()": FAIMClassifier,
    "FAIMClassifier(gamma=16)": lambda: FAIMClassifier(gamma=16.0),
    "FAIMClassifier, shrinkage searched": lambda: searched(FAIMClassifier(gamma=16.0), shrinkage=SHRINKAGES),
    'FAIMClassifier(space="flat")': lambda: FAIMClassifier(space="flat"),
    'LDA(solver="lsqr", shrinkage="auto")': lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "LDA, shrinkage searched": lambda: searched(LinearDiscriminantAnalysis(solver="lsqr"), shrinkage=SHRINKAGES),
    "logistic regression, standardised, C searched": lambda: searched(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)), logisticregression__C=STRENGTHS
    ),
    "logistic regression, L2-normalised, C searched": lambda: searched(
        make_pipeline(Normalizer(), LogisticRegression(max_iter=300)),
        logisticregression__C=tuple(1e4 * c for c in STRENGTHS),
    ),
    "nearest centroid": NearestCentroid,
    "nearest centroid, standardised": lambda: make_pipeline(StandardScaler(), NearestCentroid()),
    "k-NN, cosine, k searched": lambda: searched(KNeighborsClassifier(metric="cosine"), n_neighbors=(1, 3, 5, 10)),
}


def measure(make: Callable[[], object], train: tuple, val: tuple) -> list[str]:
    """Top-1 in per cent, cross entropy, seconds of the fit and of prediction."""
    begin = time.process_time()
    model = make().fit(*train)
    fitted = time.process_time()
    predicted = model.predict(val[0])
    done = time.process_time()
    loss = "–"
    if hasattr(model, "predict_proba") and not isinstance(getattr(model, "estimator", None), KNeighborsClassifier):
        loss = f"{log_loss(val[1], model.predict_proba(val[0]).clip(1e-12), labels=model.classes_):.3f}"
    if getattr(model, "best_params_", None):
        print(f"  chosen: {model.best_params_}", file=sys.stderr)
    top1 = 100 * float(np.mean(predicted == val[1]))
    return [f"{top1:.1f}", loss, f"{fitted - begin:.2f}", f"{done - fitted:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data_arguments(parser)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # constant features, and searches that end at their limit
    print(f"{headline(COMMAND, cuda=False)}, scikit-learn {sklearn.__version__}\n")
    with torch.no_grad():
        for name, folder in named_folders(args.data).items():
            data = frozen_features(name, folder, args.weights, args.cache, 0)
            train, val = ((x.numpy(), y.numpy()) for x, y in
                          ((data.train_ND, data.train_N), (data.val_ND, data.val_N)))  # fmt: skip
            classes = len(np.unique(train[1]))
            print(f"{name}: {classes} classes, {len(train[0])} training and {len(val[0])} validation images, "
                  f"{train[0].shape[1]} features\n")  # fmt: skip
            print("| | top-1, % | cross entropy | fit, s | predict, s |\n|---|---|---|---|---|")
            for method, make in METHODS.items():
                print(f"| {method} | {' | '.join(measure(make, train, val))} |", flush=True)
            print()


if __name__ == "__main__":
    main()
