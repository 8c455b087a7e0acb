# SPDX-License-Identifier: MIT
"""Flow matching in two dimensions: train on a toy density, draw Figure 4, print true numbers.

python train_toy.py --path ot              a minute on two CPU cores; results in runs/toy
python train_toy.py --path ot vp           a row for each path: same seed, network and steps
python train_toy.py --ablation             Table 1, Figures 4, 7 and 9, couplings and reflow
python train_toy.py --figure conditional   Figure 3, what is straight, exact Euler steps
python train_toy.py --figure marginal      Theorem 1 and Figure 2: exact fields of finite data
python train_toy.py --data drawing.png     the dark pixels of a picture are the density
python train_toy.py --net paper            the paper's network of 5 x 512, many times slower
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

import flow_matching as fm

ABLATION = {  # Table 1, and below it what later papers do to the pairs (x0, x1)
    "DDPM": {"path": "vp", "objective": "noise"},
    "score matching": {"path": "vp", "objective": "score"},
    "ScoreFlow": {"path": "vp", "objective": "scoreflow"},
    "FM, diffusion": {"path": "vp", "objective": "velocity"},
    "FM, OT": {"path": "ot", "objective": "velocity"},
    "minibatch OT": {"path": "ot", "objective": "velocity", "coupling": "ot"},
    "reflow": {"path": "ot", "objective": "velocity", "reflow": 1},
}
RIVALS = ("path", "objective", "coupling", "reflow", "figure")  # of --ablation
NFES = (2, 4, 8, 10, 20, 40, 100)


# ---- Settings ------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The settings, tried: a mistake ends with one line and exit code 2."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    flag = p.add_argument
    flag("--path", nargs="+", default=["ot"], choices=fm.PATHS, help="paths, a row for each")
    flag("--objective", default="velocity", choices=fm.OBJECTIVES, help="what is learned, Table 1")
    flag("--coupling", default="independent", choices=("independent", "ot"), help="ot needs SciPy")
    flag("--reflow", type=int, default=0, help="rounds of training again on the flow's own pairs")
    flag("--sigma-min", type=float, default=1e-4, help="sigma_min of the OT path, Eq. (20)")
    flag("--net", default="fourier", choices=("fourier", "paper"), help="paper: 5 x 512 on (t, x)")
    flag("--data", default="checkerboard", help=f"{', '.join(MIXTURES)} or a PNG file")
    flag("--steps", type=int, default=7000, help="optimizer steps")
    flag("--batch", type=int, default=2048, help="samples a step")
    flag("--lr", type=float, default=4e-3, help="peak learning rate")
    flag("--seed", type=int, default=0, help="seeds weights, data and noise")
    flag("--sde", type=float, nargs="?", const=True, help="samples by the SDE too; its diffusion g")
    flag("--samples", type=int, default=50000, help="points in pictures; 4000 at most are measured")
    flag("--out", type=Path, default="runs/toy", help="folder for pictures, numbers and weights")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    flag("--ablation", action="store_true", help=f"train the rows {'; '.join(ABLATION)}")
    flag("--figure", choices=("conditional", "marginal"), help="draw closed forms, train nothing")
    args = p.parse_args(argv)
    low = {"reflow": 0, "steps": 1, "batch": 1, "lr": 1e-9, "seed": 0, "sde": 0, "samples": 2}
    for name, value in vars(args).items():
        if name in low and value is not None and not low[name] <= value < math.inf:
            p.error(f"--{name} must be at least {low[name]} and finite; got {value}")
        if args.ablation and name in RIVALS and value != p.get_default(name):
            p.error(f"--ablation has its own rows: leave out --{name}")
    if args.sigma_min != p.get_default("sigma_min") and "ot" not in args.path:
        p.error("--sigma-min is of the OT path: add --path ot")
    if args.sde is not None and (args.coupling == "ot" or args.reflow):
        p.error("--sde needs the score, which v tells only for independent pairs")
    rows = ABLATION if args.ablation else {name: {"path": name} for name in args.path}
    try:
        args.dataset = make_data(args.data)
        args.out.mkdir(parents=True, exist_ok=True)
        args.rows = {name: argparse.Namespace(**(vars(args) | row)) for name, row in rows.items()}
        for row in args.rows.values():
            trial = argparse.Namespace(**(vars(row) | {"steps": 1, "batch": 2}))
            train("trial", trial).sample(2, method="euler", steps=1)
    except (ValueError, ImportError, OSError, RuntimeError, AssertionError) as e:
        p.error(str(e).splitlines()[0])
    return args


# ---- Network and training ------------------------------------------------------------------------


class Net(nn.Module):
    """A velocity, noise or score at t (B,) and x (B, 2): four layers of 64 on Fourier features.

    They let it see edges. It learns what is left of its target when the linear answer to Gaussian
    data of unit variance, E[x1 | x] = alpha x / rho^2 and E[x0 | x] = sigma x / rho^2, is known.
    Departure: the paper's toy network, "paper" here, is five layers of 512 on (t, x) alone.
    """

    def __init__(self, path, predict="velocity", kind="fourier"):
        super().__init__()
        self.path, self.predict, self.kind = path, predict, kind
        self.register_buffer("frequencies", 3.0 * torch.randn(2, 64))
        sizes = [3] + [512] * 5 if kind == "paper" else [2 + 4 * 64 + 10] + [64] * 4
        layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 2))

    def forward(self, t, x):
        t = t[:, None]
        if self.kind == "paper":
            return self.layers(torch.cat([t, x], 1))
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.path.coefficients(t)
        rho = (alpha_t**2 + sigma_t**2).sqrt()
        x, near = x / rho, sigma_t / rho
        phase = x @ self.frequencies
        phase = torch.cat([phase.sin(), phase.cos()], 1)
        sharp = 0.2 / (0.05 + near) * phase  # u_t varies over sigma_t: slopes of 1 / sigma_t
        wave = math.pi * t * torch.arange(1, 5, device=x.device)
        features = [x, phase, sharp, t, -torch.log(0.01 + near), wave.sin(), wave.cos()]
        x0, x1 = near * x, alpha_t / rho * x
        linear = {"velocity": dalpha_t * x1 + dsigma_t * x0, "noise": x0, "score": -x0 / sigma_t}
        return linear[self.predict] + self.layers(torch.cat(features, 1))


class Flow:
    """A trained flow: v works on standardised points, sample and log_prob in data units."""

    def __init__(self, net, shift, scale):
        self.net, self.path = net.requires_grad_(False), net.path
        self.shift, self.scale = shift, scale  # data = shift + scale * standardised
        self.v = fm.as_velocity(net, net.path, net.predict)

    def sample(self, n, **solver):
        """n samples in data units, (n, 2), by the solver of flow_matching.odeint."""
        x = fm.sample(self.v, self.path, (n, 2), device=self.shift.device, **solver).x
        return self.shift + self.scale * x

    def log_prob(self, x, **solver):
        """log density in nats at x (n, 2) in data units, (n,)."""
        x = (x - self.shift) / self.scale
        return fm.log_prob(self.v, x, self.path, **solver).log_prob - 2 * math.log(self.scale)


def batches(args, teacher):
    """Pairs (x0, x1) without end: the teacher's, if any; x0 = None is independent noise."""
    if teacher:  # from noise to where its flow takes it
        x0 = torch.randn(min(2**17, args.steps * args.batch), 2, device=args.device)
        with torch.no_grad():
            x1 = fm.odeint(teacher.v, x0, teacher.path.t_span, rtol=1e-4, atol=1e-4).x
        while True:
            i = torch.randint(len(x0), (args.batch,), device=args.device)
            yield x0[i], x1[i]
    while True:
        x0, x1 = None, args.dataset.sample(args.batch)
        if args.device.startswith("cuda"):
            x1 = x1.pin_memory()  # so that the copy does not wait for the device
        x1 = x1.to(args.device, non_blocking=True)
        if args.coupling == "ot":  # in groups of 128: the time of an assignment grows as their cube
            groups = zip(torch.randn_like(x1).split(128), x1.split(128), strict=True)
            x0 = torch.cat([a[fm.ot_coupling(a, b)] for a, b in groups])
        yield x0, x1


