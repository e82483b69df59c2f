# SPDX-License-Identifier: Apache-2.0
"""The peer: Apollo in eager PyTorch, read from the published folder layout.

SigLIP and Qwen2 are transformers' own modules; InternVideo2, connector and splicing are written as
plain modules with the published parameter names. PyTorch gets the benefit of the doubt: pixels
arrive prepared, blocks and heads that Apollo never uses are not run, attention and AdamW are the
fused ones.

N clips, F frames per clip, I encoder image side, S feature positions, Q visual tokens per clip,
R rows, L tokens, D stream, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]
from transformers import Qwen2ForCausalLM, SiglipVisionModel  # pyright: ignore[reportMissingImports]

IGNORE = -100


class Inputs(NamedTuple):
    """What a PyTorch loader hands over; rows may be packed or hold one sample each."""

    pixels: dict[str, Tensor]  # tower -> f32[N, F, 3, I, I], normalised
    tokens: Tensor  # i64[R, L]
    targets: Tensor  # i64[R, L], already shifted, IGNORE where nothing is learnt
    positions: Tensor  # i64[R, L]
    mask: Tensor  # bool[R, 1, L, L] block-causal, or i64[R, L] 1 on tokens
    is_visual: Tensor  # bool[R, L]
    visual_rows: Tensor  # i64[number of True in is_visual], which of the N*Q visual tokens


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VideoAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(dim), RMSNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (split_heads(a, self.heads) for a in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))


class VideoBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn, self.ls1 = RMSNorm(dim), VideoAttention(dim, heads), LayerScale(dim)
        self.norm2, self.ls2 = RMSNorm(dim), LayerScale(dim)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class InternVideo2(nn.Module):
    """[N, F, 3, I, I] -> [N, D, T, H, W], from the last block but one."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        dim, patch = c["d_model"], (c["tubelet_size"], c["patch_size"], c["patch_size"])
        side = c["img_size"] // c["patch_size"]
        self.grid = (c["num_frames"] // c["tubelet_size"], side, side)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv3d(3, dim, patch, patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * side * side, dim))
        hidden = int(dim * c["mlp_ratio"])
        blocks = [VideoBlock(dim, c["num_heads"], hidden) for _ in range(c["depth"] - 1)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels.transpose(1, 2)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x[:, 1:].transpose(1, 2).unflatten(2, self.grid)


class SigLIP(nn.Module):
    """[N, F, 3, I, I] -> [N, D, F, H, W], hidden_states[-2] of transformers' model."""

    def __init__(self, folder: Path):
        super().__init__()
        model: Any = SiglipVisionModel.from_pretrained(folder)
        model = getattr(model, "vision_model", model)  # transformers 4 keeps it a level deeper
        self.embeddings, self.encoder = model.embeddings, model.encoder
        del self.encoder.layers[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        n, frames = pixels.shape[:2]
        x = self.encoder(inputs_embeds=self.embeddings(pixels.flatten(0, 1))).last_hidden_state
        side = int(x.shape[1] ** 0.5)
        return x.unflatten(0, (n, frames)).permute(0, 3, 1, 2).unflatten(3, (side, side))


class WeightedNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.wheight = nn.Parameter(torch.ones(dim))  # the published spelling

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.wheight


class PerceiverLayer(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        dim, head = c["text_hidden_size"], c["resampler_head_dim"]
        self.heads, self.kv_heads = c["resampler_n_heads"], c["num_key_value_heads"]
        self.input_latents_norm, self.input_context_norm = WeightedNorm(dim), WeightedNorm(dim)
        sizes = dict(q=self.heads * head, k=self.kv_heads * head, v=self.kv_heads * head)
        maps = {f"{n}_proj": nn.Linear(dim, size, bias=False) for n, size in sizes.items()}
        maps["o_proj"] = nn.Linear(self.heads * head, dim, bias=False)
        self.self_attn = nn.ModuleDict(maps)
        self.post_attention_layernorm = WeightedNorm(dim)
        hidden = c["ff_multi"] * dim
        shapes = dict(gate_proj=(dim, hidden), up_proj=(dim, hidden), down_proj=(hidden, dim))
        maps = {name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
        self.mlp = nn.ModuleDict(maps)

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        a, m = self.self_attn, self.mlp
        latents = self.input_latents_norm(z)
        keys = torch.cat([self.input_context_norm(context), latents], dim=1)
        q = split_heads(a["q_proj"](latents), self.heads)
        k, v = (split_heads(a[name](keys), self.kv_heads) for name in ("k_proj", "v_proj"))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        z = z + a["o_proj"](join_heads(out))
        h = self.post_attention_layernorm(z)
        return z + m["down_proj"](F.silu(m["gate_proj"](h)) * m["up_proj"](h))


class Perceiver(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(c["num_output_tokens"], c["text_hidden_size"]))
        self.layers = nn.ModuleList([PerceiverLayer(c) for _ in range(c["resampler_depth"])])
        self.norm = WeightedNorm(c["text_hidden_size"])

    def forward(self, context: Tensor) -> Tensor:
        z = self.latents.expand(context.shape[0], -1, -1)
        for layer in self.layers:
            z = layer(z, context)
        return self.norm(z)


class Connector(nn.Module):
    """[N, S, vision width] -> [N, Q, D]; the mlpNx_gelu projector and the Perceiver."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        dim, depth = c["text_hidden_size"], int(c["projector_type"][3])
        maps: list[nn.Module] = [nn.Linear(c["vision_hidden_size"], dim)]
        for _ in range(depth - 1):
            maps += [nn.GELU(), nn.Linear(dim, dim)]
        self.proj, self.resampler = nn.Sequential(*maps), Perceiver(c)

    def forward(self, features: Tensor) -> Tensor:
        return self.resampler(self.proj(features))


class Apollo(nn.Module):
    """Reads the published folder; its components have the names of ours."""

    def __init__(self, folder: Path):
        super().__init__()
        towers = folder / "vision_tower"
        tower_config = read_config(towers)
        self.grid = tuple(tower_config["token_output_shape"])
        self.vision_tower = nn.ModuleDict(
            {name: read_tower(towers / name) for name in tower_config["vision_towers"]}
        )
        connector = folder / "mm_connector"
        self.connector = load(Connector(read_config(connector)), connector)
        self.llm: Any = Qwen2ForCausalLM.from_pretrained(folder / "llm")

    def encode(self, pixels: dict[str, Tensor]) -> Tensor:
        features = [tower(pixels[name]) for name, tower in self.vision_tower.items()]
        same = [
            f if f.shape[2:] == self.grid else F.interpolate(f, self.grid, mode="trilinear")
            for f in features
        ]
        return self.connector(torch.cat(same, dim=1).flatten(2).transpose(1, 2))

    def forward(self, x: Inputs) -> Tensor:
        """Mean cross-entropy of the targets."""
        visual = self.encode(x.pixels).flatten(0, 1)
        embeds = self.llm.model.embed_tokens(x.tokens)
        embeds = embeds.masked_scatter(x.is_visual[..., None], visual[x.visual_rows])
        logits = self.llm(
            inputs_embeds=embeds,
            attention_mask=x.mask,
            position_ids=x.positions,
            use_cache=False,
        ).logits
        return F.cross_entropy(logits.flatten(0, 1), x.targets.flatten(), ignore_index=IGNORE)


class Trainer:
    """AdamW with one rate per component after a clip by the global norm: one call, one step."""

    def __init__(self, model: Apollo, rates: dict[str, float], clip: float, **adam: Any):
        self.model, self.clip = model.train(), clip
        groups = [
            dict(params=list(getattr(model, name).parameters()), lr=rate)
            for name, rate in rates.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True, **adam)

    def step(self, x: Inputs) -> tuple[float, float]:
        """(loss, gradient norm before clipping)."""
        loss = self.model(x)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, S, heads*H] -> [N, heads, S, H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[N, heads, S, H] -> [N, S, heads*H]."""
    return x.transpose(1, 2).flatten(2)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def read_tower(folder: Path) -> nn.Module:
    config = read_config(folder)
    if config["model_type"] == "internvideo2":
        return load(InternVideo2(config), folder)
    return SigLIP(folder)


def load(module: nn.Module, folder: Path) -> nn.Module:
    """Every parameter of `module` from the folder; published tensors it has no use for stay."""
    found = module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not found.missing_keys, f"{folder} lacks {found.missing_keys}"
    return module
