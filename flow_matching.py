# SPDX-License-Identifier: MIT (keep the text of LICENSE with copies of this file)
"""Flow Matching for Generative Modeling (Lipman et al., ICLR 2023) in one file; it needs torch.

Equation numbers are those of arXiv:2210.02747v2. Time runs from noise, t = 0, to data, t = 1. x, x0
(noise) and x1 (data) are (B, *dims). Lines marked `Departure:` differ from the paper and say why.
The values of arguments are checked on the CPU only; reading them would stall a GPU.

    path = OTPath()
    loss = cfm_loss(v, path, x1)               # train v on this: Eq. (14), for OTPath Eq. (23)
    x = sample(v, path, (n, *dims)).x          # after v.eval(), if v is a module
    log_p = log_prob(v, path, x1).log_prob     # in nats
    x0 = odeint(v, x1, path.t_span[::-1]).x    # encodes data; path.t_span decodes it

A vector field is any callable v(t, x, **cond) with t (B,) and x (B, *dims). It returns the shape of
x, and does not write into its arguments. Its rows must not see each other: the default solver calls
v with the samples that are still under way, each at its own time. So a tensor with one row per
sample is passed in the dictionary cond, as in cfm_loss(v, path, x1, cond={"y": labels}), and never
bound into v.

    1 Paths           Gaussian paths, their fields and conversions      Eqs. (10)-(22), (38), (46)
    2 Loss            conditional flow matching, Table 1's objectives   Eqs. (14), (23), (43)-(46)
    3 Exact marginal  p_t and u_t of a finite data set                  Eqs. (6), (8)
    4 Solvers         Runge-Kutta methods, samples, an SDE, guidance    Eq. (1)
    5 Likelihood      log densities and bits per dimension              Eqs. (27)-(37), (47)
    6 UNet            the network of the image experiments              App. E, Table 3
    7 Checks          arguments that would be silently wrong are refused
"""

import math
import operator
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

__version__ = "3.1.0"
# fmt: off
__all__ = [
    "ConditionalFlow", "GaussianPath", "AffinePath", "OTPath", "VPPath", "VEPath", "CosinePath",
    "PATHS", "time_column",
    "cfm_loss", "OBJECTIVES", "as_velocity", "ot_coupling",
    "Marginal",
    "METHODS", "odeint", "rms", "sample", "sample_sde", "classifier_free_guidance", "Solution",
    "SolverError",
    "log_prob", "LogProb", "bits_per_dim", "BitsPerDim",
    "UNet",
]
# fmt: on


# ---- 1 Paths, Section 4 ----


def time_column(t, x) -> Tensor:
    """t (a number, () or (B,)) as a tensor that broadcasts against x (B, *dims), say (B, 1, 1, 1).

    In float32, or in float64 if x is.
    """
    return _as_column(_as_time(t, x), x)


def _as_time(t, x):
    """t, a number or a tensor, as a tensor on the device of x, in float32 or better."""
    dtype = _at_least_float32(x.dtype)
    if isinstance(t, Tensor):
        return t.to(x.device, dtype)
    return torch.full((), t, dtype=dtype, device=x.device)


def _at_least_float32(dtype):
    return dtype if dtype == torch.float64 else torch.float32


def _as_column(a, x):
    """a, () or (B,), as a view that broadcasts against x (B, *dims)."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def _flat(x):
    """x (B, *dims) as (B, d), also for B = 0."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _derivative(f, t):
    """f(t) and d/dt f(t), row by row, by forward-mode autodiff."""
    # Attention's fused kernels have no forward mode.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # torch 2.14 warns of its own torch.jit.script.
        warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
        return torch.func.jvp(f, (t.contiguous(),), (torch.ones_like(t),))


# Where we stop if sigma_1 = 0, as u_t, score and density divide by it: App. E.1.
LAST_TIME = 1 - 1e-5


class ConditionalFlow:
    """x_t = psi_t(x0 | x1), any map differentiable in t, from x0 to x1 = psi_1(x0).

    psi(t (B,), x0, x1) -> (B, *dims) is a function, or a subclass defines it. Every path has three
    attributes. t_span: the times of training and sampling. source_std: a solve starts from
    p_0 = N(0, source_std^2 I). allows_pairs: True if psi_0(x0) = x0; only then may x0 be passed to
    cfm_loss. A source that is no such normal is yours to draw: pass x0 to cfm_loss, and solve by
    odeint from draws; sample and log_prob do not know it.
    """

    def __init__(self, psi=None, t_span=(0.0, 1.0)):
        if psi is not None:
            self.psi = psi
        self.t_span = t_span
        self.source_std = 1.0
        self.allows_pairs = True

    def __repr__(self):
        numbers = (float, tuple)
        settings = [f"{n}={value}" for n, value in vars(self).items() if isinstance(value, numbers)]
        return f"{type(self).__name__}({', '.join(settings)})"

    def psi_dpsi(self, t, x0, x1):
        """psi_t(x0) and d/dt psi_t(x0), each (B, *dims): point and target of Eq. (14)."""
        t = _as_time(t, x1).expand(len(x1))
        return _derivative(lambda t: self.psi(t, x0, x1), t)

    def dpsi(self, t, x0, x1):
        """d/dt psi_t(x0), (B, *dims): the velocity u_t(psi_t(x0) | x1) of Eq. (13)."""
        _, dpsi_t = self.psi_dpsi(t, x0, x1)
        return dpsi_t

    def sample_t(self, n, device=None, dtype=None, generator=None):
        """(n,) times in t_span, on an even grid with one random offset (systematic sampling).

        Each alone is uniform in t_span.
        """
        dtype = _at_least_float32(dtype or torch.get_default_dtype())
        offset = torch.rand((), device=device, dtype=dtype, generator=generator)
        fraction = (offset + torch.arange(n, device=device, dtype=dtype) / n) % 1
        start, end = self.t_span
        return start + (end - start) * fraction

    def sample_source(self, shape, device=None, dtype=None, generator=None):
        """Draws of that shape from p_0 = N(0, source_std^2 I), where a solve starts."""
        noise = torch.randn(shape, device=device, dtype=dtype, generator=generator)
        return self.source_std * noise


class GaussianPath(ConditionalFlow):
    """p_t(x | x1) = N(x | mu_t(x1), sigma_t(x1)^2 I), Eq. (10); sigma_t may also be elementwise.

    moments(t, x1) returns mu_t, sigma_t and their time derivatives, to broadcast against x1 (see
    time_column). It is a function, or a subclass defines it. At t = 0 the std must be source_std,
    and the mean near 0 beside it. u, log_prob and score raise ValueError where sigma_t = 0.
    """

    def __init__(self, moments=None, t_span=(0.0, 1.0), source_std=1.0):
        super().__init__(t_span=t_span)
        if moments is not None:
            self.moments = moments
        self.source_std = source_std
        self.allows_pairs = source_std == 1

    def psi_dpsi(self, t, x0, x1):
        """psi_t(x0), Eq. (11), and d/dt psi_t(x0), without Eq. (15)'s division by sigma_t."""
        mu_t, sigma_t, dmu_t, dsigma_t = self.moments(t, x1)
        return sigma_t * x0 + mu_t, dsigma_t * x0 + dmu_t

    def psi(self, t, x0, x1):
        """The flow psi_t(x0) = sigma_t x0 + mu_t, Eq. (11), (B, *dims), for x0 ~ N(0, I)."""
        psi_t, _ = self.psi_dpsi(t, x0, x1)
        return psi_t

    def u(self, t, x, x1):
        """Conditional vector field u_t(x | x1), Theorem 3, Eq. (15), (B, *dims)."""
        mu_t, sigma_t, dmu_t, dsigma_t = self.moments(t, x1)
        self._check_sigma(sigma_t, t)
        return dsigma_t / sigma_t * (x - mu_t) + dmu_t

    def log_prob(self, t, x, x1):
        """log p_t(x | x1), Eq. (10), in nats, (B,)."""
        mu_t, sigma_t, _, _ = self.moments(t, x1)
        self._check_sigma(sigma_t, t)
        log_p = -(((x - mu_t) / sigma_t) ** 2 + math.log(2 * math.pi)) / 2 - sigma_t.log()
        return _flat(log_p).sum(1)

    def score(self, t, x, x1):
        """grad_x log p_t(x | x1), (B, *dims); the paper writes s for minus it in (43), (46)."""
        mu_t, sigma_t, _, _ = self.moments(t, x1)
        self._check_sigma(sigma_t, t)
        return (mu_t - x) / sigma_t**2

    def _check_sigma(self, sigma_t, t):
        _check_regular("sigma_t is 0", sigma_t == 0, t, self)


