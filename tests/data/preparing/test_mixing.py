"""Sources by weight, long and short sequences by share: exact proportions, nothing twice, the same each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import fit
from texts import content, stored_sequences, texts_of, write_jsonl

from lightning_lighthouse import LighthouseRecipe
from lightning_lighthouse.cli.prepare import main
from lightning_lighthouse.data.integrity import verify
from lightning_lighthouse.data.manifest import Manifest
from lightning_lighthouse.data.preparing import mixing
from lightning_lighthouse.data.preparing.mixing import MixedSource, mix, shares_of
from lightning_lighthouse.data.preparing.packing import Packed
from lightning_lighthouse.data.preparing.prepare import prepare
from lightning_lighthouse.data.settings import WeightedSource


def source_of(number: int, kinds: list[bool], folder: Path, by_length: bool) -> MixedSource:
    """A source whose sequences say where they come from: source, position, and whether they are long."""
    rows = [Packed(is_long, np.array([[number, i, is_long]])) for i, is_long in enumerate(kinds)]
    stream: Iterator[list[Packed] | None] = iter([*([row] for row in rows), None])
    return MixedSource(lambda: next(stream), folder, by_length)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.05, 9), min_size=5, max_size=5),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_stretch_has_the_proportions_asked_for(
    sizes: list[int], weights: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    weights = weights[: len(sizes)]
    sources = [source_of(i, [False] * size, tmp_path_factory.getbasetemp(), False) for i, size in enumerate(sizes)]
    taken: list[list[int]] = []
    try:
        for share, packed in mix(sources, shares_of(weights, None)):
            taken.append(packed.sequences[0].tolist())
            assert share.source == taken[-1][0]
            for number, weight in enumerate(weights):
                asked = weight / sum(weights) * len(taken)
                # a sequence is not divisible
                assert abs(sum(row[0] == number for row in taken) - asked) < len(sizes)
    except LookupError:
        assert not taken
    # of each source the first sequences, in their order
    for number in range(len(sizes)):
        assert [row[1] for row in taken if row[0] == number] == list(range(sum(row[0] == number for row in taken)))
    # it ended because a source had no other
    assert any(sum(row[0] == number for row in taken) == size for number, size in enumerate(sizes))


@given(kinds=st.lists(st.booleans(), min_size=1, max_size=90), fraction=st.floats(0.01, 1))
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.parametrize("waiting_bytes", [2**20, 50])
def test_long_and_short_sequences_have_their_share(
    kinds: list[bool], fraction: float, waiting_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # a queue of two sequences in memory, and the others in a file
        patch.setattr(mixing, "WAITING_BYTES", waiting_bytes)
        source = source_of(0, kinds, tmp_path_factory.getbasetemp(), True)
        try:
            taken = [packed for _, packed in mix([source], shares_of([1.0], fraction))]
        except LookupError:
            assert len(set(kinds)) == 1
            return
    for count in range(1, len(taken) + 1):
        assert abs(sum(packed.is_long for packed in taken[:count]) - fraction * count) <= 1 + 1e-9
    for is_long in (False, True):
        positions = [packed.sequences[0, 1] for packed in taken if packed.is_long == is_long]
        assert positions == [i for i, kind in enumerate(kinds) if kind == is_long][: len(positions)]
        assert all(packed.sequences[0, 2] == packed.is_long for packed in taken)
    if source.ended:
        assert source.waiting == len(kinds) - len(taken)


SEQ_LEN = 61


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two sources whose tokens tell them apart, the second much longer."""
    folder = tmp_path_factory.mktemp("sources")
    small = write_jsonl(folder / "small.jsonl", ["a" * (i % 97 + 1) for i in range(101)])
    large = write_jsonl(folder / "large.jsonl", ["B" * (i % 89 + 1) for i in range(2003)])
    return str(small), str(large)


def weighted(sources: tuple[str, str], *weights: float) -> list[dict[str, Any]]:
    return [{"path": path, "weight": weight} for path, weight in zip(sources, weights, strict=True)]


