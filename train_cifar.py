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
import math
import os
import pickle
import sys
import time
from collections import Counter
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
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import save_image

import flow_matching as fm
from flow_matching import OBJECTIVES, PATHS, UNet, bits_per_dim, cfm_loss, odeint

RANK = int(os.environ.get("RANK", 0))  # torchrun sets it: the number of this process
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are

# Departure: the default is the recipe of Tong et al. (2024), smaller and better than Table 3's.
MODERN = {
    "size": 32,
    "grey": False,
    "flip": True,
    "channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "num_res_blocks": 2,
    "attention_resolutions": [16],
    "head_channels": 64,
    "dropout": 0.1,
    "batch": 128,
    "steps": 400_000,
    "lr": 2e-4,
    "warmup": 5000,
    "decay": "none",
    "clip": 1.0,
    "ema": 0.9999,
    "late_times": 0.0,
    "workers": 4,
    "picture_every": 5000,
}
PAPER = {  # Table 3, CIFAR-10, as far as it is not MODERN
    "flip": False,
    "channels": 256,
    "dropout": 0.0,
    "batch": 256,
    "steps": 391_000,
    "lr": 5e-4,
    "warmup": 45_000,
    "decay": "linear",
    "clip": math.inf,
    "ema": 0.0,
}
LAPTOP = {  # Departure: ten minutes on two CPU cores, in many small steps
    "size": 28,
    "grey": True,
    "flip": False,
    "channels": 48,
    "channel_mult": [1, 1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [7],
    "dropout": 0.0,
    "batch": 16,
    "steps": 5000,
    "lr": 1e-3,
    "warmup": 150,
    "decay": "linear",
    "ema": 0.995,
    "late_times": 0.2,
    "workers": 0,
    "picture_every": 1000,
}
RECIPES = {"modern": MODERN, "paper": PAPER, "laptop": LAPTOP}
# Settings of one command alone, which a checkpoint does not keep.
NOT_OF_THE_RUN = (
    "out",
    "device",
    "sample",
    "bpd",
    "method",
    "tol",
    "solver_steps",
    "guidance",
    "K",
    "probes",
    "eval_batch",
)
# Settings that say what the output of a network means.
MEANING = ("path", "objective", "superres")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints each default, and the docstring above as it stands."""


def parse_args(argv=None):
    """Settings, and the checkpoint of --out or None: flags, then checkpoint, then recipe."""
    parser = argparse.ArgumentParser(
        "train_cifar.py",
        usage="%(prog)s [--flag value]..., see --help",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    boolean = argparse.BooleanOptionalAction
    # fmt: off
    group = parser.add_argument_group("the run")
    group.add_argument("--out", default="runs/cifar",
        help="folder of the run; if it holds a checkpoint, the run goes on from there")
    group.add_argument("--recipe", choices=RECIPES, default="modern",
        help="defaults of a new run: Tong et al. (2024), Table 3 of the paper, or two CPU cores")
    group.add_argument("--sample", type=int, default=0,
        help="do not train: write this many samples as PNG files")
    group.add_argument("--bpd", type=int, default=0,
        help="do not train: evaluate bits per dimension of this many held-out images")
    group.add_argument("--seed", type=int, default=0,
        help="seed of the weights, the data's order and all noise, 0 to 999")
    group.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto",
        help="where to compute; auto is cuda if there is one, else cpu; mps only if asked for")

    group = parser.add_argument_group("data")
    group.add_argument("--data", default="cifar10",
        help="training images: a folder, or cifar10, which is downloaded unless "
             "cifar-10-python.tar.gz is in ./data")
    group.add_argument("--test",
        help="held-out images: a folder, or cifar10; for --data cifar10 its own test images")
    group.add_argument("--size", type=int,
        help="width of the images in pixels; a picture is cut to its central square and averaged")
    group.add_argument("--grey", action=boolean,
        help="make the images grey, with one channel instead of three")
    group.add_argument("--flip", action=boolean,
        help="mirror half of the images in training")
    group.add_argument("--conditional", action=boolean, default=False,
        help="learn labels: CIFAR-10's, or the names of the folders in --data; a tenth of them is "
             "hidden in training, for --guidance")
    group.add_argument("--superres", type=int, default=1,
        help="learn images given themselves at 1/N of their width, Section 6.3; 1 gives nothing")
    group.add_argument("--workers", type=int,
        help="processes on each rank that read images; with 0 the training itself reads them")

    group = parser.add_argument_group("method")
    group.add_argument("--path", choices=PATHS, default="ot",
        help="probability path, Section 4.1")
    group.add_argument("--objective", choices=OBJECTIVES, default="velocity",
        help="what is learned, Table 1: velocity is flow matching, noise is DDPM, score and "
             "scoreflow are score matching; noise and score need --path vp or ve, scoreflow vp")
    group.add_argument("--late-times", type=float,
        help="share of the training times that is near the data, t = 1 - u^5 with u uniform in "
             "[0, 1], for better bits per dimension; the other times are uniform")

    group = parser.add_argument_group("network")
    group.add_argument("--channels", type=int,
        help="channels of the UNet at its first level, 48 or more")
    group.add_argument("--channel-mult", type=int, nargs="+",
        help="multiple of --channels at each level; each level has half the width of the last")
    group.add_argument("--num-res-blocks", type=int,
        help="residual blocks at each level")
    group.add_argument("--attention-resolutions", type=int, nargs="*",
        help="widths in pixels at which there is attention")
    group.add_argument("--head-channels", type=int,
        help="channels of each attention head")
    group.add_argument("--dropout", type=float,
        help="share of the activations that dropout zeroes in training")
    group.add_argument("--init",
        help="weights to start from: checkpoint.pt of another run, or adm:FILE of torchcfm")

    group = parser.add_argument_group("training")
    group.add_argument("--batch", type=int,
        help="images in a step, on all ranks together")
    group.add_argument("--steps", type=int,
        help="optimizer steps, with those of the checkpoint")
    group.add_argument("--lr", type=float,
        help="highest learning rate of Adam")
    group.add_argument("--warmup", type=int,
        help="steps in which the learning rate rises to --lr")
    group.add_argument("--decay", choices=["none", "linear"],
        help="linear: after --warmup the learning rate falls to 1e-8 at --steps; none: it stays")
    group.add_argument("--clip", type=float,
        help="largest norm of the gradient; inf does not clip")
    group.add_argument("--ema", type=float,
        help="decay of the averaged weights at each step; 0 does not average")
    group.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
        help="bf16 trains under autocast, fp32 with TF32 where the GPU has it")
    group.add_argument("--compile", action=boolean, default=False,
        help="train with torch.compile; without effect on --sample and --bpd")
    group.add_argument("--log-every", type=int, default=100,
        help="steps from one line of progress to the next")
    group.add_argument("--save-every", type=int, default=1000,
        help="steps from one checkpoint to the next")
    group.add_argument("--picture-every", type=int,
        help="steps from one picture of samples, by 10 midpoint steps, to the next")

    group = parser.add_argument_group("sampling and evaluation")
    group.add_argument("--method", choices=fm.METHODS, default="dopri5",
        help="ODE solver of --sample and --bpd")
    group.add_argument("--tol", type=float, default=1e-5,
        help="relative and absolute tolerance of dopri5; the other methods ignore it")
    group.add_argument("--solver-steps", type=int,
        help="steps of euler (1 network call in each), midpoint (2) or rk4 (4); not for dopri5")
    group.add_argument("--guidance", type=float, default=1.0,
        help="w in v_none + w (v_label - v_none), for samples of labelled runs; it costs two "
             "network calls; 1 is no guidance")
    group.add_argument("--K", type=int, default=1,
        help="draws of the dequantisation noise of each image, Eq. (47)")
    group.add_argument("--probes", type=int, default=1,
        help="Hutchinson probes of each image, Eq. (34); 0 computes the exact trace, which costs "
             "as many products as an image has values")
    group.add_argument("--eval-batch", type=int, default=64,
        help="images at a time on each rank in --sample and --bpd; the noise of --bpd depends on "
             "it")
    # fmt: on

    parser.set_defaults(**MODERN)
    args = parser.parse_args(argv)  # for --out and --recipe, which say where the defaults are
    checkpoint = read_checkpoint(args.out)
    if checkpoint is None:
        parser.set_defaults(**RECIPES[args.recipe])
        return parser.parse_args(argv), None
    parser.set_defaults(**checkpoint["args"])
    args = parser.parse_args(argv)
    recipe = checkpoint["args"]["recipe"]
    if args.recipe != recipe:
        parser.error(f"--recipe is for new runs, and {args.out} was begun with {recipe}")
    return args, checkpoint


# ---- Training ----
def train(args, checkpoint, device):
    """Trains from the checkpoint, or from new weights, until step --steps."""
    images, held_out, classes = load_data(args, checkpoint)
    shown = images if held_out is None else held_out  # what --superres enlarges in pictures
    check_settings(args, checkpoint, images, classes)
    net, average, optimizer, first = initial_state(args, checkpoint, classes, device)
    v, path = field(vars(args), average)
    if args.compile:
        net.compile()
    model = DistributedDataParallel(net) if WORLD > 1 else net
    batches = batch_loader(args, images, first, device)
    check_ranks(first, device)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    print_settings(args, checkpoint, len(images), first)
    allow_tf32(True)
    totals = torch.zeros(2, device=device)  # of loss and gradient norm, since the last log line
    logged = first
    began = time.perf_counter()
    for step, batch in enumerate(batches, first):
        # All that is random in a step is a function of seed, step and rank.
        torch.manual_seed(args.seed + 1000 * (step * WORLD + RANK))
        pixels, labels = to_device(batch, device)
        x1, cond = draw_batch(args, pixels, labels, classes)
        t = draw_times(args, path, len(x1), device)
        with autocast(args, device):
            loss = cfm_loss(model, path, x1, cond=cond, t=t, **OBJECTIVES[args.objective])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, net, args.ema, step)
        totals += torch.stack([loss.detach(), norm])
        # The host waits for a GPU in these three cases alone.
        done = step + 1
        last = done == args.steps
        log = last or done % args.log_every == 0
        save = last or done % args.save_every == 0
        draw = last or done % args.picture_every == 0
        if log or save or draw:
            loss_sum = checked_loss(args, totals, done)
        if log:
            print_progress(args, done, loss_sum / (done - logged), done - first, began)
            totals.zero_()
            logged = done
        if save and RANK == 0:
            save_checkpoint(args, done, len(images), classes, net, average, optimizer)
        if draw and RANK == 0:
            write_picture(args, v, path, classes, shown, done, device)
    print(f"done: {args.out} is at step {max(first, args.steps)}")


def check_numbers(args):
    """Refuses numbers that would be found out late or mean something else."""
    least = {
        "sample": 0,
        "bpd": 0,
        "size": 1,
        "superres": 1,
        "workers": 0,
        "batch": 1,
        "steps": 1,
        "warmup": 0,
        "log_every": 1,
        "save_every": 1,
        "picture_every": 1,
        "eval_batch": 1,
        "K": 1,
        "probes": 0,
    }
    for name, smallest in least.items():
        value = getattr(args, name)
        if value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}; got {value}")
    if not 0 <= args.seed <= 999:
        raise ValueError(f"--seed must lie in 0 to 999, or runs share noise; got {args.seed}")
    if not args.lr > 0:
        raise ValueError(f"--lr must be above 0; got {args.lr}")
    if not args.clip > 0:
        raise ValueError(f"--clip must be above 0, and inf does not clip; got {args.clip}")
    if not 0 <= args.ema < 1:
        raise ValueError(f"--ema must lie in 0 to below 1; got {args.ema}")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout must lie in 0 to below 1; got {args.dropout}")
    if not 0 <= args.late_times < 1:
        raise ValueError(f"--late-times is a share, 0 to below 1; got {args.late_times}")
    if args.size % args.superres != 0:
        raise ValueError(f"--size {args.size} must be a multiple of --superres {args.superres}")
    if args.guidance != 1 and not args.conditional:
        raise ValueError("--guidance needs a run with --conditional")
    if args.method == "dopri5" and args.solver_steps is not None:
        raise ValueError("--solver-steps is for --method euler, midpoint or rk4; dopri5 has --tol")
    if args.method != "dopri5" and args.solver_steps is None:
        raise ValueError(f"--method {args.method} needs --solver-steps")


def check_settings(args, checkpoint, images, classes):
    """Refuses what would be found out late or never."""
    if len(images) < args.batch:
        raise ValueError(f"--data {args.data} has {len(images)} images, fewer than a --batch")
    if args.batch % WORLD != 0:
        raise ValueError(f"--batch {args.batch} must be a multiple of the {WORLD} ranks")
    if args.objective != "velocity" and args.path in ("ot", "cosine"):
        rule = f"--objective {args.objective} tells no velocity at t = 0 of --path {args.path}"
        raise ValueError(f"{rule}, where sampling starts: use --path vp")
    if args.objective == "scoreflow" and args.path != "vp":
        raise ValueError(f"--objective scoreflow has a weight of --path vp, not of {args.path}")
    if checkpoint is not None:
        check_network(args, checkpoint, classes)


def check_network(args, checkpoint, classes):
    """Refuses another network, or one of another meaning, than the checkpoint's."""
    wanted = network_config(args, classes)
    stored = dict(checkpoint["network"])
    for name in MEANING:
        wanted[name] = getattr(args, name)
        stored[name] = checkpoint["args"][name]
    for name, value in wanted.items():
        if value != stored[name]:
            rule = f"{args.out} was trained with {name} {stored[name]}, not {value}"
            raise ValueError(f"{rule}: leave that out, or begin another --out")
    if args.init != checkpoint["args"]["init"]:
        raise ValueError(f"--init is for new runs, and {args.out} has a checkpoint")


def print_settings(args, checkpoint, count, first):
    """The first lines of a training: the settings, and what is not as in the checkpoint."""
    print("  ".join(f"{name}={value}" for name, value in vars(args).items()))
    if checkpoint is not None:
        for name, value in checkpoint["args"].items():
            print_change(name, value, getattr(args, name))
        print_change("images", checkpoint.get("images", count), count)  # version 3.0 had none
        print_change("ranks", checkpoint.get("ranks", WORLD), WORLD)
    print(f"{count:,} images, {WORLD} ranks, from step {first}", flush=True)


def print_change(name, before, now):
    if now != before:
        print(f"changed since the checkpoint: {name} was {before} and is {now}")


def check_ranks(first, device):
    """Refuses ranks that go on from different steps, as on nodes without a common --out."""
    if WORLD > 1:
        steps = torch.tensor([first, -first], device=device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if steps.sum() != 0:
            raise ValueError("the ranks have different checkpoints: give all nodes one --out")


def batch_loader(args, images, first, device):
    """Iterates over pixels and labels of this rank, step by step from `first`."""
    return DataLoader(
        images,
        batch_sampler=step_indices(args, len(images), first),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",  # so that the copy to the GPU does not wait
    )


def to_device(batch, device):
    """Pixels and labels on the device; the host does not wait for a GPU."""
    pixels, labels = batch
    pixels = pixels.to(device, non_blocking=device.type == "cuda")  # from pinned memory
    labels = labels.to(device, non_blocking=device.type == "cuda")
    return pixels, labels


def step_indices(args, count, first):
    """Yields the indices of this rank's images, step by step from `first`.

    An epoch's order is a function of seed and epoch, a step's batch one of seed and step.
    """
    order = None
    for step in range(first, args.steps):
        epoch, number = divmod(step, count // args.batch)
        if order is None or number == 0:
            order = np.random.default_rng([args.seed, epoch]).permutation(count)
        batch = order[number * args.batch : (number + 1) * args.batch]
        yield batch[RANK::WORLD].tolist()


def draw_batch(args, pixels, labels, classes):
    """x1 (B, C, S, S) in [-1, 1) and the conditioning, from uint8 pixels and labels (B,)."""
    if args.flip:
        mirrored = torch.rand((len(pixels), 1, 1, 1), device=pixels.device) < 0.5
        pixels = torch.where(mirrored, pixels.flip(3), pixels)
    # Eq. (36): --bpd measures the density that is trained. The paper does not say what it did.
    x1 = (pixels + torch.rand(pixels.shape, device=pixels.device)) / 128 - 1
    hidden = torch.rand(len(labels), device=labels.device) < 0.1
    labels = labels.masked_fill(hidden, len(classes))  # the label that means none
    return x1, conditions(args, pixels, labels)


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
    share = args.late_times
    if share == 0:
        return times
    # Departure: late times, the paper's are uniform. A batch's times u lie on a grid with a random
    # offset, so that each batch has its share of both kinds.
    end = path.t_span[1]  # every path starts at 0
    u = times / end
    uniform = u / (1 - share)
    late = 1 - ((1 - u) / share) ** 5
    return end * torch.where(u < 1 - share, uniform, late)


def autocast(args, device):
    """The context of the loss: --precision bf16 or none, since MPS in old torch has no autocast."""
    if args.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def learning_rate(args, step):
    """Linear from 1e-8 to --lr, App. E, then constant or down to 1e-8 at the last step."""
    warmup = max(1, args.warmup)
    rise = min(1, (step + 1) / warmup)
    fall = 1
    if args.decay == "linear":
        fall = min(1, (args.steps - 1 - step) / max(1, args.steps - warmup))
    return 1e-8 + (args.lr - 1e-8) * min(rise, fall)


def update_average(average, net, decay, step):
    """Moves the averaged weights towards net's: far at first, by 1 - decay in the end."""
    decay = min(decay, (1 + step) / (10 + step))
    update = get_ema_multi_avg_fn(decay)
    update(list(average.parameters()), list(net.parameters()), None)


def checked_loss(args, totals, step):
    """The sum of the losses since the last log line, a mean over ranks; it waits for a GPU.

    ValueError if a loss or a gradient norm was not finite: then no checkpoint is replaced.
    """
    totals = totals / WORLD
    if WORLD > 1:
        dist.all_reduce(totals)
    loss, norm = totals.tolist()
    if not math.isfinite(loss + norm):
        what = f"loss or gradient norm was not finite in the last steps up to {step}"
        raise ValueError(f"{what}: lower --lr; a checkpoint in {args.out} is from before that")
    return loss


def print_progress(args, step, loss, steps_done, began):
    seconds = (time.perf_counter() - began) / steps_done
    left = timedelta(seconds=round(seconds * (args.steps - step)))
    speed = args.batch / seconds
    line = f"step {step}  loss {loss:.6g}  images/s {speed:.4g}  time left {left}"
    print(line, flush=True)


def allow_tf32(allowed):
    """Sets TF32 and cuDNN's search for fast kernels, which are for training alone.

    Likelihoods, and dopri5 at tight tolerances, would see the rounding.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.benchmark = allowed


# ---- Network and checkpoint ----
def image_channels(args):
    return 1 if args.grey else 3


def network_config(args, classes):
    """The keywords of UNet that the settings ask for."""
    channels = image_channels(args)
    return {
        "image_size": args.size,
        "in_channels": channels,
        "out_channels": channels,
        "channels": args.channels,
        "channel_mult": args.channel_mult,
        "num_res_blocks": args.num_res_blocks,
        "attention_resolutions": args.attention_resolutions,
        "head_channels": args.head_channels,
        "dropout": args.dropout,
        "num_classes": len(classes) or None,
        "concat_channels": channels if args.superres > 1 else 0,
    }


def new_network(args, classes, device):
    """A UNet with new weights, or with those of --init."""
    config = network_config(args, classes)
    torch.manual_seed(args.seed)
    if args.init is None:
        net = UNet(**config)
    elif args.init.startswith("adm:"):
        theirs = load_weights(args.init.removeprefix("adm:"))
        net = UNet.from_adm(theirs, **config)
    else:
        net = network_of_run(args, config)
    return net.to(device)


def network_of_run(args, config):
    """A UNet with the averaged weights of another run, whose checkpoint is --init."""
    other = load_weights(args.init)
    if "args" not in other:
        way_out = f"weights of torchcfm are given as adm:{args.init}"
        raise ValueError(f"--init {args.init} is no checkpoint of train_cifar.py; {way_out}")
    for name in (*MEANING, "head_channels"):  # the weights do not tell these
        theirs = other["args"][name]
        if getattr(args, name) != theirs:
            flag = name.replace("_", "-")
            raise ValueError(f"--init {args.init} was trained with --{flag} {theirs}: say so")
    net = UNet(**config, time_scale=other["network"]["time_scale"])
    try:
        net.load_state_dict(other["average"])
    except RuntimeError:
        rule = f"--init {args.init} has another network than the settings ask for"
        raise ValueError(f"{rule}: it has {other['network']}") from None
    return net


def load_weights(file):
    """What torch.save wrote into a file, on the CPU."""
    try:
        return torch.load(file, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise ValueError(f"--init {file} is no file of weights that torch can load") from None


def stored_network(checkpoint, weights, device):
    """The checkpoint's UNet with its weights "net" or "average"."""
    net = UNet(**checkpoint["network"])
    net.load_state_dict(checkpoint[weights])
    return net.to(device)


def initial_state(args, checkpoint, classes, device):
    """Network, its average, optimizer, and the number of steps that were taken."""
    if checkpoint is None:
        net = new_network(args, classes, device)
        average = copy.deepcopy(net)
        first = 0
    else:
        net = stored_network(checkpoint, "net", device)
        average = stored_network(checkpoint, "average", device)
        first = checkpoint["step"]
    fused = device.type != "mps"  # torch 2.4 has no fused Adam there
    optimizer = torch.optim.Adam(net.parameters(), fused=fused)
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
    return net, average.eval().requires_grad_(False), optimizer, first


def save_checkpoint(args, step, count, classes, net, average, optimizer):
    """Replaces checkpoint.pt at once: whoever kills this finds the old one or the new one."""
    settings = {}
    for name, value in vars(args).items():
        if name not in NOT_OF_THE_RUN:
            settings[name] = value
    state = {
        "step": step,
        "args": settings,
        "images": count,
        "ranks": WORLD,
        "classes": classes,
        "network": net.config,
        "net": net.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    part = Path(args.out, "checkpoint.pt.part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, Path(args.out, "checkpoint.pt"))


def read_checkpoint(out):
    """The checkpoint of a run, on the CPU, or None."""
    file = Path(out, "checkpoint.pt")
    if not file.exists():
        return None
    return torch.load(file, "cpu", weights_only=True)


def load(out, device="cpu"):
    """v, path, net of a run: the field of its averaged weights, and their UNet in eval mode.

    The field is on pixels / 128 - 1, and takes cond of the run: y, concat or none.
    FileNotFoundError if there is no checkpoint.
    """
    checkpoint = read_checkpoint(out)
    if checkpoint is None:
        raise FileNotFoundError(f"{out} has no checkpoint.pt: train first")
    net = stored_network(checkpoint, "average", device).eval().requires_grad_(False)
    v, path = field(checkpoint["args"], net)
    return v, path, net


def field(settings, net):
    """v, path: the velocity field that a network means, by the settings it was trained with."""
    path = PATHS[settings["path"]]()
    return fm.as_velocity(net, path, OBJECTIVES[settings["objective"]]["predict"]), path


# ---- Data ----
def load_data(args, checkpoint):
    """Training images, held-out images or None, and the names of the classes, [] without labels."""
    classes = [] if checkpoint is None else checkpoint["classes"]
    images = load_images(args, args.data, classes, train=True)
    classes = images.classes if args.conditional else []
    return images, load_test(args, classes), classes


def load_test(args, classes):
    """The held-out images, or None."""
    source = args.test
    if source is None and args.data == "cifar10":
        source = "cifar10"
    if source is None:
        return None
    return load_images(args, source, classes, train=False)


def load_images(args, source, classes, train):
    """A Dataset of pixels (C, S, S) uint8 and labels: CIFAR-10 or a folder.

    classes: the names that number the labels; [] takes those of the source.
    """
    to_pixels = partial(read_pixels, size=args.size, grey=args.grey)
    if source != "cifar10":
        return PictureFolder(source, to_pixels, args.conditional, classes)
    if RANK == 0:
        download_cifar10()
    barrier()  # the other ranks wait for the download
    images = CIFAR10("data", train=train, transform=to_pixels)
    if args.conditional and classes and classes != images.classes:
        raise ValueError(f"the classes of CIFAR-10 are not those of training, {classes}")
    return images


def download_cifar10():
    try:
        CIFAR10("data", download=True)
    except (OSError, RuntimeError) as error:
        way_out = "put cifar-10-python.tar.gz into the folder data, or give --data FOLDER"
        raise ValueError(f"CIFAR-10 could not be downloaded ({error}): {way_out}") from None


class PictureFolder(Dataset):
    """The pictures below a folder; with labels the first folder below it names the class."""

    def __init__(self, folder, to_pixels, conditional, classes):
        self.to_pixels = to_pixels
        self.files, names = find_pictures(folder, conditional)
        if len(self.files) == 0:
            raise ValueError(f"{folder} holds no picture that could be read")
        self.classes = []
        self.labels = [0] * len(self.files)
        if conditional:
            found = sorted(set(names))
            self.classes = classes or found
            unknown = set(found) - set(self.classes)
            if unknown:
                raise ValueError(f"{folder} has classes that training had not: {sorted(unknown)}")
            numbers = {name: number for number, name in enumerate(self.classes)}
            self.labels = [numbers[name] for name in names]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        file = self.files[index]
        try:
            with Image.open(file) as image:
                pixels = self.to_pixels(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} cannot be read as a picture: {error}") from None
        return pixels, self.labels[index]


def find_pictures(folder, conditional):
    """Files of the pictures below a folder and, for each, the name of the first folder below it.

    Prints how many files were left out, and why. FileNotFoundError without the folder.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}")
    files = []
    names = []
    left_out = Counter()
    for root, folders, contents in os.walk(folder, onerror=fail, followlinks=True):
        visible = [name for name in folders if not is_hidden(name)]
        left_out["hidden (. or __)"] += len(folders) - len(visible)
        folders[:] = sorted(visible)  # os.walk goes on to these
        first_folder = os.path.relpath(root, folder).split(os.sep)[0]
        for name in sorted(contents):
            suffix = os.path.splitext(name)[1].lower()
            if is_hidden(name):
                left_out["hidden (. or __)"] += 1
            elif suffix not in IMG_EXTENSIONS:
                left_out[f"with suffix {suffix or 'none'}"] += 1
            elif conditional and root == folder:
                left_out["beside the class folders"] += 1
            else:
                files.append(os.path.join(root, name))
                names.append(first_folder)
    reasons = [f"{count} {why}" for why, count in left_out.items() if count > 0]
    if reasons:
        print(f"left out of {folder}: {', '.join(reasons)}", flush=True)
    return files, names


def fail(error):
    """Raises the error of a folder that cannot be read, which os.walk would pass over."""
    raise error


def is_hidden(name):
    """Whether a name is that of a program's own file, as .ipynb_checkpoints and __MACOSX are."""
    return name.startswith((".", "__"))


def read_pixels(image, size, grey):
    """The central square of a PIL image on white, averaged to (C, size, size) uint8."""
    if image.mode in ("I", "F"):
        rule = f"mode {image.mode} has no fixed range of values"
        raise ValueError(f"{rule}: save it as PNG with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        eight_bits = np.round(np.asarray(image) / 257)  # 65535 / 257 = 255
        image = Image.fromarray(eight_bits.astype(np.uint8))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("L" if grey else "RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BOX)
    return pil_to_tensor(image)


def fetch(images, indices, device):
    """Pixels (B, C, S, S) uint8 and labels (B,) of the images with these indices."""
    pixels, labels = default_collate([images[index] for index in indices])
    return pixels.to(device), labels.to(device)


# ---- Sampling and evaluation ----
@torch.no_grad()
def generate(args, v, path, numbers, labels, truth, solver):
    """Samples (B, C, S, S) uint8 of these numbers, functions of seed and number, and NFE (B,).

    labels: (B,), on the device. truth: with --superres the images at full resolution, uint8; the
    samples are then (B, C, S, 3 S), low resolution, sample and truth side by side.
    """
    noise = []
    for number in numbers:
        generator = torch.Generator().manual_seed(args.seed + 1000 * number)
        shape = (1, image_channels(args), args.size, args.size)
        noise.append(path.sample_source(shape, generator=generator))  # on the CPU for all devices
    x0 = torch.cat(noise).to(labels.device)
    cond = conditions(args, truth, labels)
    guided = v
    if args.guidance != 1:
        guided = fm.classifier_free_guidance(v, args.guidance)
    solution = odeint(guided, x0, path.t_span, cond=cond, **solver)
    pixels = to_bytes(solution.x)
    if args.superres > 1:
        pixels = torch.cat([to_bytes(cond["concat"]), pixels, truth], 3)
    return pixels.cpu(), solution.nfe


def to_bytes(x):
    """floor(128 (x + 1)) as uint8, which inverts Eq. (36)."""
    return ((x + 1) * 128).clamp(0, 255).to(torch.uint8)


def labels_and_truth(args, numbers, classes, images, device):
    """The labels (B,) of these samples and, with --superres, the images that they enlarge."""
    if args.superres > 1:
        truth, labels = fetch(images, [number % len(images) for number in numbers], device)
        return labels, truth
    return torch.tensor(numbers, device=device) % max(1, len(classes)), None


def write_picture(args, v, path, classes, images, step, device):
    """samples/step_N.png: eight samples a row, a row for each of at most ten classes."""
    rows = 8
    if classes:
        rows = min(10, len(classes))
    numbers = list(range(8 * rows))
    labels, truth = labels_and_truth(args, numbers, classes, images, device)
    if truth is None:
        labels = torch.arange(8 * rows, device=device) // 8
    solver = {"method": "midpoint", "steps": 10}
    pixels, _ = generate(args, v, path, numbers, labels, truth, solver)
    folder = Path(args.out, "samples")
    folder.mkdir(parents=True, exist_ok=True)
    save_image(pixels / 255, folder / f"step_{step}.png", nrow=8)


def evaluate(args, checkpoint, device):
    """--sample and --bpd with the averaged weights of the checkpoint, or with those of --init."""
    allow_tf32(False)
    if args.bpd > 0 and args.guidance != 1:
        raise ValueError("--guidance is for samples: --bpd evaluates the density without it")
    if checkpoint is not None:
        classes = checkpoint["classes"]
        if args.conditional != bool(classes):
            raise ValueError(f"--conditional is not as {args.out} was trained: leave it out")
        check_network(args, checkpoint, classes)
        net = stored_network(checkpoint, "average", device)
        source = f"step_{checkpoint['step']}"
    elif args.init is not None:
        classes = []
        if args.conditional:
            _, _, classes = load_data(args, None)
        net = new_network(args, classes, device)
        file = Path(args.init.removeprefix("adm:")).resolve()
        source = f"init_{file.parent.name}_{file.stem}"
    else:
        raise ValueError(f"{args.out} has no checkpoint.pt: train first, or give --init")
    v, path = field(vars(args), net.eval().requires_grad_(False))
    held_out = None
    if args.bpd > 0 or args.superres > 1:
        held_out = load_test(args, classes)
        if held_out is None:
            raise ValueError("--bpd and --superres need held-out images: give --test FOLDER")
    if args.sample > 0:
        write_samples(args, v, path, classes, held_out, source, device)
    if args.bpd > 0:
        print_bpd(args, v, path, held_out, source, device)


def solver_keywords(args):
    """What the settings say, as keywords of odeint."""
    if args.method == "dopri5":
        return {"method": "dopri5", "rtol": args.tol, "atol": args.tol}
    return {"method": args.method, "steps": args.solver_steps}


def solver_name(args):
    """The method, with its tolerance or its number of steps."""
    if args.method == "dopri5":
        return f"dopri5_{args.tol:g}"
    return f"{args.method}_{args.solver_steps}"


def write_samples(args, v, path, classes, images, source, device):
    """Writes the samples 0 to N - 1 as PNG files."""
    name = f"{source}_{solver_name(args)}_guidance_{args.guidance:g}_seed_{args.seed}"
    folder = Path(args.out, "samples", name)
    folder.mkdir(parents=True, exist_ok=True)
    for numbers in batches_of_rank(range(args.sample), args.eval_batch):
        labels, truth = labels_and_truth(args, numbers, classes, images, device)
        pixels, nfe = generate(args, v, path, numbers, labels, truth, solver_keywords(args))
        for number, picture in zip(numbers, pixels):
            to_pil_image(picture).save(folder / f"{number:06d}.png")
        done = f"{numbers[-1] + 1} of {args.sample} in {folder}"
        print(f"{done}, NFE {nfe.float().mean():.1f} in this batch", flush=True)
    barrier()
    count = len(list(folder.glob("*.png")))
    if count > args.sample:
        print(f"{folder} holds {count} PNG files, some from an earlier command", flush=True)


def print_bpd(args, v, path, images, source, device):
    """Prints the mean bits per dimension of N held-out images, evenly from all of them."""
    count = min(args.bpd, len(images))
    chosen = [number * len(images) // count for number in range(count)]  # folders go by class
    how = solver_keywords(args)
    how["divergence"] = "exact"
    if args.probes > 0:
        how["divergence"] = "hutchinson"
        how["probes"] = args.probes
    results = torch.zeros(2, count, device=device)  # bits per dimension and network calls
    for numbers in batches_of_rank(range(count), args.eval_batch):
        torch.manual_seed(args.seed + 1000 * numbers[0])
        pixels, labels = fetch(images, [chosen[number] for number in numbers], device)
        cond = conditions(args, pixels, labels)
        result = bits_per_dim(v, path, pixels, K=args.K, cond=cond, **how)
        results[0, numbers] = result.bpd
        results[1, numbers] = result.nfe / args.K
    if WORLD > 1:
        dist.all_reduce(results)
    bpd, nfe = results.cpu()
    error = bpd.std() / math.sqrt(count)
    print(f"{bpd.mean():.4f} +- {error:.4f} bits per dimension, mean and standard error")
    print(f"of {count} held-out images at {source}, NFE {nfe.mean():.1f} by {solver_name(args)}")
    print(f"K = {args.K} draws of noise, {how['divergence']} divergence, {args.probes} probes")
    if args.K > 1 and args.probes > 0:
        print("these bits are biased low: K > 1 averages exponentials of Hutchinson's estimates")
    if args.method != "dopri5":
        print("caution: bits from few fixed steps may be far too low or too high; use dopri5")


def batches_of_rank(numbers, size):
    """This rank's share of the numbers, in lists of at most that size."""
    numbers = list(numbers)
    batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return batches[RANK::WORLD]


# ---- The program, on each rank ----
def barrier():
    """Waits until all ranks are here."""
    if WORLD > 1:
        dist.barrier()


def start_device(args):
    """The device of this rank, which joins the others."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch finds no GPU of Apple")
    if name == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise ValueError("there are fewer GPUs than ranks: lower --nproc_per_node")
        torch.cuda.set_device(local_rank)
    if WORLD > 1:
        backend = "nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download, draw
    return torch.device(name)


def main(argv=None):
    args, checkpoint = parse_args(argv)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    try:
        device = start_device(args)
        check_numbers(args)
        if args.sample > 0 or args.bpd > 0:
            evaluate(args, checkpoint, device)
        else:
            train(args, checkpoint, device)
    except KeyboardInterrupt:
        checkpoint = read_checkpoint(args.out)
        if checkpoint is None:
            print(f"stopped; {args.out} has no checkpoint yet", flush=True)
        else:
            print(f"stopped; {args.out} is saved at step {checkpoint['step']}", flush=True)
        sys.exit(130)
    except (ValueError, OSError, fm.SolverError) as error:
        lines = (str(error) or repr(error)).splitlines()
        # The last line is the cause: a worker of DataLoader puts its traceback before it.
        sys.exit(f"train_cifar.py: error: {lines[-1]}")
    barrier()  # nobody leaves before the others
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
