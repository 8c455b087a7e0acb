# SPDX-License-Identifier: MIT (keep the text of LICENSE with copies of this file)
"""Flow Matching for Generative Modeling (Lipman et al., ICLR 2023) in one file: copy it, it needs torch >= 2.4.

Equation numbers are those of arXiv:2210.02747v2. Time runs from noise, t = 0, to data, t = 1. x, x0 (noise) and
x1 (data) are (B, *dims). A vector field is any callable v(t, x, **cond) -> (B, *dims) with t of shape (B,); keyword
tensors in cond have B rows and follow their samples through loss, solver and likelihood. Lines marked `Departure:`
differ from the paper and say why. psi takes standard normal x0; a solve starts from N(0, path.source_std^2 I).

    1 Paths           ConditionalFlow, GaussianPath, AffinePath, OTPath, VPPath, VEPath, CosinePath    Eqs. (10)-(22)
    2 Loss            cfm_loss, as_velocity, ot_coupling, OBJECTIVES                             Eqs. (14), (43)-(46)
    3 Exact marginal  Marginal: p_t and u_t of a finite data set                                         Eqs. (6), (8)
    4 Solvers         odeint, sample, sample_sde, classifier_free_guidance                                                       Eq. (1)
    5 Likelihood      log_prob, bits_per_dim                                                     Eqs. (27)-(37), (47)
    6 UNet            UNet, the network of the paper's image experiments                              App. E, Table 3
"""
import functools
import heapq
import math
import warnings
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

__version__ = "1.0.0"


def expand(t, x):
    """t (a number, () or (B,)) reshaped to broadcast against x (B, *dims); half precision x keeps float32 times."""
    t = torch.as_tensor(t, dtype=_wide(x.dtype), device=x.device)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def _d_dt(f, t):
    """f(t) and d/dt f(t) by forward-mode autodiff, row by row."""
    with warnings.catch_warnings():  # torch 2.14 warns of its own torch.jit.script on the first forward-mode call
        warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
        return torch.func.jvp(f, (t.contiguous(),), (torch.ones_like(t),))


def _wide(dtype):
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _check_batch(name, x, wait=True):
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0 or x.numel() == 0:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a floating point tensor of shape (B, *dims) with B >= 1; got {got}")
    if (wait or x.device.type == "cpu") and not x.isfinite().all():
        raise ValueError(f"{name} must be finite; {(~x.isfinite()).sum().item()} of its {x.numel()} entries are not")


def _check_cond(cond, x):
    for name, c in cond.items():
        if not isinstance(c, Tensor) or c.ndim == 0 or len(c) != len(x):
            got = f"shape {tuple(c.shape)}" if isinstance(c, Tensor) else repr(c)
            raise ValueError(f"{name} is no option here, so it is conditioning: a tensor of {len(x)} rows; got {got}")


def _check_path(path):
    if not isinstance(path, ConditionalFlow):
        raise ValueError(f"path must be a ConditionalFlow such as OTPath(), no name and no class; got {path!r}")


def _check_affine(path):
    if not isinstance(path, AffinePath):
        raise ValueError(f"path must be affine, mu_t = alpha(t) x1, such as OTPath(); got {path!r}")


def _check_shape(v_t, x):
    if v_t.shape != x.shape:
        raise ValueError(f"v must return the shape of x, {tuple(x.shape)}; got {tuple(v_t.shape)}")
    return v_t


def _check_times(t, x, t_span):
    """t as (B,) in x's time dtype, refused outside the span."""
    t = torch.as_tensor(t, dtype=_wide(x.dtype), device=x.device)
    if t.shape not in ((), (len(x),)):
        raise ValueError(f"t must have shape () or ({len(x)},), one time for each row of x; got {tuple(t.shape)}")
    low, high = torch.tensor(t_span, dtype=t.dtype, device=t.device)
    if not ((t >= low) & (t <= high)).all():
        raise ValueError(f"t must lie in the path's t_span {tuple(t_span)}; got {t.min().item()} to {t.max().item()}")
    return t.expand(len(x))


# ---- 1 Paths, Section 4 ----------------------------------------------------------------------------------------------


class ConditionalFlow:
    """x_t = psi_t(x0 | x1), any map that is differentiable in t, Gaussian or not: all that CFM needs.

    psi(t, x0, x1) -> (B, *dims) gets t as (B,); give it here or define it in a subclass. t_span is where it is
    defined. Set allows_pairs = False if psi_0(x0) is not x0: such a flow takes no x0 of the user's.
    """

    t_span = (0.0, 1.0)
    source_std = 1.0
    allows_pairs = True

    def __init__(self, psi=None, t_span=(0.0, 1.0)):
        if psi is not None:
            self.psi = psi
        self.t_span = t_span

    def psi_dpsi(self, t, x0, x1):
        """psi_t(x0) and d/dt psi_t(x0), the point and the target of Eq. (14), by one forward-mode derivative."""
        t = torch.as_tensor(t, dtype=_wide(x1.dtype), device=x1.device).expand(len(x1))
        return _d_dt(lambda t: self.psi(t, x0, x1), t)

    def dpsi(self, t, x0, x1):
        """d/dt psi_t(x0), (B, *dims): the velocity u_t(psi_t(x0) | x1) of Eq. (13)."""
        return self.psi_dpsi(t, x0, x1)[1]

    def sample_t(self, n, device=None, dtype=None, generator=None):
        """Times (n,) in t_span, each uniform, stratified: one in every n-th part of it, in order but for a turn."""
        dtype = _wide(dtype or torch.get_default_dtype())
        u = torch.rand((), device=device, dtype=dtype, generator=generator)
        u = (u + torch.arange(n, device=device, dtype=dtype) / n) % 1
        return self.t_span[0] + (self.t_span[1] - self.t_span[0]) * u

    def sample_source(self, shape, device=None, dtype=None, generator=None):
        """Draws from p_0 = N(0, source_std^2 I), of the given shape."""
        return self.source_std * torch.randn(shape, device=device, dtype=dtype, generator=generator)


class GaussianPath(ConditionalFlow):
    """p_t(x | x1) = N(x | mu_t(x1), sigma_t(x1)^2 I), Eq. (10); sigma_t may also be elementwise.

    moments(t, x1) -> mu_t, sigma_t, d/dt mu_t, d/dt sigma_t, each to broadcast against x1 (use expand(t, x1)), with
    mu_0 = 0 and sigma_0 = source_std, unchecked: a solve starts from N(0, source_std^2 I).
    """

    def __init__(self, moments=None, t_span=(0.0, 1.0), source_std=1.0):
        if moments is not None:
            self.moments = moments
        self.t_span, self.source_std, self.allows_pairs = t_span, source_std, source_std == 1  # if mu_0 = 0

    def psi_dpsi(self, t, x0, x1):
        """psi_t(x0), Eq. (11), and d/dt psi_t(x0), Eq. (14): no division by sigma_t, so exact up to t = 1."""
        mu_t, sigma_t, dmu_t, dsigma_t = self.moments(t, x1)
        return sigma_t * x0 + mu_t, dsigma_t * x0 + dmu_t

    def psi(self, t, x0, x1):
        """The conditional flow psi_t(x0), Eq. (11), (B, *dims); x0 is standard normal for every path."""
        return self.psi_dpsi(t, x0, x1)[0]

    def u(self, t, x, x1):
        """Conditional vector field u_t(x | x1), Theorem 3, Eq. (15); it equals dpsi where x = psi_t(x0)."""
        mu_t, sigma_t, dmu_t, dsigma_t = self.moments(t, x1)
        return dsigma_t / sigma_t * (x - mu_t) + dmu_t

    def log_prob(self, t, x, x1):
        """log p_t(x | x1), Eq. (10), in nats, (B,)."""
        mu_t, sigma_t, _, _ = self.moments(t, x1)
        z = (x - mu_t) / sigma_t
        return -(z.square() / 2 + sigma_t.log() + math.log(2 * math.pi) / 2).reshape(len(x), -1).sum(1)

    def score(self, t, x, x1):
        """grad_x log p_t(x | x1), (B, *dims). The s of the paper's Eqs. (43) and (46) is minus this (a sign slip)."""
        mu_t, sigma_t, _, _ = self.moments(t, x1)
        return (mu_t - x) / sigma_t**2


