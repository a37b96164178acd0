"""LighthouseTrainerCallback in transformers' own Trainer: the phases, the switch, resume, and what is saved."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from all_lighthouse import all_lighthouse_trainer
from families import CONFIG, GROUPED, LAYERS, build_transformers, transformers_by_hand
from foreign import VOCABULARY

from lightning_lighthouse import LighthouseConfig, Phase, notices, register_lighthouse_sdpa
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.checks import ResumeError, SettingError
from lightning_lighthouse.routing.scope import scopes

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: the extra models")

from lightning_lighthouse.huggingface.trainer_callback import LighthouseTrainerCallback  # noqa: E402

TOKENS = 97
RATE = 1e-2


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    assert F.scaled_dot_product_attention is stock_sdpa
    torch._dynamo.reset()


def llama(**settings):
    return build_transformers("LlamaConfig", **GROUPED, **settings).model


def rows(count=20, seed=0):
    drawn = torch.randint(VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in drawn]


class InOrder(torch.utils.data.IterableDataset):
    """Rows in order: the Trainer shuffles anything else."""

    def __init__(self, given):
        self.given = given

    def __iter__(self):
        return iter(self.given)


class Losses(transformers.TrainerCallback):
    """The loss of every step, and whether an evaluation is routed."""

    def __init__(self):
        self.train, self.evaluation = [], []

    def on_log(self, args, state, control, logs, **others):
        if "loss" in logs:
            self.train.append(float(logs["loss"]))
        if "eval_loss" in logs:
            self.evaluation.append(logs["eval_loss"])


def trained(
    folder,
    callback,
    model=None,
    data=None,
    resume=None,
    steps=8,
    callbacks=(),
    evaluated=None,
    collator=None,
    **settings,
):
    """A model after transformers' Trainer, and the losses on the way."""
    model, losses = model or llama(), Losses()
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    } | settings
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=InOrder(data or rows()),
        eval_dataset=evaluated,
        data_collator=collator,
        callbacks=[losses, *([callback] if callback else []), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, losses, trainer


def by_hand(switch, steps=8, accumulate=1, data=None):
    """The same training as a loop, with Lighthouse written into all layers before the switch."""
    wrapped = build_transformers("LlamaConfig", **GROUPED)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=RATE, weight_decay=0.0)
    given, losses = iter(data or rows()), []
    for step in range(steps):
        parts = []
        for _ in range(accumulate):
            batch = torch.stack([next(given)["input_ids"] for _ in range(2)])
            with transformers_by_hand(wrapped, list(range(LAYERS)) if step < switch else []):
                loss = wrapped.model(input_ids=batch, labels=batch).loss / accumulate
                loss.backward()
            parts.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(parts))
    return wrapped.model, losses


class Watch(transformers.TrainerCallback):
    """The step that the patch knows at each optimizer step, and whether it is on in an evaluation."""

    def __init__(self):
        self.steps, self.evaluated_on = [], []

    def on_pre_optimizer_step(self, args, state, control, **others):
        self.steps.append(int(scopes[0].step))

    def on_prediction_step(self, args, state, control, **others):
        self.evaluated_on.append(scopes[0].is_on)


def test_the_trainer_over_the_switch_equals_two_phases_by_hand(tmp_path):
    watch = Watch()
    model, losses, _ = trained(tmp_path, all_lighthouse_trainer(0.55, CONFIG), callbacks=[watch])
    assert watch.steps[:5] == [0, 1, 2, 3, 4]
    expected, expected_losses = by_hand(switch=5)
    # the Trainer logs rounded losses
    assert losses.train == pytest.approx(expected_losses, abs=1e-4)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    dense, _, _ = trained(tmp_path, None)
    assert not torch.allclose(dense.lm_head.weight, model.lm_head.weight, atol=1e-3)
    assert "forward" not in vars(model.model.layers[1].self_attn)


