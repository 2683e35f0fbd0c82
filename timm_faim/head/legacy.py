"""State dicts of earlier heads: the founding code's names, and prototypes of heads that had no frame yet."""

import math

import torch
from torch import Tensor

_FOUNDING_KEYS = ("beta", "lmbda", "log_sigma_diag", "L")  # kept at the head itself

StateDict = dict[str, Tensor]


def log_of_identity(eps: float) -> float:
    """log_sigma_diag with which Σ = exp(log_sigma_diag) + ε is the identity (for ε up to 1/2)."""
    return math.log1p(-min(eps, 0.5))


def modernise(state: StateDict, prefix: str, space: str, eps: float, has_no_one_form: bool) -> str | None:
    """Bring the entries of a head to today's names and coordinates, in place.

    Args:
        state: a state dict.
        prefix: of the head's entries.
        space: of the head that loads them.
        eps: of its metric.
        has_no_one_form: λ of that head is 0 for good.

    Returns:
        Why the head cannot load them; None where it can, as far as seen here.
    """
    for name in _FOUNDING_KEYS:
        if prefix + name in state:
            state[f"{prefix}metric.{name}"] = state.pop(prefix + name)
    for name in ("scale", "metric.lmbda"):
        if prefix + name in state:
            state[prefix + name] = state[prefix + name].reshape(1)
    if space == "indicatrix" and prefix + "whiten" not in state:
        _enter_frame(state, prefix, eps)
    if space == "sphere" and not _has_identity(state, prefix, eps):
        return (f"{prefix}metric has a Σ, and a head on the sphere has none any more; train it again with "
                "space='indicatrix'")  # fmt: skip
    lmbda = state.get(f"{prefix}metric.lmbda")
    if has_no_one_form and lmbda is not None and not lmbda.is_meta and (lmbda.abs() > 0).any():
        return (f"{prefix}metric.lmbda is {lmbda.item():g}, and this head has no 1-form; create it with lambda_init or "
                "learn_metric as the saved one was")  # fmt: skip
    return None


def _has_identity(state: StateDict, prefix: str, eps: float) -> bool:
    log_sigma = state.get(f"{prefix}metric.log_sigma_diag")
    if log_sigma is None or log_sigma.is_meta:
        return f"{prefix}metric.L" not in state
    return not ((log_sigma.double().exp() + eps - 1.0).abs() > 1e-2).any()  # what is NaN is for others to say


def _enter_frame(state: StateDict, prefix: str, eps: float) -> None:
    """Put a head on the indicatrix whose prototypes were in feature space into its Σ's frame, in place."""
    names = ("center", "mu", "metric.beta", "metric.L", "metric.log_sigma_diag")
    center, mu_CD, beta_D, L, log_sigma = (state.get(prefix + name) for name in names)
    if any(t is None for t in (center, mu_CD, beta_D)) or (L is None) == (log_sigma is None):
        return  # load_state_dict says what is missing
    dtype = mu_CD.dtype
    if L is not None:
        tril = torch.tril(L.double())
        whiten = torch.linalg.cholesky(tril @ tril.t() + eps * torch.eye(len(tril), dtype=tril.dtype, device=L.device))
        mu_CD = mu_CD.double() @ whiten
        beta_D = torch.linalg.solve_triangular(whiten, beta_D.double().unsqueeze(1), upper=False).squeeze(1)
        del state[prefix + "metric.L"]
    else:
        whiten = (log_sigma.double().exp() + eps).sqrt()
        mu_CD, beta_D = mu_CD.double() * whiten, beta_D.double() / whiten
    identity = torch.full_like(beta_D, log_of_identity(eps))
    entered = {"whiten": whiten, "mu": mu_CD, "metric.beta": beta_D, "metric.log_sigma_diag": identity}
    state.update((prefix + name, value.to(dtype)) for name, value in entered.items())
