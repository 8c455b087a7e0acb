# SPDX-License-Identifier: MIT
"""Flow matching in two dimensions: train on a toy density, draw Figure 4, print true numbers.

python train_toy.py --path ot              a minute on two CPU cores; results in runs/toy
python train_toy.py --path ot vp           a row for each path: same seed, network and steps
python train_toy.py --ablation             Table 1, Figures 4 and 9, couplings and reflow
python train_toy.py --net paper --lr 1e-3  the paper's larger network without Fourier features
python train_toy.py --data drawing.png     the dark pixels of a picture are the density
python train_toy.py --figure               Figure 3, Theorem 1: conditional paths, exact flows
"""

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.functional import mse_loss
from torch.special import ndtr
from torchvision.ops import MLP

import flow_matching as fm


@dataclass
class Method:
    """What differs between the rows of a table."""

    path: str
    objective: str = "velocity"
    coupling: str = "independent"
    reflow: int = 0  # rounds of training again


ABLATION = {  # Table 1, and below it what later papers do to the pairs (x0, x1)
    "DDPM": Method("vp", objective="noise"),
    "score matching": Method("vp", objective="score"),
    "ScoreFlow": Method("vp", objective="scoreflow"),
    "FM, diffusion": Method("vp"),
    "FM, OT": Method("ot"),
    "minibatch OT": Method("ot", coupling="ot"),
    "reflow": Method("ot", reflow=1),
}
MAIN_ROWS = ("DDPM", "FM, diffusion", "FM, OT")  # of the ablation, in pictures of their own
START_AT_X0 = ("ot", "cosine")  # the paths on which psi_0(x0) = x0 and alpha(0) = 0
NFES = (2, 4, 8, 10, 20, 40, 100)
STAGES = {"midpoint": 2, "euler": 1, "rk4": 4}  # calls of v a step


