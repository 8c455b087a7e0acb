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
import json
import math
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.functional import mse_loss
from torch.special import ndtr
from torchvision.ops import MLP
from torchvision.transforms.functional import pil_to_tensor

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
STAGES = {"midpoint": 2, "euler": 1, "rk4": 4}  # calls of v a step


# ---- Settings ----
def parse_args(argv=None):
    """The settings, and those of every row, tried: a mistake ends with one line and exit code 2."""
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = p.add_argument
    flag("--path", nargs="+", default=["ot"], choices=fm.PATHS, help="a row for each")
    flag("--objective", default="velocity", choices=fm.OBJECTIVES, help="rows of Table 1")
    flag("--coupling", default="independent", choices=("independent", "ot"), help="pairs x0, x1")
    flag("--reflow", type=int, default=0, help="rounds of training again on the flow's own pairs")
    flag("--sigma-min", type=float, default=1e-4, help="of the OT path, Eq. (20)")
    flag("--net", default="fourier", choices=("fourier", "paper"), help="4 x 64 or 5 x 512")
    flag("--data", default="checkerboard", help=f"{', '.join(MIXTURES)} or a PNG file")
    flag("--steps", type=int, default=7000, help="optimizer steps")
    flag("--batch", type=int, default=2048, help="samples a step")
    flag("--lr", type=float, default=4e-3, help="peak learning rate")
    flag("--seed", type=int, default=0, help="of weights, data and noise")
    flag("--sde", action="store_true", help="samples by the SDE, too")
    flag("--samples", type=int, default=50000, help="in pictures; 4000 at most are measured")
    flag("--out", type=Path, default="runs/toy", help="folder for pictures, numbers and weights")
    flag("--ablation", action="store_true", help=f"train the rows {'; '.join(ABLATION)}")
    flag("--figure", action="store_true", help="draw closed forms, train nothing")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = p.parse_args(argv)
    if args.device != "cpu":
        torch.set_default_device(args.device)
    for name in ("path", "objective", "coupling", "reflow", "sde"):
        if args.ablation and getattr(args, name) != p.get_default(name):
            p.error(f"--ablation has its own rows: leave out --{name}")
    if args.sde and (args.coupling == "ot" or args.reflow):
        p.error("--sde needs the score, which v tells only for independent pairs")
    rows = ABLATION if args.ablation else {name: {"path": name} for name in args.path}
    try:
        dataset = make_data(args.data)
        args.out.mkdir(parents=True, exist_ok=True)
        rows = {name: changed(args, dataset=dataset, **row) for name, row in rows.items()}
        for row in rows.values():
            trial = train("trial", changed(row, steps=1, batch=min(3, args.batch)))
            trial.sample(args.samples, method="euler", steps=1)
    except (ValueError, ImportError, OSError, RuntimeError) as e:
        p.error(str(e).splitlines()[0])
    return args, rows


def changed(args, **changes):
    """The settings with some of another value."""
    return argparse.Namespace(**{**vars(args), **changes})


