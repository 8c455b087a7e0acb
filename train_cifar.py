# SPDX-License-Identifier: MIT
"""Train, resume, sample and evaluate image models, Section 6 of arXiv:2210.02747v2.

    python train_cifar.py                                 CIFAR-10; the same line again resumes
    python train_cifar.py --recipe laptop --data FOLDER   28 pixels, ten minutes on two CPU cores
    torchrun --nproc_per_node=8 train_cifar.py            8 GPUs, the batches of one
    python train_cifar.py --sample 50000                  numbered PNG files, averaged weights
    python train_cifar.py --bpd 1000                      bits per dimension, held-out images

Computed for an A100 at 40 % of its peak, 3 forward passes an image, not measured: --recipe modern
4 h in bf16 (3,640 images/s), 8 h in TF32 (1,820); --recipe paper 31 h (910), 61 h (455).
"""

import argparse
import contextlib
import hashlib
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.utils import save_image

import flow_matching as fm
from flow_matching import OBJECTIVES, PATHS, UNet, bits_per_dim, cfm_loss, odeint, ot_coupling

# Rows of flags with their defaults; what each is, between semicolons. Departure: the defaults are
# the recipe of Tong et al. (2024), smaller and better than that of Table 3, --recipe paper.
SETTINGS = [
    (dict(out="runs/cifar", recipe="modern"), "a run's folder, new or to resume; whose defaults"),
    (dict(sample=0, bpd=0), "N samples to write, not to train; N held-out images to evaluate"),
    (dict(device="", eval_batch=64), "cuda, mps or cpu; images at a time in --sample and --bpd"),
    (dict(data="cifar10", test=""), "cifar10, in ./data, or a folder; held-out images likewise"),
    (dict(size=32, flip=True), "pixels of the central squares; mirror half of them in training"),
    (dict(conditional=False), "learn labels: CIFAR-10's, or the names of the folder's subfolders"),
    (dict(superres=1), "N: learn images given themselves at 1/N of their size, Section 6.3"),
    (dict(path="ot", objective="velocity"), "Section 4.1; row of Table 1"),
    (dict(coupling="independent"), "ot: pair noise and images in minibatches, by SciPy"),
    (dict(channels=128, channel_mult="1,2,2,2"), "width of the UNet; its factor at each level"),
    (dict(num_res_blocks=2, dropout=0.1), "residual blocks at each level; dropout in them"),
    (dict(attention_resolutions="16", head_channels=64), "image sizes with it; width of a head"),
    (dict(init="", seed=0), "start from a checkpoint.pt, or torchcfm's as adm:FILE; of all draws"),
    (dict(batch=128, accumulate=1), "images a step, on all ranks; pieces of it, to save memory"),
    (dict(steps=400_000, lr=2e-4), "of training, by Adam; its learning rate"),
    (dict(warmup=5000, decay="none"), "steps to reach --lr; the way from there down to 1e-8"),
    (dict(clip=1.0, ema=0.9999), "largest norm of the gradient, 0: any; decay of the average"),
    (dict(precision="fp32", compile=False), "bf16: autocast; the network, by torch.compile"),
    (dict(log_every=100, save_every=1000, preview_every=5000), "steps; steps; steps to a picture"),
    (dict(solver="dopri5:1e-5"), "dopri5:TOLERANCE, or euler, midpoint or rk4:NFE, network calls"),
    (dict(guidance=1.0), "w: v_none + w (v_label - v_none), two network calls in one of these"),
    (dict(K=1, probes=1), "draws of the dequantisation, Eq. (47); of Eq. (34), 0: exact trace"),
]
DEFAULTS = {name: default for row, _ in SETTINGS for name, default in row.items()}
PROGRAM = {"out", "device", "sample", "bpd"}  # all others are kept in the checkpoint
EVALUATION = {"solver", "guidance", "K", "probes", "eval_batch"}  # these and the next may change
FREE = {"data", "test", "accumulate", "compile", "log_every", "save_every", "preview_every"}
PAPER = "--channels 256 --dropout 0 --no-flip --batch 256 --steps 391000 --lr 5e-4 --warmup 45000"
PAPER += " --decay linear --clip 0 --ema 0"
# Departure: ten minutes on two CPU cores, in many small steps.
LAPTOP = "--size 28 --channels 48 --channel-mult 1,2,2 --num-res-blocks 1 --attention-resolutions 7"
LAPTOP += " --dropout 0 --no-flip --batch 8 --steps 3000 --lr 2e-3 --warmup 150 --decay linear"
LAPTOP += " --ema 0.995 --solver midpoint:20 --preview-every 1000"
RECIPES = {"modern": "", "paper": PAPER, "laptop": LAPTOP}
CHOICES = dict(recipe=RECIPES, path=PATHS, objective=OBJECTIVES, precision=("fp32", "bf16"))
CHOICES |= dict(coupling=("independent", "ot"), decay=("none", "linear", "cosine"))


