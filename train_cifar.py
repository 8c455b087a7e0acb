# SPDX-License-Identifier: MIT
"""Train, resume, sample and evaluate image models, Section 6 of Lipman et al., arXiv:2210.02747v2.

    python train_cifar.py                                   CIFAR-10, modern recipe; the same line again resumes
    torchrun --nproc_per_node=8 train_cifar.py              the same on 8 GPUs, but for dropout: --batch is global
    python train_cifar.py --sample 50000                    numbered PNG files from the averaged weights
    python train_cifar.py --bpd 1000                        bits per dimension of held-out images, Appendix C

Without a GPU shrink network, images and run: --data FOLDER --size 16 --channels 48 --attention 8 --batch 32
--warmup 100 --steps 3000 --every 50,500,500 --solver euler:20. Table 3: --recipe paper is CIFAR-10; ImageNet-32 is
--recipe paper --data FOLDER --blocks 3 --attention 16,8 --batch 1024 --lr 1e-4 --warmup 20000 --steps 250000;
ImageNet-64 is --recipe paper --data FOLDER --size 64 --channels 192 --channel-mult 1,2,3,4 --blocks 3
--attention 32,16,8 --batch 2048 --lr 1e-4 --warmup 0 --decay none --steps 157000 --precision bf16.
"""
import contextlib, datetime, errno, functools, hashlib, json, math, os, signal, sys, time  # noqa: E401
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from argparse import Namespace, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

try:
    import resource
except ImportError:  # Windows
    resource = None

from flow_matching import METHODS, OBJECTIVES, PATHS, SolverError, UNet
from flow_matching import as_velocity, bits_per_dim, cfm_loss, guided, odeint, ot_coupling

MODERN = dict(channels=128, dropout=0.1, lr=2e-4, warmup=5000, decay="none", batch=128, steps=400_000, clip=1.0,
              ema=0.9999, flip=True)  # fmt: skip  # Departure: the recipe of Tong et al. (2024), smaller and better
PAPER = dict(channels=256, dropout=0.0, lr=5e-4, warmup=45_000, decay="linear", batch=256, steps=391_000, clip=0.0,
             ema=0.0, flip=False)  # fmt: skip  # Table 3
EVALUATION = {"sample", "bpd", "K", "probes", "guidance", "solver"}
FREE = EVALUATION | {"data", "test", "device", "compile", "accumulate", "every"}  # may change when a run goes on
FORMAT, VERSION = "train_cifar checkpoint", 1


def refuse(message, code=2):
    """Ends the program with one line; 2: the command line can put it right (all ranks see it), 1: something failed."""
    if code == 1 or os.environ.get("RANK", "0") == "0":
        print(f"train_cifar.py: error: {message}", file=sys.stderr)
    raise SystemExit(code)


# ---- Settings --------------------------------------------------------------------------------------------------------


def least(low, below=math.inf, kind=int):
    """An argparse type: a number in [low, below)."""

    def number(text):
        if not low <= kind(text) < below:
            raise ArgumentTypeError(f"must be at least {low} and below {below}; got {text}")
        return kind(text)
    return number  # fmt: skip


def ints(text):
    return tuple(int(n) for n in text.split(","))