# ---- Settings ----
def parse_args(argv=None):
    """The settings. What would fail after training is refused here, with one line, exit code 2."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = p.add_argument_group("what is trained")
    group.add_argument(
        "--path",
        nargs="+",
        default=["ot"],
        choices=fm.PATHS,
        help="probability paths: ot and vp of the paper, ve, cosine; a row of the table for each",
    )
    group.add_argument(
        "--objective",
        default="velocity",
        choices=fm.OBJECTIVES,
        help="what the network predicts, Table 1; all but velocity need --path vp or ve; scoreflow "
        "is a score weighted for likelihood and needs vp",
    )
    group.add_argument(
        "--coupling",
        default="independent",
        choices=("independent", "ot"),
        help="how noise is paired with data; ot is minibatch optimal transport",
    )
    group.add_argument(
        "--reflow",
        type=int,
        default=0,
        help="rounds of training again, on the pairs that the last flow makes",
    )
    group.add_argument(
        "--sigma-min",
        type=float,
        default=1e-4,
        help="std of the OT path at t = 1, Eq. (20), in units of the data's std",
    )
    group.add_argument(
        "--data",
        default="checkerboard",
        help=f"checkerboard, {', '.join(MIXTURES)} or a picture file, whose dark "
        "pixels are the density",
    )
    group.add_argument(
        "--ablation",
        action="store_true",
        help=f"train the rows {'; '.join(ABLATION)}; needs SciPy",
    )
    group.add_argument(
        "--figure",
        action="store_true",
        help="train nothing; draw conditional paths and exact flows",
    )
    group = p.add_argument_group("network and training")
    group.add_argument(
        "--net",
        default="fourier",
        choices=("fourier", "paper"),
        help="fourier: 4 layers of 64 on Fourier features; paper: 5 of 512 on (t, x)",
    )
    group.add_argument("--steps", type=int, default=7000, help="optimizer steps")
    group.add_argument("--batch", type=int, default=2048, help="samples in an optimizer step")
    group.add_argument(
        "--lr",
        type=float,
        default=4e-3,
        help="peak learning rate of Adam, after 200 steps of warm-up",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of weights, data and noise")
    group.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the network runs: cpu, cuda or mps",
    )
    group = p.add_argument_group("what is measured and written")
    group.add_argument("--sde", action="store_true", help="measure samples of the SDE, too")
    group.add_argument(
        "--samples",
        type=int,
        default=50000,
        help="samples in each panel of the pictures; the numbers use as many, 4000 at most",
    )
    group.add_argument(
        "--out", type=Path, default="runs/toy", help="folder for pictures, metrics.json and weights"
    )
    args = p.parse_args(argv)
    check_args(p, args)
    return args


def check_args(p, args):
    """Ends the program where the settings contradict each other."""
    for name, least in (("steps", 1), ("batch", 1), ("samples", 2), ("reflow", 0)):
        value = getattr(args, name)
        if value < least:
            p.error(f"--{name} must be at least {least}; got {value}")
    if not 0 <= args.sigma_min < 1:
        p.error(f"--sigma-min must lie in [0, 1); got {args.sigma_min}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:
        p.error(f"--device {args.device}: {str(e).splitlines()[0]}")
    for name in ("path", "objective", "coupling", "reflow", "sde"):
        if getattr(args, name) != p.get_default(name):
            if args.ablation:
                p.error(f"--ablation has its own rows: leave out --{name}")
            if args.figure:
                p.error(f"--figure trains nothing: leave out --{name}")
    if args.figure and args.ablation:
        p.error("--figure and --ablation are two commands")
    pairs = args.coupling == "ot" or args.reflow > 0
    if pairs and args.sde:
        p.error("--sde needs the score, which v tells only for independent pairs")
    for path in args.path:
        if pairs and path not in START_AT_X0:
            p.error(f"--coupling ot and --reflow need psi_0(x0) = x0, so --path ot; got {path}")
        if args.objective != "velocity" and path in START_AT_X0:
            rule = f"--objective {args.objective} does not tell the velocity at t = 0 of {path}"
            p.error(f"{rule}; take --path vp")
        if args.objective == "scoreflow" and path != "vp":
            p.error(f"--objective scoreflow has the weight beta(t) of --path vp; got {path}")
    if args.ablation or args.coupling == "ot":
        if importlib.util.find_spec("scipy") is None:
            p.error("optimal transport of minibatches needs SciPy: pip install scipy")


def table_rows(args):
    """The Method of every row, {name: Method}."""
    if args.ablation:
        return ABLATION
    rows = {}
    for path in args.path:
        rows[path] = Method(path, args.objective, args.coupling, args.reflow)
    return rows


# ---- Network and training ----
class Flow(nn.Module):
    """A network of velocity, noise or score with its path; data = shift + scale * standardised x.

    Departure: four layers of 64 on Fourier features, which let them see edges, learn what is left
    of the target when the linear answer to Gaussian data of unit variance is known. net="paper" is
    the paper's: five layers of 512 on (t, x), with SiLU, as no activation is stated.
    """

    def __init__(self, path, objective, sigma_min, net, shift, scale):
        super().__init__()
        self.config = {
            "path": path,
            "objective": objective,
            "sigma_min": sigma_min,
            "net": net,
            "shift": shift,
            "scale": scale,
        }
        if path == "ot":
            self.path = fm.OTPath(sigma_min)
        else:
            self.path = fm.PATHS[path]()
        self.predict = fm.OBJECTIVES[objective]["predict"]
        self.net = net
        self.scale = scale
        self.register_buffer("shift", torch.tensor(shift), persistent=False)  # it is in config
        self.register_buffer("frequencies", 3.0 * torch.randn(2, 64))
        if net == "paper":
            self.layers = MLP(3, [512, 512, 512, 512, 512, 2], activation_layer=nn.SiLU)
        else:
            self.layers = MLP(2 + 4 * 64 + 10, [64, 64, 64, 64, 2], activation_layer=nn.SiLU)

    def forward(self, t, x):
        """What the network predicts at t (n,) and standardised x (n, 2), (n, 2)."""
        t = t[:, None]
        if self.net == "paper":
            return self.layers(torch.cat([t, x], 1))
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.path.coefficients(t)
        rho = (alpha_t**2 + sigma_t**2).sqrt()  # std of x_t, as the data has unit variance
        x = x / rho
        near = sigma_t / rho
        phase = x @ self.frequencies
        phase = torch.cat([phase.sin(), phase.cos()], 1)
        sharp = 0.2 / (0.05 + near) * phase  # u_t varies over sigma_t: slopes of 1 / sigma_t
        wave = math.pi * t * torch.arange(1, 5, device=t.device)
        features = [x, phase, sharp, t, -torch.log(0.01 + near), wave.sin(), wave.cos()]
        x0 = near * x  # E[x0 | x_t] of Gaussian data
        x1 = alpha_t / rho * x  # E[x1 | x_t] of Gaussian data
        if self.predict == "velocity":
            linear = dalpha_t * x1 + dsigma_t * x0
        elif self.predict == "noise":
            linear = x0
        else:
            linear = -x0 / sigma_t
        return linear + self.layers(torch.cat(features, 1))

    def velocity(self, t, x):
        """v_t(x), Eq. (46), at t (n,) and standardised x (n, 2), (n, 2)."""
        return self.path.convert(t, x, self(t, x), self.predict, "velocity")

    def sample(self, n, **solver):
        """n samples in data units, (n, 2), by the solver of flow_matching.odeint."""
        x = fm.sample(self.velocity, self.path, (n, 2), device=self.shift.device, **solver).x
        return self.shift + self.scale * x

    def log_prob(self, x, **solver):
        """log density in nats at x (n, 2) in data units, (n,)."""
        x = (x - self.shift) / self.scale
        log_p = fm.log_prob(self.velocity, self.path, x, **solver).log_prob
        return log_p - 2 * math.log(self.scale)


def minibatch_ot(x1):
    """Noise x0 for x1 (n, 2), assigned in groups of 128: the time grows as their cube."""
    x0 = torch.randn_like(x1)
    matched = []
    for a, b in zip(x0.split(128), x1.split(128)):
        matched.append(a[fm.ot_coupling(a, b)])
    return torch.cat(matched)


def reflow_pairs(teacher, n):
    """n pairs x0, x1, each (n, 2): noise, and where the teacher's flow takes it."""
    x0 = torch.randn(n, 2).to(teacher.shift.device)
    x1 = fm.odeint(teacher.velocity, x0, teacher.path.t_span, rtol=1e-4, atol=1e-4).x
    return x0, x1


