# SPDX-License-Identifier: Apache-2.0
"""Qwen2 against transformers on random weights, both ways through save_pretrained."""

import jax
import numpy as np
import pytest
from flax import nnx

import apollo_jax
from apollo_jax.models import apollo, qwen2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
KINDS = {
    "tied, grouped heads": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "untied, one kv head": dict(num_key_value_heads=1, tie_word_embeddings=False, rope_theta=5e5),
    "untied, all heads (Qwen1.5)": dict(
        num_key_value_heads=4, tie_word_embeddings=False, rope_theta=5e6
    ),
}


@pytest.fixture(params=KINDS)
def theirs(request):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        **KINDS[request.param],
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():  # zero biases and unit gains would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model, tokens):
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state):
        llm = nnx.merge(graphdef, state)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        hidden, _ = llm(llm.embed(tokens), positions=positions)
        return llm.unembed(hidden)

    return np.asarray(forward(state))


def test_logits_and_the_way_back(theirs, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 97, (2, 11), np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = apollo_jax.from_pretrained(tmp_path / "theirs")
    error = np.abs(logits(ours, tokens) - expected) / np.maximum(1, np.abs(expected))
    assert error.max() <= TOLERANCE

    apollo_jax.save_pretrained(ours, tmp_path / "ours", max_shard_size="1GB")
    back, info = transformers.Qwen2ForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_fresh_decoder_loads_in_transformers(tmp_path):
    config = apollo.Config.debug(vocab_size=64).llm
    llm = qwen2.Qwen2(config, rngs=nnx.Rngs(0))
    apollo_jax.save_pretrained(llm, tmp_path / "out")
    theirs, info = transformers.Qwen2ForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits(llm, tokens), expected, atol=TOLERANCE, rtol=TOLERANCE)
