"""The measures on models whose long context is known by construction."""

from __future__ import annotations

import math

import pytest
import torch
from long_contexts import BYTES, Induction, Reader, found, text_of
from torch import nn

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.data.tokenizers import ByteTokenizer, load_tokenizer
from lightning_lighthouse.evaluation import context_gain, copies, lookups, loss_by_position, passkey
from lightning_lighthouse.evaluation.measures import Found, Material, lengths_up_to
from lightning_lighthouse.evaluation.measuring import Alone, Asked, measure
from lightning_lighthouse.evaluation.own_tasks import read_task
from lightning_lighthouse.evaluation.samples import Collector, Haystack, Phrases, enough, seeded
from lightning_lighthouse.evaluation.scoring import Scorer
from lightning_lighthouse.model import Decoder

# each token once: what stood behind a token is known from one place alone
DISTINCT = torch.randperm(4500, generator=torch.Generator().manual_seed(1))


def copied(window: int | None = None) -> list[dict]:
    model = Induction(vocab_size=4500, longest=2048, window=window)
    return found(model, ["copies"], [2048], num_samples=2, text=DISTINCT)["copies"]


def test_an_induction_network_copies_at_all_distances():
    rows = copied()
    assert [row["distance"] for row in rows] == [256, 512, 1024]
    for row in rows:
        assert row["score"] == pytest.approx(1.0, abs=1e-6)
        # of the 128 tokens the first alone is a guess
        assert 0 < row["second"] < row["first"] / 64
        assert row["value"] == pytest.approx(row["second"] - row["first"])
        assert row["count"] == 2


@pytest.mark.parametrize(("window", "reached"), [(512, [256, 512]), (511, [256]), (255, [])])
def test_a_window_copies_over_its_own_length_and_not_a_token_more(window, reached):
    # the token behind the first occurrence is distance - 1 tokens away
    scores = {row["distance"]: row["score"] for row in copied(window)}
    assert [distance for distance, score in scores.items() if score > 1 - 1e-6] == reached
    assert all(abs(score) < 0.1 for distance, score in scores.items() if distance not in reached)


def test_a_reader_finds_the_passkey_at_every_depth_and_each_length():
    rows = found(Reader(), ["passkey"], [300, 1024])["passkey"]
    assert [(row["length"], row["depth"]) for row in rows] == [(n, d) for n in (300, 1024) for d in passkey.DEPTHS]
    assert all((row["value"], row["standard_error"], row["count"]) == (1.0, 0.0, 10) for row in rows)


def test_a_reader_with_a_short_memory_finds_what_is_within_it():
    reader = Reader(reach=600)
    rows = found(reader, ["passkey"], [1024])["passkey"]
    question = len(passkey.QUESTION) + 1
    text = 1024 - question - len(passkey.NEEDLE.format(digit=0))
    # bytes from the beginning of "pass key is" to the end
    away = {d: 1024 - round(text * d / 100) - passkey.NEEDLE.index("pass key is") for d in passkey.DEPTHS}
    assert {row["depth"]: row["value"] for row in rows} == {
        # a guess is right once in ten
        depth: 1.0 if distance <= 600 else 0.1
        for depth, distance in away.items()
    }
    assert {len(text) for text in reader.seen} == {1024}


@pytest.mark.parametrize("needle", ["\nThe pass key is lost.\n", "\nThe pass key was {digit} once.\n"])
def test_without_its_needle_the_passkey_is_a_guess(monkeypatch, needle):
    monkeypatch.setattr(passkey, "NEEDLE", needle)
    rows = found(Reader(), ["passkey"], [512])["passkey"]
    # always the first of ten equal digits, and each digit is right once
    assert {row["value"] for row in rows} == {0.1}