def solver(text):
    """The keywords of odeint."""
    method, value = text.split(":")
    if method == "dopri5":
        return {"method": method, "rtol": float(value), "atol": float(value)}
    return {"method": method, "steps": int(value) // {"midpoint": 2, "rk4": 4}.get(method, 1)}


def integers(text):
    return tuple(map(int, text.split(",")))


def resolve_args(argv):
    """Settings and checkpoint: the command line's come before the run's, before the recipe's."""
    raw = argparse.RawDescriptionHelpFormatter
    usage = "%(prog)s [--flag value]..., see --help"
    parser = argparse.ArgumentParser("train_cifar.py", usage, __doc__, formatter_class=raw)
    types = {"channel_mult": integers, "attention_resolutions": integers, "solver": solver}
    for row, texts in SETTINGS:
        for (name, default), text in zip(row.items(), texts.split("; ")):
            how = {"type": types.get(name, type(default)), "choices": CHOICES.get(name)}
            if isinstance(default, bool):
                how = {"action": argparse.BooleanOptionalAction}
            flag = "--" + name.replace("_", "-")
            parser.add_argument(flag, default=default, help=f"{text} ({default})", **how)
    world = int(os.environ.get("WORLD_SIZE", 1))
    parser.set_defaults(classes=(), rank=int(os.environ.get("RANK", 0)), world=world)
    args = parser.parse_args(argv)
    file = Path(args.out, "checkpoint.pt")
    if not file.exists():
        return parser.parse_args(RECIPES[args.recipe].split() + argv), None
    checkpoint = torch.load(file, "cpu", weights_only=True)
    stored = checkpoint["config"]
    fixed = [name for name in DEFAULTS if name not in PROGRAM | EVALUATION | FREE]
    if args.sample or args.bpd:
        stored = {name: value for name, value in stored.items() if name not in EVALUATION}
        fixed.remove("seed")
    elif stored["decay"] == "none":
        fixed.remove("steps")
    parser.set_defaults(**stored)
    args = parser.parse_args(argv)
    for name in fixed:
        if getattr(args, name) != stored[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {stored[name]} in {args.out}: leave it out")
    return args, checkpoint


# ---- Training ----
def train(args, checkpoint):
    check_settings(args)
    images = load_images(args, "data")
    held_out = load_images(args, "test")
    net = build(args, checkpoint, "net")
    average = build(args, checkpoint, "average").eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    first = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    if args.compile:
        net.compile()
    model = torch.nn.parallel.DistributedDataParallel(net) if args.world > 1 else net
    print("  ".join(f"{name}={value}" for name, value in vars(args).items()))
    print(f"{len(images[0]):,} images, {args.world} ranks, from step {first}", flush=True)
    caught = []  # Ctrl-C and SIGTERM, for the loop to see after its step
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    began = time.perf_counter()
    recent = []  # loss and gradient norm of the steps since the last report, on the device
    for step in range(first, args.steps):
        torch.manual_seed(digest(args.seed, "dropout", step, args.rank))
        loss = backward(args, model, get_batch(args, images, step))
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf)
        # Where this is 1 Adam leaves weights and moments alone; the host need not wait to know.
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, net, args.ema, step)
        recent.append(torch.stack([loss, norm]))
        done = step + 1
        stop = sum_over_ranks(args, torch.tensor(len(caught))) > 0
        due = [done % every == 0 for every in (args.save_every, args.preview_every, args.steps)]
        if any(due) or stop or done % args.log_every == 0:
            rate = args.batch * (done - first) / (time.perf_counter() - began)
            report(args, done, recent, rate)
        if (any(due) or stop) and args.rank == 0:
            save_checkpoint(args, done, net, average, optimizer)
        if any(due[1:]) and args.rank == 0:
            preview(args, velocity(args, average), held_out or images, done)
        if stop:
            print(f"stopped and saved at step {done} in {args.out}")
            return 128 + max(caught, default=0)
    print(f"done and saved in {args.out}")