def train(name, args):
    """A Flow after args.steps steps of Adam with cosine decay; with reflow, its teacher's first."""
    teacher = None
    if args.reflow:
        teacher = train(name, argparse.Namespace(**{**vars(args), "reflow": args.reflow - 1}))
    torch.manual_seed(args.seed)
    path = fm.OTPath(args.sigma_min) if args.path == "ot" else fm.PATHS[args.path]()
    objective = fm.OBJECTIVES[args.objective]
    net = Net(path, objective.get("predict", "velocity"), args.net).to(args.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99))
    start, pairs = time.time(), batches(args, teacher)
    for step in range(1, args.steps + 1):
        warmup, decay = min(1, step / 200), 1 + math.cos(math.pi * (step - 1) / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * warmup * decay / 2
        x0, x1 = next(pairs)
        loss = fm.cfm_loss(net, path, x1, x0=x0, **objective)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0 or step == args.steps > 1:
            seconds, value = time.time() - start, loss.item()  # the only wait for the device
            print(f"{name}: step {step}  loss {value:.4f}  {seconds:.0f} s", file=sys.stderr)
            if not math.isfinite(value):
                sys.exit(f"{name}: the loss is not finite at step {step}: lower --lr {args.lr}")
    return Flow(net, args.dataset.shift.to(args.device), args.dataset.scale)


def write(file, save):
    """save(temporary name), then move it over file in one step, so that file is always whole."""
    part = file.with_name(file.name + ".part")
    try:
        save(part)
        os.replace(part, file)
    except (OSError, RuntimeError) as e:  # torch says RuntimeError to a full disk
        part.unlink(missing_ok=True)
        sys.exit(f"train_toy.py: {file} cannot be written, the old one is kept: {e}")


def store(flow, args, file):
    """Writes the Flow for load."""
    state = {"format": "flow-matching-toy-2", "path": args.path, "kind": flow.net.kind}
    state |= {"path_options": asdict(flow.path), "predict": flow.net.predict}
    state |= {"net": flow.net.state_dict(), "shift": flow.shift, "scale": flow.scale}
    write(file, lambda part: torch.save(state, part))


def load(file):
    """The Flow that train_toy.py wrote to file (model_<path>.pt), on the CPU."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != "flow-matching-toy-2":
        raise ValueError(f"{file} is not a checkpoint of this train_toy.py")
    path = fm.PATHS[state["path"]](**state["path_options"])
    net = Net(path, state["predict"], state.get("kind", "fourier"))
    net.load_state_dict(state["net"])
    return Flow(net, state["shift"], state["scale"])


# ---- Data: every set has an exact density, an exact marginal field and so an exact loss floor ----


class Checkerboard:
    """Eight squares of side 1 / 0.45; points are standardised, (data - shift) / scale."""

    side = 1 / 0.45

    def __init__(self):
        corners = [(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0]
        self.shift, self.scale = torch.zeros(2), math.sqrt(4 / 3) * self.side  # to unit variance
        self.low = torch.tensor(corners, dtype=torch.float64) * self.side / self.scale  # (8, 2)
        self.high = self.low + self.side / self.scale

    def sample(self, n, generator=None):
        """n standardised points, (n, 2)."""
        u, i = torch.rand(n, 2, generator=generator), torch.randint(8, (n,), generator=generator)
        return torch.lerp(self.low.float()[i], self.high.float()[i], u)

    def log_prob(self, x):
        """Exact log density in nats and data units at standardised x, (n,)."""
        x = x[:, None]
        inside = ((x >= self.low.to(x.dtype)) & (x <= self.high.to(x.dtype))).all(2).any(1)
        return torch.where(inside, -math.log(8 * self.side**2), -math.inf)

    def field(self, path, t, x):
        """u_t(x), Eq. (8), in closed form: in each square x1 given x_t is two truncated normals."""
        t, x = t.double(), x.double()
        alpha_t, sigma_t, _, _ = path.coefficients(t[:, None, None])
        mean, std = x[:, None] / alpha_t.clamp(min=1e-4), sigma_t / alpha_t.clamp(min=1e-4)
        a, b = (self.low - mean) / std, (self.high - mean) / std  # (n, 8, 2)
        flip = a + b > 0  # to the side where log_ndtr is accurate
        log_high = torch.special.log_ndtr(torch.where(flip, -a, b))
        log_low = torch.special.log_ndtr(torch.where(flip, -b, a))
        log_mass = log_high + torch.log(-torch.expm1(log_low - log_high))
        log_norm = log_mass + math.log(2 * math.pi) / 2
        slope = torch.exp(-a.square() / 2 - log_norm) - torch.exp(-b.square() / 2 - log_norm)
        x1 = (mean + std * slope).clamp(self.low, self.high)  # its mean in every square
        x1_mean = (log_mass.sum(2).softmax(1)[:, :, None] * x1).sum(1)
        return path.u(t, x, x1_mean).float()


def blurred(path, std):
    """The path of x1 + N(0, std^2 I): its sigma_t takes in the data's own width."""

    def sigma(t):
        alpha_t, sigma_t, _, _ = path.coefficients(t)
        return torch.hypot(alpha_t * std, sigma_t)

    return fm.AffinePath(lambda t: path.coefficients(t)[0], sigma, path.t_span, check_ends=False)


class Mixture:
    """Gaussians of std noise at N centres (N, 2): p_t and u_t are Marginal's on a blurred path."""

    def __init__(self, centres, noise):
        self.shift = centres.mean(0)
        self.scale = ((centres - self.shift).square().mean() + noise**2).sqrt().item()
        self.centres, self.noise = (centres - self.shift) / self.scale, noise / self.scale

    def sample(self, n, generator=None):
        """n standardised points, (n, 2)."""
        centre = self.centres[torch.randint(len(self.centres), (n,), generator=generator)]
        return centre + self.noise * torch.randn(n, 2, generator=generator)

    def marginal(self, path):
        return fm.Marginal(blurred(path, self.noise), self.centres)

    def field(self, path, t, x):
        """u_t(x), Eq. (8), in closed form."""
        return self.marginal(path)(t, x)

    def log_prob(self, x):
        """Exact log density in nats and data units at standardised x, (n,)."""
        return self.marginal(fm.OTPath(0.0)).log_prob(1 - 1e-5, x) - 2 * math.log(self.scale)


def arc(turns):
    """1,000 points on the unit circle, over that many half turns, (1000, 2)."""
    angle = turns * math.pi * torch.arange(1000) / 1000
    return torch.stack([torch.cos(angle), torch.sin(angle)], 1)


ARM = 3 * math.pi * torch.arange(1000)[:, None] / 1000 * arc(3)
MIXTURES = {  # centres and noise
    "8gaussians": (4 * arc(2)[::125], 0.3),
    "moons": (torch.cat([arc(1), torch.tensor([1.0, 0.5]) - arc(1)]), 0.08),
    "spirals": (torch.cat([ARM, -ARM]), 0.25),
    "rings": (torch.cat([1.5 * arc(2), 3 * arc(2)]), 0.1),
}


def make_data(name):
    """The data set of that name, or of a picture: its dark pixels, y up, 128 pixels at most."""
    if name == "checkerboard":
        return Checkerboard()
    if name in MIXTURES:
        return Mixture(*MIXTURES[name])
    try:
        picture = Image.open(name).convert("RGBA")
    except (OSError, ValueError) as e:
        names = ", ".join(["checkerboard", *MIXTURES])
        raise ValueError(f"--data must be {names} or a PNG file; {e}") from None
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("L")
    picture.thumbnail((128, 128))
    pixels = torch.tensor(list(picture.tobytes())).reshape(picture.height, picture.width)
    row, column = (pixels < 128).nonzero().T
    if len(row) == 0:
        raise ValueError(f"--data {name} has no dark pixel (below 128 of 255)")
    return Mixture(torch.stack([column, picture.height - row], 1).float(), 0.5)


# ---- Numbers -------------------------------------------------------------------------------------


def measure(flow, args):
    """Numbers of a flow against the truth, as a dict; points and noise depend on the seed only."""
    data, path, n = args.dataset, flow.path, min(args.samples, 4000)
    generator = torch.Generator().manual_seed(args.seed + 1)
    x1, many = data.sample(n, generator), data.sample(16 * n, generator)
    x0 = torch.randn(many.shape, generator=generator)
    numbers = {}
    if args.coupling == "independent" and not args.reflow:  # other pairs leave no closed form
        numbers = regression(flow, data, x0, many, generator)
    noise = path.sample_source((n, 2), generator=generator).to(args.device)
    truth = data.scale * data.sample(n, generator)
    log_p = data.log_prob(x1)
    x1 = (data.shift + data.scale * x1).to(args.device)
    gap = log_p - flow.log_prob(x1, rtol=1e-6, atol=1e-6).cpu()
    numbers |= {"gap": gap.mean().item(), "gap_se": gap.std().item() / math.sqrt(n)}
    numbers |= {"entropy": -log_p.mean().item(), "energy": {}, "rmse": {}}
    with torch.no_grad():
        numbers["nfe"] = fm.odeint(flow.v, noise, path.t_span).nfe.double().mean().item()
        times = torch.linspace(*path.t_span, 101).tolist()
        numbers |= straightness(fm.odeint(flow.v, noise, times, "rk4", steps=100).xs)
        accurate = fm.odeint(flow.v, noise, path.t_span, rtol=1e-6, atol=1e-6).x
        for name, x in quick_samples(flow, noise, args):
            numbers["energy"][name] = energy_distance(data.scale * x.cpu(), truth)
            numbers["rmse"][name] = (x - accurate).square().mean().sqrt().item()
    return numbers


def regression(flow, data, x0, x1, generator):
    """The velocity's loss, that of the exact field u, and excess = E|v - u|^2 / 2."""
    t0, t1 = flow.path.t_span
    t = t0 + (t1 - t0) * torch.rand(len(x1), generator=generator)
    x_t, dx_t = flow.path.psi_dpsi(t, x0, x1)
    u_t = data.field(flow.path, t, x_t)
    v_t = flow.v(t.to(flow.shift.device), x_t.to(flow.shift.device)).cpu()
    differences = {"loss": v_t - dx_t, "floor": u_t - dx_t, "excess": v_t - u_t}
    return {name: difference.square().mean().item() for name, difference in differences.items()}


def quick_samples(flow, noise, args):
    """Samples by a fixed number of calls from the same noise: solver and number, x."""
    for nfe in NFES:
        for method in ("midpoint", "euler", "rk4"):
            steps, rest = divmod(nfe, len(fm.METHODS[method].C))
            if rest == 0:
                x = fm.odeint(flow.v, noise, flow.path.t_span, method, steps=steps).x
                yield f"{method} {nfe}", x
        if args.sde is not None:
            options = {} if args.sde is True else {"g": args.sde}
            options["generator"] = torch.Generator(args.device).manual_seed(args.seed)
            shape, device = noise.shape, args.device
            x = fm.sample_sde(flow.v, flow.path, shape, nfe, device=device, **options)
            yield f"sde {nfe}", x


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, from samples (n, d); 0 for equal laws."""
    n = len(x)
    within = sum(torch.cdist(z, z).sum().item() for z in (x, y)) / (n * (n - 1))
    return 2 * torch.cdist(x, y).mean().item() - within


def straightness(xs):
    """Median arc / chord, bend and overshoot of trajectories xs (T, n, d); 1, 0, 0 if straight."""
    chord, legs = xs[-1] - xs[0], xs.diff(dim=0)
    arc = legs.norm(dim=2).sum(0) / chord.norm(dim=1)  # a ratio whose mean may be infinite
    bend = (legs * len(legs) - chord).square().sum(2)  # |(x1 - x0) - v|^2 of Liu et al. (2022)
    progress = ((xs - xs[0]) * chord).sum(2) / chord.square().sum(1)
    outside = (progress - 0.5).abs().amax(0) > 0.501  # of the slab between the ends
    numbers = {"arc": arc.median(), "bend": bend.mean(), "overshoot": outside.double().mean()}
    return {name: number.item() for name, number in numbers.items()}


def table(results):
    """The numbers of every row, a dict of dicts, as text."""
    entropy = next(iter(results.values()))["entropy"]
    lines = [
        f"gap: NLL - entropy of the data ({entropy:.4f} nats). excess: E|v - u|^2 / 2, u exact."
    ]
    lines += ["NFE: calls of v for one sample by dopri5 at 1e-5. training: in seconds.", ""]
    lines += [f"{'':26s}gap         excess     NFE  training"]
    for name, r in results.items():
        gap = f"{r['gap']:10.4f} ± {r['gap_se']:.4f} {r.get('excess', math.nan):10.4f}"
        lines.append(f"{name:16s}{gap}{r['nfe']:8.1f}{r['seconds']:10.1f}")
    titles = {"energy": "energy distance x 1000 to the data, from sampling noise alone up to 2"}
    titles["rmse"] = "RMSE x 1000 to the accurate solution from the same noise, Figure 7"
    for key, title in titles.items():
        lines += ["", title, f"{'NFE':25s}" + "".join(f"{nfe:7d}" for nfe in NFES)]
        for name, r in results.items():
            for method in dict.fromkeys(label.split()[0] for label in r[key]):
                cells = [1000 * r[key].get(f"{method} {nfe}", math.nan) for nfe in NFES]
                cells = "".join(f"{cell:7.1f}" for cell in cells)
                lines.append(f"{name:16s}{method:9s}{cells}")
    return "\n".join(lines).replace("nan", "  -")


# ---- Pictures ------------------------------------------------------------------------------------


def density_image(p):
    """An Image of a density (h, w), top row first, 1 and more at full brightness."""
    grey = Image.fromarray((255 * p.clamp(0, 1)).byte().numpy())
    return ImageOps.colorize(grey, "#160e34", "#fae83c", "#21828e").resize((144, 144), 0)


def paths_image(xs, limit):
    """An Image of trajectories xs (T, n, 2): grey lines from blue starts to red ends."""
    image = Image.new("RGB", (576, 576), "white")
    pen = ImageDraw.Draw(image)
    pixels = 288 + xs.cpu() * torch.tensor([288, -288]) / limit
    for line in pixels.transpose(0, 1).flatten(1).tolist():
        pen.line(line, "grey", 2)
    for end, fill in ((0, "blue"), (-1, "red")):
        for x, y in pixels[end].tolist():
            pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill)
    return image.reduce(4)


def field_image(marginal, t, limit):
    """An Image of p_t and of its field's directions, strokes that begin at a dot."""
    axis = (torch.arange(72) + 0.5) / 36 * limit - limit
    x = torch.stack(torch.meshgrid(axis, axis.flip(0), indexing="xy"), -1)
    p = marginal.log_prob(t, x.reshape(-1, 2)).exp().reshape(72, 72)
    image = density_image(p / p.max())
    pen = ImageDraw.Draw(image)
    starts = x[3::6, 3::6].reshape(-1, 2)
    strokes = nn.functional.normalize(marginal(t, starts)) * limit / 9
    ends = torch.cat([starts, starts + strokes], 1)
    for x, y, *end in (72 + ends * torch.tensor([72, -72, 72, -72]) / limit).tolist():
        pen.line((x, y, *end), "white")
        pen.ellipse((x - 1, y - 1, x + 1, y + 1), "white")
    return image


def errors_image(results, method):
    """An Image of RMSE, 1 to 1e-4, over NFE, 2 to 100, both logarithmic, a line for each row."""
    image = Image.new("RGB", (288, 288), "white")
    pen = ImageDraw.Draw(image)
    for exponent in range(1, 4):
        pen.line((0, 72 * exponent, 288, 72 * exponent), "lightgrey")
        pen.text((2, 72 * exponent), f"1e-{exponent}", "grey")
    for i, (name, r) in enumerate(results.items()):
        colour = f"hsl({360 * i // len(results)}, 90%, 40%)"
        pen.text((180, 4 + 12 * i), name, colour)
        errors = [(nfe, r["rmse"].get(f"{method} {nfe}")) for nfe in NFES]
        logs = [(math.log(nfe / 2, 50), -math.log10(error)) for nfe, error in errors if error]
        pen.line([(288 * x, 72 * y) for x, y in logs], colour, 2)
    return image


def draw_grid(file, panels, columns):
    """A picture of panels, each a caption and an Image, in that many columns."""
    pitch = panels[0][1].width + 4
    canvas = Image.new("RGB", (columns * pitch, len(panels) // columns * pitch), "white")
    for i, (caption, image) in enumerate(panels):
        pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
        pen.text((4, 1), caption, "white", font, stroke_width=2, stroke_fill="black")
        canvas.paste(image, (i % columns * pitch, i // columns * pitch))
    write(file, lambda part: canvas.quantize(64, 2).save(part, "PNG", optimize=True))


def draw_samples(flows, args):
    """density.png and nfe.png, Figure 4 left and right: a row for each flow."""
    data, density, nfe = args.dataset, [], []
    limit = 1.15 * (data.scale * data.sample(20000)).abs().quantile(0.999).item()

    def histogram(x):
        edges, x = [-limit, limit, -limit, limit], data.scale * x.cpu()
        return torch.histogramdd(x, [72, 72], range=edges, density=True).hist.T.flip(0)

    peak = histogram(data.sample(100_000)).quantile(0.97)
    truth = data.sample(args.samples)
    for name, flow in flows.items():
        generator, span = torch.Generator().manual_seed(args.seed), flow.path.t_span
        x0 = flow.path.sample_source((args.samples, 2), generator=generator).to(args.device)
        times = [0, 1 / 3, 2 / 3, 5 / 6, span[1]]
        xs = fm.odeint(flow.v, x0, times, rtol=1e-3, atol=1e-3).xs
        density += [(f"{name}, t = {t:.2f}", histogram(x)) for t, x in zip(times, xs, strict=True)]
        for calls in (4, 8, 10, 20):
            x = fm.odeint(flow.v, x0, span, "midpoint", steps=calls // 2).x
            nfe.append((f"{name}, NFE {calls}", histogram(x)))
        nfe.append(("data", histogram(truth)))
    for file, panels in {"density.png": density, "nfe.png": nfe}.items():
        draw_grid(args.out / file, [(name, density_image(p / peak)) for name, p in panels], 5)


def draw_fields(args):
    """marginal.png, Theorem 1: exact p_t, field and flow of 1, 3 and 1,000 points. Returns text."""
    torch.manual_seed(args.seed)
    many, panels = args.dataset.sample(1000), []
    few = torch.tensor([[1.0, 0.6], [-1.2, 0.5], [0.2, -1.2]])
    for points in (few[:1], few, many):
        for name, path in {"OT": fm.OTPath(args.sigma_min), "VP": fm.VPPath()}.items():
            name, u = f"{name}, N = {len(points)}", fm.Marginal(path, points)
            for t in (0.0, 0.4, 0.7, 0.95):
                panels.append((f"{name}, t = {t}", field_image(u, t, 2.5)))
            xs = fm.odeint(u, torch.randn(60, 2), torch.linspace(*path.t_span, 101).tolist()).xs
            panels.append((f"{name}, flow", paths_image(xs, 2.5)))
    draw_grid(args.out / "marginal.png", panels, 5)
    near, far = (torch.cdist(x, many).amin(1).median() for x in (xs[-1], args.dataset.sample(1000)))
    return f"median distance to the 1,000 points: of their flow {near:.4f}, of new data {far:.4f}"


def draw_paths(args):
    """paths.png, Figure 3. Returns what is straight, and exact Euler steps, as text."""
    torch.manual_seed(args.seed)
    paths = {"OT": fm.OTPath(args.sigma_min), "VP": fm.VPPath()}
    lines, panels = [f"{'':28s}arc / chord     bend  overshoot"], []
    for kind in ("conditional, 2-D", "conditional, 30-D", "marginal, 2-D"):
        for name, path in (paths | {"cosine": fm.CosinePath(), "VE": fm.VEPath()}).items():
            times = torch.linspace(*path.t_span, 101)
            x0, x1 = torch.randn(2, 5_000, 30 if "30" in kind else 2)
            xs = torch.stack([path.psi(t.expand(len(x0)), x0, x1) for t in times])
            if kind == "marginal, 2-D":
                x0 = xs[0, : min(args.samples, 1000)]
                xs = fm.odeint(partial(args.dataset.field, path), x0, times.tolist()).xs
            panels.append((f"{name}, {kind}", paths_image(xs[:, :40, :2], 2.5)))
            arc, bend, overshoot = straightness(xs).values()
            lines.append(f"{kind:18s}{name:8s}{arc:13.3f}{bend:9.3f}{overshoot:11.3f}")
    draw_grid(args.out / "paths.png", panels, 4)
    lines += ["", "std / truth after 1, 2, 4, 8, 16 and 32 exact Euler steps to N(0, std^2 I)"]
    for name, std in product(paths, (1.0, 0.25)):
        path, cells = paths[name], f"{name}, std {std:4}"
        u = fm.Marginal(blurred(path, std), torch.zeros(1, 1))
        for steps in (1, 2, 4, 8, 16, 32):
            x = fm.odeint(u, torch.ones(1, 1), path.t_span, "euler", steps=steps).x
            cells += f"{x.item() / std:6.2f}"
        lines.append(cells)
    return "\n".join(lines)


# ---- Command line --------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("rows", "dataset")}
    print("settings: " + "  ".join(f"{name} {value}" for name, value in settings.items()))
    if args.figure:
        text = draw_fields(args) if args.figure == "marginal" else draw_paths(args)
        return print(f"{text}\n\nthe picture is in {args.out}")
    flows, results = {}, {}
    for name, row in args.rows.items():
        start = time.time()
        flows[name] = train(name, row)
        seconds = time.time() - start
        file = args.out / f"model_{name.replace(',', '').replace(' ', '_')}.pt"
        store(flows[name], row, file)
        results[name] = {**measure(flows[name], row), "seconds": seconds}
    draw_samples(flows, args)
    panels = [
        (f"{m}, RMSE over NFE 2 to 100", errors_image(results, m))
        for m in ("euler", "midpoint", "rk4")
    ]
    draw_grid(args.out / "error.png", panels, 3)
    state = {"settings": settings, "torch": torch.__version__, "results": results}
    write(args.out / "metrics.json", lambda part: part.write_text(json.dumps(state, indent=1)))
    text = table(results)
    write(args.out / "table.txt", lambda part: part.write_text(text, encoding="utf-8"))
    print(f"{text}\n\npictures, table.txt, metrics.json and weights are in {args.out}")


if __name__ == "__main__":
    main()
