"""Take a picture of a run's curves: TensorBoard in headless Chromium, both on this machine.

    python experiments/screenshot.py runs/quickstart docs/use/training.png --tab custom_scalars --size 1400,900

Needs Chromium (Debian: apt-get install chromium). Not part of the tests.
"""

from __future__ import annotations

import argparse
import http.server
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

HOST = "127.0.0.1"
START_SECONDS = 60
# TensorBoard draws its charts some seconds after the page has loaded
RENDER_MS = 30_000
# what TensorBoard keeps in the browser for its address, and takes from no query
ALL_POINTS = b"<script>localStorage.setItem('_ignoreYOutliers', 'false')</script>"
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


class _SetsAllPoints(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(ALL_POINTS)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def keep_outliers(port: int, visit: list[str]) -> None:
    """Have the charts span every point: a page at TensorBoard's address, before it, leaves the setting behind."""
    with http.server.HTTPServer((HOST, port), _SetsAllPoints) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        subprocess.run([*visit, "--dump-dom", f"http://{HOST}:{port}/"], check=True, capture_output=True)
        server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--tab", default="scalars", help="scalars, custom_scalars, text or hparams")
    parser.add_argument("--query", default="", help="further settings of the page, for example tagFilter=train")
    parser.add_argument("--size", default="1500,1000", help="width,height in pixels")
    parser.add_argument("--outliers", action="store_true", help="charts span every point, also where there are few")
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or sys.exit("chromium was not found")

    port = free_port()
    url = f"http://{HOST}:{port}"
    with tempfile.TemporaryDirectory() as profile:
        visit = [browser, *QUIET, f"--user-data-dir={profile}", f"--window-size={arguments.size}"]
        if arguments.outliers:
            keep_outliers(port, visit)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(arguments.logdir), "--load_fast=false"]
        board = subprocess.Popen([*command, "--host", HOST, "--port", str(port)], stderr=subprocess.DEVNULL)
        try:
            wait_until_loaded(url)
            page = f"{url}/#{'&'.join(filter(None, [arguments.tab, arguments.query]))}"
            target = f"--screenshot={arguments.picture.resolve()}"
            budget = f"--virtual-time-budget={RENDER_MS}"
            subprocess.run([*visit, budget, target, page], check=True, stderr=subprocess.DEVNULL)
        finally:
            board.terminate()
            board.wait()


if __name__ == "__main__":
    main()