class AffinePath(GaussianPath):
    """mu_t = alpha(t) x1 with std sigma(t), from two torch functions of t; all else follows, derivatives too."""

    def __init__(self, alpha, sigma, t_span=None):
        self.alpha, self.sigma = alpha, sigma
        if t_span is not None:
            self.t_span = t_span

    def coefficients(self, t):
        """alpha_t, sigma_t, d/dt alpha_t, d/dt sigma_t, each in the shape of t."""
        (alpha_t, sigma_t), (dalpha_t, dsigma_t) = _d_dt(lambda t: (self.alpha(t), self.sigma(t)), t)
        return alpha_t, sigma_t, dalpha_t, dsigma_t

    def moments(self, t, x1):
        """mu_t, sigma_t, d/dt mu_t, d/dt sigma_t of Eq. (10)."""
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.coefficients(expand(t, x1))
        return alpha_t * x1, sigma_t, dalpha_t * x1, dsigma_t

    def convert(self, t, x, value, source, target):
        """The target that a source value means at x = psi_t(x0), (B, *dims): velocity, score, noise (x0) or data (x1).

        x = alpha x1 + sigma x0 and its derivative, solved once; linear, so true of posterior means as well. Eq. (46) is
        "noise" or "score" to "velocity". The score is that of p_t if x0 was drawn independent of x1. Raises ValueError
        where it divides by zero: data to noise or velocity and anything else to score at sigma_t = 0; noise or score to
        velocity or data at alpha_t = 0.
        """
        for name, kind in (("source", source), ("target", target)):
            if kind not in ("velocity", "score", "noise", "data"):
                raise ValueError(f"{name} must be velocity, score, noise or data; got {kind!r}")
        if source == target:
            return value
        t = expand(t, x)
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.coefficients(t)

        def divisor(d):
            if (d == 0).any():
                where = f"t = {t[d == 0][0].item():.6g} of {self!r}"
                raise ValueError(f"{source} does not tell {target} at {where}; stay away from it, or take VPPath()")
            return d

        if source == "velocity":
            det = divisor(dalpha_t * sigma_t - alpha_t * dsigma_t)
            x0, x1 = (dalpha_t * x - alpha_t * value) / det, (sigma_t * value - dsigma_t * x) / det
        elif source == "data":
            x1 = value
            x0 = (x - alpha_t * x1) / divisor(sigma_t)
        else:
            x0 = value if source == "noise" else -sigma_t * value
            x1 = (x - sigma_t * x0) / divisor(alpha_t) if target in ("data", "velocity") else None
        if target == "velocity":
            return dsigma_t * x0 + dalpha_t * x1
        return {"noise": x0, "data": x1}[target] if target != "score" else -x0 / divisor(sigma_t)

    def forward_sde(self, t, x):
        """Drift f (B, *dims) and diffusion g (B, 1, ...) of the forward_sde SDE dx = f ds + g dw, Eq. (38), s = 1 - t.

        By Eq. (40) the velocity is -(f - g^2 / 2 score). Both are infinite where alpha_t = 0.
        """
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.coefficients(expand(t, x))
        return -dalpha_t / alpha_t * x, (2 * sigma_t * (dalpha_t / alpha_t * sigma_t - dsigma_t)).sqrt()

    @functools.cached_property
    def t_span(self):
        """[0, 1], cut at 1 - 1e-5 where sigma_1 = 0 and u_t, the score and log p_t divide by zero (App. E.1's cut)."""
        return 0.0, 1.0 if self.coefficients(torch.ones(1))[1].item() > 1e-6 else 1 - 1e-5

    @functools.cached_property
    def source_std(self):
        """sigma_0, the std of the source p_0."""
        std = self.coefficients(torch.zeros(1))[1].item()
        if not std > 0:
            raise ValueError(f"sigma(0) must be > 0, since t = 0 is noise and t = 1 is data; got {std} for {self!r}")
        return std

    @functools.cached_property
    def allows_pairs(self):
        """Whether psi_0(x0) = x0, so that pairs (x0, x1) of the user's make sense."""
        alpha_0, sigma_0, _, _ = self.coefficients(torch.zeros(1))
        return abs(alpha_0.item()) < 1e-6 and abs(sigma_0.item() - 1) < 1e-6


@dataclass(frozen=True)
class OTPath(AffinePath):
    """Optimal transport path, Eq. (20): straight lines at constant speed."""

    sigma_min: float = 1e-4

    def __post_init__(self):
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min must lie in [0, 1); got {self.sigma_min}")

    def coefficients(self, t):
        """alpha_t, sigma_t of Eq. (20) and their time derivatives."""
        slope = -(1 - self.sigma_min)
        return t, 1 + slope * t, torch.ones_like(t), torch.full_like(t, slope)


