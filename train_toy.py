# SPDX-License-Identifier: MIT
"""Flow matching in two dimensions: trains on a toy density, draws Figure 4, prints true numbers.

    python train_toy.py --path ot              a minute on two CPU cores; all goes to runs/toy
    python train_toy.py --path ot vp           one row per path: same seed, network and budget
    python train_toy.py --ablation             Table 1, Figures 4 and 9, couplings and reflow
    python train_toy.py --figure conditional   Figures 2, 3 and 8, and what is straight
    python train_toy.py --data drawing.png     the dark pixels of a picture are the density
"""
import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from flow_matching import METHODS, OBJECTIVES, PATHS, AffinePath, Marginal, OTPath, SolverError
from flow_matching import as_velocity, cfm_loss, log_prob, odeint, ot_coupling, sample, sample_sde

NFES = 4, 8, 10, 20, 100
ABLATION = {  # Table 1, and beside it what later papers do to the pairs (x0, x1)
    "DDPM": dict(path="vp", objective="noise"),
    "score matching": dict(path="vp", objective="score"),
    "ScoreFlow": dict(path="vp", objective="scoreflow"),
    "FM, diffusion": dict(path="vp", objective="velocity"),
    "FM, OT": dict(path="ot", objective="velocity"),
    "minibatch OT": dict(path="ot", objective="velocity", coupling="ot"),
    "reflow": dict(path="ot", objective="velocity", reflow=1),
}


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
        low, high = self.low.to(x.dtype), self.high.to(x.dtype)  # rounded as in sample
        inside = ((x[:, None] >= low) & (x[:, None] <= high)).all(2).any(1)
        return torch.where(inside, -math.log(8 * self.side**2), -math.inf)

    def field(self, path):
        """u_t(x), Eq. (8), in closed form: in each square x1 given x_t is two truncated normals."""

        def u(t, x):
            t, x = t.double(), x.double()
            alpha_t, sigma_t, _, _ = path.coefficients(t[:, None, None])
            mean, std = x[:, None] / alpha_t.clamp(min=1e-4), sigma_t / alpha_t.clamp(min=1e-4)
            a, b = (self.low - mean) / std, (self.high - mean) / std  # (n, 8, 2)
            flip = a + b > 0  # to the side where log_ndtr is accurate
            lo, hi = torch.where(flip, -b, a), torch.where(flip, -a, b)
            log_hi = torch.special.log_ndtr(hi)
            log_mass = log_hi + torch.log(-torch.expm1(torch.special.log_ndtr(lo) - log_hi))
            density = lambda z: torch.exp(-z.square() / 2 - math.log(2 * math.pi) / 2 - log_mass)
            x1 = mean + std * (density(a) - density(b))
            x1 = x1.clamp(self.low, self.high)
            x1_mean = (log_mass.sum(2).softmax(1)[:, :, None] * x1).sum(1)
            return path.u(t, x, x1_mean).float()

        return u


class Mixture:
    """Gaussians of std noise at N centres (N, 2): p_t and u_t are Marginal's on a widened path."""

    def __init__(self, centres, noise):
        self.shift = centres.mean(0)
        self.scale = ((centres - self.shift).square().mean() + noise**2).sqrt().item()
        self.centres, self.noise = (centres - self.shift) / self.scale, noise / self.scale

    def sample(self, n, generator=None):
        """n standardised points, (n, 2)."""
        centre = self.centres[torch.randint(len(self.centres), (n,), generator=generator)]
        return centre + self.noise * torch.randn(n, 2, generator=generator)

    def _marginal(self, path):  # alpha x1 + sigma x0 = alpha c + N(0, alpha^2 noise^2 + sigma^2)
        def coefficients(t):
            alpha_t, sigma_t, dalpha_t, dsigma_t = path.coefficients(t)
            wide = torch.hypot(alpha_t * self.noise, sigma_t)
            dwide = (alpha_t * dalpha_t * self.noise**2 + sigma_t * dsigma_t) / wide
            return alpha_t, wide, dalpha_t, dwide

        widened = AffinePath(None, None, path.t_span)
        widened.coefficients = coefficients
        return Marginal(widened, self.centres)

    def log_prob(self, x):
        """Exact log density in nats and data units at standardised x, (n,)."""
        return self._marginal(OTPath(0.0)).log_prob(1 - 1e-5, x) - 2 * math.log(self.scale)

    def field(self, path):
        """u_t(x), Eq. (8), in closed form."""
        return self._marginal(path)


