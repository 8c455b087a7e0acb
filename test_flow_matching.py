"""Every equation against something that is not our code: a closed form, autodiff, quadrature, a tableau's order conditions.

Run with: python -m pytest -q test_flow_matching.py
"""
import hashlib
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
from contextlib import nullcontext, redirect_stdout
from itertools import combinations_with_replacement, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import flow_matching as fm
import train_cifar
from flow_matching import (AffinePath, Attention, ConditionalFlow, CosinePath, GaussianPath, Marginal, OTPath, ResBlock, SolverError,
                           UNet, Upsample, VEPath, VPPath, bits_per_dim, cfm_loss, log_prob, odeint, sample)  # fmt: skip

HERE = Path(__file__).parent
SCIPY = importlib.util.find_spec("scipy") is not None  # for ot_coupling alone
needs_scipy = pytest.mark.skipif(not SCIPY, reason="SciPy is not installed")
PATHS = [OTPath(), OTPath(0.1), OTPath(0.0), VPPath(), VPPath(0.5, 5.0), VEPath(), CosinePath(),
         AffinePath(lambda t: t**2, lambda t: (1 - t**3).sqrt() + 0.01)]  # fmt: skip
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.__class__.__name__)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch(B=5, d=3, dtype=torch.float64):
    """t away from the ends, x0, x1: no term of any formula is zero."""
    return 0.05 + 0.9 * torch.rand(B, dtype=dtype), torch.randn(B, d, dtype=dtype), torch.randn(B, d, dtype=dtype)


def by_autodiff(f, t):
    """d/dt f(t), row by row, by reverse mode (the module uses forward mode)."""
    jac = torch.autograd.functional.jacobian(f, t)  # (B, *dims, B)
    return jac.diagonal(dim1=0, dim2=-1).movedim(-1, 0)


# ---- 1 Paths ---------------------------------------------------------------------------------------------------------


@every_path
def test_eq13_dpsi_is_the_velocity_of_psi_and_u_there(path):
    t, x0, x1 = batch()
    expected = by_autodiff(lambda t: path.psi(t, x0, x1), t)
    assert_close(path.dpsi(t, x0, x1), expected)
    assert_close(path.u(t, path.psi(t, x0, x1), x1), expected)  # Eq. (15)


def test_eq17_ve_field_in_the_papers_form():
    t, x, x1 = batch()
    sigma = lambda s: 0.01 * (10.0 / 0.01) ** s  # increasing in s, as Eq. (16) has it
    slope = by_autodiff(sigma, 1 - t)[:, None]
    assert_close(VEPath().u(t, x, x1), -slope / sigma(1 - t)[:, None] * (x - x1))


def test_eq19_vp_field_in_both_forms_of_the_paper():
    t, x, x1 = batch()
    for path, low, high in ((VPPath(), 0.1, 20), (VPPath(0.0, 1.0), 0, 1), (VPPath(2.0, 2.0), 2, 2)):
        T = lambda s: low * s + 0.5 * s * s * (high - low)
        s, dT = 1 - t, by_autodiff(T, 1 - t)[:, None]
        e = torch.exp(-T(s))[:, None]
        assert_close(path.u(t, x, x1), -dT / 2 * (e * x - e.sqrt() * x1) / (1 - e))
        alpha, dalpha = e.sqrt(), by_autodiff(lambda s: torch.exp(-T(s) / 2), s)[:, None]
        assert_close(path.u(t, x, x1), dalpha / (1 - alpha**2) * (alpha * x - x1))


def test_eq21_eq22_eq23_ot():
    t, x0, x1 = batch()
    c = 1 - 0.1
    assert_close(OTPath(0.1).u(t, x0, x1), (x1 - c * x0) / (1 - c * t[:, None]))
    assert_close(OTPath(0.1).psi(t, x0, x1), (1 - c * t[:, None]) * x0 + t[:, None] * x1)
    assert_close(OTPath(0.1).dpsi(t, x0, x1), x1 - c * x0)


def test_eq23_target_stays_accurate_in_float32_up_to_t_1():
    x0, x1 = torch.randn(2, 1000, 2)
    for path in (OTPath(0.0), CosinePath(), VPPath()):
        t = torch.full((1000,), path.t_span[1])
        exact = path.dpsi(t.double(), x0.double(), x1.double())
        assert (path.dpsi(t, x0, x1) - exact).abs().max() < 2e-5 * exact.abs().max()
        for coefficient, double in zip(path.coefficients(t[:1]), path.coefficients(t[:1].double())):
            assert_close(coefficient.double(), double, rtol=1e-6, atol=0)


@every_path
def test_eq10_boundary_moments(path):
    x1 = torch.tensor([[2.0, -3.0]], dtype=torch.float64)
    t0, t1 = path.t_span
    mu_0, sigma_0, _, _ = path.moments(t0, x1)
    mu_1, sigma_1, _, _ = path.moments(t1, x1)
    assert_close(mu_1, x1, atol=1e-3, rtol=0)
    assert 0 < sigma_1.item() <= 0.101  # never zero inside t_span
    variance_preserving = isinstance(path, VPPath)
    if path.psi0_is_identity:
        assert_close(path.psi(t0, x1 * 0 + 7, x1), x1 * 0 + 7, atol=1e-6, rtol=0)
    assert_close(path.source_std, sigma_0.item(), atol=0.05 if variance_preserving else 1e-6, rtol=0)
    assert_close(mu_0, 0 * x1 if not isinstance(path, VEPath) else x1, atol=0.8 if variance_preserving else 1e-6, rtol=0)


def test_published_numbers_of_the_vp_path():
    alpha_t, sigma_t, _, _ = VPPath().coefficients(torch.tensor([0.0, 1 - 1e-5], dtype=torch.float64))
    assert_close(alpha_t, torch.tensor([0.006572, 0.9999995], dtype=torch.float64), atol=5e-7, rtol=0)
    assert_close(sigma_t, torch.tensor([0.999978, 1.0005e-3], dtype=torch.float64), atol=5e-7, rtol=0)
    assert VPPath().t_span == (0.0, 1 - 1e-5)


def test_t_span_ends_before_sigma_1_is_zero():
    assert OTPath().t_span == VEPath().t_span == (0.0, 1.0)
    values = {OTPath(), OTPath(1e-4), VPPath(), VPPath(0.1, 20.0), VEPath(), VEPath(0.01, 10.0), CosinePath()}
    assert len(values) == 4
    assert OTPath(0.0).t_span == CosinePath().t_span == AffinePath(lambda t: t, lambda t: 1 - t).t_span == (0.0, 1 - 1e-5)
    assert AffinePath(lambda t: t, lambda t: 1 - t, (0.0, 0.9)).t_span == (0.0, 0.9)
    assert (VEPath().source_std, VPPath().source_std, OTPath().source_std) == (10.0, 1.0, 1.0)
    assert [p.psi0_is_identity for p in (OTPath(), CosinePath(), VPPath(), VEPath())] == [True, True, False, False]
    off = AffinePath(lambda t: 1.5 * t - 0.5, lambda t: 1 - t / 2)
    narrow = AffinePath(lambda t: t, lambda t: 0.5 - t / 4)
    assert not off.psi0_is_identity and not narrow.psi0_is_identity and narrow.source_std == 0.5


@every_path
def test_eq10_log_prob_and_score(path):
    t, x, x1 = batch()
    mu_t, sigma_t, _, _ = path.moments(t, x1)
    normal = Normal(mu_t, sigma_t.expand_as(mu_t))
    assert_close(path.log_prob(t, x, x1), normal.log_prob(x).sum(1))
    x.requires_grad_()
    assert_close(path.score(t, x, x1), torch.autograd.grad(normal.log_prob(x).sum(), x)[0])


def test_affine_path_of_two_functions_equals_the_named_path():
    t, x, x1 = batch()
    for named, alpha, sigma in [(OTPath(0.1), lambda t: t, lambda t: 1 - 0.9 * t),
                                (CosinePath(), lambda t: torch.sin(math.pi / 2 * t), lambda t: torch.cos(math.pi / 2 * t)),
                                (VEPath(), torch.ones_like, lambda t: 10 * 0.001**t)]:  # fmt: skip
        assert_close(AffinePath(alpha, sigma).u(t, x, x1), named.u(t, x, x1))


def test_gaussian_path_with_elementwise_sigma():
    def moments(t, x1):  # each dimension at its own speed
        t, speed = fm.expand(t, x1), torch.arange(1, 4, dtype=x1.dtype)
        return t * x1, torch.exp(-speed * t), x1, -speed * torch.exp(-speed * t)

    t, x0, x1 = batch()
    path = GaussianPath(moments)
    assert_close(path.u(t, path.psi(t, x0, x1), x1), by_autodiff(lambda t: path.psi(t, x0, x1), t))
    mu_t, sigma_t, _, _ = path.moments(t, x1)
    assert_close(path.log_prob(t, x0, x1), MultivariateNormal(mu_t, torch.diag_embed(sigma_t**2)).log_prob(x0))


def test_conditional_flow_need_not_be_gaussian():
    def psi(t, x0, x1):  # Kumaraswamy-like: not affine in x0
        t = fm.expand(t, x0)
        return torch.sinh(x0 * (1 - t)) + t**2 * x1 + t * (1 - t) * x0 * x1

    t, x0, x1 = batch()
    flow = ConditionalFlow(psi)
    assert_close(flow.dpsi(t, x0, x1), by_autodiff(lambda t: psi(t, x0, x1), t))
    assert_close(cfm_loss(lambda t, x: 0 * x, flow, x1, t=t, x0=x0), flow.dpsi(t, x0, x1).square().mean())


def test_paths_in_a_subclass_and_their_defaults():
    class Flow(ConditionalFlow):
        def psi(self, t, x0, x1):
            return x0 + t[:, None] ** 3 * x1

    class Path(GaussianPath):
        def moments(self, t, x1):
            t = fm.expand(t, x1)
            return t**2 * x1, 1 - t / 2, 2 * t * x1, torch.full_like(t, -0.5)

    (_, x0, x1), t = batch(), torch.full((5,), 0.3, dtype=torch.float64)
    assert ConditionalFlow(Flow().psi, (0.0, 0.5)).t_span == (0.0, 0.5)
    for flow in (Flow(), Path()):
        assert flow.sample_source((2, 3)).shape == (2, 3)
        assert flow.t_span == ConditionalFlow.t_span == (0.0, 1.0)
        assert flow.source_std == ConditionalFlow.source_std == 1
        slope = by_autodiff(lambda t: flow.psi(t, x0, x1), t)
        assert_close(flow.dpsi(0.3, x0, x1), slope, rtol=1e-12, atol=1e-12)  # a number will do for t
        assert_close(cfm_loss(lambda t, x: x, flow, x1, x0=x0, t=0.0), (x0 - flow.dpsi(0.0, x0, x1)).square().mean())


def test_images_are_flat_vectors_to_every_formula():
    path, (t, x, x1, data), flat = OTPath(0.1), (torch.rand(4), *torch.randn(3, 4, 2, 3, 3)), lambda a: a.flatten(1)
    images, vectors = Marginal(path, data), Marginal(path, flat(data))
    assert_close(path.log_prob(t, x, x1), path.log_prob(t, flat(x), flat(x1)))
    for name in ("posterior", "log_prob", "x1_mean", "score", "__call__"):
        assert_close(flat(getattr(images, name)(t, x)[:, None]), flat(getattr(vectors, name)(t, flat(x))[:, None]))
    assert images.x1_mean(t, x).shape == images.score(t, x).shape == images(t, x).shape == x.shape
    loss = lambda x1, noise: cfm_loss(lambda t, x: x, path, x1, noise=noise, t=t, reduction="none")
    assert_close(loss(x1, x), loss(flat(x1), flat(x)))


# ---- 2 Loss ----------------------------------------------------------------------------------------------------------


def test_eq14_loss_floor_of_gaussian_data_is_pi_over_2():
    def u(t, x):  # the exact field for N(0, 1) data on the OT path with sigma_min = 0
        t = t[:, None]
        return (2 * t - 1) / (2 * t * t - 2 * t + 1) * x

    x1 = torch.randn(400_000, 2, dtype=torch.float64)
    losses = cfm_loss(u, OTPath(0.0), x1, reduction="none")
    assert losses.shape == (len(x1),)
    assert abs(losses.mean() - math.pi / 2) < 4 * losses.std() / math.sqrt(len(x1))
    assert cfm_loss(lambda t, x: u(t, x) + 0.1, OTPath(0.0), x1) > math.pi / 2 + 0.005


def test_theorem_2_gradients_of_fm_and_cfm_agree():
    data, path, t = torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64), OTPath(0.2), 0.4
    theta = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    v = lambda t, x: torch.sin(theta[0] * x) + theta[1] * x * t[:, None]
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))  # E over x0 ~ N(0, 1)
    x0, x1 = nodes[:, None].repeat(3, 1), data.repeat_interleave(80, 0)
    cfm = (cfm_loss(v, path, x1, x0=x0, t=torch.tensor(t, dtype=torch.float64), reduction="none") * weights.repeat(3) / weights.sum() / 3).sum()
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)[:, None]
    marginal, ts = Marginal(path, data), torch.full((20001,), t, dtype=torch.float64)
    fm_loss = ((v(ts, x) - marginal(ts, x)).square()[:, 0] * marginal.log_prob(ts, x).exp()).sum() * 16 / 20000  # Eq. (5)
    assert_close(torch.autograd.grad(cfm, theta), torch.autograd.grad(fm_loss, theta), atol=1e-9, rtol=1e-8)
    assert cfm - fm_loss > 0.1  # the constant of Theorem 2


def test_eq14_pairs_times_and_reduction_are_those_given():
    seen = {}

    def v(t, x, y):
        seen.update(t=t, x=x, y=y)
        return x * y[:, None]

    t, x0, x1 = batch()
    y = torch.arange(5.0, dtype=torch.float64)
    losses = cfm_loss(v, OTPath(0.0), x1, x0=x0, t=t, reduction="none", y=y)
    x_t = (1 - t[:, None]) * x0 + t[:, None] * x1
    assert_close((seen["t"], seen["x"], seen["y"]), (t, x_t, y))
    assert_close(losses, (x_t * y[:, None] - (x1 - x0)).square().mean(1))


@every_path
def test_eq14_noise_of_the_users_replaces_the_draw_on_every_path(path):
    t, noise, x1 = batch()
    t = t * path.t_span[1]
    x_t, dx_t = path.psi_dpsi(t, noise, x1)
    assert_close(cfm_loss(lambda t, x: x, path, x1, noise=noise, t=t), (x_t - dx_t).square().mean())


def test_loss_of_an_ensemble_under_vmap_is_that_of_its_members():
    nets, (t, x0, x1) = [torch.nn.Linear(4, 3).double() for _ in range(3)], batch()
    loss = lambda net: cfm_loss(lambda t, x: net(torch.cat([x, t[:, None]], 1)), VPPath(), x1, noise=x0, t=t)

    def of_weights(weights):
        module = lambda z: torch.func.functional_call(nets[0], weights, (z,))
        return loss(module)

    weights, _ = torch.func.stack_module_state(nets)
    gradients, losses = torch.func.vmap(torch.func.grad_and_value(of_weights))(weights)
    assert_close(losses, torch.stack([loss(net) for net in nets]))
    assert_close(gradients["weight"], torch.stack([torch.autograd.grad(loss(net), net.weight)[0] for net in nets]))


def test_loss_times_are_stratified_and_each_row_is_uniform():
    path, rows = AffinePath(lambda t: t, lambda t: 1 - t, (0.2, 0.8)), []
    for _ in range(2000):
        cfm_loss(lambda t, x: rows.append(t) or x, path, torch.zeros(8, 1, dtype=torch.float64))
    assert rows[0].dtype == torch.float64
    t = (torch.stack(rows) - 0.2) / 0.6  # (2000, 8)
    assert ((t.sort(1).values * 8).floor() == torch.arange(8)).all()  # one in each eighth
    assert t.min() > -1e-7 and t.max() < 1 + 1e-7
    for row in t.T:  # Kolmogorov-Smirnov against U[0, 1], at the 0.1 % level
        assert (row.sort().values - (torch.arange(2000) + 0.5) / 2000).abs().max() < 1.95 / math.sqrt(2000)


KINDS = ["velocity", "score", "noise", "data"]


@every_path
def test_conversions_round_trip_and_agree_with_x0_x1_and_dpsi(path):
    t, x0, x1 = batch()
    x_t = path.psi(t, x0, x1)
    truth = {"velocity": path.dpsi(t, x0, x1), "score": path.score(t, x_t, x1), "noise": x0, "data": x1}
    for source in KINDS:
        for target in KINDS:
            assert_close(path.convert(t, x_t, truth[source], source, target), truth[target], atol=1e-6, rtol=1e-6)


def test_eq46_conversion_of_the_exact_marginal_and_broadcast_of_t():
    path, data = VPPath(), torch.randn(6, 3, dtype=torch.float64)
    marginal, (t, _, x) = Marginal(path, data), batch(3, 3)  # B = last dimension: t must not broadcast along it
    score = marginal.score(t, x)
    T = by_autodiff(lambda s: 0.1 * s + 0.5 * s * s * 19.9, 1 - t)[:, None]
    assert_close(marginal(t, x), T / 2 * (x + score))  # Eq. (46) with the true sign of the score
    for source, value in (("score", score), ("data", marginal.x1_mean(t, x))):
        assert_close(path.convert(t, x, value, source, "velocity"), marginal(t, x))
        assert_close(fm.as_velocity(lambda t, x, y: y, path, source)(t, x, y=value), marginal(t, x))


def test_conversions_raise_at_their_singular_ends():
    x, path = torch.randn(4, 2), OTPath(0.0)
    for t, pairs in ((0.0, [("noise", "data"), ("score", "velocity")]), (1.0, [("data", "noise"), ("noise", "score"), ("data", "velocity")])):
        for source, target in pairs:
            with pytest.raises(ValueError, match=f"{source} does not tell {target} at t = {t:g}"):
                path.convert(torch.tensor([0.5, t, 0.5, 0.5]), x, x, source, target)
    with pytest.raises(ValueError, match="velocity does not tell data at t = 0 "):  # a path that starts at rest
        AffinePath(lambda t: t**2, lambda t: 1 - t**2).convert(0.0, x, x, "velocity", "data")
    assert all(path.convert(t, x, x, kind, kind) is x for kind in KINDS for t in (0.0, 1.0))
    assert_close(path.convert(0.0, x, x, "noise", "score"), -x)
    assert path.convert(1.0, x, x, "velocity", "data").isfinite().all()
    assert path.convert(0.0, x, x, "velocity", "score").isfinite().all()