class AffinePath(GaussianPath):
    """The Gaussian path of mean alpha(t) x1 and standard deviation sigma(t).

    alpha and sigma are two torch functions of t, which may have any shape, or a subclass defines
    them; they are differentiated for you. By default t_span ends at 1, or at 1 - 1e-5 if
    sigma(1) = 0. Sampling starts from noise and must end at data. So ValueError unless, over
    t_span, alpha / sigma starts at 0.1 at most, alpha ends at 1 and sigma falls; check_ends=False
    allows other ends.
    """

    def __init__(self, alpha=None, sigma=None, t_span=None, check_ends=True):
        if alpha is not None:
            self.alpha = alpha
            self.sigma = sigma
        start, end = t_span or (0.0, 1.0)
        _require(start < end, "t_span must rise, from noise to data", t_span)
        alpha_0 = _schedule_at(self.alpha, start)
        alpha_1 = _schedule_at(self.alpha, end)
        sigma_0 = _schedule_at(self.sigma, start)
        sigma_1 = _schedule_at(self.sigma, end)
        if check_ends:
            _check_ends(alpha_0, alpha_1, sigma_0, sigma_1)
        if t_span is None and sigma_1 < 1e-6:
            end = LAST_TIME
        super().__init__(t_span=(start, end), source_std=sigma_0)
        self.allows_pairs = abs(alpha_0) < 1e-6 and abs(sigma_0 - 1) < 1e-6

    def coefficients(self, t):
        """alpha_t, sigma_t, d/dt alpha_t, d/dt sigma_t, each in the shape of t."""
        values, derivatives = _derivative(lambda t: (self.alpha(t), self.sigma(t)), t)
        return *values, *derivatives

    def moments(self, t, x1):
        """mu_t, sigma_t, d/dt mu_t, d/dt sigma_t of Eq. (10)."""
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.coefficients(time_column(t, x1))
        return alpha_t * x1, sigma_t, dalpha_t * x1, dsigma_t

    def convert(self, t, x, value, source, target):
        """The value, (B, *dims), of kind target at (t, x), from a value of kind source: Eq. (46).

        Kinds are velocity, score, noise (x0) and data (x1). The conversion is linear, so it holds
        for posterior means, too; a score also needs x0 to be independent of x1. ValueError where
        the equations are singular.
        """
        _require(value.shape == x.shape, "value must have the shape of x", value, x)
        if source == target:
            return value
        coefficients = self.coefficients(time_column(t, x))
        alpha_t, sigma_t, _, _ = coefficients
        # Two equations, a x1 + b x0 = value and alpha_t x1 + sigma_t x0 = x, give x1 and x0.
        a, b = _in_x1_and_x0(source, *coefficients)
        c, d = _in_x1_and_x0(target, *coefficients)
        determinant = alpha_t * b - sigma_t * a
        finite = determinant.isfinite() & c.isfinite() & d.isfinite()
        singular = (determinant == 0) | ~finite
        _check_regular(f"{source} to {target} is singular", singular, t, self)
        x1 = (b * x - sigma_t * value) / determinant
        x0 = (alpha_t * value - a * x) / determinant
        return c * x1 + d * x0

    def forward_sde(self, t, x):
        """Drift f (B, *dims), diffusion g of dx = f ds + g dw, s = 1 - t, Eq. (38)."""
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.coefficients(time_column(t, x))
        rate = dalpha_t / alpha_t
        return -rate * x, (2 * sigma_t * (rate * sigma_t - dsigma_t)).sqrt()


def _schedule_at(schedule, t):
    """alpha(t) or sigma(t) as a number."""
    value = schedule(torch.tensor(t))  # without dimensions, so weights on any device will do
    rule = "alpha and sigma must be torch functions of t, as lambda t: t or torch.ones_like"
    _require(isinstance(value, Tensor), rule, value)
    return value.item()


def _in_x1_and_x0(kind, alpha_t, sigma_t, dalpha_t, dsigma_t):
    """The a and b for which a x1 + b x0 is the value of that kind at alpha_t x1 + sigma_t x0."""
    one = torch.ones_like(alpha_t)
    zero = torch.zeros_like(alpha_t)
    if kind == "data":
        return one, zero
    if kind == "noise":
        return zero, one
    if kind == "velocity":
        return dalpha_t, dsigma_t
    if kind == "score":
        return zero, -1 / sigma_t
    raise ValueError(f"the kind must be velocity, score, noise or data; got {kind!r}")


class OTPath(AffinePath):
    """Optimal transport path, Section 4.1: straight lines at constant speed.

    mu_t = t x1 and sigma_t = 1 - (1 - sigma_min) t, Eq. (20). By Eq. (15) the field is
    u_t(x | x1) = (x1 - (1 - sigma_min) x) / (1 - (1 - sigma_min) t), Eq. (21). The flow and its
    derivative, which is the target of Eq. (23), come from psi_dpsi:
    psi_t(x0) = (1 - (1 - sigma_min) t) x0 + t x1, Eq. (22),
    d/dt psi_t(x0) = x1 - (1 - sigma_min) x0.
    """

    def __init__(self, sigma_min=1e-4):
        self.sigma_min = sigma_min
        super().__init__()

    def alpha(self, t):
        return t

    def sigma(self, t):
        return (1 - t) + self.sigma_min * t  # 1 - (1 - sigma_min) t without cancellation

    def coefficients(self, t):
        dalpha_t = torch.ones_like(t)
        dsigma_t = torch.full_like(t, self.sigma_min - 1)
        return self.alpha(t), self.sigma(t), dalpha_t, dsigma_t


class VPPath(AffinePath):
    """Variance preserving diffusion path, Eq. (18), with the beta schedule of App. E.1.

    Our alpha(t) is the paper's alpha_{1-t}, as its schedules run in diffusion time s = 1 - t.
    """

    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_min = beta_min
        self.beta_max = beta_max
        super().__init__()
        self.source_std = 1.0  # the paper samples from N(0, I), though sigma(0) = 0.99998

    def beta(self, s):
        """beta(s) of App. E.1."""
        return self.beta_min + s * (self.beta_max - self.beta_min)

    def T(self, s):
        """T(s), the integral of beta from 0 to s, of Eq. (18)."""
        return s * self.beta_min + s**2 / 2 * (self.beta_max - self.beta_min)

    def alpha(self, t):
        return torch.exp(-self.T(1 - t) / 2)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-self.T(1 - t)))  # sqrt(1 - alpha_t^2), exact near t = 1

    def coefficients(self, t):
        alpha_t = self.alpha(t)
        sigma_t = self.sigma(t)
        dalpha_t = self.beta(1 - t) / 2 * alpha_t  # d/dt; the primes of Eq. (19) are d/ds
        dsigma_t = -alpha_t * dalpha_t / sigma_t  # as sigma_t^2 = 1 - alpha_t^2
        return alpha_t, sigma_t, dalpha_t, dsigma_t


class VEPath(AffinePath):
    """Variance exploding path, Eq. (16), with the geometric schedule of Song et al. (2021).

    Departure: sigma_min > 0 at the data, not 0, and p_0 = N(0, sigma_max^2 I), as x1 is not known.
    """

    def __init__(self, sigma_min=0.01, sigma_max=10.0):
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        super().__init__()
        self.source_std = sigma_max

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        rate = math.log(self.sigma_min / self.sigma_max)
        return self.sigma_max * torch.exp(rate * t)

    def coefficients(self, t):
        rate = math.log(self.sigma_min / self.sigma_max)
        sigma_t = self.sigma(t)
        return self.alpha(t), sigma_t, torch.zeros_like(t), rate * sigma_t


class CosinePath(AffinePath):
    """alpha = sin, sigma = cos of pi t / 2: the VP arc at constant speed (not in the paper)."""

    def alpha(self, t):
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(math.pi / 2 * (1 - t))  # the cosine, exact near t = 1

    def coefficients(self, t):
        alpha_t = self.alpha(t)
        sigma_t = self.sigma(t)
        return alpha_t, sigma_t, math.pi / 2 * sigma_t, -math.pi / 2 * alpha_t


PATHS = {"ot": OTPath, "vp": VPPath, "ve": VEPath, "cosine": CosinePath}


# ---- 2 Loss, Section 3.2 ----


