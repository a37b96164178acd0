"""Route a model's causal self-attention to Lighthouse Attention and back; plain PyTorch, no Lightning.

`patch_attention` finds the attention modules and gives a handle that turns the routing on and off and undoes it. How a
call is routed is in `routing`. No parameter is added and no module renamed: `state_dict` never changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.layer_types import DENSE, LIGHTHOUSE, check_layer_types, spread_over
from lightning_lighthouse.checks import quoted, warn
from lightning_lighthouse.routing.adapters import generation
from lightning_lighthouse.routing.adapters.transformers_mask import CausalStatement
from lightning_lighthouse.routing.audit import explain
from lightning_lighthouse.routing.audits import Audits
from lightning_lighthouse.routing.calls import swap, unswap
from lightning_lighthouse.routing.kept_documents import KeptDocuments, find_others
from lightning_lighthouse.routing.layers import Route, bind, scope_of, unbind
from lightning_lighthouse.routing.packing import DocumentsSetting, check_documents
from lightning_lighthouse.routing.reasons import NO_REASONS
from lightning_lighthouse.routing.rotary import check_rotary, find_rotary
from lightning_lighthouse.routing.scope import Scope, Settings, Shared, scopes
from lightning_lighthouse.routing.targets import DenseLayers, choose_routed, find_targets, tell_lost
from lightning_lighthouse.routing.trained_dense import TrainedDense


class Patch(Shared):
    """Handle of a patched model, made by `patch_attention`. Off at first.

    As a context manager it is on inside and restores the model at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        targets: dict[str, nn.Module],
        settings: Settings,
        statement: CausalStatement,
        others: dict[str, nn.Module],
        documents: DocumentsSetting,
        rotary: Mapping[str, Any] | None,
    ) -> None:
        self.model = model
        self._rotary = rotary
        self.targets = targets
        self.scope = Scope(settings)
        # all attention layers, the dense ones too
        self.layers = layers
        self._layer_types = dict.fromkeys(targets, LIGHTHOUSE)
        self._audits = Audits(self.scope, targets)
        self._statement = statement
        # patched for documents alone
        self._others = others
        self.documents = KeptDocuments(model, documents, self.scope, statement, layers)
        self._trained_dense = TrainedDense(model)

    @property
    def is_on(self) -> bool:
        """Whether calls are routed now."""
        return self.scope.is_on

    @property
    def is_patched(self) -> bool:
        """Whether the model is patched still; False once it was restored."""
        return self.scope in scopes

    def set_step(self, step: int) -> None:
        """Tell the number of the training step, for which selection="random" draws; 0 at first.

        Forward, backward and recomputation of a step, and all ranks, must see the same number.
        """
        self.scope.step.fill_(step)

    def on(self, inference: bool = False) -> None:
        """Route the calls of the routed layers to Lighthouse Attention.

        `generate` is dense all the same, as are single tokens after a cache.

        Args:
            inference: Route calls without gradients in eval mode too. Otherwise those of eager code stay dense:
                validation, or the first pass over a prompt.

        Raises:
            RuntimeError: The patch was restored.
        """
        self._require_patched()
        self._audits.ask()
        self.scope.is_on = self._statement.holds = True
        self.documents.demand(training=True)
        self.scope.with_inference = inference
        if not inference:
            self._trained_dense.train(self.scope.settings.config, self._layer_types.values())

    def off(self) -> None:
        """Leave every call to stock SDPA: for validation and whatever else is not training.

        Where documents are set, attention stays inside them all the same.
        """
        self.scope.is_on = self._statement.holds = False
        self.documents.demand(training=False)

    def dense(self) -> None:
        """Train dense: every call goes to stock SDPA, but `hf_assume_causal` holds on.

        Raises:
            RuntimeError: The patch was restored.
        """
        self._require_patched()
        self.scope.is_on, self._statement.holds = False, True
        self.documents.demand(training=True)
        self._trained_dense.train(self.scope.settings.config, [DENSE])

    def set_documents(self, documents: Documents | None) -> None:
        """Keep attention inside these documents from the next call on, in every layer, also while the patch is off.

        To be told before the forward, and to hold until its backward is done: what is computed again there must see
        the same.

        Args:
            documents: Of the batch that comes; None: of a forward that has none, as `generate`.

        Raises:
            TypeError: Not `Documents`.
            ValueError: The model was patched without documents=True.
            RuntimeError: The patch was restored.
        """
        self._require_patched()
        self.documents.set(documents)

    @property
    def routed(self) -> list[str]:
        """Names of the layers that do not attend densely while the patch is on, those handed back included."""
        return [name for name, layer_type in self._layer_types.items() if layer_type != DENSE]

    @property
    def attending(self) -> list[str]:
        """How each attention layer of the model attends now, in their order."""
        routes = {name: module.__dict__["_lighthouse_route"] for name, module in self.targets.items()}
        return [routes[name].layer_type if self.is_on and name in routes else DENSE for name in self.layers]

    def attend(
        self,
        layer_types: Sequence[str],
        *,
        config: LighthouseConfig | None = None,
        window: int | None = None,
        sink_tokens: int = 0,
    ) -> None:
        """Let the layers attend in another way from the next call on. None is handed back then.

        A frame that torch.compile made is compiled anew for each type, window and config, once.

        Args:
            layer_types: A type for each attention layer of the model, in their order, or a pattern that is repeated:
                "lighthouse", "window", "chunk" or "dense". Layers that `dense_layers` named stay dense.
            config: Of Lighthouse Attention; None: as before.
            window: Tokens that a token of a "window" layer sees, itself included; tokens of a block of "chunk".
            sink_tokens: First tokens that stay visible in "window" layers.

        Raises:
            TypeError: One has the wrong type.
            ValueError: A type does not exist, or there are more than layers; a value is missing, or used by no type;
                SettingError with rotate="after" where the model does not show how it rotates.
        """
        types = spread_over(check_layer_types(layer_types, window, sink_tokens), len(self.layers))
        by_name = dict(zip(self.layers, types, strict=True))
        asked = config or self.scope.settings.config
        self.documents.attend(asked, LIGHTHOUSE in types)
        if asked.rotate == "after":
            routed = {name: module for name, module in self.targets.items() if by_name[name] == LIGHTHOUSE}
            self.scope.rotary = find_rotary(self.model, routed, self._rotary)
        self._layer_types = {name: by_name[name] for name in self.targets}
        tell_lost(types, self._layer_types.values())
        self.scope.settings = Settings(asked, window, sink_tokens)
        self.hand_back(())

    def hand_back(self, layers: Collection[str]) -> None:
        """Leave the calls of these layers to stock SDPA also while the patch is on; () hands back none.

        A frame that torch.compile made of several layers is compiled anew for each set of them, a frame of one once.

        Args:
            layers: Names from `targets`; they replace those handed back before.

        Raises:
            KeyError: One is not among the routed layers.
        """
        returned = {self.targets[name] for name in layers}
        for name, module in self.targets.items():
            route = module.__dict__["_lighthouse_route"]
            route.layer_type = DENSE if module in returned else self._layer_types[name]
        # else `on` asks
        if self.is_on:
            self._audits.ask(may_wait=True)

    def count_calls(self) -> Counter[str]:
        """What became of the calls of routed layers since this was last asked: "routed", or why they stayed dense.

        In eager code every call counts; a compiled frame counts when it is traced, and not when it runs again.
        """
        calls = self.scope.calls
        self.scope.calls = Counter()
        return Counter({reason: count for reason, count in calls.items() if reason not in NO_REASONS})

    def _require_patched(self) -> None:
        if not self.is_patched:
            raise RuntimeError("this patch was restored; patch the model anew")

    def unrouted(self) -> dict[str, str]:
        """The layers that were not routed while the patch was on, by name, with the reason; {} if it never was.

        The first call decides about the layers routed until then: notes are collected again once another is. Under
        torch.compile a layer leaves its note when its frame is traced.
        """
        self._audits.finish()
        return dict(self._audits.missing)

    def check(self, on_unroutable: Literal["raise", "warn"] = "raise") -> None:
        """Make sure that every layer was routed, and no teacher's; to be called after the first step with the patch on.

        Later calls do nothing until a layer is routed that was dense before: call it after the first step of each
        phase, or after every step.

        Args:
            on_unroutable: "warn" goes on with the layers dense that were not.

        Raises:
            RuntimeError: Layers stayed dense, or were routed without gradients beside layers that train; the message
                names each with the reason.
        """
        self.documents.check()
        missing = self._audits.finish()
        if not missing:
            return
        line = explain(missing, len(self.targets))
        if on_unroutable == "raise":
            raise RuntimeError(line)
        warn(line, stacklevel=2)

    @contextmanager
    def unaudited(self) -> Iterator[None]:
        """What is routed inside says nothing of a training batch."""
        audit, self.scope.audit = self.scope.audit, None
        try:
            yield
        finally:
            self.scope.audit = audit

    @property
    def has_run(self) -> bool:
        """Whether `check` has something to judge by: since the audit began, a routed layer ran, or was traced."""
        return self._audits.has_run

    @property
    def is_audited(self) -> bool:
        """Whether notes are collected now."""
        return self.scope.audit is not None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Off inside, and as before after it."""
        before = self.scope.is_on, self._statement.holds
        # those of a batch are not those of what runs inside
        with self.documents.none():
            self.off()
            try:
                yield
            finally:
                if self.is_patched:
                    self.scope.is_on, self._statement.holds = before

    def restore(self) -> None:
        """Undo the patch: the model is as it was. Harmless when already restored."""
        scope = self.scope
        scope.is_on, scope.layer_type = False, ""
        scope.layer = scope.audit = None
        if not self.is_patched:
            return
        scopes.remove(scope)
        self.documents.end()
        self._statement.withdraw()
        for module in (*self.targets.values(), *self._others.values()):
            unbind(module)
        generation.unbind(self.model)
        if not scopes:
            unswap()

    def __enter__(self) -> Patch:
        self.on()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        unchecked = kind is None and self.has_run
        try:
            missing = self._audits.finish() if unchecked else {}
            if kind is None:
                self.documents.finish()
        finally:
            self.restore()
        if missing:
            raise RuntimeError(explain(missing, len(self.targets)))


@contextmanager
def room_to_recompile(times: int) -> Iterator[None]:
    """Let torch.compile compile a frame so many times more often.

    A frame that exceeds the limit runs uncompiled from then on, with a warning in the log at most.
    """
    from torch._dynamo import config

    with config.patch(recompile_limit=config.recompile_limit + times):
        yield


def patch_attention(
    model: nn.Module,
    config: LighthouseConfig | None = None,
    *,
    dense_layers: DenseLayers = None,
    select: str | None = None,
    hf_assume_causal: bool = False,
    layer_types: Sequence[str] = (LIGHTHOUSE,),
    window: int | None = None,
    sink_tokens: int = 0,
    documents: DocumentsSetting = False,
    rotary: Mapping[str, Any] | None = None,
) -> Patch:
    """Prepare the causal self-attention of `model` to be routed: to Lighthouse Attention, or as `layer_types` says.

        with patch_attention(model, LighthouseConfig(top_k=512)):
            loss = model(tokens)

    Args:
        model: Any module whose attention calls `F.scaled_dot_product_attention(..., is_causal=True)`; compiled before
            or after, wrapped or not.
        config: Settings; None for the defaults.
        dense_layers: Attention layers that stay dense, negative from the end; None and [] for none. "published": the
            first and last two of 16 or more, else the first and last.
        select: Glob over module names that chooses the attention modules.
        hf_assume_causal: Your statement that every training batch of a transformers model is plain causal, without
            padding and without documents packed by position_ids: no mask is then built, in any layer, while the
            patch is on or trains dense. A batch that shows otherwise is an error.
        layer_types: How each attention layer attends, or a pattern that is repeated over them: see `Patch.attend`.
        window: Of the types "window" and "chunk", in tokens.
        sink_tokens: Of the type "window".
        documents: Of batches that pack several. True: attention stays inside those that `Patch.set_documents` is told,
            in every layer, dense ones too; a call that cannot is an error. False: what shows in the inputs of a
            transformers model that they are packed is an error. "ignore": attention goes across documents.
        rotary: How the model rotates q and k, read with `rotate="after"` alone: `{"rope_theta": 10000.0}`, with
            "pairing" ("half" or "interleaved") and "partial_rotary_factor" where it needs them. None: it is found.

    Returns:
        The handle, off: `on()`, `off()`, `dense()`, `check()`, `restore()`. As a context manager it is on, and an
        unchecked patch is checked at the end.

    Raises:
        ValueError: No attention found, no layer left to route, the model is patched already, `hf_assume_causal`
            without a transformers model, or `documents=True` where more than attention goes across tokens.
    """
    if type(hf_assume_causal) is not bool:
        raise TypeError(f"hf_assume_causal must be a bool, got {quoted(hf_assume_causal)}")
    check_documents(documents, hf_assume_causal)
    check_rotary(rotary)
    layers = find_targets(model, select)
    targets = choose_routed(layers, dense_layers)
    settings = Settings(config or LighthouseConfig(), window, sink_tokens)
    others = find_others(model, layers, targets) if documents is True else {}
    taken = [name for name, module in {**targets, **others}.items() if scope_of(module) in scopes]
    if taken:
        raise ValueError(f"{type(model).__name__} is patched already ({taken[0]}); restore the first patch before")
    check_layer_types(layer_types, window, sink_tokens)
    spread_over(layer_types, len(layers))
    statement = CausalStatement(model, hf_assume_causal, documents)
    patch = Patch(model, layers, targets, settings, statement, others, documents, rotary)
    if not scopes:
        swap()
    scopes.append(patch.scope)
    for name, module in (*targets.items(), *others.items()):
        bind(module, patch.scope, Route(name) if name in targets else Route(name, DENSE, name in layers))
    generation.bind(model, patch)
    try:
        patch.attend(layer_types, window=window, sink_tokens=sink_tokens)
    except BaseException:
        patch.restore()
        raise
    return patch
