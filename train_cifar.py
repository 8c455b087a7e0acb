# SPDX-License-Identifier: MIT
"""Train, resume, sample and evaluate image models, Section 6 of arXiv:2210.02747v2.

    python train_cifar.py                                 CIFAR-10; the same line again resumes
    python train_cifar.py --recipe laptop --data FOLDER   28 grey pixels, ten minutes on two cores
    torchrun --nproc_per_node=8 train_cifar.py            8 GPUs; --batch stays the total
    python train_cifar.py --sample 50000                  numbered PNG files, averaged weights
    python train_cifar.py --bpd 1000                      bits per dimension of held-out images

What the command line does not say comes from the checkpoint in --out, and without one from the
recipe. The defaults below are those of --recipe modern.
"""

import argparse
import copy
import io
import math
import os
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import save_image

import flow_matching as fm

RANK = int(os.environ.get("RANK", 0))  # torchrun sets it: the number of this process
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are
HIDDEN = (".", "__")  # .ipynb_checkpoints, ._photo.png, __MACOSX: programs write them

# ---- Settings ----
# Departure: modern, the default, is the recipe of Tong et al. (2024), smaller and better than the
# paper's Table 3. laptop is for two CPU cores: many small steps.
# fmt: off
NAMES =                    ("modern",     "paper",      "laptop")
SETTINGS = {
    "size":                  (32,           32,           28),
    "grey":                  (False,        False,        True),
    "flip":                  (True,         False,        False),
    "channels":              (128,          256,          48),
    "channel_mult":          ([1, 2, 2, 2], [1, 2, 2, 2], [1, 1, 2]),
    "num_res_blocks":        (2,            2,            1),
    "attention_resolutions": ([16],         [16],         [7]),
    "dropout":               (0.1,          0.0,          0.0),
    "batch":                 (128,          256,          16),
    "steps":                 (400_000,      391_000,      5000),
    "lr":                    (2e-4,         5e-4,         1e-3),
    "warmup":                (5000,         45_000,       150),
    "decay":                 ("none",       "linear",     "linear"),
    "clip":                  (1.0,          0.0,          1.0),
    "ema":                   (0.9999,       0.0,          0.995),
    "late_times":            (0.0,          0.0,          0.2),
    "workers":               (4,            4,            0),
}
# fmt: on
RECIPES = {}
for number, name in enumerate(NAMES):
    RECIPES[name] = {setting: values[number] for setting, values in SETTINGS.items()}
# What a run keeps, since its weights depend on it, and what no checkpoint holds.
KEPT = "recipe size grey conditional superres path objective channels channel_mult num_res_blocks"
KEPT += " attention_resolutions dropout"
PASSING = "out device sample bpd tol midpoint_steps guidance K eval_batch"


class UserError(Exception):
    """What a user can mend: main prints its line, without a traceback."""