def train(name, method, data, args):
    """The Flow of a method, trained again in every round of reflow, on the pairs of the last."""
    flow = train_once(name, method, data, args)
    for _ in range(method.reflow):
        flow = train_once(name, method, data, args, teacher=flow)
    return flow


def train_once(name, method, data, args, teacher=None):
    """A Flow after args.steps steps of Adam with cosine decay; with a teacher, on its pairs."""
    torch.manual_seed(args.seed)
    shift = data.shift.tolist()
    flow = Flow(method.path, method.objective, args.sigma_min, args.net, shift, data.scale)
    flow.to(args.device)
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.lr, betas=(0.9, 0.99))
    if teacher is not None:
        starts, ends = reflow_pairs(teacher, min(2**17, args.steps * args.batch))
    for step in range(1, args.steps + 1):
        warmup = min(1, step / 200)
        decay = (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * warmup * decay
        if teacher is not None:
            i = torch.randint(len(starts), (args.batch,))
            x0 = starts[i]
            x1 = ends[i]
        else:
            x0 = None  # cfm_loss draws independent noise
            x1 = data.sample(args.batch).to(args.device)
            if method.coupling == "ot":
                x0 = minibatch_ot(x1)
        loss = fm.cfm_loss(flow, flow.path, x1, x0=x0, **fm.OBJECTIVES[method.objective])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0 or step == args.steps:
            print(f"{name}: step {step}  loss {loss.item():.4f}", file=sys.stderr)
            if not loss.isfinite():
                raise ValueError(f"{name}: the loss is not finite at step {step}: lower --lr")
    return flow.requires_grad_(False)


def save(file, flow):
    """Writes a Flow beside file and moves it there, so that file is always whole."""
    part = file.with_suffix(".part")
    torch.save({"config": flow.config, "weights": flow.state_dict()}, part)
    part.replace(file)


def load(file):
    """The Flow that train_toy.py wrote to file (model_<row>.pt), on the CPU."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    flow = Flow(**state["config"])
    flow.load_state_dict(state["weights"])
    return flow.requires_grad_(False)


# ---- Data: each set with its exact density and marginal field, so an exact loss floor. ----
# ---- On the CPU, where float64 is always to be had. ----
class Checkerboard:
    """Eight squares of side 1 / 0.45; points are standardised, (data - shift) / scale."""

    def __init__(self):
        corners = [(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0]
        side = math.sqrt(3 / 4)  # to unit variance
        self.low = side * torch.tensor(corners, dtype=torch.float64)  # (8, 2)
        self.high = self.low + side
        self.shift = torch.zeros(2)
        self.scale = 1 / 0.45 / side

    def sample(self, n):
        """n standardised points, (n, 2)."""
        u = torch.rand(n, 2)
        i = torch.randint(8, (n,))
        return torch.lerp(self.low.float()[i], self.high.float()[i], u)

    def log_prob(self, x):
        """Exact log density in nats and data units at standardised x, (n,)."""
        x = x[:, None]
        inside = (x >= self.low.float()) & (x <= self.high.float())
        return torch.where(inside.all(2).any(1), -math.log(8 / 0.45**2), -math.inf)

    def field(self, path, t, x):
        """u_t(x), Eq. (8), in closed form: in each square x1 given x_t is two truncated normals."""
        t = t.double()
        x = x.double()
        alpha_t, sigma_t, _, _ = path.coefficients(t[:, None, None])
        alpha_t = alpha_t.clamp(min=1e-4)
        mean = x[:, None] / alpha_t
        std = sigma_t / alpha_t
        a = (self.low - mean) / std  # (n, 8, 2)
        b = (self.high - mean) / std
        centre = (a + b).abs() / 2  # mirrored to the tail where ndtr is accurate
        half = (b - a) / 2
        mass = (ndtr(half - centre) - ndtr(-half - centre)).clamp(min=1e-300)
        slope = (torch.exp(-(a**2) / 2) - torch.exp(-(b**2) / 2)) / (math.sqrt(2 * math.pi) * mass)
        x1 = (mean + std * slope).clamp(self.low, self.high)  # its mean in every square
        weights = mass.log().sum(2, keepdim=True).softmax(1)
        return path.u(t, x, (weights * x1).sum(1)).float()


class Mixture:
    """Gaussians of std noise at N centres (N, d), standardised in the same way."""

    def __init__(self, centres, noise):
        self.shift = centres.mean(0)
        self.scale = ((centres - self.shift).square().mean() + noise**2).sqrt().item()
        self.centres = (centres - self.shift) / self.scale
        self.noise = noise / self.scale

    def sample(self, n):
        """n standardised points, (n, 2)."""
        i = torch.randint(len(self.centres), (n,))
        return self.centres[i] + self.noise * torch.randn(n, 2)

    def log_prob(self, x):
        """Exact log density in nats and data units at standardised x, (n,)."""
        marginal = fm.Marginal(blurred(fm.OTPath(0.0), self.noise), self.centres)
        return marginal.log_prob(1 - 1e-5, x) - 2 * math.log(self.scale)

    def field(self, path, t, x):
        """u_t(x), Eq. (8), in closed form: Marginal's on the path of x1 + N(0, noise^2 I)."""
        marginal = fm.Marginal(blurred(path, self.noise), self.centres)
        parts = []
        for t_part, x_part in zip(t.split(4096), x.split(4096)):  # 4096 x N weights at a time
            parts.append(marginal(t_part, x_part))
        return torch.cat(parts)


def blurred(path, std):
    """The path of x1 + N(0, std^2 I), whose sigma_t takes in the std."""

    def sigma(t):
        return torch.hypot(std * path.alpha(t), path.sigma(t))

    return fm.AffinePath(path.alpha, sigma, path.t_span, check_ends=False)


def circle(turns):
    """1,000 points on the unit circle, over that many half turns, (1000, 2)."""
    angle = turns * math.pi * torch.arange(1000) / 1000
    return torch.stack([torch.cos(angle), torch.sin(angle)], 1)


MIXTURES = {  # centres and noise
    "8gaussians": (4 * circle(2)[::125], 0.3),
    "moons": (torch.cat([circle(1), torch.tensor([1.0, 0.5]) - circle(1)]), 0.08),
    "rings": (torch.cat([1.5 * circle(2), 3 * circle(2)]), 0.1),
}


def make_data(name):
    """The data set of that name, or of a picture file."""
    if name == "checkerboard":
        return Checkerboard()
    if name in MIXTURES:
        return Mixture(*MIXTURES[name])
    if not Path(name).is_file():
        names = ", ".join(MIXTURES)
        raise ValueError(f"--data must be checkerboard, {names} or a picture file; got {name}")
    grey = read_grey(name)
    grey.thumbnail((128, 128))
    row, column = np.nonzero(np.asarray(grey) < 128)  # dark pixels
    if len(row) == 0:
        raise ValueError(
            f"--data {name} has no pixel darker than 128 of 255 to take as the density"
        )
    centres = np.stack([column, grey.height - row], 1)  # y points up
    return Mixture(torch.from_numpy(centres).float(), 0.5)


def read_grey(file):
    """An 8-bit grey Image of a picture file, transparent pixels on white, turned as EXIF says."""
    picture = ImageOps.exif_transpose(Image.open(file))
    if picture.mode in ("I", "F"):
        raise ValueError(f"--data {file} has mode {picture.mode}, without a white: save 8-bit grey")
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("L")


# ---- Numbers ----
def measure(flow, method, data, args):
    """Numbers of a flow against the truth, as a dict; points and noise depend on the seed only."""
    n = min(args.samples, 4000)
    torch.manual_seed(args.seed + 1)
    x1 = data.sample(n)
    many = data.sample(16 * n)
    noise = torch.randn_like(many)
    numbers = {}
    if method.coupling == "independent" and method.reflow == 0:  # else u has no closed form
        numbers.update(measure_loss(flow, data, noise, many))
    x0 = flow.path.sample_source((n, 2)).to(args.device)
    truth = data.scale * data.sample(n)
    log_p = data.log_prob(x1)
    points = (data.shift + data.scale * x1).to(args.device)
    gap = log_p - flow.log_prob(points, rtol=1e-6, atol=1e-6).cpu()
    numbers["gap"] = gap.mean().item()
    numbers["gap_se"] = gap.std().item() / math.sqrt(n)
    numbers["entropy"] = -log_p.mean().item()
    nfe = fm.odeint(flow.velocity, x0, flow.path.t_span).nfe
    numbers["nfe"] = nfe.cpu().double().mean().item()
    numbers["energy"], numbers["rmse"] = measure_solvers(flow, x0, truth, data.scale)
    if args.sde:
        numbers["energy"]["sde"] = measure_sde(flow, truth, data.scale, args)
    return numbers


def measure_loss(flow, data, x0, x1):
    """The loss, Eq. (14), that of the exact field, and the excess E|v - u|^2 / 2, as a dict."""
    device = flow.shift.device
    t = flow.path.t_span[1] * torch.rand(len(x1))
    x_t, dpsi_t = flow.path.psi_dpsi(t, x0, x1)
    v_t = flow.velocity(t.to(device), x_t.to(device)).cpu()
    u_t = data.field(flow.path, t, x_t)
    return {
        "loss": mse_loss(v_t, dpsi_t).item(),
        "floor": mse_loss(u_t, dpsi_t).item(),
        "excess": mse_loss(v_t, u_t).item(),
    }


def measure_solvers(flow, x0, truth, scale):
    """Energy distance to truth, and RMSE to the accurate solution: {method: {NFE: number}} each."""
    energy = {}
    rmse = {}
    accurate = fm.odeint(flow.velocity, x0, flow.path.t_span, rtol=1e-6, atol=1e-6).x
    for method, stages in STAGES.items():
        energy[method] = {}
        rmse[method] = {}
        for nfe in NFES:
            if nfe % stages == 0:
                steps = nfe // stages
                x = fm.odeint(flow.velocity, x0, flow.path.t_span, method=method, steps=steps).x
                energy[method][nfe] = energy_distance(scale * x.cpu(), truth)
                rmse[method][nfe] = mse_loss(x, accurate).sqrt().item()
    return energy, rmse


def measure_sde(flow, truth, scale, args):
    """Energy distance of the SDE's samples to truth, {NFE: number}."""
    energy = {}
    for nfe in NFES:
        torch.manual_seed(args.seed)
        x = fm.sample_sde(flow.velocity, flow.path, truth.shape, steps=nfe, device=args.device)
        energy[nfe] = energy_distance(scale * x.cpu(), truth)
    return energy


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, from samples (n, d); 0 for equal laws."""
    between = 2 * torch.cdist(x, y).mean()
    return (between - torch.pdist(x).mean() - torch.pdist(y).mean()).item()


def straightness(xs):
    """Median arc / chord, bend and share outside of trajectories xs (T, n, d); 1, 0, 0 if straight.

    outside: the share of them that leave the slab between their ends, on either side.
    """
    chord = xs[-1] - xs[0]
    legs = xs.diff(dim=0)
    arc = legs.norm(dim=2).sum(0) / chord.norm(dim=1)  # a ratio whose mean may be infinite
    bend = (legs * len(legs) - chord).square().sum(2)  # |(x1 - x0) - v|^2 of Liu et al. (2022)
    progress = ((xs - xs[0]) * chord).sum(2) / chord.square().sum(1)
    outside = (progress - 0.5).abs().amax(0) > 0.501
    return arc.median().item(), bend.mean().item(), outside.double().mean().item()


def table(results):
    """The numbers of every row as text."""
    entropy = next(iter(results.values()))["entropy"]
    lines = [
        f"gap: NLL - entropy of the data ({entropy:.4f} nats). excess: E|v - u|^2 / 2, u exact.",
        "NFE: calls of v for one sample by dopri5 at 1e-5. training: in seconds.",
        "",
        f"{'':26s}gap         excess     NFE  training",
    ]
    for name, r in results.items():
        gap = f"{r['gap']:10.4f} ± {r['gap_se']:.4f}"
        excess = "-"
        if "excess" in r:
            excess = f"{r['excess']:.4f}"
        lines.append(f"{name:16s}{gap} {excess:>10s}{r['nfe']:8.1f}{r['seconds']:10.1f}")
    lines.append(
        "\nenergy distance x 1000 to the data; the draws of 4000 samples alone make up to 2"
    )
    lines += solver_lines(results, "energy")
    lines.append("\nRMSE x 1000 to the accurate solution from the same noise, Figure 7")
    lines += solver_lines(results, "rmse")
    return "\n".join(lines)


def solver_lines(results, kind):
    """Energy distances or RMSEs x 1000: a line for each row and method, a column for each NFE."""
    head = f"{'NFE':25s}"
    for nfe in NFES:
        head += f"{nfe:7d}"
    lines = [head]
    for name, r in results.items():
        for method, values in r[kind].items():
            line = f"{name:16s}{method:9s}"
            for nfe in NFES:
                if nfe in values:
                    line += f"{1000 * values[nfe]:7.1f}"
                else:
                    line += "      -"
            lines.append(line)
    return lines


# ---- Pictures: panels show the square [-2.25, 2.25]^2 of standardised points ----
PANEL = 156  # pixels; five and the names of the rows fill the width of a page on GitHub
LABELS = {"ot": "OT path", "vp": "diffusion path (VP)", "ve": "diffusion path (VE)"}
NIGHT = "#160e34"
START = "#2563eb"  # of a trajectory: blue
END = "#dc2626"  # red


def density_image(x):
    """An Image of the density of points x (n, 2): 0 is dark blue, 0.22 and more yellow."""
    bins = PANEL // 2
    p = torch.histogramdd(x.cpu(), [bins, bins], range=[-2.25, 2.25, -2.25, 2.25], density=True)
    p = p.hist.T.flip(0)  # rows from the top
    grey = Image.fromarray((255 * p / 0.22).clamp(0, 255).byte().numpy())
    image = ImageOps.colorize(grey, NIGHT, "#fae83c", "#21828e")
    return image.resize((PANEL, PANEL), Image.NEAREST)


def save_grid(file, headings, rows):
    """A picture of {name: panels}: a row for each name, headings over the columns."""
    left = 26
    top = 26
    step = PANEL + 4
    size = (left + step * len(headings) - 4, top + step * len(rows) - 4)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for column, heading in enumerate(headings):
        middle = left + step * column + PANEL / 2
        pen.text((middle, top / 2), heading, "black", anchor="mm", font_size=15)
    for row, (name, panels) in enumerate(rows.items()):
        label = Image.new("RGB", (PANEL, left), "white")
        middle = (PANEL / 2, left / 2)
        ImageDraw.Draw(label).text(
            middle, LABELS.get(name, name), "black", anchor="mm", font_size=15
        )
        canvas.paste(label.rotate(90, expand=True), (0, top + step * row))
        for column, panel in enumerate(panels):
            canvas.paste(panel, (left + step * column, top + step * row))
    canvas.quantize(64).save(file, optimize=True)


def draw_samples(flows, data, args):
    """density.png and nfe.png, Figure 4, a row for each flow; of an ablation the main rows, too."""
    density = {}
    nfe = {}
    for name, flow in flows.items():
        torch.manual_seed(args.seed)
        x0 = flow.path.sample_source((args.samples, 2)).to(args.device)
        start, end = flow.path.t_span
        times = (start, 1 / 3, 2 / 3, 5 / 6, end)
        xs = fm.odeint(flow.velocity, x0, times, rtol=1e-3, atol=1e-3).xs
        density[name] = [density_image(x) for x in xs]
        nfe[name] = []
        for steps in (2, 4, 5, 10):
            x = fm.odeint(flow.velocity, x0, (start, end), method="midpoint", steps=steps).x
            nfe[name].append(density_image(x))
        nfe[name].append(density_image(data.sample(args.samples)))
    times = ("t = 0, noise", "t = 1/3", "t = 2/3", "t = 5/6", "t = 1, samples")
    calls = ("NFE 4", "NFE 8", "NFE 10", "NFE 20", "data")
    save_grid(args.out / "density.png", times, density)
    save_grid(args.out / "nfe.png", calls, nfe)
    if args.ablation:
        save_grid(args.out / "density_main.png", times, {name: density[name] for name in MAIN_ROWS})
        save_grid(args.out / "nfe_main.png", calls, {name: nfe[name] for name in MAIN_ROWS})


def draw_flow(flows, args):
    """flow.gif: samples of every flow side by side, from t = 0 to 1, coloured by their start."""
    frames = 31
    trajectories = {}
    for name, flow in flows.items():
        torch.manual_seed(args.seed)
        x0 = flow.path.sample_source((1200, 2)).to(args.device)
        times = torch.linspace(*flow.path.t_span, frames)
        xs = fm.odeint(flow.velocity, x0, times, rtol=1e-3, atol=1e-3).xs
        trajectories[name] = xs.cpu()
    images = []
    for i in range(frames):
        points = {name: (xs[0], xs[i]) for name, xs in trajectories.items()}
        images.append(flow_frame(points, i / (frames - 1)))
    palette = images[-1].quantize(32)
    images = [image.quantize(palette=palette, dither=0) for image in images]
    images[0].save(
        args.out / "flow.gif",
        save_all=True,
        append_images=images[1:],
        duration=[700] + (frames - 2) * [80] + [2500],  # milliseconds
        loop=0,  # for ever
    )


def flow_frame(points, t):
    """An Image of flow.gif: points is {name: (start, now)}, each (n, 2)."""
    sectors = ("#fde725", "#5ec962", "#21a5b0", "#6f7fe0", "#d04fb5", "#ff7f50")
    size = min(360, 820 // len(points))
    step = size + 8
    canvas = Image.new("RGB", (step * len(points) - 8, size + 68), "#0b0720")
    pen = ImageDraw.Draw(canvas)
    for column, (name, (start, now)) in enumerate(points.items()):
        panel = Image.new("RGB", (size, size), NIGHT)
        dots = ImageDraw.Draw(panel)
        angle = torch.atan2(start[:, 1], start[:, 0])
        sector = (6 * (angle / (2 * math.pi) + 0.5)).long() % 6
        pixels = size / 2 * (1 + now * torch.tensor([1, -1]) / 2.25)
        for (x, y), k in zip(pixels.round().tolist(), sector.tolist()):
            dots.ellipse((x - 2, y - 2, x + 1, y + 1), sectors[k])
        canvas.paste(panel, (step * column, 32))
        middle = step * column + size / 2
        pen.text((middle, 17), LABELS.get(name, name), "white", anchor="mm", font_size=18)
    y = size + 50
    left = 96
    right = canvas.width - 16
    pen.text((16, y), f"t = {t:.2f}", "white", anchor="lm", font_size=17)
    pen.rectangle((left, y - 2, right, y + 2), "#3b3560")
    pen.rectangle((left, y - 2, left + t * (right - left), y + 2), "white")
    return canvas


def trajectories_image(xs, size, data):
    """An Image of trajectories xs (T, n, d): lines from blue to red, on pale dots of data."""
    image = Image.new("RGB", (4 * size, 4 * size), "white")
    pen = ImageDraw.Draw(image)
    square = 2 * size * (1 + data * torch.tensor([1, -1]) / 2.25)
    pixels = 2 * size * (1 + xs[..., :2] * torch.tensor([1, -1]) / 2.25)
    for x, y in square.tolist():
        pen.ellipse((x - 7, y - 7, x + 7, y + 7), "#fbd5d5")
    for line in pixels.transpose(0, 1).flatten(1).tolist():
        pen.line(line, "#808080", 4)
    for colour, points in ((START, pixels[0]), (END, pixels[-1])):
        for x, y in points.tolist():
            pen.ellipse((x - 9, y - 9, x + 9, y + 9), colour)
    return image.reduce(4)


def exact_fields(path, data, points):
    """Marginal fields u_t of the data and of its first points, {title: field}."""

    def field(t, x):
        return data.field(path, t, x)

    return {
        "exact flow of the data": field,
        "exact flow, 1 point": fm.Marginal(path, points[:1]),
        "exact flow, 3 points": fm.Marginal(path, points[:3]),
        "exact flow, 1000 points": fm.Marginal(path, points),
    }


def draw_figure(data, args):
    """paths.png. Returns what is straight, exact Euler steps and what is memorised, as text."""
    paths = {"OT": fm.OTPath(args.sigma_min), "VP": fm.VPPath()}
    points = data.sample(1000)
    lines = [f"{'':28s}arc / chord     bend    outside"]
    figure = {}
    for name, path in paths.items():
        times = torch.linspace(*path.t_span, 101)
        trajectories = {}
        for dims in (2, 30):  # Figure 3
            x0, x1 = torch.randn(2, 5000, dims)
            xs = [path.psi(t.expand(5000), x0, x1) for t in times]
            trajectories[f"single pairs in {dims}-D"] = torch.stack(xs)
        for title, u in exact_fields(path, data, points).items():  # Theorem 1
            x0 = torch.randn(1000, 2)
            trajectories[title] = fm.odeint(u, x0, times).xs
        for title, xs in trajectories.items():
            arc, bend, outside = straightness(xs)
            lines.append(f"{title:24s}{name:4s}{arc:13.3f}{bend:9.3f}{outside:11.3f}")
        figure[name] = trajectories
    save_trajectories(args.out / "paths.png", figure, points)
    ends = figure["VP"]["exact flow, 1000 points"][-1]
    near = torch.cdist(ends, points).amin(1).median()
    new = torch.cdist(data.sample(1000), points).amin(1).median()
    lines.append(f"\nmedian distance to the 1000: {near:.4f} of their flow, {new:.4f} of new data")
    lines.append("\nstd / truth after 1, 2, 4, 8, 16 and 32 exact Euler steps to N(0, std^2 I)")
    for name, path in paths.items():
        for std in (1.0, 0.25):
            u = fm.Marginal(blurred(path, std), torch.zeros(1, 1))
            line = f"{name}, std {std:4}"
            for steps in (1, 2, 4, 8, 16, 32):
                x = fm.odeint(u, torch.ones(1, 1), path.t_span, method="euler", steps=steps).x
                line += f"{x.item() / std:6.2f}"
            lines.append(line)
    return "\n".join(lines)


def save_trajectories(file, figure, points):
    """A picture of {path: {title: xs}}; the exact flow of the data is large, on points of it."""
    places = {  # x, y and size of a panel in pixels
        "single pairs in 2-D": (0, 0, 156),
        "single pairs in 30-D": (0, 182, 156),
        "exact flow of the data": (162, 0, 338),
        "exact flow, 1 point": (506, 0, 156),
        "exact flow, 3 points": (668, 0, 156),
        "exact flow, 1000 points": (506, 182, 156),
    }
    height = 400  # of a path: its name, then panels below their titles
    canvas = Image.new("RGB", (824, height * len(figure)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (name, trajectories) in enumerate(figure.items()):
        top = i * height + 36
        pen.text((2, top - 16), f"{name} path", "black", anchor="lm", font_size=21)
        for title, (x, y, size) in places.items():
            xs = trajectories[title]
            if title == "exact flow of the data":
                panel = trajectories_image(xs[:, :80], size, points)
            else:
                panel = trajectories_image(xs[:, :40], size, points[:0])
            y += top
            pen.text((x + size / 2, y + 9), title, "black", anchor="mm", font_size=14)
            canvas.paste(panel, (x, y + 20))
            pen.rectangle((x, y + 20, x + size - 1, y + 19 + size), outline="#d0d0d0")
        x = 680
        y = top + 262
        for colour, label in ((START, "noise, t = 0"), (END, "data, t = 1")):
            pen.ellipse((x, y - 4, x + 8, y + 4), colour)
            pen.text((x + 16, y), label, "black", anchor="lm", font_size=14)
            y += 24
    canvas.quantize(64).save(file, optimize=True)


# ---- Command line ----
def save_metrics(args, results):
    """metrics.json: the settings and the rows that are there so far."""
    state = {"settings": vars(args), "results": results}
    part = args.out / "metrics.part"
    part.write_text(json.dumps(state, indent=1, default=str))
    part.replace(args.out / "metrics.json")


def run(args):
    """Trains, measures and draws every row of the table, or draws the figure."""
    data = make_data(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that takes no files fails here
    print("settings:", vars(args))
    if args.figure:
        torch.manual_seed(args.seed)
        print(draw_figure(data, args))
        print(f"\nthe picture is in {args.out}")
        return
    flows = {}
    results = {}
    for name, method in table_rows(args).items():
        start = time.time()
        flow = train(name, method, data, args)
        seconds = time.time() - start
        save(args.out / f"model_{name.replace(',', '').replace(' ', '_')}.pt", flow)
        flows[name] = flow
        results[name] = measure(flow, method, data, args)
        results[name]["seconds"] = seconds
        save_metrics(args, results)
    print(table(results))  # before the pictures, for which the disk may be too full
    draw_samples(flows, data, args)
    if args.ablation:
        draw_flow({name: flows[name] for name in MAIN_ROWS}, args)
    else:
        draw_flow(flows, args)
    print(f"\npictures, metrics.json and weights are in {args.out}")


def main(argv=None):
    """The command; what is wrong with its settings ends it with one line."""
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, Image.DecompressionBombError, fm.SolverError) as e:
        sys.exit(f"train_toy.py: {e}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
