"""The connector's two halves against vLLM's interface. Skipped where vLLM is missing."""

import inspect
import os
from types import SimpleNamespace

import pytest
import torch
from families import config

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

# ruff: noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from spectrumkv_hf.engines.vllm_connector import SUPPORTED, Move, SpectrumConnector, SpectrumMetadata, layout_of

BLOCK = 8
CONTRACT = {
    "0.32": {
        "__init__": ["self", "vllm_config", "role", "kv_cache_config"],
        "start_load_kv": ["self", "forward_context", "kwargs"],
        "wait_for_layer_load": ["self", "layer_name"],
        "save_kv_layer": ["self", "layer_name", "kv_layer", "attn_metadata", "kwargs"],
        "wait_for_save": ["self"],
        "get_num_new_matched_tokens": ["self", "request", "num_computed_tokens"],
        "update_state_after_alloc": ["self", "request", "blocks", "num_external_tokens"],
        "build_connector_meta": ["self", "scheduler_output"],
        "get_block_ids_with_load_errors": ["self"],
        "requires_piecewise_for_cudagraph": ["extra_config"],
    }
}
"""Parameters of what we implement, by minor version of vLLM."""
MINOR = ".".join(vllm.__version__.split(".")[:2])


class TestContract:
    def test_supported(self):
        assert set(SUPPORTED) == set(CONTRACT)
        assert MINOR in SUPPORTED

    @pytest.mark.parametrize("name", CONTRACT["0.32"])
    def test_signature(self, name):
        for cls in (KVConnectorBase_V1, SpectrumConnector):
            assert list(inspect.signature(getattr(cls, name)).parameters) == CONTRACT[MINOR][name], cls

    def test_abstract_methods(self):
        assert set(CONTRACT[MINOR]) >= KVConnectorBase_V1.__abstractmethods__
        assert not SpectrumConnector.__abstractmethods__


def connector(folder, role="kv_both", **changes):
    transfer = SimpleNamespace(
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"path": str(folder), "policy": "uniform_int8", **changes.pop("extra", {})},
        is_kv_producer=role != "kv_consumer",
        is_kv_consumer=role != "kv_producer",
    )
    layers = {f"model.layers.{i}.self_attn.attn": SimpleNamespace(kv_cache=cache(i), isa="vec") for i in range(2)}
    settings = SimpleNamespace(
        kv_transfer_config=transfer,
        model_config=SimpleNamespace(
            model=changes.pop("model", "m"),
            revision=None,
            use_mla=changes.pop("mla", False),
            hf_text_config=config("llama"),
        ),
        parallel_config=SimpleNamespace(world_size=changes.pop("workers", 1)),
        cache_config=SimpleNamespace(block_size=BLOCK, cache_dtype="auto"),
        compilation_config=SimpleNamespace(static_forward_context={**layers, "model.layers.0.mlp": object()}),
    )
    return SpectrumConnector(settings, KVConnectorRole.WORKER, None)


def cache(seed):
    return torch.randn(12, 2, BLOCK, 32, generator=torch.Generator().manual_seed(seed))


def request(name="r", tokens=20, salt=None, lora=None):
    return SimpleNamespace(
        request_id=name, prompt_token_ids=list(range(tokens)), cache_salt=salt, lora_request=lora, mm_features=[]
    )


def step(new=(), cached=(), finished=()):
    """A scheduler's output: `new` as (id, blocks, computed, scheduled), `cached` with None for no new blocks, and
    whether the request was resumed."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=computed)
            for name, blocks, computed, _ in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[item[0] for item in cached],
            new_block_ids=[None if item[1] is None else (item[1],) for item in cached],
            num_computed_tokens=[item[2] for item in cached],
            resumed_req_ids={item[0] for item in cached if item[4]},
        ),
        num_scheduled_tokens={item[0]: item[3] for item in [*new, *cached]},
        finished_req_ids=set(finished),
    )


def store(ours, blocks=(3, 4, 5), tokens=20, salt=None):
    """Run a prompt through a producer."""
    assert ours.get_num_new_matched_tokens(request(tokens=tokens, salt=salt), 0) == (0, False)
    metadata = ours.build_connector_meta(step(new=[("r", list(blocks), 0, tokens)]))
    work(ours, metadata)
    return metadata.saves[0].name


def work(ours, metadata):
    """A worker's step."""
    layers = ours._vllm_config.compilation_config.static_forward_context
    ours.bind_connector_metadata(metadata)
    ours.start_load_kv(SimpleNamespace(no_compile_layers=layers))
    for name, layer in layers.items():
        if hasattr(layer, "kv_cache"):
            ours.wait_for_layer_load(name)
            ours.save_kv_layer(name, layer.kv_cache, None)
    ours.wait_for_save()
    ours.clear_connector_metadata()


