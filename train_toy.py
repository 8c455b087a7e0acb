# SPDX-License-Identifier: MIT
"""Flow matching in two dimensions: train on a toy density, draw Figure 4, print true numbers.

python train_toy.py --path ot              a minute on two CPU cores; results in runs/toy
python train_toy.py --path ot vp           a row for each path: same seed, network and steps
python train_toy.py --ablation             Table 1, Figures 4, 7 and 9, couplings and reflow
python train_toy.py --figure conditional   Figure 3, what is straight, exact Euler steps
python train_toy.py --figure marginal      Theorem 1 and Figure 2: exact fields of finite data
python train_toy.py --data drawing.png     the dark pixels of a picture are the density
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

import flow_matching as fm

ABLATION = {  # Table 1, and below it what later papers do to the pairs (x0, x1)
    "DDPM": {"path": "vp", "objective": "noise"},
    "score matching": {"path": "vp", "objective": "score"},
    "ScoreFlow": {"path": "vp", "objective": "scoreflow"},
    "FM, diffusion": {"path": "vp"},
    "FM, OT": {"path": "ot"},
    "minibatch OT": {"path": "ot", "coupling": "ot"},
    "reflow": {"path": "ot", "reflow": 1},
}
NFES = (2, 4, 8, 10, 20, 40, 100)


# ---- Settings ----
def parse_args(argv=None):
    """The settings, checked: a mistake ends with one line and exit code 2."""
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = p.add_argument
    flag("--path", nargs="+", default=["ot"], choices=fm.PATHS, help="a row for each")
    flag("--objective", default="velocity", choices=fm.OBJECTIVES, help="rows of Table 1")
    flag("--coupling", default="independent", choices=("independent", "ot"), help="pairs x0, x1")
    flag("--reflow", type=int, default=0, help="rounds of training again on the flow's own pairs")
    flag("--sigma-min", type=float, default=1e-4, help="of the OT path, Eq. (20)")
    flag("--data", default="checkerboard", help=f"{', '.join(MIXTURES)} or a PNG file")
    flag("--steps", type=int, default=7000, help="optimizer steps")
    flag("--batch", type=int, default=2048, help="samples a step")
    flag("--lr", type=float, default=4e-3, help="peak learning rate")
    flag("--seed", type=int, default=0, help="of weights, data and noise")
    flag("--sde", type=float, nargs="?", const=True, help="samples by the SDE too; its diffusion g")
    flag("--samples", type=int, default=50000, help="points in pictures; 4000 at most are measured")
    flag("--out", type=Path, default="runs/toy", help="folder for pictures, numbers and weights")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of torch")
    flag("--ablation", action="store_true", help=f"train the rows {'; '.join(ABLATION)}")
    flag("--figure", choices=("conditional", "marginal"), help="draw closed forms, train nothing")
    args = p.parse_args(argv)
    lowest = {"reflow": 0, "steps": 1, "batch": 1, "lr": 1e-9, "seed": 0, "sde": 0, "samples": 2}
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            p.error(f"--{name} must be at least {low} and finite; got {value}")
    for name in ("path", "objective", "coupling", "reflow", "figure"):
        if args.ablation and getattr(args, name) != p.get_default(name):
            p.error(f"--ablation has its own rows: leave out --{name}")
    if args.sigma_min != p.get_default("sigma_min") and "ot" not in args.path:
        p.error("--sigma-min is of the OT path: add --path ot")
    rows = ABLATION if args.ablation else {name: {"path": name} for name in args.path}
    try:
        args.dataset = make_data(args.data)
        args.out.mkdir(parents=True, exist_ok=True)
        args.rows = {name: changed(args, **row) for name, row in rows.items()}
        for row in args.rows.values():
            check(row)
    except (ValueError, ImportError, OSError, RuntimeError, AssertionError) as e:
        p.error(str(e).splitlines()[0])
    return args


def changed(args, **changes):
    """The settings with some of another value."""
    return argparse.Namespace(**{**vars(args), **changes})


def check(args):
    """Tries loss and velocity of a row on three points: an exception says what cannot be."""
    independent = args.coupling == "independent" and not args.reflow
    if args.sde is not None and not independent:
        raise ValueError("--sde needs the score, which v tells only for independent pairs")
    net = make_net(args).to(args.device).cpu()
    x = torch.zeros(3, 2)
    if args.coupling == "ot":
        fm.ot_coupling(x, x)
    x0 = None if independent else x
    fm.cfm_loss(net, net.path, x, x0=x0, **fm.OBJECTIVES[args.objective])
    fm.as_velocity(net, net.path, net.predict)(torch.zeros(3), x)


# ---- Network and training ----
class Net(nn.Module):
    """A velocity, noise or score at t (B,) and x (B, 2): four layers of 64 on Fourier features.

    They let it see edges. It learns what is left of its target when the linear answer to Gaussian
    data of unit variance, E[x1 | x] = alpha x / rho^2 and E[x0 | x] = sigma x / rho^2, is known.
    Departure: the paper's toy network is five layers of 512 on (t, x) alone, many times slower.
    """

    def __init__(self, path, predict="velocity"):
        super().__init__()
        self.path, self.predict = path, predict
        self.register_buffer("frequencies", 3.0 * torch.randn(2, 64))
        layers = []
        for width in (2 + 4 * 64 + 10, 64, 64, 64):
            layers += [nn.Linear(width, 64), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(64, 2))

    def forward(self, t, x):
        t = t[:, None]
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.path.coefficients(t)
        rho = (alpha_t**2 + sigma_t**2).sqrt()
        x = x / rho
        near = sigma_t / rho
        phase = x @ self.frequencies
        phase = torch.cat([phase.sin(), phase.cos()], 1)
        sharp = 0.2 / (0.05 + near) * phase  # u_t varies over sigma_t: slopes of 1 / sigma_t
        wave = math.pi * t * torch.arange(1, 5, device=x.device)
        features = [x, phase, sharp, t, -torch.log(0.01 + near), wave.sin(), wave.cos()]
        x0, x1 = near * x, alpha_t / rho * x
        linear = {"velocity": dalpha_t * x1 + dsigma_t * x0, "noise": x0, "score": -x0 / sigma_t}
        return linear[self.predict] + self.layers(torch.cat(features, 1))


def make_net(args):
    """An untrained network with its path."""
    path = fm.OTPath(args.sigma_min) if args.path == "ot" else fm.PATHS[args.path]()
    return Net(path, fm.OBJECTIVES[args.objective]["predict"])


class Flow:
    """A trained flow: v works on standardised points, sample and log_prob in data units."""

    def __init__(self, net, shift, scale):
        self.net = net.requires_grad_(False)
        self.path = net.path
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
        x1 = fm.odeint(teacher.v, x0, teacher.path.t_span, rtol=1e-4, atol=1e-4).x
        while True:
            i = torch.randint(len(x0), (args.batch,), device=args.device)
            yield x0[i], x1[i]
    while True:
        x0 = None
        x1 = args.dataset.sample(args.batch).to(args.device)
        if args.coupling == "ot":  # in groups of 128: the time of an assignment grows as their cube
            groups = zip(torch.randn_like(x1).split(128), x1.split(128))
            x0 = torch.cat([a[fm.ot_coupling(a, b)] for a, b in groups])
        yield x0, x1


def train(name, args):
    """A Flow after args.steps steps of Adam with cosine decay; with reflow, its teacher's first."""
    teacher = train(name, changed(args, reflow=args.reflow - 1)) if args.reflow else None
    torch.manual_seed(args.seed)
    net = make_net(args).to(args.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99))
    pairs = batches(args, teacher)
    start = time.time()
    for step in range(1, args.steps + 1):
        warmup = min(1, step / 200)
        decay = (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * warmup * decay
        x0, x1 = next(pairs)
        loss = fm.cfm_loss(net, net.path, x1, x0=x0, **fm.OBJECTIVES[args.objective])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0 or step == args.steps:
            value = loss.item()  # the only wait for the device
            seconds = time.time() - start
            print(f"{name}: step {step}  loss {value:.4f}  {seconds:.0f} s", file=sys.stderr)
            if not math.isfinite(value):
                sys.exit(f"{name}: the loss is not finite at step {step}: lower --lr {args.lr}")
    return Flow(net, args.dataset.shift.to(args.device), args.dataset.scale)


def write(file, save):
    """save(temporary name), then move it over file in one step, so that file is always whole."""
    part = file.with_name(file.name + ".part")
    save(part)
    os.replace(part, file)


def store(flow, args, file):
    """Writes the Flow for load."""
    state = {name: getattr(args, name) for name in ("path", "sigma_min", "objective")}
    state |= {"net": flow.net.state_dict(), "shift": flow.shift, "scale": flow.scale}
    write(file, lambda part: torch.save({"toy": 3, **state}, part))


def load(file):
    """The Flow that train_toy.py wrote to file (model_<path>.pt), on the CPU."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("toy") != 3:
        raise ValueError(f"{file} is not a checkpoint of this train_toy.py")
    net = make_net(argparse.Namespace(**state))
    net.load_state_dict(state["net"])
    return Flow(net, state["shift"], state["scale"])


# ---- Data: each set with its exact density and marginal field, so an exact loss floor ----
class Checkerboard:
    """Eight squares of side 1 / 0.45; points are standardised, (data - shift) / scale."""

    side = 1 / 0.45

    def __init__(self):
        corners = [(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0]
        self.shift = torch.zeros(2)
        self.scale = math.sqrt(4 / 3) * self.side  # to unit variance
        self.low = torch.tensor(corners, dtype=torch.float64) * self.side / self.scale  # (8, 2)
        self.high = self.low + self.side / self.scale

    def sample(self, n):
        """n standardised points, (n, 2)."""
        u, i = torch.rand(n, 2), torch.randint(8, (n,))
        return torch.lerp(self.low.float()[i], self.high.float()[i], u)

    def log_prob(self, x):
        """Exact log density in nats and data units at standardised x, (n,)."""
        x = x[:, None]
        inside = (x >= self.low.to(x.dtype)) & (x <= self.high.to(x.dtype))
        return torch.where(inside.all(2).any(1), -math.log(8 * self.side**2), -math.inf)

    def field(self, path, t, x):
        """u_t(x), Eq. (8), in closed form: in each square x1 given x_t is two truncated normals."""
        t, x = t.double(), x.double()
        alpha_t, sigma_t, _, _ = path.coefficients(t[:, None, None])
        alpha_t = alpha_t.clamp(min=1e-4)
        mean, std = x[:, None] / alpha_t, sigma_t / alpha_t
        a, b = (self.low - mean) / std, (self.high - mean) / std  # (n, 8, 2)
        flip = a + b > 0  # to the side where log_ndtr is accurate
        log_high = torch.special.log_ndtr(torch.where(flip, -a, b))
        log_low = torch.special.log_ndtr(torch.where(flip, -b, a))
        log_mass = log_high + torch.log(-torch.expm1(log_low - log_high))
        log_norm = log_mass + math.log(2 * math.pi) / 2
        slope = torch.exp(-(a**2) / 2 - log_norm) - torch.exp(-(b**2) / 2 - log_norm)
        x1 = (mean + std * slope).clamp(self.low, self.high)  # its mean in every square
        weights = log_mass.sum(2).softmax(1)
        return path.u(t, x, (weights[:, :, None] * x1).sum(1)).float()


def blurred(path, std):
    """The path of x1 + N(0, std^2 I): its sigma_t takes in the data's own width."""

    def alpha(t):
        return path.coefficients(t)[0]

    def sigma(t):
        return torch.hypot(alpha(t) * std, path.coefficients(t)[1])

    return fm.AffinePath(alpha, sigma, path.t_span, check_ends=False)


class Mixture:
    """Gaussians of std noise at N centres (N, 2): p_t and u_t are Marginal's on a blurred path."""

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
        """u_t(x), Eq. (8), in closed form."""
        return fm.Marginal(blurred(path, self.noise), self.centres)(t, x)


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
    if not os.path.isfile(name):
        names = ", ".join(["checkerboard", *MIXTURES])
        raise ValueError(f"--data must be {names} or a PNG file; got {name}")
    picture = Image.open(name).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("L")
    picture.thumbnail((128, 128))
    pixels = torch.tensor(list(picture.tobytes())).reshape(picture.height, picture.width)
    row, column = (pixels < 128).nonzero().T
    if len(row) == 0:
        raise ValueError(f"--data {name} has no dark pixel (below 128 of 255)")
    return Mixture(torch.stack([column, picture.height - row], 1).float(), 0.5)


# ---- Numbers ----
def measure(flow, args):
    """Numbers of a flow against the truth, as a dict; points and noise depend on the seed only."""
    data = args.dataset
    path = flow.path
    n = min(args.samples, 4000)
    torch.manual_seed(args.seed + 1)
    x1 = data.sample(n)
    many = data.sample(16 * n)
    x0 = torch.randn_like(many)
    numbers = {"energy": {}, "rmse": {}}
    if args.coupling == "independent" and not args.reflow:  # other pairs leave no closed form
        numbers |= regression(flow, data, x0, many)
    noise = path.sample_source((n, 2)).to(args.device)
    truth = data.scale * data.sample(n)
    log_p = data.log_prob(x1)
    x1 = (data.shift + data.scale * x1).to(args.device)
    gap = log_p - flow.log_prob(x1, rtol=1e-6, atol=1e-6).cpu()
    numbers["gap"] = gap.mean().item()
    numbers["gap_se"] = gap.std().item() / math.sqrt(n)
    numbers["entropy"] = -log_p.mean().item()
    numbers["nfe"] = fm.odeint(flow.v, noise, path.t_span).nfe.double().mean().item()
    times = torch.linspace(*path.t_span, 101)
    numbers |= straightness(fm.odeint(flow.v, noise, times, "rk4", 100).xs)
    accurate = fm.odeint(flow.v, noise, path.t_span, rtol=1e-6, atol=1e-6).x
    for name, x in quick_samples(flow, noise, args):
        numbers["energy"][name] = energy_distance(data.scale * x.cpu(), truth)
        if not name.startswith("sde"):  # whose noise is not the start's alone
            numbers["rmse"][name] = (x - accurate).square().mean().sqrt().item()
    return numbers


def regression(flow, data, x0, x1):
    """The velocity's loss, that of the exact field u, and excess = E|v - u|^2 / 2."""
    start, end = flow.path.t_span
    t = start + (end - start) * torch.rand(len(x1))
    x_t, dx_t = flow.path.psi_dpsi(t, x0, x1)
    u_t = data.field(flow.path, t, x_t)
    v_t = flow.v(t.to(flow.shift.device), x_t.to(flow.shift.device)).cpu()
    differences = {"loss": v_t - dx_t, "floor": u_t - dx_t, "excess": v_t - u_t}
    return {name: difference.square().mean().item() for name, difference in differences.items()}


def quick_samples(flow, noise, args):
    """Samples by a fixed number of calls from the same noise: solver and number, x."""
    for nfe in NFES:
        for method, stages in (("midpoint", 2), ("euler", 1), ("rk4", 4)):
            if nfe % stages == 0:
                x = fm.odeint(flow.v, noise, flow.path.t_span, method, nfe // stages).x
                yield f"{method} {nfe}", x
        if args.sde is not None:
            torch.manual_seed(args.seed)
            g = None if args.sde is True else args.sde
            x = fm.sample_sde(flow.v, flow.path, noise.shape, nfe, g, args.device)
            yield f"sde {nfe}", x


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, from samples (n, d); 0 for equal laws."""
    n = len(x)
    within = (torch.cdist(x, x).sum().item() + torch.cdist(y, y).sum().item()) / (n * (n - 1))
    return 2 * torch.cdist(x, y).mean().item() - within


def straightness(xs):
    """Median arc / chord, bend and overshoot of trajectories xs (T, n, d); 1, 0, 0 if straight."""
    chord = xs[-1] - xs[0]
    legs = xs.diff(dim=0)
    arc = legs.norm(dim=2).sum(0) / chord.norm(dim=1)  # a ratio whose mean may be infinite
    bend = (legs * len(legs) - chord).square().sum(2)  # |(x1 - x0) - v|^2 of Liu et al. (2022)
    progress = ((xs - xs[0]) * chord).sum(2) / chord.square().sum(1)
    outside = (progress - 0.5).abs().amax(0) > 0.501  # of the slab between the ends
    return {
        "arc": arc.median().item(),
        "bend": bend.mean().item(),
        "overshoot": outside.double().mean().item(),
    }


def table(results):
    """The numbers of every row, a dict of dicts, as text."""
    entropy = next(iter(results.values()))["entropy"]
    lines = [
        f"gap: NLL - entropy of the data ({entropy:.4f} nats). excess: E|v - u|^2 / 2, u exact.",
        "NFE: calls of v for one sample by dopri5 at 1e-5. training: in seconds.",
        "",
        f"{'':26s}gap         excess     NFE  training",
    ]
    for name, r in results.items():
        gap = f"{r['gap']:10.4f} ± {r['gap_se']:.4f} {r.get('excess', math.nan):10.4f}"
        lines.append(f"{name:16s}{gap}{r['nfe']:8.1f}{r['seconds']:10.1f}")
    titles = {
        "energy": "energy distance x 1000 to the data, from sampling noise alone up to 2",
        "rmse": "RMSE x 1000 to the accurate solution from the same noise, Figure 7",
    }
    for key, title in titles.items():
        lines += ["", title, f"{'NFE':25s}" + "".join(f"{nfe:7d}" for nfe in NFES)]
        for name, r in results.items():
            for method in dict.fromkeys(label.split()[0] for label in r[key]):
                cells = [1000 * r[key].get(f"{method} {nfe}", math.nan) for nfe in NFES]
                lines.append(f"{name:16s}{method:9s}" + "".join(f"{cell:7.1f}" for cell in cells))
    return "\n".join(lines).replace("nan", "  -")


# ---- Pictures ----
def density_image(p):
    """An Image of a density (72, 72), top row first, 1 and more at full brightness."""
    grey = Image.fromarray((255 * p.clamp(0, 1)).byte().numpy())
    return ImageOps.colorize(grey, "#160e34", "#fae83c", "#21828e").resize((144, 144), 0)


def paths_image(xs, image=None, colour="grey", dots=None):
    """An Image of paths xs (T, n, 2) in [-2.5, 2.5]^2; dots: colours at starts, 0, and ends, -1."""
    image = (image or Image.new("RGB", (1, 1), "white")).resize((576, 576), 0)
    pen = ImageDraw.Draw(image)
    pixels = 288 + xs.cpu() * torch.tensor([115.2, -115.2])
    for line in pixels.transpose(0, 1).flatten(1).tolist():
        pen.line(line, colour, 2)
    for i, fill in (dots or {0: "blue", -1: "red"}).items():
        for x, y in pixels[i].tolist():
            pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill)
    return image.reduce(4)


def field_image(marginal, t):
    """An Image of p_t and of its field's directions, strokes that begin at a dot."""
    axis = (torch.arange(72) + 0.5) / 14.4 - 2.5
    x = torch.cartesian_prod(-axis, axis).flip(1)
    p = marginal.log_prob(t, x).exp().reshape(72, 72)
    starts = x.reshape(72, 72, 2)[3::6, 3::6].reshape(-1, 2)
    ends = starts + 0.3 * nn.functional.normalize(marginal(t, starts))
    image = density_image(p / p.max())
    return paths_image(torch.stack([starts, ends]), image, "white", {0: "white"})


def error_image(results, method):
    """An Image of RMSE, 1 to 1e-4, over NFE, 2 to 100, both logarithmic, a line for each row."""
    image = Image.new("RGB", (288, 288), "white")
    pen = ImageDraw.Draw(image)

    def place(nfe, error):
        return 40 + 220 * math.log(nfe / 2, 50), 6 - 66 * math.log10(max(error, 1e-4))

    for exponent in range(5):
        y = 6 + 66 * exponent
        pen.line((40, y, 260, y), "lightgrey")
        pen.text((36, y), f"{10**-exponent:g}", "grey", anchor="rm")
    for nfe in (2, 10, 100):
        pen.text((place(nfe, 1)[0], 284), f"NFE {nfe}", "grey", anchor="ms")
    for i, (name, r) in enumerate(results.items()):
        colour = f"hsl({360 * i // len(results)}, 90%, 40%)"
        pen.text((260, 8 + 12 * i), name, colour, anchor="ra")
        errors = {nfe: r["rmse"].get(f"{method} {nfe}") for nfe in NFES}
        pen.line([place(nfe, error) for nfe, error in errors.items() if error], colour, 2)
    return image


def draw_grid(file, panels, columns):
    """A picture of panels, each an Image under its caption, in that many columns."""
    width, height = panels[0][1].size
    rows = len(panels) // columns
    canvas = Image.new("RGB", (columns * (width + 4), rows * (height + 18)), "white")
    font = ImageFont.load_default(size=12)
    for i, (caption, image) in enumerate(panels):
        x, y = i % columns * (width + 4), i // columns * (height + 18)
        ImageDraw.Draw(canvas).text((x + 1, y), caption, "black", font)
        canvas.paste(image, (x, y + 16))
    picture = canvas.quantize(64, Image.Quantize.FASTOCTREE)
    write(file, lambda part: picture.save(part, "PNG", optimize=True))


def draw_samples(flows, results, args):
    """density.png and nfe.png, Figure 4, a row for each flow; error.png, Figure 7."""
    truth = args.dataset.sample(100_000)
    limit = 1.15 * truth.abs().quantile(0.999).item()

    def histogram(x):
        edges = [-limit, limit, -limit, limit]
        return torch.histogramdd(x.cpu(), [72, 72], range=edges, density=True).hist.T.flip(0)

    peak = histogram(truth).quantile(0.97)
    density, nfe = {}, {}
    for name, flow in flows.items():
        torch.manual_seed(args.seed)
        x0 = flow.path.sample_source((args.samples, 2)).to(args.device)
        times = [0, 1 / 3, 2 / 3, 5 / 6, flow.path.t_span[1]]
        for t, x in zip(times, fm.odeint(flow.v, x0, times, rtol=1e-3, atol=1e-3).xs):
            density[f"{name}, t = {t:.2f}"] = x
        for calls in (4, 8, 10, 20):
            x = fm.odeint(flow.v, x0, flow.path.t_span, "midpoint", calls // 2).x
            nfe[f"{name}, NFE {calls}"] = x
        nfe[f"data for {name}"] = truth[: args.samples]
    for file, samples in {"density.png": density, "nfe.png": nfe}.items():
        panels = [(title, density_image(histogram(x) / peak)) for title, x in samples.items()]
        draw_grid(args.out / file, panels, 5)
    errors = [(f"RMSE, {m}", error_image(results, m)) for m in ("euler", "midpoint", "rk4")]
    draw_grid(args.out / "error.png", errors, 3)


def figure_marginal(args):
    """marginal.png, Theorem 1: exact p_t, field and flow of 1, 3 and 1,000 points. Returns text."""
    many = args.dataset.sample(1000)
    few = torch.tensor([[1.0, 0.6], [-1.2, 0.5], [0.2, -1.2]])
    panels = []
    for points in (few[:1], few, many):
        for path in (fm.OTPath(args.sigma_min), fm.VPPath()):
            title = f"{type(path).__name__[:2]}, N = {len(points)}"
            u = fm.Marginal(path, points)
            for t in (0.0, 0.4, 0.7, 0.95):
                panels.append((f"{title}, t = {t}", field_image(u, t)))
            xs = fm.odeint(u, torch.randn(60, 2), torch.linspace(*path.t_span, 101)).xs
            panels.append((f"{title}, flow", paths_image(xs)))
    draw_grid(args.out / "marginal.png", panels, 5)
    near = torch.cdist(xs[-1], many).amin(1).median()
    far = torch.cdist(args.dataset.sample(1000), many).amin(1).median()
    return f"median distance to the 1,000 points: of their flow {near:.4f}, of new data {far:.4f}"


def trajectories(kind, path, args):
    """xs (101, n, d) of random pairs, or of the exact marginal flow, over path.t_span."""
    times = torch.linspace(*path.t_span, 101)
    x0, x1 = torch.randn(2, 5000, 30 if "30-D" in kind else 2)
    xs = torch.stack([path.psi(t.expand(len(x0)), x0, x1) for t in times])
    if "marginal" not in kind:
        return xs

    def u(t, x):
        return args.dataset.field(path, t, x)

    return fm.odeint(u, xs[0, : min(args.samples, 1000)], times).xs


def figure_conditional(args):
    """paths.png, Figure 3. Returns what is straight, and exact Euler steps, as text."""
    lines = [f"{'':28s}arc / chord     bend  overshoot"]
    panels = []
    paths = {"OT": fm.OTPath(args.sigma_min), "VP": fm.VPPath()}
    for kind in ("conditional, 2-D", "conditional, 30-D", "marginal, 2-D"):
        for name, path in {**paths, "cosine": fm.CosinePath(), "VE": fm.VEPath()}.items():
            xs = trajectories(kind, path, args)
            if "30-D" not in kind:
                panels.append((f"{name}, {kind}", paths_image(xs[:, :40])))
            arc, bend, overshoot = straightness(xs).values()
            lines.append(f"{kind:18s}{name:8s}{arc:13.3f}{bend:9.3f}{overshoot:11.3f}")
    draw_grid(args.out / "paths.png", panels, 4)
    lines += ["", "std / truth after 1, 2, 4, 8, 16 and 32 exact Euler steps to N(0, std^2 I)"]
    for name, path in paths.items():
        for std in (1.0, 0.25):
            u = fm.Marginal(blurred(path, std), torch.zeros(1, 1))
            cells = f"{name}, std {std:4}"
            for steps in (1, 2, 4, 8, 16, 32):
                x = fm.odeint(u, torch.ones(1, 1), path.t_span, "euler", steps).x
                cells += f"{x.item() / std:6.2f}"
            lines.append(cells)
    return "\n".join(lines)


# ---- Command line ----
def main(argv=None):
    args = parse_args(argv)
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("rows", "dataset")}
    print("settings: " + "  ".join(f"{name} {value}" for name, value in settings.items()))
    if args.figure:
        torch.manual_seed(args.seed)
        text = figure_marginal(args) if args.figure == "marginal" else figure_conditional(args)
        return print(f"{text}\n\nthe picture is in {args.out}")
    flows, results = {}, {}
    for name, row in args.rows.items():
        start = time.time()
        flows[name] = train(name, row)
        seconds = time.time() - start
        store(flows[name], row, args.out / f"model_{name.replace(',', '').replace(' ', '_')}.pt")
        results[name] = {**measure(flows[name], row), "seconds": seconds}
    draw_samples(flows, results, args)
    state = {"settings": settings, "torch": torch.__version__, "results": results}
    write(args.out / "metrics.json", lambda part: part.write_text(json.dumps(state, indent=1)))
    text = table(results)
    write(args.out / "table.txt", lambda part: part.write_text(text, encoding="utf-8"))
    print(f"{text}\n\npictures, table.txt, metrics.json and weights are in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except fm.SolverError as e:
        sys.exit(f"train_toy.py: {e}")
