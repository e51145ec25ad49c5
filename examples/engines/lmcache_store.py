"""A prompt's cache in LMCache, without a serving engine: prefill, store, restart, load, generate.

LMCache's storage manager reads the same configuration that its server takes. The model is Transformers' here; its
cache goes into chunks as an engine would hand them over.

    python examples/engines/lmcache_store.py --budget 0.5
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from spectrumkv_hf import cache_argument
from spectrumkv_hf.evaluation.report.tables import HelpFormatter
from spectrumkv_hf.evaluation.subjects.models import add_model_arguments, load_from
from spectrumkv_hf.probe.passage import passage

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
try:
    from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
    from lmcache.v1.distributed.config import (
        EvictionConfig,
        L1ManagerConfig,
        L1MemoryManagerConfig,
        StorageManagerConfig,
    )
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
    from lmcache.v1.distributed.storage_manager import StorageManager
except ImportError as problem:  # said once the arguments are read, so that --help works
    StorageManager, NO_LMCACHE = None, str(problem)
else:
    NO_LMCACHE = ""

CONFIG = Path(__file__).with_name("lmcache_l2.json")


@contextlib.contextmanager
def storage(adapter: dict[str, Any]) -> Iterator[StorageManager]:
    """What a server keeps its chunks in, for as long as it runs."""
    adapters = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(adapter)]))
    l1 = L1ManagerConfig(L1MemoryManagerConfig(512 << 20, use_lazy=False, shm_name=""))
    manager = StorageManager(StorageManagerConfig(l1, EvictionConfig("LRU"), adapters))
    try:
        yield manager
    finally:
        manager.close()


def chunks_of(cache: DynamicCache, size: int) -> list[torch.Tensor]:
    """The whole chunks of a cache of one row, `[2, layers, size, kv_heads * head_dim]` each."""
    sides = [torch.stack([getattr(layer, side)[0] for layer in cache.layers]) for side in ("keys", "values")]
    both = torch.stack(sides).transpose(2, 3).flatten(-2)
    return [chunk.contiguous() for chunk in both.split(size, dim=2) if chunk.shape[2] == size]


def cache_of(chunks: list[torch.Tensor], model: PreTrainedModel, heads: int) -> DynamicCache:
    """The inverse of `chunks_of`."""
    keys, values = torch.cat(chunks, dim=2).unflatten(-1, (heads, -1)).transpose(2, 3)
    cache = DynamicCache(config=model.config)
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key[None], value[None], index)
    return cache


def store(manager: StorageManager, keys: list[Any], layout: Any, chunks: list[torch.Tensor], folder: Path) -> None:
    """Store chunks, and wait until each has its file."""
    objects = manager.reserve_write(keys, layout)
    for key, chunk in zip(keys, chunks, strict=True):
        objects[key].get_tensor(0).copy_(chunk)
    manager.finish_write(keys)
    end = time.monotonic() + 60
    while len(list(folder.glob("*.data"))) < len(keys):
        if time.monotonic() > end:
            raise TimeoutError("LMCache has not stored the chunks; its log says why")
        time.sleep(0.01)


def load(manager: StorageManager, keys: list[Any], layout: Any) -> list[torch.Tensor]:
    """Load chunks; fewer where one is missing or refused."""
    handle = manager.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(keys, 0, layout)]))
    manager.wait_prefetch_status(handle, 60)
    found = keys[: manager.query_prefetch_status(handle).l2_hit_cells[0].popcount()]
    if not found:
        return []
    with manager.read_prefetched_results(found) as objects:
        chunks = [item.get_tensor(0).clone() for item in objects]
    manager.finish_read_prefetched(found)
    return chunks


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache, tokens: int) -> torch.Tensor:
    """New tokens after `ids`, greedily; what the cache lacks is prefilled first."""
    return model.generate(ids, **cache_argument(cache), max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--config", type=Path, default=CONFIG, help="of LMCache's adapter, JSON")
    parser.add_argument("--policy", help="instead of the configuration's")
    parser.add_argument("--budget", type=float, help="instead of the configuration's")
    parser.add_argument("--tokens", type=int, default=600, help="of the prompt")
    parser.add_argument("--chunk", type=int, default=128, help="tokens in a chunk")
    parser.add_argument("--new-tokens", type=int, default=32, help="to generate")
    parser.add_argument("--damage", action="store_true", help="flip a byte of the second chunk's file")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse_args()
    if NO_LMCACHE:
        sys.exit(f"this example needs LMCache, see docs/engines.md: {NO_LMCACHE}")
    model, tokenizer = load_from(args)
    config = model.config.get_text_config(decoder=True)
    ids = tokenizer(passage(), return_tensors="pt").input_ids[:, : args.tokens].to(model.device)
    if args.chunk < 1 or ids.shape[1] <= args.chunk:
        sys.exit(f"the prompt has {ids.shape[1]} tokens: it takes one more than a chunk of {args.chunk}")
    exact = DynamicCache(config=model.config)
    model(ids[:, :-1], **cache_argument(exact, model))  # the last token is left to generate from
    chunks = chunks_of(exact, args.chunk)
    text = model.generate(ids, **cache_argument(exact), max_new_tokens=args.new_tokens, do_sample=False)[
        0, ids.shape[1] :
    ]

    adapter = json.loads(args.config.read_text())
    adapter["serde"] |= {key: value for key in ("policy", "budget") if (value := getattr(args, key)) is not None}
    layout = MemoryLayoutDesc([chunks[0].shape], [chunks[0].dtype])
    prefixes = (ids[0, : (index + 1) * args.chunk].cpu().numpy().tobytes() for index in range(len(chunks)))
    keys = [ObjectKey(hashlib.blake2b(prefix, digest_size=16).digest(), "example", 0x01000100) for prefix in prefixes]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "l2")
        config.save_pretrained(folder)
        adapter["adapter_params"]["base_path"], adapter["serde"]["model"] = str(files), folder
        with storage(adapter) as manager:
            store(manager, keys, layout, chunks, files)
        sizes = [path.stat().st_size for path in files.glob("*.data")]
        if args.damage:
            path = next(files.glob(f"*{keys[1].chunk_hash.hex()}*"))
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        with storage(adapter) as manager:
            began = time.monotonic()
            loaded = load(manager, keys, layout)
            seconds = time.monotonic() - began
    fp16 = sum(2 * chunk.numel() for chunk in chunks)
    print(f"chunks stored {len(chunks)}, loaded {len(loaded)} in {seconds:.3f} s")
    print(f"bytes {sum(sizes)}, at FP16 {fp16}, ratio {sum(sizes) / fp16:.3f}; of a chunk {sorted(set(sizes))}")
    cache = cache_of(loaded, model, config.num_key_value_heads) if loaded else DynamicCache(config=model.config)
    again = model.generate(ids, **cache_argument(cache), max_new_tokens=args.new_tokens, do_sample=False)[
        0, ids.shape[1] :
    ]
    same = next((i for i, (a, b) in enumerate(zip(text, again, strict=False)) if a != b), min(len(text), len(again)))
    print(f"generated {len(text)} tokens, the first {same} equal those of the exact cache")
    print(f"exact:  {tokenizer.decode(text)!r}\nloaded: {tokenizer.decode(again)!r}")


if __name__ == "__main__":
    main()