def make_data(name):
    """The data set of that name, or of that PNG file."""
    angle = torch.arange(1000) / 1000 * math.pi
    if name == "checkerboard":
        return Checkerboard()
    if name == "8gaussians":
        return Mixture(4 * torch.stack([torch.cos(2 * angle), torch.sin(2 * angle)], 1)[::125], 0.3)
    if name == "moons":
        upper = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
        return Mixture(torch.cat([upper, torch.tensor([1.0, 0.5]) - upper]), 0.08)
    if name == "spirals":
        arm = angle[:, None] * 3 * torch.stack([torch.cos(angle * 3), torch.sin(angle * 3)], 1)
        return Mixture(torch.cat([arm, -arm]), 0.25)
    if name == "rings":
        circle = torch.stack([torch.cos(angle * 2), torch.sin(angle * 2)], 1)
        return Mixture(torch.cat([circle[::4], circle[1::2] * 2, circle]) * 1.5, 0.1)
    picture = Image.open(name).convert("L")
    picture.thumbnail((128, 128))
    pixels = torch.tensor(list(picture.tobytes())).reshape(picture.height, picture.width)
    row, column = (pixels < 128).nonzero().T
    if len(row) == 0:
        raise ValueError(f"{name} has no dark pixel (below 128 of 255), so it holds no density")
    return Mixture(torch.stack([column, picture.height - row], 1).float(), 0.5)


# ---- The flow ------------------------------------------------------------------------------------


class Net(nn.Module):
    """A velocity, noise or score at t (B,) and x (B, 2): a SiLU network on random Fourier features.

    They let it see edges. It learns what is left of its target when the linear answer to Gaussian
    data of unit variance, E[x1 | x] = alpha x / rho^2 and E[x0 | x] = sigma x / rho^2, is known.
    Departure: the paper's toy network is a plain MLP, five layers of 512.
    """

    def __init__(self, path, predict="velocity", width=64, depth=4, features=64, bandwidth=3.0):
        super().__init__()
        self.path, self.predict = path, predict
        self.register_buffer("frequencies", bandwidth * torch.randn(2, features))
        sizes = [2 + 4 * features + 10, *[width] * depth]
        hidden = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, t, x):
        t = t[:, None]
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.path.coefficients(t)
        rho = (alpha_t**2 + sigma_t**2).sqrt()
        x, near, wave = x / rho, sigma_t / rho, math.pi * t * torch.arange(1, 5, device=x.device)
        phase = x @ self.frequencies
        phase = torch.cat([phase.sin(), phase.cos()], 1)
        sharp = 0.2 / (0.05 + near) * phase  # u_t varies over sigma_t: slopes of 1 / sigma_t
        features = [x, phase, sharp, t, -torch.log(0.01 + near), wave.sin(), wave.cos()]
        x0, x1 = near * x, alpha_t / rho * x
        linear = {"velocity": dalpha_t * x1 + dsigma_t * x0, "noise": x0, "score": -x0 / sigma_t}
        return linear[self.predict] + self.layers(torch.cat(features, 1))


class Flow:
    """A trained flow: v works on standardised points, sample and log_prob in data units."""

    def __init__(self, net, shift, scale):
        self.net, self.path = net.requires_grad_(False), net.path
        self.shift, self.scale = shift, scale  # data = shift + scale * standardised
        self.v = as_velocity(net, net.path, net.predict)

    def sample(self, n, **solver):
        """n samples in data units, (n, 2), by the solver of flow_matching.odeint."""
        x = sample(self.v, self.path, (n, 2), device=self.shift.device, **solver).x
        return self.shift + self.scale * x

    def log_prob(self, x, **solver):
        """log density in nats at x (n, 2) in data units, (n,)."""
        log_p = log_prob(self.v, (x - self.shift) / self.scale, self.path, **solver).log_prob
        return log_p - 2 * math.log(self.scale)


def make_path(args):
    return PATHS[args.path](*[args.sigma_min] * (args.path == "ot"))


def write(file, save):
    """save(temporary name), then move it over file in one step, so that file is always whole."""
    part = file.with_name(file.name + ".part")
    try:
        save(part)
        os.replace(part, file)
    except (OSError, RuntimeError) as e:  # torch says RuntimeError to a full disk
        part.unlink(missing_ok=True)
        sys.exit(f"train_toy.py: {file} cannot be written, what was there stands: {e}")