def parse_args(argv=None):
    """Settings, and the checkpoint of --out or None: flags, then checkpoint, then recipe."""
    parser = argparse.ArgumentParser(
        usage="train_cifar.py [--flag value]...",
        description="Train, resume, sample and evaluate image models. What is not given comes from "
        "the checkpoint in --out, and without one from the recipe; shown are those of modern.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    boolean = argparse.BooleanOptionalAction
    # fmt: off
    add = parser.add_argument_group("the run").add_argument
    add("--out", default="runs/cifar", help="folder of the run; a checkpoint there is resumed")
    add("--recipe", choices=RECIPES, default="modern",
        help="defaults of a new run: Tong et al. (2024), Table 3 of the paper, or two CPU cores")
    add("--sample", type=int, default=0,
        help="do not train: write samples 0 to N - 1 as PNG files, and keep those that are there, "
             "but for --superres; sample i has label i modulo the number of classes")
    add("--bpd", type=int, default=0,
        help="do not train: evaluate bits per dimension of this many held-out images")
    add("--seed", type=int, default=0, help="seed of weights, order of images and noise, 0 to 999")
    add("--device", choices=["cuda", "mps", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute: cuda if there is one, else cpu; mps only if asked for")

    add = parser.add_argument_group("data").add_argument
    add("--data", default="cifar10",
        help="training images: a folder, or cifar10, which is downloaded into ./data")
    add("--test", help="held-out images: a folder, or cifar10; its own for --data cifar10")
    add("--size", type=int, help="width in pixels; a picture's central square is averaged")
    add("--grey", action=boolean, help="make the images grey, with one channel instead of three")
    add("--flip", action=boolean, help="mirror half of the images in training")
    add("--conditional", action=boolean, default=False,
        help="learn labels: CIFAR-10's, or the names of the folders in --data; a tenth of them is "
             "hidden in training, for --guidance")
    add("--superres", type=int, default=1,
        help="learn images given themselves at 1/N of their width, Section 6.3; --sample enlarges "
             "those of --test, pictures in training those of --data; 1 gives nothing")
    add("--workers", type=int, help="processes a rank that read images; with 0 training does")

    add = parser.add_argument_group("method and network").add_argument
    add("--path", choices=fm.PATHS, default="ot", help="probability path, Section 4.1")
    add("--objective", choices=fm.OBJECTIVES, default="velocity",
        help="what is learned, Table 1: velocity is flow matching, noise is DDPM, score and "
             "scoreflow are score matching; noise and score need --path vp or ve, scoreflow vp")
    add("--late-times", type=float,
        help="share of the training times near the data, t = 1 - u^5 with u uniform in [0, 1], for "
             "better bits per dimension; the other times are uniform")
    add("--channels", type=int, help="channels of the UNet at its first level; better 48 or more")
    add("--channel-mult", type=int, nargs="+",
        help="multiple of --channels at each level; each level has half the width of the last")
    add("--num-res-blocks", type=int, help="residual blocks at each level")
    add("--attention-resolutions", type=int, nargs="*", help="widths in pixels with attention")
    add("--dropout", type=float, help="share of the activations that is zeroed in training")

    add = parser.add_argument_group("training").add_argument
    add("--batch", type=int, help="images in a step, on all ranks together")
    add("--steps", type=int, help="optimizer steps, with those of the checkpoint")
    add("--lr", type=float, help="highest learning rate of Adam")
    add("--warmup", type=int, help="steps in which the learning rate rises to --lr")
    add("--decay", choices=["none", "linear"],
        help="linear: after --warmup the learning rate falls to 1e-8 at --steps; none: it stays")
    add("--clip", type=float, help="largest norm of the gradient; 0 does not clip")
    add("--ema", type=float, help="decay of the averaged weights at each step; 0 does not average")
    add("--precision", choices=["fp32", "bf16"], default="fp32",
        help="bf16 trains under autocast, fp32 with TF32 where the GPU has it")
    add("--compile", action=boolean, default=False, help="train with torch.compile")
    add("--log-every", type=int, default=100,
        help="steps from one line of progress, with the loss of rank 0, to the next")
    add("--save-every", type=int, default=1000,
        help="steps from one checkpoint, and one picture by 10 midpoint steps, to the next")

    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--tol", type=float, default=1e-5, help="relative and absolute tolerance of dopri5")
    add("--midpoint-steps", type=int, default=0,
        help="for --sample: take so many midpoint steps, of two network calls each; 0: dopri5")
    add("--guidance", type=float, default=1.0,
        help="w in v_none + w (v_label - v_none), for samples of labelled runs, at twice the "
             "network calls; 1 is no guidance")
    add("--K", type=int, default=1,
        help="draws of the dequantisation noise of an image in --bpd, Eq. (47); more than 1 bias "
             "the bits low, since the trace is estimated")
    add("--eval-batch", type=int, default=64,
        help="images at a time on each rank in --sample and --bpd, whose noise depends on it")
    # fmt: on

    parser.set_defaults(**RECIPES["modern"])
    args = parser.parse_args(argv)  # for --out and --recipe, which say where the defaults are
    checkpoint = read_checkpoint(args.out)
    stored = {} if checkpoint is None else checkpoint["args"]
    parser.set_defaults(**RECIPES[args.recipe])
    parser.set_defaults(**stored)
    args = parser.parse_args(argv)

    # Refuse what would go wrong unseen, or after hours.
    for name, value in vars(args).items():
        if name in KEPT.split() and value != stored.get(name, value):
            rule = f"{args.out} was trained with {name} {stored[name]}, not {value}"
            raise UserError(f"{rule}: leave that out, or begin another --out")
    if args.objective != "velocity" and args.path in ("ot", "cosine"):
        rule = f"--objective {args.objective} tells no velocity at t = 0 of --path {args.path}"
        raise UserError(f"{rule}, where sampling starts: use --path vp")
    if not 0 <= args.late_times < 1:
        raise UserError(f"--late-times is a share, 0 to below 1; got {args.late_times}")
    if args.batch % WORLD != 0:
        raise UserError(f"--batch {args.batch} must be a multiple of the {WORLD} ranks")
    data = Path(args.data).resolve()
    test = Path(args.test or data).resolve()
    if data in test.parents or test in data.parents:
        rule = f"--test {args.test} and --data {args.data} must not be one inside the other"
        raise UserError(f"{rule}, or held-out images are trained on: move one away")
    if not 0 <= args.seed <= 999:
        raise UserError(f"--seed must lie in 0 to 999, or runs share noise; got {args.seed}")
    return args, checkpoint


# ---- Training ----
def train(args, checkpoint, device):
    """Trains from the checkpoint, or from new weights, until step --steps."""
    Path(args.out, "samples").mkdir(parents=True, exist_ok=True)
    classes = [] if checkpoint is None else checkpoint["classes"]
    images = load_images(args, classes, train=True)
    if len(images) < args.batch:
        raise UserError(f"--data {args.data} has {len(images)} images, fewer than a --batch")
    if args.conditional:
        classes = classes or images.classes
        print("classes:", dict(enumerate(classes)))
    net, average, optimizer, first = initial_state(args, checkpoint, classes, device)
    v, path = field(vars(args), average)
    print(vars(args))
    print(f"{len(images):,} images, {WORLD} ranks, from step {first}", flush=True)
    if args.compile:
        net.compile()
    model = DistributedDataParallel(net) if WORLD > 1 else net
    precision = nullcontext()  # MPS in torch 2.4 has no autocast that could be disabled
    if args.precision == "bf16":
        precision = torch.autocast(device.type, torch.bfloat16)
    torch.set_float32_matmul_precision("high")  # TF32, for training alone
    torch.backends.cudnn.benchmark = True
    largest = args.clip if args.clip > 0 else math.inf
    on_gpu = device.type == "cuda"
    order = step_indices(args, len(images), first)
    batches = DataLoader(images, batch_sampler=order, num_workers=args.workers, pin_memory=on_gpu)
    totals = torch.zeros(2, device=device)  # of this rank's loss and the norm, since `logged`
    logged = first
    began = time.perf_counter()
    for step, (pixels, labels) in enumerate(batches, first):
        # Draw x1 and its conditions. All that is random from here on, x0 in cfm_loss and dropout,
        # too, is a function of seed, step, rank and number of ranks.
        torch.manual_seed(args.seed + 1000 * (step * WORLD + RANK))
        pixels = pixels.to(device, non_blocking=on_gpu)
        labels = labels.to(device, non_blocking=on_gpu)
        if args.flip:
            mirrored = torch.rand((len(pixels), 1, 1, 1), device=device) < 0.5
            pixels = torch.where(mirrored, pixels.flip(3), pixels)
        # Eq. (36): --bpd measures the density that is trained. The paper does not say what it did.
        x1 = (pixels + torch.rand(pixels.shape, device=device)) / 128 - 1  # in [-1, 1)
        hidden = torch.rand(len(labels), device=device) < 0.1
        labels = labels.masked_fill(hidden, len(classes))  # the label that means none
        cond = conditions(args, pixels, labels)
        t = draw_times(args, path, len(x1), device)

        # Take a step.
        with precision:
            loss = fm.cfm_loss(model, path, x1, cond=cond, t=t, **fm.OBJECTIVES[args.objective])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), largest)
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        optimizer.step()
        optimizer.zero_grad()

        # Move the average to the new weights: far at first, by 1 - ema in the end.
        move = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
        move(list(average.parameters()), list(net.parameters()), None)

        # Log, save and draw. Only here the host waits for a GPU.
        totals += torch.stack([loss.detach(), norm])
        done = step + 1
        log = done % args.log_every == 0 or done == args.steps
        save = done % args.save_every == 0 or done == args.steps
        if log or save:
            loss_sum, norm_sum = totals.tolist()
            if not math.isfinite(loss_sum + norm_sum):
                what = f"loss or gradient was not finite in the last steps up to {done}"
                raise UserError(f"{what}: lower --lr; a checkpoint in {args.out} is from before")
        if log:
            seconds = (time.perf_counter() - began) / (done - first)  # of a step
            left = timedelta(seconds=round(seconds * (args.steps - done)))
            line = f"step {done}  loss {loss_sum / (done - logged):.6g}  images/s"
            print(f"{line} {args.batch / seconds:.4g}  time left {left}", flush=True)
            totals.zero_()
            logged = done
        if save and RANK == 0:
            save_checkpoint(args, done, classes, net, average, optimizer)
            write_picture(args, v, path, classes, images, done, device)


def initial_state(args, checkpoint, classes, device):
    """Network, its average, optimizer, and the number of steps that were taken."""
    channels = 1 if args.grey else 3
    config = {
        "image_size": args.size,
        "in_channels": channels,
        "out_channels": channels,
        "channels": args.channels,
        "channel_mult": args.channel_mult,
        "num_res_blocks": args.num_res_blocks,
        "attention_resolutions": args.attention_resolutions,
        "dropout": args.dropout,
        "num_classes": len(classes) or None,
        "concat_channels": channels if args.superres > 1 else 0,
    }
    if checkpoint is not None:
        config = checkpoint["network"]
    torch.manual_seed(args.seed)
    net = fm.UNet(**config).to(device)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), fused=device.type != "mps")  # not in torch 2.4
    if checkpoint is None:
        return net, average, optimizer, 0
    net.load_state_dict(checkpoint["net"])
    average.load_state_dict(checkpoint["average"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return net, average, optimizer, checkpoint["step"]


def step_indices(args, count, first):
    """Yields the indices of this rank's images at each step; each epoch has an order of its own."""
    order = None
    for step in range(first, args.steps):
        epoch, number = divmod(step, count // args.batch)
        if order is None or number == 0:
            order = np.random.default_rng([args.seed, epoch]).permutation(count)
        batch = order[number * args.batch : (number + 1) * args.batch]
        yield batch[RANK::WORLD].tolist()


def conditions(args, pixels, labels):
    """What the network gets beside t and x: labels (B,), the low resolution (B, C, S, S)."""
    cond = {}
    if args.conditional:
        cond["y"] = labels
    if args.superres > 1:
        low = F.avg_pool2d(pixels.float(), args.superres).round()  # as 8 bits would store it
        low = F.interpolate(low, scale_factor=args.superres, mode="bicubic")
        cond["concat"] = (low + 0.5) / 128 - 1
    return cond


def draw_times(args, path, count, device):
    """Training times (B,): uniform over path.t_span, or for a share of them near the data."""
    times = path.sample_t(count, device)
    if args.late_times == 0:
        return times
    # Departure: late times. The times u of a batch lie on a grid, so it has its share of both.
    u = times / path.t_span[1]  # every path starts at 0
    uniform = u / (1 - args.late_times)
    late = 1 - ((1 - u) / args.late_times) ** 5
    return path.t_span[1] * torch.where(u < 1 - args.late_times, uniform, late)


def learning_rate(args, step):
    """Linear from 1e-8 to --lr, App. E, then constant or down to 1e-8 at the last step."""
    warmup = max(1, args.warmup)
    part = min(1, (step + 1) / warmup)
    if args.decay == "linear":
        falling = max(1, args.steps - warmup)
        part = min(part, (args.steps - 1 - step) / falling)
    return 1e-8 + (args.lr - 1e-8) * part


# ---- Files of the run ----
def save_checkpoint(args, step, classes, net, average, optimizer):
    state = {
        "step": step,
        "args": {name: value for name, value in vars(args).items() if name not in PASSING.split()},
        "classes": classes,
        "network": net.config,
        "net": net.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_whole(Path(args.out, "checkpoint.pt"), partial(torch.save, state))


def write_whole(file, save):
    """Writes what save(stream) writes: whoever kills this finds the old file or the new one."""
    data = io.BytesIO()
    save(data)
    part = file.with_name(f"{file.name}.part")
    try:
        with open(part, "wb") as stream:
            stream.write(data.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file} could not be written ({error}): make room and go on") from error
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(out):
    """The checkpoint of a run, on the CPU, or None."""
    file = Path(out, "checkpoint.pt")
    if not file.exists():
        return None
    try:
        checkpoint = torch.load(file, "cpu", weights_only=True)
        if not checkpoint.keys() > {"args", "network", "average"}:
            raise KeyError
    except Exception as error:  # torch raises many kinds, for what it finds in the file
        rule = f"{file} is cut, or no checkpoint of train_cifar.py"
        raise UserError(f"{rule}: put a whole one there or give another --out") from error
    return checkpoint


def load(out, device="cpu", checkpoint=None):
    """v, path, net, classes: the field of a run's averaged weights, their UNet, names of labels.

    The field is on pixels / 128 - 1, and takes cond of the run: y, concat or none.
    """
    if checkpoint is None:
        checkpoint = read_checkpoint(out)
    if checkpoint is None:
        raise UserError(f"{out} has no checkpoint.pt: train first")
    net = fm.UNet(**checkpoint["network"]).to(device).eval().requires_grad_(False)
    net.load_state_dict(checkpoint["average"])
    v, path = field(checkpoint["args"], net)
    return v, path, net, checkpoint["classes"]


def field(settings, net):
    """v, path: the velocity field that a network means, by the settings it was trained with."""
    path = fm.PATHS[settings["path"]]()
    return fm.as_velocity(net, path, fm.OBJECTIVES[settings["objective"]]["predict"]), path


# ---- Data ----
def load_images(args, classes, train):
    """Training or held-out pixels (C, S, S) uint8 and labels, numbered as classes unless []."""
    source = args.data if train else args.test
    if source is None and args.data == "cifar10":
        source = "cifar10"  # which has test images of its own
    if source is None:
        raise UserError("no held-out images: give --test FOLDER")
    to_pixels = partial(read_pixels, size=args.size, grey=args.grey)
    if source == "cifar10":
        try:
            if RANK == 0:
                CIFAR10("data", download=True)
        except (OSError, RuntimeError) as error:
            way_out = "put cifar-10-python.tar.gz into the folder data, or give --data FOLDER"
            raise UserError(f"CIFAR-10 could not be downloaded ({error}): {way_out}") from error
        if WORLD > 1:
            dist.barrier()  # the other ranks wait for the download
        images = CIFAR10("data", train=train, transform=to_pixels)
    else:
        images = Pictures(source, to_pixels, args.conditional, classes)
    if classes and images.classes != classes:
        rule = f"{source} has the classes {images.classes}, but training had {classes}"
        raise UserError(f"{rule}: they must be among these")
    return images


def stop(error):
    raise error  # where os.walk would leave a folder out


class Pictures:
    """Pixels and labels of the pictures below a folder; its subfolders are the classes, or nothing.

    Each real folder is read once, even if links lead back to it, and what is hidden never.
    """

    def __init__(self, folder, to_pixels, labelled, classes):
        self.to_pixels = to_pixels
        self.found = []  # pictures and the names of their classes
        top = Path(folder).resolve()
        seen = {top, *top.parents}
        for here, folders, files in os.walk(folder, onerror=stop, followlinks=True):
            inside = Path(here).relative_to(folder).parts  # beginning with the class
            links = {name: Path(here, name).is_symlink() for name in folders}
            for name in sorted(folders, key=links.get):  # real folders first
                real = Path(here, name).resolve()
                if real in seen or name.startswith(HIDDEN):
                    folders.remove(name)
                else:
                    seen.add(real)
            folders.sort()
            for name in sorted(files):
                is_picture = name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(HIDDEN)
                if is_picture and (inside or not labelled):
                    label = inside[0] if labelled else "all"
                    self.found.append((Path(here, name), label))
        if not self.found:
            where = "a folder in it" if labelled else "it"
            raise UserError(f"{folder}: no picture in {where}, {', '.join(IMG_EXTENSIONS)}")
        names = {label for _, label in self.found}
        self.classes = classes if names <= set(classes) else sorted(names)

    def __len__(self):
        return len(self.found)

    def __getitem__(self, index):
        file, label = self.found[index]
        try:
            with Image.open(file) as image:
                pixels = self.to_pixels(image)
        except Exception as error:  # Pillow raises many kinds, for what it finds in the file
            raise UserError(f"{file} cannot be read as a picture: {error}") from error
        return pixels, self.classes.index(label)


def read_pixels(image, size, grey):
    """The central square of a PIL image on white, averaged to (C, size, size) uint8."""
    sixteen_bits = image.mode.startswith("I;16")
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # of TIFF
    if image.mode in ("I", "F") or (sixteen_bits and white_is_zero):
        raise ValueError(f"mode {image.mode} does not tell black and white: save it as 8-bit PNG")
    image = ImageOps.exif_transpose(image)
    if sixteen_bits:
        eight_bits = np.round(np.asarray(image) / 257)  # 65535 / 257 = 255
        image = Image.fromarray(eight_bits.astype(np.uint8))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
    image = image.convert("L" if grey else "RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BOX)
    return pil_to_tensor(image)


# ---- Sampling and evaluation ----
@torch.no_grad()
def generate(args, v, path, numbers, classes, images, device, **solver):
    """Samples (B, C, S, S) uint8 of these numbers, functions of seed and number, and NFE (B,).

    Number i has label i modulo the classes; with --superres it enlarges image i, with its label.
    """
    labels = torch.tensor(numbers, device=device) % max(1, len(classes))
    pixels = None
    if args.superres > 1:
        chosen = [number % len(images) for number in numbers]
        pixels, labels = default_collate([images[index] for index in chosen])
        pixels = pixels.to(device)
        labels = labels.to(device)
    cond = conditions(args, pixels, labels)
    shape = (1, 1 if args.grey else 3, args.size, args.size)
    noise = []
    for number in numbers:
        generator = torch.Generator().manual_seed(args.seed + 1000 * number)
        noise.append(path.sample_source(shape, generator=generator))  # on the CPU for all devices
    if args.guidance != 1:
        v = fm.classifier_free_guidance(v, args.guidance)
    solution = fm.odeint(v, torch.cat(noise).to(device), path.t_span, cond=cond, **solver)
    level = (solution.x + 1) * 128  # inverts Eq. (36); its floor is the pixel
    return level.clamp(0, 255).to(torch.uint8).cpu(), solution.nfe


def write_picture(args, v, path, classes, images, step, device):
    """samples/step_N.png: eight rows; a column for each of at most ten classes, or eight.

    With --superres the first images are enlarged, one after the other.
    """
    columns = min(10, len(classes)) or 8
    numbers = range(8 * columns)
    pixels, _ = generate(
        args, v, path, numbers, classes, images, device, method="midpoint", steps=10
    )
    save = partial(save_image, pixels / 255, nrow=columns, format="png")
    write_whole(Path(args.out, "samples", f"step_{step}.png"), save)


def write_samples(args, v, path, classes, images, step, device):
    """Writes the samples 0 to N - 1 as PNG files, but for those that are there."""
    solver = {"rtol": args.tol, "atol": args.tol}
    name = f"step_{step}_dopri5_{args.tol:g}"
    if args.midpoint_steps > 0:
        solver = {"method": "midpoint", "steps": args.midpoint_steps}
        name = f"step_{step}_midpoint_{args.midpoint_steps}"
    name += f"_guidance_{args.guidance:g}_seed_{args.seed}"
    folder = Path(args.out, "samples", name)
    folder.mkdir(parents=True, exist_ok=True)
    trained = Path(args.out, "checkpoint.pt").stat().st_mtime
    missing = []
    for number in range(args.sample):
        file = folder / f"{number:06d}.png"
        # A file from before the checkpoint shows other weights, with --superres maybe other images.
        if args.superres > 1 or not file.exists() or file.stat().st_mtime < trained:
            missing.append(number)
    if WORLD > 1:
        dist.barrier()  # all ranks have looked before one writes
    print(f"{args.sample - len(missing)} of {args.sample} samples are kept in {folder}")
    if classes and args.superres == 1:
        print(f"sample i has label i modulo {len(classes)}: {dict(enumerate(classes))}")
    for numbers in batches_of_rank(missing, args.eval_batch):
        pixels, nfe = generate(args, v, path, numbers, classes, images, device, **solver)
        for number, sample in zip(numbers, pixels):
            picture = to_pil_image(sample)
            save = partial(picture.save, format="png")
            write_whole(folder / f"{number:06d}.png", save)
        print(f"up to sample {numbers[-1]}, NFE {nfe.float().mean():.1f}", end=", ")


def print_bpd(args, v, path, images, step, device):
    """Prints the mean bits per dimension of N held-out images, evenly from all of them."""
    count = min(args.bpd, len(images))
    bpd = torch.zeros(count, device=device)
    seen = 0
    for numbers in batches_of_rank(list(range(count)), args.eval_batch):
        torch.manual_seed(args.seed + 1000 * numbers[0])
        chosen = [number * len(images) // count for number in numbers]  # folders go by class
        pixels, labels = default_collate([images[index] for index in chosen])
        pixels = pixels.to(device)
        cond = conditions(args, pixels, labels.to(device))
        bpd[numbers] = fm.bits_per_dim(
            v, path, pixels, K=args.K, cond=cond, rtol=args.tol, atol=args.tol
        ).bpd
        seen += len(numbers)
        print(f"{bpd.sum() / seen:.4f} after {seen} images", end=", ")
    if WORLD > 1:
        dist.all_reduce(bpd)
    error = bpd.std() / math.sqrt(count)
    print(f"{bpd.mean():.4f} +- {error:.4f} bits per dimension, mean and standard error")
    print(f"of {count} held-out images at step {step}, by dopri5 at {args.tol:g}, K = {args.K}")


def batches_of_rank(numbers, size):
    """Yields this rank's share of the numbers, in lists of at most that size; prints time left."""
    batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    batches = batches[RANK::WORLD]
    began = time.perf_counter()
    for done, batch in enumerate(batches, 1):
        yield batch
        seconds = (time.perf_counter() - began) / done * (len(batches) - done)
        print("time left", timedelta(seconds=round(seconds)), flush=True)


# ---- The program, on each rank ----
def run(args, checkpoint):
    """Joins the other ranks and does what the settings ask for."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download, draw
    if args.sample == 0 and args.bpd == 0:
        train(args, checkpoint, device)
    else:
        torch.backends.cudnn.allow_tf32 = False  # its rounding is larger than --tol
        v, path, _, classes = load(args.out, device, checkpoint)  # not a newer one
        images = None
        if args.bpd > 0 or args.superres > 1:
            images = load_images(args, classes, train=False)
        if args.sample > 0:
            write_samples(args, v, path, classes, images, checkpoint["step"], device)
        if args.bpd > 0:
            print_bpd(args, v, path, images, checkpoint["step"], device)
    if WORLD > 1:
        dist.barrier()  # nobody leaves before the others
        dist.destroy_process_group()


def main(argv=None):
    try:
        run(*parse_args(argv))
    except KeyboardInterrupt:
        args, checkpoint = parse_args(argv)
        saved = "no checkpoint yet"
        if checkpoint is not None:
            saved = f"the checkpoint of step {checkpoint['step']}"
        sys.exit(f"train_cifar.py: stopped; {args.out} has {saved}")
    except (UserError, OSError, fm.SolverError) as error:
        # The last line is the cause: a worker of DataLoader puts its traceback before it.
        lines = (str(error) or repr(error)).splitlines()
        cause = lines[-1].split("UserError: ")[-1]
        sys.exit(f"train_cifar.py: {cause}")


if __name__ == "__main__":
    main()
