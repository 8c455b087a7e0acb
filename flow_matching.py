# SPDX-License-Identifier: MIT (keep the text of LICENSE with copies of this file)
"""Flow Matching for Generative Modeling (Lipman et al., ICLR 2023) in one file; it needs torch.

Equation numbers are those of arXiv:2210.02747v2. Time runs from noise, t = 0, to data, t = 1. x, x0
(noise) and x1 (data) are (B, *dims). A vector field is any callable v(t, x, **cond), t (B,), that
returns the shape of x. Lines marked `Departure:` differ from the paper and say why. Values, unlike
shapes, are checked on the CPU only: a look at them would stall a GPU.

    path = OTPath()
    loss = cfm_loss(v, path, x1)               # train v on this: Eq. (14), for OTPath Eq. (23)
    x = sample(v, path, (n, *dims)).x          # after v.eval(), if v holds dropout
    log_p = log_prob(v, x1, path).log_prob     # in nats
    x0 = odeint(v, x1, t=path.t_span[::-1]).x  # encodes data; path.t_span decodes it

Any further keyword is conditioning: a tensor with a row a sample that follows it into v, such as
cfm_loss(v, path, x1, y=labels). It cannot have an option's name, such as x0, t, noise or steps.

    1 Paths           Gaussian paths, their fields and conversions      Eqs. (10)-(22), (38), (46)
    2 Loss            conditional flow matching, Table 1's objectives   Eqs. (14), (43)-(46)
    3 Exact marginal  p_t and u_t of a finite data set                  Eqs. (6), (8)
    4 Solvers         Runge-Kutta methods, samples, an SDE, guidance    Eq. (1)
    5 Likelihood      log densities and bits per dimension              Eqs. (27)-(37), (47)
    6 UNet            the network of the image experiments              App. E, Table 3
    7 Checks          arguments refused and prepared; no mathematics
"""

import math
import warnings
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

__version__ = "2.1.0"
__all__ = """ConditionalFlow GaussianPath AffinePath OTPath VPPath VEPath CosinePath PATHS cfm_loss
OBJECTIVES as_velocity ot_coupling Marginal METHODS odeint sample sample_sde Solution SolverError
classifier_free_guidance log_prob LogProb bits_per_dim BitsPerDim UNet expand""".split()


def expand(t, x) -> Tensor:
    """t (a number, () or (B,)) shaped to broadcast against x (B, *dims), in float32 or better."""
    return _as_column(_as_time(t, x), x)


# ---- 1 Paths, Section 4 ----


class ConditionalFlow:
    """x_t = psi_t(x0 | x1), any map differentiable in t in t_span: all that the loss needs.

    psi(t (B,), x0, x1) -> (B, *dims) may be a method. allows_pairs: whether psi_0(x0) is x0.
    """

    t_span = (0.0, 1.0)
    source_std = 1.0
    allows_pairs = True

    def __init__(self, psi=None, t_span=(0.0, 1.0)):
        if psi is not None:
            self.psi = psi
        self.t_span = t_span

    def psi_dpsi(self, t, x0, x1):
        """psi_t(x0) and d/dt psi_t(x0), point and target of Eq. (14), each (B, *dims)."""
        return _derivative(lambda t: self.psi(t, x0, x1), _as_time(t, x1).expand(len(x1)))

    def dpsi(self, t, x0, x1):
        """d/dt psi_t(x0), (B, *dims): the velocity u_t(psi_t(x0) | x1) of Eq. (13)."""
        return self.psi_dpsi(t, x0, x1)[1]

    def sample_t(self, n, device=None, dtype=None, generator=None):
        """n times (n,), each uniform in t_span, stratified: one in every n-th part of it."""
        dtype = _at_least_float32(dtype or torch.get_default_dtype())
        offset = torch.rand((), device=device, dtype=dtype, generator=generator)
        fraction = (offset + torch.arange(n, device=device, dtype=dtype) / n) % 1
        return self.t_span[0] + (self.t_span[1] - self.t_span[0]) * fraction

    def sample_source(self, shape, device=None, dtype=None, generator=None):
        """Draws of that shape from p_0 = N(0, source_std^2 I), where a solve starts."""
        return self.source_std * torch.randn(shape, device=device, dtype=dtype, generator=generator)


class GaussianPath(ConditionalFlow):
    """p_t(x | x1) = N(x | mu_t(x1), sigma_t(x1)^2 I), Eq. (10); sigma_t may also be elementwise.

    moments(t, x1) -> mu_t, sigma_t, d/dt mu_t, d/dt sigma_t, to broadcast against x1 (see expand),
    from mu_0 = 0, sigma_0 = source_std. u, log_prob, score raise ValueError where sigma_t = 0.
    """

    def __init__(self, moments=None, t_span=(0.0, 1.0), source_std=1.0):
        if moments is not None:
            self.moments = moments
        self.t_span = t_span
        self.source_std = source_std
        self.allows_pairs = source_std == 1

    def psi_dpsi(self, t, x0, x1):
        """psi_t(x0), Eq. (11), and d/dt psi_t(x0), without Eq. (15)'s division by sigma_t."""
        mu_t, sigma_t, dmu_t, dsigma_t = self.moments(t, x1)
        return sigma_t * x0 + mu_t, dsigma_t * x0 + dmu_t

    def psi(self, t, x0, x1):
        """The flow psi_t(x0), Eq. (11), (B, *dims); x0 is standard normal on every path."""
        return self.psi_dpsi(t, x0, x1)[0]

    def u(self, t, x, x1):
        """Conditional vector field u_t(x | x1), Theorem 3, Eq. (15), (B, *dims)."""
        mu_t, sigma_t, dmu_t, dsigma_t = self._positive_moments(t, x1)
        return dsigma_t / sigma_t * (x - mu_t) + dmu_t

    def log_prob(self, t, x, x1):
        """log p_t(x | x1), Eq. (10), in nats, (B,)."""
        mu_t, sigma_t, _, _ = self._positive_moments(t, x1)
        log_p = -(((x - mu_t) / sigma_t) ** 2 + math.log(2 * math.pi)) / 2 - sigma_t.log()
        return log_p.reshape(len(x), -1).sum(1)

    def score(self, t, x, x1):
        """grad_x log p_t(x | x1), (B, *dims): minus the s of Eqs. (43), (46), a slip in sign."""
        mu_t, sigma_t, _, _ = self._positive_moments(t, x1)
        return (mu_t - x) / sigma_t**2

    def _positive_moments(self, t, x1):
        moments = self.moments(t, x1)
        _check_divisor(moments[1], t, "sigma_t is 0", self)
        return moments