def cfm_loss(
    v,
    path,
    x1,
    *,
    cond=None,
    x0=None,
    t=None,
    predict="velocity",
    weight=None,
    reduction="mean",
    generator=None,
) -> Tensor:
    """One-batch estimate of L_CFM, Eq. (14), on OTPath Eq. (23): (), or (B, *dims) elementwise.

    x1: data, (B, *dims). cond: tensors with one row per sample, passed to v. x0: your pairs with
    x1, in place of draws of N(0, I), on paths with psi_0(x0) = x0 such as OTPath. t: your times, ()
    or (B,), within path.t_span. predict: what v returns, "velocity", "noise" (Eq. (45), DDPM),
    "score" (Eq. (43), with the true sign) or "data". weight: lambda(t) of Eq. (43), a function of
    t (B,), "sigma^2" (the default for a score) or, on VPPath, "beta" (ScoreFlow). reduction: "mean"
    or "none". generator: of the draws of t and x0. ValueError for data that is not finite floating
    point, other shapes, t outside the span and x0 on a path without pairs.

    The loss does not reach 0: many pairs cross at x_t, and v can only predict the mean of their
    velocities. Unweighted, its minimum for them is the mean over dimensions of E Var[dpsi_t | x_t].
    A mask of (B, T) for a loss of (B, T, C), and a weight w for each sample, (B,):
        loss = cfm_loss(v, path, x1, reduction="none")
        m = mask[..., None].expand_as(loss); (loss * m).sum() / m.sum()
        (loss.flatten(1).mean(1) * w).mean()
    """
    _check_path(path, GaussianPath if predict == "score" else ConditionalFlow)
    _check_batch("x1", x1)
    cond = _check_cond(cond, x1)
    if t is None:
        # Departure: each t is uniform in t_span, but a batch's lie on a grid: less variance.
        t = path.sample_t(len(x1), x1.device, x1.dtype, generator)
    else:
        t = _check_times(t, x1, path.t_span)
    if x0 is None:
        x0 = torch.randn(x1.shape, device=x1.device, dtype=x1.dtype, generator=generator)
    else:
        _check_pairs(path, x0, x1)

    x_t, dpsi_t = path.psi_dpsi(t, x0, x1)  # psi_t(x0) and d/dt psi_t(x0), (B, *dims)
    _require(x_t.shape == x1.shape, "psi must keep the shape of x1: use time_column(t, x1)", x_t)
    if predict == "velocity":
        target = dpsi_t
    elif predict == "noise":
        target = x0
    elif predict == "data":
        target = x1
    elif predict == "score":
        _, sigma_t, _, _ = path.moments(t, x1)
        target = -x0 / sigma_t  # grad log p_t(x_t | x1)
        weight = weight or "sigma^2"
    else:
        raise ValueError(f"predict must be velocity, noise, score or data; got {predict!r}")
    lambda_t = _weight(weight, path, t, x1)

    v_t = _call(v, t, x_t.to(x1.dtype), cond)
    loss = lambda_t * (v_t - target.to(t.dtype)) ** 2  # in float32, if v is in bfloat16
    if reduction == "none":
        return loss
    if reduction == "mean":
        # Departure: Eq. (14) sums over dimensions; their mean keeps the learning rate free of d.
        return loss.mean()
    raise ValueError(f"reduction must be 'mean' or 'none'; got {reduction!r}")


def _weight(weight, path, t, x1):
    """lambda(t) of Eq. (43), to broadcast against x1."""
    if weight is None:
        return 1.0
    if weight == "sigma^2":
        _, sigma_t, _, _ = path.moments(t, x1)
        return sigma_t**2
    if weight == "beta":
        _require(isinstance(path, VPPath), "weight 'beta' needs VPPath()", path)
        return time_column(path.beta(1 - t), x1)
    lambda_t = weight(t)
    _require(lambda_t.shape == t.shape, "weight must return one number per sample, (B,)", lambda_t)
    return time_column(lambda_t, x1)


# The rows of Table 1 as keywords of cfm_loss; "scoreflow" weighs the score for likelihood.
OBJECTIVES = {
    "velocity": {"predict": "velocity"},
    "noise": {"predict": "noise"},
    "score": {"predict": "score", "weight": "sigma^2"},
    "scoreflow": {"predict": "score", "weight": "beta"},
}


def as_velocity(model, path, predict):
    """The vector field of a network that predicts "score", "noise", "data" or "velocity", Eq. (46).

    path: affine. A call raises ValueError where that tells no velocity: on OTPath and CosinePath a
    score or noise at t = 0, so start later, by odeint(v, x0, (1e-3, path.t_span[1])).
    """
    _check_path(path, AffinePath)

    def velocity(t, x, /, **cond):
        output = _call(model, t, x, cond)
        return path.convert(t, x, output, predict, "velocity")

    return velocity


def ot_coupling(x0, x1) -> Tensor:
    """The permutation p, (B,), with least sum of squared distances x0[p] to x1; needs SciPy.

    It chooses the pairs (minibatch OT, Tong et al., 2024), and the OT path interpolates each pair:
    cfm_loss(v, path, x1, x0=x0[p]). With labels, couple within each class, so that x0 stays N(0, I)
    given the label. ValueError for shapes that differ.
    """
    _require(x0.shape == x1.shape, "x0 and x1 must have one shape", x0, x1)
    from scipy.optimize import linear_sum_assignment

    # In float64, as far from 0 the squares would round the differences away.
    rows = _flat(x1.detach().cpu().double())
    columns = _flat(x0.detach().cpu().double())
    costs = torch.cdist(rows, columns) ** 2
    _, assigned = linear_sum_assignment(costs.numpy())
    return torch.as_tensor(assigned, device=x0.device)


# ---- 3 Exact marginals of finite data, Section 3.1 ----


class Marginal:
    """The exact marginal field u_t, Eq. (8), of data (N, *dims) under an affine path, as v(t, x).

    Here q is uniform on the N points. x: (B, *dims); t: a number, () or (B,). A call needs memory
    for B x N weights. ValueError for t outside path.t_span and data that is not finite.
    """

    def __init__(self, path, data):
        _check_path(path, AffinePath)
        _check_batch("data", data)
        self.path = path
        self.data = data

    def __call__(self, t, x):
        """u_t(x), Eq. (8), (B, *dims): the sum of u_t(x | x_i) p_t(x | x_i) q(x_i) / p_t(x)."""
        weights = self._log_likelihoods(t, x).softmax(1)  # p_t(x | x_i) q(x_i) / p_t(x), (B, N)
        x1_mean = self._mean(weights).reshape(x.shape)
        # u_t(x | x1), Eq. (15), is linear in x1, so its mean is its value at the mean of x1.
        return self.path.u(t, x.to(weights.dtype), x1_mean).to(x.dtype)

    def posterior(self, t, x):
        """The weights p_t(x | x_i) q(x_i) / p_t(x) of that sum, (B, N); each row sums to 1."""
        return self._log_likelihoods(t, x).softmax(1)

    def x1_mean(self, t, x):
        """E[x1 | x_t = x], (B, *dims)."""
        return self._mean(self.posterior(t, x)).reshape(x.shape)

    def score(self, t, x):
        """grad_x log p_t(x), (B, *dims)."""
        return self.path.score(t, x, self.x1_mean(t, x)).to(x.dtype)

    def _mean(self, weights):
        """The sum of weights[:, i] x_i, (B, d)."""
        with torch.autocast(weights.device.type, enabled=False):  # it would round the product
            return weights @ _flat(self.data).to(weights)

    def log_prob(self, t, x):
        """log p_t(x), Eq. (6), in nats, (B,)."""
        return self._log_likelihoods(t, x).logsumexp(1) - math.log(len(self.data))

    def _log_likelihoods(self, t, x):
        """log p_t(x | x_i), Eq. (10), in nats, (B, N)."""
        dims = self.data.shape[1:]
        _require(x.shape[1:] == dims, f"x must be (B, *dims) with dims {[*dims]}", x)
        t = _check_times(t, x, self.path.t_span)
        x = _flat(x).to(_at_least_float32(x.dtype))  # (B, d)
        data = _flat(self.data).to(x)  # (N, d)
        alpha_t, sigma_t, _, _ = self.path.coefficients(t[:, None])
        # |x - alpha x_i|^2 as alpha^2 |x / alpha - x_i|^2, since cdist takes one set of x_i.
        alpha_t = torch.where(alpha_t.abs() > 1e-12, alpha_t, 1e-12)  # not 0, as at t = 0
        squares = (alpha_t / sigma_t) ** 2 * SquaredDistances.apply(x / alpha_t, data)
        log_norm = x.shape[1] * (sigma_t.log() + math.log(2 * math.pi) / 2)
        return -squares / 2 - log_norm


