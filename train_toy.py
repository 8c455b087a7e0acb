# SPDX-License-Identifier: MIT
"""Flow matching in two dimensions: train on a toy density, draw Figure 4, print true numbers.

python train_toy.py --path ot              20 seconds on two CPU cores; results in runs/toy
python train_toy.py --path ot vp           a row for each path: same seed, network and steps
python train_toy.py --ablation             the five rows of Table 1
python train_toy.py --data drawing.png     the dark pixels of a picture are the density
python train_toy.py --figure               train nothing; draw Figure 3 and the exact flow
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.functional import mse_loss
from torch.special import ndtr
from torchvision.ops import MLP

import flow_matching as fm

TABLE_1 = {  # path and objective of each row
    "DDPM": ("vp", "noise"),
    "score matching": ("vp", "score"),
    "ScoreFlow": ("vp", "scoreflow"),
    "FM diffusion": ("vp", "velocity"),
    "FM OT": ("ot", "velocity"),
}


# ---- Settings ----
def parse_args(argv):
    """The settings; argparse ends the program where they are wrong."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    rows = p.add_mutually_exclusive_group()
    rows.add_argument(
        "--path",
        nargs="+",
        default=["ot"],
        choices=fm.PATHS,
        help="probability paths, a row of the table for each; ot and vp are the paper's",
    )
    rows.add_argument("--ablation", action="store_true", help="train the five rows of Table 1")
    rows.add_argument(
        "--figure", action="store_true", help="train nothing; draw single pairs and the exact flow"
    )
    p.add_argument(
        "--objective",
        default="velocity",
        choices=fm.OBJECTIVES,
        help="what the network predicts, Table 1; all but velocity need --path vp or ve, and "
        "scoreflow, a score weighted for likelihood, needs vp",
    )
    p.add_argument(
        "--sigma-min", type=float, default=1e-4, help="std of the OT path at t = 1, Eq. (20)"
    )
    p.add_argument(
        "--data",
        default="checkerboard",
        help="checkerboard, moons, 8gaussians, rings or a picture file, whose dark pixels are the "
        "density; all are scaled to unit variance",
    )
    p.add_argument("--steps", type=int, default=7000, help="optimizer steps")
    p.add_argument("--batch", type=int, default=1024, help="samples in an optimizer step")
    p.add_argument("--lr", type=float, default=4e-3, help="peak learning rate of Adam")
    p.add_argument("--seed", type=int, default=0, help="seed of weights, data and noise")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", default=device, help="where the network runs: cpu, cuda or mps")
    p.add_argument(
        "--samples",
        type=int,
        default=20000,
        help="samples in each panel of the pictures; the numbers use as many, 4000 at most",
    )
    p.add_argument("--out", type=Path, default="runs/toy", help="folder for all that is written")
    args = p.parse_args(argv)
    if args.objective != "velocity" and not set(args.path) <= {"vp", "ve"}:
        p.error(f"--objective {args.objective} tells no velocity at t = 0 here: take --path vp")
    return args


