"""Class heads (MaskFormer, sec. 3.2): query states (B, Q, C) -> logits (B, Q, K + 1), the last for "no object"."""

from torch import Tensor, nn


class LinearClassHead(nn.Module):
    """One linear layer, as in MaskFormer and DETR."""

    def __init__(self, dim: int, *, num_labels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(dim, num_labels + 1)

    def forward(self, states: Tensor) -> Tensor:
        return self.projection(states)
