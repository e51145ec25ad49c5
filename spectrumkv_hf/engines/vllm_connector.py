"""vLLM's prefill and decode servers over a shared folder of compressed prompts. See docs/engines.md.

Load it with `kv_connector="SpectrumConnector"` and `kv_connector_module_path="spectrumkv_hf.engines.vllm_connector"`. A
producer compresses each layer's whole blocks of a prompt when the last of them is computed; a consumer that gets the
same prompt restores them before its forward. What can't be restored is reported, and recomputed by vLLM if it runs with
`kv_load_failure_policy="recompute"`. vLLM calls the interface experimental: `SUPPORTED` says for which versions
tests have pinned it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from spectrumkv_hf.engines.adapters import Adapters
from spectrumkv_hf.engines.layouts import PER_TOKEN, VLLM_CPU
from spectrumkv_hf.engines.prompt_store import PromptStore
from spectrumkv_hf.engines.settings import block_codec, model_shape
from spectrumkv_hf.wire.frame import WireError

logger = init_logger(f"vllm.{__name__}")  # vLLM shows the loggers below its own

SUPPORTED = ("0.32",)
"""Minor versions of vLLM."""


@dataclass
class Move:
    """Blocks of a prompt to store or load.

    Attributes:
        name: Of the prompt in the store.
        blocks: Ids of all its whole blocks.
        skip: Of these the first that need not be loaded, because the server has them.
    """

    name: str
    blocks: list[int]
    skip: int = 0


@dataclass
class SpectrumMetadata(KVConnectorMetadata):
    """What the scheduler's half tells the worker's for one step."""

    loads: list[Move] = field(default_factory=list)
    saves: list[Move] = field(default_factory=list)


class SpectrumConnector(KVConnectorBase_V1):
    """A connector of vLLM; `kv_connector_extra_config` takes

    * `path`: the shared folder, required,
    * `policy`, `budget`, `codec` and further fields of the policy, as in `block_codec`,
    * `model_id`: names the weights, the same for both servers; by default the model as given to vLLM,
    * `layout`: where a block holds its tokens, if it can't be told from the backend.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer, model, parallel = self._kv_transfer_config, vllm_config.model_config, vllm_config.parallel_config
        if parallel.world_size > 1:
            raise ValueError(f"SpectrumConnector serves one worker, got {parallel.world_size}")
        if model.use_mla:
            raise ValueError("SpectrumConnector compresses keys and values; this model keeps MLA latents")
        if transfer.kv_load_failure_policy != "recompute":
            logger.warning('A damaged prompt will fail its request: set kv_load_failure_policy to "recompute"')
        options = dict(transfer.kv_connector_extra_config)
        self._path, self._layout = options.pop("path", None), options.pop("layout", None)
        if not self._path:
            raise ValueError("SpectrumConnector needs path, a shared folder, in kv_connector_extra_config")
        identity = [options.pop("model_id", model.model), model.revision, str(vllm_config.cache_config.cache_dtype)]
        shape = model_shape(model.hf_text_config)
        self._codec, self._layers = block_codec(shape, identity=identity, **options), shape.layers
        self._block = vllm_config.cache_config.block_size
        # The scheduler's. It looks for names alone, in which the layout of blocks has no part.
        self._names = PromptStore(self._path, self._codec, self._layout or PER_TOKEN, self._layers)
        self._adapters = Adapters()
        self._prompts: dict[str, tuple[str, int]] = {}  # name, and tokens in whole blocks
        self._blocks: dict[str, list[int]] = {}
        self._loads: dict[str, int] = {}  # blocks to skip
        # The worker's:
        self._store: PromptStore | None = None
        self._bad: set[int] = set()
        self._bytes: dict[str, int] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        """No: a prompt that was not stored is computed again."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Yes: replays of a full graph would not call `save_kv_layer`."""
        return True

    # -- scheduler ----------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = request.prompt_token_ids or []
        whole = (len(tokens) - 1) // self._block * self._block  # one token at least is left to compute
        if whole <= 0:
            return 0, False
        adapter = self._adapters.identity(request.lora_request)
        if adapter is None:
            logger.warning_once(
                f"Prompts of adapter {request.lora_request.lora_name!r} are not shared: which weights are loaded can't "
                f"be told from {request.lora_request.lora_path!r}"
            )
            return 0, False
        context = [request.cache_salt or "", adapter]
        name = self._names.name(tokens[:whole], *context, *(f.identifier for f in request.mm_features))
        self._prompts[request.request_id] = name, whole
        if whole > num_computed_tokens and self._kv_transfer_config.is_kv_consumer and name in self._names:
            return whole - num_computed_tokens, False
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            _, whole = self._prompts[request.request_id]
            self._loads[request.request_id] = (whole - num_external_tokens) // self._block

    def build_connector_meta(self, scheduler_output: Any) -> SpectrumMetadata:
        metadata = SpectrumMetadata()
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            self._blocks[new.req_id] = list(new.block_ids[0])
            self._plan(metadata, new.req_id, new.num_computed_tokens + scheduled[new.req_id])
        cached = scheduler_output.scheduled_cached_reqs
        for request, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request in cached.resumed_req_ids:  # from preemption: these are all its blocks
                self._blocks[request] = []
            if request in self._prompts:
                self._blocks[request] += blocks[0] if blocks else []
                self._plan(metadata, request, computed + scheduled[request])
        for request in scheduler_output.finished_req_ids:
            for kept in (self._prompts, self._blocks, self._loads):
                kept.pop(request, None)
        return metadata

    def _plan(self, metadata: SpectrumMetadata, request: str, computed: int) -> None:
        """What this step has to do for a request of which `computed` tokens will be there after it."""
        if request not in self._prompts:
            return
        name, whole = self._prompts[request]
        blocks = self._blocks[request][: whole // self._block]
        if request in self._loads:
            metadata.loads.append(Move(name, blocks, self._loads.pop(request)))
        elif computed < whole:
            return
        elif self._kv_transfer_config.is_kv_producer and name not in self._names:
            metadata.saves.append(Move(name, blocks))
        del self._prompts[request], self._blocks[request]

    # -- worker -------------------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for move in self._metadata.loads:
            try:
                loaded = self._load(move, forward_context.no_compile_layers)
            except (WireError, OSError) as problem:
                logger.warning("Prompt %s can't be restored: %s", move.name, problem)
                self._bad.update(move.blocks[move.skip :])
                if isinstance(problem, WireError):
                    self._worker_store(forward_context.no_compile_layers).discard(move.name)
            else:
                logger.info("Restored prompt %s: %d blocks of %d layers", move.name, len(move.blocks), loaded)

    def _load(self, move: Move, layers: dict[str, Any]) -> int:
        caches = {name: layer.kv_cache for name, layer in layers.items() if _has_cache(layer)}
        store = self._worker_store(layers)
        for name, cache in caches.items():
            blocks = store.load(move.name, extract_layer_index(name), cache, len(move.blocks))
            cache[torch.tensor(move.blocks[move.skip :], device=cache.device)] = blocks[move.skip :]
        return len(caches)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: `start_load_kv` has loaded everything."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        for move in self._metadata.saves:
            if self._bytes.get(move.name, 0) < 0:
                continue  # given up
            store = self._worker_store(self._vllm_config.compilation_config.static_forward_context)
            blocks = kv_layer[torch.tensor(move.blocks, device=kv_layer.device)]
            try:
                size = store.save(move.name, extract_layer_index(layer_name), blocks)
            except (ValueError, OSError) as problem:
                logger.warning("Prompt %s is not stored: %s", move.name, problem)
                store.discard(move.name)
                self._bytes[move.name] = -1
            else:
                self._bytes[move.name] = self._bytes.get(move.name, 0) + size

    def wait_for_save(self) -> None:
        for move in self._metadata.saves:
            size = self._bytes.pop(move.name, -1)
            if size >= 0 and self._store is not None:
                self._store.commit(move.name)
                logger.info("Stored prompt %s: %d blocks, %d bytes", move.name, len(move.blocks), size)

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self._bad = self._bad, set()
        return bad

    @property
    def _metadata(self) -> SpectrumMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, SpectrumMetadata)
        return metadata

    def _worker_store(self, layers: dict[str, Any]) -> PromptStore:
        if self._store is None:
            layouts = {layout_of(layer) for layer in layers.values() if _has_cache(layer)}
            if self._layout is None and len(layouts) > 1:
                raise ValueError(f"layers of several layouts: {', '.join(sorted(layouts))}")
            self._store = PromptStore(self._path, self._codec, self._layout or layouts.pop(), self._layers)
        return self._store


def _has_cache(layer: Any) -> bool:
    return isinstance(getattr(layer, "kv_cache", None), torch.Tensor)


def layout_of(layer: Any) -> str:
    """Where an attention layer's blocks hold their tokens.

    Raises:
        ValueError: a backend whose blocks nobody has looked into.
    """
    isa = getattr(layer, "isa", None)
    if layer.kv_cache.device.type == "cuda":
        return PER_TOKEN
    if isa == "vec":
        return VLLM_CPU
    raise ValueError(f"blocks of vLLM's CPU backend are known for the ISA 'vec', got {isa!r}")
