"""`python -m lightning_lighthouse.cli`: the command where its script is not on the path."""

import sys

from lightning_lighthouse.cli.commands import main

sys.exit(main())
