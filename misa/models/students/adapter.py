"""Layers between the student's dense feature and the distillation loss (§3.2, after MGD, Yang et al. 2022).

They are trained with the student, used only by `distillation_loss`, and not exported.
"""

from torch import Tensor, nn


class Adapter(nn.Module):
    """A 1x1 adaptation to the teacher's channels, then the projector 3x3 – ReLU – 3x3, without MGD's random mask.

    Unlike in MGD, the adaptation is kept if the channels are equal. All three convolutions have a bias and PyTorch's
    initialization.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        if student_channels < 1 or teacher_channels < 1:
            raise ValueError(
                f"Adapter needs one channel or more on both sides: {student_channels} to {teacher_channels}."
            )
        self.adaptation = nn.Conv2d(student_channels, teacher_channels, 1)
        self.projector = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Project the student's feature I (b d h w) to the teacher's feature space (b d' h w)."""
        if features.dim() != 4 or features.shape[1] != self.adaptation.in_channels:
            raise ValueError(
                f"Adapter takes features of shape (b, {self.adaptation.in_channels}, h, w): "
                f"they are {tuple(features.shape)}."
            )
        adapted: Tensor = self.projector(self.adaptation(features))
        return adapted
