"""Weights under the names and in the pieces that a hub's files have, where transformers' modules hold others.

transformers 5 packs the experts of a mixture into one tensor a layer; Mixtral's, Qwen's and OLMoE's files (and vLLM's
loader) have a tensor for each expert and projection. transformers' own table of conversions says which becomes which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def as_on_hub(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One whole weight of a transformers model as the tensors that the hub's files hold for it; views where it can be.

    `name` is the module's own (no adapter's or wrapper's parts). Most weights come back as they are. Also takes
    tensors on the meta device, to learn names and shapes alone.
    """
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
    return converted
