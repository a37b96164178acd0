"""Runs `lighthouse` in processes forked from this one, which has imported everything: a start takes no seconds.

Reads a line of JSON, `{"arguments": [...], "folder": ..., "environment": {...}}`, forks, and answers with the process
id; when that process has ended, with its status as subprocess gives it. Its output goes to `out` and `err` there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import litdata
import torch.utils.tensorboard
from lightning.pytorch import Trainer

from lightning_lighthouse import LighthouseRecipe
from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.cli import fit as cli_lightning
from lightning_lighthouse.model import Decoder

IMPORTED = (litdata, torch.utils.tensorboard, Trainer, LighthouseRecipe, cli_lightning, Decoder)


def run(arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    # a group of its own, for signals that a whole run gets
    os.setpgid(0, 0)
    # also where the tests were started with Ctrl-C ignored, as nohup and & do
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.update(environment)
    for number, name in enumerate(("in", "out", "err")):
        file = os.open(os.devnull if name == "in" else name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    # what Lightning starts the other ranks with
    sys.argv = [str(Path(cli.__file__).with_name("__main__.py")), *arguments]
    try:
        return cli.main(arguments)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            status = run(**request)
            # a normal end, with all that Python and torch do then
            sys.exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