def caches(ours):
    layers = ours._vllm_config.compilation_config.static_forward_context.values()
    return [layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")]


class TestScheduler:
    def test_an_adapter_is_its_weights(self, tmp_path):
        """Not its name, nor its number: retrained under both, it misses; moved, it hits."""

        def lora(number, folder, weights):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "adapter_model.safetensors").write_bytes(weights)
            return SimpleNamespace(lora_name="a", lora_int_id=number, lora_path=str(tmp_path / folder))

        ours, first = connector(tmp_path / "store"), lora(1, "one", b"old")
        ours.get_num_new_matched_tokens(request(lora=first), 0)
        work(ours, ours.build_connector_meta(step(new=[("r", [3, 4, 5], 0, 20)])))
        assert ours.get_num_new_matched_tokens(request(lora=first), 0) == (16, False)
        assert ours.get_num_new_matched_tokens(request(), 0) == (0, False)
        assert ours.get_num_new_matched_tokens(request(lora=lora(2, "two", b"new")), 0) == (0, False)
        again = connector(tmp_path / "store")
        assert again.get_num_new_matched_tokens(request(lora=lora(1, "moved", b"old")), 0) == (16, False)
        retrained = lora(1, "one", b"new")
        assert connector(tmp_path / "store").get_num_new_matched_tokens(request(lora=retrained), 0) == (0, False)
        assert ours.get_num_new_matched_tokens(request("s", lora=retrained), 0) == (0, False)
        assert not ours.build_connector_meta(step(new=[("s", [3, 4, 5], 0, 20)])).saves

    def test_stores_whole_blocks(self, tmp_path):
        """19 of 20 tokens can be left out of a prefill: two blocks of 8."""
        ours = connector(tmp_path)
        ours.get_num_new_matched_tokens(request(), 0)
        metadata = ours.build_connector_meta(step(new=[("r", [7, 1, 2], 0, 20)]))
        assert [move.blocks for move in metadata.saves] == [[7, 1]]
        assert not metadata.loads

    def test_chunked_prefill(self, tmp_path):
        """Stored in the step that computes the last token of the last whole block, with the blocks of all steps."""
        ours = connector(tmp_path)
        ours.get_num_new_matched_tokens(request(tokens=40), 0)
        assert not ours.build_connector_meta(step(new=[("r", [7, 1], 0, 12)])).saves
        assert not ours.build_connector_meta(step(cached=[("r", [4], 12, 12, False)])).saves
        assert not ours.build_connector_meta(step(cached=[("r", None, 24, 0, False)])).saves
        metadata = ours.build_connector_meta(step(cached=[("r", [9, 3], 24, 8, False)]))
        assert [move.blocks for move in metadata.saves] == [[7, 1, 4, 9]]
        assert not ours.build_connector_meta(step(cached=[("r", None, 32, 8, False)])).saves

    def test_resumed_from_preemption(self, tmp_path):
        ours = connector(tmp_path)
        ours.get_num_new_matched_tokens(request(), 0)
        ours.build_connector_meta(step(new=[("r", [7, 1], 0, 12)]))
        ours.get_num_new_matched_tokens(request(), 0)
        metadata = ours.build_connector_meta(step(cached=[("r", [5, 6, 8], 0, 20, True)]))
        assert [move.blocks for move in metadata.saves] == [[5, 6]]

    def test_finished_requests_are_forgotten(self, tmp_path):
        ours = connector(tmp_path)
        ours.get_num_new_matched_tokens(request(tokens=40), 0)
        ours.build_connector_meta(step(new=[("r", [7], 0, 8)]))
        ours.build_connector_meta(step(finished=["r"]))
        assert not ours._prompts
        assert not ours._blocks

    def test_short_prompts(self, tmp_path):
        ours = connector(tmp_path)
        assert ours.get_num_new_matched_tokens(request(tokens=8), 0) == (0, False)
        assert not ours.build_connector_meta(step(new=[("r", [7], 0, 8)])).saves

    def test_consumer(self, tmp_path):
        store(connector(tmp_path, "kv_producer"))
        ours = connector(tmp_path, "kv_consumer")
        assert ours.get_num_new_matched_tokens(request(), 0) == (16, False)
        ours.update_state_after_alloc(request(), None, 16)
        metadata = ours.build_connector_meta(step(new=[("r", [2, 9, 6], 16, 4)]))
        assert [(move.blocks, move.skip) for move in metadata.loads] == [([2, 9], 0)]
        assert not metadata.saves

    def test_what_the_server_has_is_left_alone(self, tmp_path):
        store(connector(tmp_path, "kv_producer"))
        ours = connector(tmp_path, "kv_consumer")
        assert ours.get_num_new_matched_tokens(request(), 8) == (8, False)
        ours.update_state_after_alloc(request(), None, 8)
        before = [layer.clone() for layer in caches(ours)]
        metadata = ours.build_connector_meta(step(new=[("r", [2, 9, 6], 16, 4)]))
        assert [(move.blocks, move.skip) for move in metadata.loads] == [([2, 9], 1)]
        work(ours, metadata)
        for old, new in zip(before, caches(ours), strict=True):
            assert torch.equal(old[2], new[2])
            assert not torch.equal(old[9], new[9])

    def test_roles(self, tmp_path):
        consumer = connector(tmp_path, "kv_consumer")
        consumer.get_num_new_matched_tokens(request(), 0)
        assert not consumer.build_connector_meta(step(new=[("r", [7, 1, 2], 0, 20)])).saves
        store(connector(tmp_path, "kv_producer"))
        assert connector(tmp_path, "kv_producer").get_num_new_matched_tokens(request(), 0) == (0, False)

    def test_others_do_not_find_it(self, tmp_path):
        store(connector(tmp_path, "kv_producer"), salt="tenant")
        assert connector(tmp_path).get_num_new_matched_tokens(request(salt="tenant"), 0) == (16, False)
        for ours, asked in [
            (connector(tmp_path), request()),
            (connector(tmp_path), request(salt="tenant", tokens=28)),
            (connector(tmp_path, model="other"), request(salt="tenant")),
            (connector(tmp_path, extra={"budget": 0.5, "policy": "greedy"}), request(salt="tenant")),
        ]:
            assert ours.get_num_new_matched_tokens(asked, 0) == (0, False)
        named = connector(tmp_path, model="other", extra={"model_id": "m"})
        assert named.get_num_new_matched_tokens(request(salt="tenant"), 0) == (16, False)