def test_backend_phase_and_switch_are_told_where_nobody_listens(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(notices, "_given", set())
    monkeypatch.setattr(notices.logger, "propagate", False)
    # its records reach the root, where pytest listens
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    trained(tmp_path, all_lighthouse_trainer(4, CONFIG))
    lines = [line for line in caplog.messages if line.startswith("Lighthouse: ")]
    assert lines[0] == "Lighthouse: backend='auto' runs 'reference' on cpu"
    assert lines[1].startswith("Lighthouse: lighthouse phase from step 0; switch to dense at step 4 of 8")
    assert lines[2] == "Lighthouse: switched from Lighthouse to dense attention at step 4"
    assert (notices.logger.level, notices.logger.handlers) == (logging.NOTSET, [])


@pytest.mark.slow
def test_an_accumulated_step_is_never_split(tmp_path):
    data = rows(32)
    model, losses, _ = trained(
        tmp_path, all_lighthouse_trainer(2, CONFIG), steps=4, gradient_accumulation_steps=3, data=data
    )
    expected, expected_losses = by_hand(switch=2, steps=4, accumulate=3, data=data)
    assert losses.train == pytest.approx(expected_losses, abs=1e-3)
    torch.testing.assert_close(model.lm_head.weight, expected.lm_head.weight, rtol=1e-2, atol=1e-3)


def test_evaluation_is_dense(tmp_path):
    held_out = rows(4, seed=1)
    # a rate of 0: the model stays as it is
    settings = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, "steps": 2}
    watch, callback = Watch(), all_lighthouse_trainer(1, CONFIG)
    _, losses, _ = trained(tmp_path, callback, evaluated=held_out, callbacks=[watch], **settings)
    assert watch.evaluated_on
    assert not any(watch.evaluated_on)
    _, dense, _ = trained(tmp_path, None, evaluated=held_out, **settings)
    assert len(losses.evaluation) == 2
    assert losses.evaluation == dense.evaluation
    assert losses.train[0] != dense.train[0]


@pytest.mark.parametrize("stop", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_a_resumed_training_ends_as_one_that_was_not_interrupted(tmp_path, stop):
    def callback():
        return all_lighthouse_trainer(3, CONFIG)

    whole, losses, _ = trained(tmp_path / "whole", callback(), steps=6)
    trained(tmp_path / "cut", callback(), steps=6, save_strategy="steps", save_steps=stop)
    checkpoint = tmp_path / "cut" / f"checkpoint-{stop}"
    resumed, rest, _ = trained(tmp_path / "cut", callback(), steps=6, resume=str(checkpoint))
    assert rest.train == losses.train[stop:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    saved = state["LighthouseTrainerCallback"]["attributes"]["saved_switch"]
    assert (saved["switch_step"], saved["switched"]) == (3, stop > 3)


def test_a_resumed_training_that_has_switched_stays_dense(tmp_path, caplog):
    trained(tmp_path, all_lighthouse_trainer(2, CONFIG), steps=4, save_strategy="steps", save_steps=4)
    checkpoint = str(tmp_path / "checkpoint-4")
    with pytest.raises(ResumeError, match="allow_return"):
        trained(tmp_path, all_lighthouse_trainer(6, CONFIG), steps=8, resume=checkpoint)
    caplog.clear()
    trained(tmp_path, all_lighthouse_trainer(2, CONFIG), steps=5, resume=checkpoint)
    assert "dense phase from step 4" in caplog.text
    assert "switched from" not in caplog.text


def attending(callback):
    """How each layer attends in the phase that the callback's patch is set to."""
    return [callback._patch._layer_types[name] for name in callback._patch.layers]


class Attending(transformers.TrainerCallback):
    """How each layer attends at each optimizer step before the switch."""

    def __init__(self, callback):
        self.callback, self.types = callback, {}

    def on_step_begin(self, args, state, control, **others):
        if scopes[0].is_on:
            self.types[state.global_step] = attending(self.callback)


def test_nothing_said_of_the_layers_ends_with_one_of_lighthouse(tmp_path, caplog):
    callback = LighthouseTrainerCallback(2, CONFIG)
    watch = Attending(callback)
    trained(tmp_path, callback, steps=3, callbacks=[watch])
    types = (["window"] * 3 + ["lighthouse"])[-LAYERS:]
    assert watch.types == {0: types, 1: types}
    assert callback.state()["args"]["layer_types"] is None


@pytest.mark.parametrize("version", ["0.1", "later"])
def test_a_training_that_began_with_lighthouse_in_all_layers_goes_on_so(tmp_path, version):
    whole, _, _ = trained(tmp_path, all_lighthouse_trainer(3, CONFIG), steps=4, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    if version == "0.1":
        path = checkpoint / "trainer_state.json"
        state = json.loads(path.read_text())
        del state["stateful_callbacks"]["LighthouseTrainerCallback"]["attributes"]["saved_phases"]
        path.write_text(json.dumps(state))
    callback = LighthouseTrainerCallback(3, CONFIG)
    watch = Attending(callback)
    with pytest.warns(UserWarning, match="this run began with Lighthouse in all layers, and goes on so"):
        resumed, _, _ = trained(tmp_path / "on", callback, steps=4, resume=str(checkpoint), callbacks=[watch])
    assert watch.types == {1: ["lighthouse"] * LAYERS, 2: ["lighthouse"] * LAYERS}
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.slow
def test_the_trainer_can_restore_the_callback_with_its_settings(tmp_path):
    callback = all_lighthouse_trainer(2, CONFIG, dense_layers=[0, -1], select="*.self_attn")
    trained(tmp_path, callback, steps=3, save_strategy="steps", save_steps=3)
    _, _, trainer = trained(
        tmp_path,
        all_lighthouse_trainer(0.5),
        steps=4,
        resume=str(tmp_path / "checkpoint-3"),
        restore_callback_states_from_checkpoint=True,
    )
    restored = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LighthouseTrainerCallback))
    assert restored is not callback
    assert restored.state() == callback.state()


@pytest.mark.parametrize("stated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sdpa", "lighthouse_sdpa"])
def test_a_saved_model_has_no_trace(tmp_path, stated):
    model = llama()
    if stated:
        model.set_attn_implementation(register_lighthouse_sdpa())
    keys = list(model.state_dict())
    # the checkpoint is written in the Lighthouse phase, the model after the training
    callback = all_lighthouse_trainer(3, CONFIG, hf_assume_causal=not stated)
    _, _, trainer = trained(tmp_path, callback, model, steps=4, save_strategy="steps", save_steps=2)
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        assert "lighthouse" not in (folder / "config.json").read_text()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config._attn_implementation == "sdpa"
        assert list(loaded.state_dict()) == keys
    x = torch.stack([row["input_ids"] for row in rows(2)])
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model.eval()(x).logits)


