"""Compressed caches of whole prompts in a folder: a blob for each layer, visible once all of them are there.

The folder is what vLLM's producers and consumers share in `vllm_connector`; nothing here needs vLLM.
"""

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from spectrumkv_hf.engines.blocks import BlockCodec, KVSpec, short_hash
from spectrumkv_hf.engines.layouts import check_layout, merge_blocks, split_blocks
from spectrumkv_hf.support.folders import file_mode, open_folder
from spectrumkv_hf.support.whole_file import open_regular, replacing
from spectrumkv_hf.wire.frame import WireError
from spectrumkv_kernels import Rotary


class PromptStore:
    """Blocks of an engine's cache, by prompt and layer.

    Args:
        folder: Made where it is missing, with 0700. What it holds is trusted to be of whoever can write into it: see
            `folders.open_folder` for who may, and for how users share one by a group.
        blocks: Compresses.
        layout: Of the engine's blocks, one of `layouts.LAYOUTS`.
        layers: The model's indices of the layers that the rotations of `blocks` are for; a layer that is not among
            them has none. None: they are for all layers, from 0 on.

    Raises:
        OSError: the folder can't be made or written, or others can write into it.
    """

    def __init__(
        self, folder: str | os.PathLike[str], blocks: BlockCodec, layout: str, layers: Sequence[int] | None = None
    ) -> None:
        check_layout(layout)
        indices = range(len(blocks.rotaries)) if layers is None else layers
        self._rotaries = dict(zip(indices, blocks.rotaries, strict=False))
        self.folder, self.blocks, self.layout = Path(folder), blocks, layout
        descriptor = open_folder(self.folder)
        self._mode = file_mode(descriptor)
        os.close(descriptor)
        self._staged: dict[str, Path] = {}

    def name(self, tokens: Sequence[int], *context: str) -> str:
        """Of a prompt under these settings, so that nobody finds what another model or policy stored.

        Args:
            tokens: Ids of the tokens that the blocks hold.
            context: What else they depend on: adapters, images, the tenant's salt.
        """
        state = hashlib.blake2b(short_hash([self.blocks.settings, *context]).encode(), digest_size=24)
        state.update(torch.tensor(tokens, dtype=torch.int64).numpy().tobytes())
        return state.hexdigest()

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_dir()

    def save(self, name: str, layer: int, blocks: torch.Tensor) -> int:
        """Compress a layer's blocks, `[blocks, kv_heads, tokens in a block, 2 * head_dim]`. Returns the blob's bytes.

        Raises:
            ValueError: as in `BlockCodec.compress`.
        """
        keys, values = split_blocks(blocks, self.layout)
        blob = self._codec(layer).compress([(keys[None], values[None])], self._key(name, layer)).cpu()
        if name not in self._staged:
            self._staged[name] = self._new_folder(f".{name}.{secrets.token_hex(16)}")
        with replacing(self._staged[name] / _file(layer), self._mode, durable=False) as file:
            file.write(blob.numpy().data)
        return len(blob)

    def _new_folder(self, name: str) -> Path:
        """One in the store's, for those who may use that."""
        made = self.folder / name
        made.mkdir(mode=0o700)
        made.chmod(made.stat().st_mode & stat.S_ISGID | self._mode | (self._mode & 0o440) >> 2)
        return made

    def commit(self, name: str) -> None:
        """Show the layers of a prompt to others, all at once."""
        staged = self._staged.pop(name)
        try:
            staged.rename(self.folder / name)
        except OSError:  # another has stored the same prompt meanwhile
            shutil.rmtree(staged)

    def discard(self, name: str) -> None:
        """Forget a prompt: what of it is staged, and what others see."""
        for folder in (self._staged.pop(name, None), self.folder / name):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def load(self, name: str, layer: int, like: torch.Tensor, blocks: int) -> torch.Tensor:
        """The blocks that `save` got, `[blocks, kv_heads, tokens in a block, 2 * head_dim]`.

        Args:
            name, layer: As in `save`.
            like: The engine's cache of that layer, `[any, kv_heads, tokens in a block, 2 * head_dim]`.
            blocks: How many it was.

        Raises:
            WireError: damage, or blobs of another kind.
            OSError: there is no such file, it can't be read, or is no regular one.
        """
        _, heads, size, both = like.shape
        spec = KVSpec(1, heads, blocks * size, both // 2, like.dtype)
        codec = self._codec(layer)
        with open_regular(self.folder / name / _file(layer), follow=False) as file:
            found, expected = os.fstat(file.fileno()).st_size, codec.size([spec])
            if found != expected:
                raise WireError(f"{found} bytes, expected {expected}: cut off, or of other tokens, heads or dtype")
            data = torch.empty(expected, dtype=torch.uint8)
            data = data[: file.readinto(data.numpy().data)]
        part = codec.restore(data.to(like.device), [spec], self._key(name, layer))[0]
        return merge_blocks(part[0][0], part[1][0], size, self.layout)

    def _codec(self, layer: int) -> BlockCodec:
        if len(set(self.blocks.rotaries)) == 1:
            return replace(self.blocks, rotaries=self.blocks.rotaries[:1])
        return replace(self.blocks, rotaries=(self._rotaries.get(layer, Rotary()),))

    def _key(self, name: str, layer: int) -> str:
        return f"{name}/{layer}"


def _file(layer: int) -> str:
    return f"layer-{layer:04}.spkv"
