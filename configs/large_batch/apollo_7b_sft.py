# SPDX-License-Identifier: Apache-2.0
"""Apollo-7B's last stage at many times the published batch: `:lamb8`, `:muon8`, `:muon64`.

The recipe of configs/apollo_7b.py:sft with as many samples, in fewer and larger updates: the batch
doubles until it is 8 or 64 times the published one, rates follow its square root from the published
batch on, and the schedule counts samples, so that its shape is that of the published run. The
optimizers are those made for large batches. `:muon8,v5p-128` takes the layout that the published
batch has on a slice, whose rows are the microbatch; the sums of gradients (float32, cut as the
parameters are) lie beside it. All of it is our choice: nobody has published Apollo at these sizes.
Before a run, ask `apollo-jax critical-batch` whether the batch is worth its samples.
"""

from dataclasses import replace
from pathlib import Path

from ml_collections import ConfigDict

from apollo_jax.config import Experiment, LearningRates, load_module, to_config
from apollo_jax.config_values import from_dict

# LAMB's rates are relative to the weights' norms, Muon's (scale=rms) are as AdamW's.
RECIPES = {
    "lamb8": ("lamb", 8, LearningRates(connector=1e-3, llm=1e-4)),
    "muon8": ("muon", 8, None),
    "muon64": ("muon", 64, None),
}
SHARE = 0.05  # of the samples at each size of the ramp before the last
PUBLISHED = load_module(Path(__file__).parents[1] / "apollo_7b.py")
# The rows of a slice are the microbatch. The programs of `muon64` are those of `muon8`; `lamb8`
# has AdamW's moments in place of Muon's.
SLICES = {"muon8": PUBLISHED.SLICES["sft"]}


def get_config(arg: str = "muon8") -> ConfigDict:
    """The experiment of one recipe, or of one recipe on one slice: "muon8,v5p-128"."""
    name, comma, slice_name = arg.partition(",")
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise ValueError(f"configs/large_batch/apollo_7b_sft.py has no {name!r}; known: {known}")
    optimizer, most, rates = RECIPES[name]
    config = PUBLISHED.get_config(f"sft{comma}{slice_name}").to_dict()
    plain = from_dict(Experiment, config)
    ramp, steps = doubling(plain.train.num_steps, most)
    return to_config(
        replace(
            plain,
            name=f"apollo-7b-sft-{name}",
            train=replace(plain.train, num_steps=steps, batch_ramp=ramp, noise_scale=True),
            optimizer=replace(
                plain.optimizer,
                name=optimizer,
                learning_rates=rates or plain.optimizer.learning_rates,
                schedule_by="samples",
                rate_rule="sqrt",
                base_batch=plain.data.batch_size,
            ),
        )
    )


def doubling(microbatches: int, most: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """A ramp 1, 2, 4, .. `most`, and the updates in which it takes that many microbatches."""
    pieces, done, taken, count = [], 0, 0, 1
    while count < most:
        pieces.append((done, count))
        updates = round(SHARE * microbatches / count)
        done, taken, count = done + updates, taken + updates * count, 2 * count
    return (*pieces, (done, most)), done + (microbatches - taken) // most
