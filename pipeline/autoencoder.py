"""A small 3-D autoencoder on thumbnails. No skip connections: the latent must carry the scan.

Identity mapping under MSE (the paper, section 2.1). It works on thumbnails averaged over blocks
of 4 x 4 x 4, and its bottleneck is one vector: what two scans share must be in it.
"""

from __future__ import annotations

from torch import Tensor, nn

from store.format import THUMBNAIL_SHAPE

_REDUCTION = 4
_LEVELS = 3
_NORM_GROUPS = 4


class Autoencoder(nn.Module):
    """Reduced thumbnails (n, 1, 16, 32, 32) float32 in [0, 1] -> (n, latent) -> themselves.

    Three strided convolutions bring the grid to (2, 4, 4); one linear layer makes the latent.
    """

    def __init__(self, *, latent: int, width: int) -> None:
        super().__init__()
        self.latent, self.width = latent, width
        widths = [width * 2**level for level in range(_LEVELS)]
        grid = [n // _REDUCTION // 2**_LEVELS for n in THUMBNAIL_SHAPE]
        self._bottom = (widths[-1], *grid)
        numbers = widths[-1] * grid[0] * grid[1] * grid[2]
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for channels_in, channels_out in zip([1, *widths[:-1]], widths, strict=True):
            encoder += [
                nn.Conv3d(channels_in, channels_out, 3, stride=2, padding=1),
                nn.GroupNorm(_NORM_GROUPS, channels_out),
                nn.SiLU(),
            ]
        for channels_in, channels_out in zip(widths[:0:-1], widths[-2::-1], strict=True):
            decoder += [
                nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
                nn.Conv3d(channels_in, channels_out, 3, padding=1),
                nn.GroupNorm(_NORM_GROUPS, channels_out),
                nn.SiLU(),
            ]
        decoder += [
            nn.Conv3d(widths[0], 1, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
        ]
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(numbers, latent))
        self.expand = nn.Linear(latent, numbers)
        self.decoder = nn.Sequential(*decoder)

    @staticmethod
    def reduce(thumbnail: Tensor) -> Tensor:
        """(n, 1, 64, 128, 128) -> (n, 1, 16, 32, 32), block means."""
        return nn.functional.avg_pool3d(thumbnail, _REDUCTION)

    def encode(self, reduced: Tensor) -> Tensor:
        latent: Tensor = self.encoder(reduced)  # (n, latent)
        return latent

    def forward(self, reduced: Tensor) -> Tensor:
        bottom = self.expand(self.encode(reduced)).unflatten(1, self._bottom)  # (n, C, 2, 4, 4)
        restored: Tensor = self.decoder(bottom)
        return restored  # (n, 1, 16, 32, 32)