def check_settings(args):
    """Refuses what would be found out after hours, or train something else."""
    if args.batch % (args.world * args.accumulate):
        raise ValueError(f"--batch {args.batch} must be a multiple of ranks x --accumulate")
    if args.guidance != 1 and not args.conditional:
        raise ValueError("--guidance needs --conditional")
    if args.coupling == "ot" and (args.conditional or args.superres > 1):
        raise ValueError("--coupling ot pairs across labels, of --conditional and --superres")
    zero = velocity(args, lambda t, x: 0 * x)  # says whether samples can be drawn, and by --solver
    fm.sample(zero, PATHS[args.path](), (1, 1), **args.solver)


def backward(args, model, batch):
    """Leaves the gradient of the mean loss in the weights, piece by piece; returns the loss, ()."""
    allow_tf32(True)
    total = 0
    for piece in range(args.accumulate):
        part = {name: x[piece :: args.accumulate] for name, x in batch.items()}
        with torch.autocast(args.device.type, torch.bfloat16, args.precision == "bf16"):
            loss = cfm_loss(model, PATHS[args.path](), **OBJECTIVES[args.objective], **part)
        (loss / args.accumulate).backward()
        total += loss.detach()
    return total / args.accumulate


def get_batch(args, images, step):
    """This rank's share of a step's batch, a function of seed and step, as keywords of cfm_loss."""
    B = args.batch
    epoch, i = divmod(step, len(images[0]) // B)
    order = torch.randperm(len(images[0]), generator=seeded("cpu", args.seed, "epoch", epoch))
    pixels, labels = fetch(args, images, order[i * B : (i + 1) * B])
    where = {"device": args.device, "generator": seeded(args.device, args.seed, "step", step)}
    if args.flip:
        mirrored = torch.rand((B, 1, 1, 1), **where) < 0.5
        pixels = torch.where(mirrored, pixels.flip(2), pixels)
    # Eq. (36): --bpd measures the density that is trained. The paper does not say what it did.
    x1 = ((pixels + torch.rand(pixels.shape, **where)) / 128 - 1).permute(0, 3, 1, 2)
    labels = labels.masked_fill(torch.rand(B, **where) < 0.1, len(args.classes))  # v_none's tenth
    t = PATHS[args.path]().sample_t(B, **where)
    noise = torch.randn(x1.shape, **where)
    batch = {"x1": x1, "t": t, "noise": noise, **conditions(args, pixels, labels)}
    if args.coupling == "ot":
        batch["x0"] = batch.pop("noise")[ot_coupling(noise, x1)]
    return {name: x[args.rank :: args.world] for name, x in batch.items()}


def conditions(args, pixels, labels):
    """What the network gets beside t and x: labels (B,), the enlarged 8-bit low resolution."""
    given = {"y": labels} if args.conditional else {}
    if args.superres > 1:
        low = F.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), args.superres).round()
        low = F.interpolate(low, scale_factor=args.superres, mode="bicubic")
        given["cond"] = (low + 0.5) / 128 - 1
    return given


def digest(*key):
    """A whole number of 64 bits that is a function of the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def seeded(device, *key):
    return torch.Generator(device).manual_seed(digest(*key))


def learning_rate(args, step):
    """Linear from 1e-8 to --lr, App. E, then constant or down to 1e-8 at the last step."""
    rise = min(1, (step + 1) / max(1, args.warmup))
    left = min(1, (args.steps - 1 - step) / max(1, args.steps - max(1, args.warmup)))
    fall = {"none": 1, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return 1e-8 + (args.lr - 1e-8) * min(rise, fall[args.decay])


def update_average(average, net, decay, step):
    """Moves the averaged weights towards net's: far at first, by 1 - decay in the end."""
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    move(list(average.parameters()), list(net.parameters()), None)


def report(args, step, recent, rate):
    """Prints means of the recent steps, or ends the program where one was not finite."""
    means = (sum_over_ranks(args, torch.stack(recent)) / args.world).cpu()  # the only wait
    for i, (loss, norm) in enumerate(means.tolist(), step - len(recent)):
        if not math.isfinite(loss + norm):
            what = f"step {i}: loss {loss}, gradient norm {norm}, not taken"
            raise ValueError(f"{what}. Lower --lr, with --init of the checkpoint in {args.out}")
    loss, norm = means.mean(0).tolist()
    line = f"step {step}  loss {loss:.6g}  grad_norm {norm:.6g}"
    print(f"{line}  lr {learning_rate(args, step - 1):.6g}  images/s {rate:.4g}", flush=True)
    recent.clear()


