"""Writes what lies beside it; run once, with version 0.1.0 of this package, in an empty folder given as argument.

A text, a recipe, the data that it prepares, a checkpoint of the Lighthouse phase, and what the finished run left.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path

from lightning_lighthouse.cli import main

folder = Path(sys.argv[1])
shutil.copy(Path(__file__).parent / "recipe.yaml", folder)
draw = random.Random(0)
words = ["".join(draw.choices("abcdefgh", k=draw.randrange(2, 8))) for _ in range(40)]
with (folder / "text.jsonl").open("w") as text:
    for _ in range(24):
        text.write(json.dumps({"text": " ".join(draw.choices(words, k=draw.randrange(60, 160)))}) + "\n")
os.chdir(folder)
keeping = {"dirpath": "kept", "every_n_train_steps": "6", "save_top_k": "-1"}
flags = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
for name, value in keeping.items():
    flags += [f"--trainer.callbacks.init_args.{name}", value]
assert main(["fit", "-c", "recipe.yaml", *flags]) == 0