def solver(text):
    """dopri5:TOLERANCE or METHOD:NFE as the keywords of odeint."""
    method, _, value = text.partition(":")
    with contextlib.suppress(ValueError, KeyError):
        if method == "dopri5" and 0 < float(value) < 1:
            return dict(method=method, rtol=float(value), atol=float(value))
        if method != "dopri5" and int(value) > 0 and int(value) % len(METHODS[method].C) == 0:
            return dict(method=method, steps=int(value) // len(METHODS[method].C))
    raise ArgumentTypeError(f"must be dopri5:TOLERANCE, euler:NFE, midpoint:NFE (by 2) or rk4:NFE (by 4); got {text}")


def parser():
    Formatter = type("Formatter", (ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter), {})
    p = ArgumentParser("train_cifar.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    p.error, recipe = refuse, " ".join(f"{k}={v}" for k, v in PAPER.items())
    flag = lambda name, default, help, **kind: p.add_argument("--" + name, default=default, help=help, **kind)
    flag("out", "runs/cifar", "folder of the run: checkpoint.pt, log.jsonl, samples/; a run found there goes on")
    flag("data", "cifar10", "cifar10 (kept in ./data) or a folder of png, jpg, webp images of any size, nested or not")
    flag("test", None, "folder of held-out images; CIFAR-10 has its own")
    flag("size", 32, "pixels: images are cropped to the central square and box-averaged to this", type=least(1))
    flag("conditional", False, "learn from labels: CIFAR-10's, or the first level of folders", action="store_true")
    flag("superres", None, "learn images given themselves at 1/N of the size, Section 6.4", type=least(2), metavar="N")
    flag("recipe", "modern", f"whose defaults; paper: {recipe}", choices=("modern", "paper"))
    flag("path", "ot", "path, Section 4.1", choices=PATHS)
    flag("objective", "velocity", "what is learned, by which weight, Table 1", choices=OBJECTIVES)
    flag("coupling", "independent", "of noise and images; ot: minibatch optimal transport, by SciPy",
         choices=("independent", "ot"))  # fmt: skip
    flag("channels", MODERN["channels"], "of the UNet's first level", type=least(1))
    flag("channel-mult", (1, 2, 2, 2), "width of every level, times channels", type=ints)
    flag("blocks", 2, "residual blocks a level", type=least(1))
    flag("attention", (16,), "image sizes with attention, in pixels", type=ints)
    flag("head-channels", 64, "channels of an attention head", type=least(1))
    flag("dropout", MODERN["dropout"], "inside residual blocks", type=least(0, 1, float))
    flag("init", None, "start from the weights of adm:FILE (torchcfm) or of a checkpoint.pt", metavar="FILE")
    flag("lr", MODERN["lr"], "peak rate of Adam", type=least(1e-8, 1, float))
    flag("warmup", MODERN["warmup"], "steps of linear rise to it", type=least(0))
    flag("decay", MODERN["decay"], "linear: down to 1e-8 at the last step", choices=("none", "linear"))
    flag("batch", MODERN["batch"], "images a step, on all ranks together; evaluated at a time, on each", type=least(1))
    flag("accumulate", 1, "pieces that a batch is worked off in, to save memory", type=least(1))
    flag("steps", MODERN["steps"], "optimizer steps", type=least(1))
    flag("clip", MODERN["clip"], "largest norm of the gradient; 0: any", type=least(0, kind=float))
    flag("ema", MODERN["ema"], "decay of the averaged weights; 0: no average", type=least(0, 1, float))
    flag("flip", MODERN["flip"], "mirror half of the images", action=BooleanOptionalAction)
    flag("precision", "fp32", "of training; the rest is fp32 (new GPUs convolve in TF32)", choices=("fp32", "bf16"))
    flag("compile", False, "use torch.compile", action="store_true")
    flag("seed", 0, "of weights, data order, noise and samples", type=least(0))
    flag("device", None, "the first that is there", choices=("cuda", "mps", "cpu"))
    flag("every", (100, 1000, 5000), "steps between log lines, checkpoints and pictures", type=ints, metavar="L,C,P")
    flag("solver", "dopri5:1e-5", "or euler:NFE, midpoint:NFE, rk4:NFE; NFE counts network calls, 1, 2, 4 a step",
         type=lambda text: solver(text) and text)  # fmt: skip
    flag("guidance", 1.0, "w in v_none + w (v_label - v_none), two calls each; 1: none", type=least(0, kind=float))
    flag("sample", None, "write N samples and stop", type=least(1), metavar="N")
    flag("bpd", None, "print the bits per dimension of N held-out images and stop", type=least(1), metavar="N")
    flag("K", 1, "draws of the dequantisation noise in --bpd, Eq. (47)", type=least(1))
    flag("probes", 1, "Hutchinson probes in --bpd, Eq. (34); 0: exact trace", type=least(0))
    return p


def settle(argv, world):
    """Settings and checkpoint: what is given comes before the run in --out, that before recipe and defaults."""
    p = parser()
    defaults = vars(p.parse_args([]))
    given = vars(p.parse_args(argv, Namespace(**dict.fromkeys(defaults))))
    given = {k: v for k, v in given.items() if v is not None}
    given |= {k: os.path.abspath(given[k]) for k in ("data", "test") if given.get(k, "cifar10") != "cifar10"}
    out, evaluating = Path(given.get("out", defaults["out"])), "sample" in given or "bpd" in given
    state = load(out / "checkpoint.pt", out / "checkpoint.prev.pt")
    config = state["config"] if state else {}
    free = EVALUATION | {"data", "test", "device", "batch", "seed"} if evaluating else FREE
    free = free | {"steps"} if config.get("decay") == "none" and not evaluating else free
    for k, v in given.items():
        if v != config.get(k, v) and k not in free:
            refuse(f"--{k.replace('_', '-')} {v} is not what the run in {out} has, {config[k]}: "
                   "leave it out or name another --out")  # fmt: skip
    stored = {k: v for k, v in config.items() if not (evaluating and k in EVALUATION)}
    recipe = PAPER if given.get("recipe") == "paper" else MODERN
    s = Namespace(**{**defaults, **recipe, **stored, **given})
    check(s, given, state, evaluating, world)
    return s, state


def check(s, given, state, evaluating, world):
    """Refuses settings that do not go together, before anything is written."""
    held_out = s.test or s.data == "cifar10"
    for wrong, message in (
        (Path(s.out).exists() and not Path(s.out).is_dir(), f"--out {s.out} is a file: name a folder"),
        (len(s.every) != 3 or min(s.every) < 1, f"--every must be three whole numbers from 1 on; got {s.every}"),
        (s.sample and s.bpd, "--sample and --bpd are two commands: give one of them"),
        (not s.bpd and {"K", "probes"} & given.keys(), "--K and --probes go with --bpd N: add it"),
        (s.bpd and s.guidance != 1, "--guidance changes the samples, not the likelihood: leave it out of --bpd"),
        (s.guidance != 1 and not s.conditional, "--guidance needs labels: train with --conditional"),
        (s.data == "cifar10" and s.size != 32, f"--size {s.size} is not CIFAR-10's 32: give --data FOLDER"),
        (s.superres and s.size % s.superres, f"--superres {s.superres} must divide --size {s.size}"),
        (s.coupling == "ot" and (s.conditional or s.superres),
         "--coupling ot pairs across labels, given which noise is not N(0, I): leave out --conditional, --superres"),
        (s.decay == "linear" and s.warmup >= s.steps, f"--warmup {s.warmup} must be below --steps {s.steps} to decay"),
        (not evaluating and s.batch % (world * s.accumulate),
         f"--batch {s.batch} must be a multiple of {world} ranks x --accumulate {s.accumulate}"),
        (evaluating and not (state or s.init), f"--out {s.out} holds no checkpoint.pt: train first or give --init"),
        ((s.bpd or s.sample and s.superres) and not held_out, "--test FOLDER must give the held-out images for this"),
        (s.device == "cuda" and not torch.cuda.is_available(), "--device cuda: torch finds none; leave it out"),
        (s.device == "mps" and not torch.backends.mps.is_available(), "--device mps: torch finds none; leave it out"),
        (state and not evaluating and state["step"] >= s.steps,
         f"--steps {s.steps} are done in {s.out}: name another --out, take --sample N or --bpd N, or raise them"),
    ):  # fmt: skip
        if wrong:
            refuse(message)
    path, x, objective = PATHS[s.path](), torch.zeros(2, 1), OBJECTIVES[s.objective]
    try:  # loss and velocity say themselves what does not go together
        x0 = x[ot_coupling(x, x)] if s.coupling == "ot" and not evaluating else None
        cfm_loss(lambda t, x: x, path, x, x0, **objective)
        velocity(s, lambda t, x: x, path)(torch.zeros(2), x)
    except (ValueError, ImportError) as e:
        refuse(f"--path {s.path} --objective {s.objective} --coupling {s.coupling}: {e}")


def velocity(s, net, path):
    """The field of a network trained for --objective."""
    return as_velocity(net, path, OBJECTIVES[s.objective].get("predict", "velocity"))


# ---- Files and images ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(file, keep=None):
    """A file to write that takes the place of `file` once it is complete and on disk; the old one stays as `keep`."""
    part = file.with_name(file.name + ".part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep and file.exists():
            os.replace(file, keep)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def read_square(file, size):
    """The central square of an image, box-averaged to size x size, as RGB bytes."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
        return ImageOps.fit(image, (size, size), Image.Resampling.BOX).tobytes()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        refuse(f"{file} cannot be read as an image ({e}): repair it or take it away")


def read_folder(folder, split, size, out, build):
    """A folder's images, memory-mapped from a cache that is made anew when the folder changes, and their subfolders."""
    walk, kinds = os.walk(folder, followlinks=True), (".png", ".jpg", ".jpeg", ".webp")
    names = [os.path.join(root, name) for root, _, files in walk for name in files if name.lower().endswith(kinds)]
    names = sorted(os.path.relpath(name, folder) for name in names)
    if not names:
        refuse(f"--{split} must be a folder with png, jpg or webp images; {folder} has none")
    stats = [os.stat(os.path.join(folder, name)) for name in names]
    fingerprint = repr((size, names, [(stat.st_size, stat.st_mtime_ns) for stat in stats])).encode()
    file, shape = out / f"{split}-{hashlib.sha256(fingerprint).hexdigest()[:16]}.u8", (len(names), size, size, 3)
    if build and not (file.exists() and file.stat().st_size == math.prod(shape)):
        print(f"reading {len(names)} images from {folder}")
        with replacing(file) as f, ThreadPoolExecutor() as pool:
            for i in range(0, len(names), 1024):
                block = [os.path.join(folder, name) for name in names[i : i + 1024]]
                f.writelines(pool.map(read_square, block, [size] * len(block)))
        for old in set(out.glob(f"{split}-*.u8")) - {file}:
            old.unlink()
    pixels = torch.from_file(str(file), size=math.prod(shape), dtype=torch.uint8).reshape(shape)
    return pixels, [name.split(os.sep)[0] if os.sep in name else "" for name in names]


def load_images(s, split):
    """Pixels (N, S, S, 3) uint8 and labels (N,) of the "data" or "test" images, which may be None."""
    source = getattr(s, split) or (s.data if s.data == "cifar10" else None)
    if source is None:
        return None
    if s.rank:
        dist.barrier()  # the first rank downloads them, or makes the cache
    if source == "cifar10":
        from torchvision.datasets import CIFAR10

        try:
            cifar = CIFAR10("data", train=split == "data", download=True)
        except (OSError, RuntimeError) as e:
            refuse(f"--data cifar10: {e}; put cifar-10-python.tar.gz into ./data, or give --data FOLDER", 1)
        pixels, names = torch.from_numpy(cifar.data), [cifar.classes[label] for label in cifar.targets]
    else:
        pixels, names = read_folder(source, split, s.size, Path(s.out), s.rank == 0)
    if s.world > 1 and s.rank == 0:
        dist.barrier()
    if s.device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info()[0] / 4:
        pixels = pixels.to(s.device)
    if not s.conditional:
        return pixels, torch.zeros(len(names), dtype=torch.int64)
    s.classes = s.classes or sorted(set(names))
    if len(s.classes) < 2 or not set(names) <= set(s.classes):
        refuse(f"--conditional takes the folders in --data, two or more, as classes, and no others in --test; {source} "
               f"has {sorted(set(names))}")  # fmt: skip
    return pixels, torch.tensor([s.classes.index(name) for name in names])


def rows(s, images, index):
    """Pixels (B, S, S, 3) and labels (B,) of the images at index, on the device."""
    picked = images[0][index.to(images[0].device)], images[1][index]
    if s.device.type == "cuda":
        picked = [x if x.is_cuda else x.pin_memory() for x in picked]
    return [x.to(s.device, non_blocking=True) for x in picked]


def conditions(s, pixels, labels):
    """What the network gets beside t and x: y (B,) and the enlarged low resolution of 8 bits, cond (B, 3, S, S)."""
    given = {"y": labels} if s.conditional else {}
    if s.superres:
        low = F.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), s.superres).round()
        given["cond"] = (F.interpolate(low, scale_factor=s.superres, mode="bicubic") + 0.5) / 128 - 1
    return given


def to_pixels(x):
    """(B, 3, S, S) -> (B, S, S, 3) uint8: floor(128 (x + 1)), cut to 0..255, which inverts Eq. (36) and its noise."""
    return ((x.permute(0, 2, 3, 1) + 1) * 128).clamp(0, 255).to(torch.uint8).cpu()


# ---- Training --------------------------------------------------------------------------------------------------------


def seeded(device, *key):
    """A generator that is a function of the key; hashed, as the CPU's looks at the low 32 bits of a seed alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


@functools.lru_cache(maxsize=1)
def order(seed, epoch, n):
    return torch.randperm(n, generator=seeded("cpu", seed, "epoch", epoch))


def draw(s, images, path, step):
    """This rank's rows of a step's batch, as keywords of cfm_loss.

    All is drawn for the whole batch, alike on every rank, from (--seed, step): a run that was interrupted goes on as if
    it had not been, and the number of ranks makes no difference.
    """
    B, S, mine, g = s.batch, s.size, slice(s.rank, None, s.world), seeded(s.device, s.seed, "step", step)
    rand = lambda *shape: torch.rand(shape, generator=g, device=s.device)
    u = (rand(1) + torch.arange(B, device=s.device) / B) % 1  # stratified over the batch, as in cfm_loss
    x0 = torch.randn((B, 3, S, S), generator=g, device=s.device)
    dither, flip, hide = rand(B, S, S, 3), rand(B) < 0.5, rand(B) < 0.1  # a tenth learns v_none, for --guidance
    t, epoch, i = path.t_span[0] + (path.t_span[1] - path.t_span[0]) * u, *divmod(step, len(images[0]) // B)
    index, coupled = order(s.seed, epoch, len(images[0]))[i * B : (i + 1) * B], s.coupling == "ot"
    if not coupled:  # else every rank needs the whole batch
        index, x0, t, dither, flip, hide = (x[mine] for x in (index, x0, t, dither, flip, hide))
    pixels, labels = rows(s, images, index)
    if s.flip:
        pixels = torch.where(flip[:, None, None, None], pixels.flip(2), pixels)
    # Eq. (36) with its noise, so that --bpd measures the density that is trained; the paper does not say what it did.
    x1 = ((pixels + dither) / 128 - 1).permute(0, 3, 1, 2)
    batch = dict(x1=x1, t=t, **conditions(s, pixels, labels.where(~hide, len(s.classes or ()))))
    if not coupled:
        return dict(batch, noise=x0)
    return {name: x[mine] for name, x in dict(batch, x0=x0[ot_coupling(x0, x1)]).items()}


def rate(s, step):
    """Rate of Adam, App. E: linear from 1e-8 to --lr, then constant, or linear down to 1e-8 at the last step."""
    rise = (step + 1) / max(1, s.warmup)
    fall = (s.steps - 1 - step) / (s.steps - max(1, s.warmup)) if s.decay == "linear" else 1
    return 1e-8 + (s.lr - 1e-8) * min(1, rise, fall)


def averaged(net, decay):
    """Average of the weights: a copy at the first update, then of decay min(decay, (1 + n) / (10 + n)) at the n-th."""

    def update(average, weights, _):
        n = int(ema.n_averaged)  # the third argument is this on the GPU, and would have to be waited for
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(average, weights, n)
    ema = AveragedModel(net, multi_avg_fn=update).eval()  # fmt: skip
    return ema


def build(s, state):
    """The network of the checkpoint, else a new one with weights from --init or --seed."""
    torch.manual_seed(s.seed)
    config = {k: getattr(s, k) for k in ("channels", "channel_mult", "blocks", "attention", "head_channels", "dropout")}
    config |= dict(image_size=s.size, num_classes=len(s.classes or ()) or None, cond_channels=3 if s.superres else 0)
    try:
        if state or not s.init:
            return UNet(**(state["network"] if state else config)).to(s.device)
        if s.init.startswith("adm:"):
            return UNet.from_adm(torch.load(s.init[4:], map_location="cpu", weights_only=True), **config).to(s.device)
        init = load(Path(s.init)) or refuse(f"--init {s.init} does not exist: name adm:FILE or a checkpoint.pt")
        net = UNet(**config, time_scale=init["network"]["time_scale"])
        net.load_state_dict(init["ema"])
        return net.to(s.device)
    except Exception as e:  # a ValueError of the UNet, or whatever torch says to a file that does not fit
        if not (s.init or isinstance(e, ValueError)):
            raise
        rule = str(e).splitlines()[0]
        if s.init:
            refuse(f"--init {s.init}: {rule}; name another file, or give the --channels, --blocks, ..., --size it has")
        refuse("--" + rule.replace("_", "-").replace("image-size", "size"))


def load(*files):
    """The first of the files that is a complete checkpoint; None if there are no files. Those passed over are named."""
    files = [file for file in files if file.exists()]
    for file in files:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            if (state["format"], state["version"]) == (FORMAT, VERSION):
                return {**state, "file": file}
            wrong = f"is a {state['format']} of version {state['version']}, not {VERSION}"
        except (KeyError, TypeError, IndexError):
            wrong = "is no checkpoint of train_cifar.py"
        except Exception as e:  # zip, pickle, end of file: torch raises what it meets
            wrong = f"is cut short, or no file of torch ({type(e).__name__})"
        print(f"train_cifar.py: {file} {wrong}: passed over", file=sys.stderr)
    if files:
        refuse(f"{files[0]} is not usable: move it away, or name another --out or --init")


def save(s, step, net, ema, optimizer, sums, log):
    """Writes checkpoint.pt. Rate, data order and random numbers are functions of the settings and the step in it."""
    if s.rank:
        return
    config = {k: v for k, v in vars(s).items() if k not in ("out", "device", "rank", "world", "sample", "bpd")}
    weights = dict(net=net.state_dict(), ema=ema.module.state_dict(), optimizer=optimizer.state_dict())
    state = dict(format=FORMAT, version=VERSION, step=step, config=config, network=net.config, **weights, sums=sums,
                 log_bytes=log.tell())  # fmt: skip
    try:
        with replacing(Path(s.out, "checkpoint.pt"), keep=Path(s.out, "checkpoint.prev.pt")) as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as e:  # a full disk is an OSError, sometimes behind a RuntimeError of torch
        cause = e if isinstance(e, OSError) else e.__context__ or e
        refuse(f"step {step} cannot be saved in {s.out} ({cause}); the one before stands: make room and start again", 1)


def resume(s, state, net, ema, optimizer):
    """Puts weights, averages and moments of the checkpoint in place; returns its step and what is not yet logged."""
    net.load_state_dict(state["net"])
    ema.module.load_state_dict(state["ema"])
    ema.n_averaged.fill_(state["step"])
    optimizer.load_state_dict(state["optimizer"])
    unusable = Path(s.out, "checkpoint.pt")
    if s.rank == 0 and state["file"] != unusable and unusable.exists():
        os.replace(unusable, unusable.with_suffix(".unusable"))  # lest the next save keeps it instead of the good one
    return state["step"], state["sums"]


def backward(s, model, v, path, batch):
    """Leaves the gradient of the mean loss in the weights; returns sums and counts of the loss in ten t-bins, (20,)."""
    bins = torch.zeros(2, 10, device=s.device)
    for m in range(s.accumulate):
        part = {name: x[m :: s.accumulate] for name, x in batch.items()}
        with model.no_sync() if s.world > 1 and m < s.accumulate - 1 else contextlib.nullcontext():
            with torch.autocast(s.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
                loss = cfm_loss(v, path, reduction="none", **OBJECTIVES[s.objective], **part)
            (loss.mean() / s.accumulate).backward()
        bins.index_add_(1, (10 * part["t"]).long().clamp(max=9), torch.stack([loss.detach(), torch.ones_like(loss)]))
    return bins.flatten()


def train(s, state):
    images, held_out = load_images(s, "data"), load_images(s, "test")
    if len(images[0]) < s.batch:
        refuse(f"--batch {s.batch} is more than the {len(images[0])} images of --data {s.data}: lower it or add images")
    path, net = PATHS[s.path](), build(s, state)
    ema, optimizer = averaged(net, s.ema), torch.optim.Adam(net.parameters(), lr=s.lr, fused=True)
    step, sums = resume(s, state, net, ema, optimizer) if state else (0, [0.0] * 21)
    model = DistributedDataParallel(net) if s.world > 1 else net
    v = torch.compile(model) if s.compile else model
    log, caught, stop, began = start(s, state, step, net, images), catch_signals(), False, (time.perf_counter(), step)
    with log or contextlib.nullcontext():
        while step < s.steps and not stop:
            batch = draw(s, images, path, step)
            torch.manual_seed(seeded("cpu", s.seed, "dropout", step, s.rank).initial_seed())
            optimizer.param_groups[0]["lr"] = rate(s, step)
            optimizer.zero_grad()
            stats = torch.cat([backward(s, model, v, path, batch), torch.tensor([len(caught)], device=s.device)])
            if s.world > 1:
                dist.all_reduce(stats)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), s.clip or math.inf)
            *bins, stop, norm = torch.cat([stats, norm[None]]).tolist()  # the one wait for the GPU in a step
            if not math.isfinite(sum(bins) + norm):
                save(s, step, net, ema, optimizer, sums, log)
                refuse(f"step {step}: loss {sum(bins[:10]) / s.batch}, gradient norm {norm}: not taken, weights as "
                       f"before. --lr {s.lr} may be too high: lower it, --init {s.out}/checkpoint.pt and another --out",
                       1)  # fmt: skip
            optimizer.step()
            ema.update_parameters(net)
            step, sums = step + 1, [a + b for a, b in zip(sums, [*bins, norm])]
            stop = stop and step < s.steps  # at the last step it is done all the same
            sums = report(s, step, sums, log, began)
            if step % s.every[1] == 0 or step == s.steps or stop:
                save(s, step, net, ema, optimizer, sums, log)
            if (step % s.every[2] == 0 or step == s.steps) and not stop and s.rank == 0:
                picture(s, ema.module, path, held_out or images, step)
    print(f"{'stopped' if stop else 'done'} and saved at step {step} in {s.out}")
    return 128 + caught[0] if stop and caught else 0


def catch_signals():
    """A list that Ctrl-C and SIGTERM are put into for the loop to see; the fourth no longer waits for it."""
    caught = []
    handler = lambda *got: caught.append(got[0]) if len(caught) < 3 else signal.default_int_handler(*got)
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, handler)
    return caught


def start(s, state, step, net, images):
    """Prints the settings and opens log.jsonl, cut after the checkpoint: what was logged since then comes again."""
    print("  ".join(f"{k}={v}" for k, v in vars(s).items() if v is not None and k != "classes"))
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(images[0]):,} images, {s.world} ranks of "
          f"{s.batch // s.world} a step, {s.steps * s.batch / len(images[0]):.1f} epochs, from step {step}")
    for k in FREE | {"steps"} if state else ():
        if k in state["config"] and state["config"][k] != getattr(s, k):
            print(f"note: --{k} was {state['config'][k]} and is {getattr(s, k)} from here on")
    if s.warmup > s.steps:
        print(f"note: --warmup {s.warmup} takes longer than --steps {s.steps}, so that --lr {s.lr} is never reached")
    if s.rank:
        return None
    log = open(Path(s.out, "log.jsonl"), "ab")
    log.truncate(min(log.tell(), state["log_bytes"] if state else 0))
    log.seek(0, os.SEEK_END)
    return log


def report(s, step, sums, log, began):
    """Prints the progress, logs every L steps, without clock times, which never repeat; returns sums to go on with."""
    loss, n, due, live = sum(sums[:10]), sum(sums[10:20]), step % s.every[0] == 0, sys.stdout.isatty()
    if due and log:
        by_t = [a / b if b else None for a, b in zip(sums[:10], sums[10:20])]
        line = dict(step=step, images=step * s.batch, loss=loss / n, loss_by_t=by_t, grad_norm=sums[20] * s.batch / n,
                    lr=rate(s, step - 1), world_size=s.world)  # fmt: skip
        log.write(json.dumps(line).encode() + b"\n")
        log.flush()
    if due or live:
        pace = (time.perf_counter() - began[0]) / (step - began[1])
        left = datetime.timedelta(seconds=int(pace * (s.steps - step)))
        if s.device.type == "cuda" or resource is None:
            memory = torch.cuda.max_memory_allocated() / 1e9
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
        text = f"step {step}/{s.steps}  loss {loss / n:.4f}  {s.batch / pace:.0f} images/s  {left} left  {memory:.1f}GB"
        print(f"\r\033[K{text}" if live else text, end="" if live and step < s.steps else "\n", flush=True)
    return [0.0] * 21 if due else sums


# ---- Sampling and evaluation -----------------------------------------------------------------------------------------


@torch.no_grad()
def generate(s, net, path, index, images):
    """Samples number index, each a function of (--seed, number), as columns of (B, S, S, 3) uint8, and NFE (B,).

    The columns: the model, or with --superres the enlarged low resolution, the model and the truth.
    """
    noise = lambda i: torch.randn((3, s.size, s.size), generator=seeded(s.device, s.seed, "sample", i), device=s.device)
    x0, number, truth = torch.stack([noise(i) for i in index]), torch.tensor(list(index)), None
    if s.superres:
        truth, _ = rows(s, images, number % len(images[0]))
    cond = conditions(s, truth, number.to(s.device) % (net.config["num_classes"] or 1))
    v, calls = velocity(s, net, path), 1
    if s.guidance != 1:
        v, calls = guided(v, s.guidance), 2
    solution = odeint(v, path.source_std * x0, path.t_span, **solver(s.solver), **cond)
    columns = [to_pixels(cond["cond"]), to_pixels(solution.x), truth.cpu()] if s.superres else [to_pixels(solution.x)]
    return columns, calls * solution.nfe


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 images in dB, (B,)."""
    return 10 * torch.log10(255**2 / (a.float() - b.float()).square().flatten(1).mean(1))


def picture(s, net, path, images, step):
    """samples/step_N.png: 64 samples from noise that never changes, with their NFE in a strip below."""
    try:
        columns, nfe = generate(s, net, path, range(64), images)
    except SolverError as e:
        return print(f"no picture at step {step}: {e}")
    tiles = torch.stack(columns, 1).unflatten(0, (8, 8))  # (8, 8, columns, S, S, 3)
    tiles = tiles.permute(0, 3, 1, 2, 4, 5).reshape(8 * s.size, -1, 3)
    text = f"step {step}, {s.solver}, NFE {nfe.float().mean():.0f}, ema {s.ema}"
    if s.superres:
        where = "held-out" if s.test or s.data == "cifar10" else "training"
        text += f"; low, model, truth ({where}): PSNR {psnr(*columns[1:]).mean():.2f} dB"
        print(text)
    width = max(tiles.shape[1], int(ImageFont.load_default().getlength(text)) + 4)
    canvas = Image.new("RGB", (width, len(tiles) + 14), "white")
    canvas.paste(Image.fromarray(tiles.numpy()))
    ImageDraw.Draw(canvas).text((2, len(tiles) + 1), text, fill="black")
    Path(s.out, "samples").mkdir(exist_ok=True)
    with replacing(Path(s.out, "samples", f"step_{step}.png")) as f:
        canvas.save(f, "png")


def write_samples(s, net, path, images, step):
    """PNG files of samples 0 to N - 1 in a folder named after what made them; those that are there already are kept."""
    inputs = [] if step else [(s.init, os.stat(s.init.removeprefix("adm:")).st_mtime_ns)]
    inputs += [s.test] if s.superres else []
    tag = "_" + hashlib.sha256(repr(inputs).encode()).hexdigest()[:8] if inputs else ""
    name = f"step{step}_{s.solver.replace(':', '_')}_seed{s.seed}_guidance{s.guidance:g}{tag}"
    top = Path(s.out, "samples", name)
    folders = [top / name for name in (("low", "model", "truth") if s.superres else ("",))]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    index = [i for i in range(s.rank, s.sample, s.world) if not (folders[-1] / f"{i:06d}.png").exists()]
    calls = torch.zeros(2, device=s.device)
    for n in range(0, len(index), s.batch):
        columns, nfe = generate(s, net, path, index[n : n + s.batch], images)
        calls += torch.stack([nfe.sum(), torch.tensor(len(nfe), device=s.device)])
        for folder, column in zip(folders, columns):
            for i, pixels in zip(index[n:], column):
                with replacing(folder / f"{i:06d}.png") as f:
                    Image.fromarray(pixels.numpy()).save(f, "png")
        print(f"{min(n + s.batch, len(index))} of {len(index)}", end="\r" if sys.stdout.isatty() else "\n", flush=True)
    if s.world > 1:
        dist.all_reduce(calls)
    print(f"{s.sample} samples in {top}, {calls[1]:.0f} new, NFE {calls[0] / calls[1].clamp(min=1):.1f}, {s.solver}")
    if s.superres and s.rank == 0:
        read = lambda file: torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8)[None]
        pairs = [[read(folder / f"{i:06d}.png") for folder in folders[1:]] for i in range(s.sample)]
        print(f"PSNR {sum(psnr(*pair).item() for pair in pairs) / s.sample:.2f} dB against the held-out truth")