def test_the_digits_of_ten_samples_are_all_ten_and_those_of_another_place_are_in_another_order():
    reader = Reader()
    found(reader, ["passkey"], [512])
    digits = [text[text.index("pass key is ") + 12] for text in reader.seen]
    orders = [digits[i : i + 10] for i in range(0, len(digits), 10)]
    assert all(sorted(order) == list("0123456789") for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    # the first sample of two places is the same text
    first, second = reader.seen[0], reader.seen[70 - 10]
    assert first.replace(passkey.NEEDLE.format(digit=digits[0]), "") == second.replace(
        passkey.NEEDLE.format(digit=digits[60]), ""
    )


def test_lookups_ask_for_one_of_eight_different_numbers():
    reader = Reader(pattern=r"number of the {key} is (\d)")
    [row] = found(reader, ["lookups"], [1024])["lookups"]
    assert (row["length"], row["value"], row["count"]) == (1024, 1.0, 10)
    for text in reader.seen:
        assert len(text) == 1024
        pairs = [line for line in text.splitlines() if line.startswith("The number of the ")]
        assert len({line.split()[4] for line in pairs}) == len({line[-2] for line in pairs}) == lookups.PAIRS
    # who takes any of the numbers that were seen is right once in eight
    [row] = found(Reader(pattern=r"number of the \w+ is (\d)"), ["lookups"], [1024], num_samples=100)["lookups"]
    assert row["value"] == pytest.approx(1 / 8, abs=4 * row["standard_error"])


def test_a_random_model_is_at_chance_everywhere():
    torch.manual_seed(0)
    model = Decoder(num_layers=1, dim=16, num_heads=2, ffn_dim=16).eval()
    rows = found(model, ["loss_by_position", "context_gain", "copies", "passkey", "lookups"], [1024], num_samples=10)
    assert all(row["value"] == pytest.approx(math.log(BYTES), abs=0.1) for row in rows["loss_by_position"])
    assert all(abs(row["value"]) < 0.02 for name in ("copies", "context_gain") for row in rows[name])
    assert all(abs(row["score"]) < 0.01 for row in rows["copies"])
    share = sum(row["value"] for row in rows["passkey"]) / 7
    assert abs(share - 0.1) < 0.1
    assert rows["lookups"][0]["value"] <= 0.4


class Counting(nn.Module):
    """Its loss at a position is the number of tokens that it sees, itself included; it has no logits."""

    def token_losses(self, inputs, targets):
        return torch.arange(1.0, inputs.shape[1] + 1).expand_as(targets)


def test_positions_and_lengths_are_those_that_the_model_sees():
    rows = found(Counting(), ["loss_by_position", "context_gain"], [1000], num_samples=3)
    assert [(row["position"], row["until"]) for row in rows["loss_by_position"]] == [
        *((0, 64), (64, 128), (128, 256), (256, 512), (512, 1000))
    ]
    for row in rows["loss_by_position"]:
        assert row["value"] == (row["position"] + 1 + row["until"]) / 2
        assert (row["standard_error"], row["count"]) == (0.0, 3)
    # the last 250 tokens see 750 more with the whole text than with themselves alone
    assert {row["length"]: row["value"] for row in rows["context_gain"]} == {250: 750.0}
    assert context_gain.lengths(98_304) == (1024, [1024, 4096, 16_384])
    assert context_gain.lengths(8192) == (1024, [1024, 4096])
    assert copies.distances(98_304) == (128, [256 * 2**i for i in range(9)])
    assert lengths_up_to(98_304) == [1024, 4096, 16_384, 65_536, 98_304]
    assert lengths_up_to(256) == [256]
    assert loss_by_position.bins(40) == [(0, 40)]


def test_the_end_of_the_text_is_what_both_lengths_predict():
    ends = []

    class Peeking(nn.Module):
        def token_losses(self, inputs, targets):
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            ends.append(targets[0, -250:])
            return torch.zeros(targets.shape)

    found(Peeking(), ["context_gain"], [1000], num_samples=1)
    assert len(ends) == 2
    assert torch.equal(*ends)


def test_standard_errors_are_those_of_the_samples():
    values = [1.0, 2.0, 4.0]
    all_found = Found()
    for value in values:
        all_found.add([({"length": 8, "reach": 8}, {"value": value})])
    [row] = all_found.rows(all_found.sums(), training_length=7)
    assert row == {
        "length": 8,
        "value": pytest.approx(7 / 3),
        "standard_error": pytest.approx(torch.tensor(values).std().item() / 3**0.5),
        "count": 3,
        "beyond_training": True,
    }
    [row] = all_found.rows([1.0, 2.0, 4.0], training_length=8)
    assert math.isnan(row["standard_error"])
    assert not row["beyond_training"]


def test_two_ranks_find_together_what_one_finds_alone():
    phrases = Phrases(ByteTokenizer())
    material = Material(Haystack(text_of(4000)), phrases, seed=0)
    units = Asked(["passkey", "loss_by_position"], [512]).units(phrases)
    torch.manual_seed(0)
    model = Decoder(num_layers=1, dim=16, num_heads=2, ffn_dim=16).eval()

    class Rank(Alone):
        num_shares = 2

        def __init__(self, share):
            self.share, self.asked = share, []

        def reduce(self, values):
            self.asked.append(values)
            return values

    with torch.no_grad():
        alone = measure(Scorer(model), material, units, 3)
        ranks = [Rank(0), Rank(1)]
        scorers = [Scorer(model), Scorer(model)]
        for rank, scorer in zip(ranks, scorers, strict=True):
            measure(scorer, material, units, 3, ranks=rank)
    # three samples are two rounds; nobody waits for another
    assert scorers[0].num_tokens == scorers[1].num_tokens
    sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(*(rank.asked for rank in ranks), strict=True)]
    counted = [row["count"] for rows in alone.values() for row in rows]
    assert [numbers[i] for numbers in sums for i in range(0, len(numbers), 3)] == counted
    means = [row["value"] for rows in alone.values() for row in rows]
    assert [numbers[i + 1] / 3 for numbers in sums for i in range(0, len(numbers), 3)] == pytest.approx(means)


