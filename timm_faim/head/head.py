"""FAIMHead: one prototype per class, logits = -γ d_F(x, μ_k)."""

import math
from typing import Optional

import torch
from torch import Tensor, nn

from timm_faim.metric import FAIMMetric, absolute, checked_count, checked_number, unit_vectors, without_autocast

_INITS = ("scaled", "seed")
_SEED_KEYS = ("beta", "lmbda", "log_sigma_diag", "L")  # kept by the founding code at the head itself


def subtract_margin(logits: Tensor, target: Tensor, amount: Tensor) -> Tensor:
    """logits [B, C] minus ``amount`` [1] at the target: class indices [B], or soft targets [B, C] as weights.

    Negative indices (the ``ignore_index`` of a criterion) are left alone.
    """
    amount = amount.to(logits.dtype)
    if target.dim() == logits.dim():
        return logits - amount * target.to(logits.dtype)
    amounts = amount * (target >= 0).to(logits.dtype)
    return logits.scatter_add(-1, target.clamp_min(0).unsqueeze(-1), -amounts.unsqueeze(-1))


class FAIMHead(nn.Module):
    """A classifier by Finsler distance to learned class prototypes.

        logits_k = -γ d_F(x, μ_k) [+ prior_k],    d_F(x, μ) = F(x - μ), see :class:`timm_faim.FAIMMetric`

    Takes [B, D] or [..., D], and [B, D, H, W] in place of a 1×1-convolution classifier (recognised by a last dimension
    that is not D). Distances are computed in at least float32, also under autocast; logits have the promoted dtype of
    features and prototypes.

    Args:
        in_features: D.
        num_classes: C >= 1.
        lambda_init: initial weight λ >= 0 of the 1-form; 0 starts without it.
        scale_init: initial γ > 0 (inverse softmax temperature).
        full_sigma: full Σ by its Cholesky factor instead of a diagonal one: D² parameters.
        symmetric: |β'v| as in the founding form; False gives a directed Randers metric, positive by construction.
        init: ``'scaled'`` makes E d_F = 1 whatever D, for features of unit variance per coordinate (with
            ``normalize``, for any features) by the scale of Σ; ``'seed'`` is the founding N(0, I) for μ and β with
            Σ = I, of logits near -γ sqrt(2 D). Start from data: :func:`timm_faim.fit_heads`, :func:`timm_faim.fit_`.
        normalize: L2-normalise features and prototypes first (a metric on the sphere).
        learn_scale: False keeps γ fixed.
        damping: κ in [0, 1], how far the 1-form is bounded (2 tanh(h/2) for h = |β'v|) until
            :func:`timm_faim.set_damping` anneals it; for a large β early in training.
        prior: add a learned per-class log prior [C], zero at first.
        margin: m >= 0, added to the target's distance in training. Reaches the loss through
            :class:`timm_faim.TargetMargin`, or ``head(x, target)`` where the head is called directly.
        indicatrix: with ``normalize``, onto the unit sphere of the metric itself (its indicatrix, F = 1) around
            ``center`` in place of the Euclidean one around 0. Features enter the Σ-orthonormal frame once,
            z = (x - c) A with Σ = A A', in which prototypes and β live and F(z) = |z| + λ |β'z|:
            d = F(z / F(z) - μ / F(μ)).
        learn_metric: False keeps Σ, β and λ as they start or as a closed-form fit sets them; with
            ``lambda_init=0`` there is then no 1-form, and d = sqrt(2 - 2 cos(z, μ) + ε).
        eps: ε of the metric.

    Parameters: ``mu`` [C, D], ``scale`` [1], optionally ``prior`` [C], and those of ``metric``; with ``indicatrix`` a
    buffer ``center`` [D] and ``whiten`` (A, [D, D] or its diagonal [D]), which a fit sets, and ``metric`` is that of
    the frame, its Σ the identity for good. γ and λ act as absolute values, so that no optimizer step makes them
    negative in effect. State dicts of the founding code (``beta``, ``lmbda``, … beside ``mu``, scalars of shape [])
    load strictly, and so do those of heads on the indicatrix from before there was a frame.

    Raises:
        TypeError, ValueError: an argument that is no number or out of its range, named with the value; on call,
            features of another width.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        lambda_init: float = 0.1,
        scale_init: float = 10.0,
        full_sigma: bool = False,
        *,
        symmetric: bool = True,
        init: str = "scaled",
        normalize: bool = False,
        learn_scale: bool = True,
        damping: float = 0.0,
        prior: bool = False,
        margin: float = 0.0,
        indicatrix: bool = False,
        learn_metric: bool = True,
        eps: float = 1e-6,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        if init not in _INITS:
            raise ValueError(f"init must be one of {_INITS}, got {init!r}; to start from data call fit_heads()")
        if indicatrix and not normalize:
            raise ValueError("indicatrix=True says where features are normalised to; it needs normalize=True")
        factory = {"device": device, "dtype": dtype}
        self.num_classes = num_classes = checked_count(
            "num_classes", num_classes, "; a model without head has num_classes=0"
        )
        self.scale_init = checked_number("scale_init (γ)", scale_init, above=True)
        self.init = init
        self.normalize = normalize
        self.margin = checked_number("margin", margin)
        self.full_sigma = full_sigma
        self.metric = FAIMMetric(in_features, full_sigma and not indicatrix, symmetric, lambda_init, eps=eps, **factory)
        self.in_features = in_features = self.metric.in_features
        self.metric.requires_grad_(learn_metric)
        if indicatrix:
            self.metric.log_sigma_diag.requires_grad_(False)
        self.cosine = indicatrix and not learn_metric and lambda_init == 0
        self.mu = nn.Parameter(torch.empty(num_classes, in_features, **factory))
        self.scale = nn.Parameter(torch.empty(1, **factory), requires_grad=learn_scale)
        self.register_parameter("prior", nn.Parameter(torch.empty(num_classes, **factory)) if prior else None)
        self.register_buffer("center", torch.empty(in_features, **factory) if indicatrix else None)
        shape = (in_features,) * (2 if full_sigma else 1)
        whiten = nn.Parameter(torch.empty(shape, **factory), requires_grad=learn_metric) if indicatrix else None
        self.register_parameter("whiten", whiten)
        self.metric.set_damping(damping)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters as ``init`` says; uses no values of tensors (works on the meta device)."""
        D = self.in_features
        nn.init.constant_(self.scale, self.scale_init)
        if self.prior is not None:
            nn.init.zeros_(self.prior)
        if self.center is not None:
            nn.init.zeros_(self.center)
        if self.whiten is not None:
            nn.init.eye_(self.whiten) if self.full_sigma else nn.init.ones_(self.whiten)
        if self.init == "seed":
            nn.init.normal_(self.mu)
            self.metric.reset_parameters(beta_std=1.0)
            self._reset_frame()
            return
        # Prototypes of the features' own scale: with a smaller μ all distances are alike and learning is slow. On the
        # sphere the scale of μ only sets its effective learning rate, for which 1/sqrt(D) is the usual weights' scale.
        nn.init.normal_(self.mu, std=1.0 / math.sqrt(D) if self.normalize else 1.0)
        if self.center is not None:
            self.metric.reset_parameters()  # distances on the indicatrix do not depend on the scale of Σ
            self._reset_frame()
        else:
            self.metric.reset_to_unit_distance(2.0 if self.normalize else 2.0 * D)

    def _reset_frame(self) -> None:
        if self.whiten is not None:
            nn.init.constant_(self.metric.log_sigma_diag, _log_of_identity(self.metric.eps))

    def initial_distance(self) -> float:
        """E d_F(x, μ_k) at initialisation, for features of unit variance per coordinate (normalised: for any)."""
        if self.center is not None:
            return math.sqrt(2.0)
        if self.init == "scaled":
            return 1.0
        one_form = 1.0 + self.metric.lambda_init * math.sqrt(2.0 / math.pi) * (1.0 if self.metric.symmetric else 0.0)
        return math.sqrt((2.0 / self.in_features if self.normalize else 2.0) * self.in_features) * one_form

    def gamma(self) -> Tensor:
        """The effective γ = |scale| [1]."""
        return absolute(self.scale)

    def forward(self, x: Tensor, target: Optional[Tensor] = None) -> Tensor:
        """Logits [..., C] of features [..., D] ([B, C, H, W] of [B, D, H, W]).

        Args:
            x: features.
            target: class indices [B] or soft targets [B, C] of features [B, D]; applies ``margin`` in training mode.
        """
        if not torch.jit.is_scripting():
            return without_autocast(self._forward, x, target)
        return self._forward(x, target)

    def _forward(self, x: Tensor, target: Optional[Tensor]) -> Tensor:
        if x.shape[-1] != self.in_features and (x.dim() != 4 or x.shape[1] != self.in_features):
            raise ValueError(f"expected features [..., {self.in_features}] or [B, {self.in_features}, H, W], got shape "
                             f"{list(x.shape)}")  # fmt: skip
        convolutional = x.dim() == 4 and x.shape[-1] != self.in_features and x.shape[1] == self.in_features
        if convolutional:
            x = x.permute(0, 2, 3, 1)
        logits = self._scaled_distances(x)
        if self.prior is not None:
            logits = logits + self.prior
        if target is not None and self.training and self.margin > 0:
            logits = subtract_margin(logits, target, self.gamma() * self.margin)
        logits = logits.to(torch.promote_types(x.dtype, self.mu.dtype))
        return logits.permute(0, 3, 1, 2) if convolutional else logits

    def _scaled_distances(self, x: Tensor) -> Tensor:
        """-γ d_F(x, μ_k) [..., C]."""
        z = self._embed(x)
        if not self.cosine:
            unit = self.normalize and self.whiten is None
            return self.metric.scaled_distance(z, self.mu if unit else self.project(self.mu), -self.gamma(), unit)
        m = self.project(self.mu).to(z.dtype)  # both of length 1: d² = 2 - 2 z·m
        two = torch.full([1], 2.0 + self.metric.eps, dtype=z.dtype, device=z.device)
        q = torch.addmm(two, z.reshape(-1, self.in_features), m.t(), alpha=-2.0).clamp_min(self.metric.eps)
        return (q.sqrt() * -self.gamma().to(z.dtype)).reshape(z.shape[:-1] + m.shape[:1])

    def embed(self, x: Tensor) -> Tensor:
        """Features as the metric sees them: x, or in at least float32 x / |x|, or z / F(z) in the frame of Σ."""
        if not torch.jit.is_scripting():
            return without_autocast(self._embed, x)
        return self._embed(x)

    def _embed(self, x: Tensor) -> Tensor:
        if self.center is not None and self.whiten is not None:
            wide = torch.promote_types(torch.promote_types(x.dtype, self.whiten.dtype), torch.float32)
            x, whiten = x.to(wide) - self.center.to(wide), self.whiten.to(wide)
            x = x @ whiten if self.full_sigma else x * whiten
        return self.project(x)

    @torch.jit.ignore
    def sigma(self) -> Tensor:
        """Σ of the features as a dense matrix [D, D], in the dtype of the parameters."""
        if self.whiten is None:
            return self.metric.sigma()
        return self.whiten @ self.whiten.t() if self.full_sigma else torch.diag(self.whiten.square())

    def project(self, v: Tensor) -> Tensor:
        """Points as the metric sees them: v, or in at least float32 v / |v| or v / F(v).

        Prototypes are such points, and so are means of embedded features: ``project`` of a point is the point itself.
        """
        if self.whiten is not None and not self.cosine:
            v = v.to(torch.promote_types(v.dtype, torch.float32))
            return v / self.metric.norm(v).unsqueeze(-1)
        return unit_vectors(v) if self.normalize else v

    @torch.jit.ignore
    @torch.no_grad()
    def take_frame(self, state: dict[str, Tensor]) -> bool:
        """Centre, Σ, β and λ from the state dict of another head, as they belong to the features whatever the classes.

        Returns:
            False, and the head is as it was, where either head is not on an indicatrix or the widths differ.
        """
        center = state.get("center")
        if self.center is None or center is None or center.shape != self.center.shape:
            return False
        own = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        taken = {name: tensor for name, tensor in state.items() if name not in ("mu", "scale", "prior")}
        self.load_state_dict(own | taken)  # a state from before the frame would move μ
        self.mu.copy_(own["mu"])
        return True

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of all parameters: prototypes, Σ, β and scalars are not decayed (timm's optimisers ask for this)."""
        return {name for name, _ in self.named_parameters()}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        for name in _SEED_KEYS:
            if prefix + name in state_dict:
                state_dict[f"{prefix}metric.{name}"] = state_dict.pop(prefix + name)
        for name in ("scale", "metric.lmbda"):
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name].reshape(1)
        if self.whiten is not None and prefix + "whiten" not in state_dict:
            _enter_frame(state_dict, prefix, self.metric.eps)
        lmbda = state_dict.get(f"{prefix}metric.lmbda")
        if self.cosine and lmbda is not None and not lmbda.is_meta and (lmbda.abs() > 0).any():
            args[-1].append(f"{prefix}metric.lmbda is {lmbda.item():g}, and this head has no 1-form; create it with "
                            "lambda_init or learn_metric as the saved one was")  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.num_classes}, normalize={self.normalize}, margin={self.margin:g}, "
            f"indicatrix={self.center is not None}, prior={self.prior is not None}"
        )


