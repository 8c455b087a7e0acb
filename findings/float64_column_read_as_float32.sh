#!/usr/bin/env bash
# A Hugging Face `datasets` column of type float64 (times of day in seconds, at 50 Hz) and one of
# uint8, read with with_format("numpy").
# Guess: values have the column's type; at least one row and a slice of rows agree.
# Seen:  row 0 gives float64, a slice gives float32 and so does a row that holds a list, with a
#        declared float64 feature too: times 20 ms apart become equal. uint8 turns into int64 in
#        slices (8 times the memory). dtype= given to with_format cures the floats.
# Why:   windows of robot states and simulators' parameters lose digits in the loader, silently.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q datasets==5.2.0 numpy==2.4.6 pyarrow==26.0.1 pandas==3.1.1
HF_HOME="$work/cache" HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import datasets
import numpy as np

print("datasets", datasets.__version__, "numpy", np.__version__)
start = 1.7e9
times = start + np.arange(6) / 50
features = datasets.Features(
    time=datasets.Value("float64"),
    window=datasets.List(datasets.Value("float64"), length=2),
    label=datasets.Value("uint8"),
)
columns = {"time": times, "window": np.stack([times, times + 0.02], 1), "label": [0, 1, 2, 0, 1, 2]}
plain = datasets.Dataset.from_dict(columns, features=features)
rows = plain.with_format("numpy")
one, many = rows[1], rows[1:3]
print("row:  ", {name: str(value.dtype) for name, value in one.items()})
print("slice:", {name: str(value.dtype) for name, value in many.items()})
print("time of row 1 after the start:", one["time"] - start, "as a row,", many["time"][0] - start, "in a slice")
print("steps inside windows:", np.diff(many["window"]).ravel(), "true", np.diff(columns["window"][1:3]).ravel())
assert one["time"].dtype == np.float64 and many["time"].dtype == np.float32
assert one["window"].dtype == many["window"].dtype == np.float32
assert one["label"].dtype == np.uint8 and many["label"].dtype == np.int64
assert np.diff(many["window"]).max() == 0
exact = plain.with_format("numpy", dtype=np.float64)[1:3]
assert np.array_equal(exact["time"], times[1:3])
PY
echo "as found: a float64 column is float64 in one row and float32 in a slice"
