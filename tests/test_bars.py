"""How far long work is: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

from lightning_lighthouse import bars


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    now = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with bars.progress_bar("Preparing", 100_000_000) as bar:
        for _ in range(4):
            bar.update(20_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "Preparing: 40 of 100 MB, 40%, 46 s left",
        "Preparing: 80 of 100 MB, 80%, 16 s left",
    ]


def test_progress_of_an_unknown_whole_counts(monkeypatch, capsys):
    monkeypatch.setattr(bars, "EVERY_SECONDS", 0.0)
    with bars.progress_bar("Evaluating", unit=" samples") as bar:
        bar.update()
        bar.total = 4
        bar.update()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "Evaluating: 1 samples"
    assert second.startswith("Evaluating: 2 of 4 samples, 50%, ")


def test_progress_is_a_bar_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(bars, "is_terminal", lambda stream: True)
    with bars.progress_bar("Verifying", 2_000_000) as bar:
        bar.update(1_000_000)
        bar.refresh()
        shown = capsys.readouterr().err
    assert "Verifying:  50%" in shown
    assert "1.00M/2.00M" in shown