def allow_tf32(allowed):
    """For training: likelihoods, and dopri5 at tight tolerances, would see its rounding."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = allowed


# ---- Network and checkpoint ----
def build(args, checkpoint, weights):
    """The checkpoint's network with its weights "net" or "average", else a new one."""
    if checkpoint:
        net = UNet(**checkpoint["network"])
        net.load_state_dict(checkpoint[weights])
        return net.to(args.device)
    names = "channels channel_mult num_res_blocks attention_resolutions head_channels dropout"
    config = {name: getattr(args, name) for name in names.split()} | {"image_size": args.size}
    config |= {"num_classes": len(args.classes) or None, "cond_channels": 3 * (args.superres > 1)}
    torch.manual_seed(args.seed)
    if not args.init:
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
    """v, path: the averaged field of a run, on pixels / 128 - 1, in eval mode, v.model its UNet."""
    checkpoint = torch.load(Path(out, "checkpoint.pt"), "cpu", weights_only=True)
    args = argparse.Namespace(**checkpoint["config"], device=device)
    net = build(args, checkpoint, "average").eval().requires_grad_(False)
    return velocity(args, net), PATHS[args.path]()


@contextlib.contextmanager
def replacing(file):
    """A file to write, which takes the place of `file` once it is complete and on disk."""
    with open(f"{file}.part", "wb") as part:
        yield part
        part.flush()
        os.fsync(part.fileno())
    os.replace(part.name, file)


def save_checkpoint(args, step, net, average, optimizer):
    """Rate, data order and random numbers are functions of the settings and the step."""
    config = {name: getattr(args, name) for name in (*DEFAULTS, "classes") if name not in PROGRAM}
    state = {"step": step, "config": config, "network": net.config, "net": net.state_dict()}
    state |= {"average": average.state_dict(), "optimizer": optimizer.state_dict()}
    with replacing(Path(args.out, "checkpoint.pt")) as file:
        torch.save(state, file)


# ---- Data ----
def load_images(args, split):
    """Pixels (N, S, S, 3) uint8 and labels (N,) of "data" or "test", which may be None."""
    source = getattr(args, split)
    if source == "cifar10" or args.data == "cifar10" and not source:
        return load_cifar10(args, split)
    if not source:
        return None
    if args.conditional and not args.classes:
        args.classes = find_classes(source)[0]
    classes = {name: i for i, name in enumerate(args.classes or [""])}
    files = make_dataset(os.path.realpath(source), classes, IMG_EXTENSIONS, allow_empty=True)
    if len(files) < (args.batch if split == "data" else 1):
        raise ValueError(f"--{split} {source} has {len(files)} images, less than a --batch")
    names, labels = zip(*files)
    key = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in names]
    cache = Path(args.out, f"{split}-{digest(args.size, key):x}.uint8")  # all ranks map it
    if args.rank == 0 and not cache.exists():
        print(f"reading {len(names)} images", flush=True)
        with replacing(cache) as file, ThreadPoolExecutor() as pool:
            file.writelines(pool.map(read_square, names, [args.size] * len(names)))
    sum_over_ranks(args, torch.zeros(()))  # the others wait
    shape = (len(names), args.size, args.size, 3)
    pixels = torch.from_file(str(cache), size=math.prod(shape), dtype=torch.uint8)
    return pixels.view(shape), torch.tensor(labels)