# ---- Network and training ----
class Flow(nn.Module):
    """A network that predicts velocity, noise or score on a path of data of unit variance.

    Departure: four layers of 64 on Fourier features of learned frequencies, which let them see
    edges, learn what is left of the target when the linear answer to Gaussian data is known. The
    paper has five layers of 512 on (t, x).
    """

    def __init__(self, path, objective, sigma_min):
        super().__init__()
        self.config = (path, objective, sigma_min)
        if path == "ot":
            self.path = fm.OTPath(sigma_min)
        else:
            self.path = fm.PATHS[path]()
        self.predict = fm.OBJECTIVES[objective]["predict"]
        self.frequencies = nn.Parameter(3.0 * torch.randn(2, 32))
        self.layers = MLP(2 + 4 * 32 + 10, [64, 64, 64, 64, 2], activation_layer=nn.SiLU)

    def forward(self, t, x):
        """What the network predicts at t (n,) and x (n, 2), (n, 2)."""
        t = t[:, None]
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.path.coefficients(t)
        rho = (alpha_t**2 + sigma_t**2).sqrt()  # std of x_t, as the data has unit variance
        x = x / rho  # of unit variance at all times
        near = sigma_t / rho  # 1 in noise, falls to 0 at the data
        phase = x @ self.frequencies  # (n, 32)
        phase = torch.cat([phase.sin(), phase.cos()], 1)  # the scale of edges
        sharp = 0.2 / (0.02 + near) * phase  # u_t varies over sigma_t: slopes of 1 / sigma_t
        wave = math.pi * t * torch.arange(1, 5, device=t.device)  # functions of time alone
        features = [x, phase, sharp, t, -torch.log(0.01 + near), wave.sin(), wave.cos()]
        x0 = near * x  # E[x0 | x_t] of Gaussian data
        x1 = alpha_t / rho * x  # E[x1 | x_t] of Gaussian data
        if self.predict == "velocity":
            linear = dalpha_t * x1 + dsigma_t * x0  # E[d/dt psi_t | x_t]
        elif self.predict == "noise":
            linear = x0
        else:
            linear = -x0 / sigma_t  # the score of a Gaussian
        return linear + self.layers(torch.cat(features, 1))

    def velocity(self, t, x):
        """v_t(x), Eq. (46), at t (n,) and x (n, 2), (n, 2)."""
        return self.path.convert(t, x, self(t, x), self.predict, "velocity")


