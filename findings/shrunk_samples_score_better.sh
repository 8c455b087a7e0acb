#!/usr/bin/env bash
# Precision, recall, density and coverage (prdc) of samples in 64 dimensions, k = 3.
# Guess: new draws from the data's own law score about 0.95, and samples shrunk to 0.8 of the
#        right standard deviation pay for it in coverage.
# Seen:  the perfect sampler gets precision 0.6 and coverage 0.88; the shrunk one gets precision
#        above 0.99, density above 10 and coverage 1.00. Of the four only recall falls.
# Why:   few solver steps or strong guidance shrink samples; three of four figures then go UP.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q prdc==0.2 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 joblib==1.6.0
"$work/env/bin/python" - <<'PY'
import importlib.metadata
import numpy as np
import prdc

print("prdc", importlib.metadata.version("prdc"), "numpy", np.__version__)
names = ["precision", "recall", "density", "coverage"]
rng = np.random.default_rng(0)
data = rng.normal(size=(2000, 64))
fresh = rng.normal(size=(2000, 64))
scores = {}
for std in (1.0, 0.9, 0.8):
    found = prdc.compute_prdc(real_features=data, fake_features=std * fresh, nearest_k=3)
    scores[std] = [float(found[name]) for name in names]
    print(f"std {std}:", *(f"{name} {value:.3f}" for name, value in zip(names, scores[std])))
perfect, shrunk = scores[1.0], scores[0.8]
assert 0.5 < perfect[0] < 0.7 and 0.5 < perfect[1] < 0.7
assert shrunk[0] > 0.99 and shrunk[2] > 8 and shrunk[3] > 0.99
assert perfect[3] < 0.92 and shrunk[1] < 0.1
PY
echo "as found: samples with 0.8 of the right spread beat a perfect sampler in precision, density and coverage"
