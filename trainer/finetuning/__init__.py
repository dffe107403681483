"""Fine-tuning on users' own tasks: from weights and labeled images to scores and masks."""

from typing import TYPE_CHECKING

from store.lazy import lazy_names

if TYPE_CHECKING:
    from trainer.finetuning.config import FinetuneConfig
    from trainer.finetuning.prediction import predict
    from trainer.finetuning.session import FinetuneSummary, finetune
    from trainer.finetuning.task import Case, Task, load_task

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
        "prediction": ("predict",),
        "session": ("FinetuneSummary", "finetune"),
        "task": ("Case", "Task", "load_task"),
    },
)
