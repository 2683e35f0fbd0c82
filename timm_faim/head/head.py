"""FAIMHead: one prototype per class, logits = -γ d_F(x, μ_k)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from timm_faim.metric import (
    FAIMMetric,
    FillsMissing,
    LowRankFrame,
    absolute,
    checked_count,
    checked_number,
    checked_parts,
    cosine_logits,
    is_filled,
    traced_call,
    unit_vectors,
    without_autocast,
)

from .legacy import log_of_identity, modernise

SPACES = ("indicatrix", "sphere", "flat")
_INITS = ("scaled", "seed")


class FAIMHead(FillsMissing, nn.Module):
    """A classifier by Finsler distance to learned class prototypes, in one of three spaces.

        logits_k = -γ d_F(x, μ_k) [+ prior_k]

    - ``"indicatrix"``: features enter the frame of a statistical Σ = A A' around a centre once, z = (x - c) A, in which
      the prototypes live, and both sides are points of the metric's unit sphere there: d = F(z / F(z) - μ / F(μ)) with
      F(z) = |z| + λ |β'z|. At first c = 0 and A = I; a closed-form fit sets them. Without 1-form (the default, λ = 0)
      d = sqrt(2 - 2 cos(z, μ) + ε): a frozen linear layer and a cosine product.
    - ``"sphere"``: the same with c = 0 and A = I for good.
    - ``"flat"``: the founding form d = F(x - μ) with a Σ of its own, see :class:`timm_faim.FAIMMetric`.

    With ``parts`` the features are several vectors side by side, such as the mean and the second moments of feature
    maps, each with a frame of its own, z_i = (x_i - c_i) A_i. Their points ẑ_i = z_i / |z_i| on unit spheres, with
    weights w_i of sum 1, are one point (√w_1 ẑ_1, √w_2 ẑ_2, …) of the unit sphere, where the prototypes are too. So
    the squared distance of two such points is Σ w_i d_i².

    Takes [B, D] or [..., D], and [B, D, H, W] in place of a 1×1-convolution classifier (recognised by a last dimension
    that is not D). Distances are computed in at least float32, also under autocast; logits have the promoted dtype of
    features and prototypes.

    Args:
        in_features: D.
        num_classes: C >= 1.
        space: where distances are measured, as above.
        full_sigma: full Σ instead of a diagonal one: D² numbers; none on the sphere.
        learn_metric: train Σ (A), β and λ by gradient; False keeps them as they start or as a fit sets them.
        lambda_init: initial weight λ >= 0 of the 1-form; 0 starts without it.
        symmetric: |β'v| as in the founding form; False gives a directed Randers metric, positive by construction.
        scale_init: initial γ > 0 (inverse softmax temperature).
        learn_scale: False keeps γ fixed.
        margin: m >= 0, added to the target's distance in training by :class:`timm_faim.TargetMargin`.
        prior: add a learned per-class log prior [C], zero at first.
        init: of a flat head, ``'scaled'`` makes E d_F = 1 whatever D, for features of unit variance per coordinate, by
            the scale of Σ; ``'seed'`` is the founding N(0, I) for μ and β with Σ = I, of logits near -γ sqrt(2 D).
            Start from data: :func:`timm_faim.fit_`.
        eps: ε of the metric.
        parts: widths of the parts of the features, of sum D; on an indicatrix without 1-form. The first has the frame
            of a head of one part, the others one of few directions (:class:`timm_faim.metric.LowRankFrame`).
        part_weights: w_i >= 0, one a part (default: alike), scaled to sum 1.
        rank: directions of the other parts' Σ.

    Parameters: ``mu`` [C, D], ``scale`` [1], optionally ``prior`` [C], and those of ``metric``; on the indicatrix also
    ``whiten`` (A, [D, D] or its diagonal [D]) and ``center`` (c, [D], never trained by gradient), of the first part
    where there are several; those have ``frames`` for the others and ``part_weights``, never trained either. Off
    ``"flat"`` the Σ of ``metric`` is the identity for good. γ and λ act as absolute values, so that no optimizer step
    makes them negative in effect. State dicts of the founding code (``beta``, ``lmbda``, … beside ``mu``, scalars of
    shape []) load strictly into flat heads, and those of heads on the indicatrix from before there was a frame are
    moved into it.

    Raises:
        TypeError, ValueError: an argument that is no number or out of its range, named with the value; on call,
            features of another width.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        space: str = "indicatrix",
        full_sigma: bool = True,
        learn_metric: bool = False,
        lambda_init: float = 0.0,
        symmetric: bool = True,
        scale_init: float = 16.0,
        learn_scale: bool = True,
        margin: float = 0.2,
        prior: bool = False,
        init: str = "scaled",
        eps: float = 1e-6,
        parts: Sequence[int] = (),
        part_weights: Sequence[float] = (),
        rank: int = 256,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if space not in SPACES:
            raise ValueError(f"space must be one of {SPACES}, got {space!r}")
        if init not in _INITS:
            raise ValueError(f"init must be one of {_INITS}, got {init!r}; to start from data call fit_()")
        if init == "seed" and space != "flat":
            raise ValueError(f"init='seed' is the founding start of a flat head; give space='flat', got {space!r}")
        factory = {"device": device, "dtype": dtype}
        self.num_classes = num_classes = checked_count(
            "num_classes", num_classes, "; a model without head has num_classes=0"
        )
        self.out_features = num_classes  # the name that a linear classifier has for it
        self.space = space
        self.is_flat = space == "flat"
        self.full_sigma = full_sigma and space != "sphere"
        self.scale_init = checked_number("scale_init (γ)", scale_init, above=True)
        self.margin = checked_number("margin", margin)
        self.init = init
        self.metric = FAIMMetric(in_features, full_sigma and self.is_flat, symmetric, lambda_init, eps=eps, **factory)
        self.in_features = in_features = self.metric.in_features
        self.parts, self.weights_init = checked_parts(in_features, parts, part_weights)
        self.metric.requires_grad_(learn_metric)
        if not self.is_flat:
            self.metric.log_sigma_diag.requires_grad_(False)
        self.cosine = not self.is_flat and not learn_metric and self.metric.lambda_init == 0
        if len(self.parts) > 1 and not (self.cosine and space == "indicatrix"):
            raise ValueError(f"parts={self.parts} need space='indicatrix', lambda_init=0 and learn_metric=False, got "
                             f"space={space!r}, lambda_init={lambda_init:g}, learn_metric={learn_metric}")  # fmt: skip
        self.mu = nn.Parameter(torch.empty(num_classes, in_features, **factory))
        self.scale = nn.Parameter(torch.empty(1, **factory), requires_grad=learn_scale)
        self.register_parameter("prior", nn.Parameter(torch.empty(num_classes, **factory)) if prior else None)
        framed = space == "indicatrix"
        # no buffer: what opens a model in parts may leave buffers as they start
        first = self.parts[0]
        center = nn.Parameter(torch.empty(first, **factory), requires_grad=False) if framed else None
        self.register_parameter("center", center)
        shape = (first,) * (2 if full_sigma else 1)
        whiten = nn.Parameter(torch.empty(shape, **factory), requires_grad=learn_metric) if framed else None
        self.register_parameter("whiten", whiten)
        rank = checked_count("rank", rank)
        self.frames = nn.ModuleList(LowRankFrame(D, min(rank, D), **factory) for D in self.parts[1:])
        weights = nn.Parameter(torch.empty(len(self.parts), **factory), requires_grad=False) if self.frames else None
        self.register_parameter("part_weights", weights)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters; uses no values of tensors (works on the meta device)."""
        D = self.in_features
        nn.init.constant_(self.scale, self.scale_init)
        if self.prior is not None:
            nn.init.zeros_(self.prior)
        if self.center is not None and self.whiten is not None:
            nn.init.zeros_(self.center)
            nn.init.eye_(self.whiten) if self.full_sigma else nn.init.ones_(self.whiten)
        for frame in self.frames:
            frame.reset_parameters()
        if self.part_weights is not None and not is_filled(self.part_weights):  # nn.init sees views of it alone
            for i, weight in enumerate(self.weights_init):
                nn.init.constant_(self.part_weights[i], weight)
        # Prototypes of the features' own scale: with a smaller μ all distances are alike and learning is slow. On a
        # sphere the scale of μ only sets its effective learning rate, for which 1/sqrt(D) is the usual weights' scale.
        nn.init.normal_(self.mu, std=1.0 if self.is_flat else 1.0 / math.sqrt(D))
        if not self.is_flat:
            self.metric.start_at(math.exp(log_of_identity(self.metric.eps)), beta_std=1.0 / math.sqrt(D))
        elif self.init == "seed":
            self.metric.start_at(beta_std=1.0)
        else:
            self.metric.reset_to_unit_distance(2.0 * D)

    @property
    @torch.jit.unused
    def kind(self) -> str:
        """The head in words, such as "full Σ, on the indicatrix"."""
        words = ["Σ = I" if self.space == "sphere" else "full Σ" if self.full_sigma else "diagonal Σ"]
        words += ["Randers"] * (not self.metric.symmetric) + [f"on the {self.space}"] * (not self.is_flat)
        words += [f"{len(self.parts)} parts"] * (len(self.parts) > 1)
        return ", ".join(words + ["class prior"] * (self.prior is not None))

    def initial_distance(self) -> float:
        """E d_F(x, μ_k) at initialisation, for features of unit variance per coordinate (off ``"flat"``: any)."""
        if not self.is_flat:
            return math.sqrt(2.0)
        if self.init == "scaled":
            return 1.0
        one_form = 1.0 + self.metric.lambda_init * math.sqrt(2.0 / math.pi) * (1.0 if self.metric.symmetric else 0.0)
        return math.sqrt(2.0 * self.in_features) * one_form

    def gamma(self) -> Tensor:
        """The effective γ = |scale| [1]."""
        return absolute(self.scale)

    def forward(self, x: Tensor, embeds: bool = False) -> Tensor:
        """Logits [..., C] of features [..., D] ([B, C, H, W] of [B, D, H, W]).

        Args:
            x: features.
            embeds: give what :meth:`embed` does in the place of logits: parameters are read here alone, as hooks need.
        """
        if not torch.jit.is_scripting():
            node = traced_call(self, x, embeds)
            return without_autocast(self._embed if embeds else self._forward, x) if node is None else node
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features and (x.dim() != 4 or x.shape[1] != self.in_features):
            raise ValueError(f"expected features [..., {self.in_features}] or [B, {self.in_features}, H, W], got shape "
                             f"{list(x.shape)}")  # fmt: skip
        convolutional = x.dim() == 4 and x.shape[-1] != self.in_features and x.shape[1] == self.in_features
        if convolutional:
            x = x.permute(0, 2, 3, 1)
        logits = self._scaled_distances(x)
        if self.prior is not None:
            logits = logits + self.prior
        logits = logits.to(torch.promote_types(x.dtype, self.mu.dtype))
        return logits.permute(0, 3, 1, 2) if convolutional else logits

    def _scaled_distances(self, x: Tensor) -> Tensor:
        """-γ d_F(x, μ_k) [..., C]."""
        z = self._framed(x)
        if not self.cosine:
            return self.metric(self.project(z), self.project(self.mu), -self.gamma())
        z = z.to(torch.promote_types(torch.promote_types(z.dtype, self.mu.dtype), torch.float32))
        flat = z.reshape(-1, self.in_features)
        logits = cosine_logits(flat, self.mu.to(z.dtype), self.scale.to(z.dtype), self.metric.eps)
        return logits.reshape(z.shape[:-1] + logits.shape[1:])

    @torch.jit.unused
    def embed(self, x: Tensor) -> Tensor:
        """Features as the metric sees them: x itself of a flat head, else in at least float32 the point z / F(z)."""
        return self(x, embeds=True)

    def _embed(self, x: Tensor) -> Tensor:
        return self.project(self._framed(x))

    def _framed(self, x: Tensor) -> Tensor:
        """(x - c) A, or x where there is no frame; of several parts the point (√w_1 ẑ_1, √w_2 ẑ_2, …)."""
        if self.part_weights is None:
            return self._in_first_frame(x)
        pieces = x.split(self.parts, -1)
        wide = torch.promote_types(torch.promote_types(x.dtype, self.part_weights.dtype), torch.float32)
        roots = self.part_weights.to(wide).sqrt()
        points = [unit_vectors(self._in_first_frame(pieces[0])) * roots[0]]
        for i, frame in enumerate(self.frames):
            points.append(unit_vectors(frame(pieces[i + 1])) * roots[i + 1])
        return torch.cat(points, -1)

    def _in_first_frame(self, x: Tensor) -> Tensor:
        if self.center is not None and self.whiten is not None:
            wide = torch.promote_types(torch.promote_types(x.dtype, self.whiten.dtype), torch.float32)
            x, whiten = x.to(wide) - self.center.to(wide), self.whiten.to(wide)
            x = x @ whiten if self.full_sigma else x * whiten
        return x

    @torch.jit.ignore
    def sigma(self) -> Tensor:
        """Σ of the features, of the first part where there are several, as a dense matrix [D, D], in the dtype of the
        parameters."""
        if self.whiten is None:
            return self.metric.sigma()
        return self.whiten @ self.whiten.t() if self.full_sigma else torch.diag(self.whiten.square())

    def project(self, v: Tensor) -> Tensor:
        """Points as the metric sees them: v itself of a flat head, else in at least float32 v / F(v).

        Prototypes are such points, and so are means of embedded features: ``project`` of a point is the point itself.
        """
        if self.is_flat:
            return v
        if self.cosine:
            return unit_vectors(v)
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        return v / self.metric(v).unsqueeze(-1)

    @torch.jit.ignore
    @torch.no_grad()
    def take_frame(self, state: dict[str, Tensor]) -> bool:
        """Centre, Σ, β and λ from the state dict of another head, as they belong to the features whatever the classes.

        Returns:
            False, and the head is as it was, where either head is not on an indicatrix or the widths differ.
        """
        center = state.get("center")
        own = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        taken = {name: tensor for name, tensor in state.items() if name not in ("mu", "scale", "prior")}
        shapes = {name: own[name].shape for name in own if name.startswith("frames.")}
        if (
            self.center is None
            or center is None
            or center.shape != self.center.shape
            or shapes != {name: taken[name].shape for name in taken if name.startswith("frames.")}
        ):
            return False
        self.load_state_dict(own | taken)  # a state from before the frame would move μ
        self.mu.copy_(own["mu"])
        return True

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of all parameters: prototypes, Σ, β and scalars are not decayed (timm's optimisers ask for this)."""
        return {name for name, _ in self.named_parameters()}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        if reason := modernise(state_dict, prefix, self.space, self.metric.eps, self.cosine):
            args[-1].append(reason)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.num_classes}, space={self.space!r}, full_sigma={self.full_sigma}, "
            f"margin={self.margin:g}, prior={self.prior is not None}"
            + (f", parts={self.parts}" if len(self.parts) > 1 else "")
        )
