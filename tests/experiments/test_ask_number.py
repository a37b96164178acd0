"""Prompts that hide a number, and what a model without any training says to them."""

from __future__ import annotations

import json

import pytest
from places import ROOT

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from lightning_lighthouse.huggingface.llama import byte_tokenizer  # noqa: E402

TEXT = "it is known by heart, over and over, until the same text is over. " * 60


@pytest.fixture(autouse=True)
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))


@pytest.mark.parametrize(("length", "depth"), [(1000, 0.1), (1501, 0.5), (3001, 0.9)])
def test_a_prompt_has_its_length_and_hides_its_number_where_it_should(length, depth):
    from ask_number import NEEDLE, QUESTION, prompt_of

    prompt, tokens = prompt_of(TEXT * 4, length, depth, "71432", byte_tokenizer())
    assert tokens == len(prompt)
    assert abs(tokens - length) <= 0.005 * length
    before, after = prompt.removesuffix(QUESTION).split(NEEDLE.format(number="71432"))
    assert prompt.endswith(QUESTION)
    assert (before + after) == (TEXT * 4)[: len(before + after)]
    assert abs(len(before) / len(before + after) - depth) < 0.02
    # a whole word
    assert after.startswith(" ")


def test_a_text_that_is_too_short_is_refused():
    from ask_number import prompt_of

    with pytest.raises(ValueError, match=r"must have 20,000 characters for 5,000 tokens"):
        prompt_of(TEXT, 5000, 0.5, "71432", byte_tokenizer())


def test_what_a_model_wrote_is_told_and_counted(tmp_path, capsys):
    from ask_number import main

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=257, max_position_embeddings=1024, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "books.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("short", TEXT)))
    given = [str(tmp_path / "model"), str(tmp_path / "books.jsonl"), "--lengths", "700", "--depths", "0.2", "0.7"]
    assert main([*given, "--prompts", str(tmp_path / "prompts")]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].split(", ")[1] for line in lines] == ["71432 at 0.2", "30958 at 0.7"]
    assert total == "700: 0 of 2"
    assert "30958" in (tmp_path / "prompts" / "700-0.7.txt").read_text()