class AffinePath(GaussianPath):
    """mu_t = alpha(t) x1 with std sigma(t), from two torch functions of t; derivatives follow.

    ValueError unless alpha runs from 0 to 1 and sigma falls, noise to data, or check_ends=False.
    t_span ends at 1, or at 1 - 1e-5 where u_t, score and density divide by sigma(1) = 0 (App. E.1).
    """

    def __init__(self, alpha, sigma, t_span=None, check_ends=True):
        self.alpha = alpha
        self.sigma = sigma
        alpha_0, sigma_0, sigma_1 = _schedule_ends(alpha, sigma, check_ends)
        self.t_span = t_span or _whole_span(sigma_1)
        self.source_std = sigma_0
        self.allows_pairs = abs(alpha_0) < 1e-6 and abs(sigma_0 - 1) < 1e-6

    def coefficients(self, t):
        """alpha_t, sigma_t, d/dt alpha_t, d/dt sigma_t, each in the shape of t."""
        values, derivatives = _derivative(lambda t: (self.alpha(t), self.sigma(t)), t)
        return *values, *derivatives

    def moments(self, t, x1):
        """mu_t, sigma_t, d/dt mu_t, d/dt sigma_t of Eq. (10)."""
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.coefficients(expand(t, x1))
        return alpha_t * x1, sigma_t, dalpha_t * x1, dsigma_t

    def convert(self, t, x, value, source, target):
        """The target, (B, *dims), that a source of that value means at x = psi_t(x0): Eq. (46).

        Both are velocity, score, noise (x0) or data (x1). Linear, so true of posterior means, and
        of scores if x0 is independent of x1. ValueError where source does not tell target.
        """
        _check_kinds(source=source, target=target)
        if source == target:
            return value
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.coefficients(expand(t, x))
        rows = {"data": (1, 0), "noise": (0, 1), "velocity": (dalpha_t, dsigma_t)}
        rows["score"] = (0, -1 / sigma_t)
        a, b = rows[source]  # a x1 + b x0 = value, and alpha x1 + sigma x0 = x
        c, d = rows[target]
        determinant = alpha_t * b - sigma_t * a
        regular = determinant + 0 * (c + d)  # NaN where a target is infinite
        _check_divisor(regular, t, f"{source} does not tell {target}", self)
        x1 = (b * x - sigma_t * value) / determinant
        x0 = (alpha_t * value - a * x) / determinant
        return c * x1 + d * x0

    def forward_sde(self, t, x):
        """Drift f (B, *dims), diffusion g (B, 1, ..) of dx = f ds + g dw, s = 1 - t, Eq. (38)."""
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.coefficients(expand(t, x))
        rate = dalpha_t / alpha_t
        return -rate * x, (2 * sigma_t * (rate * sigma_t - dsigma_t)).sqrt()


@dataclass(frozen=True)
class OTPath(AffinePath):
    """Optimal transport path, Eq. (20): straight lines at constant speed."""

    sigma_min: float = 1e-4
    source_std = 1.0
    allows_pairs = True

    def __post_init__(self):
        _require(0 <= self.sigma_min < 1, "sigma_min must lie in [0, 1)", self.sigma_min)

    @property
    def t_span(self):
        return _whole_span(self.sigma_min)

    def coefficients(self, t):
        sigma_t = (1 - t) + self.sigma_min * t  # 1 - (1 - sigma_min) t without cancellation
        return t, sigma_t, torch.ones_like(t), torch.full_like(t, self.sigma_min - 1)


