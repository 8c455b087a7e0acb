#!/usr/bin/env bash
# torch.nn.TransformerEncoderLayer, a batch in which one row is all padding (src_key_padding_mask
# all True): a graph without nodes, or a row that fills the last batch up.
# Guess: the same weights treat that row alike in training and in eval: finite in both or NaN in both.
# Seen:  finite in training and in eval with gradients; NaN in eval under no_grad, that is in
#        sampling only. An encoder of such layers gives 0 there, with norm_first NaN again.
# Why:   a mean over real nodes, (x * mask).sum() / mask.sum(), keeps the NaN (NaN * 0), so that a
#        training that never saw one ends in a sampler that gives nothing else.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$work/env/bin/python" - <<'PY'
import warnings
import torch
from torch import nn

warnings.simplefilter("ignore")
print("torch", torch.__version__)
torch.manual_seed(0)
x = torch.randn(3, 4, 8)
padding = torch.arange(4) >= torch.tensor([[3], [2], [0]])


def layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)


def last_row(net, dtype):
    net = net.to(dtype)
    outputs = [net.train()(x.to(dtype), src_key_padding_mask=padding)]
    outputs.append(net.eval()(x.to(dtype), src_key_padding_mask=padding))
    with torch.no_grad():
        outputs.append(net(x.to(dtype), src_key_padding_mask=padding))
    others = [bool(out[:2][~padding[:2]].isfinite().all()) for out in outputs]
    assert all(others), "rows with something in them are finite everywhere"
    return ["finite" if out[2].isfinite().all() else "NaN" for out in outputs], outputs[2][2]


for dtype in (torch.float32, torch.bfloat16):
    for name, net in {
        "layer": layer(),
        "encoder": nn.TransformerEncoder(layer(), 2),
        "encoder, norm_first": nn.TransformerEncoder(layer(norm_first=True), 2),
    }.items():
        states, sampled = last_row(net, dtype)
        print(dtype, name, "- train, eval, eval under no_grad:", states)
        if name == "encoder":
            assert states == ["finite"] * 3 and bool((sampled == 0).all())
        else:
            assert states == ["finite", "finite", "NaN"]
PY
echo "as found: a row of padding is finite while training and NaN under no_grad"