@dataclass(frozen=True)
class VPPath(AffinePath):
    """Variance preserving diffusion path, Eq. (18), with the beta schedule of App. E.1."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    source_std = 1.0  # Departure from sigma_0 = 0.99998: the paper samples and scores with N(0, I), and so do we

    def __post_init__(self):
        if not (0 <= self.beta_min <= self.beta_max < math.inf and self.beta_max > 0):
            raise ValueError(f"VPPath needs 0 <= beta_min <= beta_max > 0; got {self.beta_min}, {self.beta_max}")

    def beta(self, s):
        """beta(s) of App. E.1; s = 1 - t is diffusion time."""
        return self.beta_min + s * (self.beta_max - self.beta_min)

    def coefficients(self, t):
        """alpha_{1-t}, sqrt(1 - alpha_{1-t}^2) of Eq. (18) and their derivatives in t (not in s)."""
        s = 1 - t
        T = s * self.beta_min + s**2 / 2 * (self.beta_max - self.beta_min)
        alpha_t, sigma_t = torch.exp(-T / 2), torch.sqrt(-torch.expm1(-T))
        half_beta = self.beta(s) / 2
        return alpha_t, sigma_t, half_beta * alpha_t, -half_beta * alpha_t**2 / sigma_t


@dataclass(frozen=True)
class VEPath(AffinePath):
    """Variance exploding diffusion path, Eq. (16), with the geometric schedule of Song et al. (2021).

    Departure: sigma_min > 0 at the data, not 0, and p_0 = N(0, sigma_max^2 I), for the x1 of Eq. (16) is not known.
    """

    sigma_min: float = 0.01
    sigma_max: float = 10.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"VEPath needs 0 < sigma_min < sigma_max; got {self.sigma_min}, {self.sigma_max}")

    @property
    def source_std(self):
        """sigma_max: psi_t takes standard normal x0 all the same."""
        return self.sigma_max

    def coefficients(self, t):
        """1, sigma_max (sigma_min / sigma_max)^t and their time derivatives."""
        rate = math.log(self.sigma_min / self.sigma_max)
        sigma_t = self.sigma_max * torch.exp(rate * t)
        return torch.ones_like(t), sigma_t, torch.zeros_like(t), rate * sigma_t


@dataclass(frozen=True)
class CosinePath(AffinePath):
    """alpha = sin, sigma = cos of pi t / 2: the VP arc at constant speed (not in the paper)."""

    def coefficients(self, t):
        """sin, cos of pi t / 2 and their time derivatives; the cosine is written so that it is exact near t = 1."""
        alpha_t, sigma_t = torch.sin(math.pi / 2 * t), torch.sin(math.pi / 2 * (1 - t))
        return alpha_t, sigma_t, math.pi / 2 * sigma_t, -math.pi / 2 * alpha_t


PATHS = {"ot": OTPath, "vp": VPPath, "ve": VEPath, "cosine": CosinePath}


# ---- 2 Loss, Section 3.2 ---------------------------------------------------------------------------------------------

# The rows of Table 1 as keywords of cfm_loss; "score" is score matching, "scoreflow" weighs it for likelihood.
OBJECTIVES = {"velocity": {}, "noise": {"predict": "noise"}, "score": {"predict": "score", "weight": "sigma^2"},
              "scoreflow": {"predict": "score", "weight": "beta"}}


def cfm_loss(v, path, x1, *, x0=None, t=None, reduction="mean", predict="velocity", weight=None, noise=None, **cond):
    """One-batch estimate of L_CFM, Eq. (14) (Eq. (23) for OTPath): a scalar, or (B,) with reduction="none".

    x1: (B, *dims) data. x0: (B, *dims), given for pair conditioning z = (x0, x1), else it is noise, your own draw from
    N(0, I), or a fresh one. t: () or (B,), else drawn stratified. cond: tensors of B rows for v. Its minimum is not 0
    but E Var[dpsi | x_t].
    predict: what v gives, "velocity", "noise" (Eq. (45), DDPM), "score" (Eq. (43), the score itself, not the paper's
    minus) or "data". weight: lambda(t) of Eq. (43), a function of t (B,), "sigma^2" (score matching) or "beta"
    (ScoreFlow). Raises ValueError for shapes that do not match, data that is not finite floating point, t outside
    path.t_span and x0 for a path whose psi_0 is not the identity.
    """
    _check_path(path)
    _check_batch("x1", x1, wait=False)  # on a GPU no look at the values, which would wait for it: the loss turns NaN
    _check_cond(cond, x1)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none'; got {reduction!r}")
    if predict not in ("velocity", "noise", "score", "data") or predict == "score" and not hasattr(path, "moments"):
        raise ValueError(f"predict must be velocity, noise, data or, on a GaussianPath, score; got {predict!r}")
    weights = {"sigma^2": lambda t: path.coefficients(t)[1].square(), "beta": lambda t: path.beta(1 - t)}
    if not (weight is None or callable(weight) or weight in ("sigma^2", *["beta"] * hasattr(path, "beta"))):
        rule = "weight must be None, a function of t, 'sigma^2', or 'beta' on VPPath"
        raise ValueError(f"{rule}; got {weight!r} on {path!r}")
    if t is None:
        # Departure: t ~ U[t_span] row by row, but stratified over the batch, which lowers the variance of the loss.
        u = torch.rand((), device=x1.device) + torch.arange(len(x1), device=x1.device) / len(x1)
        t = path.t_span[0] + (path.t_span[1] - path.t_span[0]) * (u % 1).to(_wide(x1.dtype))
    else:
        t = _check_times(t, x1, path.t_span)
    if x0 is not None and (noise is not None or not path.allows_pairs):
        if noise is not None:
            raise ValueError("x0, your pairs, and noise, a draw independent of x1, exclude each other; leave one out")
        raise ValueError(f"x0 cannot be paired on {path!r}: psi_0(x0) is not x0 there; use OTPath or CosinePath")
    name, x0 = ("noise", noise) if x0 is None else ("x0", x0)
    if x0 is None:
        x0 = torch.randn_like(x1)
    else:
        _check_batch(name, x0, wait=False)
        if x0.shape != x1.shape:
            raise ValueError(f"{name} must have the shape of x1, {tuple(x1.shape)}; got {tuple(x0.shape)}")
    x_t, target = path.psi_dpsi(t, x0, x1)
    if predict != "velocity":
        target = {"noise": lambda: x0, "data": lambda: x1, "score": lambda: -x0 / path.moments(t, x1)[1]}[predict]()
    v_t = _check_shape(v(t, x_t.to(x1.dtype), **cond), x1)
    # Departure: Eq. (14) sums over dimensions; the mean keeps the learning rate independent of their number.
    loss = (v_t - target).square().reshape(len(x1), -1).mean(1)
    if weight is not None:
        loss = loss * weights.get(weight, weight)(t)
        if loss.shape != t.shape:
            raise ValueError(f"weight must give one number for each t, ({len(t)},); its product is {tuple(loss.shape)}")
    return loss.mean() if reduction == "mean" else loss


def as_velocity(model, path, predict):
    """The vector field of a network that predicts "score", "noise", "data" or "velocity" on its path, Eq. (46).

    path: affine. The field raises ValueError where convert does: t = 0 of OTPath for a score or noise.
    """
    _check_affine(path)
    return lambda t, x, **cond: path.convert(t, x, model(t, x, **cond), predict, "velocity")


def ot_coupling(x0, x1):
    """The permutation p, (B,), for which pairs (x0[p], x1) have the least sum of squared distances; needs SciPy.

    This is minibatch optimal transport (Tong et al., 2024), which changes who is paired with whom, every point used
    once. The paper's OT path is another thing: how a given pair is joined. Use it as cfm_loss(..., x0=x0[p]); with
    labels, within each of them, for otherwise x0 given the label is no longer N(0, I), which samples start from.
    """
    if x0.shape != x1.shape:
        raise ValueError(f"x0 and x1 must have one shape; got {tuple(x0.shape)} and {tuple(x1.shape)}")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("ot_coupling needs SciPy: pip install scipy") from None
    cost = torch.cdist(*(x.reshape(len(x), -1).to(_wide(x.dtype)) for x in (x1, x0))).square()
    return torch.as_tensor(linear_sum_assignment(cost.detach().cpu().numpy())[1], device=x0.device)


# ---- 3 Exact marginals of finite data, Section 3.1 -------------------------------------------------------------------


class Marginal:
    """The exact marginal field u_t, Eq. (8), of data (N, *dims) under an affine path: call it as v(t, x). See Eq. (26).

    All of it comes from the posterior mean of x1, since Eq. (15) is linear in x1. Queries are worked off in chunks
    of at most 64 MB. t: a number, () or (B,) inside path.t_span; ValueError for other t, other paths, bad data.
    """

    def __init__(self, path, data):
        _check_affine(path)
        _check_batch("data", data)
        if data.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"data must be float32 or float64 for sums over all of it; got {data.dtype}")
        self.path, self.data = path, data.reshape(len(data), -1)  # (N, d)
        self._sq_norm = torch.linalg.vector_norm(self.data, dim=1).square()  # (N,)

    def _map(self, f, t, x):
        """f(log w, alpha_t, sigma_t, x), chunk by chunk; log w: (Q, N), log N(x | alpha_t x_i, sigma_t^2 I) + const."""
        _check_batch("x", x, wait=False)
        t, x, (N, d) = _check_times(t, x, self.path.t_span), x.reshape(len(x), -1), self.data.shape
        if x.shape[1] != d or x.dtype != self.data.dtype:
            raise ValueError(f"x must be {d}-dimensional {self.data.dtype} like the data; got {x.shape[1]}, {x.dtype}")
        n, parts = max(1, 2**24 // (N * (d if d <= 32 else 1))), []
        with torch.autocast(x.device.type, enabled=False):
            for t, x in zip(t.split(n), x.split(n)):
                alpha_t, sigma_t, _, _ = self.path.coefficients(t[:, None])  # (Q, 1)
                parts.append(f(-self._sq_distance(x, alpha_t, sigma_t) / (2 * sigma_t**2), alpha_t, sigma_t, x))
        return torch.cat(parts)

    def _sq_distance(self, x, alpha_t, sigma_t):
        """|x - alpha_t x_i|^2, (Q, N), to an error that is small beside sigma_t^2."""
        if x.shape[1] <= 32:
            return (x[:, None] - alpha_t[:, None] * self.data).square().sum(2)
        sq_norm = x.square().sum(1, keepdim=True)
        product = sq_norm + alpha_t**2 * self._sq_norm - 2 * alpha_t * (x @ self.data.T)
        rounding = torch.finfo(x.dtype).eps * (sq_norm + alpha_t**2 * self._sq_norm.max()) / sigma_t**2
        cancels = (rounding > 0.03) & (alpha_t > 1e-3)  # the log weights would be off by half of that
        if not cancels.any():
            return product
        direct = torch.cdist(x / alpha_t.clamp(min=1e-3), self.data, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.where(cancels, (alpha_t * direct).square(), product)

    def posterior(self, t, x):
        """p_t(x_i | x), the weight of every data point in Eq. (8), (B, N); rows sum to 1."""
        return self._map(lambda log_w, *_: log_w.softmax(1), t, x)

    def log_prob(self, t, x):
        """log p_t(x), Eq. (6), in nats, (B,)."""
        N, d = self.data.shape
        norm = lambda sigma_t: d * sigma_t.log() + d / 2 * math.log(2 * math.pi) + math.log(N)
        return self._map(lambda log_w, _, sigma_t, x: log_w.logsumexp(1) - norm(sigma_t[:, 0]), t, x)

    def x1_mean(self, t, x):
        """E[x1 | x_t = x], (B, *dims)."""
        return self._map(lambda log_w, *_: log_w.softmax(1) @ self.data, t, x).reshape(x.shape)

    def __call__(self, t, x, **cond):
        """u_t(x), Eq. (8), (B, *dims): Eq. (15) at the posterior mean of x1."""
        return self.path.u(t, x, self.x1_mean(t, x))

    def score(self, t, x):
        """grad_x log p_t(x), (B, *dims)."""
        return self.path.score(t, x, self.x1_mean(t, x))


# ---- 4 Solvers, Eq. (1) ----------------------------------------------------------------------------------------------


class Tableau(NamedTuple):
    """Stage i calls v at (t + C[i] h, x + h sum_j A[i][j] k_j); the step is h sum_j B[j] k_j, its error has E for B."""

    C: tuple
    A: tuple
    B: tuple = None  # None: the last stage is the solution itself, so its k opens the next step
    E: tuple = None


# fmt: off
EULER = Tableau((0,), ((),), (1,))
MIDPOINT = Tableau((0, 1/2), ((), (1/2,)), (0, 1))
RK4 = Tableau((0, 1/2, 1/2, 1), ((), (1/2,), (0, 1/2), (0, 0, 1)), (1/6, 1/3, 1/3, 1/6))  # Kutta (1901)
DOPRI5 = Tableau(  # Dormand & Prince (1980), RK5(4)7M
    C=(0, 1/5, 3/10, 4/5, 8/9, 1, 1),
    A=((),
       (      1/5,),
       (     3/40,        9/40),
       (    44/45,      -56/15,       32/9),
       (19372/6561, -25360/2187, 64448/6561, -212/729),
       ( 9017/3168,     -355/33, 46732/5247,   49/176,   -5103/18656),
       (    35/384,           0,   500/1113,  125/192,    -2187/6784,    11/84)),
    E=(    71/57600,          0, -71/16695,    71/1920, -17253/339200,  22/525, -1/40),  # fifth minus fourth order
)
# fmt: on
METHODS = {"euler": EULER, "midpoint": MIDPOINT, "rk4": RK4, "dopri5": DOPRI5}


class Solution(NamedTuple):
    """x: (B, *dims) at the last time; xs: (T, B, *dims) at every requested time; nfe, accepted, rejected: (B,) counts.

    nfe is how often the field was called for that sample, start-up and rejected steps included.
    """

    x: Tensor
    xs: Tensor
    nfe: Tensor
    accepted: Tensor
    rejected: Tensor


class SolverError(RuntimeError):
    """The solve cannot go on; .t (B,) and .x (B, *dims) hold the state that every sample has reached."""

    def __init__(self, message, t, x):
        super().__init__(message)
        self.t, self.x = t, x


def odeint(v, x, t=(0.0, 1.0), method="dopri5", steps=None, rtol=None, atol=None, max_nfe=None, **cond):
    """Solution of d/dt x = v(t, x), Eq. (1), from x at t[0] through every time in t, forward or backward.

    method: "euler", "midpoint", "rk4" take exactly `steps` steps in all, shared by length, at least one an interval;
    "dopri5" keeps every sample within atol + rtol |x| (RMS over its dims, 1e-5 each unless given) on its own, as if
    it were alone, with at most max_nfe (10,000) calls a sample. cond: tensors of B rows for v. Differentiable when
    grad mode is on: use torch.no_grad() for plain sampling.
    Raises ValueError for bad arguments, SolverError when a step underflows, v is not finite or max_nfe is spent.
    """
    _check_batch("x", x)
    _check_cond(cond, x)
    wide = _wide(x.dtype)

    def f(t, z, **cond):
        return _check_shape(v(t, z.to(x.dtype), **cond), z).to(wide)

    xs, *counts = _solve(f, x.to(wide), t, method, steps, rtol, atol, max_nfe, None, cond)
    return Solution(xs[-1].to(x.dtype), xs.to(x.dtype), *counts)


@torch.no_grad()
def sample(v, path, shape, device=None, dtype=None, generator=None, **solver):
    """Solution of Eq. (1) from x0 ~ N(0, path.source_std^2 I) of that shape over path.t_span; .x holds the samples.

    solver: the keywords of odeint, conditioning included. No gradients; use odeint for those.
    """
    _check_path(path)
    x0 = path.sample_source(shape, device=device, dtype=dtype, generator=generator)
    return odeint(v, x0, **{"t": path.t_span, **solver})


@torch.no_grad()
def sample_sde(v, path, shape, steps, g=1.0, device=None, dtype=None, generator=None, **cond):
    """Samples, (B, *dims), of dx = (v + g^2 / 2 score) dt + g dw by Euler-Maruyama, the last step without noise.

    Any g, a number or a function of t (a float) to one, has the marginals of the ODE, its case g = 0; v must be the
    velocity of an affine path, learned with x0 independent of x1. Where path.forward_sde is finite, its g makes this the
    reverse SDE of Song et al. (2021). Raises ValueError for bad arguments, SolverError when a step is not finite.
    """
    _check_affine(path)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1; got {steps!r}")
    x = path.sample_source(shape, device=device, dtype=dtype, generator=generator)
    _check_cond(cond, x)
    t0, t1 = path.t_span
    h = (t1 - t0) / steps
    for i in range(steps):
        t = x.new_full((len(x),), t0 + i * h, dtype=_wide(x.dtype))
        g_t = g(t0 + i * h) if callable(g) else g
        v_t = _check_shape(v(t, x, **cond), x)
        drift = v_t + g_t**2 / 2 * path.convert(t, x, v_t, "velocity", "score")
        noise = torch.randn(shape, device=x.device, dtype=x.dtype, generator=generator) if i + 1 < steps else 0
        x_new = (x + h * drift + math.sqrt(h) * g_t * noise).to(x.dtype)
        if not x_new.isfinite().all():
            what = f"step {i + 1} of {steps}, at t = {t[0]:.6g}, is not finite"
            raise SolverError(f"{what}; are v and g = {g_t} finite there? take more steps", t, x)
        x = x_new
    return x


def classifier_free_guidance(v, scale, drop=("y",)):
    """The field v(without drop) + scale (v(with it) - v(without it)): scale 1 is no guidance, more strengthens it.

    drop names the conditioning to leave out; v must take the call without it. Every call costs two of v.
    """

    def field(t, x, **cond):
        free = v(t, x, **{name: c for name, c in cond.items() if name not in drop})
        return free + scale * (v(t, x, **cond) - free)

    return field


def _solve(f, x, t, method, steps, rtol, atol, max_nfe, split, cond):
    """xs (T, B, *dims), nfe, accepted, rejected for x (B, *dims), once the options are seen to fit together."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    grid = torch.as_tensor(t, dtype=x.dtype, device="cpu")
    order = grid.diff().sign() if grid.ndim == 1 else grid.new_zeros(1)
    if len(order) == 0 or not grid.isfinite().all() or not (order == order[0]).all() or order[0] == 0:
        raise ValueError(f"t must be two or more finite times, strictly rising or strictly falling in {x.dtype}; "
                         f"got {t}")
    t = t.tolist() if isinstance(t, Tensor) else [float(s) for s in t]
    if method == "dopri5":
        rtol, atol = 1e-5 if rtol is None else rtol, 1e-5 if atol is None else atol
        max_nfe = 10_000 if max_nfe is None else max_nfe
        if steps is not None:
            raise ValueError(f"steps = {steps} does not go with dopri5, which picks its own; set rtol and atol, "
                             "or method='rk4'")
        if not isinstance(max_nfe, int) or max_nfe < 8:
            raise ValueError(f"max_nfe must be a whole number >= 8, the calls of one step; got {max_nfe!r}")
        if not (rtol >= 0 and atol >= 0 and 0 < rtol + atol < math.inf):
            raise ValueError(f"rtol and atol must be >= 0, finite, and not both 0; got {rtol}, {atol}")
        return _plain(_dopri5, f, x, t, rtol, atol, max_nfe, split, cond)
    if not (rtol is None and atol is None and max_nfe is None):
        raise ValueError(f"rtol, atol and max_nfe are for dopri5; {method} takes steps alone")
    if not isinstance(steps, int) or steps < len(t) - 1:
        raise ValueError(f"{method} needs steps, a whole number, at least one for each of the {len(t) - 1} intervals; "
                         f"got {steps}")
    return _plain(_fixed_steps, f, x, t, METHODS[method], steps, cond)