@dataclass(frozen=True)
class VPPath(AffinePath):
    """Variance preserving diffusion path, Eq. (18), with the beta schedule of App. E.1."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_span = (0.0, 1 - 1e-5)  # App. E.1
    source_std = 1.0  # Departure from sigma_0 = 0.99998: the paper samples and scores with N(0, I)
    allows_pairs = False

    def __post_init__(self):
        fits = 0 <= self.beta_min <= self.beta_max < math.inf
        _require(fits, f"{self} must have 0 <= beta_min <= beta_max")
        alpha_0 = math.exp(-(self.beta_min + self.beta_max) / 4)
        _check_start(alpha_0, math.sqrt(1 - alpha_0**2), "raise beta_max")

    def beta(self, s):
        """beta(s) of App. E.1; s = 1 - t is diffusion time."""
        return self.beta_min + s * (self.beta_max - self.beta_min)

    def coefficients(self, t):
        s = 1 - t  # the primes of Eq. (19) are d/ds, ours d/dt
        T = s * self.beta_min + s**2 / 2 * (self.beta_max - self.beta_min)
        alpha_t = torch.exp(-T / 2)
        sigma_t = torch.sqrt(-torch.expm1(-T))
        dalpha_t = self.beta(s) / 2 * alpha_t
        return alpha_t, sigma_t, dalpha_t, -alpha_t * dalpha_t / sigma_t


@dataclass(frozen=True)
class VEPath(AffinePath):
    """Variance exploding path, Eq. (16), with the geometric schedule of Song et al. (2021).

    Departure: sigma_min > 0 at the data, not 0, and p_0 = N(0, sigma_max^2 I), as x1 is not known.
    """

    sigma_min: float = 0.01
    sigma_max: float = 10.0
    t_span = (0.0, 1.0)
    allows_pairs = False

    def __post_init__(self):
        fits = 0 < self.sigma_min < self.sigma_max < math.inf
        _require(fits, f"{self} must have 0 < sigma_min < sigma_max")
        _check_start(1.0, self.sigma_max, "raise sigma_max")

    @property
    def source_std(self):
        return self.sigma_max

    def coefficients(self, t):
        rate = math.log(self.sigma_min / self.sigma_max)
        sigma_t = self.sigma_max * torch.exp(rate * t)
        return torch.ones_like(t), sigma_t, torch.zeros_like(t), rate * sigma_t


@dataclass(frozen=True)
class CosinePath(AffinePath):
    """alpha = sin, sigma = cos of pi t / 2: the VP arc at constant speed (not in the paper)."""

    t_span = (0.0, 1 - 1e-5)
    source_std = 1.0
    allows_pairs = True

    def coefficients(self, t):
        alpha_t = torch.sin(math.pi / 2 * t)
        sigma_t = torch.sin(math.pi / 2 * (1 - t))  # the cosine, exact near t = 1
        return alpha_t, sigma_t, math.pi / 2 * sigma_t, -math.pi / 2 * alpha_t


PATHS = {"ot": OTPath, "vp": VPPath, "ve": VEPath, "cosine": CosinePath}


# ---- 2 Loss, Section 3.2 ----


def cfm_loss(v, path, x1, *, x0=None, noise=None, t=None, predict="velocity", weight=None,
             reduction="mean", **cond) -> Tensor:  # fmt: skip
    """One-batch estimate of L_CFM, Eq. (14) (Eq. (23) on OTPath): (), or (B,) if reduction="none".

    x1: (B, *dims) data. x0: your pairs with it, or noise: your draw of N(0, I), in its shape. t: ()
    or (B,), else path.sample_t. predict: what v is, "velocity", "noise" (Eq. (45), DDPM), "score"
    (Eq. (43), with the true sign) or "data". weight: lambda(t), Eq. (43): a function of t (B,),
    "sigma^2" (a score's default) or, on VPPath, "beta" (ScoreFlow). cond: tensors of B rows for v.
    The minimum is E Var[dpsi | x_t], not 0. ValueError for data that is not finite floating point,
    other shapes, t outside path.t_span, and x0 on a path without allows_pairs.
    """
    t, x0 = _loss_arguments(path, x1, x0, noise, t, predict, weight, reduction, cond)
    x_t, dx_t = path.psi_dpsi(t, x0, x1)  # psi_t(x0), d/dt psi_t(x0)
    target = {"velocity": dx_t, "noise": x0, "data": x1}.get(predict)
    if predict == "score":
        target = -x0 / path.moments(t, x1)[1]  # grad log p_t(x_t | x1)
    error = _check_shape(v(t, x_t.to(x1.dtype), **cond), x1) - target
    # Departure: Eq. (14) sums over dimensions; their mean keeps the learning rate free of d.
    losses = (_weight(weight, predict, path, t, x1) * error**2).reshape(len(x1), -1).mean(1)
    return losses.mean() if reduction == "mean" else losses


def _weight(weight, predict, path, t, x1):
    """lambda(t) of Eq. (43), to broadcast against x1."""
    if weight == "sigma^2" or (weight is None and predict == "score"):
        return path.moments(t, x1)[1] ** 2
    if weight == "beta":
        return expand(path.beta(1 - t), x1)
    return 1.0 if weight is None else expand(weight(t), x1)


# The rows of Table 1 as keywords of cfm_loss; "scoreflow" weighs the score for likelihood.
OBJECTIVES = {
    "velocity": {"predict": "velocity"},
    "noise": {"predict": "noise"},
    "score": {"predict": "score", "weight": "sigma^2"},
    "scoreflow": {"predict": "score", "weight": "beta"},
}


def as_velocity(model, path, predict):
    """The vector field of a network that predicts "score", "noise", "data" or "velocity", Eq. (46).

    path: affine. ValueError for other kinds, and, in a call, at t = 0 of OTPath for score or noise.
    """
    _check_path(path, AffinePath)
    _check_kinds(predict=predict)

    def velocity(t, x, **cond):
        return path.convert(t, x, model(t, x, **cond), predict, "velocity")

    velocity.model = model
    return velocity


def ot_coupling(x0, x1) -> Tensor:
    """The permutation p, (B,), with least sum of squared distances x0[p] to x1; needs SciPy.

    Minibatch OT (Tong et al., 2024) says who is paired with whom, the paper's OT path how a pair is
    joined: cfm_loss(..., x0=x0[p]). With labels use it within each, as noise given one must be
    N(0, I). ValueError for shapes that differ.
    """
    from scipy.optimize import linear_sum_assignment

    _require(x0.shape == x1.shape, "x0 and x1 must have one shape", x0, x1)
    rows, columns = (x.detach().flatten(1).to(_at_least_float32(x.dtype)) for x in (x1, x0))
    _, assigned = linear_sum_assignment((torch.cdist(rows, columns) ** 2).cpu().numpy())
    return torch.as_tensor(assigned, device=x0.device)


# ---- 3 Exact marginals of finite data, Section 3.1 ----


class Marginal:
    """The exact marginal field u_t, Eq. (8), of data (N, *dims) under an affine path, as v(t, x).

    It is Eq. (15) at the posterior mean of x1, and obeys Eq. (26). x: (B, *dims); t: number, () or
    (B,). ValueError for t outside path.t_span and data that is not finite.
    """

    def __init__(self, path, data):
        _check_path(path, AffinePath)
        _check_batch("data", data)
        self.path = path
        self.dims = data.shape[1:]
        self.data = data.reshape(len(data), -1)  # (N, d)

    def posterior(self, t, x):
        """p_t(x_i | x), the weight of every data point in Eq. (8), (B, N); rows sum to 1."""
        return torch.cat([log_w.softmax(1) for log_w, _ in self._log_weights(t, x)])

    def x1_mean(self, t, x):
        """E[x1 | x_t = x], (B, *dims)."""
        with torch.autocast(x.device.type, enabled=False):
            data = self.data.to(x)
            means = [log_w.softmax(1) @ data for log_w, _ in self._log_weights(t, x)]
        return torch.cat(means).reshape(x.shape)

    def log_prob(self, t, x):
        """log p_t(x), Eq. (6), in nats, (B,)."""
        N, d = self.data.shape
        chunks = self._log_weights(t, x)
        log_p = [log_w.logsumexp(1) - d * sigma_t[:, 0].log() for log_w, sigma_t in chunks]
        return torch.cat(log_p) - d / 2 * math.log(2 * math.pi) - math.log(N)

    def __call__(self, t, x, **cond):
        """u_t(x), Eq. (8), (B, *dims)."""
        return self.path.u(t, x, self.x1_mean(t, x))

    def score(self, t, x):
        """grad_x log p_t(x), (B, *dims)."""
        return self.path.score(t, x, self.x1_mean(t, x))

    def _log_weights(self, t, x):
        """Yields -|x - alpha_t x_i|^2 / (2 sigma_t^2), (Q, N), and sigma_t (Q, 1), Q rows of x."""
        _require(x.shape[1:] == self.dims, f"x must be (B, *dims) with dims {[*self.dims]}", x)
        data = self.data.to(x)
        x = x.reshape(len(x), -1)
        t = _check_times(t, x, self.path.t_span)
        chunk = max(1, 2**24 // len(data))  # 64 MB of float32
        for times, points in zip(t.split(chunk), x.split(chunk)):
            alpha_t, sigma_t, _, _ = self.path.coefficients(times[:, None])
            scale = torch.where(alpha_t.abs() > 1e-12, alpha_t, 1e-12)
            # Not by |x|^2 - 2 x x_i + |x_i|^2, which would cancel.
            direct = "donot_use_mm_for_euclid_dist"
            distance = scale.abs() * torch.cdist(points / scale, data, compute_mode=direct)
            yield -(distance**2) / (2 * sigma_t**2), sigma_t


# ---- 4 Solvers, Eq. (1) ----


class Tableau(NamedTuple):
    """Stage i calls v at (t + C[i] h, x + h sum_j A[i][j] k_j); the step is h sum_j B[j] k_j.

    Without B the last stage is the step, its slope the next one's first. E gives the error for B.
    """

    C: tuple
    A: tuple
    B: tuple = None
    E: tuple = None


# fmt: off
EULER = Tableau((0,), ((),), (1,))
MIDPOINT = Tableau((0, 1/2), ((), (1/2,)), (0, 1))
RK4 = Tableau((0, 1/2, 1/2, 1), ((), (1/2,), (0, 1/2), (0, 0, 1)), (1/6, 1/3, 1/3, 1/6))  # Kutta
DOPRI5 = Tableau(  # Dormand & Prince (1980), RK5(4)7M
    C=(0, 1/5, 3/10, 4/5, 8/9, 1, 1),
    A=((),
       (      1/5,),
       (     3/40,        9/40),
       (    44/45,      -56/15,       32/9),
       (19372/6561, -25360/2187, 64448/6561, -212/729),
       ( 9017/3168,     -355/33, 46732/5247,   49/176,   -5103/18656),
       (    35/384,           0,   500/1113,  125/192,    -2187/6784,    11/84)),
    E=(    71/57600,          0, -71/16695,    71/1920, -17253/339200,  22/525, -1/40),
)
# fmt: on
METHODS = {"euler": EULER, "midpoint": MIDPOINT, "rk4": RK4, "dopri5": DOPRI5}


class Solution(NamedTuple):
    """x: (B, *dims) at the last time, xs: (T, B, *dims) at all; nfe, accepted, rejected: (B,).

    nfe counts the calls of v for each sample, start-up and rejected steps included: steps times 1,
    2 and 4 for euler, midpoint and rk4. A guided call counts once and costs two.
    """

    x: Tensor
    xs: Tensor
    nfe: Tensor
    accepted: Tensor
    rejected: Tensor


class SolverError(RuntimeError):
    """The solve cannot go on; .t (B,) and .x (B, *dims) hold the state that each sample reached."""

    def __init__(self, message, t, x):
        super().__init__(message)
        self.t = t
        self.x = x.detach()


def odeint(v, x, t=(0.0, 1.0), method="dopri5", steps=None, rtol=None, atol=None, max_nfe=None,
           norm=None, **cond) -> Solution:  # fmt: skip
    """Solution of d/dt x = v(t, x), Eq. (1), from x at t[0] through all times in t, either way.

    method: "euler", "midpoint" and "rk4" share `steps` steps among the intervals; "dopri5" picks
    them for each sample, their estimated local error at most atol + rtol |x| (1e-5 each if None) in
    norm, (B, *dims) -> (B,) (RMS if None), in at most max_nfe calls (10,000 if None). cond: tensors
    of B rows for v. Differentiable: sample under torch.no_grad(). ValueError for bad arguments,
    SolverError when a step underflows, v is not finite or max_nfe is spent. A step waits for a GPU
    once, and once more where a sample arrives.
    """
    _check_batch("x", x)
    _check_cond(cond, x)
    _warn_of_dropout(v)
    dtype = _at_least_float32(x.dtype)
    times = _solver_times(t, dtype)
    _check_solver(method, len(times) - 1, steps, rtol, atol, max_nfe)

    def f(t, state, **cond):
        return _check_shape(v(t, state.to(x.dtype), **cond), state).to(dtype)

    if method == "dopri5":
        rtol, atol = (1e-5 if value is None else value for value in (rtol, atol))
        max_nfe = 10_000 if max_nfe is None else max_nfe
        xs, *counts = _dopri5(f, x.to(dtype), times, rtol, atol, max_nfe, norm or _rms, cond)
    else:
        xs, *counts = _fixed_steps(f, x.to(dtype), times, METHODS[method], steps, cond)
    return Solution(xs[-1].to(x.dtype), xs.to(x.dtype), *counts)


@torch.no_grad()
def sample(v, path, shape, device=None, dtype=None, generator=None, method="dopri5", steps=None,
           rtol=None, atol=None, max_nfe=None, **cond) -> Solution:  # fmt: skip
    """Solution of Eq. (1) from x0 ~ N(0, path.source_std^2 I) of shape (B, *dims) over path.t_span.

    Its .x are the samples. All else as in odeint, which also takes your own start and times. If v
    holds dropout, call v.eval() before.
    """
    _check_path(path, ConditionalFlow)
    x0 = path.sample_source(shape, device, dtype, generator)
    _check_cond(cond, x0)
    return odeint(v, x0, path.t_span, method, steps, rtol, atol, max_nfe, **cond)


@torch.no_grad()
def sample_sde(v, path, shape, steps, g=None, device=None, dtype=None, generator=None, **cond):
    """Samples, (B, *dims), of dx = (v + g^2 / 2 score) dt + g dw by Euler-Maruyama steps.

    In small steps any g, a number or a function of t (a float), has the marginals of the ODE. If
    None, g^2 = -d/dt sigma_t^2, stable where Euler steps of the ODE are; else concentrated data
    needs steps h with h g^2 < 2 sigma_t^2. The last step is the ODE's. v: the velocity of an affine
    path, learned with x0 independent of x1. path.forward_sde's g gives the reverse SDE of Song et
    al. (2021). ValueError for bad arguments, SolverError when a step is not finite.
    """
    _check_path(path, AffinePath)
    _require(steps >= 1, "steps must be at least 1", steps)
    _warn_of_dropout(v)
    x = path.sample_source(shape, device, dtype, generator)
    _check_cond(cond, x)
    start, end = path.t_span
    h = (end - start) / steps
    for i in range(steps):
        time = start + i * h
        t = _as_time(time, x).expand(len(x))
        v_t = _check_shape(v(t, x, **cond), x)
        x_new = x + h * v_t
        g_t = _diffusion(g, path, time) if i + 1 < steps else 0
        if g_t:
            score = path.convert(t, x, v_t, "velocity", "score")
            noise = torch.randn(shape, device=x.device, dtype=x.dtype, generator=generator)
            x_new = x_new + h * g_t**2 / 2 * score + math.sqrt(h) * g_t * noise
        _check_step(x_new, t, x)
        x = x_new.to(x.dtype)
    return x


def _diffusion(g, path, t):
    """The number g_t; g_t^2 = -d/dt sigma_t^2 if g is None."""
    if g is None:
        _, sigma_t, _, dsigma_t = path.coefficients(torch.tensor(t))
        return max(0.0, -2 * (sigma_t * dsigma_t).item()) ** 0.5
    return g(t) if callable(g) else g


def classifier_free_guidance(v, scale, drop=("y",)):
    """The field v(without drop) + scale (v(with it) - v(without it)); scale 1 is no guidance.

    drop: the conditioning to leave out, without which v can be called, too. A call costs two of v;
    ValueError if it has none of drop.
    """

    def guided(t, x, **cond):
        rest = {name: value for name, value in cond.items() if name not in drop}
        rule = f"guidance drops {drop}, of which the call has nothing: set drop"
        _require(len(rest) < len(cond), rule, [*cond])
        free = v(t, x, **rest)
        return free + scale * (v(t, x, **cond) - free)

    guided.model = v
    return guided


def _weighted_sum(weights, slopes):
    """sum_j weights[j] slopes[j]; a matrix product would round by batch size and autocast."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:]):
        if weight:
            total = torch.add(total, slope, alpha=weight)
    return total


def _rk_step(f, tableau, t, t_new, x, k, cond):
    """x at t_new, its error estimate or None, and the last slope; k = f(t, x) is the first."""
    h = _as_column(t_new - t, x)
    slopes = [k]
    for c, weights in zip(tableau.C[1:], tableau.A[1:]):
        x_new = torch.addcmul(x, h, _weighted_sum(weights, slopes))
        slopes.append(f(torch.lerp(t, t_new, c), x_new, **cond))  # lerp never leaves [t, t_new]
    if tableau.B:
        x_new = torch.addcmul(x, h, _weighted_sum(tableau.B, slopes))
    error = h * _weighted_sum(tableau.E, slopes) if tableau.E else None
    return x_new, error, slopes[-1]


def _fixed_steps(f, x, times, tableau, steps, cond):
    """xs (T, B, *dims) and nfe, accepted, rejected (B,) of that many steps."""
    lengths = [abs(end - start) for start, end in zip(times, times[1:])]
    counts = [1] * len(lengths)
    for _ in range(steps - len(lengths)):  # the next step goes where steps are longest
        step_lengths = [length / count for length, count in zip(lengths, counts)]
        counts[step_lengths.index(max(step_lengths))] += 1
    xs = [x]
    for start, end, count in zip(times, times[1:], counts):
        nodes = [start + (end - start) * i / count for i in range(count)] + [end]
        nodes = x.new_tensor(nodes)[:, None].expand(-1, len(x))
        for t, t_new in zip(nodes, nodes[1:]):
            x_new, _, _ = _rk_step(f, tableau, t, t_new, x, f(t, x, **cond), cond)
            _check_step(x_new, t, x)
            x = x_new
        xs.append(x)
    accepted = torch.full((len(x),), steps, device=x.device)
    return torch.stack(xs), accepted * len(tableau.C), accepted, torch.zeros_like(accepted)


def _check_step(x_new, t, x):
    """SolverError where a step from (t, x) to x_new is not finite."""
    bad = ~x_new.isfinite()
    if bad.any():
        where = f"from t = {t[0]:.6g} in sample {_first(bad)}"
        raise SolverError(f"the step {where} is not finite; is v there? take more steps", t, x)


def _rms(x):
    """Root mean square of each row of x (B, *dims), (B,)."""
    x = x.reshape(len(x), -1)
    return torch.linalg.vector_norm(x, dim=1) * x.shape[1] ** -0.5


def _dopri5(f, x, times, rtol, atol, max_nfe, norm, cond):
    """xs (T, B, *dims) and nfe, accepted, rejected (B,), by steps of each sample's own."""
    # Departure: torchdiffeq, the paper's solver, has one step size for the whole batch.
    grid = x.new_tensor(times)
    xs = x.new_zeros(len(times), *x.shape)
    xs[0] = x
    active = torch.arange(len(x), device=x.device)  # the sample that a row is
    target = torch.ones_like(active)  # the index of the time that it heads for
    nfe = torch.zeros_like(active)
    rejected = torch.zeros_like(active)
    t = grid[:1].repeat(len(x))
    h = torch.zeros_like(t)
    calls = 1

    def fail(bad, why):
        t_reached = grid[-1:].repeat(xs.shape[1])
        t_reached[active] = t
        x_reached = xs[-1].detach().clone()
        x_reached[active] = x.detach()
        row = _first(bad)
        where = f"step {h[row]:.1e} at t = {t[row]:.6g} in sample {active[row]}, NFE {calls}"
        raise SolverError(f"dopri5: {where}: {why}", t_reached, x_reached)

    k = f(t, x, **cond)
    bad = ~k.isfinite()
    if bad.any():
        fail(bad, "v is not finite at the start; look at it, x and path.t_span")
    with torch.no_grad():
        h = _first_step(f, t, x, k, grid[1] - grid[0], rtol, atol, norm, cond)
    calls += 1
    while True:
        if calls + 6 > max_nfe:
            why = f"max_nfe = {max_nfe} is spent; loosen rtol and atol, or raise it; is v stiff?"
            fail(active >= 0, why)
        t_end = grid[target]
        steps_left = (t_end - t) / h
        reaches = steps_left <= 1.01
        h_try = torch.where(steps_left < 2, (t_end - t) / 2, h)  # the last two steps are equal
        t_new = torch.where(reaches, t_end, t + h_try)
        x_new, error, k_new = _rk_step(f, DOPRI5, t, t_new, x, k, cond)
        calls += 6
        with torch.no_grad():
            step = t_new - t
            error = norm(error / (atol + rtol * torch.maximum(x.abs(), x_new.abs())))
            accepted = error <= 1  # False also where error is NaN
            growth = (0.9 * torch.exp(-0.2 * torch.log(error))).clamp(0.2, 3).nan_to_num(0.2)
            h_next = step * growth
            arrived = accepted & reaches
            t_next = torch.where(accepted, t_new, t)
            stuck = (torch.add(t_next, h_next, alpha=0.1) == t_next) & ~arrived
            flags = torch.stack([accepted.all(), arrived.any(), stuck.any()])
        all_accepted, any_arrived, any_stuck = flags.tolist()  # the one wait for a GPU
        if any_stuck:
            why = "v is singular or not finite near here, or rtol and atol are too tight"
            fail(stuck, f"the step is below the resolution of t in {t.dtype}; {why}")
        t = t_next
        if all_accepted:
            x = x_new
            k = k_new
        else:
            x = torch.where(_as_column(accepted, x), x_new, x)
            k = torch.where(_as_column(accepted, x), k_new, k)
            rejected[active] += ~accepted
        if any_arrived:
            xs[target, active] = x  # rows that have not arrived will write again
            nfe.index_fill_(0, active, calls)
            was_cut = arrived & (h_next / h < 1)  # which says nothing against a longer step
            h_next = torch.where(was_cut, h, h_next)
            target = target + arrived
            going = (target < len(grid)).nonzero()[:, 0]
            if len(going) == 0:
                return xs, nfe, (nfe - 2) // 6 - rejected, rejected
            if len(going) < len(active):
                state = (t, h_next, x, k, active, target)
                t, h_next, x, k, active, target = (s.index_select(0, going) for s in state)
                cond = {name: c.index_select(0, going) for name, c in cond.items()}
        h = h_next


def _first_step(f, t, x, k, span, rtol, atol, norm, cond):
    """A first step (B,), signed, from two slopes a little apart, inside the first interval.

    Hairer, Norsett & Wanner (1993), II.4, or, longer, where a field of rate L = |v'| / |v| has an
    error of 0.1, by |v| L^4 h^5 / 1000: it saves easy fields a fifth of their calls.
    """
    scale = (atol + rtol * x.abs()).clamp(min=torch.finfo(x.dtype).tiny)
    d1 = norm(k / scale)
    h0 = torch.minimum(0.01 * norm(x / scale).clamp(min=1e3) / d1, 0.01 * span.abs())
    probe = h0 * span.sign()
    change = f(t + probe, torch.addcmul(x, _as_column(probe, x), k), **cond) - k
    d2 = norm(change / scale) / h0
    by_rate = 100 / (d1 * (d2 / d1).square().square())
    h1 = torch.exp(torch.log(torch.fmax(by_rate, 0.01 / torch.maximum(d1, d2))) / 5)
    h1 = torch.where(h1.isnan() | (h1 == 0), h0, torch.minimum(h1, 1000 * h0))  # probe not finite
    return torch.minimum(h1, span.abs()) * span.sign()


# ---- 5 Likelihood, Appendix C ----


class LogProb(NamedTuple):
    """log_prob: (B,) in nats; std_err: (B,) over probes, 0 if exact, NaN for one; x0; nfe: (B,)."""

    log_prob: Tensor
    std_err: Tensor
    x0: Tensor
    nfe: Tensor


def log_prob(v, x1, path, divergence="exact", probes=1, differentiable=False, method="dopri5",
             steps=None, rtol=None, atol=None, max_nfe=None, **cond) -> LogProb:  # fmt: skip
    """log p_1(x1) in nats, (B,), by the reverse ODE of Eqs. (31)-(33), as a LogProb record.

    x1: (B, *dims). path: for t_span and source_std; OTPath() for a v of your own from N(0, I).
    divergence: "exact" trace, d products a call, or "hutchinson", Eq. (34), by `probes` Rademacher
    vectors drawn once a solve. differentiable: whether gradients reach v's weights and x1, for
    maximum likelihood. All else as in odeint; the log-determinant is held to the tolerances on its
    own. If v holds dropout, call v.eval() before.
    """
    _check_path(path, ConditionalFlow)
    _check_batch("x1", x1)
    _check_cond(cond, x1)
    _warn_of_dropout(v)
    exact = divergence == "exact"
    known = exact or divergence == "hutchinson"
    _require(known, "divergence must be 'exact' or 'hutchinson'", divergence)
    _require(probes >= 1 and (probes == 1 or not exact), "probes >= 1 are hutchinson's", probes)
    B, *dims = x1.shape
    d = x1[0].numel()
    with torch.inference_mode(False):  # tensors made under it cannot be differentiated
        x1 = x1.clone()
        cond = {name: c.clone() for name, c in cond.items()}
    if exact:
        basis = torch.eye(d, dtype=x1.dtype, device=x1.device).view(d, 1, *dims)
    else:  # Departure: the paper names no law; Rademacher signs have the least variance
        cond["_eps"] = torch.randint(2, (B, probes, *dims), device=x1.device).to(x1.dtype) * 2 - 1

    def augmented(t, state, _eps=None, **cond):  # d/dt [phi_t, f(t)], Eqs. (28)-(29)
        x = state[:, :d].reshape(-1, *dims).to(x1.dtype)
        rows = basis if exact else _eps.movedim(1, 0)  # probes follow their samples
        v_t, products = _divergence(v, t, x, rows, differentiable, cond)
        div_t = products.sum(1, keepdim=True) if exact else products
        return torch.cat([v_t.reshape(len(x), d).to(state.dtype), -div_t], 1)

    def norm(error):
        return torch.maximum(_rms(error[:, :d]), _rms(error[:, d:]))

    # Attention's fused kernels have no double backward, and their backward no batching rule.
    math_attention = sdpa_kernel(SDPBackend.MATH)
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable), math_attention:
        state = torch.cat([x1.reshape(B, d), x1.new_zeros(B, probes)], 1)
        state = state.to(_at_least_float32(x1.dtype))
        times = path.t_span[::-1]
        solution = odeint(augmented, state, times, method, steps, rtol, atol, max_nfe, norm, **cond)
        x0 = solution.x[:, :d]
        f0 = solution.x[:, d:]
        std = path.source_std
        log_p0 = -((x0 / std) ** 2 + math.log(2 * math.pi * std**2)).sum(1) / 2
        log_p = log_p0 - f0.mean(1)  # Eqs. (33), (35)
        std_err = torch.full_like(log_p, 0.0 if exact else math.nan)
        if probes > 1:
            std_err = f0.std(1) / math.sqrt(probes)
    return LogProb(log_p, std_err, x0.reshape(x1.shape).to(x1.dtype), solution.nfe)