def test_samples_are_the_same_each_time_and_lie_apart():
    text = Haystack(torch.arange(1000))
    starts = [int(text.draw(100, index)[0]) for index in range(6)]
    assert starts == [int(text.draw(100, index)[0]) for index in range(6)]
    assert min(abs(a - b) for i, a in enumerate(starts) for b in starts[:i]) >= 80
    assert len(text.draw(1000, 3)) == 1000
    with pytest.raises(ValueError, match="1,001 tokens of text are needed, there are 1,000"):
        text.draw(1001, 0)
    one, other = (torch.rand(3, generator=seeded(0, "a", place)) for place in (1, 2))
    assert torch.equal(one, torch.rand(3, generator=seeded(0, "a", 1)))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_tokens", [65, 64, 32, 10])
def test_no_sample_lies_across_two_sequences_while_one_has_room(num_tokens, seed):
    text = Haystack(torch.arange(6 * 65 + 7), seed, sequence=65)
    drawn = [text.draw(num_tokens, index) for index in range(6 * (65 // num_tokens))]
    assert all(len(tokens) == num_tokens and len(set((tokens // 65).tolist())) == 1 for tokens in drawn)
    # of each sequence one, then others; none twice
    assert {int(tokens[0]) // 65 for tokens in drawn[:6]} == set(range(6))
    assert len({int(tokens[0]) for tokens in drawn}) == len(drawn)
    # behind them, and where they are longer, they lie anywhere
    assert len(text.draw(num_tokens, 1000)) == num_tokens
    assert len(text.draw(66, 0)) == 66


@pytest.mark.parametrize(
    ("sequence", "num_tokens", "room"),
    [(65, 65, 6), (65, 33, 6), (65, 32, 12), (65, 66, 6), (None, 65, 6), (None, 50, 7)],
)
def test_samples_for_which_there_is_no_room_are_told_of(sequence, num_tokens, room):
    text = Haystack(torch.arange(6 * 65 + 7), sequence=sequence)
    assert text.shortage(num_tokens, room) == ""
    assert f"holds {room} of {room + 1} samples of {num_tokens} tokens" in text.shortage(num_tokens, room + 1)


def test_a_question_is_cut_as_the_tokenizer_cuts_it(tokenizer_file):
    for tokenizer in (ByteTokenizer(), load_tokenizer(tokenizer_file)):
        phrases = Phrases(tokenizer)
        prompt, candidates = phrases.question(passkey.QUESTION)
        assert len(set(candidates.tolist())) == 10
        for digit, candidate in enumerate(candidates):
            whole = phrases.encode(f"{passkey.QUESTION} {digit}")
            assert whole.tolist() == [*prompt.tolist(), int(candidate)]

    class Wordless:
        def encode(self, text):
            return [5, 6, 256]

    with pytest.raises(SettingError, match=r"the tokenizer writes 0 1 2 3 4 5 6 7 8 9 as .*; set passkey and lookups"):
        Phrases(Wordless()).question(passkey.QUESTION)


def test_own_tasks_are_scored_by_loss_and_by_the_whole_answer(tmp_path):
    class Parrot(nn.Module):
        """Says "abc" behind "say ", and then what it likes."""

        def forward(self, inputs):
            logits = torch.zeros(*inputs.shape, BYTES)
            text = bytes(inputs[0].tolist()).decode()
            for index, letter in enumerate("abc"):
                place = text.index("say ") + 3 + index
                if place < len(text):
                    logits[0, place, ord(letter)] = 50.0
            return logits

    file = tmp_path / "words.jsonl"
    lines = ['{"prompt": "say ", "answer": "abc"}', "", '{"prompt": "say ", "answer": "abd"}']
    file.write_text("\n".join([*lines, '{"prompt": "now say ", "answer": "ab"}']))
    phrases = Phrases(ByteTokenizer())
    material = Material(Haystack(text_of(100)), phrases, seed=0)
    units = Asked([], [64], [file]).units(phrases)
    [row] = measure(Scorer(Parrot()), material, units, num_samples=1)["own_tasks"]
    assert (row["task"], row["count"]) == ("words.jsonl", 3)
    assert row["exact_match"] == pytest.approx(2 / 3)
    # one letter of three is wrong, by 50 nats
    assert row["value"] == pytest.approx(50 / 3 / 3, rel=1e-3)
    [row] = measure(Scorer(Counting()), material, units, num_samples=1)["own_tasks"]
    assert "exact_match" not in row
    assert row["value"] == pytest.approx((5 + 5 + 8.5) / 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "holds no prompt"),
        ('{"prompt": "a"}', 'line 1 must hold "prompt" and "answer", both text, got {"prompt": "a"}'),
        ('{"prompt": "a", "answer": "b"}\n[', "line 2 is not JSON"),
        ('{"prompt": "a", "answer": 3}', 'line 1 must hold "prompt" and "answer", both text'),
    ],
)
def test_a_wrong_file_of_tasks_is_refused_with_its_line(tmp_path, content, message):
    file = tmp_path / "tasks.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingError) as caught:
        read_task(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_the_text_is_the_same_for_fewer_samples_and_however_much_is_shown():
    batches = text_of(300 * 65).view(-1, 65).split(7)
    kept = []
    for num_samples, longest, shown in ((3, 64, 43), (10, 64, 43), (10, None, 43), (10, 64, 30)):
        collector = Collector(num_samples, longest)
        for batch in batches[:shown]:
            collector.add({"tokens": batch})
        kept.append(collector.haystack().tokens)
        assert collector.seq_len == 64
        assert collector.num_tokens < 20 * 65 + 7 * 65
    assert len(kept[0]) == enough(64, 10) == 20 * 65
    assert all(torch.equal(tokens, kept[0]) for tokens in kept)
    assert collector.haystack().sequence == 65
    collector.add({"tokens": batches[0][:, :64]})
    assert collector.haystack().sequence == 65, "there was enough before"
    # of two lengths
    mixed = Collector(10, 64)
    for batch in (batches[0], batches[1][:, :64]):
        mixed.add({"tokens": batch})
    assert mixed.haystack().sequence is None
    # transformers' batches hold no token behind the last
    collector = Collector(10, 64)
    collector.add({"input_ids": batches[0]})
    assert torch.equal(collector.haystack().tokens, batches[0].flatten())
    assert Collector(10, 64).haystack() is None


def test_another_seed_reads_other_text():
    tokens = torch.arange(1000)
    first, other = (Haystack(tokens, seed) for seed in (0, 1))
    assert not torch.equal(first.draw(10, 0), other.draw(10, 0))
    assert torch.equal(other.draw(10, 3), Haystack(tokens, 1).draw(10, 3))