def test_an_exception_inside_a_training_leaves_nothing_when_used_as_a_context(tmp_path):
    class Failing(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **others):
            raise KeyboardInterrupt

    model = llama()
    with pytest.raises(KeyboardInterrupt), all_lighthouse_trainer(3, CONFIG) as callback:
        trained(tmp_path, callback, model, callbacks=[Failing()], gradient_accumulation_steps=2)
    assert "forward" not in vars(model.model.layers[1].self_attn)


def test_several_gpus_in_one_process_are_refused():
    callback = LighthouseTrainerCallback()
    with pytest.raises(SettingError, match=r"2 GPUs in one process .* \(torchrun\)"):
        callback.on_train_begin(
            SimpleNamespace(n_gpu=2), transformers.TrainerState(), transformers.TrainerControl(), model=llama()
        )
    assert scopes == []


def test_padding_is_named_and_nothing_is_left(tmp_path):
    padded = [row | {"attention_mask": (torch.arange(TOKENS) < 90).long()} for row in rows(4)]
    model = llama()
    with pytest.raises(RuntimeError, match=r"model\.layers\.3\.self_attn: attn_mask was given \(call the"):
        trained(tmp_path, all_lighthouse_trainer(3, CONFIG), model, padded)
    assert "forward" not in vars(model.model.layers[1].self_attn)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"switch_at": 1.5}, ValueError, "at most 1.0"),
        ({"attention": {"num_levels": 1}}, ValueError, "num_levels"),
        ({"attention": 3}, TypeError, "attention must be LighthouseConfig or dict, got 3"),
        ({"on_unroutable": "ignore"}, ValueError, "'raise', 'warn', got 'ignore'"),
        ({"hf_assume_causal": 1}, TypeError, "hf_assume_causal must be bool, got 1"),
        ({"dense_layers": 2}, TypeError, "list of integers"),
    ],
)
def test_wrong_arguments_are_quoted(arguments, error, words):
    with pytest.raises(error) as caught:
        LighthouseTrainerCallback(**arguments)
    assert words in str(caught.value)


PHASES = [
    Phase(until=2, layer_types=["chunk"], window=16),
    Phase(until=5, layer_types=["window", "lighthouse"], window=8, sink_tokens=1),
]