class SquaredDistances(torch.autograd.Function):
    """|x_b - y_i|^2, (B, N), of points x (B, d) and y (N, d), also under torch.func.

    By cdist, since |x|^2 - 2 x y + |y|^2 would cancel; with a derivative of our own, since that of
    cdist is wrong under vmap and jacrev (torch 2.14). It rounds: for Marginal.log_prob it is off by
    1e-7 / sigma_t, where Marginal.score is exact.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y):
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad_x = grad.sum(1, keepdim=True) * x - grad @ y
            grad_y = grad.sum(0)[:, None] * y - grad.T @ x
        return 2 * grad_x, 2 * grad_y


# ---- 4 Solvers, Eq. (1) ----


class Tableau(NamedTuple):
    """Stage i calls v at (t + C[i] h, x + h sum_j A[i][j] k_j); the step is h sum_j B[j] k_j.

    If B is None, the last stage is the result, and its slope is the next step's first.
    The error of the step is estimated by h sum_j E[j] k_j.
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
    2 and 4 for euler, midpoint and rk4. A guided call counts once and costs two. The look at the
    rows of v is not counted: one call with the first sample, and one with copies of the last.
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


def rms(error, /, **cond):
    """Root mean square of each row of error (B, *dims), (B,)."""
    error = error.reshape(len(error), -1)
    return torch.linalg.vector_norm(error, dim=1) * error.shape[1] ** -0.5


def odeint(
    v,
    x,
    t=(0.0, 1.0),
    *,
    cond=None,
    method="dopri5",
    steps=None,
    rtol=1e-5,
    atol=1e-5,
    max_nfe=10_000,
    norm=rms,
    check_rows=True,
) -> Solution:
    """Solution of d/dt x = v(t, x), Eq. (1), from x at t[0] through all times in t, either way.

    x: (B, *dims). cond: tensors with one row per sample, passed to v. method: "dopri5" chooses the
    steps of each sample on its own. A step is accepted if norm(error / (atol + rtol |x|), **cond)
    <= 1, for its estimated error; a sample has at most max_nfe calls of v. norm takes (B, *dims)
    and the names in cond, or **_, and returns (B,); it may mask padding. "euler", "midpoint" and
    "rk4" share `steps` steps among the intervals; rtol, atol, max_nfe and norm have no effect on
    them. Do not compute likelihoods with few fixed steps: the result may be far too high or low.
    Gradients flow through the solve to x, cond and the weights of v, but not to t; wrap it in
    torch.no_grad() to save memory. They are NaN where dopri5 rejected a step that overflowed.
    ValueError for bad arguments and, from dopri5, for a v whose rows see each other at the start,
    unless check_rows is False. SolverError when a step underflows, v is not finite or max_nfe is
    spent. Each step waits for a GPU once, and once more where a sample arrives.
    """
    _check_batch("x", x)
    cond = _check_cond(cond, x)
    _warn_of_training_mode(v)
    dtype = _at_least_float32(x.dtype)
    times = _solver_times(t, dtype)

    def f(t, state, /, **cond):
        if x.dtype != dtype:
            state = state.to(x.dtype)
        slope = _call(v, t, state, cond)
        if slope.dtype != dtype:
            slope = slope.to(dtype)
        return slope

    start = x.to(dtype)
    if method == "dopri5":
        rule = "dopri5 picks its own steps; set rtol and atol, or method='rk4'"
        _require(steps is None, rule, steps)
        rtol, atol = _check_tolerances(rtol, atol, max_nfe)
        xs, nfe, accepted = _dopri5(f, start, times, rtol, atol, max_nfe, norm, cond, check_rows)
        rejected = (nfe - 2) // 6 - accepted
    elif method in METHODS:
        _require(steps is not None, f"{method} needs steps, a whole number", steps)
        steps = operator.index(steps)
        tableau = METHODS[method]
        xs = _fixed_steps(f, start, times, tableau, steps, cond)
        accepted = torch.full((len(x),), steps, device=x.device)
        nfe = accepted * len(tableau.C)
        rejected = torch.zeros_like(accepted)
    else:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    xs = torch.stack(xs).to(x.dtype)
    return Solution(xs[-1], xs, nfe, accepted, rejected)


def _weighted_sum(weights, slopes):
    """sum_j weights[j] slopes[j]; a matrix product would round by batch size and autocast."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:]):
        if weight != 0:
            total = torch.add(total, slope, alpha=weight)
    return total


def _rk_step(f, tableau, t, t_new, x, k, cond):
    """x at t_new, its error estimate or None, and the last slope; k = f(t, x) is the first."""
    h = _as_column(t_new - t, x)
    slopes = [k]
    for c, weights in zip(tableau.C[1:], tableau.A[1:]):
        x_new = torch.addcmul(x, h, _weighted_sum(weights, slopes))
        slopes.append(f(torch.lerp(t, t_new, c), x_new, **cond))  # lerp never leaves [t, t_new]
    if tableau.B is not None:
        x_new = torch.addcmul(x, h, _weighted_sum(tableau.B, slopes))
    error = None
    if tableau.E is not None:
        error = h * _weighted_sum(tableau.E, slopes)
    return x_new, error, slopes[-1]


def _fixed_steps(f, x, times, tableau, steps, cond):
    """The states xs at all times, a list of (B, *dims), after that many steps in all."""
    xs = [x]
    counts = _share_steps(times, steps)
    for start, end, count in zip(times, times[1:], counts):
        nodes = [start + (end - start) * i / count for i in range(count)]
        nodes.append(end)
        for node, next_node in zip(nodes, nodes[1:]):
            t = x.new_full((len(x),), node)
            t_new = x.new_full((len(x),), next_node)
            k = f(t, x, **cond)
            x_new, _, _ = _rk_step(f, tableau, t, t_new, x, k, cond)
            _check_step(x_new, t, x)
            x = x_new
        xs.append(x)
    return xs


def _share_steps(times, steps):
    """The number of steps in each interval; after one each, the next goes to the longest."""
    lengths = [abs(end - start) for start, end in zip(times, times[1:])]
    rule = f"steps must be at least {len(lengths)}, one an interval"
    _require(steps >= len(lengths), rule, steps)
    counts = [1] * len(lengths)
    for _ in range(steps - len(lengths)):
        step_lengths = [length / count for length, count in zip(lengths, counts)]
        longest = step_lengths.index(max(step_lengths))
        counts[longest] += 1
    return counts


def _check_step(x_new, t, x):
    """SolverError where a step from (t, x) to x_new is not finite."""
    bad = ~x_new.isfinite()
    if bad.any():
        where = f"from t = {t[0]:.6g} in sample {_first_row(bad)}"
        raise SolverError(f"the step {where} is not finite; is v there? take more steps", t, x)


def _dopri5(f, x, times, rtol, atol, max_nfe, norm, cond, check_rows):
    """xs, a list of (B, *dims), and nfe, accepted (B,), by steps of each sample's own."""
    # Departure: torchdiffeq, the paper's solver, has one step size for the whole batch.
    times = x.new_tensor(times)
    t = times[:1].repeat(len(x))  # (B,), the time that each sample has reached
    k = f(t, x, **cond)  # (B, *dims), its slope there
    with torch.no_grad():
        if check_rows:
            _check_start(f, t, x, k, times[-1] - times[0], cond)
        h = _first_step(f, t, x, k, times[1] - times[0], rtol, atol, norm, cond)  # its next step
    nfe = torch.full_like(t, 2, dtype=torch.long)
    batch = (t, h, x, k, nfe, torch.zeros_like(nfe))
    xs = [x]
    for t_end in times[1:]:
        going = torch.arange(len(xs[0]), device=x.device)  # the samples that are not at t_end yet
        t, h, x, k, nfe, accepted = batch  # theirs
        cond_going = cond
        while len(going) > 0:
            rest = t_end - t
            steps_left = rest / h
            is_last = steps_left <= 1.01
            step = torch.where(steps_left < 2, rest / 2, h)  # the last two steps are equal
            t_new = torch.where(is_last, t_end, t + step)
            x_new, error, k_new = _rk_step(f, DOPRI5, t, t_new, x, k, cond_going)
            with torch.no_grad():
                scale = atol + rtol * torch.maximum(x.abs(), x_new.abs())
                size = norm(error / scale, **cond_going)
                accept = size <= 1  # False also where it is NaN
                arrived = accept & is_last
                h_new = (t_new - t) * _growth(size)
                was_cut = arrived & (h_new.abs() < h.abs())  # cut by t_end, not by its error
                h = torch.where(was_cut, h, h_new)
                t = torch.where(accept, t_new, t)
                nfe = nfe + 6
                accepted = accepted + accept
                is_stuck = (torch.add(t, h, alpha=0.1) == t) & ~arrived
                is_spent = (nfe + 6 > max_nfe) & (t != times[-1])
                flags = torch.stack([arrived, is_stuck, is_spent]).any(1)
            x = torch.where(_as_column(accept, x), x_new, x)
            k = torch.where(_as_column(accept, x), k_new, k)
            any_arrived, any_stuck, any_spent = flags.tolist()  # the one wait for a GPU
            if any_arrived or any_stuck or any_spent:
                parts = (t, h, x, k, nfe, accepted)  # at every step a tenth of the time
                batch = [whole.index_copy(0, going, part) for whole, part in zip(batch, parts)]
                if any_stuck or any_spent:
                    _fail(going, is_stuck, is_spent, batch)
                going = going[~arrived]
                t, h, x, k, nfe, accepted = (whole.index_select(0, going) for whole in batch)
                cond_going = {name: c.index_select(0, going) for name, c in cond.items()}
        xs.append(batch[2])
    return xs, batch[4], batch[5]