def print_bpd(s, net, path, images, step):
    """Mean bits per dimension of the first N held-out images."""
    if s.bpd > len(images[0]):
        refuse(f"--bpd {s.bpd} is more than the {len(images[0])} held-out images: lower it")
    bpd, nfe = torch.zeros(2, s.bpd, device=s.device)
    how = dict(divergence="hutchinson", probes=s.probes) if s.probes else dict(divergence="exact")
    v = velocity(s, net, path)
    for i in range(s.rank * s.batch, s.bpd, s.world * s.batch):
        pixels, labels = rows(s, images, torch.arange(i, min(i + s.batch, s.bpd)))
        torch.manual_seed(seeded("cpu", s.seed, "bpd", i).initial_seed())
        cond = conditions(s, pixels, labels)
        result = bits_per_dim(v, pixels.permute(0, 3, 1, 2), s.K, path, **how, **solver(s.solver), **cond)
        bpd[i : i + s.batch], nfe[i : i + s.batch] = result.bpd, result.nfe / s.K
    if s.world > 1:
        dist.all_reduce(bpd)
        dist.all_reduce(nfe)
    error = bpd.std() / s.bpd**0.5 if s.bpd > 1 else math.nan
    print(f"{bpd.mean():.4f} +- {error:.4f} bits per dimension: mean, standard error of {s.bpd} "
          f"held-out images, step {step}, uniform dequantisation, K = {s.K}, {s.solver}, NFE {nfe.mean():.1f}, "
          + (f"Hutchinson probes: {s.probes}" if s.probes else "exact trace"))  # fmt: skip


