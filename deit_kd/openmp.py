"""Settings that OpenMP reads when torch loads it: imported first in the package, for its side effect."""

import os

# GNU's OpenMP lets a thread that is done spin for 300,000 rounds before it sleeps: with workers on the same cores, that
# is time that they could use. A tenth is still long enough for the next operation to find the thread awake, and a
# three-hundredth is not: a DeiT-Ti step on two cores does 202, 201 and 169 images/s, the loop with a label store
# 180, 188 and 157 (docs/evidence/performance.md). A value set by the user is not changed.
SPIN_COUNT = "30000"

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
