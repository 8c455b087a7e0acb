"""Flow matching in two dimensions: trains on a toy density, draws the paper's Figure 4, prints true numbers.

    python train_toy.py --path ot            about two minutes on two CPU cores; pictures and metrics.json in runs/toy
    python train_toy.py --path ot vp         one row per path in every picture: same seed, network and budget
    python train_toy.py --data drawing.png   the dark pixels of a picture are the density
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from flow_matching import AffinePath, CosinePath, Marginal, OTPath, SolverError, VEPath, VPPath, cfm_loss, log_prob, odeint, sample

PATHS = {"ot": OTPath, "vp": VPPath, "ve": VEPath, "cosine": CosinePath}
NFES = 4, 8, 10, 20, 100
STAGES = {"euler": 1, "midpoint": 2, "rk4": 4}


# ---- Data: every set has an exact density, an exact marginal field and so an exact loss floor -------------------------


class Checkerboard:
    """Eight squares of side 1 / 0.45 around the origin, shifted and scaled: standardised = (data - shift) / scale."""

    side = 1 / 0.45

    def __init__(self):
        corners = [(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0]
        self.shift, self.scale = torch.zeros(2), math.sqrt(4 / 3) * self.side  # of unit variance then
        self.low = torch.tensor(corners, dtype=torch.float64) * self.side / self.scale  # (8, 2), standardised

    def sample(self, n, generator=None):
        """n standardised points, (n, 2)."""
        u = torch.rand(n, 2, generator=generator)
        return self.low[torch.randint(8, (n,), generator=generator)].float() + u * self.side / self.scale

    def log_prob(self, x):
        """Exact log density in nats and data units at standardised x, (n,)."""
        inside = ((x[:, None] >= self.low) & (x[:, None] < self.low + self.side / self.scale)).all(2).any(1)
        return torch.where(inside, -math.log(8 * self.side**2), -math.inf)

    def field(self, path):
        """u_t(x), Eq. (8), in closed form: square by square x1 given x_t is a product of truncated normals."""

        def u(t, x):
            t, x = t.double(), x.double()
            alpha_t, sigma_t, _, _ = path.coefficients(t[:, None, None])
            mean, std = x[:, None] / alpha_t.clamp(min=1e-4), sigma_t / alpha_t.clamp(min=1e-4)
            a, b = (self.low - mean) / std, (self.low + self.side / self.scale - mean) / std  # (n, 8, 2)
            flip = a + b > 0  # to the side where log_ndtr is accurate
            lo, hi = torch.where(flip, -b, a), torch.where(flip, -a, b)
            log_hi = torch.special.log_ndtr(hi)
            log_mass = log_hi + torch.log(-torch.expm1(torch.special.log_ndtr(lo) - log_hi))
            density = lambda z: torch.exp(-z.square() / 2 - math.log(2 * math.pi) / 2 - log_mass)
            x1 = mean + std * (density(a) - density(b))
            x1 = x1.clamp(self.low, self.low + self.side / self.scale)
            x1_mean = (log_mass.sum(2).softmax(1)[:, :, None] * x1).sum(1)
            return path.u(t, x, x1_mean).float()

        return u


class Mixture:
    """Equal Gaussians of std noise at N centres (N, 2): p_t and u_t are those of Marginal on a widened path."""

    def __init__(self, centres, noise):
        self.shift = centres.mean(0)
        self.scale = ((centres - self.shift).square().mean() + noise**2).sqrt().item()
        self.centres, self.noise = (centres - self.shift) / self.scale, noise / self.scale

    def sample(self, n, generator=None):
        """n standardised points, (n, 2)."""
        centre = self.centres[torch.randint(len(self.centres), (n,), generator=generator)]
        return centre + self.noise * torch.randn(n, 2, generator=generator)

    def _marginal(self, path):  # alpha x1 + sigma x0 = alpha c + N(0, alpha^2 noise^2 + sigma^2)
        coefficients = lambda t: path.coefficients(t)[:2]
        widened = lambda t: (coefficients(t)[0].square() * self.noise**2 + coefficients(t)[1].square()).sqrt()
        return Marginal(AffinePath(lambda t: coefficients(t)[0], widened, path.t_span), self.centres)

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
        return Mixture(4 * torch.stack([torch.cos(angle[::125] * 2), torch.sin(angle[::125] * 2)], 1), 0.3)
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


# ---- The flow --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """v(t, x): a small SiLU network on random Fourier features of x, which let it see edges, sharper towards t = 1.

    It learns what is left of the field once x is known: for Gaussian data of unit variance E[dx_t | x_t] is linear,
    and the rest, across it, has the scale (d alpha sigma - alpha d sigma) / rho, rho^2 = alpha^2 + sigma^2.
    """

    def __init__(self, path, width=64, depth=4, features=64, bandwidth=3.0):
        super().__init__()
        self.path = path
        self.register_buffer("frequencies", bandwidth * torch.randn(2, features))
        sizes = [2 + 4 * features + 10, *[width] * depth]
        hidden = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, t, x):
        t = t[:, None]
        alpha_t, sigma_t, dalpha_t, dsigma_t = self.path.coefficients(t)
        rho = (alpha_t**2 + sigma_t**2).sqrt()
        wave = math.pi * t * torch.arange(1, 5, device=x.device)
        phase = x / rho @ self.frequencies
        phase = torch.cat([phase.sin(), phase.cos()], 1)
        sharp = 0.2 / (1.05 - t) * phase  # u_t varies over sigma_t, so its slopes grow as 1 / (1 - t)
        features = [x / rho, phase, sharp, t, -torch.log(1.01 - t), wave.sin(), wave.cos()]
        across = (dalpha_t * sigma_t - alpha_t * dsigma_t) / rho * self.layers(torch.cat(features, 1))
        return (alpha_t * dalpha_t + sigma_t * dsigma_t) / rho**2 * x + across


class Flow:
    """A trained flow: v works on standardised points, sample and log_prob in data units, shift + scale * standardised."""

    def __init__(self, v, path, shift, scale):
        self.v, self.path, self.shift, self.scale = v, path, shift, scale

    def sample(self, n, **solver):
        """n samples in data units, (n, 2), by the solver of flow_matching.odeint."""
        x = sample(self.v, self.path, (n, 2), device=self.shift.device, **solver).x
        return self.shift + self.scale * x

    def log_prob(self, x, **solver):
        """log density in nats at x (n, 2) in data units, (n,)."""
        log_p = log_prob(self.v, (x - self.shift) / self.scale, self.path, **solver).log_prob
        return log_p - 2 * math.log(self.scale)


def load(file):
    """The Flow that train_toy.py wrote to file (model_<path>.pt), on the CPU."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != "flow-matching-toy-1":
        raise ValueError(f"{file} is not a checkpoint of train_toy.py")
    path = PATHS[state["path"]](**state["path_options"])
    net = Net(path)
    net.load_state_dict(state["net"])
    return Flow(net.requires_grad_(False), path, state["shift"], state["scale"])


