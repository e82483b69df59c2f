# SPDX-License-Identifier: Apache-2.0
"""Apollo (arXiv 2412.10360): encode clips, fuse, resample, splice, decode.

B rows, L tokens, N clips, F frames per clip, S canvas side, Q visual tokens per clip, D stream,
V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from apollo_jax.models import connectors, internvideo2, pixels, qwen2, siglip
from apollo_jax.models.pieces import Pieces
from apollo_jax.models.vision_tower import TowerConfig, VisionTower, common_grid
from apollo_jax.sharding import constrain

COMPONENTS = ("vision_tower", "connector", "llm")


def released_towers() -> dict[str, TowerConfig]:
    """The two encoders of the released models, in their channel order."""
    return {
        "siglip-so400m-patch14-384": siglip.Config.so400m_384(),
        "internvideo2": internvideo2.Config.stage2_1b(),
    }


@dataclass(frozen=True)
class Config:
    """A whole Apollo; the connector's vision width and grid follow from the towers."""

    towers: dict[str, TowerConfig] = field(default_factory=released_towers)
    connector: connectors.Config = field(default_factory=connectors.Config)
    llm: qwen2.Config = field(default_factory=qwen2.Config.qwen2p5_3b)
    clip_duration: float = 2.0  # seconds
    frames_per_clip: int = 4

    def __post_init__(self):
        width = sum(t.hidden_size for t in self.towers.values())
        expected = {
            "vision_hidden_size": (self.connector.vision_hidden_size, width),
            "text_hidden_size": (self.connector.text_hidden_size, self.llm.hidden_size),
            "token_input_shape": (
                tuple(self.connector.token_input_shape),
                common_grid(self.towers),
            ),
        }
        wrong = [f"{k} is {a}, the parts give {b}" for k, (a, b) in expected.items() if a != b]
        if wrong:
            raise ValueError(f"connector does not fit its neighbours: {'; '.join(wrong)}")

    def __hash__(self) -> int:
        parts = (tuple(self.towers.items()), self.connector, self.llm)
        return hash((*parts, self.clip_duration, self.frames_per_clip))

    @property
    def frame_size(self) -> int:
        """Side of the canvas that serves every encoder, in pixels."""
        return max(t.frame_spec.side for t in self.towers.values())

    @classmethod
    def _released(cls, llm: qwen2.Config) -> "Config":
        connector = connectors.Config(text_hidden_size=llm.hidden_size)
        return cls(connector=connector, llm=llm)

    @classmethod
    def apollo_1p5b(cls) -> "Config":
        """Apollo-LMMs-Apollo-1_5B-t32."""
        return cls._released(qwen2.Config.qwen2p5_1p5b())

    @classmethod
    def apollo_3b(cls) -> "Config":
        """Apollo-LMMs-Apollo-3B-t32."""
        return cls._released(qwen2.Config.qwen2p5_3b())

    @classmethod
    def apollo_7b(cls) -> "Config":
        """Apollo-LMMs-Apollo-7B-t32."""
        return cls._released(qwen2.Config.qwen2p5_7b())

    @classmethod
    def debug(cls, vocab_size: int = 512) -> "Config":
        """Complete in kind, small in scale: for tests and for the demo's world."""
        return cls(
            towers={
                "siglip": siglip.Config(
                    hidden_size=64,
                    intermediate_size=128,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    image_size=32,
                    patch_size=8,
                ),
                "internvideo2": internvideo2.Config(
                    d_model=64,
                    depth=3,
                    num_heads=4,
                    mlp_ratio=2.0,
                    img_size=32,
                    patch_size=16,  # half SigLIP's grid: interpolated, as in the released models
                    init_values=1.0,  # 1e-5 is for 40 pretrained blocks
                ),
            },
            connector=connectors.Config(
                vision_hidden_size=128,
                text_hidden_size=96,
                token_input_shape=(4, 4, 4),
                projector_type="mlp2x_gelu",
                num_output_tokens=8,
                resampler_depth=2,
                resampler_n_heads=4,
                resampler_head_dim=24,
                num_key_value_heads=2,
                ff_multi=2,
            ),
            llm=qwen2.Config(
                vocab_size=vocab_size,
                hidden_size=96,
                intermediate_size=192,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                rope_theta=1e4,
                max_position_embeddings=1024,
                model_max_length=1024,
                initializer_range=0.1,
            ),
        )