def load_cifar10(args, split):
    if args.size != 32:
        raise ValueError(f"--size {args.size} is not CIFAR-10's 32: give --{split} FOLDER")
    try:
        if args.rank == 0:
            CIFAR10("data", download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{error}: put cifar-10-python.tar.gz into ./data") from None
    sum_over_ranks(args, torch.zeros(()))  # the others wait
    cifar = CIFAR10("data", train=split == "data")
    if args.conditional:
        args.classes = cifar.classes
    return torch.from_numpy(cifar.data), torch.tensor(cifar.targets)


def read_square(file, size):
    """The central square of an image on white, box-averaged to size x size RGB bytes."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.BOX).tobytes()


def fetch(args, images, index):
    """Pixels (B, S, S, 3) and labels (B,) at index, on the device without a wait for it."""
    cuda = args.device.type == "cuda"
    picked = [x[index].pin_memory() if cuda else x[index] for x in images]
    return [x.to(args.device, non_blocking=cuda) for x in picked]


# ---- Sampling and evaluation ----
@torch.no_grad()
def generate(args, v, images, numbers, labels):
    """Samples (B, S, S, 3) uint8, if --superres between low resolution and truth, and NFE (B,)."""
    allow_tf32(False)
    path = PATHS[args.path]()
    size = (3, args.size, args.size)
    sources = [seeded(args.device, args.seed, "sample", n) for n in numbers.tolist()]
    x0 = torch.stack([path.sample_source(size, args.device, generator=g) for g in sources])
    truth = fetch(args, images, numbers % len(images[0]))[0] if args.superres > 1 else None
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
    pixels, _ = generate(args, v, images, numbers, numbers // 8)
    save_image(pixels.permute(0, 3, 1, 2) / 255, f"{args.out}/samples/step_{step}.png", nrow=8)


def evaluate(args, checkpoint):
    """--sample and --bpd with the averaged weights of the checkpoint, or with those of --init."""
    if not (checkpoint or args.init):
        raise ValueError(f"{args.out} has no checkpoint.pt: train first or give --init")
    images = load_images(args, "test")
    if images is None and (args.bpd or args.superres > 1):
        raise ValueError("--test FOLDER must give the held-out images for this")
    v = velocity(args, build(args, checkpoint, "average").eval().requires_grad_(False))
    source = f"step{checkpoint['step']}" if checkpoint else f"init_{digest(args.init):x}"
    if args.sample:
        write_samples(args, v, images, source)
    if args.bpd:
        print_bpd(args, v, images, source)


def write_samples(args, v, images, source):
    """PNG files of samples 0 to N - 1."""
    how = "_".join(str(value) for value in args.solver.values())
    folder = Path(args.out, "samples", f"{source}_{how}_guidance{args.guidance:g}_seed{args.seed}")
    folder.mkdir(exist_ok=True)
    for numbers in torch.arange(args.sample).split(args.eval_batch)[args.rank :: args.world]:
        pixels, nfe = generate(args, v, images, numbers, numbers % max(1, len(args.classes)))
        for n, picture in zip(numbers.tolist(), pixels):
            Image.fromarray(picture.numpy()).save(folder / f"{n:06d}.png")
        print(f"{n + 1} of {args.sample} in {folder}, NFE {nfe.float().mean():.1f}", flush=True)


def print_bpd(args, v, images, source):
    """Prints the mean bits per dimension of N held-out images, evenly from all of them."""
    allow_tf32(False)
    N = min(args.bpd, len(images[0]))
    totals = torch.zeros(2, N)  # bits per dimension and calls
    how = {"divergence": "exact", **args.solver}
    if args.probes:
        how |= {"divergence": "hutchinson", "probes": args.probes}
    for index in torch.arange(N).split(args.eval_batch)[args.rank :: args.world]:
        pixels, labels = fetch(args, images, index * len(images[0]) // N)  # folders go by class
        torch.manual_seed(digest(args.seed, "bpd", index[0].item()))
        given = conditions(args, pixels, labels)
        x = pixels.permute(0, 3, 1, 2)
        result = bits_per_dim(v, x, PATHS[args.path](), args.K, **how, **given)
        totals[:, index] = torch.stack([result.bpd, result.nfe / args.K]).cpu()
    bpd, nfe = sum_over_ranks(args, totals)
    print(f"{bpd.mean():.4f} +- {bpd.std() / N**0.5:.4f} bits per dimension, mean and error")
    print(f"of {N} held-out images by {source}, K = {args.K}, NFE {nfe.mean():.1f}, {how}")
    if args.K > 1 and args.probes:
        print("biased low: K > 1 averages exponentials of Hutchinson's estimates")


# ---- The program, on each rank ----
def sum_over_ranks(args, x):
    if args.world > 1:
        torch.distributed.all_reduce(x)
    return x


def main(argv):
    try:
        args, checkpoint = resolve_args(argv)
        if args.rank:
            sys.stdout = open(os.devnull, "w")
        args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if args.device.type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            if local_rank >= torch.cuda.device_count():
                raise ValueError("there are fewer GPUs than ranks: lower --nproc_per_node")
            torch.cuda.set_device(local_rank)
        if args.world > 1:  # gloo carries what concerns the host, without a wait for the GPU
            backend = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, timeout=timedelta(hours=12))
        Path(args.out, "samples").mkdir(parents=True, exist_ok=True)
        run = evaluate if args.sample or args.bpd else train
        code = run(args, checkpoint) or 0
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(f"{error} Raise --accumulate, or lower --batch or --eval-batch")
    except (ValueError, ImportError, FileNotFoundError, fm.SolverError) as error:
        sys.exit(f"train_cifar.py: error: {error}")
    if args.world > 1:
        sum_over_ranks(args, torch.zeros(()))  # nobody leaves before the others
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
