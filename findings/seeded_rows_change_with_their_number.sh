#!/usr/bin/env bash
# torch.manual_seed(0), then torch.randn(n, 2) on the CPU for n = 8, 9, 10: the start of n samples.
# Guess: one generator, numbers drawn in order: the first 8 rows are the same whatever n is.
# Seen:  of the first 8 rows 9 drawn rows share 1 and 10 drawn rows 2. From 16 numbers on, the
#        last 16 are drawn again if their count is no multiple of 16; below 16 all are others.
#        torch.rand keeps its order.
# Why:   "the same seed, one sample more" is another set of samples: comparisons of small batches
#        with a fixed seed, and a last, uneven batch, do not start from the same noise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$work/env/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)


def draw(rows, make=torch.randn):
    torch.manual_seed(0)
    return make(rows, 2)


def kept(rows, make=torch.randn):
    first = min(8, rows)
    return int((draw(rows, make)[:first] == draw(8, make)[:first]).all(1).sum())


found = {rows: kept(rows) for rows in (4, 7, 8, 9, 10, 12, 16, 20, 64)}
print("rows drawn: rows equal to the first of 8 drawn:", found)
assert found[4] == found[7] == 0, "below 16 numbers: other numbers throughout"
assert found[9] == 1 and found[10] == 2 and found[12] == 4
assert found[8] == found[16] == found[20] == found[64] == 8
uniform = {rows: kept(rows, torch.rand) for rows in (4, 7, 9, 10)}
print("the same with torch.rand:", uniform)
assert uniform == {4: 4, 7: 7, 9: 8, 10: 8}
PY
echo "as found: nine seeded rows share one row with eight"
