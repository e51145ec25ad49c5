"""Caches of prompts by their tokens, in a folder or behind a URL, so that what is known of a prompt needs no prefill.

`prefix_entry` has the bytes of an entry, `prefix_files` the storage.

How the longest prefix is found: the hash of each block of 64 tokens depends on all tokens before it, so it stands for a
prefix. For each block of an entry to whose end it can be cropped there is a *pointer*, a file of that hash's name that
lists up to 8 entries. `get` asks for the pointers of the prompt's last 32 blocks at once, then for those of the 32
before, until some are there: one round trip for a conversation that goes on, one in 2048 tokens for a prompt that is
unknown, however much the store holds. A binary search would need fewer requests, but is right only as long as all
shorter prefixes of a known one are known too, and eviction would end that; listing a folder depends on what it holds.
So there is at most one small file for each 64 tokens that the store holds, and prefixes that prompts share are listed
once. Where processes write a pointer at once one of them may be lost: a later `get` finds a shorter prefix then, or the
same in another entry, never a wrong one.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedConfig

from spectrumkv_hf.policy import Policy
from spectrumkv_hf.spectrum_cache import SpectrumCache
from spectrumkv_hf.tiered.identity import weights_fingerprint
from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.tiered.mixed_layers import CrossAttentionLayer
from spectrumkv_hf.tiered.sliding_layer import SlidingSpectrumLayer
from spectrumkv_hf.transfer.prefix_entry import (
    BLOCK,
    HEAD,
    LINK,
    VERSION,
    Chain,
    EntryName,
    links_of,
    pack,
    size_of,
    unpack,
)
from spectrumkv_hf.transfer.prefix_files import files_at
from spectrumkv_hf.wire.frame import VERSION as WIRE_VERSION
from spectrumkv_hf.wire.frame import WireError
from spectrumkv_hf.wire.mac import KeyRefused, check_key
from spectrumkv_hf.wire.stock import is_linear
from spectrumkv_hf.wire.write import FrameWriter
from spectrumkv_kernels import DEFAULT_CODEC

logger = logging.getLogger(__name__)

ENTRY, POINTER = ".kv", ".at"
LISTED = 8
"""Entries that a pointer lists."""
PROBES = 32
"""Pointers that are asked for at once."""
ABANDONED = 3600.0
"""Seconds after which a file that is still being written belongs to a process that has ended."""
_POINTER = re.compile(r"[0-9a-f]{32}\.at")
_PART = re.compile(r"\.[0-9a-f]{32}\.part")


class PrefixStore:
    """Caches of prompts by their tokens; processes and machines may share one.

    What is stored is found by those only who have the same model, policy, codec, format, adapter and salt. Damaged,
    forged or vanished entries are no error: `get` finds a shorter prefix, or None, and a line of the log says why.

    The tiers of a cache that was cropped were ranked with the tokens that are gone, and what was the exact tail of a
    shorter prompt is in tiers there: it is what `crop` makes of a cache, not what a prefill of the prefix would give.

    Args:
        place: A folder, which is made with 0700 if it is missing, or a URL of fsspec, such as `s3://bucket/prefixes`
            or `memory://prefixes`, whose package must be installed. Who can write there can forge caches unless there
            is a `key`; see `folders.open_folder` for who may write into a folder.
        model: The model, or its config. A model's weights are part of what prefixes are found by; with a config, keep
            models that differ in weights apart by `salt`.
        policy: Of the caches, as in `SpectrumCache`. Give `policy=cache.policy` for those of
            `SpectrumCache.from_model`.
        budget: As in `SpectrumCache`.
        codec: Likewise.
        adapter: Name of what else changes the model, such as a LoRA adapter; None: nothing does.
        salt: Separates what would be found otherwise: tenants, or images and other inputs that ids do not tell. Kept
            secret, it hides from those who list the files which prompts are known.
        key: 16 to 64 random bytes. Entries get a MAC of this key, keyed BLAKE2b, and those without a right one are
            refused; None: entries that have a MAC are refused.
        max_bytes: Of all files together; each `put` removes what was used least recently until they fit. Between
            processes that put at the same time they may be exceeded, until the next `put`.
        max_age: Seconds since an entry was last used, after which it is not found and the next `put` removes it.
        device: Where caches of `get` lie; None: where the model does, or on the CPU.
        storage_options: For the file system of a URL, as fsspec takes them.
        policy_options: As in `SpectrumCache`.

    Raises:
        ValueError, TypeError: an argument out of range, or of another kind; as of `SpectrumCache`.
        OSError: the folder can't be made or written, or others can write into it.
        ImportError: fsspec, or its package for this kind of URL, is not installed.

    Example:
        ```python
        store = PrefixStore("~/prefixes", model, budget=0.5, max_bytes=10**10)
        cache = store.get(inputs["input_ids"])
        if cache is None:
            cache = SpectrumCache(model.config, budget=0.5, model=model)
        output = model.generate(**inputs, **cache_argument(cache))
        store.put(output[:, :-1], cache)  # the last token is not in the cache yet
        ```
    """

    def __init__(
        self,
        place: str | os.PathLike[str],
        model: torch.nn.Module | PreTrainedConfig,
        policy: str | Policy = "sink_protect",
        budget: float | None = None,
        codec: str = DEFAULT_CODEC,
        *,
        adapter: str | None = None,
        salt: str = "",
        key: bytes | None = None,
        max_bytes: int | None = None,
        max_age: float | None = None,
        device: torch.device | str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        **policy_options: Any,
    ) -> None:
        config: Any = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
        self._config, self._model = config, None if model is config else model
        like = SpectrumCache(config, policy, budget, codec, **policy_options)
        if not isinstance(salt, str) or not isinstance(adapter, str | None):
            raise TypeError(f"salt is text and adapter is text or None, got {type(salt).__name__}, {adapter!r}")
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise ValueError(f"max_bytes is a number of bytes, 1 or more, or None, got {max_bytes!r}")
        if max_age is not None and (isinstance(max_age, bool) or not max_age > 0):
            raise ValueError(f"max_age is a number of seconds above 0, or None, got {max_age!r}")
        self.policy, self.codec, self.max_bytes, self.max_age = like.policy, codec, max_bytes, max_age
        self._identity, self._key, self._device = like.identity, check_key(key), device
        settings = {field.name: getattr(like.policy, field.name) for field in fields(like.policy)}
        self._settings = {
            "entry": VERSION,
            "wire": WIRE_VERSION,
            "model": like.identity,
            "dtype": str(getattr(config.get_text_config(decoder=True), "dtype", None)),
            "policy": {"name": like.policy.name, **settings},
            "codec": [codec, like.codec.version],
            "adapter": adapter,
            "salt": salt,
        }
        self._said: set[str] = set()
        self._files = files_at(os.path.expanduser(place), storage_options)

    def put(self, ids: torch.Tensor | Sequence[int], cache: SpectrumCache) -> int:
        """Store a cache, so that prompts that begin with its tokens find it.

        Args:
            ids: All tokens that the cache holds, `[tokens]` or `[1, tokens]`. After `generate` these are all of its
                output but the last one.
            cache: Of a batch of one, without padding. It stays as it is; tiering that is still open is finished.

        Returns:
            Bytes that were stored; 0 where nothing was, because there are fewer tokens than a block of 64, or more
            bytes than `max_bytes`, which the log says.

        Raises:
            ValueError: the cache holds other than these tokens, more than one row, padding or cross-attention, or is
                of another model, policy or codec than the store's.
            TypeError: it is no `SpectrumCache`, or the ids are no whole numbers.
            WireError: it can't be serialised.
            OSError: the storage can't be written, and nothing is stored, as far as the storage lets remove it; or it
                can't be pruned, and the cache is stored.
        """
        tokens = _checked(ids)
        least = self._least(cache, len(tokens))
        if len(tokens) < BLOCK:
            return 0
        start = self._start()
        chain = Chain(start, tokens)
        name = EntryName(chain.digest(len(tokens)), len(tokens), least)
        stream = cache.serialize().cpu().numpy().data
        head = pack(name, start, tokens, stream, self._key)
        size = len(head) + len(stream)
        if self.max_bytes is not None and size > self.max_bytes:
            self._say(f"nothing is stored of a prompt of {size} bytes: max_bytes is {self.max_bytes}")
            return 0
        self._files.write(f"{name}{ENTRY}", [head, stream])  # before its pointers, so that none leads to nothing
        try:
            self._point(chain.links, name)
        except BaseException:
            self._remove(name, chain.links)  # on a full disk nothing must lie that nobody finds
            raise
        if self.max_bytes is not None or self.max_age is not None:
            self.prune()
        return size

    def get(self, ids: torch.Tensor | Sequence[int]) -> SpectrumCache | None:
        """The cache of the longest known prefix of some tokens, cropped to it; None: no block of them is known.

        At least one token of `ids` is left for the model to compute. Of entries that share equally many blocks of 64
        tokens with `ids` it is one whose tokens all are the beginning of `ids`, else the one that was stored last; it
        is cropped to the tokens that are the same. Entries with layers that can't be cropped so far (recurrent states,
        and sliding windows that have moved on) are found only where they need not be.

        Args:
            ids: A whole prompt, `[tokens]` or `[1, tokens]`.

        Raises:
            ValueError, TypeError: ids that are none, or of several rows.
        """
        chain = Chain(self._start(), _checked(ids)[:-1])
        tried = set()
        for blocks, names in self._known(chain):
            whole = [
                name for name in names if name.tokens <= len(chain.ids) and chain.digest(name.tokens) == name.digest
            ]
            whole.sort(key=lambda name: -name.tokens)
            for name in [*whole, *(name for name in names if name.least <= blocks * BLOCK and name not in whole)]:
                if name not in tried:
                    tried.add(name)
                    cache = self._load(name, chain, blocks)
                    if cache is not None:
                        return cache
        return None

    def prune(self) -> None:
        """Remove what is older than `max_age`, and what was used least recently until all is within `max_bytes`.

        `put` does so by itself. It is safe while other processes read and write.

        Raises:
            OSError: the storage can't be read, or written.
        """
        now, listing = time.time(), self._files.listing()
        parts = [f for f in listing if _PART.fullmatch(f.name) and now - f.used > ABANDONED]
        self._files.remove(f.name for f in parts)
        kept = {file.name: file for file in listing if file not in parts}
        entries = {
            name: file
            for file in sorted(kept.values(), key=lambda file: file.used)
            if file.name.endswith(ENTRY) and (name := EntryName.parse(file.name.removesuffix(ENTRY)))
        }
        size = sum(file.size for file in kept.values())
        for name, file in list(entries.items()):
            expired = self.max_age is not None and now - file.used > self.max_age
            if expired or (self.max_bytes is not None and size > self.max_bytes):
                links = self._links(name)
                self._remove(name, links)
                del entries[name]
                size -= file.size + sum(kept[f"{link}{POINTER}"].size for link in links if f"{link}{POINTER}" in kept)
        pointers = [name for name in kept if _POINTER.fullmatch(name)]
        if len(pointers) > sum(name.tokens // BLOCK for name in entries):
            self._sweep(pointers, {*entries})

    def _sweep(self, pointers: list[str], known: set[EntryName]) -> None:
        """Remove the pointers that lead nowhere: of entries that were damaged, or removed by others."""
        for some in _batches(pointers):
            for pointer, data in self._files.read_small(some).items():
                names = _parse(data)
                if not any(name in known or self._exists(name) for name in names):
                    self._files.remove([pointer])

    # -- entries ------------------------------------------------------------------------------------------------------

    def _load(self, name: EntryName, chain: Chain, blocks: int) -> SpectrumCache | None:
        """The cache of an entry whose first `blocks` blocks are said to be those of a chain, or None."""
        shared, file = chain.links[: min(blocks, name.tokens // BLOCK)], f"{name}{ENTRY}"
        try:
            if self.max_age is not None and time.time() - self._files.used(file) > self.max_age:
                self._remove(name, shared)
                return None
            cache = self._read(name, chain, blocks)
        except FileNotFoundError:  # evicted, or removed by others
            self._unpoint(shared, name)
            return None
        except KeyRefused as problem:
            self._say(f"entry {name} is refused: {problem}")  # and stays: it may be another store's
            return None
        except WireError as problem:
            self._say(f"entry {name} is refused, and removed: {problem}")
            self._remove(name, shared)
            return None
        except OSError as problem:
            self._say(f"entry {name} can't be read: {problem}")
            return None
        with suppress(OSError):  # what can't be written can be read
            self._files.touch(file)
        return cache

    def _read(self, name: EntryName, chain: Chain, blocks: int) -> SpectrumCache:
        """As `_load`.

        Raises:
            WireError: the entry is damaged, or not what its name and its pointer say.
            OSError: it can't be read.
        """
        size = size_of(self._files.read(f"{name}{ENTRY}", HEAD).numpy().tobytes())
        if self.max_bytes is not None and size > self.max_bytes:
            raise WireError(f"{size} bytes, more than max_bytes")
        data = self._files.read(f"{name}{ENTRY}", size + 1)  # one more, if there are any behind it
        ids, stream = unpack(name, data, self._key)
        common = min(len(ids), len(chain.ids))
        differing = (ids[:common] != chain.ids[:common]).nonzero()
        common = int(differing[0]) if len(differing) else common
        if common < blocks * BLOCK:
            raise WireError(f"{common} tokens are the prompt's, its pointer says {blocks * BLOCK}")
        device = self._device or getattr(self._model, "device", None)
        cache = SpectrumCache.deserialize(stream, self._config, device)
        if (cache.policy, cache.codec.name, FrameWriter(cache).extent) != (self.policy, self.codec, (1, len(ids))):
            raise WireError("a cache of another policy, codec, length or batch size")
        if common < len(ids):
            try:
                cache.crop(common - len(ids))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as problem:
                raise WireError(f"it can't be cropped, though its name says so: {problem}") from problem
        return cache

    def _remove(self, name: EntryName, links: Sequence[str]) -> None:
        """Remove an entry, as far as that is possible, and what leads to it from some links."""
        with suppress(OSError):
            self._files.remove([f"{name}{ENTRY}"])
        self._unpoint(links, name)

    def _links(self, name: EntryName) -> list[str]:
        """Those of an entry's blocks, as far as it says; none where it can't be read."""
        try:
            return links_of(self._files.read(f"{name}{ENTRY}", HEAD + 4 * name.tokens))
        except OSError:
            return []

    def _exists(self, name: EntryName) -> bool:
        try:
            return len(self._files.read(f"{name}{ENTRY}", 1)) > 0
        except OSError:
            return False

    # -- pointers -----------------------------------------------------------------------------------------------------

    def _known(self, chain: Chain) -> Iterator[tuple[int, list[EntryName]]]:
        """Numbers of blocks of a chain to which pointers lead, from the most on, and what these list."""
        numbers = range(len(chain.links), 0, -1)
        for some in _batches(numbers):
            try:
                found = self._files.read_small([f"{chain.links[number - 1]}{POINTER}" for number in some])
            except OSError as problem:
                self._say(f"pointers can't be read: {problem}")
                return
            for number in some:
                names = _parse(found.get(f"{chain.links[number - 1]}{POINTER}", b""))
                yield number, [name for name in names if name.tokens >= number * BLOCK]

    def _point(self, links: Sequence[str], name: EntryName) -> None:
        """List an entry where it can be cropped to, and where its last whole block ends."""
        first = min(-(-name.least // BLOCK), len(links)) or 1
        for some in _batches(links[first - 1 :]):
            found = self._files.read_small([f"{link}{POINTER}" for link in some])
            listed = {f"{link}{POINTER}": _parse(found.get(f"{link}{POINTER}", b"")) for link in some}
            missing = {pointer: [name, *names] for pointer, names in listed.items() if name not in names}
            self._files.write_small({pointer: _spelt(names[:LISTED]) for pointer, names in missing.items()})

    def _unpoint(self, links: Sequence[str], name: EntryName) -> None:
        """List an entry no longer, as far as that is possible."""
        with suppress(OSError):
            for some in _batches(links):
                found = self._files.read_small([f"{link}{POINTER}" for link in some])
                left = {pointer: [each for each in _parse(data) if each != name] for pointer, data in found.items()}
                self._files.write_small(
                    {
                        pointer: _spelt(names)
                        for pointer, names in left.items()
                        if names and _spelt(names) != found[pointer]
                    }
                )
                self._files.remove(pointer for pointer, names in left.items() if not names)

    # -- what belongs here --------------------------------------------------------------------------------------------

    def _start(self) -> bytes:
        """What all chains start from: a hash of all on which a cache depends besides its tokens."""
        settings = {**self._settings, "weights": self._weights()}
        text = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=LINK, person=b"prefix store").digest()

    def _weights(self) -> str | None:
        """Of the model as it is now; it is remembered until they change."""
        return None if self._model is None else weights_fingerprint(self._model)

    def _least(self, cache: Any, tokens: int) -> int:
        """The fewest tokens to which a cache can be cropped, once it is read again.

        Raises:
            TypeError, ValueError: it does not belong here; see `put`.
        """
        if not isinstance(cache, SpectrumCache):
            raise TypeError(
                f"the store takes a SpectrumCache, got {type(cache).__name__}; with the policy 'fp16' that is as exact"
            )
        if (cache.policy, cache.codec.name) != (self.policy, self.codec):
            raise ValueError(
                f"the store is for {self.policy} and codec {self.codec!r}, got {cache.policy} and {cache.codec.name!r}"
            )
        weights = self._weights()
        if cache.identity != self._identity or (None not in (cache.weights, weights) and cache.weights != weights):
            raise ValueError("the cache was made for another model than the store, or by other weights")
        cache.check_whole()
        batch, length = FrameWriter(cache).extent
        if tokens and batch != 1:
            raise ValueError(f"the store takes a batch of one, got a cache of {batch} rows")
        if length != tokens:
            raise ValueError(
                f"ids are the tokens that the cache holds: it holds {length}, got {tokens}. After generate() the last "
                "token of its output is not in the cache yet: give output[:, :-1]"
            )
        return max((_least_of(layer, length) for layer in cache.layers), default=0)

    def _say(self, message: str) -> None:
        """Warn of something once."""
        if message not in self._said:
            self._said.add(message)
            logger.warning("prefix store %s: %s", self._files, message)


def _least_of(layer: Any, length: int) -> int:
    """The fewest tokens to which a layer can be cropped that has seen `length`, once it is read again."""
    if isinstance(layer, CrossAttentionLayer) and layer.is_initialized:
        raise ValueError("the cache has cross-attention to other inputs, which ids do not tell")
    if isinstance(layer, SlidingSpectrumLayer):
        layer = layer.as_growing()
    if is_linear(layer):
        return length
    if not getattr(layer, "is_initialized", False):
        return 0
    window = getattr(layer, "sliding_window", None)
    if not isinstance(layer, SpectrumLayer):
        return 0 if window is None or length < window else length
    layer.settle()
    if layer.store.pads is not None and bool((layer.store.pads != 0).any()):
        raise ValueError("the cache has padding, which ids do not tell from tokens")
    return min(layer.store.first_kept + window - 1, length) if window and layer.store.first_kept else 0


def _checked(ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Ids as int32 `[tokens]` on the CPU.

    Raises:
        TypeError: they are no whole numbers.
        ValueError: they are of several rows, or out of range.
    """
    try:
        given = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise TypeError(
            f"ids are whole numbers, [tokens] or [1, tokens], got {type(ids).__name__}: {problem}"
        ) from None
    if given.dtype.is_floating_point and not given.numel():  # an empty list
        given = given.long()
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise TypeError(f"ids are whole numbers, got {given.dtype}")
    if given.dim() not in (1, 2) or (given.dim() == 2 and given.shape[0] != 1):
        raise ValueError(f"ids are [tokens] or [1, tokens], got the shape {list(given.shape)}")
    given = given.detach().reshape(-1).cpu()
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < 1 << 31:
        raise ValueError(f"ids are 0 to 2^31 - 1, got {int(given.min())} to {int(given.max())}")
    return given.to(torch.int32).contiguous()


def _parse(pointer: bytes) -> list[EntryName]:
    """What a pointer lists, of which anybody who can write may have written anything."""
    names = (EntryName.parse(line) for line in pointer.decode("ascii", "replace").split("\n"))
    return [name for name in names if name][:LISTED]


def _spelt(names: Iterable[EntryName]) -> bytes:
    return "\n".join(map(str, names)).encode()


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[at : at + PROBES] for at in range(0, len(items), PROBES))
