"""The command line: the settings that ease the switch, in a recipe and as flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_parts import RECIPE, config

from lightning_lighthouse.cli import commands as cli

SWITCH = """
lighthouse:
  enabled: false
  switch_at: 0.8
  return_steps: 4
  rewarm_steps: 10
  plateau:
    patience: 2
    min_gain_per_second: 1e-4
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTHOUSE_DEBUG", raising=False)
    Path("recipe.yaml").write_text(RECIPE)
    Path("switch.yaml").write_text(SWITCH)
    return tmp_path


BOTH = ("-c", "recipe.yaml", "-c", "switch.yaml")


def test_the_settings_of_the_switch_are_read(capsys):
    given = config(capsys, *BOTH)["lighthouse"]
    assert given["plateau"] == {"patience": 2, "min_gain_per_second": 1e-4, "earliest": 0}
    assert (given["return_steps"], given["rewarm_steps"]) == (4, 10)
    flags = ("--lighthouse.plateau.patience", "5", "--lighthouse.plateau.earliest", "0.5")
    changed = config(capsys, *BOTH, *flags)["lighthouse"]["plateau"]
    assert changed == {"patience": 5, "min_gain_per_second": 1e-4, "earliest": 0.5}
    assert config(capsys, *BOTH, "--lighthouse.plateau", "null")["lighthouse"]["plateau"] is None
    alone = config(capsys, "-c", "recipe.yaml", "--lighthouse.plateau.patience", "5")["lighthouse"]["plateau"]
    assert alone["patience"] == 5


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        (("plateau.patience", "0"), "lighthouse.plateau.patience must be at least 1, got 0"),
        (("plateau.patience", "soon"), "lighthouse.plateau.patience must be int, got 'soon'"),
        (("plateau.patiense", "3"), "lighthouse.plateau.patiense is not a known key; did you mean patience?"),
        (("return_steps", "-1"), "lighthouse.return_steps must be at least 0, got -1"),
        (("rewarm_steps", "1.5"), "lighthouse.rewarm_steps must be int, got '1.5'"),
    ],
)
@pytest.mark.parametrize("command", [("check", "recipe.yaml"), ("fit", "-c", "recipe.yaml")])
def test_wrong_ones_are_a_line(capsys, folder, command, flag, line):
    before = sorted(folder.rglob("*"))
    name, value = flag
    assert cli.main([*command, f"--lighthouse.{name}", value]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"lighthouse: {line}")
    assert sorted(folder.rglob("*")) == before


def test_a_run_writes_its_report():
    assert cli.main(["fit", *BOTH]) == 0
    report = json.loads(Path("runs/recipe-switch/version_0/lighthouse.json").read_text())
    assert report["settings"]["plateau"]["patience"] == 2
    assert report["phases"]["dense"]["steps"] == report["steps"] == 4
    assert report["validations"]


PHASES = """
lighthouse:
  attention: {num_levels: 2, pooling_factor: 2, top_k: 8}
  phases:
  - {until: 0.2, layer_types: [chunk], window: 32}
  - {until: 0.9, layer_types: [window, lighthouse], window: 16, attention: {top_k: 4}}
"""


