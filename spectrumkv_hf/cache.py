"""`SpectrumCache`, a `transformers.Cache` whose tokens lie in precision tiers."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from spectrumkv_hf.attention import install
from spectrumkv_hf.identity import model_identity
from spectrumkv_hf.layer import SharedRanking, SlidingSpectrumLayer, SpectrumLayer
from spectrumkv_hf.memory import FP16_BYTES, MemoryReport, storage_bytes
from spectrumkv_hf.policy import Policy, get_policy
from spectrumkv_hf.rope import rotary_of
from spectrumkv_hf.store import TAIL_STEP
from spectrumkv_kernels import CODECS

if TYPE_CHECKING:
    from spectrumkv_hf.probe.auto import Probe

logger = logging.getLogger(__name__)


class SpectrumCache(Cache):
    """A KV cache that gives each token a precision by its importance, so that the whole fits a byte budget.

    Drop-in for `model.generate(past_key_values=...)`: prefill attends over exact keys and values, then tokens move
    into FP16, INT8 and INT4 tiers, and decoding reads those directly.

    Args:
        config: The model's config. Layers with full or sliding-window attention are tiered; others keep the class
            that Transformers has for them (see `summary`).
        policy: Name of a policy (`spectrumkv_hf.POLICIES`) or a policy. `"fp16"` is lossless.
        budget: Mean nominal cost per token, as a fraction of FP16; None: the policy's default.
        codec: `"spectrum"`, or `"absmax"` for the paper's.
        policy_options: Further fields of a policy given by name, such as `recent_window`, `scope`, `decay`.

    Raises:
        ValueError: an unknown policy or codec, a value out of range, an encoder-decoder config.
        TypeError: `config` is no Transformers config, or an option that the policy does not have.

    Example:
        ```python
        cache = SpectrumCache(config=model.config, policy="sink_protect", budget=0.3)
        output = model.generate(**inputs, past_key_values=cache)
        print(cache.memory())
        ```
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: str | Policy = "sink_protect",
        budget: float | None = None,
        codec: str = "spectrum",
        **policy_options: Any,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config is a model's config (model.config), got {type(config).__name__}")
        if config.is_encoder_decoder:
            raise ValueError(
                f"{type(config).__name__} is an encoder-decoder: its decoder needs a second cache for cross-attention. "
                "Use SpectrumCache.for_encoder_decoder(config, ...)"
            )
        if codec not in CODECS:
            raise ValueError(f"unknown codec {codec!r}: choose from {', '.join(CODECS)}")
        self.policy = get_policy(policy, budget, **policy_options)
        self.codec = CODECS[codec]
        self._notes: dict[int, str] = {}
        text_config = config.get_text_config(decoder=True)
        self.identity = model_identity(text_config)
        super().__init__(layers=self._build_layers(text_config))
        install()

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: Any = None,
        budget: float | None = None,
        policy: str | Policy | None = None,
        codec: str = "spectrum",
        probe: "str | Probe | None" = "calibration",
        **policy_options: Any,
    ) -> "SpectrumCache":
        """A cache for `model` by the policy that a probe names at `budget`.

        The model is probed when this process, and the disk, hold no verdict on it (`spectrumkv_hf.probe`); that takes
        a few forwards of 640 tokens, under a progress bar (`transformers.utils.logging.disable_progress_bar()` turns it
        off). The policy is `sink_protect`, with a floor for layers or at a higher budget where it would otherwise cost
        more than the probe's loss; a warning says so. Without a verdict, for a model that can't be probed, it is
        `sink_protect` as it is, with a warning.

        Args:
            model: The model that will use the cache, with its weights.
            tokenizer: Its tokenizer, for the text that the probe reads; None: it reads random tokens.
            budget: As of the class; None: .5, or that of `policy`.
            policy: As of the class; given, nothing is probed. None: by the probe.
            codec: As of the class.
            probe: `"calibration"`; `"paper"`, by whose verdict the policy is `adaptive`; a `CalibrationProbe` or
                `PaperProbe` of the cache's codec; None for no probe.
            policy_options: Further fields of the policy.

        Raises:
            ValueError: as of the class; an unknown probe, or one of another codec.
            TypeError: as of the class.
        """
        if policy is None:
            budget = 0.5 if budget is None else budget
            if probe is not None and "floors" in policy_options:
                raise TypeError("floors come from the probe: give a policy too, or probe=None")
            least = "two_tier" if getattr(probe, "kind", probe) == "paper" else "sink_protect"
            cls(model.config, least, budget, codec, **policy_options)  # complains before anything is measured
            if probe is None:
                policy = "sink_protect"
            else:
                from spectrumkv_hf.probe.auto import choose_policy

                policy, policy_options = choose_policy(model, tokenizer, probe, codec, budget, policy_options), {}
                budget = None
        return cls(model.config, policy, budget, codec, **policy_options)

    @classmethod
    def for_encoder_decoder(cls, config: PreTrainedConfig, **options: Any) -> EncoderDecoderCache:
        """Self-attention in a `SpectrumCache`, cross-attention in a `DynamicCache`.

        Args:
            config: Of an encoder-decoder model.
            options: As of the class.
        """
        if not config.is_encoder_decoder:
            raise ValueError(f"{type(config).__name__} is no encoder-decoder: use SpectrumCache(config, ...)")
        decoder = config.get_text_config(decoder=True)
        if decoder.is_encoder_decoder:  # the flat configs (BART, T5) come back whole
            decoder.is_encoder_decoder = False
        return EncoderDecoderCache(cls(decoder, **options), DynamicCache(config=decoder))

    def _build_layers(self, config: PreTrainedConfig) -> list[Any]:
        types, kwargs = get_layer_types_and_kwargs(config)
        if beyond := [layer for layer, _ in self.policy.floors if layer >= len(types)]:
            raise ValueError(f"floors name layer {beyond[0]}, the model's layers are 0 to {len(types) - 1}")
        per_layer = [kwargs] * len(types) if isinstance(kwargs, dict) else kwargs  # one dict up to Transformers 5.17
        shares = getattr(config, "num_kv_shared_layers", None) or "reuse" in (
            getattr(config, "kv_sharing_modes", None) or ()
        )
        ranking = SharedRanking() if self.policy.scope == "token" else None
        rotary = functools.cache(functools.partial(rotary_of, config))
        layers: list[Any] = []
        self._stock: dict[int, Callable[[], Any]] = {}
        for index, (kind, options) in enumerate(zip(types, per_layer, strict=True)):
            if kind not in DYNAMIC_LAYER_TYPE_MAPPING:
                raise ValueError(f"layer {index} is of type {kind!r}, for which Transformers has no dynamic layer")
            window = options.get("sliding_window") if kind == "sliding_attention" else None
            if note := self._stock_because(config, kind, window):
                self._notes[index] = note
                self._stock[index] = functools.partial(DYNAMIC_LAYER_TYPE_MAPPING[kind], **options)
                layers.append(self._stock[index]())
                continue
            ours: dict[str, Any] = {
                "policy": self.policy,
                "codec": self.codec,
                "rotary": rotary(kind),
                "layer_idx": index,
                "defer": bool(shares),
                "shared": ranking,
            }
            if window is not None:
                layers.append(SlidingSpectrumLayer(window, **ours))
            else:
                layers.append(SpectrumLayer(**ours))
            if ranking is not None:
                ranking.members += 1
        if self._notes and not self.policy.lossless:
            logger.info("SpectrumCache leaves some layers uncompressed:\n%s", self.summary(layers))
        return layers

    def _stock_because(self, config: PreTrainedConfig, kind: str, window: int | None) -> str | None:
        """Why a layer keeps its stock class, or None where it is tiered."""
        if kind not in ("full_attention", "sliding_attention"):
            return f"{kind}: not tiered"
        if getattr(config, "kv_lora_rank", None):
            return "MLA latents: not tiered"
        if window is not None and self.policy.lossless:
            return "sliding window: exact anyway"
        least = self.policy.recent_window + 2 * TAIL_STEP
        if window is not None and window < least:
            return f"sliding window of {window}: below {least} tokens nothing would leave the exact tail"
        return None

    def summary(self, layers: list[Any] | None = None) -> str:
        """Which layers are tiered, and why the others are not; a line for each kind."""
        layers = self.layers if layers is None else layers
        kinds = Counter(
            (type(layer).__name__, self._notes.get(i) or self._tiering(i)) for i, layer in enumerate(layers)
        )
        return "\n".join(f"{count} x {name}: {note}" for (name, note), count in kinds.items())

    def __repr__(self) -> str:
        """One line: policy, layers by class, tokens and bytes."""
        kinds = Counter(type(layer).__name__ for layer in self.layers)
        lengths = sorted({layer.get_seq_length() for layer in self.layers if hasattr(layer, "get_seq_length")})
        tokens = " or ".join(map(str, lengths or [0]))  # more than one after an interrupted forward
        about = [
            f"{self.policy.name} b={self.policy.budget:g}",
            *(f"{count} x {name}" for name, count in kinds.items()),
        ]
        about += [f"{tokens} tokens", *([self.memory().headline()] if any(lengths) else [])]
        return f"{type(self).__name__}({', '.join(about)})"

    def _tiering(self, index: int) -> str:
        floor = self.policy.floor(index)
        least = f", {floor.name} or better" if floor else ""
        return f"tiered, {self.policy.name} b={self.policy.budget:g}{least}"

    def reset(self) -> None:
        """Forget all tokens, so that the cache serves another prompt."""
        for index, layer in enumerate(self.layers):
            if index in self._stock:  # up to Transformers 5.17 theirs would keep its length
                self.layers[index] = self._stock[index]()
            else:
                layer.reset()

    def on_layer(self, callback: Callable[[int], None]) -> Callable[[], None]:
        """Call `callback` with a tiered layer's index whenever what the layer holds is final until its next update.

        That is right after its attention where tokens were tiered or nothing was due; at the end of the last layer for
        `scope="token"`; and at the next update, or when the layer is serialised, where other layers still read its
        exact tokens (Gemma-3n). Layers of Transformers' own classes don't call: they are final once a later layer is.
        What the callback raises comes out of the model's forward. A cache has one callback; a new one replaces it.

        Returns:
            A function that removes the callback.
        """
        tiered = [layer for layer in self.layers if isinstance(layer, SpectrumLayer)]

        def set_callback(value: Callable[[int], None] | None) -> None:
            for layer in tiered:
                layer.on_final = value

        set_callback(callback)
        return functools.partial(set_callback, None)

    def serialize(self) -> torch.Tensor:
        """The cache as bytes, a contiguous uint8 tensor on its device; docs/wire-format.md describes them.

        Raises:
            WireError: a layer or policy that can't be serialised, or layers of different lengths.
        """
        from spectrumkv_hf import wire

        return wire.serialize(self)

    @classmethod
    def deserialize(
        cls, buffer: Any, config: PreTrainedConfig, device: torch.device | str | None = None
    ) -> "SpectrumCache":
        """The cache that `serialize` wrote.

        Where the buffer begins at a multiple of 64 bytes and lies on `device`, tensors are views of it. Nothing writes
        into it, and it must not change while the cache is in use.

        Args:
            buffer: bytes, bytearray, memoryview, mmap, or a contiguous uint8 tensor `[bytes]`.
            config: Of the model that will use the cache.
            device: Where the cache will lie; None: where the buffer does.

        Raises:
            WireError: the bytes are damaged, of another version, or of another model.
            TypeError: `buffer` is none.
        """
        from spectrumkv_hf import wire

        return wire.deserialize(buffer, config, device)

    def apply_patch(self, frame: Any) -> None:
        """Lift tokens to a higher tier, as a patch frame says that `spectrumkv_hf.wire.request` has asked for.

        Args:
            frame: A buffer as of `deserialize`; its tensors are copied.

        Raises:
            WireError: the frame is damaged, or the tokens have changed since they were asked for (batch operations,
                `crop`, another patch). The cache is as it was.
        """
        from spectrumkv_hf import wire_patch

        wire_patch.apply(self, frame)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what `serialize` gives into a file, which appears at `path` whole or not at all."""
        from spectrumkv_hf import wire

        wire.save(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: PreTrainedConfig, device: torch.device | str | None = None
    ) -> "SpectrumCache":
        """The cache that `save` wrote; on the CPU its tensors are the mapped file. Arguments as of `deserialize`."""
        from spectrumkv_hf import wire

        return wire.load(path, config, device)

    def _tiered(self) -> Iterator[SpectrumLayer]:
        return (layer for layer in self.layers if isinstance(layer, SpectrumLayer) and layer.is_initialized)

    def memory(self) -> MemoryReport:
        """Bytes stored by tier and part, and those of the exact cache that they replace."""
        parts: Counter[str] = Counter()
        tensors: list[torch.Tensor] = []
        elements = cost = exact = 0.0
        for layer in self._tiered():
            store = layer.store
            for name, tensor in store.tensors():
                parts[name] += storage_bytes([tensor])
                tensors.append(tensor)
            keys, values = store.tail
            per_token = store.batch_size * layer.kv_heads * (keys.shape[3] + values.shape[3])
            visible = store.length - (layer._first_needed() if isinstance(layer, SlidingSpectrumLayer) else 0)
            elements += visible * per_token
            exact += visible * per_token * keys.element_size()
            cost += store.tail_length * per_token
            cost += sum(float(arena.tier.cost) * len(arena) * per_token for arena in store.arenas.values())
        stock = [t for layer in self.layers if not isinstance(layer, SpectrumLayer) for t in _tensors_of(layer)]
        uncompressed = storage_bytes(stock)
        if uncompressed:
            parts["uncompressed"] = uncompressed
        order = sorted(parts, key=lambda name: -parts[name])
        return MemoryReport(
            stored=storage_bytes([*tensors, *stock]),
            exact=int(exact) + uncompressed,
            fp16=int(elements * FP16_BYTES) + uncompressed,
            nominal_ratio=cost / elements if elements else 0.0,
            parts={name: parts[name] for name in order},
        )

    def tier_map(self) -> dict[int, torch.Tensor]:
        """Bits of every token by tiered layer, int64 `[batch, kv_heads, length]`; 0 where it was dropped or left."""
        return {layer.layer_idx: layer.tier_map() for layer in self._tiered()}


def _tensors_of(layer: Any) -> Iterator[torch.Tensor]:
    """The tensors that a stock layer holds, in attributes or in dicts and lists of them."""
    for value in vars(layer).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from (v for v in value.values() if isinstance(v, torch.Tensor))
        elif isinstance(value, list | tuple):
            yield from (v for v in value if isinstance(v, torch.Tensor))