def _plain(solver, f, x, *args):
    """solver(f, x, ...), whose own sums keep x's precision where autocast is on, for v, around it."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return solver(f, x, *args)

    def cast(t, x, **cond):
        with torch.autocast(kind, dtype):
            return f(t, x, **cond)

    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return solver(cast, x, *args)


def _tensors(tableau, x):
    """C, the rows of A and B that lead from point to point, and E as tensors beside x, in one transfer."""
    rows = [a for a in (tableau.C, *tableau.A[1:], tableau.B, tableau.E) if a]
    table = torch.tensor([(*a, *(0,) * (len(tableau.C) - len(a))) for a in rows], dtype=x.dtype, device=x.device)
    C, *A = (r[: len(a)] for r, a in zip(table.unbind(), rows))
    return C[:, None], A, A.pop() if tableau.E else None


def _workspace(x, stages):
    """Views of one buffer for h times the slopes: one in the shape of x (B, *dims) each; the first i as (B d, i).

    None with gradients, which a buffer that is written again would spoil.
    """
    if torch.is_grad_enabled():
        return None, None
    K = x.new_empty(stages, x.numel())
    return [row.view(x.shape) for row in K], [K[:i].T for i in range(1, stages + 1)]


def _rk_step(f, C, A, t, t_new, x, k, cond, workspace):
    """x at t_new, h times all slopes (B d, stages), and the last slope of an explicit Runge-Kutta step; k = f(t, x)."""
    shape, x, (rows, columns), hks = x.shape, x.reshape(-1), workspace, []
    T = torch.lerp(t, t_new, C).unbind()  # never leaves [t, t_new], and ends on it exactly
    h = (t_new - t).view(-1, *(1,) * (len(shape) - 1))

    def slopes(k):
        if rows is None:
            hks.append((h * k).reshape(-1))
            return torch.stack(hks).T
        hks.append(torch.mul(h, k, out=rows[len(hks)]))
        return columns[len(hks) - 1]

    K = slopes(k)
    for i, a in enumerate(A, 1):
        x_i = torch.addmv(x, K, a).view(shape)  # a matrix-vector product: its rounding does not depend on the batch
        if i < len(T):
            k = f(T[i], x_i, **cond)
            K = slopes(k)
    return x_i, K, k


def _fixed_steps(f, x, t, tableau, steps, cond):
    C, A, _ = _tensors(tableau, x)
    counts = [1] * (len(t) - 1)
    longest = [(-abs(b - a), i) for i, (a, b) in enumerate(zip(t, t[1:]))]
    heapq.heapify(longest)
    for _ in range(steps - len(counts)):  # the next step goes where steps are longest
        i = longest[0][1]
        counts[i] += 1
        heapq.heapreplace(longest, (-abs(t[i + 1] - t[i]) / counts[i], i))
    xs, nfe, space = [x], 0, _workspace(x, len(C))
    for a, b, n in zip(t, t[1:], counts):
        for j in range(n):
            s, s_new = (x.new_full((len(x),), a + (b - a) * m / n if m < n else b) for m in (j, j + 1))
            x_new, _, _ = _rk_step(f, C, A, s, s_new, x, f(s, x, **cond), cond, space)
            nfe += len(C)
            if not x_new.isfinite().all():
                i = _first(~x_new.isfinite())
                what = f"the step of {b - a:.1e} / {n} from t = {s[i]:.6g} is not finite in sample {i}"
                raise SolverError(f"{what} after {nfe} calls; is v finite there? take more steps", s, x)
            x = x_new
        xs.append(x)
    count = torch.full((len(x),), steps, device=x.device)
    return torch.stack(xs), count * len(C), count, count * 0


def _first(mask):
    """The first row of mask (B, ...) with a True."""
    return mask.reshape(len(mask), -1).any(1).int().argmax().item()


def _rms(e, split):
    """RMS of each row, (B,); the columns from split on, a log-determinant, are a block of their own."""
    e = e.reshape(len(e), -1)
    blocks = (e,) if split is None else (e[:, :split], e[:, split:])
    return functools.reduce(torch.maximum, [torch.linalg.vector_norm(b, dim=1) * b.shape[1] ** -0.5 for b in blocks])


def _judge(x, x_new, e, step, rtol, atol, split):
    """Whether each row's step from x to x_new is good, its error e in units of the tolerances, and the next step."""
    error = _rms(e / (torch.maximum(x.abs(), x_new.abs()) * rtol + atol), split)
    ok = (error <= 1) & (step != 0)  # False also where error is not a number
    factor = (0.9 * torch.exp(-0.2 * torch.log(error))).clamp(0.2, 3)
    return ok, error, step * torch.where(factor.isnan(), 0.2, factor)


