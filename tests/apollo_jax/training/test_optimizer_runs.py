# SPDX-License-Identifier: Apache-2.0
"""Every optimizer on the debug model: it learns, on eight devices as on one, and is saved whole."""

import contextlib
from functools import partial
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_jax import sharding
from apollo_jax.checkpoints import manager
from apollo_jax.checkpoints.manager import Checkpoints
from apollo_jax.config import LearningRates, OptimizerConfig
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import checks, losses, state, step
from apollo_jax.training.optimizer import make_optimizer, make_schedules
from apollo_jax.training.optimizers.schedule_free import gradient_point
from apollo_jax.training.rows import place
from data_pipeline.batch import empty_batch
from data_pipeline.tokenizer import Tokenizer

NAMES = get_args(get_type_hints(OptimizerConfig)["name"])
B, L, STEPS = 8, 32, 10
# (rate, loss after ten steps on one batch, which begins at 6.8)
LEARNS = {
    "adamw": (3e-3, 0.4),
    "adafactor": (3e-3, 2.0),
    "lamb": (2e-2, 0.4),
    "lars": (10.0, 0.2),
    "lion": (1e-3, 2.2),
    "muon": (1e-2, 0.2),
    "schedule_free": (1e-2, 0.2),
    "apollo": (1e-2, 0.2),
    "apollo_mini": (1e-2, 0.2),
}
SMALL = {  # as the debug model is narrow
    "apollo": {"optimizer.apollo.rank": "8", "optimizer.apollo.every": "4"},
    "apollo_mini": {"optimizer.apollo_mini.every": "4"},
    "muon": {"optimizer.muon.dtype": "float32"},  # sums in another order are another bfloat16
}
DEVICES = {"one": MeshConfig(data=1), "eight": MeshConfig(data=1, fsdp=8)}


@pytest.fixture(scope="module")
def meshes():
    return {
        n: sharding.make_mesh(c, jax.devices()[: 8 if n == "eight" else 1])
        for n, c in DEVICES.items()
    }


@pytest.fixture(scope="module")
def batch():
    rng, b = np.random.default_rng(0), empty_batch(B, L, 0, 4, 32)
    b.tokens[:], b.targets[:] = rng.integers(0, 512, (2, B, L))
    b.loss_weights[:] = b.segment_ids[:] = 1
    b.positions[:] = np.arange(L)
    return b


@pytest.fixture(scope="module")
def build(experiment, meshes):
    """build(optimizer's name, devices): the program of that experiment, which trains all."""

    def build(name: str, devices: str) -> step.Program:
        rate = str(LEARNS[name][0])
        constant = {"optimizer.schedule": "constant", "optimizer.warmup_ratio": "0"}
        rates = {f"optimizer.learning_rates.{c}": rate for c in ("connector", "llm")}
        changes = {"optimizer.name": name} | constant | rates | SMALL.get(name, {})
        return step.build(experiment(changes), meshes[devices])

    return build


@pytest.fixture(scope="module")
def gradients(experiment, meshes, batch):
    """gradients(params, frozen, devices): the loss and its gradient; compiled once per mesh."""
    e, trained = experiment(), ("connector", "llm")
    graphdef, _ = state.abstract_model(e.model, e.train, trained, meshes["one"])

    def loss(params: Any, frozen: Any, batch: Any) -> jax.Array:
        sums = step.batch_sums(state.merge(graphdef, params, frozen), batch, e.train)
        return losses.mean(sums)[0]

    compiled = {n: jax.jit(jax.value_and_grad(loss)) for n in meshes}
    placed = {n: place(batch, mesh) for n, mesh in meshes.items()}
    return lambda params, frozen, n: compiled[n](params, frozen, placed[n])


@pytest.fixture(scope="module")
def weights(experiment, build, meshes):
    e, program = experiment(), build("adamw", "one")
    shapes = {**program.abstract.params, **program.abstract.frozen}
    with jax.set_mesh(meshes["one"]):
        return jax.device_get(state.random_weights(e.model, e.train, shapes, 0))


