"""Made the files of this folder with version 0.1.0, from `recipe.yaml`; later versions only read them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lighthouse import __version__, cli

HERE = Path(__file__).parent
# in the Lighthouse phase, in the second epoch, and not at a validation
STOP = 9
STOPPING = f"--trainer.callbacks=[{{class_path: make.Stop, init_args: {{step: {STOP}}}}}]"


class Stop(Callback):
    """Stops the run as a cluster does, by SIGTERM, during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer, *_):
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def text() -> str:
    """Documents as JSONL."""
    draw = random.Random(1)
    words = ["pool", "score", "select", "gather", "attend", "scatter", "def f(x):\n", "M\u00fcnchen"]
    documents = (" ".join(draw.choices(words, k=draw.randrange(20, 200))) for _ in range(11))
    return "".join(json.dumps({"text": document}) + "\n" for document in documents)


def losses(run: Path) -> dict[int, str]:
    """Every bit of the training losses from the checkpoint on, from the curves."""
    found = {}
    for phase in ("lighthouse", "dense"):
        curves = EventAccumulator(str(run / phase)).Reload()
        found |= {event.step: event.value.hex() for event in curves.Scalars("train/loss") if event.step >= STOP}
    return found


def lighthouse(*arguments: str, status: int = 0) -> None:
    """Run the command."""
    assert cli.main(arguments) == status, arguments


def main() -> None:
    """Prepare, train until a SIGTERM, train to the end, and keep what that left."""
    assert __version__ == "0.1.0", f"these are the files of version 0.1.0, not of {__version__}"
    # for the class path make.Stop
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copy(HERE / "recipe.yaml", ".")
        Path("text.jsonl").write_text(text())
        lighthouse("fit", "-c", "recipe.yaml", STOPPING, status=143)
        run = Path("runs/recipe/version_0")
        shutil.copy(run / "checkpoints/last.ckpt", "stopped.ckpt")
        lighthouse("fit", "-c", "recipe.yaml", "--ckpt_path", "last")
        validations = json.loads((run / "lighthouse.json").read_text())["validations"]
        recorded = {
            "train": losses(run),
            "validation": {validation["step"]: validation["loss"].hex() for validation in validations},
        }
        shutil.rmtree(HERE / "prepared", ignore_errors=True)
        shutil.copytree("prepared", HERE / "prepared")
        for file in ("stopped.ckpt", *(run / name for name in ("config.yaml", "final.pt", "lighthouse.json"))):
            shutil.copy(file, HERE)
        (HERE / "losses.json").write_text(json.dumps(recorded, indent=2) + "\n")
        os.chdir(HERE)


if __name__ == "__main__":
    main()