class Types(transformers.TrainerCallback):
    """How the first and the last layer attend in each step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model, **others):
        layers = [part for part in model.modules() if "_lighthouse_route" in vars(part)]
        is_on = layers[0]._lighthouse_scope.is_on
        self.seen.append(
            [layer._lighthouse_route.layer_type if is_on else "stock" for layer in (layers[0], layers[-1])]
        )


def test_several_phases_and_a_resume_in_the_second(tmp_path):
    whole, resumed = Types(), Types()
    saving = {"steps": 7, "save_strategy": "steps", "save_steps": 3}
    callback = LighthouseTrainerCallback(attention=CONFIG, phases=PHASES)
    _, losses, _ = trained(tmp_path, callback, callbacks=[whole], **saving)
    again = LighthouseTrainerCallback(attention=CONFIG, phases=[asdict(phase) for phase in PHASES])
    resume = str(tmp_path / "checkpoint-3")
    _, later, _ = trained(tmp_path / "again", again, callbacks=[resumed], resume=resume, **saving)
    assert whole.seen == [["chunk", "chunk"]] * 2 + [["window", "lighthouse"]] * 3 + [["stock", "stock"]] * 2
    assert resumed.seen == whole.seen[3:]
    assert later.train == losses.train[3:]


@pytest.mark.parametrize("first", [["dense"], ["dense", "window"]], ids=["dense", "partly dense"])
def test_layers_that_only_a_later_phase_cannot_route_are_named(tmp_path, first):
    model = llama()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    phases = [
        Phase(until=2, layer_types=first, window=16 if "window" in first else None),
        Phase(until=6, layer_types=["lighthouse"]),
    ]
    callback = LighthouseTrainerCallback(attention=CONFIG, phases=phases)
    with pytest.raises(RuntimeError, match=r"layers.0.self_attn: dropout_p is not 0"):
        trained(tmp_path, callback, model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_become_dense_later_are_told_once(tmp_path, accumulate):
    collated = []

    def padded_later(given):
        batch = transformers.default_data_collator(given)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if len(collated) > 2:
            batch["attention_mask"][0, -10:] = 0
        collated.append(batch)
        return batch

    first = 3 // accumulate
    line = f"attention calls stay dense in step {first}, the first to do so: attn_mask was given"
    with pytest.warns(UserWarning, match=line) as told:
        trained(
            tmp_path,
            all_lighthouse_trainer(4, CONFIG),
            collator=padded_later,
            steps=5,
            gradient_accumulation_steps=accumulate,
            data=rows(5 * 2 * accumulate),
        )
    assert len([warning for warning in told if "stay dense" in str(warning.message)]) == 1


def packed(count=4):
    """Rows of two documents, as a collator that flattens has them."""
    positions = torch.cat([torch.arange(40), torch.arange(TOKENS - 40)])
    return [{**row, "position_ids": positions} for row in rows(count)]


@pytest.mark.parametrize("part", ["train", "evaluation"])
def test_a_packed_batch_is_refused_unless_it_is_to_be_ignored(tmp_path, part):
    settings = {"steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    given = {"data": packed()} if part == "train" else {"evaluated": packed()}
    given.setdefault("evaluated", rows(2, seed=1))
    with (
        all_lighthouse_trainer(1, CONFIG) as callback,
        pytest.raises(ValueError, match=r"position_ids restart.*documents=True"),
    ):
        trained(tmp_path, callback, **given, **settings)
    trained(tmp_path, all_lighthouse_trainer(1, CONFIG, documents="ignore"), **given, **settings)


def documents_of_rows(count=16):
    """Rows of other lengths, for a collator that flattens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 60, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


@pytest.mark.parametrize("switch", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_flattened_batches_train_inside_documents(tmp_path, switch):
    """Of batches of two rows; where a step is dense, as the rows one by one."""
    collator = transformers.DataCollatorWithFlattening()
    data = documents_of_rows()
    # documents so short that nothing is compressed are dense
    config = CONFIG if switch > 1 else LighthouseConfig(num_levels=2, pooling_factor=2, top_k=64)
    settings = {"steps": 4, "evaluated": data[:4], "eval_strategy": "steps", "eval_steps": 2}
    model, losses, _ = trained(
        tmp_path, all_lighthouse_trainer(switch, config, documents=True), data=data, collator=collator, **settings
    )
    by_hand = llama()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=RATE, weight_decay=0.0)
    for number in range(4):
        parts = [torch.tensor([row["input_ids"]]) for row in data[2 * number : 2 * number + 2]]
        weights = [part.shape[1] - 1 for part in parts]
        for part, weight in zip(parts, weights, strict=True):
            (by_hand(input_ids=part, labels=part).loss * weight / sum(weights)).backward()
        optimizer.step()
        optimizer.zero_grad()
    equal = torch.allclose(model.lm_head.weight, by_hand.lm_head.weight, rtol=1e-3, atol=1e-4)
    assert equal == (switch == 1)
    assert len(losses.evaluation) == 2
    assert scopes == []