def _fail(going, is_stuck, is_spent, batch):
    """SolverError for the first sample that is stuck or has spent its NFE."""
    t, h, x, _, nfe, _ = batch
    if is_stuck.any():
        i = going[_first_row(is_stuck)]
        why = f"the step is below the resolution of t in {t.dtype}; v is singular or not finite"
        why += " near here, or rtol and atol are too tight"
    else:
        i = going[_first_row(is_spent)]
        why = "max_nfe is spent; loosen rtol and atol, or raise it; is v stiff?"
    where = f"step {h[i]:.1e} at t = {t[i]:.6g} in sample {i}, NFE {nfe[i]}"
    raise SolverError(f"dopri5: {where}: {why}", t, x)


def _growth(size):
    """The factor to the next step after an error of that size, (B,); errors are of order h^5."""
    # exp(log), as a power would round by the size of the batch. 0.9 for safety.
    growth = 0.9 * torch.exp(-0.2 * torch.log(size))
    return growth.clamp(0.2, 3).nan_to_num(0.2)


def _first_step(f, t, x, k, span, rtol, atol, norm, cond):
    """A first step (B,), signed, inside the first interval, from two slopes a little apart.

    Sizes are in tolerances. Hairer, Norsett & Wanner (1993), II.4, choose the h at which an error
    of max(|v|, |v'|) h^5 is 0.01. For easy fields that step is too careful. If it is longer, we
    take the h at which |v| L^4 h^5 / 1000, the error for a field of rate L = |v'| / |v|, is 0.1:
    it saves a fifth of their calls.
    """
    scale = (atol + rtol * x.abs()).clamp(min=torch.finfo(x.dtype).tiny)
    size_v = norm(k / scale, **cond)
    _check_norm(size_v, x)
    size_x = norm(x / scale, **cond).clamp(min=1000)  # a start near 0 counts as 1,000 tolerances
    h0 = torch.minimum(0.01 * size_x / size_v, 0.01 * span.abs())
    probe = h0 * span.sign()
    change = f(t + probe, torch.addcmul(x, _as_column(probe, x), k), **cond) - k
    size_dv = norm(change / scale, **cond) / h0
    by_hairer = 0.01 / torch.maximum(size_v, size_dv)
    by_rate = 100 / (size_v * (size_dv / size_v).square().square())
    h1 = torch.exp(torch.log(torch.fmax(by_rate, by_hairer)) / 5)
    h1 = torch.minimum(h1, 1000 * h0)  # two slopes do not tell more
    h1 = torch.where(h1.isnan() | (h1 == 0), h0, h1)  # the second slope is not finite
    return torch.minimum(h1, span.abs()) * span.sign()


def _check_norm(size, x):
    shape = getattr(size, "shape", None)
    _require(shape == x.shape[:1], f"norm must return one number per sample, ({len(x)},)", size)
    _require(not _any_on_cpu(size.isnan()), "norm must return numbers", size)


def _check_start(f, t, x, k, span, cond):
    """SolverError where k = f(t, x) is not finite; ValueError where the rows of f see each other.

    For the second, f is called with the first sample alone, and with four copies of the last. We
    allow a fifth between a slope alone and in the batch (rounding, bfloat16), and a hundredth
    between the copies. Where the slope is near 0, a twentieth of |x| / |span| counts. It cannot see
    a coupling below a fifth of the slope, as by one int8 scale for the whole batch, or a later one.
    """
    bad = ~k.isfinite()
    if bad.any():
        where = f"at the start, t = {t[0]:.6g}, in sample {_first_row(bad)}, NFE 1"
        way_out = (
            "look at v, x and path.t_span; networks of noise or score start later on OTPath and"
            " CosinePath: odeint(v, x0, (1e-3, path.t_span[1]))"
        )
        raise SolverError(f"v is not finite {where}: {way_out}", t, x)
    rule = (
        "each row of v must depend on its own row of t, x and cond alone: pass tensors with one row"
        " per sample in cond; call net.eval() where there is dropout or batch norm; make a coupled"
        " system one sample, x[None]"
    )
    last = len(x) - 1
    samples = [[0], [last] * 4]
    if last == 0:
        samples = [[0]]
    samples = [torch.tensor(i, device=x.device) for i in samples]
    alone = []
    for i in samples:
        part = {name: c.index_select(0, i) for name, c in cond.items()}
        try:
            alone.append(f(t.index_select(0, i), x.index_select(0, i), **part))
        except Exception as error:
            what = f"v fails on a part of the batch ({_describe(error)})"
            raise ValueError(f"{what}: {rule}") from error
    alone = torch.cat(alone)
    samples = torch.cat(samples)
    in_batch = k.index_select(0, samples)
    size = rms(in_batch) + 0.05 * rms(x.index_select(0, samples)) / abs(span)
    same_as_in_batch = rms(alone - in_batch) <= 0.2 * size
    same_as_each_other = rms(alone[-4:] - alone[-1:]) <= 0.01 * size[-4:]
    if not (same_as_in_batch.all() & same_as_each_other.all()):
        raise ValueError(f"v gives a sample another slope alone than in the batch: {rule}")


def sample(v, path, shape, *, cond=None, device=None, dtype=None, generator=None, **solver):
    """Solution of Eq. (1) from x0 ~ N(0, path.source_std^2 I) of shape (B, *dims) over path.t_span.

    Its .x are the samples, without gradients. cond: tensors with one row per sample, passed to v.
    generator: of x0. solver: method, steps, rtol, atol, max_nfe and norm of odeint, which also
    takes your own start and times. Call net.eval() before, if v holds dropout or batch norm.
    """
    _check_path(path, ConditionalFlow)
    with torch.inference_mode(False), torch.no_grad():  # under it no write into x0 would be seen
        x0 = path.sample_source(shape, device, dtype, generator)
        return odeint(v, x0, path.t_span, cond=cond, **solver)


def sample_sde(
    v, path, shape, *, steps, g=None, cond=None, device=None, dtype=None, generator=None
) -> Tensor:
    """Samples, (B, *dims), of dx = (v + g^2 / 2 score) dt + g dw by Euler-Maruyama steps.

    v: the velocity of an affine path, learned with x0 independent of x1. g: a number, or a function
    of t (a float) that returns one; in small steps each has the marginals of the ODE. If None,
    g^2 = -d/dt sigma_t^2. Near concentrated data steps h are stable if
    h (g^2 + 2 sigma_t |d/dt sigma_t|) < 4 sigma_t^2, and accurate if they are far smaller. The last
    step is the ODE's. The g of path.forward_sde,
    lambda t: path.forward_sde(t, torch.zeros(1))[1], gives the reverse SDE of Song et al. (2021).
    ValueError for bad arguments, SolverError when a step is not finite.
    """
    _check_path(path, AffinePath)
    _require(steps >= 1, "steps must be at least 1", steps)
    _warn_of_training_mode(v)
    x = path.sample_source(shape, device, dtype, generator)
    cond = _check_cond(cond, x)
    dtype = x.dtype  # of v and of the noise
    x = x.to(_at_least_float32(dtype))
    start, end = path.t_span
    h = (end - start) / steps
    for i in range(steps):
        time = start + i * h
        t = _as_time(time, x).expand(len(x))
        with torch.no_grad():
            v_t = _call(v, t, x.to(dtype), cond).to(x.dtype)
            x_new = x + h * v_t
            g_t = _diffusion(g, path, time)
            if g_t != 0 and i + 1 < steps:
                score = path.convert(t, x, v_t, "velocity", "score")
                noise = torch.randn(x.shape, device=x.device, dtype=dtype, generator=generator)
                x_new = x_new + h * g_t**2 / 2 * score + math.sqrt(h) * g_t * noise
        _check_step(x_new, t, x)
        x = x_new
    return x.to(dtype)


