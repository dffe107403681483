"""Store -> weights: pretraining, fine-tuning, comparison. PyTorch; neither Dask nor FAISS."""

from typing import TYPE_CHECKING

from store.lazy import lazy_names

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.data.dataset import Batch, PatchDataset
    from trainer.errors import TrainError
    from trainer.events import (
        Ended,
        Event,
        Noticed,
        Saved,
        Started,
        Stepped,
        TrainSummary,
        Validated,
    )
    from trainer.export import export_weights
    from trainer.interrupt import Interrupted
    from trainer.nets.pretraining import Output, PretrainingNet
    from trainer.nets.resenc import ResEncEncoder, ResEncUNet
    from trainer.nets.unet import Encoder3D, UNet3D
    from trainer.pretexts import Example, Pretext, perturb
    from trainer.pretraining import pretrain
    from trainer.weights import (
        KeyReport,
        Weights,
        load_encoder,
        load_unet,
        load_weights,
        read_weights,
    )

__version__: str

__all__ = [
    "Batch",
    "Encoder3D",
    "Ended",
    "Event",
    "Example",
    "Interrupted",
    "KeyReport",
    "Noticed",
    "Output",
    "PatchDataset",
    "Pretext",
    "PretrainingNet",
    "ResEncEncoder",
    "ResEncUNet",
    "Saved",
    "Started",
    "Stepped",
    "TrainConfig",
    "TrainError",
    "TrainSummary",
    "UNet3D",
    "Validated",
    "Weights",
    "export_weights",
    "load_encoder",
    "load_unet",
    "load_weights",
    "perturb",
    "pretrain",
    "read_weights",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "config": ("TrainConfig",),
        "data.dataset": ("Batch", "PatchDataset"),
        "errors": ("TrainError",),
        "events": (
            "Ended",
            "Event",
            "Noticed",
            "Saved",
            "Started",
            "Stepped",
            "TrainSummary",
            "Validated",
        ),
        "export": ("export_weights",),
        "interrupt": ("Interrupted",),
        "nets.pretraining": ("Output", "PretrainingNet"),
        "nets.resenc": ("ResEncEncoder", "ResEncUNet"),
        "nets.unet": ("Encoder3D", "UNet3D"),
        "pretexts": ("Example", "Pretext", "perturb"),
        "pretraining": ("pretrain",),
        "weights": (
            "KeyReport",
            "Weights",
            "load_encoder",
            "load_unet",
            "load_weights",
            "read_weights",
        ),
    },
)
