"""Layer-wise learning-rate decay of a backbone with stages: the further from its output, the lower the rate.

The rate of a block is `layer_decay` times that of the block after it (ELECTRA, Clark et al. 2020; for images BEiT, Bao
et al. 2021). Depths are read from parameter names of ResNet, Swin, ConvNeXt and PVTv2, in transformers and in timm.
"""

import re
from collections.abc import Iterable

# `encoder.stages.1.layers.0.`, `encoder.layers.1.blocks.0.`, and timm's `stages_1.blocks.0.` and `layer1.0.`
STAGE = re.compile(
    r"(?:^|\.)(?:encoder\.(?:stages|layers)\.|stages_|layers_|layer(?=\d))(?P<stage>\d+)\."
    r"(?:(?:layers|blocks)\.)?(?:(?P<block>\d+)\.)?"
)
STEM = re.compile(r"(?:^|\.)(?:embedder|embeddings|patch_embed|stem_\d+|conv1|bn1)\.")
OUTPUT_NORM = re.compile(r"(?:^|\.)(?:hidden_states_norms|layernorm|norm)\.")
# In a stage but in no block of it: these come after the blocks, anything else before them.
AFTER_BLOCKS = re.compile(r"encoder\.layers\.\d+\.(?:downsample|layer_norm)\.|stages_\d+\.norm\.")


def layer_scales(names: Iterable[str], layer_decay: float) -> dict[str, float]:
    """What the learning rate of each backbone parameter in `names` is multiplied by.

    1 for norms of the output, `layer_decay` for the last block, its square for the block before, ..., and the smallest
    factor for the stem. What stands between two stages goes with the block of its own stage that is next to it.

    Raises:
        ValueError: the depth of a parameter cannot be told from its name.
    """
    names = list(names)
    found = {name: STAGE.search(name) for name in names}
    blocks = sorted({(int(m["stage"]), int(m["block"])) for m in found.values() if m and m["block"] is not None})
    depths = {block: depth for depth, block in enumerate(blocks, start=1)}
    return {name: layer_decay ** (len(blocks) + 1 - depth_of(name, found[name], depths)) for name in names}


def depth_of(name: str, match: re.Match[str] | None, depths: dict[tuple[int, int], int]) -> int:
    """0 for the stem, then the blocks from 1, then norms of the output."""
    if depths and match is not None:
        of_stage = [depth for (stage, _), depth in depths.items() if stage == int(match["stage"])]
        if match["block"] is not None:
            return depths[int(match["stage"]), int(match["block"])]
        if of_stage:
            return max(of_stage) if AFTER_BLOCKS.search(name) else min(of_stage)
    elif depths and STEM.search(name):
        return 0
    elif depths and OUTPUT_NORM.search(name):
        return len(depths) + 1
    raise ValueError(
        f"layer_decay: the depth of the backbone's parameter {name} cannot be told from its name; it is known for "
        "ResNet, Swin, ConvNeXt and PVTv2. Leave layer_decay out for other backbones."
    )