def write(file, save):
    """save(temporary name), then move it over file in one step, so that file is always whole."""
    part = file.with_name(file.name + ".part")
    save(part)
    os.replace(part, file)


def train(name, data, args):
    """The Flow of that path after args.steps steps of Adam with cosine decay, and the seconds it took."""
    torch.manual_seed(args.seed)
    path = PATHS[name]()
    net = Net(path).to(args.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.99))
    decay = lambda i: min(1, (i + 1) / 200) * (1 + math.cos(math.pi * i / args.steps)) / 2
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    start, shown, mean = time.time(), 0.0, None
    for step in range(1, args.steps + 1):
        loss = cfm_loss(net, path, data.sample(args.batch).to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean = loss.detach() if mean is None else mean.lerp(loss.detach(), 0.01)
        if time.time() - shown > 0.5 or step == args.steps:
            if not mean.isfinite():
                sys.exit(f"{name}: the loss is not finite at step {step}; lower --lr, which is {args.lr}")
            shown, rate = time.time(), step / (time.time() - start)
            line = f"\r{name}: step {step}/{args.steps}  loss {mean:.4f}  {rate:.0f} steps/s  {(args.steps - step) / rate:.0f} s left  "
            print(line, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return Flow(net.requires_grad_(False), path, data.shift.to(args.device), data.scale), time.time() - start


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, from samples (n, d); 0 for equal laws."""
    n = len(x)
    within = sum(torch.cdist(z, z).sum().item() for z in (x, y)) / (n * (n - 1))
    return 2 * torch.cdist(x, y).mean().item() - within


def measure(flow, data, args):
    """Numbers of a flow against the truth, as a dict; held-out points and noise depend on the seed only."""
    seed, device, n = args.seed, args.device, min(args.samples, 4000)
    generator = torch.Generator().manual_seed(seed + 1)
    x1, many = data.sample(n, generator), data.sample(16 * n, generator)
    nll = -flow.log_prob((data.shift + data.scale * x1).to(device), rtol=1e-6, atol=1e-6).cpu()
    entropy = -data.log_prob(many).mean().item()  # of the same law: exact for the checkerboard
    x0, u = torch.randn(many.shape, generator=generator), torch.rand(len(many), generator=generator)
    t = flow.path.t_span[0] + (flow.path.t_span[1] - flow.path.t_span[0]) * u
    x_t, dx_t = flow.path.psi_dpsi(t, x0, many)
    field = data.field(flow.path)
    exact = torch.cat([field(t, x) for t, x in zip(t.split(4096), x_t.split(4096))])
    v_t = flow.v(t.to(device), x_t.to(device)).cpu()
    out = {"nll": nll.mean().item(), "nll_se": (nll.std() / math.sqrt(n)).item(), "entropy": entropy}
    out |= {"gap": out["nll"] - entropy, "loss": (v_t - dx_t).square().mean().item()}
    out |= {"floor": (exact - dx_t).square().mean().item(), "excess": (v_t - exact).square().mean().item()}
    solution = sample(flow.v, flow.path, (n, 2), device=device, generator=torch.Generator(device).manual_seed(seed))
    out |= {"nfe_mean": solution.nfe.double().mean().item(), "nfe_max": solution.nfe.max().item()}
    truth = data.scale * data.sample(n, generator)
    noise = flow.path.sample_source((n, 2), generator=generator).to(device)
    out["energy"] = {"dopri5": energy_distance(data.scale * solution.x.cpu(), truth)}
    for method, stages in STAGES.items():
        for nfe in NFES:
            if nfe % stages == 0:
                x = odeint(flow.v, noise, flow.path.t_span, method, steps=nfe // stages).x
                out["energy"][f"{method} {nfe}"] = energy_distance(data.scale * x.cpu(), truth)
    return out


def table(results):
    """The numbers of every row, a dict of dicts, as one table of text."""
    lines = [f"{'':10s}{'NLL':>16s}{'entropy':>9s}{'gap':>8s}{'loss':>9s}{'floor':>9s}{'excess':>8s}{'NFE':>7s}{'max':>5s}{'train s':>9s}"]
    for name, r in results.items():
        lines.append(f"{name:10s}{r['nll']:9.4f} ±{r['nll_se']:.4f}{r['entropy']:9.4f}{r['gap']:8.4f}{r['loss']:9.4f}"
                     f"{r['floor']:9.4f}{r['excess']:8.4f}{r['nfe_mean']:7.1f}{r['nfe_max']:5d}{r['seconds']:9.1f}")
    lines += ["", f"energy distance of samples to data at NFE{'':11s}" + "".join(f"{nfe:>9d}" for nfe in NFES)]
    for name, r in results.items():
        for method in STAGES:
            cells = [r["energy"].get(f"{method} {nfe}") for nfe in NFES]
            lines.append(f"{name + ' ' + method:53s}" + "".join(f"{'' if c is None else f'{c:.4f}':>9s}" for c in cells))
        lines.append(f"{name + ' dopri5':53s}{r['energy']['dopri5']:9.4f}  (NFE {r['nfe_mean']:.0f})")
    return "\n".join(lines)


# ---- Pictures --------------------------------------------------------------------------------------------------------


def colour(z):
    """uint8 RGB (..., 3) of z in [0, 1]: dark blue through green to yellow."""
    stops = torch.tensor([[22, 14, 52], [56, 60, 132], [33, 130, 142], [76, 194, 108], [250, 232, 60]]).float()
    z = z.clamp(0, 1) * (len(stops) - 1)
    i = z.long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[i], stops[i + 1], (z - i)[..., None]).byte()


def histogram(x, limit, bins=96):
    """Density of points x (n, 2) on the square [-limit, limit]^2 as (bins, bins), top row first."""
    i = ((x.cpu() + limit) / (2 * limit) * bins).floor().long()
    i = i[((i >= 0) & (i < bins)).all(1)]
    counts = torch.bincount((bins - 1 - i[:, 1]) * bins + i[:, 0], minlength=bins**2).reshape(bins, bins)
    return counts / len(x) * (bins / (2 * limit)) ** 2


def draw_grid(file, rows, titles, size=192):
    """A labelled picture of rows, {label: [panel, ...]}; a panel is a density (h, w) or a finished Image."""
    font = ImageFont.load_default(size=15)
    canvas = Image.new("RGB", (78 + len(titles) * (size + 6), 28 + len(rows) * (size + 6)), "white")
    pen = ImageDraw.Draw(canvas)
    for j, title in enumerate(titles):
        pen.text((78 + j * (size + 6) + size / 2, 14), title, "black", font, anchor="mm")
    for i, (label, panels) in enumerate(rows.items()):
        pen.text((72, 28 + i * (size + 6) + size / 2), label, "black", font, anchor="rm")
        for j, panel in enumerate(panels):
            if isinstance(panel, torch.Tensor):
                panel = Image.fromarray(colour(panel).numpy())
            method = Image.Resampling.NEAREST if panel.width < size else Image.Resampling.LANCZOS
            canvas.paste(panel.resize((size, size), method), (78 + j * (size + 6), 28 + i * (size + 6)))
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


def draw(flows, data, args):
    """density.png and nfe.png (the paper's Figure 4), trajectories.png and likelihood.png, a row per flow."""
    limit = 1.15 * (data.scale * data.sample(20000)).abs().quantile(0.999).item()
    peak = histogram(data.scale * data.sample(100000), limit).quantile(0.97)
    show = lambda x: histogram(data.scale * x, limit) / peak
    times = [0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1]
    density, nfe, paths, likelihood = {}, {}, {}, {}
    axis = (torch.arange(96) + 0.5) / 96 * 2 * limit - limit
    grid = torch.stack(torch.meshgrid(axis, axis.flip(0), indexing="xy"), -1).reshape(-1, 2)
    truth = (data.log_prob(grid.to(torch.float32) / data.scale).exp() / peak).reshape(96, 96)
    for name, flow in flows.items():
        generator = torch.Generator().manual_seed(args.seed)
        x0 = flow.path.sample_source((args.samples, 2), generator=generator).to(args.device)
        t = [min(s, flow.path.t_span[1]) for s in times]
        density[name] = [show(x) for x in odeint(flow.v, x0, t, rtol=1e-3, atol=1e-3).xs]
        nfe[name] = [show(odeint(flow.v, x0, flow.path.t_span, "midpoint", steps=n // 2).x) for n in (4, 8, 10, 20)] + [show(data.sample(args.samples))]
        t = torch.linspace(*flow.path.t_span, 51).tolist()
        xs = data.scale * odeint(flow.v, x0[:200], t, "rk4", steps=50).xs
        paths[name] = [draw_paths(xs, 1.3 * limit)]
        learned = flow.log_prob((data.shift + grid).to(args.device), rtol=1e-3, atol=1e-3).cpu().exp()
        likelihood[name] = [(learned / peak).reshape(96, 96), truth]
    draw_grid(args.out / "density.png", density, ["t = 0", "1/6", "1/3", "1/2", "2/3", "5/6", "t = 1"])
    draw_grid(args.out / "nfe.png", nfe, ["NFE 4", "8", "10", "20", "data"])
    draw_grid(args.out / "trajectories.png", paths, ["200 trajectories"], size=480)
    draw_grid(args.out / "likelihood.png", likelihood, ["learned density", "true density"], size=288)


def parse_args(argv=None):
    """The settings, checked: a mistake ends with one line and exit code 2."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--path", nargs="+", choices=sorted(PATHS), default=["ot"], help="probability path or paths (ot)")
    p.add_argument("--data", default="checkerboard", help="checkerboard, moons, 8gaussians, spirals, rings or a PNG file (checkerboard)")
    p.add_argument("--steps", type=int, default=7000, help="optimizer steps (%(default)s)")
    p.add_argument("--batch", type=int, default=2048, help="samples a step (%(default)s)")
    p.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, data and noise (%(default)s)")
    p.add_argument("--samples", type=int, default=50000, help="points in the pictures; up to 4000 are measured (%(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder for pictures, numbers and weights (%(default)s)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps (%(default)s)")
    args = p.parse_args(argv)
    for flag in ("steps", "batch", "samples"):
        if getattr(args, flag) < 1:
            p.error(f"--{flag} must be at least 1; got {getattr(args, flag)}")
    if not 0 < args.lr < math.inf:
        p.error(f"--lr must be a positive number; got {args.lr}")
    try:
        torch.zeros(1, device=args.device)
        args.target = make_data(args.data)
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError) as e:
        p.error(f"--device {args.device} cannot be used here ({str(e).splitlines()[0]}); try --device cpu")
    except (OSError, ValueError) as e:
        p.error(f"{e}; --data takes a name or a PNG file, --out a folder that can be written")
    return args


def main(argv=None):
    args = parse_args(argv)
    print("settings: " + "  ".join(f"{k} {v}" for k, v in vars(args).items() if k != "target"))
    flows, results = {}, {}
    for name in dict.fromkeys(args.path):
        flow, seconds = train(name, args.target, args)
        flows[name], results[name] = flow, {**measure(flow, args.target, args), "seconds": seconds}
        state = {"format": "flow-matching-toy-1", "path": name, "path_options": asdict(flow.path)}
        state |= {"net": flow.v.state_dict(), "shift": flow.shift, "scale": flow.scale}
        write(args.out / f"model_{name}.pt", lambda part: torch.save(state, part))
    draw(flows, args.target, args)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "target"}
    text = json.dumps({"settings": settings, "torch": torch.__version__, "results": results}, indent=1)
    write(args.out / "metrics.json", lambda part: part.write_text(text))
    print(table(results) + f"\n\npictures, metrics.json and weights are in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, SolverError) as e:
        sys.exit(f"train_toy.py: {e}")
