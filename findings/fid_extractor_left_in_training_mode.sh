#!/usr/bin/env bash
# FID of torchmetrics with a feature extractor of one's own (a small net with BatchNorm, as it
# comes out of its training), on grey images of 28 pixels.
# Guess: the metric puts the extractor into eval mode, as it does with its own Inception.
# Seen:  it stays in training mode: each batch is normalised by itself, so that samples at half
#        the contrast score under a thousandth of their true FID, and measuring moves the net.
# Why:   wrong brightness or contrast, a usual fault of samplers, is just what disappears.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
"$work/env/bin/python" - <<'PY'
import copy
import torch
import torchmetrics
from torchmetrics.image.fid import FrechetInceptionDistance

print("torch", torch.__version__, "torchmetrics", torchmetrics.__version__)
torch.manual_seed(0)


class Features(torch.nn.Module):
    num_features = 16

    def __init__(self):
        super().__init__()
        conv, norm = torch.nn.Conv2d(1, 16, 3, 2), torch.nn.BatchNorm2d(16)
        pool = torch.nn.AdaptiveAvgPool2d(1)
        self.layers = torch.nn.Sequential(conv, norm, torch.nn.SiLU(), pool, torch.nn.Flatten())

    def forward(self, x):
        return self.layers(x)


data, samples = torch.rand(1000, 1, 28, 28), 0.5 * torch.rand(1000, 1, 28, 28)
net = Features()
for _ in range(10):  # BatchNorm's statistics are those of the data
    for batch in data.split(100):
        net(batch)
scores = {}
for mode in ("eval", "as trained"):
    extractor = copy.deepcopy(net).train(mode == "as trained")
    before = extractor.layers[1].running_mean.clone()
    fid = FrechetInceptionDistance(feature=extractor, normalize=True)
    for x, y in zip(data.split(100), samples.split(100)):
        fid.update(x, real=True)
        fid.update(y, real=False)
    scores[mode] = fid.compute().item()
    moved = (extractor.layers[1].running_mean - before).abs().max().item()
    print(f"{mode}: FID {scores[mode]:.2e}, training {extractor.training}, mean moved {moved:.2e}")
assert extractor.training and moved > 0.01
assert scores["as trained"] < scores["eval"] / 1000
PY
echo "as found: the extractor stays in training mode and half the contrast goes unseen"