def _log_of_identity(eps: float) -> float:
    """log_sigma_diag with which Σ = exp(log_sigma_diag) + ε is the identity (for ε up to 1/2)."""
    return math.log1p(-min(eps, 0.5))


def _enter_frame(state_dict: dict[str, Tensor], prefix: str, eps: float) -> None:
    """Put the state of a head on the indicatrix whose prototypes were in feature space into its Σ's frame, in place."""
    names = ("center", "mu", "metric.beta", "metric.L", "metric.log_sigma_diag")
    center, mu_CD, beta_D, L, log_sigma = (state_dict.get(prefix + name) for name in names)
    if any(t is None for t in (center, mu_CD, beta_D)) or (L is None) == (log_sigma is None):
        return  # load_state_dict says what is missing
    dtype = mu_CD.dtype
    if L is not None:
        tril = torch.tril(L.double())
        whiten = torch.linalg.cholesky(tril @ tril.t() + eps * torch.eye(len(tril), dtype=tril.dtype, device=L.device))
        mu_CD = mu_CD.double() @ whiten
        beta_D = torch.linalg.solve_triangular(whiten, beta_D.double().unsqueeze(1), upper=False).squeeze(1)
        del state_dict[prefix + "metric.L"]
    else:
        whiten = (log_sigma.double().exp() + eps).sqrt()
        mu_CD, beta_D = mu_CD.double() * whiten, beta_D.double() / whiten
    identity = torch.full_like(beta_D, _log_of_identity(eps))
    entered = {"whiten": whiten, "mu": mu_CD, "metric.beta": beta_D, "metric.log_sigma_diag": identity}
    state_dict.update((prefix + name, value.to(dtype)) for name, value in entered.items())


def set_damping(model: nn.Module, value: float) -> None:
    """Set κ in [0, 1], the damping of the 1-form, in every FAIM metric of a model (also call it on an EMA copy)."""
    for module in model.modules():
        if isinstance(module, FAIMMetric):
            module.set_damping(value)
