#!/usr/bin/env bash
# A label for each graph, batched by torch_geometric 2.8.1.
# Guess: one integer a graph comes out of the batch as it went in, whatever its name.
# Seen:  a name that contains "batch" or "index" is taken for one that counts: `batch_effect`
#        0, 1, 0, 1 becomes 0, 2, 3, 5 and `class_index` 0, 1, 2, 0 becomes 0, 6, 10, 12;
#        `to_data_list` undoes it, so that a round trip shows nothing.
# Why:   conditional models of cells and molecules carry such labels (batch effects above all):
#        a condition then depends on a graph's place in its batch. One-hot or float is safe.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 torch_geometric==2.8.1 numpy==2.4.6
"$work/env/bin/python" - <<'PY'
import torch
import torch_geometric
from torch_geometric.data import Batch, Data

print("torch", torch.__version__, "torch_geometric", torch_geometric.__version__)
sizes, effects, classes = [5, 3, 4, 6], [0, 1, 0, 1], [0, 1, 2, 0]
graphs = []
for size, effect, kind in zip(sizes, effects, classes):
    labels = {"batch_effect": effect, "class_index": kind, "effect": effect}
    labels = {name: torch.tensor([value]) for name, value in labels.items()}
    graphs.append(Data(pos=torch.zeros(size, 3), **labels))
batch = Batch.from_data_list(graphs)
for name in ("effect", "batch_effect", "class_index"):
    print(name, [graph[name].item() for graph in graphs], "->", batch[name].tolist())
assert batch.effect.tolist() == effects
assert batch.batch_effect.tolist() == [0, 2, 3, 5]
assert batch.class_index.tolist() == [0, 6, 10, 12]
back = [graph.batch_effect.item() for graph in batch.to_data_list()]
assert back == effects
PY
echo "as found: labels called batch_effect and class_index are shifted by their place in the batch"