def _why_stuck(ok, error, step, t_new, grid):
    """Row and cause if a rejected step is too short to be made shorter, else None."""
    stuck = ~ok & (step.abs() <= torch.finfo(step.dtype).eps * (10 * t_new.abs() + grid.abs().max() / 100))
    if not stuck.any():
        return None
    i = _first(stuck)
    why = "rtol and atol are too tight for" if error[i].isfinite() else "v is not finite near here in"
    return i, f"the step is below the resolution of t; {why} {step.dtype}, or v is singular here"


def _fail(what, i, calls, row, t, x, h, t_last, xs):
    """Raises SolverError for row i, with the state that every sample has reached: its last if it was done."""
    t_reached, x_reached = t_last.repeat(xs.shape[1]), xs[-1].detach().clone()
    t_reached[row], x_reached[row] = t, x.detach()
    where = f"step {h[i]:.1e} at t = {t[i]:.6g} in sample {row[i]}, NFE {calls}"
    raise SolverError(f"dopri5: {where}: {what}", t_reached, x_reached)


def _dopri5(f, x, t, rtol, atol, max_nfe, split, cond):
    """Adaptive steps: sample i of x (B, *dims) has a time, step and error of its own and leaves when it is done."""
    # Departure: torchdiffeq, the paper's solver, has one step size for the whole batch.
    C, A, E = _tensors(DOPRI5, x)
    grid = x.new_tensor(t)
    row = torch.arange(len(x), device=x.device)  # which sample a row is
    leg = torch.ones_like(row)  # and which of the times it heads for
    xs, nfe, rejected = x.new_zeros(len(t), *x.shape), torch.zeros_like(row), torch.zeros_like(row)
    xs[0], t, t_end, calls = x, grid[:1].repeat(len(x)), grid[1:2].repeat(len(x)), 1
    fail = lambda i, what: _fail(what, i, calls, row, t, x, h, grid[-1:], xs)
    k, h = f(t, x, **cond), torch.zeros_like(t)
    if not k.isfinite().all():
        fail(_first(~k.isfinite()), "v is not finite at the start; look at its weights and at x")
    with torch.no_grad():
        h = _first_step(f, t, x, k, grid[1] - grid[0], rtol, atol, split, cond)
    calls += 1
    space = _workspace(x, 7)
    while True:
        if calls + 6 > max_nfe:
            fail(0, f"max_nfe = {max_nfe} is spent; loosen rtol and atol, raise max_nfe, or see whether v is stiff")
        to_go = t_end - t
        left = to_go / h  # steps; the last two are made equal
        hit = left <= 1.01
        t_new = torch.where(hit, t_end, t + torch.where(left < 2, to_go / 2, h))
        x_new, K, k_new = _rk_step(f, C, A, t, t_new, x, k, cond, space)
        calls += 6
        with torch.no_grad():
            step, h_old = t_new - t, h
            ok, error, h = _judge(x, x_new, torch.mv(K, E).view(x.shape), step, rtol, atol, split)
        if ok.all():
            t, x, k = t_new, x_new, k_new
        else:
            if stuck := _why_stuck(ok, error, step, t_new, grid):
                fail(*stuck)
            t, ok_x = torch.where(ok, t_new, t), ok.view(-1, *(1,) * (x.ndim - 1))
            x, k = torch.where(ok_x, x_new, x), torch.where(ok_x, k_new, k)
            rejected[row] += ~ok
        arrived = hit & ok
        if arrived.any():
            xs[leg, row], nfe[row] = x, calls  # rows that have not arrived will write again
            cut = arrived & (h_old / step > 1.01)  # a step cut short says nothing against the longer one
            leg, h = leg + arrived, torch.where(cut & (h_old / h > 1), h_old, h)
            go_on = (leg < len(grid)).nonzero()[:, 0]
            if len(go_on) == 0:
                return xs, nfe, (nfe - 2) // 6 - rejected, rejected
            if len(go_on) < len(row):
                t, h, x, k, row, leg = (s.index_select(0, go_on) for s in (t, h, x, k, row, leg))
                cond = {name: c.index_select(0, go_on) for name, c in cond.items()}
                space = _workspace(x, 7)
            t_end = grid[leg]