def store(flow, name, file):
    """Writes the Flow for load."""
    state = {"format": "flow-matching-toy-2", "path": name, "path_options": asdict(flow.path)}
    state |= {"predict": flow.net.predict, "net": flow.net.state_dict()}
    state |= {"shift": flow.shift, "scale": flow.scale}
    write(file, lambda part: torch.save(state, part))


def load(file):
    """The Flow that train_toy.py wrote to file (model_<path>.pt), on the CPU."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != "flow-matching-toy-2":
        raise ValueError(f"{file} is not a checkpoint of this train_toy.py")
    net = Net(PATHS[state["path"]](**state["path_options"]), state["predict"])
    net.load_state_dict(state["net"])
    return Flow(net, state["shift"], state["scale"])


def pairs(args, data, teacher):
    """Batches (x0, x1) without end: reflow's with a teacher; x0 = None is independent noise."""
    if teacher:  # from noise to where its flow takes it
        x0 = torch.randn(min(2**17, args.steps * args.batch), 2, device=args.device)
        with torch.no_grad():
            x1 = odeint(teacher.v, x0, teacher.path.t_span, rtol=1e-4, atol=1e-4).x
    while True:
        if teacher:
            i = torch.randint(len(x0), (args.batch,), device=args.device)
            yield x0[i], x1[i]
            continue
        x0, x1 = None, data.sample(args.batch).to(args.device)
        if args.coupling == "ot":  # in groups of 128: the time of an assignment grows as their cube
            x0 = torch.randn_like(x1)
            x0 = torch.cat([a[ot_coupling(a, b)] for a, b in zip(x0.split(128), x1.split(128))])
        yield x0, x1