@pytest.mark.parametrize("predict, weight", [("noise", None), ("score", "sigma^2"), ("score", "beta"), ("data", None)])
def test_eq43_eq45_minimisers_are_the_exact_marginal(predict, weight):
    path, data = VPPath(), torch.randn(5, 2, dtype=torch.float64)
    marginal, x1 = Marginal(path, data), data.repeat(4000, 1)
    best = lambda t, x: path.convert(t, x, marginal(t, x), "velocity", predict)
    torch.manual_seed(1)
    t, x0 = 0.02 + 0.95 * torch.rand(len(x1), dtype=torch.float64), torch.randn_like(x1)
    # no x0= on VP: the same draw by seed
    losses = []
    for scale in (0.97, 1.0, 1.03):
        torch.manual_seed(2)
        losses.append(cfm_loss(lambda t, x: scale * best(t, x), path, x1, t=t, predict=predict, weight=weight))
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_table_1_weights_against_closed_forms():
    path, (t, _, x1) = VPPath(), batch(2000, 2)
    zero = lambda t, x: 0 * x
    T = 0.1 * (1 - t) + 9.95 * (1 - t) ** 2
    sigma2, beta = 1 - torch.exp(-T), 20 - 19.9 * t

    def loss(**options):
        torch.manual_seed(5)
        return cfm_loss(zero, path, x1, t=t, reduction="none", **options)

    noise = loss(predict="noise")  # |x0|^2 / d, Eq. (45)
    torch.manual_seed(5)
    assert_close(noise, torch.randn_like(x1).square().mean(1))
    assert_close(loss(predict="score"), noise / sigma2, rtol=1e-5, atol=0)
    assert_close(loss(predict="score", weight="sigma^2"), noise)
    assert_close(loss(predict="score", weight="beta"), noise / sigma2 * beta)
    assert_close(loss(predict="noise", weight=lambda t: t**2), noise * t**2)
    assert_close(loss(predict="data"), x1.square().mean(1))


@pytest.mark.parametrize("n", [1, 4, 7])
def test_ot_coupling_is_the_best_of_all_permutations(n):
    pytest.importorskip("scipy")
    x0, x1 = torch.randn(2, n, 2, 3)
    cost = lambda p: (x0[list(p)] - x1).square().sum().item()
    p = fm.ot_coupling(x0, x1)
    assert sorted(p.tolist()) == list(range(n))
    assert abs(cost(p.tolist()) - min(map(cost, permutations(range(n))))) < 1e-4


def test_ot_coupling_squares_its_distances():
    pytest.importorskip("scipy")
    x0, x1 = torch.tensor([[0.0, 0.0], [1.0, 0.5]], requires_grad=True), torch.tensor([[1.0, 0.5], [2.0, 0.0]])
    assert fm.ot_coupling(x0, x1).tolist() == [0, 1]  # 1.25 + 1.25 < 0 + 4, but sqrt(1.25) + sqrt(1.25) > 0 + 2


def test_ot_coupling_of_half_precision_is_that_of_float32():
    pytest.importorskip("scipy")
    x0, x1 = torch.randn(2, 6, 3, dtype=torch.bfloat16)
    assert torch.equal(fm.ot_coupling(x0, x1), fm.ot_coupling(x0.float(), x1.float()))


def test_ot_coupling_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        fm.ot_coupling(torch.zeros(2, 1), torch.zeros(2, 1))


# ---- 3 Exact marginals -----------------------------------------------------------------------------------------------

affine = pytest.mark.parametrize("path", [OTPath(0.05), VPPath(), VEPath(0.1, 4.0), CosinePath()], ids=lambda p: type(p).__name__)


def mixture(path, data, t):
    """p_t of Eq. (6) by torch.distributions, for one time t."""
    mu_t, sigma_t, _, _ = path.moments(t, data)
    components = Independent(Normal(mu_t, sigma_t.expand_as(mu_t)), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(data), dtype=data.dtype)), components)


@affine
@pytest.mark.parametrize("d", [2, 40])  # direct differences and the matrix product
def test_eq6_eq8_marginal_density_score_posterior_and_field(path, d):
    data, x, t = torch.randn(7, d, dtype=torch.float64), torch.randn(6, d, dtype=torch.float64).requires_grad_(), 0.6
    marginal, p_t = Marginal(path, data), mixture(path, data, t)
    score = torch.autograd.grad(p_t.log_prob(x).sum(), x)[0]
    assert_close(marginal.log_prob(t, x), p_t.log_prob(x))
    assert_close(marginal.score(t, x), score)
    posterior = torch.stack([path.log_prob(t, x, x_i.expand_as(x)) for x_i in data], 1).softmax(1)
    assert_close(marginal.posterior(t, x), posterior)
    u = torch.stack([path.u(t, x, x_i.expand_as(x)) for x_i in data], 1)  # (6, 7, d)
    assert_close(marginal(t, x), (posterior[:, :, None] * u).sum(1))  # Eq. (8)
    a, s, da, ds = (c.double() for c in path.coefficients(torch.tensor(t, dtype=torch.float64)))
    assert_close(marginal(t, x), da / a * x + (da * s**2 / a - s * ds) * score)


@affine
def test_eq26_marginal_obeys_the_continuity_equation(path):
    marginal, (t, _, x) = Marginal(path, torch.randn(7, 2, dtype=torch.float64)), batch(d=2)
    dlogp_dt = by_autodiff(lambda t: marginal.log_prob(t, x), t)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda x: marginal(t[i : i + 1], x), x[i : i + 1])[0, :, 0] for i in range(5)])
    div_u = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    assert_close(dlogp_dt, -div_u - (marginal(t, x) * marginal.score(t, x)).sum(1))
    assert dlogp_dt.abs().min() > 1e-3


def test_marginal_stays_exact_where_sigma_vanishes():
    data = torch.randn(60, 50) + 30  # far from the origin, so that |x|^2 - 2 x x_i + |x_i|^2 cancels
    path = OTPath(1e-3)
    x, t = path.psi(0.999, torch.randn(20, 50), data[:20]), torch.full((20,), 0.999)
    ours, exact = Marginal(path, data), Marginal(path, data.double())
    assert_close(ours.posterior(t, x).double(), exact.posterior(t, x.double()), atol=1e-4, rtol=0)
    assert_close(ours.log_prob(t, x).double(), exact.log_prob(t, x.double()), atol=2e-2, rtol=1e-4)
    far = 1e4 * torch.randn(20, 50)
    assert_close(Marginal(OTPath(), data).log_prob(0.0, far), Normal(0, 1).log_prob(far).sum(1))
    assert Marginal(OTPath(), data)(0.0, far).isfinite().all()
    both, ts = torch.cat([x, far]).requires_grad_(), torch.cat([t, 0 * t])  # some of a batch cancels, some does not
    assert_close(ours.log_prob(ts, both), torch.cat([ours.log_prob(t, x), ours.log_prob(0.0, far)]))
    assert torch.autograd.grad(ours.log_prob(ts, both).sum(), both)[0].isfinite().all()
    assert Marginal(OTPath(1e-6), data[:, :2])(1.0, x[:, :2]).isfinite().all()


def test_marginal_chunks_do_not_change_the_result():
    path, data, x, t = OTPath(), torch.randn(2**15, 40), torch.randn(1100, 40), torch.rand(1100)  # three chunks of queries
    whole = Marginal(path, data)(t, x)
    assert_close(whole[::100], torch.cat([Marginal(path, data)(t[i : i + 1], x[i : i + 1]) for i in range(0, 1100, 100)]),
                 atol=1e-4, rtol=1e-3)  # fmt: skip


def test_oracle_a_marginal_field_of_gaussian_data():
    m, S, t, x = 0.5, 0.7, torch.full((4,), 0.3, dtype=torch.float64), torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    data = m + S * Normal(0.0, 1.0).icdf((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)[:, None]  # quantiles
    V = (1 - 0.3) ** 2 + (0.3 * S) ** 2
    assert_close(Marginal(OTPath(0.0), data)(t, x), m + (0.3 * S**2 - 0.7) / V * (x - 0.3 * m), atol=1e-4, rtol=0)


# ---- 4 Solvers -------------------------------------------------------------------------------------------------------


def trees(order):
    """All rooted trees of that order, as sorted tuples of subtrees: 1, 1, 2, 4, 9 of them."""
    if order == 1:
        return [()]
    found, smaller = set(), [(n, tree) for n in range(1, order) for tree in trees(n)]
    for k in range(1, order):
        for parts in combinations_with_replacement(smaller, k):
            if sum(n for n, _ in parts) == order - 1:
                found.add(tuple(sorted(tree for _, tree in parts)))
    return sorted(found)


def size(tree):
    return 1 + sum(size(sub) for sub in tree)


def gamma(tree):
    return size(tree) * math.prod(gamma(sub) for sub in tree)


def phi(tree, A):
    """Elementary weights of the stages: Butcher (2016), Section 3.1."""
    return math.prod((A @ phi(sub, A) for sub in tree), start=np.ones(len(A)))


@pytest.mark.parametrize("name, orders", [("euler", (1,)), ("midpoint", (2,)), ("rk4", (4,)), ("dopri5", (5, 4))])
def test_rooted_tree_order_conditions(name, orders):
    tableau = fm.METHODS[name]
    A = np.array([[*row, *[0] * (len(tableau.A) - len(row))] for row in tableau.A])
    b = np.array(tableau.B or A[-1])
    np.testing.assert_allclose(A.sum(1), tableau.C, atol=1e-14)
    assert sum(len(trees(n)) for n in range(1, 6)) == 17
    assert name != "dopri5" or abs(b[0] - tableau.E[0] - 5179 / 57600) < 1e-15  # Dormand & Prince's fourth order weight
    for order, weights in zip(orders, (b, b - np.array(tableau.E or b))):
        for tree in (tree for n in range(1, order + 1) for tree in trees(n)):
            assert abs(weights @ phi(tree, A) - 1 / gamma(tree)) < 1e-14, tree
        higher = [abs(weights @ phi(tree, A) - 1 / gamma(tree)) for tree in trees(order + 1)]
        assert max(higher) > 1e-5  # and no better than it says, so the error estimate is one


def test_dopri5_accepts_exactly_what_its_error_estimate_allows():
    error = abs(np.array(fm.DOPRI5.E) @ np.array(fm.DOPRI5.C) ** 4)  # of one step over x' = t^4, which only order 5 integrates
    for size, accepted, rejected in ((0.95, 1, 0), (1.05, 2, 1)):
        for d in (1, 50):  # RMS: not diluted, not summed
            solution = odeint(lambda t, x: size / error * t[:, None] ** 4 + 0 * x, torch.zeros(1, d).double(), rtol=0, atol=1)
            assert (solution.accepted.item(), solution.rejected.item()) == (accepted, rejected)
    for start, sign in ((1.0, 1), (1.0, -1), (-1.0, 1), (-1.0, -1)):  # rtol goes with the larger of |x| at both ends
        v, x = lambda t, x: sign * t[:, None] ** 4 + 0 * x, torch.full((1, 1), start, dtype=torch.float64)
        for size, accepted in ((0.95, 1), (1.05, 2)):
            rtol = error / size / max(abs(start), abs(start + sign / 5))
            assert odeint(v, x, rtol=rtol, atol=0).accepted.item() == accepted
    nfe = [odeint(lambda t, x: torch.sin(9 * t)[:, None] * x, torch.full((1, 1), 1e4), atol=1e-9, rtol=r).nfe.item() for r in (1e-3, 1e-6)]
    assert nfe[0] < 0.5 * nfe[1]  # rtol counts


def test_dopri5_feels_no_sign_unit_of_time_or_direction():
    v = lambda t, x: torch.sin(4 * x.flip(1)) * torch.cos(3 * t)[:, None] - x  # odd in x
    x = torch.randn(20, 2, dtype=torch.float64)
    solution, mirrored = odeint(v, x), odeint(v, -x)
    assert torch.equal(mirrored.x, -solution.x)
    slow, back = odeint(lambda t, x: v(t / 8, x) / 8, x, (0, 8)), odeint(lambda t, x: -v(-t, x), x, (0, -1))
    assert_close((slow.x, back.x), (solution.x, solution.x))
    for other in (mirrored, slow, back, odeint(v, x, rtol=1e-5, atol=1e-5)):
        assert torch.equal(other.nfe, solution.nfe) and other.accepted.dtype == other.rejected.dtype == torch.int64


def test_max_nfe_is_never_overrun():
    v = lambda t, x: calls.append(t) or torch.sin(200 * t)[:, None] + 0 * x
    for most, n in ((8, 8), (13, 8), (14, 14)):
        calls = []
        with pytest.raises(SolverError, match=f"in sample 0, NFE {n}: max_nfe = {most} is spent"):
            odeint(v, torch.zeros(1, 1), max_nfe=most)
        assert len(calls) == n


def test_a_step_cut_short_by_a_requested_time_is_taken_up_again():
    solution = odeint(lambda t, x: 0.1 * x, torch.ones(3, 1), (0, 0.5, 0.501, 1))
    assert solution.accepted.tolist() == [3, 3, 3]


def swirl(t, x):
    """A field with no symmetry to hide behind."""
    return torch.stack([torch.sin(3 * t) * x[:, 1] + x[:, 0] ** 2 / 4, -x[:, 0] * (1 + t) + torch.cos(x[:, 1])], 1)


@pytest.mark.parametrize("name, order", [("euler", 1), ("midpoint", 2), ("rk4", 4), ("dopri5", 5)])
def test_order_slopes(name, order):
    x = torch.randn(4, 2, dtype=torch.float64)
    exact = odeint(swirl, x, rtol=1e-13, atol=1e-13).x

    def error(n):  # dopri5 takes one step an interval when it may err as it likes
        options = {"t": torch.linspace(0, 1, n + 1).tolist(), "rtol": 1e9} if name == "dopri5" else {"steps": n}
        solution = odeint(swirl, x, method=name, **options)
        assert solution.accepted.tolist() == [n] * 4
        return (solution.x - exact).norm()

    assert abs(math.log2(error(20) / error(40)) - order) < 0.25
    assert (odeint(swirl, x, rtol=1e-8, atol=1e-8).x - exact).abs().max() < 1e-6


def test_oracle_a_flow_of_gaussian_data():
    x0 = torch.randn(50, 2, dtype=torch.float64)
    ts = [0.0, 0.25, 0.5, 1.0]
    u = lambda t, x: ((2 * t - 1) / (2 * t * t - 2 * t + 1))[:, None] * x
    xs = odeint(u, x0, ts, rtol=1e-9, atol=1e-9).xs
    assert_close(xs, torch.stack([x0 * math.sqrt(2 * t * t - 2 * t + 1) for t in ts]), atol=1e-7, rtol=0)
    std = [odeint(u, x0, method="euler", steps=n).x[0, 0] / x0[0, 0] for n in (1, 2, 4, 8, 16, 32)]
    assert_close(torch.stack(std), torch.tensor([0, 0.5, 0.72, 0.85, 0.92, 0.96], dtype=torch.float64), atol=5e-3, rtol=0)


def test_round_trip_forward_and_backward():
    x = torch.randn(20, 2, dtype=torch.float64)
    for options in ({"rtol": 1e-10, "atol": 1e-10}, {"method": "rk4", "steps": 200}):
        there = odeint(swirl, x, (0.2, 0.9), **options).x
        assert (there - x).abs().min() > 1e-3
        assert_close(odeint(swirl, there, (0.9, 0.2), **options).x, x, atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [(), (1,), (3,), (2, 5)], ids=str)
def test_dopri5_sample_does_not_feel_its_batch(dtype, dims):
    scale = torch.linspace(0.1, 3, 37, dtype=dtype)
    x = torch.randn(37, *dims, dtype=dtype) * fm.expand(scale, torch.empty(37, *dims))
    v = lambda t, x, rate: -x * x * x + fm.expand(t * rate, x) * x
    together = odeint(v, x, (0, 0.3, 1), rate=scale)
    assert together.nfe.unique().numel() > 3  # they do take steps of their own
    for i in range(37):
        alone = odeint(v, x[i : i + 1], (0, 0.3, 1), rate=scale[i : i + 1])
        assert torch.equal(alone.xs[:, 0], together.xs[:, i])
        assert [c[0] for c in alone[2:]] == [c[i] for c in together[2:]]


def test_dopri5_easy_samples_cost_what_they_cost_alone():
    rate = torch.cat([torch.ones(8), torch.full((8,), 60.0)])
    calls = []
    v = lambda t, x, rate: calls.append(len(x)) or torch.sin(rate * t)[:, None] * x
    x = torch.ones(16, 2)
    together, alone = odeint(v, x, rate=rate), odeint(v, x[:8], rate=rate[:8])
    assert torch.equal(together.nfe[:8], alone.nfe) and together.nfe[8:].min() > 5 * alone.nfe.max()
    assert sum(calls) == together.nfe.sum() + alone.nfe.sum()  # finished samples are not called for
    assert torch.equal(together.nfe, 2 + 6 * (together.accepted + together.rejected))


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.3, 0.9), (1.0, 0.0), (0.0, 1e-3), (2.0, 7.0)])
@pytest.mark.parametrize("options", [{}, {"method": "rk4", "steps": 3}, {"method": "midpoint", "steps": 7}], ids=str)
def test_no_query_outside_the_span_and_requested_times_are_hit(span, options):
    a, b = span
    times, seen = [a, a + 0.37 * (b - a), a + 0.371 * (b - a), b], []
    v = lambda t, x: seen.append(t) or 5 * torch.cos(5 * t)[:, None] + 0 * x
    solution = odeint(v, torch.zeros(9, 1), times, **options)
    t, ends = torch.cat(seen), torch.tensor([a, b])
    assert t.dtype == torch.float32 and t.min() >= ends.min() and t.max() <= ends.max()
    truth = torch.tensor([math.sin(5 * s) - math.sin(5 * a) for s in times])
    tolerance = 5e-5 if not options else 0.2 * abs(b - a) ** 3
    assert_close(solution.xs[:, 0, 0], truth, atol=tolerance, rtol=0)
    assert torch.equal(solution.x, solution.xs[-1]) and torch.equal(solution.xs[0], torch.zeros(9, 1))


