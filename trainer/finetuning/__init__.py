"""Fine-tuning on users' own tasks: from weights and labeled images to scores and masks."""

from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.predict import predict
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
