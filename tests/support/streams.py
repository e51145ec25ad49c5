"""What a process runs of a document's code that sends a cache; it starts sooner where no test is imported with this."""

import re
from pathlib import Path

import families
import torch
from torch import distributed as dist

from spectrumkv_hf import SpectrumCache, cache_argument
from spectrumkv_hf.transfer import CacheSender, recv_cache


def send_or_receive(rank, place, block):
    """The part of a block that the process of one rank runs: 0 sends."""
    dist.init_process_group("gloo", init_method=f"file://{place}/group", rank=rank, world_size=2)
    model = families.model("llama", "sdpa")
    names = {"model": model, "inputs": {"input_ids": families.prompt(200)}, "cache_argument": cache_argument}
    names |= {"CacheSender": CacheSender, "recv_cache": recv_cache, "cache": SpectrumCache(model.config)}
    imports = re.match(r"(?:from .*\n|\n)*", block)[0]
    sending, receiving = sorted(
        re.findall(r"^(?:with|cache =).*\n(?:    .*\n)*", block, re.MULTILINE), key=lambda part: "recv_cache" in part
    )
    with torch.no_grad():
        exec(imports + (receiving if rank else sending), names)
    torch.save(names["cache"].serialize(), Path(place, str(rank)))
    dist.barrier()
    dist.destroy_process_group()