# ---- Network and training ----
class Flow(nn.Module):
    """A network of velocity, noise or score with its path; data = shift + scale * standardised x.

    Departure: four layers of 64 on Fourier features, which let them see edges, learn what is left
    of the target when the linear answer to Gaussian data of unit variance is known. --net paper is
    the paper's: five layers of 512 on (t, x), with SiLU, as no activation is stated.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        name = config["path"]
        self.path = fm.OTPath(config["sigma_min"]) if name == "ot" else fm.PATHS[name]()
        self.predict = fm.OBJECTIVES[config["objective"]]["predict"]
        self.v = fm.as_velocity(self, self.path, self.predict)  # on standardised points
        self.shift, self.scale = config["shift"], config["scale"]
        self.register_buffer("frequencies", 3.0 * torch.randn(2, 64))
        inputs, widths = (3, 5 * [512]) if config["net"] == "paper" else (2 + 4 * 64 + 10, 4 * [64])
        self.layers = MLP(inputs, [*widths, 2], activation_layer=nn.SiLU)

    def forward(self, t, x):
        """What the network predicts at t (n,) and standardised x (n, 2), (n, 2)."""
        t = t[:, None]
        if self.config["net"] == "paper":
            return self.layers(torch.cat([t, x], 1))
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.path.coefficients(t)
        rho = (alpha_t**2 + sigma_t**2).sqrt()
        x = x / rho
        near = sigma_t / rho
        phase = x @ self.frequencies
        phase = torch.cat([phase.sin(), phase.cos()], 1)
        sharp = 0.2 / (0.05 + near) * phase  # u_t varies over sigma_t: slopes of 1 / sigma_t
        wave = math.pi * t * torch.arange(1, 5)
        features = [x, phase, sharp, t, -torch.log(0.01 + near), wave.sin(), wave.cos()]
        x0, x1 = near * x, alpha_t / rho * x  # E[x0 | x] and E[x1 | x] of Gaussian data
        linear = {"velocity": dalpha_t * x1 + dsigma_t * x0, "noise": x0, "score": -x0 / sigma_t}
        return linear[self.predict] + self.layers(torch.cat(features, 1))

    def sample(self, n, **solver):
        """n samples in data units, (n, 2), by the solver of flow_matching.odeint."""
        x = fm.sample(self.v, self.path, (n, 2), **solver).x
        return self.shift + self.scale * x

    def log_prob(self, x, **solver):
        """log density in nats at x (n, 2) in data units, (n,)."""
        x = (x - self.shift) / self.scale
        return fm.log_prob(self.v, x, self.path, **solver).log_prob - 2 * math.log(self.scale)


def batches(args, teacher):
    """Pairs (x0, x1) without end: the teacher's, if any; x0 = None is independent noise."""
    if teacher:  # from noise to where its flow takes it
        x0 = torch.randn(min(2**17, args.steps * args.batch), 2)
        x1 = fm.odeint(teacher.v, x0, teacher.path.t_span, rtol=1e-4, atol=1e-4).x
        while True:
            i = torch.randint(len(x0), (args.batch,))
            yield x0[i], x1[i]
    while True:
        x0 = None
        x1 = args.dataset.sample(args.batch)
        if args.coupling == "ot":  # in groups of 128: the time of an assignment grows as their cube
            groups = zip(torch.randn_like(x1).split(128), x1.split(128))
            x0 = torch.cat([a[fm.ot_coupling(a, b)] for a, b in groups])
        yield x0, x1