def fit(name, args, data, teacher=None):
    """A Flow after args.steps steps of Adam with cosine decay, on a teacher's pairs if any."""
    torch.manual_seed(args.seed)
    path, objective = make_path(args), OBJECTIVES[args.objective]
    net = Net(path, objective.get("predict", "velocity")).to(args.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99))
    decay = lambda i: min(1, (i + 1) / 200) * (1 + math.cos(math.pi * i / args.steps)) / 2
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    start, shown, mean = time.time(), 0.0, None
    for step, (x0, x1) in zip(range(1, args.steps + 1), pairs(args, data, teacher)):
        loss = cfm_loss(net, path, x1, x0=x0, **objective)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean = loss.detach() if mean is None else mean.lerp(loss.detach(), 0.01)
        if time.time() - shown > 0.5 or step == args.steps:
            if not mean.isfinite():
                sys.exit(f"{name}: the loss is not finite at step {step}: lower --lr {args.lr}")
            shown, rate = time.time(), step / (time.time() - start)
            left = f"{rate:.0f} steps/s  {(args.steps - step) / rate:.0f} s left  "
            line = f"\r{name}: step {step}/{args.steps}  loss {mean:.4f}  {left}"
            print(line, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return Flow(net, data.shift.to(args.device), data.scale)


def train(name, args, data):
    """The Flow of these settings, args.reflow times trained again on its own pairs; seconds."""
    start, flow = time.time(), fit(name, args, data)
    for i in range(args.reflow):
        flow = fit(f"{name}, reflow {i + 1}", args, data, flow)
    return flow, time.time() - start


# ---- Numbers -------------------------------------------------------------------------------------


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, from samples (n, d); 0 for equal laws."""
    n = len(x)
    within = sum(torch.cdist(z, z).sum().item() for z in (x, y)) / (n * (n - 1))
    return 2 * torch.cdist(x, y).mean().item() - within


def straightness(xs):
    """Arc length over chord of trajectories xs (T, n, d), (n,); 1 is straight."""
    return xs.diff(dim=0).norm(dim=2).sum(0) / (xs[-1] - xs[0]).norm(dim=1)


def likelihood(flow, data, args, x1, many):
    """NLL against the entropy, in nats."""
    x1 = (data.shift + data.scale * x1).to(args.device)
    nll = -flow.log_prob(x1, rtol=1e-6, atol=1e-6).cpu()
    entropy = -data.log_prob(many).mean().item()  # of the same law: exact for the checkerboard
    out = {"nll": nll.mean().item(), "nll_se": (nll.std() / math.sqrt(len(nll))).item()}
    return out | {"entropy": entropy, "gap": out["nll"] - entropy}


def regression(flow, data, args, x0, x1, generator):
    """Loss, that of the exact field u and E|v - u|^2 / 2; None where pairs leave no closed form."""
    if args.coupling != "independent" or args.reflow:
        return dict.fromkeys(("loss", "floor", "excess"))
    t0, t1 = flow.path.t_span
    t = t0 + (t1 - t0) * torch.rand(len(x1), generator=generator)
    x_t, dx_t = flow.path.psi_dpsi(t, x0, x1)
    field = data.field(flow.path)
    exact = torch.cat([field(t, x) for t, x in zip(t.split(4096), x_t.split(4096))])
    v_t = flow.v(t.to(args.device), x_t.to(args.device)).cpu()
    differences = {"loss": v_t - dx_t, "floor": exact - dx_t, "excess": v_t - exact}
    return {name: d.square().mean().item() for name, d in differences.items()}


def measure(flow, data, args):
    """Numbers of a flow against the truth, as a dict; points and noise depend on the seed only."""
    n, device, path = min(args.samples, 4000), args.device, flow.path
    generator = torch.Generator().manual_seed(args.seed + 1)
    x1, many = data.sample(n, generator), data.sample(16 * n, generator)
    x0 = torch.randn(many.shape, generator=generator)
    out = likelihood(flow, data, args, x1, many)
    out |= regression(flow, data, args, x0, many, generator)
    noise = path.sample_source((n, 2), generator=generator).to(device)
    truth = data.sample(n, generator)
    distance = lambda x: energy_distance(data.scale * x.cpu(), data.scale * truth)
    with torch.no_grad():
        solution = odeint(flow.v, noise, path.t_span)
        calls = solution.nfe.cpu().double()
        out |= {"nfe_mean": calls.mean().item(), "nfe_max": int(calls.max())}
        xs = odeint(flow.v, noise, torch.linspace(*path.t_span, 101).tolist(), "rk4", steps=100).xs
        out["straightness"] = straightness(xs).median().item()  # 1 / chord has no variance
        out["energy"] = {"dopri5": distance(solution.x)}
        for method in ("midpoint", "euler", "rk4"):
            stages = len(METHODS[method].C)
            for nfe in (nfe for nfe in NFES if nfe % stages == 0):
                x = odeint(flow.v, noise, path.t_span, method, steps=nfe // stages).x
                out["energy"][f"{method} {nfe}"] = distance(x)
        for nfe in NFES if args.sde is not None else ():
            generator = torch.Generator(device).manual_seed(args.seed)
            x = sample_sde(flow.v, path, (n, 2), nfe, args.sde, device=device, generator=generator)
            out["energy"][f"sde {nfe}"] = distance(x)
    return out


def table(results):
    """The numbers of every row, a dict of dicts, as one table of text; the other solvers below."""
    cell = lambda value: f"{'-' if value is None else f'{value:.4f}':>8s}"
    energies = lambda r, method: "".join(cell(r["energy"].get(f"{method} {n}")) for n in NFES)
    names = "".join(f"{name:>8s}" for name in ("loss", "floor", "excess", "NFE", "max", "arc"))
    nfes = "".join(f"{n:8d}" for n in NFES)
    entropy = next(iter(results.values()))["entropy"]
    gap = f"gap: NLL - entropy {entropy:.4f} nats."
    lines = [f"{gap} floor: loss of the exact u, excess: E|v - u|^2 / 2.",
             "NFE, max: of dopri5 at 1e-5. arc: median of arc length / chord of its paths.",
             "columns 4 to 100: energy distance to the data of samples by midpoint at that NFE",
             f"{'':16s}     gap        {names}{nfes} seconds"]  # fmt: skip
    for name, r in results.items():
        row = f"{name:16s}{cell(r['gap'])} ±{r['nll_se']:.4f}"
        row += cell(r["loss"]) + cell(r["floor"]) + cell(r["excess"])
        row += f"{r['nfe_mean']:8.1f}{r['nfe_max']:8d}{r['straightness']:8.2f}"
        lines.append(row + energies(r, "midpoint") + f"{r['seconds']:8.1f}")
    methods = {key.split()[0] for r in results.values() for key in r["energy"]}
    for method in sorted(methods - {"midpoint", "dopri5"}):
        lines += ["", f"{method:80s}{nfes}"]
        lines += [f"{name:80s}{energies(r, method)}" for name, r in results.items()]
    return "\n".join(lines)


# ---- Pictures ------------------------------------------------------------------------------------


def colour(z):
    """uint8 RGB (..., 3) of z in [0, 1]: dark blue through green to yellow."""
    stops = [[22, 14, 52], [56, 60, 132], [33, 130, 142], [76, 194, 108], [250, 232, 60]]
    stops, z = torch.tensor(stops).float(), z.clamp(0, 1) * (len(stops) - 1)
    i = z.long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[i], stops[i + 1], (z - i)[..., None]).byte()


def histogram(x, limit, bins=96):
    """Density of points x (n, 2) on the square [-limit, limit]^2 as (bins, bins), top row first."""
    i = ((x.cpu() + limit) / (2 * limit) * bins).floor().long()
    i = i[((i >= 0) & (i < bins)).all(1)]
    counts = torch.bincount((bins - 1 - i[:, 1]) * bins + i[:, 0], minlength=bins**2)
    return counts.reshape(bins, bins) / len(x) * (bins / (2 * limit)) ** 2


def draw_grid(file, rows, titles, size=192):
    """A picture of rows, {label: [panel, ...]}; a panel is a density (h, w) or a finished Image."""
    font, pitch, top = ImageFont.load_default(size=15), size + 6, 28
    left = 18 + int(max(map(font.getlength, rows)))
    canvas = Image.new("RGB", (left + len(titles) * pitch, top + len(rows) * pitch), "white")
    pen = ImageDraw.Draw(canvas)
    for j, title in enumerate(titles):
        pen.text((left + j * pitch + size / 2, 14), title, "black", font, anchor="mm")
    for i, (label, panels) in enumerate(rows.items()):
        pen.text((left - 8, top + i * pitch + size / 2), label, "black", font, anchor="rm")
        for j, panel in enumerate(panels):
            if isinstance(panel, torch.Tensor):
                panel = Image.fromarray(colour(panel).numpy())
            method = Image.Resampling.NEAREST if panel.width < size else Image.Resampling.LANCZOS
            canvas.paste(panel.resize((size, size), method), (left + j * pitch, top + i * pitch))
    write(file, lambda part: canvas.quantize(64).save(part, "PNG", optimize=True))


def draw_paths(xs, limit, size=768):
    """An Image of trajectories xs (T, n, 2): grey lines from blue starts to red ends."""
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    points = torch.stack([xs[..., 0] + limit, limit - xs[..., 1]], -1).cpu() * size / (2 * limit)
    for line in points.transpose(0, 1).tolist():
        pen.line([tuple(p) for p in line], (120, 120, 120), 2)
    for end, fill in ((0, (60, 90, 200)), (-1, (210, 50, 40))):
        for x, y in points[end].tolist():
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill)
    return image


def draw_field(u, size=192):
    """An Image of a field u (96^2, 2), top row first: size as colour, direction as strokes."""
    u = u.reshape(96, 96, 2)
    speed = u.norm(dim=2, keepdim=True)
    image = Image.fromarray(colour((speed / speed.max())[..., 0]).numpy()).resize((size, size))
    pen = ImageDraw.Draw(image)
    for i in range(6, 96, 12):
        for j in range(6, 96, 12):
            dx, dy = (u[i, j] / speed[i, j] * size / 16).tolist()
            x, y = j * size / 96, i * size / 96
            pen.line((x, y, x + dx, y - dy), "white", 1)
            pen.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), "white")
    return image


def grid_of(limit, bins=96):
    """Centres of the bins of histogram, (bins^2, 2), top row first."""
    axis = (torch.arange(bins) + 0.5) / bins * 2 * limit - limit
    return torch.stack(torch.meshgrid(axis, axis.flip(0), indexing="xy"), -1).reshape(-1, 2)


def draw(flows, data, args):
    """density.png and nfe.png (Figure 4), trajectories.png and likelihood.png, a row per flow."""
    limit = 1.15 * (data.scale * data.sample(20000)).abs().quantile(0.999).item()
    peak = histogram(data.scale * data.sample(100000), limit).quantile(0.97)
    show = lambda x: histogram(data.scale * x, limit) / peak
    density, nfe, paths, likelihood = {}, {}, {}, {}
    grid = grid_of(limit)
    truth = (data.log_prob(grid / data.scale).exp() / peak).reshape(96, 96)
    for name, flow in flows.items():
        generator, span = torch.Generator().manual_seed(args.seed), flow.path.t_span
        x0 = flow.path.sample_source((args.samples, 2), generator=generator).to(args.device)
        times = [min(i / 6, span[1]) for i in range(7)]
        density[name] = [show(x) for x in odeint(flow.v, x0, times, rtol=1e-3, atol=1e-3).xs]
        fast = [odeint(flow.v, x0, span, "midpoint", steps=n // 2).x for n in (4, 8, 10, 20)]
        nfe[name] = [show(x) for x in (*fast, data.sample(args.samples))]
        xs = odeint(flow.v, x0[:200], torch.linspace(*span, 51).tolist(), "rk4", steps=50).xs
        paths[name] = [draw_paths(data.scale * xs, 1.3 * limit)]
        learned = flow.log_prob((data.shift + grid).to(args.device), rtol=1e-3, atol=1e-3)
        likelihood[name] = [(learned.cpu().exp() / peak).reshape(96, 96), truth]
    titles = ["t = 0", "1/6", "1/3", "1/2", "2/3", "5/6", "t = 1"]
    draw_grid(args.out / "density.png", density, titles)
    draw_grid(args.out / "nfe.png", nfe, ["NFE 4", "8", "10", "20", "data"])
    draw_grid(args.out / "trajectories.png", paths, ["200 trajectories"], size=480)
    titles = ["learned density", "true density"]
    draw_grid(args.out / "likelihood.png", likelihood, titles, size=288)


def draw_conditional(data, args):
    """fields.png (Figures 2, 8), paths.png (Figure 3, marginals below); returns numbers as text."""
    torch.manual_seed(args.seed)
    x1, limit, times = torch.tensor([[1.0, 0.6]]), 2.5, torch.tensor([0, 1 / 3, 2 / 3, 1])
    ot, vp, grid = OTPath(args.sigma_min), PATHS["vp"](), grid_of(limit)
    fields = {}
    for label, u in {"score, VP": vp.score, "velocity, VP": vp.u, "velocity, OT": ot.u}.items():
        fields[label] = [draw_field(u(t, grid, x1)) for t in times.clamp(max=vp.t_span[1])]
    draw_grid(args.out / "fields.png", fields, ["t = 0", "t = 1/3", "t = 2/3", "t = 1"])
    lines, panels = ["arc length / chord        mean  median"], {"conditional": [], "marginal": []}
    x0, x1 = torch.randn(2, 20_000, 2)
    paths = {"ot": ot, "vp": vp, "cosine": PATHS["cosine"](), "ve": PATHS["ve"]()}
    for name, path in paths.items():
        t = torch.linspace(*path.t_span, 101)
        conditional = torch.stack([path.psi(s.expand(len(x0)), x0, x1) for s in t])
        start = path.source_std * x0[: min(args.samples, 1000)]
        marginal = odeint(data.field(path), start, t.tolist()).xs
        for kind, xs in ("conditional", conditional), ("marginal", marginal):
            bend = straightness(xs)
            lines.append(f"{kind:12s}{name:8s}{bend.mean():10.3f}{bend.median():8.3f}")
            panels[kind].append(draw_paths(xs[:, :40], limit * (4 if name == "ve" else 1)))
    draw_grid(args.out / "paths.png", panels, ["OT", "VP", "cosine", "VE"], size=288)
    gaussian, x0 = Mixture(torch.zeros(1, 2), 1.0).field(OTPath(0.0)), torch.randn(100_000, 2)
    lines += ["", "N exact Euler steps to N(0, I) data   std"]
    for n in (1, 2, 4, 8, 16, 32):
        x = odeint(gaussian, x0, (0, 1 - 1e-5), "euler", steps=n).x
        lines.append(f"{n:2d}{x.std() / x0.std():39.2f}")
    return "\n".join(lines)


# ---- Command line --------------------------------------------------------------------------------


def parser():
    Formatter = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)

    def flag(name, default, help, **kind):
        p.add_argument("--" + name, default=default, help=f"{help} (%(default)s)", **kind)

    flag("path", ["ot"], "probability path or paths, Section 4.1", nargs="+", choices=PATHS)
    flag("objective", "velocity", "what is learned, by which weight, Table 1", choices=OBJECTIVES)
    couplings = ("independent", "ot")
    flag("coupling", "independent", "ot: minibatch assignment, needs SciPy", choices=couplings)
    flag("reflow", 0, "rounds of training again on the flow's own pairs", type=int, metavar="N")
    flag("sigma-min", 1e-4, "sigma_min of the OT path, Eq. (20)", type=float, metavar="X")
    flag("sde", None, "sample by the SDE with diffusion g too", type=float, metavar="G")
    flag("data", "checkerboard", "checkerboard, moons, 8gaussians, spirals, rings or a PNG file")
    flag("steps", 7000, "optimizer steps", type=int)
    flag("batch", 2048, "samples a step", type=int)
    flag("lr", 4e-3, "peak learning rate", type=float)
    flag("seed", 0, "seeds weights, data and noise", type=int)
    flag("samples", 50000, "points in the pictures; up to 4000 are measured", type=int)
    flag("out", Path("runs/toy"), "folder for pictures, numbers and weights", type=Path)
    flag("device", "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or mps")
    flag("ablation", False, "train " + ", ".join(ABLATION), action="store_true")
    flag("figure", None, "draw closed forms, train nothing", choices=("conditional",))
    return p


def parse_args(argv=None):
    """The settings, checked: a mistake ends with one line and exit code 2."""
    p = parser()
    args = p.parse_args(argv)
    least = {"steps": 1, "batch": 1, "samples": 2, "reflow": 0, "sde": 0.0, "lr": 1e-9, "seed": 0}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            p.error(f"--{name} must be at least {low} and finite; got {value}")
    rivals = ("path", "objective", "coupling", "reflow", "figure")
    given = [name for name in rivals if getattr(args, name) != p.get_default(name)]
    if args.ablation and given:
        p.error(f"--ablation sets {', '.join(rivals[:4])} itself: leave out --{given[0]}")
    if args.sigma_min != p.get_default("sigma_min") and "ot" not in args.path:
        p.error("--sigma-min is of the OT path: add --path ot")
    rows = ABLATION if args.ablation else {name: {"path": name} for name in args.path}
    args.rows = {name: argparse.Namespace(**{**vars(args), **row}) for name, row in rows.items()}
    for row in args.rows.values():
        try:
            check(row)
        except (ValueError, ImportError) as e:
            names = ("path", "objective", "coupling", "reflow", "sigma_min", "sde")
            given = {f"--{k.replace('_', '-')} {getattr(row, k)}": p.get_default(k) for k in names}
            given = [text for text, default in given.items() if not text.endswith(f" {default}")]
            p.error(f"{' '.join(given)}: {e}")
    try:
        torch.zeros(1, device=args.device)
        args.target = make_data(args.data)
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0]
        p.error(f"--device {args.device} cannot be used here ({why}); try --device cpu")
    except (OSError, ValueError) as e:
        p.error(f"{e}; --data takes a name or a PNG file, --out a folder that can be written")
    return args


def check(args):
    """Raises ValueError for settings that do not go together: tries loss and velocity."""
    path, x, objective = make_path(args), torch.zeros(3, 2), OBJECTIVES[args.objective]
    x0 = x[ot_coupling(x, x)] if args.coupling == "ot" else x if args.reflow else None
    cfm_loss(lambda t, x: x, path, x, x0, **objective)
    as_velocity(lambda t, x: x, path, objective.get("predict", "velocity"))(torch.zeros(3), x)
    if x0 is not None and args.sde is not None:
        raise ValueError("the SDE needs the score, which v tells only for independent pairs")


def main(argv=None):
    args = parse_args(argv)
    settings = {k: v for k, v in vars(args).items() if k not in ("target", "rows")}
    print("settings: " + "  ".join(f"{k} {v}" for k, v in settings.items()))
    if args.figure:
        text, files = draw_conditional(args.target, args), "fields.png and paths.png"
        return print(f"{text}\n\n{files} are in {args.out}")
    flows, results = {}, {}
    for name, row in args.rows.items():
        flows[name], seconds = train(name, row, args.target)
        store(flows[name], row.path, args.out / f"model_{re.sub('[, ]+', '_', name)}.pt")
        results[name] = {**measure(flows[name], args.target, row), "seconds": seconds}
    draw(flows, args.target, args)
    state = {"settings": settings, "torch": torch.__version__, "results": results}
    for file, text in {"metrics.json": json.dumps(state, indent=1, default=str),
                       "table.txt": table(results)}.items():  # fmt: skip
        write(args.out / file, lambda part: part.write_text(text, encoding="utf-8"))
    print(f"{text}\n\npictures, table.txt, metrics.json and weights are in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except SolverError as e:
        sys.exit(f"train_toy.py: {e}")