def letters(folder: Path, split: str = "train") -> str:
    """The source of each stored sequence; a mixed sequence would be more than a letter."""
    rows = stored_sequences(folder, split)
    return "".join("".join(sorted({chr(token) for token in row if token != 256})) for row in rows.tolist())


def test_sequences_wait_in_a_file_in_their_order(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(mixing, "WAITING_BYTES", 50)
    queue, popped, pushed = mixing.Queue(tmp_path), [], 0
    for push, pop in ((9, 4), (5, 10), (3, 0), (30, 33)):
        for _ in range(push):
            queue.push(Packed(pushed % 3 == 0, np.array([[pushed, pushed + 1, 7]])))
            pushed += 1
        popped += [queue.pop() for _ in range(pop)]
    assert [packed.sequences.tolist() for packed in popped] == [[[i, i + 1, 7]] for i in range(47)]
    assert [packed.is_long for packed in popped] == [i % 3 == 0 for i in range(47)]
    assert len(queue) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_prepared_mix(sources: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    for documents, weights in (("pack", (1, 1)), ("pack", (0.2, 0.8)), ("whole", (1, 1))):
        folder = tmp_path / f"{documents}{weights[0]}"
        manifest = prepare(str(folder), seq_len=SEQ_LEN, sources=weighted(sources, *weights), documents=documents)
        stored = letters(folder)
        share = weights[0] / sum(weights)
        assert len(stored) == manifest.train.sequences
        for count in range(1, len(stored) + 1):
            assert abs(stored[:count].count("a") - share * count) <= 1
        small, large = manifest.sources
        # the small one is used up; of the large one only as much was read as was needed
        assert (small.read_to_end, small.left_out_sequences, large.read_to_end) == (True, 0, False)
        assert large.documents < 0.7 * 2003
        assert (small.sequences, large.sequences) == (stored.count("a"), stored.count("B"))
        counts = manifest.train
        kept = counts.sequences + counts.left_out_sequences
        assert counts.tokens == small.tokens + large.tokens == kept * (SEQ_LEN + 1) + counts.dropped_tokens
        assert Manifest.load(folder) == manifest
        assert list(verify(folder)) == []
        report = manifest.report()
        assert f"small.jsonl: {stored.count('a') / len(stored):.1%} of the training sequences, 0 left out, read to" in (
            report
        )
        assert f"{large.left_out_sequences:,} left out, read up to document {large.documents:,}" in report


def test_a_mix_is_the_same_with_any_number_of_processes(
    tmp_path: Path,
    tokenizer_file: str,
    monkeypatch: Any,
) -> None:
    from lightning_lighthouse.data.preparing import pipeline

    monkeypatch.setattr(pipeline, "TASK_BYTES", 500)
    paths = [write_jsonl(tmp_path / f"{seed}.jsonl", texts_of(90 * seed, seed)) for seed in (1, 2, 3)]
    mixed = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (0.5, 0.3, 0.2), strict=True)]
    for workers in (0, 3):
        prepare(
            str(tmp_path / f"workers{workers}"),
            seq_len=199,
            sources=mixed,
            tokenizer=tokenizer_file,
            num_workers=workers,
            documents="whole",
            long_fraction=0.5,
        )
    assert content(tmp_path / "workers0") == content(tmp_path / "workers3")
    counts = Manifest.load(tmp_path / "workers0").train
    assert abs(counts.long_sequences - counts.sequences / 2) <= 3


def test_a_source_that_is_listed_twice_is_read_twice(sources: tuple[str, str], tmp_path: Path) -> None:
    small, large = sources
    mixed = [{"path": path, "weight": 1} for path in (small, small, large)]
    once = prepare(str(tmp_path / "once"), seq_len=SEQ_LEN, sources=weighted(sources, 1, 1))
    twice = prepare(str(tmp_path / "twice"), seq_len=SEQ_LEN, sources=mixed)
    assert letters(tmp_path / "twice").count("a") == 2 * letters(tmp_path / "once").count("a")
    # its validation documents are the same ones, and come once
    assert letters(tmp_path / "twice", "validation").count("a") == letters(tmp_path / "once", "validation").count("a")
    assert twice.train.documents > once.train.documents