class Apollo(nnx.Module):
    """The video language model; its three components are the attributes named in COMPONENTS."""

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.vision_tower = VisionTower(config.towers, **kw)
        self.connector = connectors.Connector(config.connector, **kw)
        self.llm = qwen2.Qwen2(config.llm, **kw)

    def encode_clips(
        self,
        frames: UInt8[Array, "N F S S 3"] | UInt8[Array, "N F P"],
        geometry: Int[Array, "N 4"],
        *,
        remat: str = "none",
    ) -> Float[Array, "N Q D"]:
        """uint8 canvases of N clips, RGB or planes, to visual tokens (the device pixel path)."""
        frames = pixels.to_rgb(frames, geometry)
        prepared = {
            name: pixels.prepare(frames, geometry, tower.frame_spec)
            for name, tower in self.config.towers.items()
        }
        visual = self.connector(self.vision_tower(prepared, remat=remat), remat=remat)
        return constrain(visual, "clips", None, None)

    def splice(
        self,
        tokens: Int[Array, "B L"],
        visual_tokens: Float[Array, "B M D"] | None,
        visual_index: Int[Array, "B L"] | None,
    ) -> Float[Array, "B L D"]:
        """Token embeddings with row b's visual token visual_index[b, l] wherever that is >= 0."""
        x = self.llm.embed(jnp.maximum(tokens, 0))
        if visual_tokens is None or visual_index is None:
            return x
        # Devices along `context` look up some channels of all visual tokens of their rows: one
        # exchange brings the clips there, another one the positions back.
        visual_tokens = constrain(visual_tokens.astype(x.dtype), "batch", "length", None)
        visual_tokens = constrain(visual_tokens, "batch", None, "lookup")
        index = jnp.maximum(visual_index, 0)[..., None]
        visual = jnp.take_along_axis(visual_tokens, index, axis=1)
        visual = constrain(constrain(visual, "batch", None, "lookup"), "batch", "length", None)
        return jnp.where(visual_index[..., None] >= 0, visual, x)

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        *,
        visual_tokens: Float[Array, "B M D"] | None = None,
        visual_index: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
        remat: str = "none",
        zigzag: bool = False,
        pieces: Pieces | None = None,
    ) -> Float[Array, "B L D"]:
        """The decoder's last normed states, before the head; `zigzag`, `pieces`: see Qwen2."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = constrain(self.splice(tokens, visual_tokens, visual_index), "batch", "length", None)
        x, _ = self.llm(
            x,
            positions=positions,
            segment_ids=segment_ids,
            remat=remat,
            zigzag=zigzag,
            pieces=pieces,
        )
        return x

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        *,
        visual_tokens: Float[Array, "B M D"] | None = None,
        visual_index: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
        remat: str = "none",
    ) -> Float[Array, "B L V"]:
        """Logits in float32.

        Args:
          tokens: ids; negative ids stand where visual tokens go and are ignored there.
          visual_tokens: each row's visual tokens, clip after clip.
          visual_index: which of them stands at a position, -1 for text.
          positions: rotary positions, default 0..L-1.
          segment_ids: attention stays within a segment; default one segment.
        """
        return self.llm.unembed(
            self.hidden(
                tokens,
                visual_tokens=visual_tokens,
                visual_index=visual_index,
                positions=positions,
                segment_ids=segment_ids,
                remat=remat,
            )
        )
