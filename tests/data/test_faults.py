"""Damaged and missing data under the command line: status 1, one line that names the file, and nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_parts import run

from lightning_lighthouse.cli import commands as cli
from lightning_lighthouse.data.preparing import packing
from lightning_lighthouse.data.preparing.prepare import prepare

SEQ_LEN = 127
RECIPE = """\
model: cli_parts.Model
data:
  class_path: lightning_lighthouse.LighthouseRecipe
  init_args:
    seq_len: 127
    source: prepared
    num_workers: 0
trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false}
lighthouse: {enabled: false}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with several chunks, and its text."""
    folder = tmp_path_factory.mktemp("faults")
    for i in range(31):
        (folder / f"{i:02d}.txt").write_text(f"document {i} " * 53)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_BYTES", 20 * 2 * (SEQ_LEN + 1))
        prepare(str(folder / "prepared"), seq_len=SEQ_LEN, source=str(folder), validation_fraction=0.2)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: Any) -> Path:
    """A copy to damage, as the current folder."""
    shutil.copytree(prepared / "prepared", tmp_path / "prepared")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path / "prepared"


def one_line(capsys: Any, *argv: str, status: int = 1) -> str:
    capsys.readouterr()
    assert cli.main(argv) == status
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("lighthouse")]
    assert len(lines) == 1, err
    return lines[0]


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def flip(content: bytes) -> bytes:
    """One bit of a token, which stays below 256."""
    return content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]


def leave_the_vocabulary(content: bytes) -> bytes:
    """The high bytes of all tokens behind the table of contents."""
    return content[:12] + bytes(0xFF if i % 2 else byte for i, byte in enumerate(content[12:]))


CHUNK, INDEX = "train/chunk-0-1.bin", "train/index.json"
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "chunk cut by a byte": (CHUNK, rewrite(lambda b: b[:-1]), "has 5,131 bytes, expected 5,132"),
    "chunk cut to nothing": (CHUNK, rewrite(lambda b: b""), "has 0 bytes, expected 5,132"),
    "chunk absent": (CHUNK, Path.unlink, "is missing, expected 5,132 bytes"),
    "index cut": (INDEX, rewrite(lambda b: b[:-5]), "bytes, expected"),
    "index absent": (INDEX, Path.unlink, "is missing"),
    "index altered": (INDEX, rewrite(lambda b: b.replace(b"chunk-0-1", b"chunk-0-0")), "is not the index that was"),
    "validation cut": ("validation/chunk-0-0.bin", rewrite(lambda b: b[:-1]), "bytes, expected"),
    "token outside the vocabulary": ("train/chunk-*.bin", rewrite(leave_the_vocabulary), "holds token 65"),
}


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_data_stops_a_run_with_a_line(
    folder: Path, capsys: Any, name: str, damage: Callable[[Path], None], words: str
) -> None:
    # of several chunks, whichever is read first
    for path in list(folder.glob(name)):
        damage(path)
    line = one_line(capsys, "fit", "-c", "recipe.yaml", "--trainer.num_sanity_val_steps", "0")
    assert words in line
    assert f"prepared/{Path(name).parent}/" in line
    # no checkpoint of a run that did not train
    assert not list(Path.cwd().rglob("*.ckpt"))


def test_a_flipped_bit_is_found_by_verify_alone(folder: Path, capsys: Any) -> None:
    rewrite(flip)(folder / CHUNK)
    assert cli.main(["check", "recipe.yaml"]) == 0
    line = one_line(capsys, "verify", "prepared")
    assert line.startswith(f"lighthouse verify: prepared/{CHUNK} has sha256 ")


def test_too_little_data_is_no_success(folder: Path, capsys: Any) -> None:
    line = one_line(capsys, "fit", "-c", "recipe.yaml", "--data.batch_size", "999")
    assert "train sequences of 127 tokens, one batch needs 999 (1 ranks x batch_size 999)" in line
    # a block longer than every chunk
    line = one_line(capsys, "prepare", "--output_dir", "new", "--source", "recipe.yaml*", "--seq_len", "9999")
    assert line.startswith("lighthouse prepare: seq_len 9999 needs 10,000 training tokens for one sequence, the source")
    assert not Path("new").exists()


def test_an_index_that_names_a_file_outside_is_refused(folder: Path, capsys: Any) -> None:
    Path("secret.bin").write_bytes(b"secret")
    index, manifest = folder / INDEX, folder / "manifest.json"
    altered = index.read_bytes().replace(b'"chunk-0-1.bin"', b'"../../secret.bin"')
    index.write_bytes(altered)
    record = json.loads(manifest.read_text())
    record["files"][INDEX] = {"bytes": len(altered), "sha256": hashlib.sha256(altered).hexdigest()}
    # who forges the records leaves out what would give that away
    del record["content_sha256"]
    manifest.write_text(json.dumps(record))
    line = one_line(capsys, "fit", "-c", "recipe.yaml")
    assert "prepared/train/index.json names the file '../../secret.bin', which was not prepared" in line


def test_a_missing_output_folder_is_made(folder: Path, prepared: Path) -> None:
    new = "one/two/three"
    assert cli.main(["prepare", "--output_dir", new, "--source", str(prepared / "*.txt"), "--seq_len", "127"]) == 0
    assert (Path(new) / "manifest.json").is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_read_only_output_folder_is_refused_before_any_step() -> None:
    with tempfile.TemporaryDirectory() as name:
        outside = Path(name)
        outside.chmod(0o755)
        (outside / "text.txt").write_text("text " * 999)
        # another user's process: root may write everywhere
        script = (
            "import os, sys; sys.path[:] = " + repr(sys.path) + "\n"
            "from jsonargparse import ArgumentParser\n"
            "from lightning_lighthouse.cli.prepare import Preparation, main\n"
            # it imports more when it is used, which the other user may not read
            "ArgumentParser().add_class_arguments(Preparation)\n"
            "os.setuid(65534)\n"
            f"sys.exit(main(['--output_dir', '{name}/out', '--seq_len', '61', '--source', '{name}/text.txt']))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(
            f"lighthouse prepare: output_dir {name}/out cannot be written: [Errno 13] Permiss"
        )
        assert done.stderr.count("\n") == 1
        assert stat.S_IMODE(outside.stat().st_mode) == 0o755
        assert [path.name for path in outside.iterdir()] == ["text.txt"]


def test_a_full_disk_leaves_nothing_behind(folder: Path, prepared: Path) -> None:
    # a limit on the size of a file stands in for the disk
    script = (
        "import resource, signal, sys\n"
        "from lightning_lighthouse.cli.prepare import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
        f"sys.exit(main(['--output_dir', 'out', '--seq_len', '61', '--source', {str(prepared / '*.txt')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        f"lighthouse prepare: output_dir {Path.cwd() / 'out'} cannot be written: [Errno 27] File too large; make room, "
        "or choose another one\n",
    )
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["prepared", "recipe.yaml"]


@pytest.mark.slow
def test_a_run_needs_no_network(folder: Path, prepared: Path) -> None:
    # stands in sitecustomize, so that the processes a run starts are watched too
    Path("sitecustomize.py").write_text(
        "import sys\n"
        "def watch(event, arguments):\n"
        "    if event == 'socket.getaddrinfo' and str(arguments[0]) not in ('localhost', '127.0.0.1', 'None'):\n"
        "        open('network.log', 'a').write(f'{event} {arguments}\\n')\n"
        "    if event == 'socket.connect' and isinstance(arguments[1], tuple):\n"
        "        if arguments[1][0] not in ('127.0.0.1', '::1'):\n"
        "            open('network.log', 'a').write(f'{event} {arguments}\\n')\n"
        "sys.addaudithook(watch)\n"
        "open('watched', 'w').close()\n"
    )
    text = ["--data.source", str(prepared / "*.txt"), "--data.output_dir", "new", "--data.num_workers", "1"]
    decoder = ["--model", "lightning_lighthouse.model.Decoder", "--model.dim", "32", "--model.num_layers", "1"]
    flags = ["--model.num_heads", "2", "--model.ffn_dim", "32", "--trainer.max_steps", "1"]
    done = run("fit", "-c", "recipe.yaml", *text, *decoder, *flags)
    assert done.returncode == 0, done.stderr
    assert Path("watched").exists()
    assert not Path("network.log").exists(), Path("network.log").read_text()
    assert list(Path("runs").rglob("last.ckpt"))


@pytest.mark.slow
def test_a_busy_port_is_named(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        environment = {"MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
        flags = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        done = run("fit", "-c", "recipe.yaml", *flags, **environment)
    assert done.returncode == 1
    assert str(port) in done.stderr


def test_the_test_data_is_evaluated(folder: Path, prepared: Path, capsys: Any) -> None:
    line = one_line(capsys, "test", "-c", "recipe.yaml", "--model", "cli_parts.Scorer")
    assert line == ("lighthouse: prepared has no test data; prepare it with a test_source, or run lighthouse validate")
    arguments = ["--source", str(prepared / "0*.txt"), "--test_source", str(prepared / "1*.txt"), "--seq_len", "127"]
    assert cli.main(["prepare", "--output_dir", "with-test", *arguments, "--validation_fraction", "0"]) == 0
    report = capsys.readouterr().out
    assert report.splitlines()[1].split() == ["training", "validation", "test"]
    assert cli.main(["verify", "with-test"]) == 0
    capsys.readouterr()
    recipe = ["-c", "recipe.yaml", "--data.source", "with-test"]
    assert cli.main(["test", *recipe, "--model", "cli_parts.Scorer"]) == 0
    text = b"".join(path.read_bytes() + b"\0" for path in sorted(prepared.glob("1*.txt")))
    # 2 bytes a token: the mean of the tokens that were shown says which text it was
    whole = len(text) // 128 * 128
    tokens = [256 if byte == 0 else byte for byte in text[:whole]]
    shown = re.search(r"test/mean\s+\S\s+([0-9.]+)", capsys.readouterr().out)
    assert shown
    assert float(shown[1]) == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)
