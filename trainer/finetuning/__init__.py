"""Fine-tuning: from weights and labeled images to a net, its test scores, and predictions."""

from typing import TYPE_CHECKING

from store.lazy import lazy_names

if TYPE_CHECKING:
    from trainer.finetuning.config import FinetuneConfig
    from trainer.finetuning.loading import load_task
    from trainer.finetuning.prediction import predict
    from trainer.finetuning.session import FinetuneSummary, finetune
    from trainer.finetuning.task import Case, Task

__all__ = [
    "Case",
    "FinetuneConfig",
    "FinetuneSummary",
    "Task",
    "finetune",
    "load_task",
    "predict",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "config": ("FinetuneConfig",),
        "loading": ("load_task",),
        "prediction": ("predict",),
        "session": ("FinetuneSummary", "finetune"),
        "task": ("Case", "Task"),
    },
)