def _first_step(f, t, x, k, span, rtol, atol, split, cond):
    """A first step (B,), signed, from two slopes a little apart, inside the first interval.

    After Hairer, Norsett & Wanner (1993), II.4, whose h1 serves as the lower bound. A field of rate L = |v'| / |v|
    has an error near |v| L^4 h^5 / 1000; to set it to 0.1 saves a fifth of the calls on easy fields.
    """
    scale = atol + rtol * x.abs()
    d0, d1 = _rms(x / scale, split), _rms(k / scale, split)
    h0 = torch.minimum(0.01 * d0.clamp(min=1e3) / d1, 0.01 * span.abs())
    step = h0 * span.sign()
    d2 = _rms((f(t + step, x + expand(step, x) * k, **cond) - k) / scale, split) / h0
    h1 = torch.exp(torch.log(torch.fmax(100 / (d1 * (d2 / d1).square().square()), 0.01 / torch.maximum(d1, d2))) / 5)
    h1 = torch.where(h1.isnan() | (h1 == 0), h0, torch.minimum(h1, 1000 * h0))  # h0: the probe was not finite
    return torch.minimum(h1, span.abs()) * span.sign()


# ---- 5 Likelihood, Appendix C ----------------------------------------------------------------------------------------


class LogProb(NamedTuple):
    """log_prob: (B,) in nats; std_err: (B,) over the probes, 0 if exact, NaN for one; x0: (B, *dims); nfe: (B,)."""

    log_prob: Tensor
    std_err: Tensor
    x0: Tensor
    nfe: Tensor