@pytest.fixture(scope="module")
def run(build, gradients, meshes, weights):
    """run(name, devices, steps) -> the program, the state after them and all losses."""

    def run(name: str, devices: str, steps: int):
        program = build(name, devices)
        shapes = {**program.abstract.params, **program.abstract.frozen}
        places = jax.tree.map(lambda s: s.sharding, program.abstract.opt_state)

        @partial(jax.jit, out_shardings=(None, places))
        def update(grads: Any, opt_state: Any, params: Any):
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = program.tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        point = jax.jit(gradient_point)  # many small programs at once can block each other
        seen = []
        with jax.set_mesh(meshes[devices]):
            placed = {n: jax.device_put(w, shapes[n].sharding) for n, w in weights.items()}
            now = state.create(placed, program.abstract, program.tx)
            for _ in range(steps):
                at = point(now.params, now.opt_state)
                value, grads = gradients(at, now.frozen, devices)
                params, opt_state = update(grads, now.opt_state, now.params)
                now = now._replace(params=params, opt_state=opt_state)
                seen.append(float(value))
            seen.append(float(gradients(now.params, now.frozen, devices)[0]))
        return program, now, seen

    return run


@pytest.fixture(scope="module", params=NAMES)
def learned(run, request):
    """(name, program, state, losses) after ten steps on eight devices."""
    return request.param, *run(request.param, "eight", STEPS)


def test_learns(learned):
    name, _, _, seen = learned
    assert seen[0] > 6.5
    assert seen[-1] < LEARNS[name][1]


def test_eight_devices_are_as_one(learned, run):
    name, _, after, seen = learned
    _, _, expected = run(name, "one", 3)
    np.testing.assert_allclose(seen[:3], expected[:3], rtol=1e-5)
    if name != "schedule_free":  # whose fourth loss above is that of the gradient's point
        np.testing.assert_allclose(seen[3], expected[3], rtol=1e-5)
    for x in jax.tree.leaves(after.opt_state):
        if x.nbytes > 4096:  # norms, biases and counts are on every device, as norms themselves
            assert x.nbytes == 8 * x.addressable_shards[0].data.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_is_saved_and_restored_whole(name, meshes, tmp_path):
    rates = LearningRates(llm=1e-3)
    tx = make_optimizer(c := OptimizerConfig(rates, name=name), make_schedules(c, 10))
    mesh, rng = meshes["eight"], np.random.default_rng(0)
    axes = {"llm/layers/q/kernel": P(None, "fsdp", None), "llm/embedding": P(None, "fsdp")}
    shapes = {
        n: jax.ShapeDtypeStruct(
            (40, 64, 32)[-len(p) :], jnp.float32, sharding=NamedSharding(mesh, p)
        )
        for n, p in axes.items()
    }
    abstract = state.abstract_state(shapes, ("llm",), tx, mesh)

    def draw(s: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(jnp.asarray(rng.integers(0, 99, s.shape), s.dtype), s.sharding)

    saved = jax.tree.map(draw, abstract)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(STEPS, saved, {})
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        found = checkpoints.restore(abstract)
    assert found is not None
    restored = found[1].opt_state
    assert jax.tree.structure(restored) == jax.tree.structure(saved.opt_state)
    for ours, theirs in zip(*map(jax.tree.leaves, (restored, saved.opt_state)), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
        assert np.array_equal(ours, theirs)


def test_another_optimizer_does_not_continue_a_run(experiment, tmp_path):
    manager.write_run(tmp_path, experiment(), Tokenizer.from_path(experiment().data.tokenizer))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"optimizer\.name: 'adamw' -> 'lion'"):
        checks.continues(experiment({"optimizer.name": "lion"}), tmp_path)


def test_schedule_free_wants_no_schedule(experiment):
    with pytest.raises(ValueError, match=r"needs config\.optimizer\.schedule=constant"):
        experiment({"optimizer.name": "schedule_free"})