def evaluate(s, state):
    """--sample or --bpd with the averaged weights of the checkpoint, or with those of --init."""
    images = load_images(s, "test") if s.bpd or s.superres else None
    net = build(s, state).eval()
    if state:
        net.load_state_dict(state["ema"])
    (write_samples if s.sample else print_bpd)(s, net, PATHS[s.path](), images, state["step"] if state else 0)
    return 0


def main(argv=None):
    rank, world, local = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        s, state = settle(argv, world)
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = s.device or next(name for name in there if there[name])
        s.device = torch.device(name, local) if name == "cuda" else torch.device(name)
        s.rank, s.world, s.classes = rank, world, state["config"]["classes"] if state else None
        if name == "cuda":
            torch.cuda.set_device(s.device)
        if world > 1:  # a long timeout, since the first rank may have a million images to read
            dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
        Path(s.out).mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(open(os.devnull, "w") if rank else sys.stdout):
            code = evaluate(s, state) if s.sample or s.bpd else train(s, state)
        if world > 1:
            dist.barrier()  # gloo of torch 2.4 can hang where one rank leaves long before another
        return code
    except KeyboardInterrupt:
        print("train_cifar.py: interrupted", file=sys.stderr)
        return 130
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        refuse(f"{e}: make room or name another --out, and start again", 1)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