class TestWorker:
    @pytest.mark.parametrize("policy", ["fp16", "uniform_int8"])
    def test_restores(self, tmp_path, policy):
        store(connector(tmp_path, "kv_producer", extra={"policy": policy}))
        ours = connector(tmp_path, "kv_consumer", extra={"policy": policy})
        original = [layer.clone() for layer in caches(ours)]
        for layer in caches(ours):
            layer[[3, 4]] = torch.nan
        metadata = SpectrumMetadata(loads=[Move(next(tmp_path.iterdir()).name, [10, 11])])
        work(ours, metadata)
        for old, new in zip(original, caches(ours), strict=True):
            assert torch.equal(new[5:10], old[5:10])
            if policy == "fp16":
                assert torch.equal(new[[10, 11]], old[[3, 4]])
            else:
                assert (new[[10, 11]] - old[[3, 4]]).abs().max() < 0.05
        assert ours.get_block_ids_with_load_errors() == set()

    @pytest.mark.parametrize("layer", [0, 1])
    def test_damage_is_reported_once(self, tmp_path, layer):
        name = store(connector(tmp_path, "kv_producer"))
        path = sorted((tmp_path / name).iterdir())[layer]
        data = bytearray(path.read_bytes())
        data[-99] ^= 2
        path.write_bytes(data)
        ours = connector(tmp_path, "kv_consumer")
        work(ours, SpectrumMetadata(loads=[Move(name, [10, 11], skip=1)]))
        assert ours.get_block_ids_with_load_errors() == {11}
        assert ours.get_block_ids_with_load_errors() == set()
        assert ours.get_num_new_matched_tokens(request(), 0) == (0, False)  # it is gone

    def test_missing(self, tmp_path):
        ours = connector(tmp_path)
        work(ours, SpectrumMetadata(loads=[Move("0" * 48, [10, 11])]))
        assert ours.get_block_ids_with_load_errors() == {10, 11}

    def test_not_finite_is_not_stored(self, tmp_path):
        ours = connector(tmp_path)
        caches(ours)[1][4, 0, 3, 5] = torch.inf
        store(ours)
        assert not list(tmp_path.iterdir())

    def test_unknown_backends(self):
        with pytest.raises(ValueError, match="known for the ISA 'vec', got 'amx'"):
            layout_of(SimpleNamespace(kv_cache=torch.zeros(1), isa="amx"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"workers": 2}, "serves one worker, got 2"),
            ({"mla": True}, "MLA latents"),
            ({"extra": {"path": ""}}, "needs path"),
            ({"extra": {"policy": "two_tier", "budget": 0.3}}, "drops tokens"),
        ],
        ids=str,
    )
    def test_refused(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            connector(tmp_path, **changes)
