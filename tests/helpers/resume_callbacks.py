"""What the killed runs of test_resume.py carry: a log of every batch, and the fault that strikes."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import threading
import time

from lightning.pytorch import Callback


class StepLog(Callback):
    """Appends a line to `steps-<rank>.jsonl` for every batch: its place, its digest, the exact loss."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        tokens = batch["tokens"].cpu().numpy()
        line = {
            "batch": trainer.fit_loop.epoch_loop.total_batch_idx,
            "epoch": trainer.current_epoch,
            "sha": hashlib.sha256(tokens.tobytes()).hexdigest(),
            "loss": outputs["loss"].item().hex(),
        }
        with open(f"steps-{trainer.global_rank}.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")


class Fault(Callback):
    """Strikes once, as the environment variable FAULT says: `{"kind": ..., "batch": ..., "hook": ..., "ranks": [...]}`.

    `kind` is the name of a signal, "Ctrl-C twice", "exception", "nan", or one of the ways to fail inside a save. A
    signal goes to this process alone, or with `"group": true` to every process of the run, as from a terminal or a
    scheduler. With `"busy": true` the other ranks are then busy with something else than waiting for these, with
    `"frozen": true` for ever, and no thread of theirs runs. "kill while writing" strikes `delay` seconds after the
    `count`-th time that a file is opened, or renamed to, whose path contains `file`.
    """

    def __init__(self) -> None:
        self.fault = json.loads(os.environ.get("FAULT", "{}"))
        if self.fault.get("kind") == "kill while writing":
            sys.addaudithook(self.watch_files)

    def watch_files(self, event, arguments):
        """Kill this process, and what it started, shortly after it begins to write a file or to give it its name."""
        if event == "open":
            name, begins = arguments[0], isinstance(arguments[1], str) and "r" not in arguments[1]
        elif event == "os.rename":
            name, begins = arguments[1], True
        else:
            return
        if not begins or self.fault["file"] not in str(name):
            return
        self.fault["count"] -= 1
        if self.fault["count"] == 0:
            # another thread may, while this one writes
            threading.Timer(self.fault["delay"], os.kill, (0, signal.SIGKILL)).start()
            if not self.fault["delay"]:
                os.kill(0, signal.SIGKILL)

    def strike(self, trainer, hook, pl_module=None):
        if self.fault.get("hook") != hook or trainer.sanity_checking:
            return
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        if batch != self.fault["batch"]:
            return
        if trainer.global_rank not in self.fault["ranks"]:
            if self.fault.get("busy"):
                time.sleep(60)
            if self.fault.get("frozen"):
                # the end of a child would wake it up
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
                # unlike CDLL it keeps Python's lock
                ctypes.PyDLL(None).sleep(3600)
            return
        if self.fault["kind"] == "Ctrl-C twice":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        if self.fault["kind"] == "exception":
            raise ArithmeticError("a fault of the test")
        if self.fault["kind"] == "nan":
            pl_module.blocks[1].attention.qkv.register_forward_hook(lambda module, args, out: out * float("nan"))
        else:
            receiver = 0 if self.fault.get("group") else os.getpid()
            os.kill(receiver, getattr(signal, self.fault["kind"]))

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.strike(trainer, "start", pl_module)

    def on_before_backward(self, trainer, *_):
        self.strike(trainer, "backward")

    def on_train_batch_end(self, trainer, *_):
        self.strike(trainer, "end")

    def on_validation_start(self, trainer, *_):
        self.strike(trainer, "validation")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            self.strike(trainer, "validation batch")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        kind = self.fault.get("kind")
        is_now = trainer.fit_loop.epoch_loop.total_batch_idx >= self.fault.get("batch", 0)
        if kind == "kill in the file" and is_now:
            checkpoint["bomb"] = Bomb()
        elif kind == "kill before the rename" and is_now:
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "disk full" and is_now:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


class Bomb:
    """Kills the process that pickles it."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)
        return (str, ())


class Planted:
    """Makes a file when it is unpickled as code."""

    def __reduce__(self):
        return (os.mkdir, ("planted",))