def train(name, args):
    """A Flow after args.steps steps of Adam with cosine decay; with reflow, its teacher's first."""
    teacher = train(name, changed(args, reflow=args.reflow - 1)) if args.reflow > 0 else None
    torch.manual_seed(args.seed)
    config = {key: getattr(args, key) for key in ("path", "sigma_min", "objective", "net")}
    flow = Flow({**config, "shift": args.dataset.shift, "scale": args.dataset.scale})
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.lr, betas=(0.9, 0.99))
    pairs = batches(args, teacher)
    for step in range(1, args.steps + 1):
        warmup = min(1, step / 200)
        decay = (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * warmup * decay
        x0, x1 = next(pairs)
        loss = fm.cfm_loss(flow, flow.path, x1, x0=x0, **fm.OBJECTIVES[args.objective])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            print(f"{name}: step {step}  loss {loss.item():.4f}", file=sys.stderr)
            if not loss.isfinite():
                sys.exit(f"{name}: the loss is not finite at step {step}: lower --lr {args.lr}")
    return flow.requires_grad_(False)


@contextmanager
def replaced(file):
    """A name to write to, moved over file at the end, so that file is always whole."""
    part = file.with_name(file.name + ".part")
    yield part
    part.replace(file)


def load(file):
    """The Flow that train_toy.py wrote to file (model_<path>.pt), on the CPU."""
    state = torch.load(file, "cpu", weights_only=True)
    flow = Flow(state["config"])
    flow.load_state_dict(state["weights"])
    return flow.requires_grad_(False)


# ---- Data: each set with its exact density and marginal field, so an exact loss floor ----
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
        t, x = t.double(), x.double()
        alpha_t, sigma_t, _, _ = path.coefficients(t[:, None, None])
        alpha_t = alpha_t.clamp(min=1e-4)
        mean, std = x[:, None] / alpha_t, sigma_t / alpha_t
        a, b = (self.low - mean) / std, (self.high - mean) / std  # (n, 8, 2)
        centre, half = (a + b).abs() / 2, (b - a) / 2  # mirrored to the tail where ndtr is accurate
        mass = (ndtr(half - centre) - ndtr(-half - centre)).clamp(min=1e-300)
        slope = (torch.exp(-(a**2) / 2) - torch.exp(-(b**2) / 2)) / (math.sqrt(2 * math.pi) * mass)
        x1 = (mean + std * slope).clamp(self.low, self.high)  # its mean in every square
        weights = mass.log().sum(2, keepdim=True).softmax(1)
        return path.u(t, x, (weights * x1).sum(1)).float()


class Mixture:
    """Gaussians of std noise at N centres (N, d), standardised in the same way."""

    def __init__(self, centres, noise):
        centres = centres.to(torch.empty(0).device)  # the default one
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
        return fm.Marginal(blurred(path, self.noise), self.centres)(t, x)


def blurred(path, std):
    """The path of x1 + N(0, std^2 I), whose sigma_t takes in the std."""

    def sigma(t):
        alpha_t, sigma_t, _, _ = path.coefficients(t)
        return torch.hypot(std * alpha_t, sigma_t)

    return fm.AffinePath(lambda t: path.coefficients(t)[0], sigma, path.t_span, check_ends=False)


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
    """The data set of that name, or of a picture: its dark pixels, y up, 128 pixels at most."""
    if name == "checkerboard":
        return Checkerboard()
    if name in MIXTURES:
        return Mixture(*MIXTURES[name])
    if not Path(name).is_file():
        names = ", ".join(MIXTURES)
        raise ValueError(f"--data must be checkerboard, {names} or a PNG file; got {name}")
    picture = Image.open(name).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("L")
    picture.thumbnail((128, 128))
    row, column = (pil_to_tensor(picture)[0] < 128).nonzero().T  # dark ones
    return Mixture(torch.stack([column, picture.height - row], 1).float(), 0.5)


# ---- Numbers ----
def measure(flow, args):
    """Numbers of a flow against the truth, as a dict; points and noise depend on the seed only."""
    data = args.dataset
    n = min(args.samples, 4000)
    torch.manual_seed(args.seed + 1)
    x1 = data.sample(n)
    many = data.sample(16 * n)
    noise = torch.randn_like(many)
    numbers = {}
    if args.coupling == "independent" and args.reflow == 0:  # else u has no closed form
        t = flow.path.t_span[1] * torch.rand(len(many))
        x_t, dx_t = flow.path.psi_dpsi(t, noise, many)
        v_t, u_t = flow.v(t, x_t), data.field(flow.path, t, x_t)
        numbers["loss"] = mse_loss(v_t, dx_t).item()
        numbers["floor"] = mse_loss(u_t, dx_t).item()
        numbers["excess"] = mse_loss(v_t, u_t).item()  # E|v - u|^2 / 2
    x0 = flow.path.sample_source((n, 2))
    truth = data.scale * data.sample(n)
    log_p = data.log_prob(x1)
    gap = log_p - flow.log_prob(data.shift + data.scale * x1, rtol=1e-6, atol=1e-6)
    numbers["gap"] = gap.mean().item()
    numbers["gap_se"] = gap.std().item() / math.sqrt(n)
    numbers["entropy"] = -log_p.mean().item()
    solve = partial(fm.odeint, flow.v, x0, flow.path.t_span)
    numbers["nfe"] = solve().nfe.double().mean().item()
    accurate = solve(rtol=1e-6, atol=1e-6).x
    for nfe in NFES:
        for method, stages in STAGES.items():
            if nfe % stages == 0:
                x = solve(method, nfe // stages).x
                numbers[f"energy {method} {nfe}"] = energy_distance(data.scale * x, truth)
                numbers[f"rmse {method} {nfe}"] = mse_loss(x, accurate).sqrt().item()
        if args.sde:
            torch.manual_seed(args.seed)
            x = fm.sample_sde(flow.v, flow.path, (n, 2), nfe)
            numbers[f"energy sde {nfe}"] = energy_distance(data.scale * x, truth)
    return numbers


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, from samples (n, d); 0 for equal laws."""
    between = 2 * torch.cdist(x, y).mean()
    return (between - torch.pdist(x).mean() - torch.pdist(y).mean()).item()


def straightness(xs):
    """Median arc / chord, bend and overshoot of trajectories xs (T, n, d); 1, 0, 0 if straight."""
    chord = xs[-1] - xs[0]
    legs = xs.diff(dim=0)
    arc = legs.norm(dim=2).sum(0) / chord.norm(dim=1)  # a ratio whose mean may be infinite
    bend = (legs * len(legs) - chord).square().sum(2)  # |(x1 - x0) - v|^2 of Liu et al. (2022)
    progress = ((xs - xs[0]) * chord).sum(2) / chord.square().sum(1)
    outside = (progress - 0.5).abs().amax(0) > 0.501  # of the slab between the ends
    return arc.median().item(), bend.mean().item(), outside.double().mean().item()


def table(results):
    """The numbers of every row as text."""
    entropy = next(iter(results.values()))["entropy"]
    lines = [
        f"gap: NLL - entropy of the data ({entropy:.4f} nats). excess: E|v - u|^2 / 2, u exact.",
        "NFE: calls of v for one sample by dopri5 at 1e-5. training: in seconds.\n",
        f"{'':26s}gap         excess     NFE  training",
    ]
    for name, r in results.items():
        gap = f"{r['gap']:10.4f} ± {r['gap_se']:.4f} {r.get('excess', math.nan):10.4f}"
        lines.append(f"{name:16s}{gap}{r['nfe']:8.1f}{r['seconds']:10.1f}")
    titles = {
        "energy": "energy distance x 1000 to the data, from sampling noise alone up to 2",
        "rmse": "RMSE x 1000 to the accurate solution from the same noise, Figure 7",
    }
    for kind, title in titles.items():
        lines += ["", title, f"{'NFE':25s}" + "".join(f"{nfe:7d}" for nfe in NFES)]
        for name, r in results.items():
            for method in (*STAGES, "sde"):
                cells = [1000 * r.get(f"{kind} {method} {nfe}", math.nan) for nfe in NFES]
                if math.isfinite(cells[-1]):
                    numbers = "".join(f"{cell:7.1f}" for cell in cells)
                    lines.append(f"{name:16s}{method:9s}{numbers}")
    return "\n".join(lines).replace("nan", "  -")


# ---- Pictures: panels show the square [-2.25, 2.25]^2 of standardised points ----
def density_image(x):
    """An Image of the density of points x (n, 2): 0 is dark blue, 0.22 and more yellow."""
    p = torch.histogramdd(x.cpu(), [80, 80], range=2 * [-2.25, 2.25], density=True).hist.T.flip(0)
    grey = Image.fromarray((255 * p / 0.22).clamp(0, 255).byte().numpy())
    return ImageOps.colorize(grey, "#160e34", "#fae83c", "#21828e").resize((160, 160), 0)


def paths_image(xs):
    """An Image of trajectories xs (T, n, 2): grey lines from blue to red dots."""
    image = Image.new("RGB", (640, 640), "white")
    pen = ImageDraw.Draw(image)
    pixels = 320 * (1 + xs * torch.tensor([1, -1]) / 2.25).cpu()
    for line in pixels.transpose(0, 1).flatten(1).tolist():
        pen.line(line, "grey", 3)
    for colour, points in {"blue": pixels[0], "red": pixels[-1]}.items():
        for x, y in points.tolist():
            pen.ellipse((x - 7, y - 7, x + 7, y + 7), colour)
    return image.reduce(4)


def save_rows(file, rows):
    """A picture of {caption: list of Images}, a row for each."""
    columns = len(next(iter(rows.values())))
    canvas = Image.new("RGB", (164 * columns, 180 * len(rows)), "white")
    for i, (caption, images) in enumerate(rows.items()):
        ImageDraw.Draw(canvas).text((1, 180 * i + 2), caption, "black", font_size=12)
        for j, image in enumerate(images):
            canvas.paste(image, (164 * j, 180 * i + 18))
    with replaced(file) as part:
        canvas.quantize(64).save(part, "PNG", optimize=True)


def draw_samples(flows, args):
    """density.png and nfe.png, Figure 4, a row for each flow."""
    density, nfe = {}, {}
    for name, flow in flows.items():
        torch.manual_seed(args.seed)
        x0 = flow.path.sample_source((args.samples, 2))
        solve = partial(fm.odeint, flow.v, x0)
        times = [0, 1 / 3, 2 / 3, 5 / 6, flow.path.t_span[1]]
        xs = solve(times, rtol=1e-3, atol=1e-3).xs
        density[f"{name}: t = 0, 1/3, 2/3, 5/6, 1"] = [density_image(x) for x in xs]
        xs = [solve(times[::4], "midpoint", steps).x for steps in (2, 4, 5, 10)]
        xs.append(make_data(args.data).sample(args.samples))
        nfe[f"{name}: NFE 4, 8, 10, 20; data"] = [density_image(x) for x in xs]
    save_rows(args.out / "density.png", density)
    save_rows(args.out / "nfe.png", nfe)


def draw_closed_forms(args):
    """paths.png. Returns what is straight, exact Euler steps and what is memorised, as text."""
    data = make_data(args.data)
    points = data.sample(1000)
    paths = {"OT": fm.OTPath(args.sigma_min), "VP": fm.VPPath()}
    kinds = ("pairs, 2-D", "pairs, 30-D", "flow", "flow of 1", "flow of 3", "flow of 1000")
    lines = [f"{'':28s}arc / chord     bend  overshoot"]
    rows = {}
    for name, path in paths.items():
        times = torch.linspace(*path.t_span, 101)
        rows[f"{name}: pairs in 2-D and 30-D; exact flow of the data, of 1, 3, 1000"] = images = []
        for kind in kinds:
            x0, x1 = torch.randn(2, 5000, 30 if "30" in kind else 2)
            if "pairs" in kind:  # Figure 3
                xs = torch.stack([path.psi(t.expand(5000), x0, x1) for t in times])
            else:  # Theorem 1
                N = kind[8:]  # points, whose field is Marginal's
                u = fm.Marginal(path, points[: int(N)]) if N else partial(data.field, path)
                xs = fm.odeint(u, x0[:1000], times).xs
            images.append(paths_image(xs[:, :40, :2]))
            arc, bend, overshoot = straightness(xs)
            lines.append(f"{kind:18s}{name:8s}{arc:13.3f}{bend:9.3f}{overshoot:11.3f}")
    save_rows(args.out / "paths.png", rows)
    near, new = (torch.cdist(x, points).amin(1).median() for x in (xs[-1], data.sample(1000)))
    lines += ["", f"median distance to the 1000: {near:.4f} of their flow, {new:.4f} of new data"]
    lines += ["", "std / truth after 1, 2, 4, 8, 16 and 32 exact Euler steps to N(0, std^2 I)"]
    for name, path in paths.items():
        for std in (1.0, 0.25):
            u = fm.Marginal(blurred(path, std), torch.zeros(1, 1))
            solve = partial(fm.odeint, u, torch.ones(1, 1), path.t_span, "euler")
            stds = [solve(steps).x.item() for steps in (1, 2, 4, 8, 16, 32)]
            lines.append(f"{name}, std {std:4}" + "".join(f"{x / std:6.2f}" for x in stds))
    return "\n".join(lines)


# ---- Command line ----
def main(argv=None):
    args, rows = parse_args(argv)
    print("settings:", vars(args))
    if args.figure:
        torch.manual_seed(args.seed)
        return print(f"{draw_closed_forms(args)}\n\nthe picture is in {args.out}")
    flows, results = {}, {}
    for name, row in rows.items():
        start = time.time()
        flow = flows[name] = train(name, row)
        seconds = time.time() - start
        file = args.out / f"model_{name.replace(',', '').replace(' ', '_')}.pt"
        with replaced(file) as part:
            torch.save({"config": flow.config, "weights": flow.state_dict()}, part)
        results[name] = {**measure(flow, row), "seconds": seconds}
    draw_samples(flows, args)
    state = {"settings": vars(args), "results": results}
    with replaced(args.out / "metrics.json") as part:
        part.write_text(json.dumps(state, indent=1, default=str))
    print(f"{table(results)}\n\npictures, metrics.json and weights are in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except fm.SolverError as e:
        sys.exit(f"train_toy.py: {e}")
