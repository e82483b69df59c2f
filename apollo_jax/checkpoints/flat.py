# SPDX-License-Identifier: Apache-2.0
"""Apollo as its training code saves it: one flat set of tensors beside the root config.json.

    [model.]vision_tower.TOWER.vision_tower.<a tower's names>
    [model.]mm_connector.<the connector's>, [model.]llm.<the decoder's>
    lm_head.weight                                   never loaded nor used by the published code

What each part is, the folders of the published layout say if they are there, else the root config.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apollo_jax.checkpoints import companions, safetensors
from apollo_jax.checkpoints.checkpoint import Use
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.rules.table import misfit

WEIGHTS = (safetensors.SINGLE, safetensors.INDEX, "pytorch_model.bin")  # one of them, in the root
FIELDS = {layout.TOWERS: "vision_tower_cfg", layout.CONNECTOR: "mm_connector_cfg"}
FIELDS |= {layout.LLM: "llm_cfg"}
DECODERS = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
DECODERS |= {"merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"}
DEAD_HEAD = "the head of the whole, which the published code neither loads nor uses"


def is_flat(folder: Path) -> bool:
    """Whether weights lie beside the config.json, not in folders of the parts."""
    return any((folder / name).is_file() for name in WEIGHTS)


def read(root: Path, folder: Path) -> companions.Files:
    """The files of the part whose published folder would be `folder`, in `root`.

    Raises ValueError if neither that folder nor the root config tells what the part is.
    """
    if folder == root or (folder / companions.CONFIG).is_file():
        return companions.read(folder)
    name = folder.relative_to(root).as_posix()
    beside = companions.read(root)
    said = companions.parse(beside, companions.CONFIG, root)
    part, _, tower = name.partition("/")
    fields = said.get(FIELDS[part])
    if tower:
        fields = _below(_below(fields, "configs"), tower)
    if not isinstance(fields, dict) or not fields:
        raise ValueError(
            f"{root / companions.CONFIG} does not say what {name} is "
            f"({FIELDS[part]}{'.configs' * bool(tower)} has nothing of it); put its published "
            f"config.json into {folder}"
        )
    files = {n: file for n, file in beside.items() if n in DECODERS and part == layout.LLM}
    return {**files, companions.CONFIG: companions.dump(fields)}


def outside(root: Path) -> companions.Files:
    """The files of the published layout that belong to none of its parts."""
    belongs = DECODERS if not (root / layout.LLM / companions.CONFIG).is_file() else set()
    files = companions.read(root)
    files = {n: file for n, file in files.items() if n not in {safetensors.INDEX, *belongs}}
    towers = read(root, root / layout.TOWERS)
    return files | {f"{layout.TOWERS}/{name}": file for name, file in towers.items()}


def _below(content: Any, name: str) -> Any:
    return content.get(name) if isinstance(content, dict) else None


def split(
    found: Mapping[str, Any], towers: list[str], where: str
) -> tuple[dict[str, dict[str, str]], list[Use]]:
    """Folder of a part -> {its name of a tensor: the flat name}, and what is passed over.

    Raises ValueError naming the tensors that belong to no part, or to one twice.
    """
    stems = {f"vision_tower.{name}.vision_tower.": f"{layout.TOWERS}/{name}" for name in towers}
    stems |= {"mm_connector.": layout.CONNECTOR, "llm.": layout.LLM}
    pattern = re.compile(rf"(?:model\.)?({'|'.join(map(re.escape, stems))})(.+)")
    parts: dict[str, dict[str, str]] = {folder: {} for folder in stems.values()}
    ignored, unknown = [], []
    for name in found:
        match = pattern.fullmatch(name)
        if name == "lm_head.weight":
            ignored.append(Use(name, ignored=DEAD_HEAD))
        elif match and match[2] not in parts[stems[match[1]]]:
            parts[stems[match[1]]][match[2]] = name
        else:
            unknown.append(name)
    misfit(where, unknown=unknown, missing=[])
    return parts, ignored
