#!/usr/bin/env bash
# Brownian motion (drift 0, diffusion 1) from torchsde and diffrax, steps of 0.25, outputs asked
# for at t = 0.05, 0.1, 0.3 and 1. The variance at t must be t.
# Guess: both know w(t) at any t, so outputs are steps of their own or points of a bridge.
# Seen:  outputs lie on the chord of the step around them: variance 0.01 at 0.05 and 0.04 at 0.1.
# Why:   snapshots of a sampler's SDE, or simulated training paths, are too narrow by up to t / dt,
#        although the end is right, so that a look at the samples at t = 1 does not show it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 torchsde==0.2.6 diffrax==0.7.2 jax==0.10.2 \
    jaxlib==0.10.2 equinox==0.13.8 numpy==2.4.6 scipy==1.17.1
"$work/env/bin/python" - <<'PY'
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchsde

print("torch", torch.__version__, "torchsde", torchsde.__version__, "diffrax", diffrax.__version__)
np.random.seed(0)  # torchsde's noise follows it
times = [0.05, 0.1, 0.3, 1.0]


class Brownian(torch.nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, y):
        return torch.zeros_like(y)

    def g(self, t, y):
        return torch.ones_like(y)


def path(key):
    noise = diffrax.VirtualBrownianTree(0, 1, tol=1e-3, shape=(), key=key)
    term = diffrax.ControlTerm(lambda t, y, args: 1.0, noise)
    save = diffrax.SaveAt(ts=jnp.array(times))
    return diffrax.diffeqsolve(term, diffrax.Euler(), 0, 1, 0.25, 0.0, saveat=save).ys


seen = {}
for method in ("euler", "srk"):
    ys = torchsde.sdeint(Brownian(), torch.zeros(20000, 1), torch.tensor([0.0] + times), method=method, dt=0.25)
    seen["torchsde " + method] = ys[1:].var(dim=(1, 2)).tolist()
seen["diffrax Euler"] = np.asarray(jax.vmap(path)(jax.random.split(jax.random.key(0), 20000))).var(0).tolist()
for name, variance in seen.items():
    print(name, [f"t={t}: {v:.3f}" for t, v in zip(times, variance)])
    assert abs(variance[0] - 0.01) < 0.002 and abs(variance[1] - 0.04) < 0.004
    assert abs(variance[3] - 1) < 0.06
PY
echo "as found: outputs between steps have a fifth (t = 0.05) and two fifths (t = 0.1) of their variance"