def _diffusion(g, path, t):
    """The number g_t; g_t^2 = -d/dt sigma_t^2 if g is None."""
    if g is None:
        _, sigma_t, _, dsigma_t = path.coefficients(torch.tensor(t))
        return math.sqrt(max(0.0, -2 * (sigma_t * dsigma_t).item()))
    g_t = float(g(t)) if callable(g) else float(g)
    _require(math.isfinite(g_t), f"g must be finite on path.t_span; at t = {t:.6g} cap it", g_t)
    return g_t


def classifier_free_guidance(v, scale, drop=("y",)):
    """The field v(without drop) + scale (v(with it) - v(without it)); scale 1 is no guidance.

    scale: one number; one for each sample is a matter of cond in a field of your own. drop: names
    in cond that are left out of the second call, one or several. A call of the field costs two of
    v, and raises ValueError if cond has none of these names.
    """
    if isinstance(drop, str):
        drop = (drop,)
    rule = "scale must be a number; pass one for each sample as cond of a field of your own"
    _require(not isinstance(scale, Tensor) or scale.ndim == 0, rule, scale)

    def guided(t, x, /, **cond):
        rest = {name: value for name, value in cond.items() if name not in drop}
        rule = f"guidance drops {drop}, none of which is in cond: set drop"
        _require(len(rest) < len(cond), rule, [*cond])
        without = v(t, x, **rest)
        return without + scale * (v(t, x, **cond) - without)

    return guided


# ---- 5 Likelihood, Appendix C ----


class LogProb(NamedTuple):
    """log_prob: (B,) in nats; std_err: (B,) over probes, 0 if exact, NaN for one; x0; nfe: (B,)."""

    log_prob: Tensor
    std_err: Tensor
    x0: Tensor
    nfe: Tensor


def log_prob(
    v,
    path,
    x1,
    *,
    cond=None,
    divergence="exact",
    probes=1,
    differentiable=False,
    generator=None,
    norm=rms,
    check_rows=True,
    **solver,
) -> LogProb:
    """log p_1(x1) in nats, (B,), by the reverse ODE of Eqs. (31)-(33), as a LogProb record.

    path supplies t_span and source_std; for a v of your own that starts from N(0, I), pass
    OTPath(). x1: (B, *dims). cond: tensors with one row per sample, passed to v. divergence:
    "exact" trace, d products a call, or "hutchinson", Eq. (34), by `probes` Rademacher vectors
    drawn once a solve, from generator. differentiable: whether gradients reach the weights of v and
    x1, for maximum likelihood. norm: as in odeint, of the error in x; the error of the
    log-determinant is held to the tolerances by itself. check_rows: False leaves out a look at the
    rows of v, three calls at the start that nfe does not count. solver: method, steps, rtol, atol
    and max_nfe of odeint, with its errors. ValueError also for a v that cuts x wholly from autodiff
    by no_grad, detach or numpy, and by any method for one whose rows see each other.
    """
    _check_path(path, ConditionalFlow)
    _check_batch("x1", x1)
    cond = _check_cond(cond, x1)
    exact = divergence == "exact"
    known = exact or divergence == "hutchinson"
    _require(known, "divergence must be 'exact' or 'hutchinson'", divergence)
    fits = probes == 1 or (probes > 1 and not exact)
    _require(fits, "probes, 1 or more, are for divergence='hutchinson'", probes)
    _require("_probes" not in cond, "the name _probes in cond is taken: choose another")
    with torch.inference_mode(False):  # tensors made under it cannot be differentiated
        x1 = x1.clone()
        cond = {name: c.clone() for name, c in cond.items()}
    z = None
    if not exact:
        # Departure: the paper names no law of z; signs (Rademacher) have the least variance.
        shape = (len(x1), probes, *x1.shape[1:])
        z = torch.randint(2, shape, device=x1.device, generator=generator).to(x1.dtype) * 2 - 1
    # Attention's fused kernels have no double backward, and their backward no batching rule.
    math_attention = sdpa_kernel(SDPBackend.MATH)
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable), math_attention:
        x0, f0, nfe = _reverse_solve(v, path, x1, cond, z, differentiable, norm, check_rows, solver)
        std = path.source_std
        log_p0 = -((x0 / std) ** 2 + math.log(2 * math.pi * std**2)).sum(1) / 2
        log_p1 = log_p0 - f0.mean(1)  # Eq. (33), or Eq. (35)
        if exact:
            std_err = torch.zeros_like(log_p1)
        elif probes == 1:
            std_err = torch.full_like(log_p1, math.nan)
        else:
            std_err = f0.std(1) / math.sqrt(probes)
    return LogProb(log_p1, std_err, x0.reshape(x1.shape).to(x1.dtype), nfe)


def _reverse_solve(v, path, x1, cond, z, differentiable, norm, check_rows, solver):
    """x0 (B, d), f(0) (B, P) and nfe (B,) of the reverse ODE, Eqs. (31)-(32).

    z: P probes (B, P, *dims), or None for the exact divergence, where P is 1.
    """
    B, *dims = x1.shape
    d = x1[0].numel()
    start, end = path.t_span
    t = _as_time(end, x1).expand(B)
    basis = torch.eye(d, dtype=x1.dtype, device=x1.device).view(d, 1, *dims)
    zeros = x1.new_zeros(B, 1)
    rows = dict(cond)
    if z is not None:
        basis = None
        zeros = x1.new_zeros(B, z.shape[1])
        rows["_probes"] = z  # a private name: like cond, each row goes with its sample

    def augmented(t, state, /, _probes=None, **cond):
        """d/dt [phi_t(x), f(t)] = [v_t, -div v_t], Eqs. (28)-(29), of states (b, d + P)."""
        x = state[:, :d].reshape(-1, *dims).to(x1.dtype)
        if _probes is None:
            v_t, diagonal = _jacobian_products(v, t, x, basis, differentiable, cond)
            div_t = diagonal.sum(1, keepdim=True)
        else:
            v_t, div_t = _jacobian_products(v, t, x, _probes.movedim(1, 0), differentiable, cond)
        return torch.cat([v_t.reshape(len(x), d).to(state.dtype), -div_t], 1)

    def without_divergence(t, x, /, **cond):
        with torch.enable_grad():  # as in augmented
            return _call(v, t, x.detach().requires_grad_(), cond).detach()

    def larger_norm(error, /, _probes=None, **cond):
        size_x = norm(error[:, :d].reshape(-1, *dims), **cond)
        _check_norm(size_x, error)
        return torch.maximum(size_x, rms(error[:, d:]))

    if check_rows:
        v_t = without_divergence(t, x1, **cond)
        _check_start(without_divergence, t, x1, v_t, end - start, cond)
    state = torch.cat([x1.reshape(B, d), zeros], 1)  # [x1, 0], Eq. (32)
    state = state.to(_at_least_float32(x1.dtype))
    options = {"cond": rows, "norm": larger_norm, "check_rows": False, **solver}
    solution = odeint(augmented, state, (end, start), **options)
    f0 = solution.x[:, d:]
    if not f0.any():
        _check_autodiff(v, (t + start) / 2, x1, cond)
    return solution.x[:, :d], f0, solution.nfe


