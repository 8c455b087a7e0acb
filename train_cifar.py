# SPDX-License-Identifier: MIT
"""Train, resume, sample and evaluate image models, Section 6 of arXiv:2210.02747v2.

    python train_cifar.py                                 CIFAR-10; the same line again resumes
    python train_cifar.py --recipe laptop --data FOLDER   28 pixels, ten minutes on two CPU cores
    torchrun --nproc_per_node=8 train_cifar.py            8 GPUs, the batches of one
    python train_cifar.py --sample 50000                  numbered PNG files, averaged weights
    python train_cifar.py --bpd 1000                      bits per dimension, held-out images

--data, --test     cifar10 (kept in ./data) or folders of images: central squares of --size pixels
--conditional      learns labels: CIFAR-10's, or the names of the folder's subfolders
--superres N       learns images given themselves at 1/N of their size, Section 6.4
--flip             mirrors half of the training images
--path, --late     Section 4.1; share of the times that are drawn near the data
--objective        row of Table 1; --coupling ot pairs noise and images in minibatches, by SciPy
--channels         of the UNet, times --channel-mult at each level of --num-res-blocks, --dropout
--attention-resolutions   the image sizes in pixels that have it, in heads of --head-channels
--init             weights of a checkpoint.pt, or of torchcfm as adm:FILE; --seed: of all else
--batch            images a step on all ranks together, in --accumulate pieces to save memory
--warmup, --decay  steps to reach --lr; none, linear or cosine from there down to 1e-8
--clip, --ema      largest norm of the gradient, 0: any; decay of averaged weights, 0: no average
--precision        bf16: autocast; --compile: the network, by torch.compile
--log-every        steps; --save-every, --preview-every: of the checkpoint, of a picture of samples
--solver           dopri5:TOLERANCE, or euler, midpoint or rk4:NFE, the network calls
--guidance w       v_none + w (v_label - v_none), two network calls in one of the solver's
--K, --probes      draws of the dequantisation, Eq. (47); Hutchinson's, Eq. (34), 0: exact trace
--eval-batch       images at a time in --sample and --bpd, on each rank

Computed, not measured: at 40 % of an A100's peak (312 TFLOP/s bf16, 156 TF32), and 3 forward passes
(11.4 GFLOP; paper 45.7) an image, --recipe modern takes 4 h in bf16 (3,640 images/s) or 8 h in TF32
(1,820), --recipe paper 31 h (910) or 61 h (455).
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.utils import save_image

import flow_matching as fm
from flow_matching import OBJECTIVES, PATHS, UNet, bits_per_dim, cfm_loss, odeint, ot_coupling

DATA = dict(data="cifar10", test="", size=32, conditional=False, superres=1, flip=True)
METHOD = dict(path="ot", objective="velocity", coupling="independent", late=0.0)
NETWORK = dict(channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2, head_channels=64)
NETWORK |= dict(attention_resolutions=(16,), dropout=0.1)
TRAINING = dict(batch=128, accumulate=1, steps=400_000, lr=2e-4, warmup=5000, decay="none")
TRAINING |= dict(clip=1.0, ema=0.9999, precision="fp32", compile=False, init="", seed=0)
EVERY = dict(log_every=100, save_every=1000, preview_every=5000)  # steps
EVALUATION = dict(solver="dopri5:1e-5", guidance=1.0, K=1, probes=1, eval_batch=64)
MODERN = DATA | METHOD | NETWORK | TRAINING | EVERY | EVALUATION
# Departure: MODERN is the recipe of Tong et al. (2024), smaller and better. This is Table 3:
PAPER = dict(channels=256, dropout=0.0, lr=5e-4, warmup=45_000, decay="linear", batch=256)
PAPER |= dict(steps=391_000, clip=0.0, ema=0.0, flip=False)
# Departure: ten minutes on two CPU cores, in many small steps.
LAPTOP = dict(size=28, channels=48, channel_mult=(1, 2, 2), num_res_blocks=1, dropout=0.0)
LAPTOP |= dict(attention_resolutions=(7,), batch=8, steps=3000, lr=1e-3, warmup=150, flip=False)
LAPTOP |= dict(decay="linear", ema=0.995, solver="midpoint:20", preview_every=1000)


def whole_numbers(text):
    return tuple(map(int, text.split(",")))


def folder(text):
    return text if text in ("", "cifar10") else os.path.abspath(text)


def solver(text):
    """The keywords of odeint."""
    method, value = text.split(":")
    if method == "dopri5":
        return {"method": method, "rtol": float(value), "atol": float(value)}
    calls = {"euler": 1, "midpoint": 2, "rk4": 4}.get(method, math.inf)
    if int(value) < calls:
        raise ValueError(text)
    return {"method": method, "steps": int(value) // calls}


TYPES = {"channel_mult": whole_numbers, "attention_resolutions": whole_numbers, "solver": solver}
TYPES |= {"data": folder, "test": folder}
RECIPES = {"modern": MODERN, "paper": PAPER, "laptop": LAPTOP}
CHOICES = {"path": PATHS, "objective": OBJECTIVES, "coupling": ("independent", "ot")}
CHOICES |= {"decay": ("none", "linear", "cosine"), "precision": ("fp32", "bf16")}
FREE = {*EVALUATION, *EVERY, "data", "test", "compile", "accumulate"}  # may change on resume


def fail(message):
    """Ends the program with one line, from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train_cifar.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def resolve_args(argv=None):
    """Settings and checkpoint: the command line's come before the run's, before the recipe's."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train_cifar.py", description=__doc__, formatter_class=raw)
    parser.error = fail
    flag = parser.add_argument
    flag("--out", default="runs/cifar", help="folder of a run, new or to resume: runs/cifar")
    flag("--recipe", default="modern", choices=RECIPES, help="whose defaults; shown: modern's")
    flag("--device", choices=("cuda", "mps", "cpu"), help="the first that is there")
    flag("--sample", default=0, type=int, metavar="N", help="write N samples instead")
    flag("--bpd", default=0, type=int, metavar="N", help="evaluate N held-out images instead")
    for name, default in MODERN.items():
        how = {"type": TYPES.get(name, type(default)), "choices": CHOICES.get(name)}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        flag("--" + name.replace("_", "-"), default=default, help=f"{default}", **how)
    named = parser.parse_args(argv)
    parser.set_defaults(classes=(), **RECIPES[named.recipe])
    file = Path(named.out, "checkpoint.pt")
    checkpoint = torch.load(file, "cpu", weights_only=True) if file.exists() else None
    stored = checkpoint["config"] if checkpoint else {}
    free = set(FREE)
    if named.sample or named.bpd:
        stored = {name: value for name, value in stored.items() if name not in EVALUATION}
        free.add("seed")
    elif stored.get("decay") == "none":
        free.add("steps")
    parser.set_defaults(**stored)
    args = parser.parse_args(argv)
    for name, value in stored.items():
        if getattr(args, name) != value and name not in free:
            flag = name.replace("_", "-")
            fail(f"--{flag} is {value} in {args.out}: leave it out or name another --out")
    return args, checkpoint


# ---- Training ----
def train(args, checkpoint):
    check_settings(args)
    images = load_images(args, "data")
    held_out = load_images(args, "test")
    net = build(args, checkpoint)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    first = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        average.load_state_dict(checkpoint["average"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    if args.compile:
        net.compile()
    devices = [args.device] if args.device.type == "cuda" else None
    model = DistributedDataParallel(net, device_ids=devices) if args.world > 1 else net
    print("  ".join(f"{name}={value}" for name, value in vars(args).items()))
    print(f"{len(images[0]):,} images, {args.world} ranks, from step {first}", flush=True)
    caught = []  # Ctrl-C and SIGTERM, for the loop to see after its step
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    began = time.perf_counter()
    step = first
    recent = []  # loss and gradient norm of the steps since the last log line, on the device
    stop = False
    while step < args.steps and not stop:
        torch.manual_seed(seeded("cpu", args.seed, "dropout", step, args.rank).initial_seed())
        loss = backward(args, model, get_batch(args, images, step))
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf)
        # Where this is 1 Adam leaves weights and moments alone; the host need not wait to know.
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, net, args.ema, step)
        recent.append(torch.stack([loss, norm]))
        step += 1
        stop = sum_over_ranks(args, torch.tensor(len(caught))) > 0 and step < args.steps
        last = step == args.steps
        if step % args.log_every == 0 or step % args.save_every == 0 or last or stop:
            report(args, step, recent, (time.perf_counter() - began) / (step - first))
        if step % args.save_every == 0 or last or stop:
            save_checkpoint(args, step, net, average, optimizer)
        if (step % args.preview_every == 0 or last) and args.rank == 0:
            preview(args, velocity(args, average), held_out or images, step)
    print(f"{'stopped' if stop else 'done'} and saved at step {step} in {args.out}")
    return 128 + caught[0] if stop and caught else 0


def check_settings(args):
    """Refuses what would be found out after hours, or train something else."""
    if args.batch % (args.world * args.accumulate):
        fail(f"--batch {args.batch} must be a multiple of ranks x --accumulate")
    if args.data == "cifar10" and args.size != 32:
        fail(f"--size {args.size} is not CIFAR-10's 32: give --data FOLDER")
    if args.coupling == "ot" and (args.conditional or args.superres > 1):
        fail("--coupling ot pairs across labels: leave out --conditional and --superres")
    start = torch.full((1,), PATHS[args.path]().t_span[0])
    velocity(args, lambda t, x: x)(start, start[:, None])  # says whether samples can be drawn


def backward(args, model, batch):
    """Leaves the gradient of the mean loss in the weights, piece by piece; returns the loss, ()."""
    allow_tf32(True)
    losses = []
    for piece in range(args.accumulate):
        part = {name: x[piece :: args.accumulate] for name, x in batch.items()}
        with torch.autocast(args.device.type, torch.bfloat16, args.precision == "bf16"):
            loss = cfm_loss(model, PATHS[args.path](), **OBJECTIVES[args.objective], **part)
        (loss / args.accumulate).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def get_batch(args, images, step):
    """This rank's share of a step's batch, a function of seed and step, as keywords of cfm_loss."""
    B = args.batch
    n = len(images[0])
    epoch, i = divmod(step, n // B)
    order = torch.randperm(n, generator=seeded("cpu", args.seed, "epoch", epoch))
    pixels, labels = fetch(args, images, order[i * B : (i + 1) * B])
    where = {"device": args.device, "generator": seeded(args.device, args.seed, "step", step)}
    if args.flip:
        mirrored = torch.rand((B, 1, 1, 1), **where) < 0.5
        pixels = torch.where(mirrored, pixels.flip(2), pixels)
    # Eq. (36): --bpd measures the density that is trained. The paper does not say what it did.
    x1 = ((pixels + torch.rand(pixels.shape, **where)) / 128 - 1).permute(0, 3, 1, 2)
    unlabelled = torch.rand(B, **where) < 0.1  # a tenth learns v_none, for --guidance
    labels = labels.masked_fill(unlabelled, len(args.classes))
    t = sample_times(args, B, where)
    noise = torch.randn(x1.shape, **where)
    pairs = {"x0": noise[ot_coupling(noise, x1)]} if args.coupling == "ot" else {"noise": noise}
    batch = {"x1": x1, "t": t, **pairs, **conditions(args, pixels, labels)}
    return {name: x[args.rank :: args.world] for name, x in batch.items()}


def sample_times(args, n, where):
    """n times (n,), uniform but for the share --late, whose 1 - t is log-uniform from 1 to 5e-4."""
    path = PATHS[args.path]()
    t = path.sample_t(n, **where)
    if args.late:
        fraction = t / path.t_span[1]
        near = 1 - 5e-4 ** ((fraction - 1) / args.late + 1)
        t = torch.where(fraction < 1 - args.late, fraction / (1 - args.late), near) * path.t_span[1]
    return t


def conditions(args, pixels, labels):
    """What the network gets beside t and x: labels (B,), the enlarged 8-bit low resolution."""
    given = {"y": labels} if args.conditional else {}
    if args.superres > 1:
        low = F.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), args.superres).round()
        low = F.interpolate(low, scale_factor=args.superres, mode="bicubic")
        given["cond"] = (low + 0.5) / 128 - 1
    return given


def seeded(device, *key):
    """A generator that is a function of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def learning_rate(args, step):
    """Linear from 1e-8 to --lr, App. E, then constant or down to 1e-8 at the last step."""
    rise = min(1, (step + 1) / max(1, args.warmup))
    left = min(1, (args.steps - 1 - step) / max(1, args.steps - max(1, args.warmup)))
    fall = {"none": 1, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return 1e-8 + (args.lr - 1e-8) * min(rise, fall[args.decay])


def update_average(average, net, decay, step):
    """Moves the averaged weights towards net's: far at first, by 1 - decay in the end."""
    move = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    move(list(average.parameters()), list(net.parameters()), None)


def report(args, step, recent, pace):
    """Ends a run that is not finite; at a log line prints and logs the means of recent steps."""
    means = sum_over_ranks(args, torch.stack(recent)) / args.world
    values = means.tolist()  # the only wait for the device
    for i, (loss, norm) in enumerate(values, step - len(values)):
        if not math.isfinite(loss + norm):
            what = f"step {i}: loss {loss}, gradient norm {norm}, not taken"
            fail(f"{what}. Lower --lr, with --init of the checkpoint in {args.out}, which stands")
    if step % args.log_every == 0:
        loss, norm = np.mean(values, 0)
        line = {"step": step, "loss": loss, "grad_norm": norm, "lr": learning_rate(args, step - 1)}
        line["images_per_second"] = args.batch / pace
        print("  ".join(f"{name} {value:.6g}" for name, value in line.items()), flush=True)
        if args.rank == 0:
            with open(Path(args.out, "log.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\n")
        recent.clear()


def allow_tf32(allowed):
    """For training: likelihoods, and dopri5 at tight tolerances, would see its rounding."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.benchmark = allowed


# ---- Network and checkpoint ----
def build(args, checkpoint):
    """The network of the checkpoint, else a new one with weights from --init or --seed."""
    torch.manual_seed(args.seed)
    config = {name: getattr(args, name) for name in NETWORK} | {"image_size": args.size}
    config |= {"num_classes": len(args.classes) or None, "cond_channels": 3 * (args.superres > 1)}
    if checkpoint:
        net = UNet(**checkpoint["network"])
        net.load_state_dict(checkpoint["net"])
    elif not args.init:
        net = UNet(**config)
    elif args.init.startswith("adm:"):
        net = UNet.from_adm(torch.load(args.init[4:], "cpu", weights_only=True), **config)
    else:
        source = torch.load(args.init, "cpu", weights_only=True)
        net = UNet(**config, time_scale=source["network"]["time_scale"])
        net.load_state_dict(source["average"])
    return net.to(args.device)


def velocity(args, net):
    """The field of a network trained for --objective."""
    return fm.as_velocity(net, PATHS[args.path](), OBJECTIVES[args.objective]["predict"])


def load(out, device="cpu"):
    """v, path: the averaged field of a run, on pixels / 128 - 1, in eval mode; v.net: its UNet."""
    checkpoint = torch.load(Path(out, "checkpoint.pt"), "cpu", weights_only=True)
    args = argparse.Namespace(**checkpoint["config"])
    net = UNet(**checkpoint["network"]).to(device).eval().requires_grad_(False)
    net.load_state_dict(checkpoint["average"])
    v = velocity(args, net)
    v.net = net
    return v, PATHS[args.path]()


@contextlib.contextmanager
def replacing(file):
    """A file to write, which takes the place of `file` once it is complete and on disk."""
    part = file.with_name(file.name + ".part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(args, step, net, average, optimizer):
    """Rate, data order and random numbers are functions of the settings and the step."""
    config = {name: getattr(args, name) for name in (*MODERN, "recipe", "classes")}
    state = {"step": step, "config": config, "network": net.config, "net": net.state_dict()}
    state |= {"average": average.state_dict(), "optimizer": optimizer.state_dict()}
    if args.rank == 0:
        with replacing(Path(args.out, "checkpoint.pt")) as file:
            torch.save(state, file)


# ---- Data ----
def load_images(args, split):
    """Pixels (N, S, S, 3) uint8 and labels (N,) of "data" or "test", which may be None."""
    source = getattr(args, split) or args.data == "cifar10" and "cifar10"
    if not source:
        return None
    if source == "cifar10":
        try:
            if args.rank == 0:
                CIFAR10("data", download=True)
        except (OSError, RuntimeError) as error:
            fail(f"{error}: put cifar-10-python.tar.gz into ./data or name a --data FOLDER")
        sum_over_ranks(args, torch.zeros(()))  # the others wait
        cifar = CIFAR10("data", train=split == "data")
        if args.conditional:
            args.classes = cifar.classes
        return torch.from_numpy(cifar.data), torch.tensor(cifar.targets)
    if args.conditional and not args.classes:
        args.classes = find_classes(source)[0]
    classes = {name: i for i, name in enumerate(args.classes or [""])}
    files = make_dataset(source, classes, IMG_EXTENSIONS, allow_empty=True)
    if len(files) < (args.batch if split == "data" else 1):
        fail(f"--{split} {source} has {len(files)} images, less than a --batch: name another")
    key = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file, _ in files]
    key = hashlib.sha256(repr((args.size, key)).encode()).hexdigest()[:16]
    cache = Path(args.out, f"{split}-{key}.npy")  # of another name when the folder changes
    names, labels = zip(*files, strict=True)
    if args.rank == 0 and not cache.exists():
        print(f"reading {len(files)} images", flush=True)
        with replacing(cache) as file, ThreadPoolExecutor() as pool:
            shape = (len(files), args.size, args.size, 3)
            pixels = np.lib.format.open_memmap(file.name, "w+", np.uint8, shape)
            for i, square in enumerate(pool.map(read_square, names, [args.size] * len(files))):
                pixels[i] = square
    sum_over_ranks(args, torch.zeros(()))
    return torch.from_numpy(np.load(cache, mmap_mode="c")), torch.tensor(labels)  # all ranks map it


def read_square(file, size):
    """The central square of an image on white, box-averaged, (size, size, 3) uint8."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        fail(f"{file} cannot be read as an image: {error}")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BOX))


def fetch(args, images, index):
    """Pixels (B, S, S, 3) and labels (B,) at index, on the device without a wait for it."""
    cuda = args.device.type == "cuda"
    picked = [x[index].pin_memory() if cuda else x[index] for x in images]
    return [x.to(args.device, non_blocking=cuda) for x in picked]


# ---- Sampling and evaluation ----
@torch.no_grad()
def generate(args, v, numbers, labels, truth=None):
    """Samples (B, S, S, 3) uint8, each a function of (--seed, its number), and NFE (B,).

    With --superres (B, S, 3 S, 3): low resolution, sample and truth side by side.
    """
    allow_tf32(False)
    path = PATHS[args.path]()
    size = (3, args.size, args.size)
    sources = [seeded(args.device, args.seed, "sample", n) for n in numbers.tolist()]
    x0 = torch.stack([path.sample_source(size, args.device, generator=g) for g in sources])
    given = conditions(args, truth, labels.to(args.device))
    field = v if args.guidance == 1 else fm.classifier_free_guidance(v, args.guidance)
    solution = odeint(field, x0, path.t_span, **args.solver, **given)
    pixels = to_pixels(solution.x)
    if args.superres > 1:
        pixels = torch.cat([to_pixels(given["cond"]), pixels, truth.cpu()], 2)
    return pixels, solution.nfe


def to_pixels(x):
    """(B, 3, S, S) -> (B, S, S, 3) uint8: floor(128 (x + 1)), which inverts Eq. (36)."""
    return ((x.permute(0, 2, 3, 1) + 1) * 128).clamp(0, 255).to(torch.uint8).cpu()


def preview(args, v, images, step):
    """samples/step_N.png: eight samples a row, a row a class."""
    numbers = torch.arange(8 * min(10, len(args.classes) or 8))
    truth, _ = fetch(args, images, numbers % len(images[0]))
    pixels, _ = generate(args, v, numbers, numbers // 8, truth)
    file = Path(args.out, "samples", f"step_{step}.png")
    file.parent.mkdir(exist_ok=True)
    save_image(pixels.permute(0, 3, 1, 2) / 255, file, nrow=8)


def write_samples(args, v, images, source):
    """PNG files of samples 0 to N - 1; those that are there already are kept."""
    how = "_".join(str(value) for value in args.solver.values())
    folder = Path(args.out, "samples", f"{source}_{how}_guidance{args.guidance:g}_seed{args.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(args.rank, args.sample, args.world)
    numbers = [n for n in numbers if not (folder / f"{n:06d}.png").exists()]
    psnr = []
    for chunk in torch.tensor(numbers, dtype=torch.int64).split(args.eval_batch):
        truth = fetch(args, images, chunk % len(images[0]))[0] if args.superres > 1 else None
        pixels, nfe = generate(args, v, chunk, chunk % max(1, len(args.classes)), truth)
        for n, picture in zip(chunk.tolist(), pixels, strict=True):
            with replacing(folder / f"{n:06d}.png") as file:
                Image.fromarray(picture.numpy()).save(file, "png")
        print(f"{n + 1} of {args.sample} in {folder}, NFE {nfe.float().mean():.1f}", flush=True)
        if args.superres > 1:
            _, sample, truth = pixels.float().split(args.size, 2)
            psnr += (10 * (255**2 / (sample - truth).square().mean((1, 2, 3))).log10()).tolist()
            print(f"PSNR {sum(psnr) / len(psnr):.2f} dB against the held-out truth")


def print_bpd(args, v, images, source):
    """Prints the mean bits per dimension of N held-out images, evenly from all of them."""
    allow_tf32(False)
    N = min(args.bpd, len(images[0]))
    totals = torch.zeros(2, N)  # bits per dimension and calls
    how = {"divergence": "hutchinson" if args.probes else "exact"}
    how |= {"probes": max(1, args.probes), **args.solver}
    for index in torch.arange(N).split(args.eval_batch)[args.rank :: args.world]:
        pixels, labels = fetch(args, images, index * len(images[0]) // N)  # folders go by class
        torch.manual_seed(seeded("cpu", args.seed, "bpd", index[0].item()).initial_seed())
        given = conditions(args, pixels, labels)
        pixels = pixels.permute(0, 3, 1, 2)
        result = bits_per_dim(v, pixels, PATHS[args.path](), args.K, **how, **given)
        totals[:, index] = torch.stack([result.bpd, result.nfe / args.K]).cpu()
    bpd, nfe = sum_over_ranks(args, totals)
    error = bpd.std() / N**0.5
    print(f"{bpd.mean():.4f} +- {error:.4f} bits per dimension: mean and standard error of {N}")
    print(f"held-out images, {source}, K = {args.K}, NFE {nfe.mean():.1f}, {how}")
    if args.K > 1 and args.probes:
        print("biased low: K > 1 averages exponentials of Hutchinson's estimates")


def evaluate(args, checkpoint):
    """--sample and --bpd with the averaged weights of the checkpoint, or with those of --init."""
    if not (checkpoint or args.init):
        fail(f"{args.out} has no checkpoint.pt: train first or give --init")
    images = load_images(args, "test")
    if images is None and (args.bpd or args.superres > 1):
        fail("--test FOLDER must give the held-out images for this")
    net = build(args, checkpoint).eval().requires_grad_(False)
    if checkpoint:
        net.load_state_dict(checkpoint["average"])
    v = velocity(args, net)
    source = f"step{checkpoint['step']}" if checkpoint else f"init_{Path(args.init).stem}"
    if args.sample:
        write_samples(args, v, images, source)
    if args.bpd:
        print_bpd(args, v, images, source)
    return 0


# ---- Ranks ----
def sum_over_ranks(args, x):
    if args.world > 1:
        dist.all_reduce(x)
    return x


def start_device(args):
    """Makes args.device this rank's, and joins the other ranks."""
    args.rank = int(os.environ.get("RANK", 0))
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    if args.rank:
        sys.stdout = open(os.devnull, "w")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = args.device or next((name for name in present if present[name]), "cpu")
    args.device = torch.device(kind)
    if kind == "cuda":
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            fail(f"{torch.cuda.device_count()} GPUs here: lower torchrun's --nproc_per_node")
        args.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(args.device)
    if args.world > 1:  # gloo carries what concerns the host, without a wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        bound = args.device if kind == "cuda" else None
        dist.init_process_group(backend, timeout=timedelta(hours=12), device_id=bound)


def main(argv=None):
    args, checkpoint = resolve_args(argv)
    start_device(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    run = evaluate if args.sample or args.bpd else train
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = run(args, checkpoint)
    except (ValueError, ImportError, FileNotFoundError, fm.SolverError) as error:
        fail(error)
    except torch.cuda.OutOfMemoryError as error:
        hint = "raise --accumulate or lower --batch, --eval-batch"  # by whichever rank it is
        sys.exit(f"train_cifar.py: error: {error} {hint}; the last checkpoint in {args.out} stands")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if args.world > 1:
        sum_over_ranks(args, torch.zeros(()))  # nobody leaves before the others
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