def test_phases_stand_in_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE.split("lighthouse:")[0])
    Path("phases.yaml").write_text(PHASES)
    parsed = config(capsys, "-c", "recipe.yaml", "-c", "phases.yaml")["lighthouse"]
    assert [phase["until"] for phase in parsed["phases"]] == [0.2, 0.9]
    assert parsed["phases"][1]["attention"]["top_k"] == 4
    assert parsed["switch_at"] is None


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("phases=[{until: 0.5, windo: 3}]", "lighthouse.phases[0].windo is not a known key; did you mean window?"),
        ("phases=[{layer_types: [dense]}]", "lighthouse.phases[0].until is required"),
        ("phases=[{until: 1.5}]", "lighthouse.phases[0].until must be a step (an int >= 0) or a fraction"),
        ("phases=[{until: 0.5, layer_types: [windw]}]", "lighthouse.phases[0].layer_types must be list of"),
        ("phases=[{until: 0.5, layer_types: [window]}]", "lighthouse.phases[0].window must be given with layer_types"),
        ("phases=[{until: 0.5},{until: 0.3}]", "lighthouse.phases must end in rising order, got until 0.5, 0.3"),
        ("layer_types=[window]", "lighthouse.window must be given with layer_types 'window'"),
        (
            "phases=[{until: 0.5, sink_tokens: 2}]",
            "lighthouse.phases[0].sink_tokens is for layer_types 'window', got 2 with ['lighthouse']",
        ),
    ],
)
def test_a_wrong_phase_is_one_line(tmp_path, monkeypatch, capsys, flag, line):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE.split("lighthouse:")[0])
    assert cli.main(["check", "recipe.yaml", f"--lighthouse.{flag}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"lighthouse: {line}")
    assert err.count("\n") == 1


def test_both_forms_at_once_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE.split("lighthouse:")[0])
    Path("phases.yaml").write_text(PHASES)
    assert cli.main(["check", "recipe.yaml", "-c", "phases.yaml", "--lighthouse.switch_at", "0.5"]) == 2
    assert "phases and switch_at cannot both be given: a phase has its own" in capsys.readouterr().err


DOCUMENTS = """
lighthouse:
  documents: true
  attention: {num_levels: 2, pooling_factor: 2, top_k: 8}
trainer: {accelerator: cpu, max_steps: 20}
data:
  class_path: lightning_lighthouse.LighthouseRecipe
  init_args: {seq_len: 128, source: prepared, document_ids: true, num_workers: 0}
"""


def test_the_documents_of_prepared_data_are_described_before_anything_trains(capsys, folder):
    Path("documents.yaml").write_text(DOCUMENTS)
    text = [{"text": "word " * count} for count in (3, 9, 27, 60, 5, 90, 14, 2)]
    Path("text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in text))
    # not prepared yet
    assert cli.main(["check", "documents.yaml", "--data.source", "text.jsonl"]) == 0
    assert capsys.readouterr() == ("ok\n", "")
    made = ["--output_dir", "prepared", "--seq_len", "128", "--source", "text.jsonl", "--validation_fraction", "0"]
    assert cli.main(["prepare", *made]) == 0
    capsys.readouterr()
    for keeps, last in (("true", None), ("ignore", "attention goes across documents, as lighthouse.documents")):
        assert cli.main(["check", "documents.yaml", "--lighthouse.documents", keeps]) == 0
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert err == ""
        assert lines[0].startswith("documents: ")
        assert "of 128 tokens (sum n^2 / N)" in lines[0]
        assert lines[1].startswith("estimated for one layer")
        assert lines[-1] == "ok"
        if last:
            assert lines[-2].startswith(last)
    # three of four layers have windows where nothing is said of them, of 512 tokens
    window = ("--lighthouse.window", "6", "--lighthouse.sink_tokens", "4")
    calls = " documents a sequence are longer than the 10 tokens that a window spans with its sinks, and a call each"
    for told, is_said in ((("true", *window), True), (("true",), False), (("ignore", *window), False),
                          (("true", "--lighthouse.layer_types", "[lighthouse]"), False),
                          (("true", "--lighthouse.enabled", "false", *window), False)):  # fmt: skip
        assert cli.main(["check", "documents.yaml", "--lighthouse.documents", *told]) == 0
        assert (calls in capsys.readouterr().out) is is_said
    # what fit refuses at the first batch that holds several
    assert cli.main(["check", "documents.yaml", "--lighthouse.documents", "false"]) == 2
    assert capsys.readouterr().err.startswith("lighthouse: lighthouse.documents must be true, or 'ignore' to attend")
    # whose batches do not say where documents lie
    unseen = ("--lighthouse.documents", "false", "--data.document_ids", "false")
    assert cli.main(["check", "documents.yaml", *unseen]) == 0
    assert "attention goes across documents" in capsys.readouterr().out


def test_prepared_data_of_other_settings_is_refused_as_by_fit(capsys, folder):
    Path("documents.yaml").write_text(DOCUMENTS)
    Path("text.jsonl").write_text(json.dumps({"text": "word " * 99}) + "\n")
    made = ["--output_dir", "prepared", "--seq_len", "64", "--source", "text.jsonl", "--validation_fraction", "0"]
    assert cli.main(["prepare", *made]) == 0
    capsys.readouterr()
    assert cli.main(["check", "documents.yaml"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lighthouse: prepared was prepared with seq_len=64, asked for 128; ")
    assert err.count("\n") == 1


LISTS = """
lighthouse: {phases: [{until: 0.5, layer_types: [window], window: 32, sink_tokens: 4}]}
data: {init_args: {sources: [{path: a, weight: 3}, {path: b, weight: 2}]}}
trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: a, patience: 9}}]}
"""
LATER = """
lighthouse: {phases: [{until: 0.9, layer_types: [window], window: 64}]}
data: {init_args: {sources: [{path: c}, {path: d}]}}
trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: b}}]}
"""


@pytest.mark.parametrize("is_flag", [False, True])
def test_a_later_list_takes_nothing_over_from_an_earlier_one(capsys, is_flag):
    Path("lists.yaml").write_text(LISTS)
    Path("later.yaml").write_text(LATER)
    layers = ["-c", "later.yaml"]
    if is_flag:
        layers = ["--lighthouse.phases=[{until: 0.9, layer_types: [window], window: 64}]"]
        layers += ["--data.sources", "[{path: c}, {path: d}]"]
    found = config(capsys, "-c", "lists.yaml", *layers)
    (phase,) = found["lighthouse"]["phases"]
    assert (phase["until"], phase["window"], phase["sink_tokens"]) == (0.9, 64, 0)
    sources = found["data"]["init_args"]["sources"]
    assert sources == [{"path": "c", "weight": 1.0}, {"path": "d", "weight": 1.0}]
    patience = found["trainer"]["callbacks"][0]["init_args"]["patience"]
    assert patience == (9 if is_flag else 3)
    more = ["--trainer.callbacks+", "lightning.pytorch.callbacks.LearningRateMonitor"]
    found = config(capsys, "-c", "lists.yaml", *layers, *more)
    assert len(found["trainer"]["callbacks"]) == 2


@pytest.mark.parametrize("command", [("check", "recipe.yaml"), ("fit", "-c", "recipe.yaml", "--print_config")])
def test_lightnings_timer_needs_no_more_than_its_duration(capsys, command):
    Path("timer.yaml").write_text(
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.Timer, init_args: {duration: '00:01:00:00'}}]}"
    )
    assert cli.main([*command, "-c", "timer.yaml"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out == "ok\n" or "interval: step" in out


def test_a_value_with_a_dash_in_front_of_the_recipe_is_no_flag(capsys):
    assert cli.main(["check", "--trainer.max_epochs", "-1", "recipe.yaml"]) == 0
    assert capsys.readouterr() == ("ok\n", "")


def test_documents_need_data_that_says_where_they_lie(capsys, folder):
    Path("documents.yaml").write_text(DOCUMENTS)
    assert cli.main(["check", "documents.yaml", "--data.document_ids", "false"]) == 2
    assert capsys.readouterr().err == (
        "lighthouse: data.init_args.document_ids must be true where lighthouse.documents is, got False\n"
    )


@pytest.mark.parametrize("value", ["2", "yes please", "null"])
def test_a_wrong_setting_of_documents_is_a_line(capsys, folder, value):
    assert cli.main(["check", "recipe.yaml", "--lighthouse.documents", value]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lighthouse: lighthouse.documents must be ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--data.source", "nope"),
        ("--data.sources=[{path: text.txt}, {path: nope}]",),
        ("--data.source", "text.txt", "--data.validation_source", "nope"),
    ],
)
def test_a_source_that_is_not_there_is_named_unless_data_is_prepared(capsys, flags):
    Path("text.txt").write_text("word " * 999)
    Path("small.yaml").write_text("data: {init_args: {seq_len: 128, num_workers: 0}}\ntrainer: {max_steps: 20}")
    line = (
        "fit would end here, nothing is prepared in data/prepared: source must be a file, a folder or a glob pattern, "
    )
    assert cli.main(["check", "small.yaml", *flags]) == 0
    assert capsys.readouterr() == (f"{line}got 'nope': no such file\nok\n", "")
    # what was prepared needs no text any more
    assert cli.main(["prepare", "--output_dir", "data/prepared", "--seq_len", "128", "--source", "text.txt",
                     "--validation_fraction", "0"]) == 0  # fmt: skip
    capsys.readouterr()
    cli.main(["check", "small.yaml", *flags])
    assert "no such file" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(("until", "line"), [("30", "20 steps end before the switch at step 30\n"), ("19", "")])
def test_a_switch_behind_the_last_step_is_told_as_by_fit(capsys, until, line):
    Path("text.txt").write_text("text")
    Path("small.yaml").write_text(
        "data: {init_args: {seq_len: 128, source: text.txt}}\ntrainer: {max_steps: 20}\n"
        "lighthouse: {attention: {top_k: 8}}"
    )
    assert cli.main(["check", "small.yaml", "--lighthouse.switch_at", until]) == 0
    assert capsys.readouterr() == (f"{line}ok\n", "")
