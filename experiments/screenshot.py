"""Take a picture of a run's curves: TensorBoard in headless Chromium, both on this machine.

    python experiments/screenshot.py runs/quickstart docs/use/curves.png

Needs Chromium (Debian: apt-get install chromium). Not part of the tests.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HOST = "127.0.0.1"
START_SECONDS = 60
# TensorBoard draws its charts some seconds after the page has loaded
RENDER_MS = 30_000
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def wait_until_loaded(url: str) -> None:
    """Return when TensorBoard knows its runs."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/data/runs", timeout=5) as answer:
                if answer.read().strip() not in (b"", b"[]"):
                    return
        except OSError:
            pass
        time.sleep(1)
    sys.exit(f"TensorBoard did not show a run within {START_SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--tab", default="scalars", help="scalars, custom_scalars, text or hparams")
    parser.add_argument("--query", default="", help="further settings of the page, for example tagFilter=train")
    parser.add_argument("--size", default="1500,1000", help="width,height in pixels")
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or sys.exit("chromium was not found")

    port = free_port()
    url = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(arguments.logdir), "--load_fast=false"]
    board = subprocess.Popen([*command, "--host", HOST, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        wait_until_loaded(url)
        with tempfile.TemporaryDirectory() as profile:
            page = f"{url}/#{'&'.join(filter(None, [arguments.tab, arguments.query]))}"
            settings = [f"--user-data-dir={profile}", f"--window-size={arguments.size}"]
            target = f"--screenshot={arguments.picture.resolve()}"
            budget = f"--virtual-time-budget={RENDER_MS}"
            subprocess.run([browser, *QUIET, *settings, budget, target, page], check=True, stderr=subprocess.DEVNULL)
    finally:
        board.terminate()
        board.wait()


if __name__ == "__main__":
    main()