def _divergence(v, t, x, rows, create_graph, cond):
    """v_t (B, *dims) and row^T (dv/dx) row for rows (P, B or 1, *dims), Eq. (34): (B, P)."""
    with torch.enable_grad():
        if not (create_graph and x.requires_grad):
            x = x.detach().requires_grad_()
        v_t = _check_shape(v(t, x, **cond), x)
        products = []
        for piece in rows.split(max(1, 2**22 // x.numel())):  # batches of 16 MB
            piece = piece.expand(-1, *x.shape)
            product = piece * _vjps(v_t, x, piece, create_graph, len(rows) > 1)
            sums = product.reshape(len(piece), len(x), -1).sum(2, dtype=_at_least_float32(x.dtype))
            products.append(sums)
        div_t = torch.cat(products).T
    return (v_t, div_t) if create_graph else (v_t.detach(), div_t.detach())


def _vjps(v_t, x, rows, create_graph, again):
    """rows^T dv/dx, (P, B, *dims), in one reverse pass, or row by row; 0 where v ignores x."""
    if not v_t.requires_grad:
        return torch.zeros_like(rows)
    options = {"retain_graph": again or create_graph, "create_graph": create_graph}
    options["materialize_grads"] = True
    if len(rows) > 1:
        try:
            return torch.autograd.grad(v_t, x, rows, is_grads_batched=True, **options)[0]
        except RuntimeError as e:
            if not any(word in str(e) for word in ("vmap", "atching rule", "donated", "storage")):
                raise  # else a part of the network, custom or compiled, takes no batch
    return torch.stack([torch.autograd.grad(v_t, x, row, **options)[0] for row in rows])


class BitsPerDim(NamedTuple):
    """bpd: (B,) bits per dimension; std_err: (B,) over probes, NaN for one; nfe: (B,), K solves."""

    bpd: Tensor
    std_err: Tensor
    nfe: Tensor


def bits_per_dim(v, images, path, K=1, divergence="hutchinson", **options) -> BitsPerDim:
    """Bits per dimension, (B,), of uint8 images (B, *dims) under uniform dequantisation.

    Eq. (47) with K draws of the noise and the constant of Eq. (37); v works on (x + u) / 128 - 1 in
    [-1, 1). options: keywords of log_prob, cond included. K > 1 with Hutchinson's trace is biased:
    a mean of exponentials. ValueError for other images.
    """
    fits = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim > 1
    _require(fits and len(images), "images must be uint8 (B, *dims)", images)
    d = images[0].numel()
    draws = []
    for _ in range(K):
        y = (images + torch.rand(images.shape, device=images.device)) / 128 - 1  # Eq. (36)
        draws.append(log_prob(v, y, path, divergence, **options))
    log_p = torch.stack([draw.log_prob for draw in draws])  # (K, B)
    std_errs = torch.stack([draw.std_err for draw in draws])
    bpd = -(log_p.logsumexp(0) - math.log(K)) / (d * math.log(2)) + 7  # Eqs. (47), (37)
    std_err = torch.linalg.vector_norm(log_p.softmax(0) * std_errs, dim=0) / (d * math.log(2))
    return BitsPerDim(bpd, std_err, sum(draw.nfe for draw in draws))


# ---- 6 UNet, Appendix E and Table 3: the network of Dhariwal & Nichol (2021), "ADM" ----


class GroupNorm(nn.GroupNorm):
    """GroupNorm in 32 groups or as many as divide the channels, in bfloat16 also under autocast."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, channels), channels)

    def forward(self, x):
        if x.dtype == _at_least_float32(x.dtype):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # it would keep float32 for backward
            weights = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, *weights, self.eps)


def zeroed(layer):
    """The layer with all its parameters set to zero: it starts by adding nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """skip(x) + conv(dropout(silu(norm(h)))), where h = conv(silu(norm(x))) + linear(emb)."""

    def __init__(self, c_in, c_out, c_emb, dropout):
        super().__init__()
        self.norm_in = GroupNorm(c_in)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm_out = GroupNorm(c_out)
        self.dropout = nn.Dropout(dropout)
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
        self.norm = GroupNorm(c)
        self.qkv = nn.Linear(c, 3 * c)
        self.proj = zeroed(nn.Linear(c, c))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        h = self.qkv(h).unflatten(2, (self.heads, 3, -1))  # by head, then q | k | v, then channel
        q, k, v = h.transpose(1, 2).unbind(3)  # (B, heads, HW, 3, d) -> three (B, heads, HW, d)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, HW, C)
        return x + self.proj(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Upsample(nn.Conv2d):
    """The 3x3 convolution of x enlarged twofold by repeating its pixels."""

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0))


class Stage(nn.Sequential):
    """Layers in a row; the residual blocks among them also take the embedding."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


@dataclass(eq=False, repr=False)
class UNet(nn.Module):
    """v_t(x) for images, as net(t, x, y=None, cond=None); call net.eval() before sampling.

    attention_resolutions: image sizes in pixels that have it; the middle always does. num_classes:
    of labels y, where num_classes itself and None mean no label. cond_channels: of an image cond
    beside x. UNet(**net.config) builds the network again. Levels of 8, 16 or 32 channels, one a
    group, lose time and label in their norms: use 48 or more. ValueError for sizes that do not fit.
    """

    image_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    channel_mult: tuple = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple = (16,)
    head_channels: int = 64
    dropout: float = 0.1
    num_classes: int = None
    time_scale: float = 1000.0
    cond_channels: int = 0

    def __post_init__(self):
        super().__init__()
        self.channel_mult = list(self.channel_mult)  # as it comes from JSON
        self.attention_resolutions = list(self.attention_resolutions)
        self.config = {field.name: getattr(self, field.name) for field in fields(self)}
        sizes = [self.image_size // 2**level for level in range(len(self.channel_mult))]
        unit = 2 ** (len(sizes) - 1)
        fits = self.image_size % unit == 0
        _require(fits, f"image_size must be a multiple of {unit}", self.image_size)
        known = {*self.attention_resolutions} <= {*sizes}
        _require(known, f"attention_resolutions must be among {sizes}", self.attention_resolutions)
        widths = [int(self.channels * multiple) for multiple in self.channel_mult]
        c_emb = 4 * self.channels

        def stage(c_in, c_out, size):
            layers = Stage(ResBlock(c_in, c_out, c_emb, self.dropout))
            attend = size in self.attention_resolutions
            return layers.append(Attention(c_out, self.head_channels)) if attend else layers

        # The order of the lines below is ADM's order of weights, which from_adm relies on.
        first, last = nn.Linear(self.channels, c_emb), nn.Linear(c_emb, c_emb)
        self.embed = nn.Sequential(first, nn.SiLU(), last)
        self.label = nn.Embedding(self.num_classes + 1, c_emb) if self.num_classes else None
        c = widths[0]
        skips = [c]
        first = nn.Conv2d(self.in_channels + self.cond_channels, c, 3, padding=1)
        self.down = nn.ModuleList([Stage(first)])
        for size, width in zip(sizes, widths):
            if size < self.image_size:
                self.down.append(Stage(nn.Conv2d(c, c, 3, stride=2, padding=1)))
                skips.append(c)
            for _ in range(self.num_res_blocks):
                self.down.append(stage(c, width, size))
                c = width
                skips.append(c)
        self.middle = Stage(ResBlock(c, c, c_emb, self.dropout), Attention(c, self.head_channels))
        self.middle.append(ResBlock(c, c, c_emb, self.dropout))
        self.up = nn.ModuleList()
        for size, width in zip(sizes[::-1], widths[::-1]):
            for _ in range(self.num_res_blocks + 1):
                self.up.append(stage(c + skips.pop(), width, size))
                c = width
            if size < self.image_size:
                self.up[-1].append(Upsample(c, c, 3, padding=1))
        last = zeroed(nn.Conv2d(c, self.out_channels, 3, padding=1))
        self.head = nn.Sequential(GroupNorm(c), nn.SiLU(), last)
        self.to(memory_format=torch.channels_last)  # strides only; the activations follow them

    def embedding(self, t, x, y):
        """What the residual blocks see of time and label: (B, 4 channels), or (1, 4 channels)."""
        t = torch.atleast_1d(_as_time(t, x))  # not in bfloat16, whose 8 bits are few for 1000 t
        half = self.channels // 2
        frequencies = 1e4 ** (-torch.arange(half, dtype=t.dtype, device=x.device) / half)
        angle = self.time_scale * t[:, None] * frequencies
        emb = self.embed(torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))
        if self.label is None:
            return emb
        return emb + (self.label.weight[self.num_classes] if y is None else self.label(y))

    def forward(self, t, x, y=None, cond=None):
        """v_t(x), (B, out_channels, H, W), for images x (B, in_channels, H, W) in about [-1, 1].

        t: a number, () or (B,). y: int64 (B,), 0 to num_classes. cond: (B, cond_channels, H, W).
        Dropout is at work until net.eval().
        """
        _require(y is None or self.label is not None, "y needs a network with num_classes", y)
        emb = F.silu(self.embedding(t, x, y))
        h = x if cond is None else torch.cat([x, cond.to(x.dtype)], 1)
        skips = []
        for stage in self.down:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], 1), emb)
        return self.head(h)

    @classmethod
    def from_adm(cls, checkpoint, time_scale=1.0, **config):
        """UNet with the weights of torchcfm's UNetModelWrapper, taken by order, not by name.

        checkpoint: its state dict, or a dict with that under ema_model or net_model. Those networks
        saw t itself, so time_scale is 1; config says the rest. RuntimeError for other shapes.
        """
        net = cls(time_scale=time_scale, **config)
        theirs = checkpoint.get("ema_model", checkpoint.get("net_model", checkpoint))
        names = [*net.state_dict(), *list(theirs)[len(net.state_dict()) :]]
        weights = [w.flatten(1) if w.ndim == 3 else w for w in theirs.values()]  # 1x1 Conv1d
        net.load_state_dict(dict(zip(names, weights)))
        return net


# ---- 7 Checks ----


def _require(condition, rule, *got):
    """ValueError with the rule and what came instead, unless the condition holds."""
    if not condition:
        raise ValueError(rule + "".join(f"; got {_describe(x)}" for x in got))


def _describe(x):
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _any(mask):
    """Whether a value is True; on a GPU, whose host would wait for the answer, False."""
    return mask.device.type == "cpu" and bool(mask.any())


def _first(mask):
    """The first row of mask (B, ...) with a True."""
    return mask.reshape(len(mask), -1).any(1).int().argmax().item()


def _at_least_float32(dtype):
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _as_time(t, x):
    """t, a number or a tensor, as a tensor beside x, in float32 or better."""
    dtype = _at_least_float32(x.dtype)
    if isinstance(t, Tensor):
        return t.to(x.device, dtype)
    return torch.full((), t, dtype=dtype, device=x.device)


def _as_column(a, x):
    """a, () or (B,), as a view that broadcasts against x (B, *dims)."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def _derivative(f, t):
    """f(t) and d/dt f(t), row by row, by forward-mode autodiff."""
    with warnings.catch_warnings():  # torch 2.14 warns of its own torch.jit.script
        warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
        return torch.func.jvp(f, (t.contiguous(),), (torch.ones_like(t),))


def _check_batch(name, x):
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0 and x.numel() > 0
    _require(fits, f"{name} must be floating point (B, *dims) with B >= 1", x)
    _require(not _any(~x.isfinite()), f"{name} must be finite", x)


def _check_cond(cond, x):
    for name, c in cond.items():
        rule = "samples start at noise and run over path.t_span; else odeint(v, x0, t=path.t_span)"
        _require(name not in ("x0", "t"), f"{name} is no option here: {rule}; [::-1] encodes")
        fits = isinstance(c, Tensor) and c.ndim > 0 and len(c) == len(x)
        rule = f"{name} is no option here, so it is conditioning: a tensor of {len(x)} rows"
        _require(fits, rule, c)


def _check_path(path, kind):
    rule = f"path must be a {kind.__name__} such as OTPath(), no name and no class"
    _require(isinstance(path, kind), rule, path)


def _check_shape(v_t, x):
    shape = getattr(v_t, "shape", type(v_t).__name__)
    if shape != x.shape:
        raise ValueError(f"v must return the shape of x, {tuple(x.shape)}; got {shape}")
    return v_t


def _check_kinds(**kinds):
    for name, kind in kinds.items():
        fits = kind in ("velocity", "score", "noise", "data")
        _require(fits, f"{name} must be velocity, score, noise or data", kind)


def _check_times(t, x, t_span):
    """t as (B,), inside the span."""
    t = _as_time(t, x)
    fits = t.shape in ((), (len(x),))
    _require(fits, f"t must have shape () or ({len(x)},), as x has rows", t)
    if _any(~((t >= t_span[0]) & (t <= t_span[1]))):
        rule = f"t must lie in the path's t_span {tuple(t_span)}"
        raise ValueError(f"{rule}; got {t.min():.6g} to {t.max():.6g}")
    return t.expand(len(x))


def _check_divisor(divisor, t, what, path):
    bad = (divisor == 0) | ~divisor.isfinite()
    if _any(bad):
        first = expand(t, bad).expand_as(bad)[bad][0]
        raise ValueError(f"{what} at t = {first:.6g} of {path!r}: stay inside t_span {path.t_span}")


def _whole_span(sigma_1):
    return (0.0, 1.0) if sigma_1 > 1e-6 else (0.0, 1 - 1e-5)


def _schedule_ends(alpha, sigma, check):
    """alpha(0), sigma(0) and sigma(1) as numbers, checked."""
    ends = []
    for schedule in (alpha, sigma):
        for t in (0.0, 1.0):  # without dimensions, so that it goes with weights on any device
            value = schedule(torch.tensor(t))
            rule = "alpha and sigma must be torch functions of t, as lambda t: t or torch.ones_like"
            _require(isinstance(value, Tensor), rule, value)
            ends.append(value.item())
    alpha_0, alpha_1, sigma_0, sigma_1 = ends
    if check:
        rule = "sigma(0) must be > 0 and sigma(1) in [0, sigma(0)) unless check_ends=False"
        _require(-1e-6 < sigma_1 < sigma_0 < math.inf, rule, sigma_0, sigma_1)
        rule = "alpha(1) must be 1, or samples are a multiple of the data, unless check_ends=False"
        _require(abs(alpha_1 - 1) < 0.01, rule, alpha_1)
        _check_start(alpha_0, sigma_0, "let alpha(0) be 0")
    return alpha_0, sigma_0, sigma_1


def _check_start(alpha_0, sigma_0, way_out):
    rule = "alpha(0) / sigma(0) must be at most 0.1, as a solve starts from pure noise"
    way_out = f"{way_out}, or use AffinePath(alpha, sigma, check_ends=False)"
    _require(abs(alpha_0) <= 0.1 * sigma_0, f"{rule}: {way_out}", alpha_0, sigma_0)


def _loss_arguments(path, x1, x0, noise, t, predict, weight, reduction, cond):
    """t (B,) and x0 (B, *dims) for cfm_loss; on a GPU no value is looked at."""
    _check_kinds(predict=predict)
    _check_path(path, GaussianPath if predict == "score" else ConditionalFlow)
    _check_batch("x1", x1)
    _check_cond(cond, x1)
    named = weight is None or weight == "sigma^2" or (weight == "beta" and hasattr(path, "beta"))
    rule = "weight must be None, 'sigma^2', 'beta' (on VPPath) or a function of t"
    _require(named or callable(weight), rule, weight, path)
    _require(reduction in ("mean", "none"), "reduction must be 'mean' or 'none'", reduction)
    _require(x0 is None or noise is None, "x0, your pairs, and noise, your draw, are alternatives")
    rule = f"x0 cannot be paired on {path!r}, whose psi_0(x0) is not x0; give noise, or use OTPath"
    _require(x0 is None or path.allows_pairs, rule)
    if t is None:  # Departure: t ~ U[t_span] in each row, but stratified: less variance
        t = path.sample_t(len(x1), x1.device, x1.dtype)
    t = _check_times(t, x1, path.t_span)
    for given in (x0, noise):
        if given is not None:
            _check_batch("x0 or noise", given)
            _require(given.shape == x1.shape, "x0 or noise must have the shape of x1", given, x1)
            return t, given
    return t, torch.randn_like(x1)


def _solver_times(t, dtype):
    """t as two or more Python numbers that rise or fall strictly in that dtype."""
    times = t.tolist() if isinstance(t, Tensor) else [float(time) for time in t]
    steps = torch.tensor(times, dtype=dtype).diff()
    fits = len(times) > 1 and steps.isfinite().all() and ((steps > 0).all() or (steps < 0).all())
    _require(fits, f"t must be two or more times, all rising or all falling in {dtype}", t)
    return times


def _check_solver(method, intervals, steps, rtol, atol, max_nfe):
    _require(method in METHODS, f"method must be one of {', '.join(METHODS)}", method)
    if method == "dopri5":
        rule = "dopri5 picks its own steps; set rtol and atol, or method='rk4'"
        _require(steps is None, rule, steps)
        given = [value for value in (rtol, atol) if value is not None]
        fits = all(0 <= value < math.inf for value in given) and given != [0, 0]
        _require(fits, "rtol and atol must be >= 0, finite, and not both 0", rtol, atol)
    else:
        fits = rtol is None and atol is None and max_nfe is None
        _require(fits, f"rtol, atol and max_nfe are for dopri5; {method} takes steps alone")
        fits = isinstance(steps, int) and steps >= intervals
        _require(
            fits, f"{method} needs steps, at least one for each of {intervals} intervals", steps
        )


def _warn_of_dropout(v):
    while not isinstance(v, nn.Module) and hasattr(v, "model"):
        v = v.model
    if isinstance(v, nn.Module) and v.training:
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in v.modules()):
            warnings.warn("v is in train mode, with dropout: call v.eval() first", stacklevel=4)