def log_prob(v, x1, path, divergence="exact", probes=1, differentiable=False, method="dopri5",
             steps=None, rtol=None, atol=None, max_nfe=None, **cond):  # fmt: skip
    """log p_1(x1) in nats, (B,), by the reverse ODE of Eqs. (31)-(33), as a LogProb record.

    x1: (B, *dims) of any shape. path: gives t_span and source_std; None means [0, 1] and N(0, I). divergence: "exact"
    trace (d products a call) or "hutchinson", Eq. (34), with `probes` Rademacher vectors drawn once a solve.
    differentiable: whether gradients reach v's weights and x1, for training by maximum likelihood. cond and the
    solver's keywords: as in odeint. The log-determinant is held to the tolerances as a block of its own.
    Raises ValueError for bad arguments, SolverError as odeint does.
    """
    if path is not None:
        _check_path(path)
    _check_batch("x1", x1)
    _check_cond(cond, x1)
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"divergence must be 'exact' or 'hutchinson'; got {divergence!r}")
    if not isinstance(probes, int) or probes < 1 or (divergence == "exact" and probes != 1):
        raise ValueError(f"probes must be a whole number >= 1, and goes with divergence='hutchinson'; got {probes!r}")
    (B, *dims), d, wide = x1.shape, x1[0].numel(), _wide(x1.dtype)
    with torch.inference_mode(False):  # whose tensors cannot be differentiated, silently
        x1, cond = x1.clone(), {name: c.clone() for name, c in cond.items()}
    if divergence == "exact":
        eps = torch.eye(d, dtype=x1.dtype, device=x1.device).view(d, 1, *dims)  # (d, 1, *dims): tr = sum_j e_j^T J e_j
    else:  # Departure: the paper names no law; Rademacher signs have the least variance
        cond = {**cond, "_eps": torch.randint(2, (B, probes, *dims), device=x1.device).to(x1.dtype) * 2 - 1}

    def f(t, z, _eps=None, **cond):  # z = [phi_t, f(t)], Eqs. (28)-(29)
        x = z[:, :d].view(-1, *dims).to(x1.dtype)
        rows = eps if _eps is None else _eps.movedim(1, 0)  # a sample's probes have stayed with it
        v_t, div_t = _divergence(v, t, x, rows, divergence == "exact", differentiable, cond)
        return torch.cat([v_t.reshape(len(z), d).to(wide), -div_t], 1)

    t0, t1 = path.t_span if path else (0.0, 1.0)
    # Attention's fused kernels have no double backward, and their backward no batching rule: take the plain product.
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable), sdpa_kernel(SDPBackend.MATH):
        z1 = torch.cat([x1.reshape(B, d), x1.new_zeros(B, probes)], 1).to(wide)
        zs, nfe, _, _ = _solve(f, z1, (t1, t0), method, steps, rtol, atol, max_nfe, d, cond)
        x0, f0 = zs[-1, :, :d], zs[-1, :, d:]
        std = path.source_std if path else 1.0
        log_p0 = -(x0 / std).square().sum(1) / 2 - d * math.log(std * math.sqrt(2 * math.pi))
        unknown = 0.0 if divergence == "exact" else math.nan
        std_err = f0.std(1) / math.sqrt(probes) if probes > 1 else torch.full_like(log_p0, unknown)
    return LogProb(log_p0 - f0.mean(1), std_err, x0.reshape(x1.shape).to(x1.dtype), nfe)  # Eqs. (33), (35)