def train(name, path, objective, data, args):
    """A Flow after args.steps steps. Departure: the paper names no optimizer and no rate here."""
    torch.manual_seed(args.seed)
    flow = Flow(path, objective, args.sigma_min).to(args.device)
    fused = args.device != "mps"  # for which torch 2.4 has none
    optimizer = torch.optim.Adam(flow.parameters(), betas=(0.9, 0.99), fused=fused)
    for step in range(1, args.steps + 1):
        warmup = min(1, step / 200)
        decay = (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * warmup * decay
        x1 = data.sample(args.batch).to(args.device)
        # It draws t and x0 for each x1.
        loss = fm.cfm_loss(flow, flow.path, x1, **fm.OBJECTIVES[objective])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0 or step == args.steps:
            print(f"{name}: step {step}  loss {loss.item():.4f}", file=sys.stderr)
            if not loss.isfinite():
                raise ValueError(f"{name}: the loss is not finite at step {step}: lower --lr")
    return flow.requires_grad_(False).cpu()


def save(file, flow):
    """Writes what load needs to file."""
    with open(file, "wb") as f:  # given a name, torch.save has no OSError for a full disk
        torch.save({"config": flow.config, "weights": flow.state_dict()}, f)


def load(file):
    """The Flow that train_toy.py wrote to file, as model_ot.pt."""
    state = torch.load(file, weights_only=True)
    flow = Flow(*state["config"])
    flow.load_state_dict(state["weights"])
    return flow.requires_grad_(False)


# ---- Data: of mean 0 and unit variance, with exact density and marginal field, on the CPU ----
class Checkerboard:
    """Eight squares of side sqrt(3 / 4)."""

    def __init__(self):
        numbers = torch.arange(-2, 2).double()
        corners = torch.cartesian_prod(numbers, numbers)  # of 16 squares
        is_black = corners.sum(1) % 2 == 0
        self.side = math.sqrt(3 / 4)  # for unit variance
        self.low = self.side * corners[is_black]  # (8, 2)
        self.high = self.low + self.side

    def sample(self, n):
        """n points, (n, 2)."""
        u = torch.rand(n, 2)
        i = torch.randint(8, (n,))
        return (self.low[i] + self.side * u).float()

    def log_prob(self, x):
        """Exact log density in nats at x (n, 2), (n,)."""
        x = x[:, None]
        above = x >= self.low.float()
        below = x <= self.high.float()
        inside = (above & below).all(2).any(1)
        return torch.where(inside, -math.log(6), -math.inf)  # their area is 6

    def field(self, path, t, x):
        """u_t(x), Eq. (8), in closed form: in each square x1 given x_t is two truncated normals."""
        t = t.double()
        x = x.double()
        column = t[:, None, None]
        alpha_t = path.alpha(column).clamp(min=1e-4)
        mean = x[:, None] / alpha_t
        std = path.sigma(column) / alpha_t
        a = (self.low - mean) / std  # (n, 8, 2)
        b = (self.high - mean) / std
        centre = (a + b).abs() / 2  # mirrored to the tail where ndtr is accurate
        half = (b - a) / 2
        mass = ndtr(half - centre) - ndtr(-half - centre)
        mass = mass.clamp(min=1e-300)
        normal = torch.distributions.Normal(0.0, 1.0)
        rise = normal.log_prob(a).exp() - normal.log_prob(b).exp()
        x1 = (mean + std * rise / mass).clamp(self.low, self.high)  # its mean in every square
        weights = mass.log().sum(2, keepdim=True).softmax(1)
        return path.u(t, x, (weights * x1).sum(1)).float()


class Mixture:
    """Gaussians of std noise at N centres (N, 2), moved and scaled to mean 0, unit variance."""

    def __init__(self, centres, noise):
        centres = centres - centres.mean(0)
        variance = centres.square().mean() + noise**2
        scale = variance.sqrt().item()
        self.centres = centres / scale
        self.noise = noise / scale

    def sample(self, n):
        """n points, (n, 2)."""
        i = torch.randint(len(self.centres), (n,))
        return self.centres[i] + self.noise * torch.randn(n, 2)

    def marginal(self, path):
        """The mixture's p_t and u_t, Eqs. (6) and (8): those of the centres on a wider path."""

        def sigma(t):
            return torch.hypot(self.noise * path.alpha(t), path.sigma(t))

        wider = fm.AffinePath(path.alpha, sigma, path.t_span, check_ends=False)
        return fm.Marginal(wider, self.centres)

    def log_prob(self, x):
        """Exact log density in nats at x (n, 2), (n,)."""
        return self.marginal(fm.OTPath(0.0)).log_prob(1.0, x)

    def field(self, path, t, x):
        """u_t(x), Eq. (8), in closed form."""
        return self.marginal(path)(t, x)


def circle(turns):
    """1,000 points on the unit circle, over that many half turns, (1000, 2)."""
    angle = turns * math.pi * torch.arange(1000) / 1000
    return torch.stack([angle.cos(), angle.sin()], 1)


MIXTURES = {  # centres and noise
    "8gaussians": (4 * circle(2)[::125], 0.3),
    "moons": (torch.cat([circle(1), torch.tensor([1.0, 0.5]) - circle(1)]), 0.08),
    "rings": (torch.cat([1.5 * circle(2), 3 * circle(2)]), 0.1),
}


def make_data(name):
    """The data set of that name, or of the dark pixels of a picture file."""
    if name == "checkerboard":
        return Checkerboard()
    if name in MIXTURES:
        return Mixture(*MIXTURES[name])
    picture = Image.open(name)
    if picture.mode.startswith(("I", "F")):  # more than 8 bits
        if picture.format != "PNG":  # white may be 0, 1, 65535 or anything
            raise ValueError(f"--data {name} has mode {picture.mode}: save it as 8-bit or as PNG")
        picture = Image.fromarray(np.uint8(np.asarray(picture) // 257))
    picture = ImageOps.exif_transpose(picture).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture)  # transparent is white
    grey = np.asarray(picture.convert("L"))
    row, column = np.nonzero(grey < 128)
    if len(row) == 0:
        raise ValueError(f"--data {name} has no pixel darker than 128 of 255 to take as density")
    every = len(row) // 5000 + 1  # so at most 5,000 are taken, one of each square of that area
    strip = row // math.isqrt(every)
    order = np.lexsort((row, column, strip))[::every]
    centres = np.stack([column[order], -row[order]], 1)  # y points up
    noise = max(0.5, max(grey.shape) / 200)
    return Mixture(torch.from_numpy(centres).float(), noise)


# ---- Numbers ----
def measure(flow, data, args):
    """Numbers of a flow against the truth, as a dict; points and noise depend on the seed only."""
    n = min(args.samples, 4000)
    torch.manual_seed(args.seed + 1)
    x1 = data.sample(n)
    log_p = fm.log_prob(flow.velocity, flow.path, x1).log_prob
    gap = data.log_prob(x1) - log_p
    nfe = fm.sample(flow.velocity, flow.path, (n, 2)).nfe
    x1 = data.sample(4 * n)
    t = flow.path.sample_t(len(x1))
    x_t = flow.path.psi(t, torch.randn_like(x1), x1)
    u_t = data.field(flow.path, t, x_t)
    return {
        "gap": gap.mean().item(),
        "gap_se": gap.std().item() / math.sqrt(n),
        "excess": mse_loss(flow.velocity(t, x_t), u_t).item(),
        "nfe": nfe.double().mean().item(),
    }


def print_table(results):
    """Prints the numbers of every row."""
    print("\ngap: mean of log p_data - log p_model at new points, in nats, +- its standard error.")
    print("excess: E|v - u|^2 / 2, u exact. NFE: calls of v for one sample by dopri5 at 1e-5.")
    print(f"\n{'':26s}gap          excess     NFE  training, s")
    for name, r in results.items():
        gap = f"{r['gap']:10.4f} +- {r['gap_se']:.4f}"
        print(f"{name:16s}{gap}{r['excess']:11.4f}{r['nfe']:8.1f}{r['seconds']:10.1f}")


# ---- Pictures: panels show the square [-2.25, 2.25]^2 ----
PANEL = 160  # pixels; five fill the width of a page on GitHub
NIGHT = "#160e34"


def density_image(x):
    """A panel of the density of points x (n, 2): 0.22 and more is yellow."""
    counts, _ = torch.histogramdd(x, [80, 80], range=2 * [-2.25, 2.25])
    p = counts.T.flip(0) / len(x) * (80 / 4.5) ** 2  # rows from the top
    p = (255 * p / 0.22).clamp(max=255)
    grey = Image.fromarray(p.byte().numpy())
    image = ImageOps.colorize(grey, NIGHT, "#fae83c", "#21828e")
    return image.resize((PANEL, PANEL), Image.NEAREST)


def draw_dots(panel, x, radius, colours):
    """The panel with points x (n, 2) in their colours."""
    pen = ImageDraw.Draw(panel)
    up = torch.tensor([1, -1])  # rows count downwards
    places = panel.width / 2 * (1 + x * up / 2.25)
    for place, colour in zip(places.tolist(), colours):
        pen.circle(place, radius, colour)
    return panel


def grid(size, headings, rows):
    """An Image of {name: panels of that size}: a row for each, with its name, below headings."""
    step = size + 4
    width = step * len(headings)
    height = 26 + step * len(rows)
    image = Image.new("RGB", (width, height), "#0b0720")
    pen = ImageDraw.Draw(image)
    for column, heading in enumerate(headings):
        pen.text((7 + step * column, 4), heading, font_size=15)
    for row, (name, panels) in enumerate(rows.items()):
        top = 26 + step * row
        for column, panel in enumerate(panels):
            image.paste(panel, (step * column, top))
        pen.text((7, 4 + top), name, font_size=15)
    return image.quantize(64)


def draw(flows, data, args):
    """density.png and nfe.png, Figure 4, a row for each flow; flow.gif, the flows side by side."""
    density = {}
    nfe = {}
    film = {}
    size = min(360, 820 // len(flows))
    loose = {"rtol": 1e-3, "atol": 1e-3}
    for name, flow in flows.items():
        torch.manual_seed(args.seed)
        x0 = flow.path.sample_source((args.samples, 2))
        start, end = flow.path.t_span
        times = (start, 1 / 3, 2 / 3, 5 / 6, end)
        xs = fm.odeint(flow.velocity, x0, times, **loose).xs
        density[name] = [density_image(x) for x in xs]
        nfe[name] = []
        for steps in (2, 4, 5, 10):  # of two calls
            x = fm.odeint(flow.velocity, x0, (start, end), method="midpoint", steps=steps).x
            nfe[name].append(density_image(x))
        nfe[name].append(density_image(data.sample(args.samples)))
        x0 = x0[:1200]
        degrees = torch.atan2(x0[:, 1], x0[:, 0]).rad2deg()  # of the start, for its colour
        colours = [f"hsl({a // 60 * 60 % 360}, 80%, 65%)" for a in degrees.int().tolist()]
        times = torch.linspace(start, end, 31)
        film[name] = []
        for x in fm.odeint(flow.velocity, x0, times, **loose).xs:
            panel = Image.new("RGB", (size, size), NIGHT)
            film[name].append(draw_dots(panel, x, 1.5, colours))
    headings = ("t = 0, noise", "t = 1/3", "t = 2/3", "t = 5/6", "t = 1, samples")
    grid(PANEL, headings, density).save(args.out / "density.png")
    headings = ("NFE 4", "NFE 8", "NFE 10", "NFE 20", "data")
    grid(PANEL, headings, nfe).save(args.out / "nfe.png")
    frames = []
    for i, panels in enumerate(zip(*film.values())):
        frames.append(grid(size, film, {f"t = {i / 30:.2f}": panels}))
    frames[0].save(
        args.out / "flow.gif",
        save_all=True,
        append_images=frames[1:],
        duration=[700] + 29 * [80] + [2500],  # milliseconds
        loop=0,  # for ever
    )


def draw_figure(data, args):
    """paths.png: paths of single pairs, Figure 3, beside the exact flow of the data, Theorem 1."""
    torch.manual_seed(args.seed)
    x0 = torch.randn(50, 2)
    x1 = data.sample(50)
    points = data.sample(1500)
    rows = {}
    for name, path in (("OT", fm.OTPath(args.sigma_min)), ("VP", fm.VPPath())):
        times = torch.linspace(*path.t_span, 201)
        pairs = [path.psi(t, x0, x1) for t in times]
        flow = fm.odeint(partial(data.field, path), x0, times)
        panels = []
        for xs in (torch.stack(pairs), flow.xs):  # (201, 50, 2)
            panel = Image.new("RGB", (1640, 1640), NIGHT)
            draw_dots(panel, points, 7, 1500 * ["#3b3169"])
            every = xs.flatten(0, 1)  # a dot each 1 / 200 of the time
            draw_dots(panel, every, 4, len(every) * ["#b0a8d8"])
            draw_dots(panel, xs[0], 14, 50 * ["#4f8dff"])
            draw_dots(panel, xs[-1], 14, 50 * ["#fde725"])
            panels.append(panel.reduce(4))
        rows[f"{name} path"] = panels
    headings = ("single pairs, from blue noise to yellow data", "exact flow of the data")
    grid(410, headings, rows).save(args.out / "paths.png")


# ---- Command line ----
def run(args):
    """Trains, measures and draws every row of the table, or draws the figure."""
    data = make_data(args.data)
    fm.OTPath(args.sigma_min)  # a bad value fails here, not after the rows of other paths
    args.out.mkdir(parents=True, exist_ok=True)
    print("settings:", vars(args))
    if args.figure:
        return draw_figure(data, args)
    rows = {path: (path, args.objective) for path in args.path}
    if args.ablation:
        rows = TABLE_1
    flows = {}
    results = {}
    try:
        for name, (path, objective) in rows.items():
            start = time.time()
            flows[name] = train(name, path, objective, data, args)
            seconds = time.time() - start
            results[name] = measure(flows[name], data, args)
            results[name]["seconds"] = seconds
            state = {"settings": vars(args), "results": results}
            text = json.dumps(state, indent=1, default=str)
            (args.out / "metrics.json").write_text(text)
            save(args.out / f"model_{name.replace(' ', '_')}.pt", flows[name])
    finally:  # also where Ctrl-C or a full disk ends it
        if results:
            print_table(results)
    draw(flows, data, args)
    print(f"\npictures, metrics.json and weights are in {args.out}")


def main(argv=None):
    """The command; what its user can put right ends it with one line."""
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, Image.DecompressionBombError, fm.SolverError) as e:
        sys.exit(f"train_toy.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
