"""Started by torchrun: runs `lighthouse` with these arguments, and writes its status to `status-<rank>`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lightning_lighthouse.cli.commands import main

status = main(sys.argv[1:])
Path(f"status-{os.environ['RANK']}").write_text(str(status))
sys.exit(status)