def _check_autodiff(v, t, x, cond):
    """ValueError if v depends on x, but autodiff does not see it: the divergence would be 0."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v_t = _call(v, t, x, cond)
        if v_t.requires_grad:
            weights = torch.linspace(1, 2, v_t.numel(), dtype=v_t.dtype, device=v_t.device)
            weights = weights.reshape(v_t.shape)
            (slope,) = torch.autograd.grad(v_t, x, weights, materialize_grads=True)
            if slope.any():
                return
        moved = _call(v, t, 1.01 * x + 0.01, cond)
    rule = "v depends on x, but cuts it from autodiff by no_grad, detach or numpy: divergence 0"
    _require(bool((moved == v_t).all()), rule)


def _jacobian_products(v, t, x, vectors, create_graph, cond):
    """v_t (B, *dims) and z^T (dv/dx) z, Eq. (34), (B, P), for vectors z (P, B or 1, *dims)."""
    with torch.enable_grad():
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        v_t = _call(v, t, x, cond)
        products = []
        at_once = 2**17 if x.device.type == "cpu" else 2**22  # numbers; more leave a CPU's cache
        for z in vectors.split(max(1, at_once // x.numel())):
            z = z.expand(-1, *x.shape)
            product = z * _vector_jacobian_products(v_t, x, z, create_graph, len(vectors) > 1)
            product = product.reshape(len(z), len(x), -1)
            products.append(product.sum(2, dtype=_at_least_float32(x.dtype)))
        products = torch.cat(products).T
    if create_graph:
        return v_t, products
    return v_t.detach(), products.detach()


def _vector_jacobian_products(v_t, x, vectors, create_graph, keep_graph):
    """z^T dv/dx for each of the vectors z, (P, B, *dims), batched if v allows it."""
    if not v_t.requires_grad:  # v ignores x and has no weights
        return torch.zeros_like(vectors)
    options = {
        "retain_graph": keep_graph or create_graph,
        "create_graph": create_graph,
        "materialize_grads": True,  # 0 where v ignores x
    }
    if len(vectors) > 1:
        try:
            return torch.autograd.grad(v_t, x, vectors, is_grads_batched=True, **options)[0]
        except RuntimeError:
            pass  # A custom or compiled part of v takes no batch. Other errors come again below.
    rows = [torch.autograd.grad(v_t, x, z, **options)[0] for z in vectors]
    return torch.stack(rows)


class BitsPerDim(NamedTuple):
    """bpd: (B,) bits per dimension; std_err: (B,) over probes, NaN for one; nfe: (B,), K solves."""

    bpd: Tensor
    std_err: Tensor
    nfe: Tensor


def bits_per_dim(
    v, path, images, *, K=1, divergence="hutchinson", generator=None, **options
) -> BitsPerDim:
    """Bits per dimension, (B,), of uint8 images (B, *dims) under uniform dequantisation.

    Eq. (47) with K draws u of the noise and the constant of Eq. (37); v works on
    (x + u) / 128 - 1 in [-1, 1). generator: of u and of the probes. options: of log_prob, cond
    included. K > 1 with Hutchinson's trace is biased: a mean of exponentials. ValueError for other
    images.
    """
    fits = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim > 1
    _require(fits and len(images) > 0, "images must be uint8 (B, *dims)", images)
    options = {"divergence": divergence, "generator": generator, **options}
    draws = []
    for _ in range(K):
        u = torch.rand(images.shape, device=images.device, generator=generator)
        draws.append(log_prob(v, path, (images + u) / 128 - 1, **options))  # Eq. (36)
    log_p = torch.stack([draw.log_prob for draw in draws])  # (K, B)
    std_errs = torch.stack([draw.std_err for draw in draws])
    nats_per_bit = images[0].numel() * math.log(2)
    bpd = -(log_p.logsumexp(0) - math.log(K)) / nats_per_bit + 7  # Eqs. (47), (37)
    std_err = torch.linalg.vector_norm(log_p.softmax(0) * std_errs, dim=0) / nats_per_bit
    return BitsPerDim(bpd, std_err, sum(draw.nfe for draw in draws))


# ---- 6 UNet, Appendix E and Table 3: the network of Dhariwal & Nichol (2021), "ADM" ----


class GroupNorm(nn.GroupNorm):
    """GroupNorm in gcd(32, channels) groups; under autocast it stays in bfloat16."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, channels), channels)

    def forward(self, x):
        if x.dtype == _at_least_float32(x.dtype):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # which would keep a float32 copy
            weight = self.weight.to(x.dtype)
            bias = self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


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
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """v_t(x) for images, as net(t, x, y=None, concat=None); call net.eval() before sampling.

    channels (even): of the first level; channel_mult: their multiple at each level, which has half
    the size of the one before. num_res_blocks: residual blocks a level. attention_resolutions:
    sizes in pixels of the levels with attention; the middle always has it. head_channels: channels
    of each attention head. num_classes: labels y are 0 to num_classes - 1; num_classes and None
    mean none. time_scale: factor of t in its embedding. concat_channels: channels of a second
    image, concat, that the network sees beside x. UNet(**net.config) builds the network again.
    ValueError for attention at other sizes.

    Take 48 channels or more. With 32 or a smaller power of 2, GroupNorm has one channel a group,
    which erases time and label.
    """

    def __init__(
        self,
        image_size=32,
        in_channels=3,
        out_channels=3,
        channels=128,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        head_channels=64,
        dropout=0.1,
        num_classes=None,
        time_scale=1000.0,
        concat_channels=0,
    ):
        super().__init__()
        self.config = {
            "image_size": image_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": channels,
            "channel_mult": list(channel_mult),  # as it comes from JSON
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": list(attention_resolutions),
            "head_channels": head_channels,
            "dropout": dropout,
            "num_classes": num_classes,
            "time_scale": time_scale,
            "concat_channels": concat_channels,
        }
        self.channels = channels
        self.num_classes = num_classes
        self.time_scale = time_scale
        self.unit = 2 ** (len(channel_mult) - 1)  # height and width must be multiples of it
        sizes = [image_size // 2**level for level in range(len(channel_mult))]
        known = set(attention_resolutions) <= set(sizes)
        _require(known, f"attention_resolutions must be among {sizes}", attention_resolutions)
        self._build_layers(image_size, in_channels + concat_channels, out_channels, dropout)
        self.to(memory_format=torch.channels_last)  # strides only; the activations follow them

    def _build_layers(self, image_size, in_channels, out_channels, dropout):
        head_channels = self.config["head_channels"]
        c_emb = 4 * self.channels

        def block(c_in, c_out, size):
            layers = Stage(ResBlock(c_in, c_out, c_emb, dropout))
            if size in self.config["attention_resolutions"]:
                layers.append(Attention(c_out, head_channels))
            return layers

        first = nn.Linear(self.channels, c_emb)
        self.embed = nn.Sequential(first, nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = None
        if self.num_classes:
            self.label = nn.Embedding(self.num_classes + 1, c_emb)
        levels = []  # size and channels of each
        for level, multiple in enumerate(self.config["channel_mult"]):
            levels.append((image_size // 2**level, int(self.channels * multiple)))
        c = levels[0][1]
        skips = [c]  # the channels of what goes over to the way up
        self.down = nn.ModuleList([Stage(nn.Conv2d(in_channels, c, 3, padding=1))])
        for size, width in levels:
            if size < image_size:
                self.down.append(Stage(nn.Conv2d(c, c, 3, stride=2, padding=1)))
                skips.append(c)
            for _ in range(self.config["num_res_blocks"]):
                self.down.append(block(c, width, size))
                c = width
                skips.append(c)
        self.middle = Stage(ResBlock(c, c, c_emb, dropout), Attention(c, head_channels))
        self.middle.append(ResBlock(c, c, c_emb, dropout))
        self.up = nn.ModuleList()
        for size, width in reversed(levels):
            for _ in range(self.config["num_res_blocks"] + 1):
                self.up.append(block(c + skips.pop(), width, size))
                c = width
            if size < image_size:
                self.up[-1].append(Upsample(c, c, 3, padding=1))
        last = zeroed(nn.Conv2d(c, out_channels, 3, padding=1))
        self.head = nn.Sequential(GroupNorm(c), nn.SiLU(), last)

    def embedding(self, t, x, y):
        """What the residual blocks see of time and label: (B, 4 channels), or (1, 4 channels)."""
        t = torch.atleast_1d(_as_time(t, x))  # float32: bfloat16 cannot resolve 1000 t
        half = self.channels // 2
        frequencies = 1e4 ** (-torch.arange(half, dtype=t.dtype, device=x.device) / half)
        angle = self.time_scale * t[:, None] * frequencies
        emb = self.embed(torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))
        if self.label is None:
            return emb
        if y is None:
            return emb + self.label.weight[self.num_classes]
        return emb + self.label(y)

    def forward(self, t, x, y=None, concat=None):
        """v_t(x), (B, out_channels, H, W), for images x (B, in_channels, H, W) in about [-1, 1].

        t: a number, () or (B,). y: int64 (B,), 0 to num_classes. concat: (B, concat_channels, H,
        W). Dropout is at work until net.eval().
        """
        if y is not None:
            self._check_labels(y, x)
        height, width = x.shape[2:]
        fits = height % self.unit == 0 and width % self.unit == 0
        _require(fits, f"height and width must be multiples of {self.unit}", (height, width))
        emb = F.silu(self.embedding(t, x, y))
        h = x
        if concat is not None:
            h = torch.cat([x, concat.to(x.dtype)], 1)
        skips = []
        for stage in self.down:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], 1), emb)
        return self.head(h)

    def _check_labels(self, y, x):
        _require(self.label is not None, "y needs a network with num_classes", y)
        fits = y.shape == x.shape[:1] and y.dtype in (torch.int64, torch.int32)
        if fits and not torch.compiler.is_compiling():  # a look at values would break the graph
            fits = not _any_on_cpu((y < 0) | (y > self.num_classes))
        rule = f"y must be integers ({len(x)},), 0 to {self.num_classes - 1}"
        _require(fits, f"{rule}, or {self.num_classes} for no label", y)

    @classmethod
    def from_adm(cls, checkpoint, time_scale=1.0, **config):
        """UNet with the weights of torchcfm's UNetModelWrapper.

        checkpoint: its state dict, or a dict with that under ema_model or net_model. config: the
        settings as of UNet, which the file does not tell. Nor does it tell the rest: time_scale is
        1, since that network sees t itself; class_cond and use_new_attention_order must have been
        off. RuntimeError for other names and shapes.
        """
        net = cls(time_scale=time_scale, **config)
        theirs = checkpoint.get("ema_model", checkpoint.get("net_model", checkpoint))
        weights = {}
        for name, weight in theirs.items():
            for their_part, our_part in ADM_NAMES.items():
                name = name.replace(their_part, our_part)
            if weight.ndim == 3:  # 1x1 Conv1d, a linear layer here
                weight = weight.flatten(1)
            weights[name] = weight
        net.load_state_dict(weights)
        return net