@pytest.mark.parametrize("method, stages", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_fixed_steps_are_exactly_those_asked_for(method, stages):
    for steps in (1, 2, 3, 7, 10, 33):
        calls = []
        solution = odeint(lambda t, x: calls.append(t[0].item()) or torch.ones_like(x), torch.zeros(2, 1), method=method, steps=steps)
        assert_close(solution.x, torch.ones(2, 1))
        assert len(calls) == steps * stages and torch.equal(solution.nfe, torch.full((2,), steps * stages))
        assert solution.accepted.tolist() == [steps] * 2 and solution.rejected.tolist() == [0, 0]
        assert calls[0] == 0 and len(set(calls)) == {"euler": steps, "midpoint": 2 * steps, "rk4": 2 * steps + 1}[method]


def test_fixed_steps_are_shared_by_length_with_one_at_least():
    seen = []
    odeint(lambda t, x: seen.append(round(t[0].item(), 6)) or x, torch.ones(1, 1), (0.0, 0.01, 0.75, 1.0), method="euler", steps=5)
    assert seen == [0, 0.01, 0.256667, 0.503333, 0.75]
    for t in ((5.0, 6.0, 6.75), (-5.0, -6.0, -6.75)):
        seen.clear()
        odeint(lambda t, x: seen.append(round(abs(t[0].item()), 3)) or x, torch.ones(1, 1), t, method="euler", steps=5)
        assert seen == [5, 5.333, 5.667, 6, 6.375]


def test_times_of_float64_are_kept_to_the_last_bit():
    a, b, seen = 0.2, 1.0, []
    assert a + (b - a) * 3 / 3 != b
    x, v = torch.zeros(1, 1, dtype=torch.float64), lambda t, x: seen.append(t.item()) or torch.ones_like(x)
    odeint(v, x, (a, b), method="rk4", steps=3)
    assert (seen[0], seen[-1]) == (a, b)
    assert_close(odeint(v, x, (0.5, 0.5 + 1e-9)).x.item(), (0.5 + 1e-9) - 0.5, rtol=1e-12, atol=0)


def test_starting_step_of_easy_and_of_deceptive_fields():
    x = torch.randn(200, 2)
    assert odeint(lambda t, x: 0.3 * torch.ones_like(x), x).nfe.tolist() == [8] * 200  # one step
    assert odeint(lambda t, x: x, x).nfe.double().mean() < 22
    late = lambda t, x: (torch.sigmoid(40 * (t - 0.5)) * torch.sin(20 * t))[:, None] * x  # nothing happens at t = 0
    exact = odeint(late, x.double(), rtol=1e-10, atol=1e-10).x
    assert_close(odeint(late, x).x.double(), exact, atol=1e-2, rtol=1e-2)  # 0.06 if it were fooled


class NoFloat64(TorchDispatchMode):
    """What MPS does: no tensor of double precision may be made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for o in out if isinstance(out, (list, tuple)) else [out]:
            assert not isinstance(o, torch.Tensor) or o.dtype != torch.float64, func
        return out


def test_float32_makes_no_float64_tensor():
    x, v = torch.randn(5, 2), lambda t, x: torch.sin(x * t[:, None])
    with NoFloat64():
        for path in (OTPath(), OTPath(0.0), VPPath(), VEPath(), CosinePath(), AffinePath(lambda t: t, lambda t: 1 - t)):
            cfm_loss(v, path, x)
            path.log_prob(0.5, x, x), path.score(0.5, x, x), path.u(torch.full((5,), 0.5), x, x)
            sample(v, path, (5, 2), method="midpoint", steps=2)
            log_prob(v, x, path), log_prob(v, x, path, divergence="hutchinson", probes=2)
            Marginal(path, x)(0.5, x), Marginal(path, x).log_prob(0.5, x)
        odeint(v, x, torch.linspace(0, 1, 3)), odeint(v, x, (1, 0.5, 0), method="rk4", steps=4)
        bits_per_dim(lambda t, x: 0 * x, torch.zeros(1, 3, dtype=torch.uint8), K=2)
        UNet(**SMALL, num_classes=1, cond_channels=1)(0.5, torch.randn(2, 3, 8, 8), cond=torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_times_in_float32(dtype):
    seen = set()
    v = lambda t, x: seen.add((t.dtype, x.dtype)) or -x
    x = torch.randn(4, 2).to(dtype)
    solution = odeint(v, x, (0, 0.5, 1), method="rk4", steps=8)
    assert solution.xs.dtype == solution.x.dtype == dtype
    assert_close(solution.x, x * math.exp(-1), atol=0.02, rtol=0.02)
    assert cfm_loss(v, OTPath(), x).isfinite() and log_prob(v, x, method="rk4", steps=4).log_prob.isfinite().all()
    assert cfm_loss(v, ConditionalFlow(lambda t, x0, x1: v(t, x0)), x, t=0.3).isfinite()
    assert fm.sample_sde(v, OTPath(0.3), (4, 2), steps=3, dtype=dtype).dtype == dtype
    assert fm.expand(0.7313, x).dtype == torch.float32
    y = torch.randn(2, 1001).to(dtype)
    record = log_prob(lambda t, x: v(t, -x / 4), y, method="euler", steps=1)  # half precision has no 250.25, the trace
    assert_close(record.log_prob, Normal(0, 1).log_prob(0.75 * y.float()).sum(1) - 250.25, atol=0.02, rtol=0)
    assert record.x0.dtype == dtype and record.log_prob.dtype == torch.float32
    assert seen == {(torch.float32, dtype)}


def test_odeint_is_differentiable_and_sample_is_not():
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    for options in ({"rtol": 1e-9, "atol": 1e-9}, {"method": "rk4", "steps": 50}):
        out = odeint(lambda t, x: a * x, x, **options).x  # x e^a
        da, dx = torch.autograd.grad(out.sum(), (a, x))
        assert_close((da, dx), (out.sum().detach(), torch.full_like(x, math.exp(0.7))), atol=1e-6, rtol=1e-6)
    assert not sample(lambda t, x: a * x, OTPath(), (4, 2), dtype=torch.float64).x.requires_grad


def test_solver_error_says_what_happened_and_keeps_the_state():
    x = torch.tensor([[0.1], [1.0], [0.2]])
    with pytest.raises(SolverError, match=r"dopri5: step .* at t = 0\.\d+ in sample 1, NFE \d+: .*float32") as e:
        odeint(lambda t, x: x**2 * 4, x.clone().requires_grad_(), (0, 0.2, 1))  # 1 / (1 / x - 4 t): x = 1 ends at 1/4
    assert abs(e.value.t[1] - 0.25) < 1e-3 and e.value.t.shape == (3,) and e.value.x.shape == (3, 1)
    assert e.value.t[0] == e.value.t[2] == 1 and not e.value.x.requires_grad  # the others were done, and truly
    assert_close(e.value.x[[0, 2]], 1 / (1 / x[[0, 2]] - 4), atol=1e-3, rtol=1e-3)
    with pytest.raises(SolverError, match=r"step .* at t = -1\.75\d* in sample 1, .*singular here"):
        odeint(lambda t, x: x**2 * 4, x, (-2, -1))  # wherever on the axis of time
    with pytest.raises(SolverError, match="max_nfe = 50 is spent") as e:
        odeint(lambda t, x: torch.sin(200 * t)[:, None] + 0 * x, x, max_nfe=50)
    assert 0 < e.value.t.min() and e.value.t.max() < 1
    with pytest.raises(SolverError, match="sample 2, NFE 1: v is not finite at the start"):
        odeint(lambda t, x: torch.where(x == x[2], torch.nan, x), x)
    with pytest.raises(SolverError, match=r"NFE \d\d?\d?: .*v is not finite near here"):
        odeint(lambda t, x: torch.where(t[:, None] > 0, torch.inf, x), x)
    with pytest.raises(SolverError, match="v is not finite near here"):
        odeint(lambda t, x: torch.where(t[:, None] > 0.5, torch.inf, x), x)
    with pytest.raises(SolverError, match="sample 2, NFE 1:"):
        odeint(lambda t, x: torch.where(x == x[2, 1], torch.nan, x), torch.randn(4, 3))  # one entry will do
    calls = []
    with pytest.raises(SolverError, match=r"not finite in sample 1 after \d+ calls.*take more steps") as e:
        odeint(lambda t, x: calls.append(t) or 100 * x**3, x, method="euler", steps=30)
    assert e.value.x.isfinite().all() and f"after {len(calls)} calls" in str(e.value)


def test_a_non_finite_trial_step_is_rejected_not_fatal():
    v = lambda t, x: torch.where(x < -0.01, torch.nan, -20 * x)  # an overshooting step would see the hole
    solution = odeint(v, torch.ones(3, 1), rtol=1e-3, atol=1e-3)
    assert solution.x.abs().max() < 1e-2 and solution.x.isfinite().all()


@pytest.mark.parametrize("g", [0.0, 1.2, lambda t: 2 - t], ids=["0", "1.2", "g(t)"])
@pytest.mark.parametrize("path", [OTPath(0.3), AffinePath(lambda t: torch.sin(math.pi / 2 * t), lambda t: 0.3 + 0.7 * torch.cos(math.pi / 2 * t))],
                         ids=["ot", "cosine"])  # fmt: skip
def test_sde_has_the_marginals_of_the_ode(path, g):
    data = 1.5 * torch.tensor([[-1.0, 0.5], [1.5, 0.0], [0.0, -1.0]])
    x = fm.sample_sde(Marginal(path, data), path, (4000, 2), steps=200, g=g)
    exact = data[torch.randint(3, (4000,))] + 0.3 * torch.randn(4000, 2)
    assert (x.mean(0) - data.mean(0)).abs().max() < 0.1
    assert (torch.cov(x.T) - torch.cov(exact.T)).abs().max() < 0.15
    assert abs(torch.cdist(x, data).min(1).values.square().mean() / (2 * 0.3**2) - 1) < 0.1  # the spread around each point
    distance = 2 * torch.cdist(x, exact).mean() - torch.cdist(x, x).mean() - torch.cdist(exact, exact).mean()
    assert distance < 0.012


def test_sde_is_a_function_of_its_generator_and_stops_where_it_is_not_finite():
    draw = lambda seed: fm.sample_sde(lambda t, x: -x, OTPath(), (4, 2), 5, generator=torch.Generator().manual_seed(seed))
    assert_close(draw(3), draw(3), rtol=0, atol=0)
    assert (draw(3) != draw(4)).all()
    with pytest.raises(SolverError, match="step 1 of 5, at t = 0, is not finite") as e:
        fm.sample_sde(lambda t, x: x / 0, OTPath(), (4, 2), 5)
    assert e.value.x.shape == (4, 2) and e.value.x.isfinite().all()


def test_sde_options_are_those_given():
    path = AffinePath(lambda t: t, lambda t: 1 - t / 2, (0.2, 0.8))
    y = torch.full((4, 1), 0.5, dtype=torch.float64, requires_grad=True)
    seed = lambda: {"generator": torch.Generator().manual_seed(3), "dtype": torch.float64}
    v = lambda t, x, y: y * t[:, None] * x
    draw = lambda **options: fm.sample_sde(v, path, (4, 2), steps=3, y=y, **seed(), **options)
    euler = math.prod(1 + 0.2 * 0.5 * t for t in (0.2, 0.4, 0.6))
    assert_close(draw(g=0.0), euler * torch.randn(4, 2, **seed()))
    assert torch.equal(draw(), draw(g=1.0)) and not torch.equal(draw(), draw(g=1.1)) and not draw().requires_grad
    times = []
    assert torch.equal(draw(), draw(g=lambda t: times.append(round(t, 6)) or 1.0)) and times == [0.2, 0.4, 0.6]
    u, x0 = Marginal(OTPath(0.3), torch.randn(3, 2, dtype=torch.float64)), torch.randn(4, 2, **seed())
    one = fm.sample_sde(u, OTPath(0.3), (4, 2), steps=1, g=2.0, **seed())  # the last step has no noise
    assert_close(one, x0 + u(0.0, x0) + 2 * u.score(0.0, x0))


def test_eq38_noising_sde_of_vp_and_ve_and_the_probability_flow_of_eq40():
    (t, _, x), data = batch(), torch.randn(4, 3, dtype=torch.float64)
    s = (1 - t)[:, None]
    beta = 0.1 + 19.9 * s
    f, g = VPPath().noising(t, x)
    assert_close((f, g), (-beta / 2 * x, beta.sqrt()))
    f, g = VEPath().noising(t, x)
    dsigma2 = by_autodiff(lambda s: (0.01 * 1000**s) ** 2, 1 - t)[:, None]
    assert_close((f, g), (0 * x, dsigma2.sqrt()))
    for path in (VPPath(), VEPath(0.1, 4.0)):
        (f, g), marginal = path.noising(t, x), Marginal(path, data)
        assert_close(marginal(t, x), -(f - g**2 / 2 * marginal.score(t, x)))  # w_t of Eq. (40), in the time t = 1 - s


# ---- 5 Likelihood ----------------------------------------------------------------------------------------------------

A = torch.tensor([[0.7, 0.4, 0.0], [-0.3, -0.2, 0.5], [0.1, 0.0, 0.3]], dtype=torch.float64)  # tr A = 0.8


@pytest.mark.parametrize("options", [{"rtol": 1e-9, "atol": 1e-9}, {"method": "rk4", "steps": 30}], ids=["dopri5", "rk4"])
def test_eq33_log_prob_of_a_linear_field(options):
    x1, M = torch.randn(6, 3, dtype=torch.float64), torch.linalg.matrix_exp(A)  # x1 = M x0, x0 ~ N(0, I)
    record = log_prob(lambda t, x: x @ A.T, x1, **options)
    assert_close(record.log_prob, MultivariateNormal(torch.zeros(3).double(), M @ M.T).log_prob(x1), atol=1e-6, rtol=0)
    assert_close(record.x0, x1 @ torch.linalg.inv(M).T, atol=1e-6, rtol=0)
    assert record.std_err.tolist() == [0.0] * 6


def test_eq34_eq35_hutchinson_is_unbiased_with_its_standard_error():
    x1 = torch.randn(3, 3, dtype=torch.float64).repeat_interleave(3000, 0)
    v = lambda t, x: x @ A.T
    exact = log_prob(v, x1).log_prob
    record = log_prob(v, x1, divergence="hutchinson", probes=16)
    error = (record.log_prob - exact) / record.std_err
    # the estimate and its error scatter as Student's t with 15 degrees of freedom, nearly
    assert abs(error.std() / math.sqrt(15 / 13) - 1) < 0.03 and abs(error.mean()) < 4 / math.sqrt(9000)
    assert record.std_err.min() > 0.01
    one = log_prob(lambda t, x: 0.7 * x, x1, divergence="hutchinson")  # for a multiple of I one probe is exact
    assert_close(one.log_prob, Normal(0, math.exp(0.7)).log_prob(x1).sum(1), atol=1e-4, rtol=0)
    assert one.std_err.isnan().all()


def test_eq34_probes_are_drawn_once_a_solve():
    v = lambda t, x: torch.tanh(x @ torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    x1 = torch.randn(16, 8)
    exact = log_prob(v, x1).nfe.double().mean()
    assert log_prob(v, x1, divergence="hutchinson").nfe.double().mean() < 1.5 * exact  # redrawn probes cost thousands


def test_eq4_trace_agrees_with_the_determinant_of_the_flow():
    x0, options = torch.randn(4, 2, dtype=torch.float64), {"rtol": 1e-10, "atol": 1e-10}
    flow = lambda x: odeint(swirl, x[None], **options).x[0]
    jacobian = torch.stack([torch.autograd.functional.jacobian(flow, x) for x in x0])
    expected = Normal(0, 1).log_prob(x0).sum(1) - torch.linalg.slogdet(jacobian)[1]
    assert_close(log_prob(swirl, odeint(swirl, x0, **options).x, **options).log_prob, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("path", [OTPath(0.1), VEPath(0.2, 8.0)], ids=repr)
def test_appendix_c_log_prob_of_the_exact_marginal_field(path):
    data = torch.randn(5, 2, dtype=torch.float64)
    marginal, x1 = Marginal(path, data), data + 0.1 * torch.randn(5, 2, dtype=torch.float64)
    record = log_prob(marginal, x1, path, rtol=1e-8, atol=1e-8)
    # p_0 is N(0, source_std^2 I) for OT; for VE it is that plus data, which the small sigma_0 ratio allows for
    assert_close(record.log_prob, marginal.log_prob(1.0, x1), atol=1e-5 if isinstance(path, OTPath) else 0.1, rtol=0)


def test_log_determinant_is_controlled_on_its_own():
    v = lambda t, x: torch.cat([torch.sin(9 * x[:, :1] + 3 * t[:, None]), 0 * x[:, 1:]], 1)  # one live dimension
    x1 = torch.randn(10, 1)
    few = log_prob(v, x1, divergence="hutchinson").log_prob
    padded = log_prob(v, torch.cat([x1, torch.zeros(10, 999)], 1), divergence="hutchinson")
    exact = log_prob(v, x1.double(), rtol=1e-10, atol=1e-10).log_prob
    assert_close(few.double(), exact, atol=2e-3, rtol=0)
    assert_close(padded.log_prob.double() + 999 / 2 * math.log(2 * math.pi), exact, atol=2e-3, rtol=0)
    u = lambda t, x: torch.cos(9 * t)[:, None] + 0 * x  # and the point is not diluted by its probes
    assert torch.equal(log_prob(u, x1, divergence="hutchinson", probes=999).nfe, odeint(u, x1, (1, 0)).nfe)


def test_log_prob_works_on_any_shape_in_chunks_and_for_constant_fields():
    x1 = torch.randn(3, 3, 4, 4)
    expected = Normal(0, 1).log_prob(x1 - 1).flatten(1).sum(1)
    assert_close(log_prob(lambda t, x: torch.ones_like(x), x1).log_prob, expected, atol=1e-3, rtol=0)
    w = torch.nn.Parameter(torch.ones(()))
    assert_close(log_prob(lambda t, x: w.expand_as(x), x1).log_prob, expected, atol=1e-3, rtol=0)
    record = log_prob(lambda t, x: w.expand_as(x), x1, divergence="hutchinson")
    assert_close(record.log_prob, expected, atol=1e-3, rtol=0)
    wide = torch.randn(2, 1500)  # 2**22 // 3000 rows: two chunks of the identity
    assert_close(log_prob(lambda t, x: 0.3 * x, wide).log_prob, Normal(0, math.exp(0.3)).log_prob(wide).sum(1), atol=1e-1, rtol=1e-5)
    huge = torch.randn(4, 2**20 + 1)  # one probe at a time, on one graph; they are exact for a diagonal Jacobian
    record = log_prob(lambda t, x: torch.sin(x), huge, divergence="hutchinson", probes=2, method="euler", steps=1)
    assert_close(record.log_prob, (Normal(0, 1).log_prob(huge - huge.sin()) - huge.cos()).sum(1))
    for shape in ((4,), (1,), (1, 2, 3)):
        record = log_prob(lambda t, x: 0.3 * x, torch.randn(shape))
        assert record.log_prob.shape == record.nfe.shape == shape[:1] and record.x0.shape == shape
    y, path = x1[:1], AffinePath(lambda t: t, lambda t: 1 - t / 2, (0.2, 0.8))  # from t = 0.8 to 0.2
    assert_close(log_prob(lambda t, x: torch.ones_like(x), y, path).x0, y - 0.6, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's own
def test_log_prob_under_inference_mode_autocast_and_torch_compile():
    net, x1 = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)), torch.randn(6, 2)
    v = lambda t, x, y: net(torch.cat([x * y[:, None], t[:, None]], 1))
    y = torch.ones(6)
    plain = log_prob(v, x1, y=y).log_prob
    with torch.inference_mode():
        assert torch.equal(log_prob(v, x1 + 0, y=y + 0).log_prob, plain)
    with torch.autocast("cpu", torch.bfloat16):  # v in bfloat16, the solver in float32
        assert_close(log_prob(v, x1, method="rk4", steps=8, y=y).log_prob, plain, atol=0.1, rtol=0)
        assert odeint(lambda t, x: torch.ones_like(x), torch.full((2, 2), 1000.0), method="euler", steps=64).x.eq(1001).all()
        seen = set()
        odeint(lambda t, x: seen.add((x @ x.mT).dtype) or x, x1)
        assert seen == {torch.bfloat16}
        data, z = torch.randn(50, 40), torch.randn(3, 40)
        in_autocast = Marginal(OTPath(), data)(0.5, z)
    assert_close(in_autocast.double(), Marginal(OTPath(), data.double())(0.5, z.double()), atol=1e-4, rtol=1e-4)
    compiled = torch.compile(net, backend="aot_eager")  # has no batched backward, and by default gives one backward only
    field = lambda t, x, y: compiled(torch.cat([x * y[:, None], t[:, None]], 1))
    assert log_prob(field, x1, divergence="hutchinson", y=y).log_prob.isfinite().all()
    import torch._functorch.config as config

    torch._dynamo.reset()
    with config.patch(donated_buffer=False) if hasattr(config, "donated_buffer") else nullcontext():
        assert_close(log_prob(field, x1, y=y).log_prob, plain)  # row by row


def test_channels_last_and_transposed_input():
    x = torch.randn(3, 2, 4, 4)
    v = lambda t, x: torch.sin(3 * x) * fm.expand(t, x)
    for y in (x.contiguous(memory_format=torch.channels_last), x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)):
        assert torch.equal(odeint(v, y).x, odeint(v, x).x)
        assert_close(log_prob(v, y).log_prob, log_prob(v, x).log_prob)


@pytest.mark.parametrize("options", [{}, {"divergence": "hutchinson", "probes": 3}, {"method": "rk4", "steps": 5}], ids=str)
def test_differentiable_log_prob_has_the_gradient_of_finite_differences(options):
    x1 = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def nll(a, x1):
        torch.manual_seed(3)
        return -log_prob(lambda t, x: torch.sin(a * x) + t[:, None] * x.flip(1), x1, differentiable=True, **options).log_prob.sum()

    a = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(nll, (a, x1), atol=2e-3, rtol=2e-3)
    assert not log_prob(lambda t, x: a * x, x1).log_prob.requires_grad


def test_maximum_likelihood_trains_a_cnf():
    data = 2 + 0.5 * torch.randn(256, 1)
    weights = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    for _ in range(60):
        loss = -log_prob(lambda t, x: weights[0] * x + weights[1], data, differentiable=True, method="rk4", steps=4).log_prob.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = math.log(0.5) + 0.5 * math.log(2 * math.pi * math.e)
    assert abs(loss.item() - entropy) < 0.1


def test_eq37_uniform_density_has_exactly_8_bits():
    root = math.sqrt(2 / math.pi)

    def phi(t, x0):  # x0 -> erf(x0 / sqrt 2), which makes N(0, 1) uniform on [-1, 1], through erf(k x0 / sqrt 2) / c
        k = 0.02 + 0.98 * t
        return torch.erf(k * x0 / math.sqrt(2)) / ((1 - t) * k * root + t)

    def v(t, x):
        t = t[:, None]
        k = 0.02 + 0.98 * t
        x0 = math.sqrt(2) * torch.erfinv(((1 - t) * k * root + t) * x) / k
        return torch.func.jvp(lambda t: phi(t, x0), (t,), (torch.ones_like(t),))[1]

    images = torch.randint(256, (16, 12), dtype=torch.uint8)
    for K in (1, 3):
        record = bits_per_dim(v, images, K=K, divergence="exact", rtol=1e-6, atol=1e-6)
        assert_close(record.bpd, torch.full((16,), 8.0), atol=5e-4, rtol=0)
    assert record.std_err.tolist() == [0.0] * 16 and record.nfe.min() > 3 * 8


def test_eq47_is_the_mean_of_k_densities(monkeypatch):
    draws = iter([torch.tensor([-100.0, -50.0]), torch.tensor([-101.0, -50.0]), torch.tensor([-103.0, -50.0])])
    seen = []
    two, seven = torch.full((2,), 2.0), torch.full((2,), 7)
    fake = lambda v, y, *a, **k: seen.append(y) or fm.LogProb(next(draws), two, y, seven)
    monkeypatch.setattr(fm, "log_prob", fake)
    record = bits_per_dim(None, torch.full((2, 5), 200, dtype=torch.uint8), K=3)
    u = (torch.stack(seen) + 1) * 128 - 200  # the dequantisation noise, new for every draw
    assert 0 <= u.min() and u.max() < 1 and u.unique().numel() == 30 and u.std() > 0.2
    mean = torch.tensor([(math.exp(0) + math.exp(-1) + math.exp(-3)) / 3 * 1e-30, 1e-30]).log() - math.log(1e-30)
    expected = -(mean + torch.tensor([-100.0, -50.0])) / (5 * math.log(2)) + 7
    assert_close(record.bpd, expected)
    assert_close(record.std_err[1].item(), 2 / math.sqrt(3) / (5 * math.log(2)))
    assert record.nfe.tolist() == [21, 21]
    draws = iter([torch.zeros(2)])
    record = bits_per_dim(None, torch.zeros(2, 5, dtype=torch.uint8))  # one draw unless told
    assert_close(record.bpd, torch.full((2,), 7.0))


def test_conditioning_follows_its_samples():
    x, rate = torch.randn(12, 2), torch.linspace(-2, 6, 12)  # they leave the solver at different times
    v = lambda t, x, rate, shift: torch.sin(rate * t)[:, None] * x + shift
    shift = torch.randn(12, 2)
    solution, record = odeint(v, x, rate=rate, shift=shift), log_prob(v, x, rate=rate, shift=shift)
    assert solution.nfe.unique().numel() > 2 and record.nfe.unique().numel() > 2
    growth = torch.where(rate == 0, 0 * rate, (1 - torch.cos(rate)) / rate)  # int sin(rate t) dt = log-determinant / 2
    alone = [odeint(v, x[i : i + 1], rate=rate[i : i + 1], shift=shift[i : i + 1]).x for i in range(12)]
    assert torch.equal(solution.x, torch.cat(alone))
    log_p0 = Normal(0, 1).log_prob(record.x0).sum(1)
    assert_close(record.log_prob, log_p0 - 2 * growth, atol=1e-4, rtol=0)


def test_sample_starts_from_the_source_of_the_path():
    for path in (VEPath(), OTPath()):
        record = sample(lambda t, x: 0 * x, path, (20000, 1))
        assert abs(record.x.std() - path.source_std) < 0.03 * path.source_std
        assert sample(lambda t, x: 0 * x, path, (2, 1), dtype=torch.float64).x.dtype == torch.float64
    a = sample(lambda t, x: x, VPPath(), (4, 2), generator=torch.Generator().manual_seed(3), method="euler", steps=2)
    b = sample(lambda t, x: x, VPPath(), (4, 2), generator=torch.Generator().manual_seed(3), t=(0, 0.5), method="euler", steps=2)
    assert torch.equal(a.xs[0], b.xs[0]) and not torch.equal(a.x, b.x)


# ---- 6 UNet ----------------------------------------------------------------------------------------------------------

# Widths 6 and 12 in groups of 3: with one channel a group, the norms would wipe out time and label.
SMALL = dict(image_size=8, channels=6, channel_mult=(1, 2), blocks=1, attention=(4,),
             head_channels=6)  # fmt: skip
PAPER = dict(channels=256, head_channels=64, dropout=0.0)  # Table 3, with the depths below


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


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (dict(), 35_746_307),
        (PAPER, 142_861_315),
        (dict(PAPER, blocks=3, attention=(16, 8)), 196_069_123),
        (dict(PAPER, image_size=64, channels=192, blocks=3, channel_mult=(1, 2, 3, 4),
              attention=(32, 16, 8)), 264_904_515),
        (dict(PAPER, image_size=128, blocks=3, channel_mult=(1, 1, 2, 3, 4),
              attention=(32, 16, 8)), 485_015_043),
    ],
    ids=["default", "CIFAR-10", "ImageNet-32", "ImageNet-64", "ImageNet-128"],
)  # fmt: skip
def test_table_3_parameter_counts(settings, count):
    with torch.device("meta"):
        net = UNet(**settings)
    assert sum(p.numel() for p in net.parameters()) == count
    assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {settings.get("dropout", 0.1)}
    assert not list(net.buffers()) and len(net.state_dict()) == len(list(net.parameters()))


def test_adm_order_of_weights():
    """a>b: a residual block, A: attention, C: a 3x3 convolution; widths are 128, or W = 256."""
    layout = """3C128 128>128 128>128 128C128  128>W A W>W A WCW  W>W W>W WCW  W>W W>W
                W>W A W>W  512>W 512>W 512>W WCW  512>W 512>W 512>W WCW
                512>W A 512>W A 384>W A WCW  384>128 256>128 256>128"""
    shapes = [(512, 128), (512,), (512, 512), (512,)]
    for word in layout.replace("W", "256").split():
        a, kind, b = re.fullmatch(r"(\d*)([>AC])(\d*)", word).groups()
        a, b = int(a or 256), int(b or 256)
        if kind == ">":
            shapes += [(a,), (a,), (b, a, 3, 3), (b,), (b, 512), (b,)]
            shapes += [(b,), (b,), (b, b, 3, 3), (b,)]
            shapes += [(b, a, 1, 1), (b,)] if a != b else []
        else:
            shapes += [(b, a, 3, 3), (b,)] if kind == "C" else []
            shapes += [(a,), (a,), (3 * a, a), (3 * a,), (a, a), (a,)] if kind == "A" else []
    shapes += [(128,), (128,), (3, 128, 3, 3), (3,)]
    with torch.device("meta"):
        assert [tuple(p.shape) for p in UNet().parameters()] == shapes


def test_outputs_of_the_published_network():
    """The numbers are torchcfm 1.0.7's, run in float64 on the same weights."""
    net = UNet(channels=32, channel_mult=(1, 2, 2), blocks=1, head_channels=32, time_scale=1)
    x = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).reshape(2, 3, 32, 32)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    v = filled(net).double()(t, x)[:, :, 5, 11]
    expected = [[1.458142932449, 1.072046580891, 1.641922546993],
                [0.984202775110, 1.452158185563, 2.068227448654]]  # fmt: skip
    assert_close(v, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("size", [8, 16, 17])
def test_upsample_is_nearest_then_convolution(size):
    layer, x = Upsample(3, 5, 3, padding=1).double(), pictures(2, 3, size)[1]
    enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(layer(x), F.conv2d(enlarged, layer.weight, layer.bias, padding=1))


@pytest.mark.parametrize("head_channels, n", [(4, 2), (8, 1), (64, 1)])
def test_attention_by_hand(head_channels, n):
    layer, x = filled(Attention(8, head_channels)).double(), pictures(2, 8, 4)[1]
    h = torch.einsum("bcn,dc->bdn", layer.norm(x).flatten(2), layer.qkv.weight)
    heads = (h + layer.qkv.bias[:, None]).chunk(n, 1)
    out = []
    for q, k, v in (head.chunk(3, 1) for head in heads):  # each (B, 8 / n, HW)
        out.append(v @ torch.softmax(q.mT @ k / math.sqrt(8 / n), -1).mT)
    proj = torch.einsum("bcn,dc->bdn", torch.cat(out, 1), layer.proj.weight)
    assert_close(layer(x), x + (proj + layer.proj.bias[:, None]).reshape(x.shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_time_embedding_sees_1000_t(dtype):
    seen, net = [], small(dtype)
    net.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(torch.tensor(0.7313, dtype=torch.float64), torch.zeros(1, 3, 8, 8, dtype=dtype))
    angles = [731.3 * 10 ** (-4 * k / 3) for k in range(3)]  # 6 channels, so 3 frequencies
    expected = [f(a) for f in (math.cos, math.sin) for a in angles]
    atol = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 4e-3}[dtype]
    assert seen[0].dtype == dtype
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(seen[0][0].double(), expected, rtol=0, atol=atol)


def test_time_formats_and_batch_independence():
    net, (t, x) = small(), pictures()
    each = torch.cat([net(float(t[i]), x[i : i + 1]) for i in range(3)])
    assert_close(net(t, x), each)
    assert_close(net(t[1], x), net(t[1].expand(3), x))
    assert (net(t, x) - net(t.flip(0), x)).abs().max() > 1e-3
    assert_close(net(t, x.contiguous(memory_format=torch.channels_last)), net(t, x))
    assert net(t, x).is_contiguous(memory_format=torch.channels_last)
    assert_close(net.to(memory_format=torch.contiguous_format)(t, x), each)


def test_a_new_network_is_zero_and_dropout_is_for_training():
    t, x = pictures(dtype=torch.float32)
    net = UNet(**SMALL, dropout=0.5)
    assert not net(t, x).any()
    h, emb = torch.randn(2, 6, 4, 4), torch.randn(2, 24)
    assert torch.equal(Attention(6, 6)(h), h) and torch.equal(ResBlock(6, 6, 24, 0.5)(h, emb), h)
    net = small(torch.float32, dropout=0.5)
    assert torch.equal(net(t, x), net(t, x))
    assert not torch.equal(net.train()(t, x), net(t, x))


def test_labels_and_conditioning_image():
    net, (t, x) = small(num_classes=2, cond_channels=1), pictures()
    y, cond = torch.tensor([0, 1, 2]), torch.ones(3, 1, 8, 8)
    v, free = net(t, x, y=y, cond=cond), net(t, x, cond=cond)
    assert_close(v[2], free[2])  # class 2 of 2 is "no label"
    assert all((v[i] - free[i]).abs().max() > 1e-3 for i in (0, 1))
    assert (net(t, x, y=y, cond=2 * cond) - v).abs().max() > 1e-3
    assert v.shape == x.shape and v.dtype == x.dtype
    assert_close(net.float()(t, x.float(), y, cond.double()), v.float(), rtol=1e-3, atol=1e-4)  # of its own precision


def test_a_label_is_added_to_the_embedding_of_time():
    labelled, plain, (t, x) = small(num_classes=2), small(), pictures()
    plain.load_state_dict({k: w for k, w in labelled.state_dict().items() if k != "label.weight"})
    with torch.no_grad():
        plain.embed[2].bias += labelled.label.weight[1]
    assert_close(plain(t, x), labelled(t, x, torch.tensor([1, 1, 1])))


def test_the_least_settings_are_accepted():
    with torch.device("meta"):
        UNet(**{**SMALL, "head_channels": 3, "attention": (8, 4)}, num_classes=1, in_channels=1, out_channels=1)
        net = UNet(2, 1, 1, 2, channel_mult=(1, 1.5), attention=(), blocks=1, head_channels=1)
    assert net.middle[0].conv_out.out_channels == 3 and not any(isinstance(m, Attention) for m in net.down.modules())


def test_gradient_reaches_every_parameter():
    net, (t, x) = small(num_classes=2, cond_channels=1).train(), pictures()
    net(t, x, torch.tensor([0, 1, 2]), x[:, :1]).square().mean().backward()
    assert all(p.grad.abs().sum() > 1e-6 for p in net.parameters())
    assert all(row.abs().sum() > 1e-6 for row in net.label.weight.grad)


@pytest.mark.parametrize("size", [8, 32])
def test_divergence_and_its_gradient(size):
    """A batch of vector-Jacobian products, and the double backward, against finite differences."""
    net, (t, x) = small(image_size=size, attention=(size // 2,)), pictures(1, size=size)
    eps = torch.randn(2, *x.shape, dtype=x.dtype)
    x.requires_grad_()

    def estimates(x):  # eps^T (dv/dx) eps, one for each eps
        return (fm._vjps(net(t, x), x, eps, True) * eps).flatten(1).sum(1)

    with sdpa_kernel(SDPBackend.MATH):
        d = estimates(x)
        h = 1e-5
        jvp = [(net(t, x + h * e) - net(t, x - h * e)) / (2 * h) for e in eps]
        expected = torch.stack([(a * e).sum() for a, e in zip(jvp, eps)])
        assert_close(d, expected, rtol=1e-6, atol=1e-6)
        weight = net.down[1][0].conv_in.weight
        dx, dw = torch.autograd.grad(d[0], (x, weight))
        slope = (estimates(x + h * eps[1]) - estimates(x - h * eps[1]))[0] / (2 * h)
        assert_close((dx * eps[1]).sum(), slope, rtol=1e-5, atol=1e-5)
        step = torch.randn_like(weight)
        with torch.no_grad():
            weight += h * step
        above = estimates(x)[0]
        with torch.no_grad():
            weight -= 2 * h * step
        assert_close((dw * step).sum(), (above - estimates(x)[0]) / (2 * h), rtol=1e-5, atol=1e-5)


def test_bfloat16_autocast_trains():
    net, (t, x) = small(torch.float32, channels=12), pictures(dtype=torch.float32)
    full = net(t, x)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(t, x)
    assert (half - full).norm() < 0.05 * full.norm()
    half.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_compiles_without_a_graph_break():
    net, (t, x) = small(), pictures()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert_close(compiled(t, x), net(t, x))


def test_config_and_weights_survive_a_safe_checkpoint():
    net, file = small(num_classes=2), io.BytesIO()
    torch.save({"config": net.config, "net": net.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = UNet(**state["config"]).double().eval()
    again.load_state_dict(state["net"])
    t, x = pictures()
    assert json.loads(json.dumps(net.config)) == net.config == again.config  # so no tuples
    assert torch.equal(again(t, x), net(t, x))


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
        assert torch.equal(loaded(t, x), net(t, x)) and loaded.config["time_scale"] == 1
    assert UNet.from_adm(other, time_scale=5.0, **SMALL).config["time_scale"] == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(blocks=2), r"down\.2\.0\.norm_in\.weight \(6,\) of 184.*w16 \(6, 6, 3, 3\) of 128"),
        (dict(channels=12), r"embed\.0\.weight \(48, 12\).*module\.w0 \(24, 6\)"),
        (dict(num_classes=2), r"label\.weight \(3, 24\).*module\.w4 \(6, 3, 3, 3\)"),
    ],
)
def test_from_adm_refuses_another_network(change, words):
    with pytest.raises(ValueError, match=words):
        UNet.from_adm(adm(UNet(**SMALL)), **{**SMALL, **change})


def test_from_adm_refuses_too_few_or_too_many_weights():
    state = adm(UNet(**SMALL))
    last = list(state)[-1]
    with pytest.raises(ValueError, match="nothing.*module.more"):
        UNet.from_adm({**state, "module.more": torch.zeros(1)}, **SMALL)
    with pytest.raises(ValueError, match="head.2.bias.*nothing"):
        UNet.from_adm({k: state[k] for k in state if k != last}, **SMALL)
    with pytest.raises(ValueError, match="step"):
        UNet.from_adm({"step": 3}, **SMALL)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(image_size=9), "image_size.*2.*9"),
        (dict(attention=(4, 16)), r"attention.*\[8, 4\].*16"),
        (dict(channels=9), "channels.*2.*9"),
        (dict(blocks=0), "blocks.*0"),
        (dict(num_classes=0), "num_classes.*0"),
        (dict(in_channels=0), "in_channels.*0"),
        (dict(out_channels=0), "out_channels.*0"),
        (dict(head_channels=0), "head_channels.*0"),
        (dict(channels=20, head_channels=6), "head_channels.*40.*6"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        UNet(**{**SMALL, **settings})


@pytest.mark.parametrize(
    ("settings", "call", "words"),
    [
        (dict(), dict(x=torch.zeros(3, 1, 8, 8)), "x must be.*3, 8, 8.*1, 8, 8"),
        (dict(), dict(x=torch.zeros(3, 3, 16, 16)), "x must be.*3, 8, 8.*3, 16, 16"),
        (dict(), dict(t=torch.zeros(2)), "t must be.*3.*2"),
        (dict(), dict(t=torch.zeros(3, 1)), "t must be.*3, 1"),
        (dict(), dict(y=torch.tensor([0, 1, 0])), "y must be.*None"),
        (dict(num_classes=2), dict(y=torch.tensor([0, 1])), "y must be"),
        (dict(num_classes=2), dict(y=torch.tensor([0.0, 1.0, 1.0])), "y must be int64"),
        (dict(num_classes=2), dict(y=torch.tensor([0, 1, 3])), "y must be.*2.*3"),
        (dict(num_classes=2), dict(y=torch.tensor([0, 1, -1])), "y must be.*-1"),
        (dict(), dict(cond=torch.zeros(3, 3, 8, 8)), "cond must be None"),
        (dict(cond_channels=1), dict(), r"cond must be \(3, 1, 8, 8\)"),
        (dict(cond_channels=1), dict(cond=torch.zeros(3, 1, 4, 4)), "cond must be.*3, 1, 4, 4"),
    ],
)
def test_inputs_that_are_refused(settings, call, words):
    net = UNet(**SMALL, **settings)
    with pytest.raises(ValueError, match=words):
        net(**{"t": torch.zeros(3), "x": torch.zeros(3, 3, 8, 8), **call})


@pytest.fixture(scope="module")
def unet_and_its_density():
    torch.manual_seed(0)
    net, x = small(torch.float32, num_classes=2, in_channels=1, out_channels=1), torch.randn(2, 1, 8, 8)
    y = torch.tensor([0, 1])
    back = lambda x: odeint(net, x, (1.0, 0.0), "rk4", 2, y=y).x
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(back, x)
    logdet = torch.stack([torch.linalg.slogdet(jacobian[i, :, :, :, i].reshape(64, 64))[1] for i in range(2)])
    return net, x, y, Normal(0, 1).log_prob(back(x)).flatten(1).sum(1).detach() + logdet


@pytest.mark.parametrize("options", [{}, {"divergence": "hutchinson", "probes": 2}], ids=["exact", "hutchinson"])
@pytest.mark.parametrize("differentiable", [False, True])
def test_appendix_c_likelihood_runs_on_the_network(unet_and_its_density, options, differentiable):
    net, x, y, exact = unet_and_its_density
    record = log_prob(net, x, method="rk4", steps=2, differentiable=differentiable, y=y, **options)
    tolerance = 0.5 if not options else 6 * record.std_err.max().item() + 0.5  # two steps differ from their own Jacobian
    assert_close(record.log_prob, exact, atol=tolerance, rtol=0)
    if differentiable:
        net.zero_grad()
        record.log_prob.sum().backward()
        assert all(p.grad.abs().sum() > 0 for name, p in net.named_parameters() if name != "head.2.bias")
    bpd = bits_per_dim(net, ((x + 4) * 30).byte(), method="rk4", steps=1, y=y, **options)
    assert bpd.bpd.shape == (2,) and bpd.bpd.isfinite().all()


def test_guidance_scale_1_is_none_and_it_goes_through_the_solver():
    net, (_, x) = small(num_classes=2), pictures(3)
    y, steps = torch.tensor([0, 1, 0]), {"method": "euler", "steps": 3}
    plain = odeint(net, x, y=y, **steps).x
    assert_close(odeint(fm.guided(net, 1.0), x, y=y, **steps).x, plain)
    assert_close(odeint(fm.guided(net, 0.0), x, y=y, **steps).x, odeint(net, x, **steps).x)
    t, strong = torch.full((3,), 0.5).double(), fm.guided(net, 3.0)
    assert_close(strong(t, x, y=y), net(t, x) + 3 * (net(t, x, y=y) - net(t, x)))
    field = lambda t, x, z, y=0.0: z * (x + y)  # what is not dropped goes into both calls
    assert_close(fm.guided(field, 3.0)(t, x, y=1.0, z=2.0), 2 * (x + 3))


# ---- Bad input -------------------------------------------------------------------------------------------------------

x, ok = torch.randn(4, 2), lambda t, x, **cond: x
BAD_CALLS = {
    "cfm_loss integer data": (lambda: cfm_loss(ok, OTPath(), torch.ones(4, 2, dtype=torch.long)), "x1 must be a floating"),
    "cfm_loss not a tensor": (lambda: cfm_loss(ok, OTPath(), [[1.0]]), "x1 must be .* got list"),
    "cfm_loss NaN": (lambda: cfm_loss(ok, OTPath(), x.where(x < x.max(), math.nan)), "finite; 1 of its 8"),
    "cfm_loss empty": (lambda: cfm_loss(ok, OTPath(), x[:0]), "B >= 1"),
    "cfm_loss scalar": (lambda: cfm_loss(ok, OTPath(), torch.ones(())), "x1 must be"),
    "cfm_loss x0 shape": (lambda: cfm_loss(ok, OTPath(), x, x0=x[:2]), r"x0 must have the shape of x1, \(4, 2\)"),
    "cfm_loss x0 on VP": (lambda: cfm_loss(ok, VPPath(), x, x0=x), "x0 cannot be paired on VPPath"),
    "cfm_loss x0 on VE": (lambda: cfm_loss(ok, VEPath(), x, x0=x), "x0 cannot be paired on VEPath"),
    "cfm_loss noise and x0": (lambda: cfm_loss(ok, OTPath(), x, x0=x, noise=x), "x0, your pairs, and noise, .* exclude"),
    "cfm_loss noise shape": (lambda: cfm_loss(ok, VPPath(), x, noise=x[:2]), r"noise must have the shape of x1, \(4, 2\)"),
    "cfm_loss t outside": (lambda: cfm_loss(ok, OTPath(), x, t=torch.tensor([0, 0, 1.5, 1])), "t must lie .* to 1.5"),
    "cfm_loss t NaN": (lambda: cfm_loss(ok, OTPath(), x, t=math.nan), "t must lie in"),
    "cfm_loss t beyond the cut": (lambda: cfm_loss(ok, VPPath(), x, t=torch.ones(4)), "t must lie in"),
    "cfm_loss t shape": (lambda: cfm_loss(ok, OTPath(), x, t=torch.rand(4, 1)), r"t must have shape \(\) or \(4,\)"),
    "cfm_loss reduction": (lambda: cfm_loss(ok, OTPath(), x, reduction="sum"), "reduction must be"),
    "cfm_loss cond rows": (lambda: cfm_loss(ok, OTPath(), x, y=torch.ones(3)), "y is no option .* 4 rows; got shape"),
    "cfm_loss cond type": (lambda: cfm_loss(ok, OTPath(), x, y="cat"), "y is no option .* got 'cat'"),
    "cfm_loss cond number": (lambda: cfm_loss(ok, OTPath(), x, y=torch.ones(())), r"y is no option .* got shape \(\)"),
    "cfm_loss v shape": (lambda: cfm_loss(lambda t, x: x[:, :1], OTPath(), x), "v must return the shape of x"),
    "cfm_loss path": (lambda: cfm_loss(ok, OTPath, x), "path must be a ConditionalFlow such as OTPath"),
    "cfm_loss x0 integers": (lambda: cfm_loss(ok, OTPath(), x, x0=x.long()), "x0 must be a floating"),
    "cfm_loss x0 paired": (lambda: cfm_loss(ok, GaussianPath(VEPath().moments, source_std=10.0), x, x0=x), "x0 cannot be paired"),
    "sample path": (lambda: sample(ok, "ot", (2, 2)), "path must be"),
    "sample_sde steps": (lambda: fm.sample_sde(ok, OTPath(), (2, 2), steps=0), "steps must be"),
    "sample_sde cond": (lambda: fm.sample_sde(ok, OTPath(), (2, 2), steps=1, y=3), "2 rows; got 3"),
    "log_prob path": (lambda: log_prob(ok, x, "ot"), "path must be"),
    "odeint one number": (lambda: odeint(ok, x, t=0.5), "two or more"),
    "odeint times nested": (lambda: odeint(ok, x, t=[[0.0, 1.0]]), "two or more"),
    "sample_sde steps 2.5": (lambda: fm.sample_sde(ok, OTPath(), (2, 2), steps=2.5), "steps must be"),
    "odeint max_nfe 7": (lambda: odeint(ok, x, max_nfe=7), "max_nfe must be"),
    "odeint max_nfe 20.5": (lambda: odeint(ok, x, max_nfe=20.5), "max_nfe must be"),
    "Marginal half": (lambda: Marginal(OTPath(), x.half()), "data must be float32"),
    "VPPath inf": (lambda: VPPath(0.1, math.inf), "beta_max"),
    "VPPath 0": (lambda: VPPath(0.0, 0.0), "beta_max"),
    "VEPath inf": (lambda: VEPath(0.1, math.inf), "sigma_max"),
    "VEPath equal": (lambda: VEPath(1.0, 1.0), "sigma_max"),
    "cfm_loss predict": (lambda: cfm_loss(ok, OTPath(), x, predict="x0"), "predict must be"),
    "cfm_loss weight shape": (lambda: cfm_loss(ok, OTPath(), x, weight=lambda t: t[:, None]), "weight must give one number"),
    "cfm_loss score of no density": (lambda: cfm_loss(ok, ConditionalFlow(lambda t, x0, x1: x1), x, predict="score"), "on a GaussianPath, score"),
    "as_velocity path": (lambda: fm.as_velocity(ok, GaussianPath(), "noise"), "path must be affine"),
    "sample_sde path": (lambda: fm.sample_sde(ok, "ot", (2, 2), steps=2), "path must be affine"),
    "sample_sde v shape": (lambda: fm.sample_sde(lambda t, x: x[:, :1], OTPath(), (2, 2), steps=2), "v must return"),
    "cfm_loss weight": (lambda: cfm_loss(ok, OTPath(), x, weight="beta"), "'beta' on VPPath"),
    "cfm_loss weight name": (lambda: cfm_loss(ok, VPPath(), x, weight="sigma"), "weight must be"),
    "convert source": (lambda: OTPath().convert(0.5, x, x, "eps", "data"), "source must be"),
    "ot_coupling shapes": (lambda: fm.ot_coupling(x, x[:2]), "x0 and x1 must"),
    "AffinePath backwards": (lambda: sample(ok, AffinePath(lambda t: 1 - t, lambda t: t), (2, 2)), r"sigma\(0\) must be > 0"),
    "OTPath sigma_min < 0": (lambda: OTPath(-0.1), "sigma_min must lie in"),
    "OTPath sigma_min 1": (lambda: OTPath(1.0), "sigma_min must lie in"),
    "VPPath betas": (lambda: VPPath(5.0, 1.0), "0 <= beta_min <= beta_max > 0"),
    "VEPath sigmas": (lambda: VEPath(0.0, 1.0), "0 < sigma_min < sigma_max"),
    "Marginal path": (lambda: Marginal(GaussianPath(), x), "path must be affine"),
    "Marginal data": (lambda: Marginal(OTPath(), x[:0]), "data must be"),
    "Marginal t": (lambda: Marginal(OTPath(), x)(1.5, x), "t must lie in"),
    "Marginal x NaN": (lambda: Marginal(OTPath(), x)(0.5, x * math.nan), "x must be finite"),
    "Marginal x dims": (lambda: Marginal(OTPath(), x)(0.5, torch.ones(3, 5)), "x must be 2-dimensional"),
    "Marginal x dtype": (lambda: Marginal(OTPath(), x)(0.5, x.double()), "x must be .*float32"),
    "odeint method": (lambda: odeint(ok, x, method="heun"), "method must be one of euler, midpoint, rk4, dopri5; got 'heun'"),
    "odeint no steps": (lambda: odeint(ok, x, method="euler"), "euler needs steps"),
    "odeint steps 0": (lambda: odeint(ok, x, method="rk4", steps=0), "rk4 needs steps.*got 0"),
    "odeint steps 2.5": (lambda: odeint(ok, x, method="rk4", steps=2.5), "whole number"),
    "odeint few steps": (lambda: odeint(ok, x, (0, 0.5, 1), method="rk4", steps=1), "each of the 2 intervals"),
    "odeint dopri5 steps": (lambda: odeint(ok, x, steps=10), "steps = 10 does not go with dopri5"),
    "odeint euler rtol": (lambda: odeint(ok, x, method="euler", steps=3, rtol=1e-3), "are for dopri5"),
    "odeint euler atol": (lambda: odeint(ok, x, method="euler", steps=3, atol=1e-3), "are for dopri5"),
    "odeint euler max_nfe": (lambda: odeint(ok, x, method="euler", steps=3, max_nfe=10), "are for dopri5"),
    "odeint tolerances 0": (lambda: odeint(ok, x, rtol=0, atol=0), "not both 0"),
    "odeint tolerance < 0": (lambda: odeint(ok, x, rtol=-1e-3), "rtol and atol must be"),
    "odeint rtol < 0": (lambda: odeint(ok, x, rtol=-1e-3, atol=1.0), "rtol and atol must be"),
    "odeint atol < 0": (lambda: odeint(ok, x, rtol=1.0, atol=-1e-3), "rtol and atol must be"),
    "odeint tolerance inf": (lambda: odeint(ok, x, rtol=math.inf), "rtol and atol must be"),
    "odeint tolerance NaN": (lambda: odeint(ok, x, rtol=math.nan), "rtol and atol must be"),
    "odeint times equal": (lambda: odeint(ok, x, (0, 0.5, 0.5, 1)), "strictly rising or strictly falling"),
    "odeint times turn": (lambda: odeint(ok, x, (0, 1, 0.5)), "strictly rising"),
    "odeint times collapse": (lambda: odeint(ok, x, (0.5, 0.5 + 1e-12)), "in torch.float32"),
    "odeint one time": (lambda: odeint(ok, x, (0.5,)), "two or more"),
    "odeint times NaN": (lambda: odeint(ok, x, (0, math.nan)), "finite times"),
    "odeint times inf": (lambda: odeint(ok, x, (0, math.inf)), "finite times"),
    "odeint x NaN": (lambda: odeint(ok, x * math.nan), "x must be finite"),
    "odeint x int": (lambda: odeint(ok, torch.ones(2, 2, dtype=torch.int)), "x must be a floating"),
    "odeint typo": (lambda: odeint(ok, x, step=10), "step is no option here.*got 10"),
    "odeint v shape": (lambda: odeint(lambda t, x: x.sum(1), x), r"v must return the shape of x, \(4, 2\)"),
    "log_prob divergence": (lambda: log_prob(ok, x, divergence="trace"), "divergence must be"),
    "log_prob probes 0": (lambda: log_prob(ok, x, divergence="hutchinson", probes=0), "probes must be"),
    "log_prob probes 2.5": (lambda: log_prob(ok, x, divergence="hutchinson", probes=2.5), "probes must be"),
    "log_prob probes exact": (lambda: log_prob(ok, x, probes=3), "goes with divergence='hutchinson'"),
    "log_prob data": (lambda: log_prob(ok, x.int()), "x1 must be"),
    "log_prob cond": (lambda: log_prob(ok, x, y=torch.ones(2)), "4 rows"),
    "log_prob v shape": (lambda: log_prob(lambda t, x: x[:, :1], x), "v must return"),
    "bits_per_dim float": (lambda: bits_per_dim(ok, x), "images must be uint8.*float32"),
    "bits_per_dim empty": (lambda: bits_per_dim(ok, torch.zeros(0, 3, dtype=torch.uint8)), "images must be uint8"),
    "bits_per_dim list": (lambda: bits_per_dim(ok, [[0, 255]]), "images must be uint8.*list"),
    "bits_per_dim rows": (lambda: bits_per_dim(ok, torch.zeros(3, dtype=torch.uint8)), r"images must be uint8.*\(3,\)"),
    "bits_per_dim K 1.5": (lambda: bits_per_dim(ok, torch.zeros(1, 3, dtype=torch.uint8), K=1.5), "K must be"),
    "bits_per_dim K": (lambda: bits_per_dim(ok, torch.zeros(1, 3, dtype=torch.uint8), K=0), "K must be"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_met_at_the_door(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


# ---- The file, the scripts and the README ----------------------------------------------------------------------------


def run(*command, cwd=HERE, timeout=120, **env):
    """A command line as a user types it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True)


README = (HERE / "README.md").read_text(encoding="utf-8")


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS += re.findall(r"`((?:python|torchrun) [^`]+)`", README)
SHORT_TOY, SHORT_CIFAR = re.findall(r"append\s`(--[^`]+)`", README)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_readme_python_runs_where_there_is_torch_and_the_module_alone(tmp_path, block):
    (tmp_path / "flow_matching.py").write_text((HERE / "flow_matching.py").read_text(encoding="utf-8"), encoding="utf-8")
    alone = "import sys\nfor name in ('numpy', 'torchvision', 'scipy', 'PIL'): sys.modules[name] = None\n"
    quiet = "import torch\nbefore = torch.get_rng_state()\nimport flow_matching\nassert torch.equal(before, torch.get_rng_state())\n"
    (tmp_path / "example.py").write_text(alone + quiet + BLOCKS[block], encoding="utf-8")
    done = run("-W", "error", "-W", "ignore:Failed to initialize NumPy", "example.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    if "guided" in BLOCKS[block]:  # labels follow their samples
        shares = [float(share) for share in re.findall(r"^guidance .*: (\d\.\d+)", done.stdout, re.M)]
        assert 0.75 < shares[0] < shares[1] and shares[1] > 0.95
    else:
        assert done.stdout.count("tensor(") == 2


SECTIONS = {  # each with the helpers at the top, and nothing else of the file
    "12": "assert cfm_loss(lambda t, x: x, OTPath(), torch.randn(4, 2)) > 0",
    "4": "assert odeint(lambda t, x: -x, torch.ones(3, 2)).x.sub(math.exp(-1)).abs().max() < 1e-4",
    "45": "assert log_prob(lambda t, x: 0 * x, torch.zeros(3, 2)).log_prob.add(math.log(2 * math.pi)).abs().max() < 1e-4",
    "6": "assert UNet(8, channels=8, channel_mult=(1, 1), attention=(), head_channels=8)(0.5, torch.randn(2, 3, 8, 8)).shape == (2, 3, 8, 8)",
}


@pytest.mark.parametrize("numbers", SECTIONS)
def test_sections_of_the_module_work_alone(numbers, tmp_path):
    top, *sections = re.split(r"^(?=# ---- \d )", (HERE / "flow_matching.py").read_text(encoding="utf-8"), flags=re.M)
    assert [section[7] for section in sections] == list("123456")
    text = top + "".join(sections[int(n) - 1] for n in numbers) + SECTIONS[numbers] + "\n"
    exec(compile(text, "part", "exec"), {"__name__": "part"})


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory):
    """Every train_toy.py line of the README, shortened by the flags that it shows: {flags: (printed, folder)}."""
    import train_toy

    runs, out, here = {}, io.StringIO(), os.getcwd()
    os.chdir(tmp_path_factory.mktemp("toy"))
    try:
        for line in COMMANDS:
            loop = re.fullmatch(r"for (\w+) in (.*); do (.*); done", line)
            name, values, line = loop.groups() if loop else ("s", "once", line)
            runs_here = line.startswith("python train_toy.py") and (SCIPY or "--ablation" not in line)
            for value in values.split() if runs_here else ():
                flags = line.replace(f"${name}", value).split()[2:]
                with redirect_stdout(io.StringIO()) as out:
                    train_toy.main([*flags, *SHORT_TOY.split()])
                folder = Path(flags[flags.index("--out") + 1] if "--out" in flags else "runs/toy")
                files = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".part"}
                runs[" ".join(flags)] = out.getvalue(), files
    finally:
        os.chdir(here)
    return runs


def test_readme_toy_commands_run(toy_runs):
    assert len(toy_runs) == 9 + SCIPY and {"--path ot", "--path ot vp cosine", "--figure conditional"} < toy_runs.keys()
    for flags, (text, files) in toy_runs.items():
        if "--figure" not in flags:
            assert {"density.png", "nfe.png", "trajectories.png", "likelihood.png", "metrics.json", "table.txt"} < files.keys()
            assert files["table.txt"].decode().strip() in text and "floor" in text
            results = json.loads(files["metrics.json"])["results"]
            panels = np.asarray(Image.open(io.BytesIO(files["likelihood.png"])).convert("L"), dtype=float)[40:300, -588:]
            assert abs(panels[:, :288] - panels[:, 300:]).mean() > 5  # learned beside true
            for name in results:
                assert len(re.findall(rf"^{name} .*$", text, re.M)) == 3  # midpoint, Euler and RK4


def test_readme_shows_the_tables_that_the_toy_prints(toy_runs):
    printed = toy_runs["--path ot"][0].splitlines()
    heads = [line for line in README.splitlines() if re.match(r"gap: |NFE, max: |columns 4 |  +gap |(euler|rk4) +4 |arc length", line)]
    assert len(heads) >= 10
    for line in heads:
        assert line in printed + toy_runs["--figure conditional"][0].splitlines(), line


@needs_scipy
def test_table_1_ablation_has_a_row_per_method(toy_runs, tmp_path):
    import train_toy

    files = toy_runs["--ablation"][1]
    results = json.loads(files["metrics.json"])["results"]
    assert list(results) == ["DDPM", "score matching", "ScoreFlow", "FM, diffusion", "FM, OT", "minibatch OT", "reflow"]
    for name, r in results.items():
        assert (r["excess"] is None) == (name in ("minibatch OT", "reflow")) and r["straightness"] >= 1 and len(r["energy"]) == 15
    (tmp_path / "model.pt").write_bytes(files["model_score_matching.pt"])
    flow = train_toy.load(tmp_path / "model.pt")
    assert flow.net.predict == "score" and flow.path == VPPath() and flow.sample(3, method="euler", steps=2).shape == (3, 2)


def test_figure_3_conditional_paths_are_straight_for_ot_and_ve_and_bend_for_vp(toy_runs):
    text, files = toy_runs["--figure conditional"]
    assert {"fields.png", "paths.png"} <= files.keys()
    bend = {" ".join(kind.split()): float(mean) for kind, mean in re.findall(r"^(\w+ +\w+) +([\d.]+) +[\d.]+$", text, re.M)}
    assert bend["conditional ot"] == bend["conditional ve"] == 1.0
    assert 1.22 < bend["conditional vp"] < 1.32 and abs(bend["conditional cosine"] - bend["conditional vp"]) < 0.01
    assert bend["marginal ot"] > 1.5  # the marginal flow is another thing
    stds = [float(std) for std in re.findall(r"^ ?\d+ +(\d\.\d\d)$", text, re.M)]
    assert stds == [0.0, 0.5, 0.72, 0.85, 0.92, 0.96]


def test_readme_table_names_functions_and_tests_that_exist():
    rows = re.findall(r"^\|[^|]+\| `(\w+)` \| `(test_\w+)` \|$", README, re.M)
    assert len(rows) >= 12
    for function, test in rows:
        assert hasattr(fm, function) and callable(globals()[test]), (function, test)
    numbers = lambda text: {n for a, b in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", text) for n in range(int(a), int(b or a) + 1)}
    table = README.split("## What is where")[1].split("Test everything")[0]
    assert numbers(table) <= numbers((HERE / "flow_matching.py").read_text(encoding="utf-8"))
    assert numbers(table) >= {1, 6, 8, 10, 11, *range(14, 24), 26, 33, 34, 37, 47}


def test_train_toy_from_the_command_line_and_the_flow_it_wrote(tmp_path):
    import train_toy

    done = run("-W", "error", "train_toy.py", "--path", "ve", "--steps", 20, "--batch", 64, "--samples", 60, "--data", "8gaussians", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    flow = train_toy.load(tmp_path / "model_ve.pt")
    assert flow.path == VEPath() and flow.sample(3, method="euler", steps=2).shape == (3, 2)
    axis = torch.linspace(-12, 12, 60) + flow.shift[0]
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    mass = flow.log_prob(grid, rtol=1e-3, atol=1e-3).exp().sum() * (24 / 59) ** 2
    assert abs(mass - 1) < 0.02  # the standardisation's Jacobian is in it


def toy(*flags, row=None):
    """Settings of train_toy.py, and their data."""
    import train_toy

    args = train_toy.parse_args([*flags, "--out", "."])  # a folder that is there
    return args.rows[row or args.path[0]], args.target


def test_toy_numbers_of_an_exact_field():
    import train_toy

    args, _ = toy("--samples", "4000")
    data, path = train_toy.Mixture(torch.tensor([[3.0, -1.0]]), 2.0), OTPath()  # N((3, -1), 4 I): closed forms for all

    class Exact(torch.nn.Module):
        predict = "velocity"

        def forward(self, t, x):
            return data.field(path)(t, x)

    net = Exact()
    net.path = path
    flow = train_toy.Flow(net, data.shift, data.scale)
    x = flow.sample(4000, method="rk4", steps=20)
    assert_close((x.mean(0), x.std(0)), (torch.tensor([3.0, -1.0]), torch.full((2,), 2.0)), atol=0.15, rtol=0)
    r = train_toy.measure(flow, data, args)
    assert_close(r["entropy"], 1 + math.log(2 * math.pi * 4), atol=0.02, rtol=0)
    assert_close((r["gap"], r["nll_se"]), (0.0, 1 / math.sqrt(4000)), atol=0.05, rtol=0)
    assert_close((r["floor"], r["loss"], r["excess"]), (math.pi / 2, math.pi / 2, 0.0), atol=0.03, rtol=0)
    assert 14 < r["nfe_mean"] < 60 and r["nfe_max"] >= r["nfe_mean"] and abs(r["energy"]["dopri5"]) < 0.02
    assert r["nll_se"] < 0.02 and r["straightness"] > 100  # in to 0.7 and out again, to where they came from
    r |= {"seconds": 12.5, "straightness": 1.23, "loss": 1.75, "floor": 1.5, "excess": 0.25}
    lines = train_toy.table({"row": r}).splitlines()
    at = next(i for i, line in enumerate(lines) if "floor " in line and "excess " in line and "seconds" in line)
    shown = dict(zip(lines[at].replace("gap", "gap se").split(), lines[at + 1].replace("±", "").split()[1:]))
    for name, key in {"gap": "gap", "se": "nll_se", "loss": "loss", "floor": "floor", "excess": "excess", "NFE": "nfe_mean", "max": "nfe_max",
                      "arc": "straightness"}.items():  # fmt: skip
        assert_close(float(shown[name]), float(r[key]), atol=0.051, rtol=0)
    assert shown["seconds"] == "12.5" and float(shown["8"]) == round(r["energy"]["midpoint 8"], 4)


@pytest.mark.parametrize("path", [OTPath(), VPPath(), VEPath()], ids=lambda path: type(path).__name__)
def test_toy_network_begins_with_the_exact_answer_to_gaussian_data(path):
    import train_toy

    t, _, x = batch(6, 2, torch.float32)
    u = train_toy.Mixture(torch.zeros(1, 2), 1.0).field(path)(t, x)  # of N(0, I)
    for predict in ("velocity", "noise", "score"):
        net = train_toy.Net(path, predict)
        torch.nn.init.zeros_(net.layers[-1].weight), torch.nn.init.zeros_(net.layers[-1].bias)
        assert_close(net(t, x), path.convert(t, x, u, "velocity", predict), atol=1e-4, rtol=1e-4)


def test_toy_pictures_are_the_right_way_up(tmp_path):
    import train_toy

    picture = Image.new("L", (9, 9), 255)
    picture.paste(0, (0, 0, 3, 3))  # dark at the top left, and a little at the bottom right
    picture.putpixel((8, 8), 0)
    picture.save(tmp_path / "corner.png")
    x = train_toy.make_data(str(tmp_path / "corner.png")).sample(500)
    assert x[:, 0].median() < 0 < x[:, 1].median()
    bins = train_toy.histogram(torch.tensor([[-0.9, 0.9]]).expand(10, 2), 1.0)
    assert bins[:10, :10].sum() == bins.sum() and abs(bins.sum() * (2 / 96) ** 2 - 1) < 1e-5
    arrows = np.asarray(train_toy.draw_field(torch.tensor([0.6, 0.8]).expand(96**2, 2)).convert("L"))
    assert arrows[3:9, 14:20].max() == 255 > arrows[16:21, 4:10].max()  # up and to the right of the dot at (12, 12)
    grid = train_toy.grid_of(1.0)
    assert (train_toy.histogram(grid, 1.0) > 0).all() and grid[0, 0] < 0 < grid[0, 1]


def test_train_toy_keeps_the_old_file_when_the_disk_is_full(tmp_path):
    import train_toy

    file = tmp_path / "model.pt"
    file.write_text("old")

    def save(part):
        part.write_text("ne")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(SystemExit, match="model.pt cannot be written, what was there stands"):
        train_toy.write(file, save)
    assert [f.name for f in tmp_path.iterdir()] == ["model.pt"] and file.read_text() == "old"


def test_eq46_toy_networks_of_every_objective_learn_the_same_field():
    import train_toy

    for objective in fm.OBJECTIVES:
        excess = []
        for steps in ("1", "300"):
            args, data = toy("--path", "vp", "--objective", objective, "--data", "8gaussians", "--steps", steps, "--batch", "256")
            flow, _ = train_toy.train("vp", args, data)
            x1 = data.sample(2000)
            excess.append(train_toy.regression(flow, data, args, torch.randn_like(x1), x1, None)["excess"])
        assert excess[1] < 0.4 * excess[0], objective


@needs_scipy
def test_reflow_and_minibatch_coupling_straighten_and_sde_samples_agree():
    import train_toy

    measured = {}
    for flags in ("", "--reflow 1", "--coupling ot", "--sde 1"):
        args, data = toy("--data", "8gaussians", "--steps", "300", "--batch", "128", "--samples", "500", *flags.split())
        flow, _ = train_toy.train("ot", args, data)
        measured[flags] = train_toy.measure(flow, data, args)
    arc = {flags: r["straightness"] for flags, r in measured.items()}
    assert arc["--reflow 1"] < 1 + 0.3 * (arc[""] - 1) and arc["--coupling ot"] < 1 + 0.5 * (arc[""] - 1)
    fast = {flags: r["energy"]["midpoint 4"] for flags, r in measured.items()}
    assert fast["--reflow 1"] < 0.1 * fast[""] and fast["--coupling ot"] < 0.1 * fast[""]  # few steps suffice then
    sde = {nfe: measured["--sde 1"]["energy"][f"sde {nfe}"] for nfe in (4, 20, 100)}
    assert sde[4] > 0.05 and sde[20] < 0.02 and sde[100] < 0.01


def test_toy_data_densities_and_fields_are_exact(tmp_path):
    import train_toy

    Image.fromarray(np.kron(np.array([[0, 255], [255, 0]], dtype=np.uint8), np.ones((6, 6), dtype=np.uint8))).save(tmp_path / "two.png")
    for name in ("checkerboard", "moons", "8gaussians", "spirals", "rings", str(tmp_path / "two.png")):
        data = train_toy.make_data(name)
        x = data.sample(4000)
        assert abs(x.square().mean() - 1) < 0.1 and x.mean(0).abs().max() < 0.08
        assert data.log_prob(x).isfinite().all()
        width = 4 * data.scale
        grid = (torch.rand(30_000, 2) * 2 - 1) * width / data.scale
        mass = data.log_prob(grid).double().exp().mean() * (2 * width) ** 2
        assert abs(mass - 1) < 0.12, name
        for path in (OTPath(), VPPath()):  # u_t = E[dx_t | x_t]: orthogonal to what is left of the target
            t = torch.rand(len(x)) * 0.9
            x_t, dx_t = path.psi_dpsi(t, torch.randn_like(x), x)
            u = data.field(path)(t, x_t)
            rest = (dx_t - u).double()
            for probe in (u, x_t, torch.sin(3 * x_t), torch.ones_like(u)):
                z = (rest * probe).sum(1)
                assert abs(z.mean()) < 4.5 * z.std() / math.sqrt(len(z)), (name, path)
    assert_close(-train_toy.Checkerboard().log_prob(torch.tensor([[0.1, 0.1]])), torch.tensor([3.6765]), atol=1e-4, rtol=0)


BAD_TOY = {
    "--path nowhere": "--path", "--steps 0": "--steps must be at least 1", "--steps many": "--steps", "--batch -3": "--batch must be", "--samples 0": "--samples must be",
    "--lr 0": "--lr must be", "--lr nan": "--lr must be", "--data missing.png": "missing.png", "--data README.md": "--data",
    "--reflow -1": "--reflow must be", "--sde -1": "--sde must be", "--sigma-min 1": "--sigma-min 1.0: sigma_min must lie in [0, 1)",
    "--sigma-min -1": "--sigma-min", "--seed -1": "--seed must be", "--samples 1": "--samples must be", "--figure nine": "--figure",
    "--objective noise": "--objective noise: noise does not tell velocity at t = 0", "--objective eps": "--objective",
    "--ablation --objective noise": "leave out --objective", "--ablation --figure conditional": "leave out --figure",
    "--path vp --sigma-min 0.1": "--sigma-min is of the OT path",
    "--objective score --path cosine": "score does not tell velocity", "--objective scoreflow --path ve": "'beta' on VPPath",
    "--coupling ot --path vp": "--path vp --coupling ot: x0 cannot be paired", "--reflow 1 --path ve": "x0 cannot be paired on VEPath",
    "--sde 1 --reflow 1": "the SDE needs the score", "--sde 0.1 --coupling ot": "the SDE needs the score", "--coupling best": "--coupling",
    "--device gpu9": "--device gpu9", "--out README.md": "--out", "--seed x": "--seed", "--pth ot": "--pth",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_TOY)
def test_train_toy_refuses_bad_command_lines(line, capsys, monkeypatch):
    import train_toy

    monkeypatch.chdir(HERE)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in HERE.iterdir() if p.is_file())
    with pytest.raises(SystemExit) as e:
        train_toy.main(line.split())
    error = capsys.readouterr().err
    words = BAD_TOY[line] if SCIPY or BAD_TOY[line] in error else "pip install scipy"
    assert e.value.code == 2 and words in error.splitlines()[-1] and "Traceback" not in error
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in HERE.iterdir() if p.is_file())


# ---- train_cifar.py on a tiny network --------------------------------------------------------------------------------

NET = "--size 8 --channels 12 --channel-mult 1,1 --head-channels 12 --blocks 1 --attention 4".split()
TINY = [*NET, *"--batch 8 --warmup 2 --lr 1e-3 --every 2,3,100 --solver euler:2".split()]


def paint(folder, n, start=0):
    """n random photos of odd sizes, in two subfolders."""
    for i in range(start, start + n):
        g = torch.Generator().manual_seed(i)
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (9 + i % 3, 11, 3), dtype=torch.uint8, generator=g).numpy()).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paint(folder / "train", 20)
    paint(folder / "test", 6, 100)
    return folder


@pytest.fixture
def cifar(photos, tmp_path, monkeypatch, capsys):
    """cifar("--steps 3") trains the tiny network in tmp_path/run and gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def cifar(flags="", out="run", new=True):
        argv = ["--out", str(tmp_path / out), *([*TINY, "--data", str(photos / "train")] if new else []), *flags.split()]
        try:
            code = train_cifar.main(argv)
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return cifar


def image(file):
    with Image.open(file) as opened:
        opened.load()
    return opened


def read(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)


def assert_same(a, b):
    """Equal bit for bit, whatever the nesting."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_run(a, b):
    for part in ("step", "net", "ema", "optimizer", "sums", "log_bytes", "config"):
        assert_same(read(a)[part], read(b)[part])
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()


# A fork server that has imported torch once: processes to kill, starve and pair for the price of a fork.
FORK = None
if "forkserver" in multiprocessing.get_all_start_methods():  # not on Windows
    FORK = multiprocessing.get_context("forkserver")
    FORK.set_forkserver_preload(["torch.distributed", "torch.optim.swa_utils", "PIL.Image", "pytest", "torch._dynamo"])


def child(argv, env, cwd, trick, stderr):
    """A process of its own: applies a trick by name, runs main, exits with its code."""
    os.environ.update(env)
    os.chdir(cwd)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    tricks[trick]() if trick else None
    raise SystemExit(train_cifar.main(argv))


def kill_in_write():
    """SIGKILL when the second checkpoint is half written."""
    save, calls = torch.save, []

    def half(state, f):
        calls.append(1)
        if len(calls) == 2:
            f.write(b"PK half a checkpoint")
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, f)

    torch.save = half


def kill_in_rename():
    """SIGKILL after checkpoint.pt became the previous one and before the new one takes its place."""
    replace = os.replace

    def stop(a, b):
        replace(a, b)
        if str(b).endswith("prev.pt"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = stop


def fill_disk():
    """The first checkpoint fits, the second meets a full disk."""
    save = torch.save

    def starve(state, f):
        save(state, f)
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    torch.save = starve


def signal_at_step(number):
    report = train_cifar.report

    def press(s, step, *args):
        if step == 4:
            os.kill(os.getpid(), number)
        return report(s, step, *args)

    train_cifar.report = press


tricks = dict(kill_in_write=kill_in_write, kill_in_rename=kill_in_rename, fill_disk=fill_disk,
              sigterm=lambda: signal_at_step(signal.SIGTERM), sigint=lambda: signal_at_step(signal.SIGINT))  # fmt: skip


@pytest.fixture
def fork(photos, tmp_path):
    """fork("--steps 3", trick) runs train_cifar in processes; gives exit codes and what they printed."""
    if FORK is None:
        pytest.skip("processes are forked here, which Windows cannot")

    def fork(flags, trick=None, world=1, out="run"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        argv = ["--out", str(tmp_path / out), *TINY, "--data", str(photos / "train"), *flags.split()]
        processes = []
        for rank in range(world):
            env = dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) if world > 1 else {}
            processes.append(FORK.Process(target=child, args=(argv, env, str(tmp_path), trick, f"{tmp_path}/text{rank}")))
            processes[-1].start()
        for p in processes:
            p.join(60)
            p.kill()
        return [p.exitcode for p in processes], "".join((tmp_path / f"text{rank}").read_text() for rank in range(world))

    return fork


# ---- train_cifar.py: nothing is lost ---------------------------------------------------------------------------------


def test_resumed_equals_uninterrupted_bit_for_bit(cifar, tmp_path):
    flags = "--dropout 0.2 --conditional --steps "
    assert cifar(flags + "9", out="whole")[0] == 0
    assert cifar(flags + "5", out="parts")[0] == 0
    code, text, _ = cifar("--steps 9", out="parts", new=False)  # the rest of the settings comes from the checkpoint
    assert code == 0 and "--steps was 5 and is 9" in text and text.count("note: ") == 1
    assert "  batch=8  " in text and "classes=" not in text and "None" not in text
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*.unusable"))  # a good checkpoint stays where it is
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert {"images", "loss", "loss_by_t", "grad_norm", "lr", "world_size"} <= lines[0].keys()
    assert len(lines[0]["loss_by_t"]) == 10 and lines[-1]["images"] == 64


def test_the_average_in_the_checkpoint_follows_the_weights(cifar, tmp_path):
    assert cifar("--steps 3 --decay linear --ema 0 --batch 20", out="none")[0] == 0  # all images in every batch
    assert cifar("--steps 3 --decay linear --batch 20", out="some")[0] == 0
    none, some = read(tmp_path / "none"), read(tmp_path / "some")
    assert_same(none["net"], none["ema"])
    assert_same(none["net"], some["net"])
    assert some["optimizer"]["param_groups"][0]["lr"] == 1e-8  # that of the last step
    torch.manual_seed(0)
    first = UNet(**some["network"]).state_dict()
    for other in ("net", "first"):
        assert max((some["ema"][k] - (first if other == "first" else some["net"])[k]).abs().max() for k in first) > 1e-5


@pytest.mark.parametrize("trick, code", [("sigterm", 143), ("sigint", 130)])
def test_signals_save_and_exit_cleanly(cifar, fork, tmp_path, trick, code):
    (got,), text = fork("--steps 7", trick)
    assert got == code and "Traceback" not in text and "stopped and saved at step 5" in text
    assert read(tmp_path / "run")["step"] == 5
    assert cifar("--steps 7")[0] == 0 and cifar("--steps 7", out="whole")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_signal_in_the_last_step_changes_nothing(fork, tmp_path):
    (code,), text = fork("--steps 5", "sigint")
    assert code == 0 and "done and saved at step 5" in text and (tmp_path / "run" / "samples" / "step_5.png").exists()


def test_three_signals_wait_for_the_step_and_the_fourth_does_not(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    caught = train_cifar.catch_signals()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        handlers[number](number, None)
    assert caught == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM] and len(handlers) == 2
    with pytest.raises(KeyboardInterrupt):
        handlers[signal.SIGTERM](signal.SIGTERM, None)


@pytest.mark.parametrize("trick", ["kill_in_write", "kill_in_rename"])
def test_killed_while_saving_resumes_from_the_last_complete_checkpoint(cifar, fork, tmp_path, trick):
    (code,), _ = fork("--steps 9", trick)
    assert code == -signal.SIGKILL and read(tmp_path / "run", "checkpoint.pt" if "write" in trick else "checkpoint.prev.pt")["step"] == 3
    code, text, _ = cifar("--steps 9")
    assert code == 0 and "from step 3" in text and cifar("--steps 9", out="whole")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_file_is_on_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(b.name) or replace(a, b))
    file, old = tmp_path / "file", tmp_path / "old"
    for text, want in (b"one", [3, "file"]), (b"second", [6, "old", "file"]):
        with train_cifar.replacing(file, keep=old) as f:
            f.write(text)
        assert done == want and file.read_bytes() == text
        done.clear()
    with pytest.raises(ZeroDivisionError), train_cifar.replacing(file) as f:
        f.write(b"third %d" % (1 / 0))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"second", "old": b"one"}


def test_full_disk_ends_with_a_message_and_leaves_the_last_checkpoint(cifar, fork, tmp_path):
    (code,), text = fork("--steps 9", "fill_disk")
    assert code == 1 and "Traceback" not in text and "step 6 cannot be saved" in text and "too large" in text
    assert read(tmp_path / "run")["step"] == 3 and not list((tmp_path / "run").glob("*.part"))
    assert cifar("--steps 9")[0] == 0


def test_unusable_checkpoints_are_named_and_the_previous_one_is_used(cifar, tmp_path):
    assert cifar("--steps 7")[0] == 0
    folder, good = tmp_path / "run", (tmp_path / "run" / "checkpoint.prev.pt").read_bytes()
    assert read(folder, "checkpoint.prev.pt")["step"] == 6
    whole = (folder / "checkpoint.pt").read_bytes()
    torch.save({"net_model": {}, "step": 3}, tmp_path / "foreign.pt")
    torch.save(dict(read(folder), version=2), tmp_path / "future.pt")
    for bad, words in ((whole[:-700], "cut short"), ((tmp_path / "foreign.pt").read_bytes(), "no checkpoint of train_cifar"),
                       ((tmp_path / "future.pt").read_bytes(), "version 2"), (b"", "cut short")):  # fmt: skip
        (folder / "checkpoint.pt").write_bytes(bad)
        (folder / "checkpoint.prev.pt").write_bytes(good)
        code, text, err = cifar("--steps 7")
        assert code == 0 and words in err and "from step 6" in text
        assert read(folder)["step"] == 7 and (folder / "checkpoint.unusable").read_bytes() == bad
    (folder / "checkpoint.pt").write_bytes(b"x")
    (folder / "checkpoint.prev.pt").write_bytes(b"y")
    code, _, err = cifar("--steps 7")
    assert code == 2 and "not usable" in err and (folder / "checkpoint.pt").read_bytes() == b"x"


@pytest.mark.parametrize("state, rank, kept", [(None, 0, b""), (4, 0, b"1\n2\n"), (99, 0, b"1\n2\n3\n"), (4, 1, None)])
def test_the_log_is_cut_to_what_the_checkpoint_knows_by_one_rank(tmp_path, capsys, state, rank, kept):
    (tmp_path / "log.jsonl").write_bytes(b"1\n2\n3\n")
    s = train_cifar.Namespace(**{**train_cifar.MODERN, "batch": 6, "steps": 7}, out=tmp_path, rank=rank, world=2)
    state = dict(log_bytes=state, config={}) if state else None
    log = train_cifar.start(s, state, 0, torch.nn.Linear(2, 1), (range(12), None))
    assert "3 parameters, 12 images, 2 ranks of 3 a step, 3.5 epochs, from step 0" in capsys.readouterr().out
    assert log is None if rank else (log.tell(), log.close()) == (len(kept), None)
    assert rank or (tmp_path / "log.jsonl").read_bytes() == kept


def test_report_logs_means_since_the_last_line_and_prints_the_pace(monkeypatch, capsys):
    monkeypatch.setattr(train_cifar.time, "perf_counter", lambda: 110.0)
    s = train_cifar.Namespace(**{**train_cifar.MODERN, "batch": 8, "steps": 60, "warmup": 10}, every=(2, 3, 9), world=2,
                              device=torch.device("cpu"))  # fmt: skip
    sums, log = [1.0, 0.0, *[6.0] * 8, 2.0, 0.0, *[1.0] * 8, 5.0], io.BytesIO()  # losses and counts by t, gradient norm
    assert train_cifar.report(s, 5, sums, log, (100.0, 0)) == sums
    assert not log.getvalue() and not capsys.readouterr().out  # nothing is due
    assert train_cifar.report(s, 6, sums, log, (100.0, 2)) == [0.0] * 21
    by_t, lr = [0.5, None, *[6.0] * 8], pytest.approx(0.6 * s.lr, rel=1e-3)
    want = dict(step=6, images=48, loss=4.9, loss_by_t=by_t, grad_norm=4.0, lr=lr, world_size=2)
    assert json.loads(log.getvalue()) == want and log.getvalue().endswith(b"}\n")
    assert "step 6/60  loss 4.9000  3 images/s  0:02:15 left  " in capsys.readouterr().out
    assert train_cifar.report(s, 6, sums, None, (100.0, 2)) == [0.0] * 21  # the other ranks have no log


def test_nonfinite_loss_stops_before_the_weights_are_harmed(cifar, tmp_path, monkeypatch):
    assert cifar("--steps 4", out="good")[0] == 0
    loss, calls = train_cifar.cfm_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        return loss(*args, **kwargs) * (math.nan if len(calls) == 6 else 1)  # the first call tries the settings

    monkeypatch.setattr(train_cifar, "cfm_loss", broken)
    code, _, err = cifar("--steps 9")
    assert code == 1 and "step 4: loss nan" in err and "--lr" in err and err.count("\n") == 1
    for part in ("net", "ema", "optimizer"):
        assert_same(read(tmp_path / "run")[part], read(tmp_path / "good")[part])


# ---- train_cifar.py: one batch, however it is split ------------------------------------------------------------------


@pytest.mark.parametrize("world, flags, objective", [(2, " --accumulate 2", ""),
                                                     (1, " --accumulate 4", " --path vp --objective score"),
                                                     pytest.param(2, "", " --coupling ot", marks=needs_scipy)])  # fmt: skip
def test_ranks_and_pieces_give_the_parameters_of_the_whole_batch(cifar, fork, tmp_path, world, flags, objective):
    assert cifar("--dropout 0 --steps 5" + objective, out="whole")[0] == 0
    codes, text = fork("--dropout 0 --steps 5" + objective + flags, world=world)
    assert codes == [0] * world, text
    a, b = read(tmp_path / "whole"), read(tmp_path / "run")
    torch.manual_seed(0)
    first = UNet(**a["network"]).state_dict()
    assert max((a["net"][k] - first[k]).abs().max() for k in first) > 1e-3  # else the next line would say nothing
    for part in ("net", "ema"):
        assert_close(a[part], b[part], rtol=0, atol=1e-5)
    lines = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "run")]
    assert len(lines[0]) == len(lines[1]) == 2  # one rank logs
    logs = [json.loads(last) for _, last in lines]
    assert logs[1].pop("world_size") == world and logs[0].pop("world_size") == 1
    for k in logs[0]:
        assert_close(logs[0][k], logs[1][k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective, accumulate", [("velocity", 1), ("score", 2)])
def test_gradient_and_bins_are_those_of_the_objectives_loss(objective, accumulate):
    s, images = twelve(objective=objective, accumulate=accumulate, precision="fp32", batch=12)
    path, w, batch = VPPath(), torch.nn.Parameter(torch.tensor(0.5)), train_cifar.draw(s, images, VPPath(), 0)
    v = lambda t, x: w * x * (1 + t[:, None, None, None])
    losses = fm.cfm_loss(v, path, reduction="none", **fm.OBJECTIVES[objective], **batch)
    (expected,) = torch.autograd.grad(losses.mean(), w)
    bins = train_cifar.backward(s, None, v, path, batch)
    assert_close(w.grad, expected)
    inside = (10 * batch["t"]).long() == torch.arange(10)[:, None]
    assert_close(bins, torch.cat([(inside * losses.detach()).sum(1), inside.sum(1)]))


def test_batch_splits_evenly_over_ranks_and_pieces():
    assert train_cifar.settle("--batch 8 --accumulate 2 --out nowhere".split(), 2)[0].batch == 8
    with pytest.raises(SystemExit):
        train_cifar.settle("--batch 6 --accumulate 2 --out nowhere".split(), 2)


def test_dropout_differs_by_step_and_seed_and_not_by_run(cifar, monkeypatch):
    seeds, report = [], train_cifar.report
    monkeypatch.setattr(train_cifar, "report", lambda *args: seeds.append(torch.initial_seed()) or report(*args))
    assert cifar("--steps 5", out="one")[0] == cifar("--steps 5", out="two")[0] == cifar("--steps 5 --seed 1", out="three")[0] == 0
    assert len(set(seeds)) == 10 and seeds[:5] == seeds[5:10]


def twelve(**changes):
    """Settings for batches of four, and twelve grey images."""
    settings = dict(batch=4, size=2, rank=0, world=1, device=torch.device("cpu"), seed=1, flip=True, conditional=False,
                    superres=None, classes=None, coupling="independent")  # fmt: skip
    images = torch.arange(12, dtype=torch.uint8).reshape(12, 1, 1, 1).expand(12, 2, 2, 3).contiguous()
    return train_cifar.Namespace(**{**settings, **changes}), (images, torch.zeros(12).long())


@needs_scipy
def test_a_coupled_run_is_sampled_without_scipy(cifar, monkeypatch):
    assert cifar("--coupling ot --steps 1")[0] == 0
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert cifar("--sample 2", new=False)[0] == 0 and cifar("--coupling ot --steps 1", out="other")[0] == 2


@needs_scipy
def test_coupling_pairs_the_whole_batch_at_least_cost_on_every_rank():
    free, coupled = (train_cifar.draw(*twelve(coupling=kind), OTPath(), 3) for kind in ("independent", "ot"))
    halves = [train_cifar.draw(*twelve(coupling="ot", rank=rank, world=2), OTPath(), 3) for rank in (0, 1)]
    assert_close({k: torch.stack([half[k] for half in halves], 1).flatten(0, 1) for k in coupled}, coupled, rtol=0, atol=0)
    i = [(free["noise"] == x0).flatten(1).all(1).nonzero().item() for x0 in coupled.pop("x0")]
    cost = lambda i: (free["noise"][list(i)] - free["x1"]).square().sum()
    assert sorted(i) == [0, 1, 2, 3] and min(permutations(i), key=cost) == tuple(i) and cost(i) < cost(range(4))
    assert_close(coupled, {k: free[k] for k in ("x1", "t")}, rtol=0, atol=0)


def test_every_image_once_an_epoch_and_fresh_noise_every_step():
    s, images = twelve()
    batches = [train_cifar.draw(s, images, OTPath(), step) for step in range(6)]
    seen = [[int(x.item()) for x in ((b["x1"][:, 0, 0, 0] + 1) * 128).floor()] for b in batches]
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(12)) and seen[:3] != seen[3:]
    assert len({b["noise"].sum().item() for b in batches}) == len({b["t"].sum().item() for b in batches}) == 6
    for b in batches:  # one time in every quarter, dequantisation noise in [0, 1)
        assert sorted((4 * b["t"]).long().tolist()) == [0, 1, 2, 3]
        u = ((b["x1"] + 1) * 128) % 1
        assert u.std() > 0.2
    assert train_cifar.draw(*twelve(seed=2), OTPath(), 0)["noise"].ne(batches[0]["noise"]).all()  # --seed counts
    assert not torch.equal(train_cifar.order(1, 0, 12), train_cifar.order(2, 0, 12))
    half = [train_cifar.draw(*twelve(rank=rank, world=2), OTPath(), 3) for rank in (0, 1)]
    for k in batches[3]:
        assert_close(torch.stack([half[0][k], half[1][k]], 1).flatten(0, 1), batches[3][k], rtol=0, atol=0)
    mirrored = train_cifar.draw(s, (torch.tensor([[[0, 255], [0, 255]]] * 12, dtype=torch.uint8)[..., None].expand(12, 2, 2, 3), images[1]),
                                OTPath(), 0)["x1"]  # fmt: skip
    assert {True, False} == set((mirrored[:, 0, 0, 0] > 0).tolist())


def test_a_tenth_of_the_labels_is_hidden_and_the_rest_are_those_of_the_images():
    s, (pixels, _) = twelve(conditional=True, classes=["a", "b", "c"], flip=False)
    batches = [train_cifar.draw(s, (pixels, torch.arange(12) % 3), OTPath(), step) for step in range(300)]
    y, x1 = (torch.cat([b[k] for b in batches]) for k in ("y", "x1"))
    label, hidden = ((x1[:, 0, 0, 0] + 1) * 128).floor() % 3, y == 3  # the fourth label is none
    assert 0.07 < hidden.float().mean() < 0.13 and torch.equal(y[~hidden].float(), label[~hidden])
    assert set(label[hidden].tolist()) == {0, 1, 2}


# ---- train_cifar.py: schedule and average ----------------------------------------------------------------------------


def test_rate_is_the_papers_and_never_zero():
    for recipe in (train_cifar.PAPER, train_cifar.MODERN):
        s = train_cifar.Namespace(**recipe)
        assert 0 < train_cifar.rate(s, 0) <= 2 * s.lr / s.warmup and train_cifar.rate(s, s.warmup - 1) == pytest.approx(s.lr)
        assert max(train_cifar.rate(s, step) for step in range(0, s.steps, 999)) <= s.lr
    s = train_cifar.Namespace(**train_cifar.PAPER)
    assert train_cifar.rate(s, 0) == pytest.approx(1e-8, rel=1.2)  # App. E: from 1e-8 ...
    assert train_cifar.rate(s, s.steps - 1) == 1e-8  # ... and back to 1e-8 at the last step
    down = [train_cifar.rate(s, step) for step in (45_000, 145_000, 245_000, 345_000)]
    assert down[0] - down[1] == pytest.approx(down[1] - down[2]) == pytest.approx(down[2] - down[3])
    assert train_cifar.rate(train_cifar.Namespace(**{**train_cifar.MODERN, "warmup": 0}), 0) == 2e-4
    short = train_cifar.Namespace(lr=1.0, warmup=0, decay="linear", steps=3)
    assert [train_cifar.rate(short, step) for step in range(3)] == [1.0, pytest.approx(0.5), 1e-8]
    assert train_cifar.rate(s, 217_999) == pytest.approx(s.lr / 2, rel=1e-4)  # half way down
    assert train_cifar.rate(train_cifar.Namespace(**train_cifar.MODERN), 399_999) == 2e-4


def test_recipes_are_table_3_and_torchcfm():
    for flags, want in ("", (128, 2e-4, 5000, "none", 128, 1.0, 0.9999, 0.1, True)), ("--recipe paper", (256, 5e-4, 45_000, "linear", 256, 0, 0, 0, False)):
        s, _ = train_cifar.settle([*flags.split(), "--out", "nowhere"], 1)
        assert (s.channels, s.lr, s.warmup, s.decay, s.batch, s.clip, s.ema, s.dropout, s.flip) == want
    s, _ = train_cifar.settle("--recipe paper --lr 1e-4 --out nowhere".split(), 1)
    assert (s.lr, s.channels) == (1e-4, 256)


def test_relative_folders_are_found_again_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s, _ = train_cifar.settle("--data a --test b --size 8 --attention 4".split(), 1)
    assert (s.data, s.test) == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert train_cifar.settle(["--data", "cifar10"], 1)[0].data == "cifar10"


@pytest.mark.parametrize("decay", [0.9999, 0.5, 0.0])
def test_average_warms_up_as_its_closed_form_says(decay):
    net = torch.nn.Linear(1, 1, bias=False).double()
    ema = train_cifar.averaged(net, decay)
    assert not ema.module.training  # no dropout in pictures
    w = torch.linspace(1, 3, 30, dtype=torch.float64)
    for x in w:
        net.weight.data.fill_(x)
        ema.update_parameters(net)
    d = [min(decay, (1 + n) / (10 + n)) for n in range(30)]  # e_n = prod d w_0 + sum_i (1 - d_i) prod_{j > i} d_j w_i
    weights = [(1 - d[i] if i else 1) * math.prod(d[i + 1 :]) for i in range(30)]
    assert sum(weights) == pytest.approx(1) and ema.module.weight.item() == pytest.approx(sum(a * x.item() for a, x in zip(weights, w)))
    if decay == 0:
        assert ema.module.weight.item() == 3


# ---- train_cifar.py: data --------------------------------------------------------------------------------------------


def test_folder_cache_holds_the_squares_and_follows_the_folder(cifar, tmp_path):
    folder = tmp_path / "mine"
    paint(folder, 9)
    wide = torch.zeros(16, 40, 3, dtype=torch.uint8)
    wide[:, 12:28] = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1)
    Image.fromarray(wide.numpy()).save(folder / "z.PNG")
    cifar(f"--data {folder} --steps 1")
    (cache,) = (tmp_path / "run").glob("data-*.u8")
    pixels = torch.frombuffer(bytearray(cache.read_bytes()), dtype=torch.uint8).reshape(10, 8, 8, 3)
    boxes = wide[:, 12:28, 0].double().reshape(8, 2, 8, 2).mean((1, 3))
    assert (pixels[9, :, :, 0] - boxes).abs().max() <= 0.5  # the central square, averaged 2 x 2
    paint(folder, 1, start=50)
    code, text, _ = cifar(f"--data {folder} --steps 2")
    assert code == 0 and "reading 11 images" in text and not cache.exists()
    assert "reading" not in cifar(f"--data {folder} --steps 3")[1]
    (folder / "a" / "004.png").write_bytes((folder / "a" / "004.png").read_bytes()[:60])
    code, _, err = cifar(f"--data {folder} --steps 4")
    assert code == 2 and "004.png cannot be read" in err and err.count("\n") == 1


def write_cifar(root):
    """A tiny CIFAR-10 in the format of the real one; returns its images, (N, 32, 32, 3), and labels by file."""
    folder, files, g = root / "cifar-10-batches-py", {}, torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        planes, labels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=g), [3, 1, 4, 9]
        content = dict(batch_label=name, labels=labels, data=planes.flatten(1).numpy(), filenames=["x.png"] * 4)
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        files[name] = planes.permute(0, 2, 3, 1), labels
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=names, num_vis=3072), protocol=2))
    return files


def tiny_cifar(root, monkeypatch):
    """write_cifar(root), and its checksums for torchvision."""
    cifar10 = pytest.importorskip("torchvision.datasets").CIFAR10
    files = write_cifar(root)
    md5 = lambda name: hashlib.md5((root / "cifar-10-batches-py" / name).read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10, "train_list", [[f"data_batch_{i}", md5(f"data_batch_{i}")] for i in range(1, 6)])
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", md5("test_batch")]])
    monkeypatch.setattr(cifar10, "meta", {**cifar10.meta, "md5": md5("batches.meta")})
    return files


def test_cifar10_files_are_read(cifar, tmp_path, monkeypatch):
    files = tiny_cifar(tmp_path / "data", monkeypatch)
    s = train_cifar.Namespace(data="cifar10", test=None, rank=0, world=1, device=torch.device("cpu"), conditional=True, classes=None)
    pixels, labels = train_cifar.load_images(s, "data")
    assert_close(pixels, torch.cat([files[f"data_batch_{i}"][0] for i in range(1, 6)]))
    pixels, held_out = train_cifar.load_images(s, "test")
    assert_close(pixels, files["test_batch"][0])
    assert [s.classes[i] for i in held_out] == ["cat", "automobile", "deer", "truck"] == [s.classes[i] for i in labels[:4]]
    flags = "--channels 12 --channel-mult 1,1,1,1 --head-channels 12 --blocks 1 --attention 4 --batch 8 --steps 2 --solver euler:1"
    assert cifar(flags + " --data cifar10", new=False)[0] == 0
    code, text, err = cifar("--bpd 4 --solver euler:2", new=False)
    assert code == 0 and "bits per dimension" in text


def test_readme_image_commands_run(photos, tmp_path, monkeypatch, capsys):
    """In one folder, shortened by the flags that the README shows; torchrun, without CIFAR-10, on a folder of photos."""
    monkeypatch.chdir(tmp_path)
    tiny_cifar(tmp_path / "data", monkeypatch)
    net = UNet(channels=8, channel_mult=(1, 1, 1), blocks=1, attention=(16,), head_channels=8)
    torch.save({"ema_model": adm(net)}, tmp_path / "adm.pt")
    lines = [line for line in COMMANDS if "train_cifar.py" in line]
    assert len(lines) == 11
    lines = [line for line in lines if SCIPY or "--coupling" not in line]
    for line in lines:
        program, flags = line.split(" train_cifar.py")
        flags = flags.replace("FOLDER", str(photos / "train")).replace("adm:FILE", f"adm:{tmp_path / 'adm.pt'}") + " " + SHORT_CIFAR
        flags += " --sample 4" if "--sample" in flags else " --bpd 4" if "--bpd" in flags else ""
        if program == "python":
            assert train_cifar.main(flags.split()) == 0, line
        else:
            flags = f"{flags} --data {photos / 'train'} --out {tmp_path / 'many'}"
            done = run("-m", "torch.distributed.run", *program.split()[1:], HERE / "train_cifar.py", *flags.split(), cwd=tmp_path)
            assert done.returncode == 0 and read(tmp_path / "many")["step"] == 2, done.stderr
        capsys.readouterr()
    assert len(list((tmp_path / "runs" / "cifar").rglob("00000?.png"))) == len(list((tmp_path / "runs" / "adm").rglob("*.png"))) == 4


# ---- train_cifar.py: sampling and evaluation -------------------------------------------------------------------------


def test_samples_are_numbered_resumable_and_independent_of_the_batch(cifar, photos, tmp_path):
    assert cifar("--steps 3 --conditional --every 2,3,2")[0] == 0
    assert {p.name for p in (tmp_path / "run" / "samples").iterdir()} == {"step_2.png", "step_3.png"}
    picture = image(tmp_path / "run" / "samples" / "step_3.png")
    assert picture.size[0] >= 64 and picture.size[1] > 64
    code, text, _ = cifar("--sample 5 --solver rk4:8", new=False)
    assert code == 0 and "NFE 8.0" in text and "5 of 5\n" in text
    assert "0 new, NFE 0.0" in cifar("--sample 5 --solver rk4:8", new=False)[1]
    (folder,) = [p for p in (tmp_path / "run" / "samples").iterdir() if p.is_dir()]
    files = sorted(folder.iterdir())
    assert folder.name == "step3_rk4_8_seed0_guidance1"
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)] and image(files[0]).size == (8, 8)
    before = {f: f.read_bytes() for f in files}
    files[2].unlink()
    stamp = files[1].stat().st_mtime_ns
    code, text, _ = cifar("--sample 7 --solver rk4:8 --batch 1", new=False)
    assert code == 0 and "3 new" in text and files[1].stat().st_mtime_ns == stamp and len(list(folder.iterdir())) == 7
    assert files[2].read_bytes() == before[files[2]] and len(set(before.values())) == 5
    code, text, _ = cifar("--sample 1 --guidance 2 --solver euler:3", new=False)
    assert code == 0 and "NFE 6.0" in text and {f: f.read_bytes() for f in files} == before
    code, text, _ = cifar("--sample 2", new=False)
    assert code == 0 and text.endswith(", dopri5:1e-5\n")  # not the solver of the run's pictures


def test_samples_are_functions_of_seed_and_number_with_labels_in_turn():
    def net(t, x, y=None):
        seen.append((t.flatten()[0].item(), None if y is None else y.tolist()))
        return 0 * x

    seen, net.config = [], dict(num_classes=3)
    s = train_cifar.Namespace(size=4, device=torch.device("cpu"), seed=1, superres=None, conditional=True, guidance=1.0,
                              objective="velocity", solver="euler:2")  # fmt: skip
    make = lambda index, path=OTPath(), **changes: train_cifar.generate(
        train_cifar.Namespace(**{**vars(s), **changes}), net, path, index, None)  # fmt: skip
    (x,), nfe = make(range(5))
    assert seen == [(0.0, [0, 1, 2, 0, 1]), (0.5, [0, 1, 2, 0, 1])] and nfe.tolist() == [2] * 5
    assert torch.equal(make([4, 2])[0][0], x[[4, 2]]) and make(range(5), seed=2)[0][0].ne(x).any((1, 2, 3)).all()
    assert ((x > 0) & (x < 255)).float().mean() > 0.5 and len({i.sum().item() for i in x}) == 5
    wide = make(range(5), VEPath())[0][0]  # 10 times the noise
    assert ((wide > 0) & (wide < 255)).float().mean() < 0.2
    seen.clear()
    assert make([4], guidance=2.0)[1].tolist() == [4]
    assert seen[:2] in ([(0.0, [1]), (0.0, None)], [(0.0, None), (0.0, [1])])


def test_pixels_invert_the_training_scale():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    for u in (0.0, 0.5, 0.999):
        assert torch.equal(train_cifar.to_pixels(((pixels + u) / 128 - 1).permute(0, 3, 1, 2)), pixels)
    assert train_cifar.to_pixels(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_bpd_of_the_zero_field_is_the_gaussians(cifar, photos, tmp_path, monkeypatch):
    assert cifar("--steps 1 --warmup 0 --conditional")[0] == 0
    monkeypatch.setattr(UNet, "forward", lambda self, t, x, y=None, cond=None: 0 * x)
    flags = f"--bpd 6 --test {photos / 'test'} --solver euler:1 "
    bits, seen = train_cifar.bits_per_dim, []
    spy = lambda *args, **how: seen.append((how["divergence"], how.get("probes"), args[2])) or bits(*args, **how)
    monkeypatch.setattr(train_cifar, "bits_per_dim", spy)
    ways = ("", "--batch 6", "--probes 0 --batch 6", "--K 40", "--batch 4")
    outputs = [cifar(flags + more, new=False)[1] for more in ways]
    x = torch.cat([torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.uint8) for f in (tmp_path / "run").glob("test-*.u8")])
    x = (x.reshape(6, -1).double() + 0.5) / 128 - 1  # -log2 N(x; 0, 1) + 7, the noise moves it by less than 0.01
    exact = ((x.square() + math.log(2 * math.pi)) / 2).mean(1) / math.log(2) + 7
    assert list(dict.fromkeys(seen)) == [("hutchinson", 1, 1), ("exact", None, 1), ("hutchinson", 1, 40)]
    for text in outputs:
        mean, _, error, *_ = text.splitlines()[-1].split()
        assert float(mean) == pytest.approx(exact.mean().item(), abs=0.01)
        assert float(error) == pytest.approx((exact.std() / 6**0.5).item(), abs=0.002)
    for words in ("Hutchinson probes: 1", "K = 1", "euler:1", "6 held-out", "uniform dequantisation", "NFE 1.0"):
        assert words in outputs[0]
    assert " +- nan bits" in cifar(flags.replace("--bpd 6", "--bpd 1"), new=False)[1]  # one image has no spread
    assert "exact trace" in outputs[2] and outputs[1].splitlines()[-1].split()[0] == outputs[2].splitlines()[-1].split()[0]


def test_ranks_share_the_samples_and_the_likelihood(cifar, fork, photos, tmp_path):
    assert cifar("--steps 2")[0] == 0
    codes, text = fork("--sample 7 --batch 3", world=2)  # no multiple of the ranks
    assert codes == [0, 0] and "7 new, NFE 2.0" in text, text
    (folder,) = [p for p in (tmp_path / "run" / "samples").iterdir() if p.is_dir()]
    split = {f.name: f.read_bytes() for f in folder.iterdir()}
    for name in split:
        (folder / name).unlink()
    assert cifar("--sample 7 --solver euler:2", new=False)[0] == 0
    assert len(split) == 7 and split == {f.name: f.read_bytes() for f in folder.iterdir()}
    flags = f"--bpd 6 --batch 2 --test {photos / 'test'}"
    codes, text = fork(flags, world=2)
    assert codes == [0, 0], text
    assert cifar(flags + " --solver euler:2", new=False)[1].splitlines()[-1] in text


def test_superres_sees_the_low_resolution_and_saves_pairs(cifar, photos, tmp_path):
    code, text, _ = cifar(f"--superres 4 --steps 3 --every 2,3,3 --test {photos / 'test'} --path vp")
    assert code == 0 and "low, model, truth (held-out): PSNR" in text
    s = train_cifar.Namespace(conditional=False, superres=4)
    pixels = torch.full((2, 8, 8, 3), 77, dtype=torch.uint8)
    pixels[1, :4], pixels[1, 4:] = 10, 200
    low = (train_cifar.conditions(s, pixels, None)["cond"] + 1) * 128 - 0.5
    assert low.shape == (2, 3, 8, 8) and (low[0] - 77).abs().max() < 1e-3 and low[1, :, 0].mean() < 30 < 180 < low[1, :, -1].mean()
    assert "low, model, truth (training): PSNR" in cifar("--superres 4 --steps 1", out="alone")[1]
    code, text, _ = cifar("--sample 6 --solver euler:2", new=False)
    assert code == 0
    (folder,) = [p for p in (tmp_path / "run" / "samples").iterdir() if p.is_dir()]
    names = [sorted(f.name for f in (folder / kind).iterdir()) for kind in ("low", "model", "truth")]
    assert names[0] == names[1] == names[2] == [f"{i:06d}.png" for i in range(6)]
    load = lambda kind, i: torch.frombuffer(bytearray(image(folder / kind / f"{i:06d}.png").tobytes()), dtype=torch.uint8).double()
    mse = [(load("model", i) - load("truth", i)).square().mean().item() for i in range(6)]
    code, other, _ = cifar(f"--sample 6 --solver euler:2 --test {photos / 'train'}", new=False)
    assert code == 0 and "6 new" in other  # not beside another truth
    assert f"PSNR {sum(10 * math.log10(255**2 / m) for m in mse) / 6:.2f} dB" in text
    assert f"{10 * math.log10(255**2 / mse[0]):.3f}" == f"{train_cifar.psnr(load('model', 0)[None], load('truth', 0)[None]).item():.3f}"


def test_init_takes_weights_of_torchcfm_and_of_other_runs(cifar, tmp_path):
    assert cifar("--steps 2", out="one")[0] == 0
    state = read(tmp_path / "one")
    torch.save({"net_model": state["net"], "ema_model": {f"module.{k}": w for k, w in state["ema"].items()}, "step": 7}, tmp_path / "theirs.pt")
    for out, source in ("two", tmp_path / "one" / "checkpoint.pt"), ("three", f"adm:{tmp_path}/theirs.pt"):
        code, text, err = cifar(f"--init {source} --steps 1 --lr 1e-8 --warmup 0", out=out)
        assert code == 0, err
        assert_close(read(tmp_path / out)["net"], state["ema"], rtol=0, atol=2e-8)
        assert read(tmp_path / out)["network"]["time_scale"] == (1000.0 if out == "two" else 1.0)
    code, text, _ = cifar(f"--init adm:{tmp_path}/theirs.pt --sample 2", out="four")
    assert code == 0 and len(list((tmp_path / "four" / "samples").glob("*/*.png"))) == 2
    assert not (tmp_path / "four" / "checkpoint.pt").exists()
    code, text, _ = cifar(f"--init {tmp_path}/two/checkpoint.pt --sample 2", out="four")  # other weights, another folder
    assert code == 0 and "2 new" in text and len(list((tmp_path / "four" / "samples").glob("*/*.png"))) == 4


# ---- train_cifar.py: refusals ----------------------------------------------------------------------------------------

REFUSED = [  # command line, words of the one line it gets; "@" is a finished run, "%" one of --decay linear
    ("--batch 0", "--batch: must be at least 1"),
    ("--batch ten", "--batch"),
    ("--lr -1", "--lr: must be at least"),
    ("--lr nan", "--lr: must be at least"),
    ("--ema 1", "--ema: must be at least 0 and below 1"),
    ("--dropout 1.5", "--dropout: must be at least 0 and below 1"),
    ("--clip -1", "--clip: must be at least 0"),
    ("--channel-mult 1,x", "--channel-mult"),
    ("--learning-rate 1", "--learning-rate"),
    ("--chan 8", "--chan"),
    ("--recipe best", "--recipe"),
    ("--path straight", "--path"),
    ("--objective noise", "--path ot --objective noise --coupling independent: noise does not tell velocity at t = 0"),
    ("--objective scoreflow --path ve", "'beta' on VPPath"),
    ("--objective x0", "--objective"),
    ("--coupling ot --path vp", "x0 cannot be paired on VPPath"),
    ("--coupling best", "--coupling"),
    ("--coupling ot --superres 2", "--coupling ot pairs across labels"),
    ("--out @ --sample 3 --objective noise", "--objective noise is not what the run"),
    ("--precision fp8", "--precision"),
    ("--every 1,2", "--every must be three"),
    ("--every 1,0,2", "--every must be three"),
    ("--solver heun:3", "--solver: must be dopri5:TOLERANCE"),
    ("--solver midpoint:3", "midpoint:NFE (by 2)"),
    ("--solver dopri5:0", "--solver: must be dopri5:TOLERANCE"),
    ("--accumulate 3", "--batch 8 must be a multiple of 1 ranks x --accumulate 3"),
    ("--decay linear --warmup 9 --steps 9", "--warmup 9 must be below --steps 9"),
    ("--superres 3", "--superres 3 must divide --size 8"),
    ("--superres 1", "--superres: must be at least 2"),
    ("--size 9 --attention 4", "--size must be"),
    ("--attention 16", "--attention must"),
    ("--channels 26 --head-channels 8", "--head-channels must"),
    ("--data cifar10 --size 8", "--size 8 is not CIFAR-10's 32"),
    ("--data /nowhere", "--data must be a folder"),
    ("--test /nowhere", "--test must be a folder"),
    ("--batch 64", "--batch 64 is more than the 20 images"),
    ("--guidance 2", "--guidance needs labels: train with --conditional"),
    ("--sample 3 --bpd 3", "--sample and --bpd are two commands"),
    ("--sample 3", "holds no checkpoint.pt: train first"),
    ("--sample 3 --superres 4 --init @/checkpoint.pt --data TEST", "--test FOLDER must give the held-out images"),
    ("--K 5", "--K and --probes go with --bpd N"),
    ("--init nowhere.pt", "--init nowhere.pt does not exist"),
    ("--init adm:nowhere.pt", "--init adm:nowhere.pt"),
    ("--init @/checkpoint.pt --channels 24", "--init"),
    ("--out @/log.jsonl", "is a file: name a folder"),
    ("--out @", "--steps 4 are done"),
    ("--out @ --steps 3", "--steps 3 are done"),
    ("--out @ --steps 9 --lr 0.1", "--lr 0.1 is not what the run"),
    ("--out @ --steps 9 --channels 24", "leave it out or name another --out"),
    ("--out @ --steps 9 --seed 1", "--seed 1 is not what the run"),
    ("--out @ --steps 9 --recipe paper", "--recipe paper is not what the run"),
    ("--out @ --sample 3 --path vp", "--path vp is not what the run"),
    ("--out @ --sample 3 --steps 9", "--steps 9 is not what the run"),
    ("--out @ --bpd 3", "--test FOLDER must give the held-out images"),
    ("--out @ --bpd 3 --guidance 2", "leave it out of --bpd"),
    ("--out @ --bpd 99 --test TEST", "--bpd 99 is more than the 6 held-out images"),
    ("--out % --steps 9", "--steps 9 is not what the run"),
    *([("--device cuda", "--device cuda: torch finds none")] if not torch.cuda.is_available() else []),
    *([("--device mps", "--device mps: torch finds none")] if not torch.backends.mps.is_available() else []),
]


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """The folders of two finished runs."""
    folders = [tmp_path_factory.mktemp(name) for name in ("none", "linear")]
    for folder in folders:
        train_cifar.main([*TINY, "--data", str(photos / "train"), "--out", str(folder), "--steps", "4", "--decay", folder.name[:-1]])
    return folders


def test_eq46_samples_and_bpd_of_a_noise_network_are_those_of_its_field(cifar, photos, tmp_path, monkeypatch):
    assert cifar("--path vp --objective noise --lr 1e-8 --steps 1")[0] == 0  # still the zero network: its field is d alpha / alpha x
    path, scale = VPPath(), lambda t: VPPath().coefficients(torch.tensor(t, dtype=torch.float64))[0].log()
    growth = (scale(path.t_span[1]) - scale(0.0)).item()  # so x1 = e^growth x0, and log p = log N(x0) - d growth
    code, text, err = cifar(f"--bpd 2 --solver rk4:80 --test {photos / 'test'}", new=False)
    assert code == 0, err
    bpd = float(re.search(r"^([\d.]+) \+-", text, re.M)[1])
    least = 7 + (math.log(2 * math.pi) / 2 + growth) / math.log(2)  # |x1|^2 e^(-2 growth) <= 3 / e^10 adds next to nothing
    assert least < bpd < least + 0.01
    s, state = train_cifar.settle(["--out", str(tmp_path / "run"), "--sample", "2", "--solver", "rk4:80"], 1)
    s.device, s.classes, seen = torch.device("cpu"), None, []
    monkeypatch.setattr(train_cifar, "to_pixels", lambda x: seen.append(x) or x)
    train_cifar.generate(s, train_cifar.build(s, state), path, [0, 1], None)
    x0 = torch.stack([torch.randn((3, 8, 8), generator=train_cifar.seeded("cpu", 0, "sample", i)) for i in (0, 1)])
    assert_close(seen[0], math.exp(growth) * x0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("flags, words", REFUSED, ids=[flags for flags, _ in REFUSED])
def test_refused_in_one_line_and_nothing_is_overwritten(cifar, finished, photos, tmp_path, flags, words):
    before = {f: f.read_bytes() for folder in finished for f in folder.rglob("*") if f.is_file()}
    given = flags.replace("@", str(finished[0])).replace("%", str(finished[1])).replace("TEST", str(photos / "test"))
    new = "--sample" not in given and "--bpd" not in given
    code, _, err = cifar(("" if "--steps" in given or not new else "--steps 4 ") + given, new=new)
    words = words if SCIPY or words in err else "pip install scipy"
    assert code == 2 and words in err and err.count("\n") == 1 and "Traceback" not in err
    assert {f: f.read_bytes() for folder in finished for f in folder.rglob("*") if f.is_file() and not f.suffix == ".u8"}.items() <= before.items()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_help_says_what_to_shrink(cifar):
    code, text, _ = cifar("--help", new=False)
    assert code == 0 and "Without a GPU shrink" in text and "(default: 0.0002)" in text
