"""A trainer of nnU-Net for tests: one short epoch, after writing the weights it starts from.

nnU-Net finds it by the environment variable nnUNet_extTrainer, the folder of this file.
"""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class ShortTrainer(nnUNetTrainer):
    """A few iterations, for `nnUNetv2_train ... -tr ShortTrainer`."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 1
        self.num_iterations_per_epoch = int(os.environ.get("SHORT_ITERATIONS", "3"))
        self.num_val_iterations_per_epoch = 1

    def on_train_start(self):
        """Write the net as it is before the first iteration, to loaded.pth in the fold's folder."""
        super().on_train_start()
        torch.save(self.network.state_dict(), os.path.join(self.output_folder, "loaded.pth"))

    def perform_actual_validation(self, save_probabilities=False):
        """Leave out the prediction of all cases, which takes long on a CPU."""
        print("no final validation")