def test_a_mix_by_length(tmp_path: Path) -> None:
    texts = ["l" * 50 if i % 10 == 0 else "s" * 20 for i in range(3000)]
    source = str(write_jsonl(tmp_path / "text.jsonl", texts))
    arguments: dict[str, Any] = {"seq_len": SEQ_LEN, "source": source, "validation_fraction": 0, "documents": "whole"}
    as_they_come = prepare(str(tmp_path / "as-they-come"), **arguments).train
    assert as_they_come.long_sequences == 300
    for fraction in (0.1, 0.6, 1.0):
        manifest = prepare(str(tmp_path / str(fraction)), long_fraction=fraction, **arguments)
        starts = [chr(row[0]) for row in stored_sequences(tmp_path / str(fraction)).tolist()]
        for count in range(1, len(starts) + 1):
            assert abs(starts[:count].count("l") - fraction * count) <= 1
        counts = manifest.train
        assert counts.long_sequences == starts.count("l")
        assert counts.tokens == (counts.sequences + counts.left_out_sequences) * 62 + counts.dropped_tokens
    assert counts.long_sequences == counts.sequences == 300


def test_a_run_on_a_mix_resumes_exactly(sources: tuple[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "seq_len": SEQ_LEN,
        "sources": [WeightedSource(path, weight) for path, weight in zip(sources, (0.3, 0.7), strict=True)],
        "output_dir": str(tmp_path / "out"),
        "validation_fraction": 0,
        "batch_size": 40,
    }

    def data() -> Any:
        return LighthouseRecipe(num_workers=0, **options)

    unbroken = fit(data(), tmp_path / "steps", max_epochs=2)
    batches = len(unbroken.seen) // 2
    assert batches > 2
    for step in (1, batches, batches + 1):
        resumed = fit(data(), resume=tmp_path / "steps" / f"step={step}.ckpt", max_epochs=2)
        assert resumed.seen == unbroken.seen[step:]
    options["sources"] = options["sources"][::-1]
    with pytest.raises(
        ValueError, match=r"was prepared with sources=.*--sources \S*large.jsonl=0.7 \S*small.jsonl=0.3"
    ):
        fit(data())


REFUSALS = {
    "no weight above 0": ({"sources": [{"path": "a", "weight": 0}]}, r"sources\[0\]\.weight must be greater than 0"),
    "infinite": (
        {"sources": [{"path": "a", "weight": np.inf}]},
        r"sources\[0\]\.weight must be greater than 0, got inf",
    ),
    "no number": (
        {"sources": [{"path": "a"}, {"path": "b", "weight": "x"}]},
        r"sources\[1\]\.weight must be .*got 'x'",
    ),
    "no path": ({"sources": [{"weight": 1}]}, r"sources\[0\] must be a mapping of path, weight, got \{'weight': 1\}"),
    "empty path": ({"sources": [{"path": ""}]}, r"sources\[0\]\.path must be a file, a folder or a glob pattern"),
    "unknown key": ({"sources": [{"path": "a", "wieght": 1}]}, r"sources\[0\] must be a mapping of path, weight"),
    "empty": ({"sources": []}, r"sources must be a list of at least one path with a weight, got \[\]"),
    "a path alone": ({"sources": "a"}, "sources must be a list of at least one path with a weight, got 'a'"),
    "both": ({"source": "a", "sources": [{"path": "b"}]}, "source must be left out beside sources, got 'a'"),
    "documents": ({"documents": "cut"}, "documents must be 'pack' or 'whole', got 'cut'"),
    "fraction": ({"documents": "whole", "long_fraction": 0}, r"long_fraction must be in \(0, 1\], got 0"),
    "fraction of a stream": ({"long_fraction": 0.5}, "long_fraction must be left out with documents 'pack'; use 'who"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_mixed_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        prepare(str(tmp_path / "out"), seq_len=SEQ_LEN, **arguments)
    with pytest.raises(ValueError, match=rf"^{message}"):
        LighthouseRecipe(SEQ_LEN, output_dir=str(tmp_path / "out"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_the_text_cannot_give_is_refused(sources: tuple[str, str], tmp_path: Path) -> None:
    little = str(write_jsonl(tmp_path / "little.jsonl", ["c"]))
    arguments: dict[str, Any] = {"seq_len": SEQ_LEN, "validation_fraction": 0}
    with pytest.raises(ValueError, match=r"^source \S*little\.jsonl gave less than one sequence of 62 training tokens"):
        prepare(str(tmp_path / "out"), sources=weighted((sources[0], little), 1, 1), **arguments)
    short = str(write_jsonl(tmp_path / "short.jsonl", ["short"] * 99))
    arguments |= {"documents": "whole", "long_fraction": 0.5}
    with pytest.raises(
        ValueError, match=r"^source \S*short\.jsonl does not give a document of more than 31 tokens for long_fraction"
    ):
        prepare(str(tmp_path / "out"), source=short, **arguments)
    long = str(write_jsonl(tmp_path / "long.jsonl", ["l" * 61] * 99))
    with pytest.raises(ValueError, match=r"^source \S*long\.jsonl does not give 62 tokens of shorter documents"):
        prepare(str(tmp_path / "out"), source=long, **arguments)
    with pytest.raises(FileNotFoundError, match="source must be a file, a folder or a glob pattern, got 'gone'"):
        prepare(str(tmp_path / "out"), seq_len=SEQ_LEN, sources=weighted((sources[0], "gone"), 1, 1))
    assert not (tmp_path / "out").exists()


def test_the_command_mixes(sources: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    small, large = sources
    command = f"--output_dir {tmp_path}/out --seq_len 61 --sources {small}=0.25 {large}=0.75 --documents whole"
    assert main(command.split()) == 0
    found = Manifest.load(tmp_path / "out").settings
    assert found.sources == [WeightedSource(small, 0.25), WeightedSource(large, 0.75)]
    assert found.documents == "whole"
    shares = Counter(letters(tmp_path / "out"))
    assert abs(shares["a"] / shares.total() - 0.25) < 0.02
    capsys.readouterr()
    for wrong, line in (
        (["--sources", "a=0"], "argument --sources: 'a=0' must be PATH=WEIGHT: weight must be greater than 0, got 0.0"),
        (["--sources", "a=b"], "argument --sources: 'a=b' must be PATH=WEIGHT: could not convert string to float: 'b'"),
        (["--sources", "a", "--source", "b"], "source must be left out beside sources, got 'b'"),
        (["--documents", "hole"], "documents must be 'pack' or 'whole', got 'hole'"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["--output_dir", f"{tmp_path}/other", "--seq_len", "61", *wrong])
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith(f"lighthouse prepare: {line}")
        assert err.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_a_path_may_hold_an_equals_sign(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("lang=en", "lang=de", "lang=fr", "version=2")
    for name in names:
        write_jsonl(tmp_path / name / "text.jsonl", texts_of(31))
    sources = ["lang=en", "lang=de=2", "lang=fr/*.jsonl", "version=2", "version=2/text.jsonl=0.5"]
    assert main(["--output_dir", "out", "--seq_len", "61", "--sources", *sources]) == 0
    assert Manifest.load(tmp_path / "out").settings.sources == [
        WeightedSource("lang=en"),
        WeightedSource("lang=de", 2.0),
        WeightedSource("lang=fr/*.jsonl"),
        WeightedSource("version=2"),
        WeightedSource("version=2/text.jsonl", 0.5),
    ]
