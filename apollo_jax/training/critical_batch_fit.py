# SPDX-License-Identifier: Apache-2.0
"""A curve through the losses of forks, and the critical batch B_crit that it has.

The best update from B rows makes 1 / (1 + B_crit / B) of the progress of one from all the data
(McCandlish et al. 2018, arXiv 1812.06162, Section 2.2). A window of E rows has E / B updates, which
together make E / (B + B_crit) of it. With P for the progress of very small batches:

    loss(B) = L0 - P / (1 + B / B_crit)

n forks, K blocks of a tail, G candidates for B_crit.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

LEAST = 4  # forks, and blocks: the curve has three unknowns, a spread takes a few
BLOCKS = 16  # of a tail at most: few and long ones, since updates in a row are not independent
REACH = 100  # times the smallest and largest batch, between which B_crit is looked for
_95 = 3.84  # quantile of chi squared with one degree of freedom


def fit(
    rows: Float[np.ndarray, "n"], losses: Float[np.ndarray, "n"], tails: Float[np.ndarray, "n k"]
) -> dict[str, Any]:
    """B_crit (`rows`) and about 95 % certainty (`low`, `high`), or null and the `reason`.

    Args:
      rows: of an update, by fork.
      losses: by fork, finite.
      tails: what they are means of, over blocks of the same rows in all forks.
    """
    if min(tails.shape) < LEAST:
        forks, blocks = tails.shape
        return _not_determined(
            f"it takes {LEAST} forks and {LEAST} updates of their common size in the last part of "
            f"the window, these are {forks} and {blocks}"
        )
    candidates = np.geomspace(rows.min() / REACH, rows.max() * REACH, 5000)
    # For each candidate the other two are linear: least squares, with P at least 0.
    shape = 1 / (1 + rows / candidates[:, None])  # [G, n]
    shape -= shape.mean(axis=1, keepdims=True)
    centred = losses - losses.mean()
    progress = np.maximum(-shape @ centred, 0) / (shape**2).sum(axis=1)
    misfit = ((centred + progress[:, None] * shape) ** 2).sum(axis=1)
    best = misfit.argmin()
    variance = max(_variance(tails), misfit[best] / max(1, len(rows) - 3))
    allowed = candidates[misfit <= misfit[best] + _95 * variance]
    if allowed[0] == candidates[0] or allowed[-1] == candidates[-1]:
        return _not_determined("losses that differ so little, or not as the curve, do not fix it")
    low, middle, high = (float(f"{b:.3g}") for b in (allowed[0], candidates[best], allowed[-1]))
    return {"rows": middle, "low": low, "high": high}


def _variance(tails: Float[np.ndarray, "n k"]) -> float:
    """Of a fork's mean, without what all forks have in common: the rows, which are the same."""
    blocks = np.array_split(tails, min(BLOCKS, tails.shape[1]), axis=1)
    means = np.stack([block.mean(axis=1) for block in blocks], axis=1)
    own = means - means.mean(axis=0)
    forks, count = own.shape
    return float(own.var(axis=1, ddof=1).mean() * forks / (forks - 1) / count)


def _not_determined(reason: str) -> dict[str, Any]:
    return {"rows": None, "reason": reason}