def _divergence(v, t, x, rows, summed, differentiable, cond):
    """v_t (B, *dims) and rows^T (dv/dx) rows for rows (P, B or 1, *dims), Eq. (34): (B, P), or (B, 1) if summed.

    One forward pass and one batched reverse pass: the fastest of the ways tried, and no demand on the network.
    """
    with torch.enable_grad():
        if not (differentiable and x.requires_grad):
            x = x.detach().requires_grad_()
        v_t = _check_shape(v(t, x, **cond), x)
        parts, div_t = rows.split(max(1, 2**22 // x.numel())), []
        for i, e in enumerate(parts, 1):
            e = e.expand(-1, *x.shape)
            product = (e * _vjps(v_t, x, e, differentiable, i < len(parts))).reshape(len(e), len(x), -1)
            div_t.append(product.sum((0, 2) if summed else 2, dtype=_wide(x.dtype)))
        div_t = sum(div_t)[:, None] if summed else torch.cat(div_t).T
    return (v_t, div_t) if differentiable else (v_t.detach(), div_t.detach())


def _vjps(v_t, x, rows, create_graph, more=False):
    """rows^T dv/dx, (P, B, *dims); 0 for a field that ignores x."""
    if not v_t.requires_grad:
        return torch.zeros_like(rows)
    vjp = functools.partial(torch.autograd.grad, v_t, x, retain_graph=create_graph or more or len(rows) > 1,
                            create_graph=create_graph, allow_unused=True)  # fmt: skip
    if len(rows) > 1:
        try:
            (g,) = vjp(rows, is_grads_batched=True)
            return torch.zeros_like(rows) if g is None else g
        except RuntimeError:  # something in the network has no batching rule, or it is compiled: row by row
            pass
    gs = [torch.zeros_like(row) if g is None else g for row in rows for g in vjp(row)]
    return torch.stack(gs) if len(gs) > 1 else gs[0][None]


class BitsPerDim(NamedTuple):
    """bpd: (B,) bits per dimension; std_err: (B,) over Hutchinson probes, NaN for one; nfe: (B,) of all K solves."""

    bpd: Tensor
    std_err: Tensor
    nfe: Tensor


def bits_per_dim(v, images, path, K=1, divergence="hutchinson", **options):
    """Bits per dimension of uint8 images (B, *dims), (B,), under uniform dequantisation, as a BitsPerDim record.

    Eq. (47) with K draws of the noise and the constant of Eq. (37): v works on y = (x + u) / 128 - 1 in [-1, 1).
    options: the keywords of log_prob, conditioning included. Raises ValueError for images that are not uint8.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim < 2 or images.numel() == 0:
        got = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be uint8, 0 to 255, of shape (B, *dims); got {got}")
    if not isinstance(K, int) or K < 1:
        raise ValueError(f"K must be a whole number >= 1; got {K!r}")
    d = images[0].numel()
    draws = []
    for _ in range(K):
        y = (images + torch.rand(images.shape, device=images.device)) / 128 - 1  # Eq. (36)
        draws.append(log_prob(v, y, path, divergence, **options))
    log_p = torch.stack([draw.log_prob for draw in draws])  # (K, B)
    weights, std_errs = log_p.softmax(0), torch.stack([draw.std_err for draw in draws])
    bpd = -(log_p.logsumexp(0) - math.log(K)) / (d * math.log(2)) + 7  # Eqs. (47), (37)
    std_err = (weights * std_errs).square().sum(0).sqrt() / (d * math.log(2))
    return BitsPerDim(bpd, std_err, sum(draw.nfe for draw in draws))


# ---- 6 UNet, Appendix E and Table 3: the network of Dhariwal & Nichol (2021), "ADM" ----------------------------------


def group_norm(channels):
    """GroupNorm in 32 groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zeroed(layer):
    """The layer with all its parameters set to zero: it starts by adding nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """skip(x) + conv(dropout(silu(norm(h)))), where h = conv(silu(norm(x))) + linear(emb)."""

    def __init__(self, c_in, c_out, c_emb, dropout):
        super().__init__()
        self.norm_in, self.conv_in = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm_out, self.dropout = group_norm(c_out), nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.conv_in(F.silu(self.norm_in(x))) + self.emb(emb)[:, :, None, None]
        h = self.conv_out(self.dropout(F.silu(self.norm_out(h))))
        return self.skip(x) + h


class Attention(nn.Module):
    """x + proj(softmax(q k^T / sqrt(d)) v), where every pixel is a token and d = C / heads."""

    def __init__(self, c, head_channels):
        super().__init__()
        self.heads = max(1, c // head_channels)
        if c % self.heads:
            raise ValueError(f"head_channels must divide {c} channels; got {head_channels}")
        self.norm, self.qkv, self.proj = group_norm(c), nn.Linear(c, 3 * c), zeroed(nn.Linear(c, c))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        h = self.qkv(h).unflatten(2, (self.heads, 3, -1))  # by head, then q | k | v, then channel
        q, k, v = h.transpose(1, 2).unbind(3)  # (B, heads, HW, 3, d) -> three (B, heads, HW, d)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, HW, C)
        return x + self.proj(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Upsample(nn.Conv2d):
    """The 3x3 convolution of x enlarged twofold by repeating its pixels."""

    def forward(self, x):
        if x.shape[2] < 16:  # too few pixels to pay for summing the weights
            return super().forward(F.interpolate(x, scale_factor=2.0))
        # A kernel's nine pixels repeat four, so the two steps are one transposed convolution whose
        # 4x4 kernel sums 2x2 boxes of the 3x3 one: 16 products per pixel of x instead of 36.
        w = F.avg_pool2d(self.weight, 2, stride=1, padding=1, divisor_override=1)
        return F.conv_transpose2d(x, w.flip(2, 3).transpose(0, 1), self.bias, 2, padding=1)


class Stage(nn.Sequential):
    """Layers in a row; the residual blocks among them also take the embedding."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """v_t(x) for images: net(t, x, y=None, cond=None), t a scalar or (B,), x (B, C, H, W).

    attention_resolutions lists the image sizes, in pixels, that have it; the middle always does. num_classes
    admits labels y (B,), where num_classes itself means no label, as does y=None. cond_channels
    admits an image cond (B, C', H, W) beside x. UNet(**net.config) builds the network again.
    Levels of 32 channels and less have one channel a group, whose norm takes time and label away again: use 48 or more.
    """

    def __init__(self, image_size=32, in_channels=3, out_channels=3, channels=128,
                 channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,), head_channels=64,
                 dropout=0.1, num_classes=None, time_scale=1000.0, cond_channels=0):  # fmt: skip
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        widths, halvings = [int(channels * m) for m in channel_mult], len(channel_mult) - 1
        sizes = [image_size // 2**i for i in range(halvings + 1)]
        least = dict(image_size=2**halvings, in_channels=1, out_channels=1, channels=2, num_res_blocks=1)
        for k, n in dict(least, head_channels=1, num_classes=1).items():
            if config[k] is not None and (config[k] < n or config[k] % n):
                raise ValueError(f"{k} must be a positive multiple of {n}; got {config[k]}")
        if not set(attention_resolutions) <= set(sizes):
            raise ValueError(f"attention_resolutions must hold sizes among {sizes}; got {attention_resolutions}")
        c, c_emb, skips = widths[0], 4 * channels, [widths[0]]

        def stage(c_in, c_out, attend):
            s = Stage(ResBlock(c_in, c_out, c_emb, dropout))
            return s.append(Attention(c_out, head_channels)) if attend else s

        # The order of the lines below is ADM's order of weights, which from_adm relies on.
        self.embed = nn.Sequential(nn.Linear(channels, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(num_classes + 1, c_emb) if num_classes else None
        self.down = nn.ModuleList([Stage(nn.Conv2d(in_channels + cond_channels, c, 3, padding=1))])
        for size, width in zip(sizes, widths):
            if size < image_size:
                self.down.append(Stage(nn.Conv2d(c, c, 3, stride=2, padding=1)))
                skips.append(c)
            for _ in range(num_res_blocks):
                self.down.append(stage(c, width, size in attention_resolutions))
                skips.append(c := width)
        self.middle = stage(c, c, True).append(ResBlock(c, c, c_emb, dropout))
        self.up = nn.ModuleList()
        for size, width in zip(sizes[::-1], widths[::-1]):
            for _ in range(num_res_blocks + 1):
                self.up.append(stage(c + skips.pop(), c := width, size in attention_resolutions))
            if size < image_size:
                self.up[-1].append(Upsample(c, c, 3, padding=1))
        last = zeroed(nn.Conv2d(c, out_channels, 3, padding=1))
        self.head = nn.Sequential(group_norm(c), nn.SiLU(), last)
        self.to(memory_format=torch.channels_last)  # strides only; the activations follow them

    def embedding(self, t, x, y):
        """What the residual blocks see of time and label: (B, 4 channels), or (1, 4 channels)."""
        dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has 8 bits for 1000 t
        t = x.new_zeros(1, dtype=dtype) + t
        if t.shape not in ((1,), x.shape[:1]):
            raise ValueError(f"t must be a scalar or ({len(x)},), as x; got {tuple(t.shape)}")
        half, n = self.config["channels"] // 2, self.config["num_classes"]
        freq = torch.exp(-math.log(1e4) / half * torch.arange(half, dtype=dtype, device=x.device))
        angle = self.config["time_scale"] * t[:, None] * freq
        emb = self.embed(torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))
        if y is not None and (n is None or y.dtype != torch.int64 or y.shape != x.shape[:1]
                              or y.is_cpu and ((y < 0) | (y > n)).any()):  # fmt: skip
            raise ValueError(f"y must be int64 ({len(x)},), 0 to num_classes = {n}; got {y}")
        return emb if n is None else emb + (self.label.weight[n] if y is None else self.label(y))

    def forward(self, t, x, y=None, cond=None):
        size, c_cond = self.config["image_size"], self.config["cond_channels"]
        for name, image, c in ("x", x, self.config["in_channels"]), ("cond", cond, c_cond):
            want, got = (len(x), c, size, size), () if image is None else tuple(image.shape)
            if got != (want if c else ()):
                raise ValueError(f"{name} must be {want if c else None}; got {got}")
        emb = F.silu(self.embedding(t, x, y))
        h, skips = x if cond is None else torch.cat([x, cond.to(x.dtype)], 1), []
        for stage in self.down:
            skips.append(h := stage(h, emb))
        h = self.middle(h, emb)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], 1), emb)
        return self.head(h)

    @classmethod
    def from_adm(cls, checkpoint, time_scale=1.0, **config):
        """UNet with the weights of torchcfm's UNetModelWrapper, taken by order, not by name.

        checkpoint is its state dict, or a dict with that under ema_model (preferred) or net_model.
        Those networks saw t itself, so time_scale is 1; config tells the rest about them.
        """
        net = cls(time_scale=time_scale, **config)
        theirs = checkpoint.get("ema_model", checkpoint.get("net_model", checkpoint))
        ours, none = net.state_dict(), ("nothing", torch.empty(0))
        for (a, p), (b, w) in zip_longest(ours.items(), theirs.items(), fillvalue=none):
            shape = tuple(getattr(w, "shape", ()))
            if p.shape != (shape[:2] if shape[2:] == (1,) else shape):  # (1,): a 1x1 Conv1d
                what = f"{a} {tuple(p.shape)} of {len(ours)} is {b} {shape} of {len(theirs)} there"
                raise ValueError(f"checkpoint is of another network: {what}; pass its settings")
            p.copy_(w.reshape(p.shape))
        return net