# Parts of the names of torchcfm's weights, in the order in which they are replaced.
ADM_NAMES = {
    "module.": "",
    "time_embed.": "embed.",
    "input_blocks.": "down.",
    "middle_block.": "middle.",
    "output_blocks.": "up.",
    "in_layers.0.": "norm_in.",
    "in_layers.2.": "conv_in.",
    "emb_layers.1.": "emb.",
    "out_layers.0.": "norm_out.",
    "out_layers.3.": "conv_out.",
    "skip_connection.": "skip.",
    "proj_out.": "proj.",
    ".op.": ".",
    ".conv.": ".",
    "out.0.": "head.0.",
    "out.2.": "head.2.",
}


# ---- 7 Checks ----


def _require(condition, rule, *got):
    """ValueError with the rule and what came instead, unless the condition holds."""
    if not condition:
        raise ValueError(rule + "".join(f"; got {_describe(value)}" for value in got))


def _describe(value):
    """The value in at most 80 characters."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _any_on_cpu(mask):
    """mask.any(), but False on a GPU, whose host would wait for the answer."""
    return mask.device.type == "cpu" and bool(mask.any())


def _first_row(mask):
    """The index of the first row of mask (B, ...) with a True."""
    return _flat(mask).any(1).int().argmax().item()


def _check_path(path, kind):
    rule = f"path must be a {kind.__name__} such as OTPath(), no name and no class"
    _require(isinstance(path, kind), rule, path)


def _check_batch(name, x):
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0 and x.numel() > 0
    _require(fits, f"{name} must be floating point (B, *dims) with B >= 1", x)
    _require(not _any_on_cpu(~x.isfinite()), f"{name} must be finite", x)


def _check_cond(cond, x):
    """cond as a dictionary."""
    if cond is None:
        return {}
    _require(isinstance(cond, dict), "cond must be a dictionary of tensors", cond)
    for name, value in cond.items():
        fits = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(x)
        rule = f"cond[{name!r}] must be a tensor of {len(x)} rows, one per sample"
        _require(fits, f"{rule}; leave it out, or bind it in a function", value)
        rule = f"cond[{name!r}] holds NaN: leave these samples out, or fill them and pass a mask"
        _require(not _any_on_cpu(value.isnan()), rule, value)
    return cond


def _call(v, t, x, cond):
    """v(t, x, **cond), as all but guidance call it.

    ValueError for another shape than that of x, and if v wrote into the tensors that it was given,
    which belong to the solver and the user. Unseen are writes through NumPy or x.data, into tensors
    made under inference_mode, and a v that returns the same buffer again and again.
    """
    counted = [a for a in (t, x, *cond.values()) if not a.is_inference()]
    before = [a._version for a in counted]  # how often each was written into
    v_t = v(t, x, **cond)
    shape = v_t.shape if isinstance(v_t, Tensor) else type(v_t).__name__
    if shape != x.shape:
        raise ValueError(f"v must return the shape of x, {tuple(x.shape)}; got {shape}")
    if [a._version for a in counted] != before:
        rule = "v must not write into t, x or cond, as x -= 1, x.clamp_() and inplace=True do"
        raise ValueError(f"{rule}: let it work on x.clone()")
    return v_t


def _check_times(t, x, t_span):
    """t as (B,), inside the span: up to 1e-4 outside, as by rounding, it moves to the end.

    Further outside, ValueError on the CPU; on a GPU, which is not asked to wait, NaN.
    """
    t = _as_time(t, x)
    fits = t.shape in ((), (len(x),))
    _require(fits, f"t must have shape () or ({len(x)},), as x has rows", t)
    start, end = t_span
    outside = ~((t >= start - 1e-4) & (t <= end + 1e-4))  # True also for NaN
    if _any_on_cpu(outside):
        rule = f"t must lie in the path's t_span {tuple(t_span)}"
        raise ValueError(f"{rule}; got {t.min():.6g} to {t.max():.6g}")
    return t.clamp(start, end).masked_fill(outside, math.nan).expand(len(x))


def _check_pairs(path, x0, x1):
    """ValueError unless x0 can be paired with x1; on the CPU psi_0(x0) = x0 is looked at."""
    _check_batch("x0", x0)
    _require(x0.shape == x1.shape, "x0 must have the shape of x1", x0, x1)
    rule = (
        f"x0 cannot be paired on {path!r}, whose psi_0(x0) is not x0: leave x0 out, or use OTPath"
    )
    _require(path.allows_pairs, rule)
    if x0.device.type == "cpu":
        start, _ = path.psi_dpsi(torch.full((len(x1),), path.t_span[0]), x0, x1)
        _require(((start - x0).abs() <= 0.01 * (1 + x0.abs())).all(), rule)


def _check_regular(what, singular, t, path):
    """ValueError where singular (B, ..) is True, with what it is and a way out."""
    if _any_on_cpu(singular):
        where = time_column(t, singular.float()).expand_as(singular)[singular][0].item()
        start, end = path.t_span
        way_out = f"stay inside t_span {path.t_span}"
        if start <= where <= end:
            way_out = "start later, by odeint(v, x0, (1e-3, path.t_span[1])) or a later path.t_span"
        raise ValueError(f"{what} at t = {where:.6g} of {path!r}: {way_out}")


def _check_ends(alpha_0, alpha_1, sigma_0, sigma_1):
    noise_first = abs(alpha_0) <= 0.1 * sigma_0
    data_last = abs(alpha_1 - 1) <= 0.011 and -1e-6 < sigma_1 < sigma_0 < math.inf
    rule = (
        "a path must run from noise to data: alpha / sigma start at 0.1 at most (raise beta_max of"
        " VPPath, sigma_max of VEPath), alpha end at 1, and sigma fall, but not below 0; or use"
        " AffinePath(alpha, sigma, check_ends=False)"
    )
    ends = f"alpha {alpha_0:.4g} to {alpha_1:.4g}, sigma {sigma_0:.4g} to {sigma_1:.4g}"
    if not (noise_first and data_last):
        raise ValueError(f"{rule}; got {ends}")


def _solver_times(t, dtype):
    """t as two or more Python numbers that rise or fall strictly in that dtype."""
    parts = t if isinstance(t, (list, tuple)) else [t]
    learned = any(isinstance(part, Tensor) and part.requires_grad for part in parts)
    rule = "t takes no gradient: solve over fixed times a field with the learned scale in it"
    _require(not learned, rule)
    times = _as_numbers("t must be two or more times", t)
    steps = torch.tensor(times, dtype=dtype).diff()
    one_way = bool((steps > 0).all()) or bool((steps < 0).all())
    fits = len(times) > 1 and bool(steps.isfinite().all()) and one_way
    _require(fits, f"t must be two or more times, all rising or all falling in {dtype}", t)
    return times


def _check_tolerances(rtol, atol, max_nfe):
    """rtol and atol as Python numbers."""
    rule = "max_nfe must be at least 8: two calls to start and six a step"
    _require(max_nfe >= 8, rule, max_nfe)
    rtol, atol = _as_numbers("rtol and atol must be numbers", (rtol, atol))
    fits = 0 <= rtol < math.inf and 0 <= atol < math.inf and rtol + atol > 0
    _require(fits, "rtol and atol must be >= 0, finite, and not both 0", rtol, atol)
    return rtol, atol


def _as_numbers(rule, values):
    """The values, a sequence or a tensor, as a list of Python numbers."""
    try:
        if isinstance(values, Tensor):
            values = values.tolist()  # one wait for a GPU
        return [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{rule}; got {_describe(values)}") from None


def _warn_of_training_mode(v):
    """A warning if v is a module in training mode with dropout or batch norm in it."""
    if not isinstance(v, nn.Module) or not v.training:
        return
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    for module in v.modules():
        if isinstance(module, kinds) and getattr(module, "p", 1) > 0:
            text = "v is in training mode, with dropout or batch norm: call v.eval() first"
            warnings.warn(text, stacklevel=3)
            return
