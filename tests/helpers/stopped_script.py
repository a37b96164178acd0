"""A training in a script of one's own that Ctrl-C or SIGTERM stops: `stopped_script.py SIGNAL`."""

from __future__ import annotations

import os
import signal
import sys

from all_lighthouse import all_lighthouse
from fitting import CONFIG, fit
from lightning.pytorch import Callback

from lightning_lighthouse.runs.checkpoint import Checkpoint


class Stop(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))


callbacks = [all_lighthouse(6, CONFIG), Stop(), Checkpoint("saved", save_last=True)]
fit(".", callbacks, enable_checkpointing=True)
