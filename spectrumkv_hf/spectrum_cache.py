"""`SpectrumCache`, what users pass to Transformers: a tiered cache that chooses its policy, and travels as bytes."""

import os
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from spectrumkv_hf import wire
from spectrumkv_hf.policy import Policy, get_policy
from spectrumkv_hf.policy.calibrated import LayerShares
from spectrumkv_hf.tiered.cache import TieredCache
from spectrumkv_hf.wire import patch
from spectrumkv_kernels import CODECS, DEFAULT_CODEC

if TYPE_CHECKING:
    from spectrumkv_hf.probe.auto import Probe


def usual_probe(codec: str) -> str:
    """The kind of probe that names the policy for a codec where none is asked for: plans need one that balances."""
    return "plan" if codec in CODECS and CODECS[codec].balanced else "calibration"


class SpectrumCache(TieredCache):
    """A KV cache that gives each token a precision by its importance, so that the whole fits a byte budget.

    Drop-in for the cache of `model.generate(...)`: prefill attends over exact keys and values, then tokens move
    into tiers of 16, 8, 4, 3, 2 and 1 bits, as the policy says, and decoding reads those directly.

    One cache a conversation: like every cache of Transformers it takes what it holds for the beginning of the next
    prompt. Make a new one for another prompt, or call `reset()`.

    Args:
        config: The model's config, which is not changed. Layers with full or sliding-window attention are tiered, in
            hybrid layers beside the exact states of a linear attention; others keep the class that Transformers has
            for them (see `summary`).
        policy: Name of a policy (`spectrumkv_hf.POLICIES`) or a policy. `"fp16"` is lossless.
        budget: Mean nominal cost per token, as a fraction of FP16; None: the policy's default.
        codec: `"spectrum2"`; `"spectrum"`, which has no tiers of 3 and 2 bits and more bytes beside the codes; or
            `"absmax"` for the paper's.
        model: The model that will use the cache. Its config is compared with `config`, RoPE included, and files of the
            cache tell its weights from others'.
        max_cache_len: Tokens that the cache takes in all, for which it then keeps room from the first on; None: it
            grows. With it `generate` on a GPU compiles the decode step. Layers with a sliding window keep it exact.
        policy_options: Further fields of a policy given by name, such as `recent_window`, `scope`, `decay`.

    Raises:
        ValueError: an unknown policy or codec, a value out of range, an encoder-decoder config, a config that is not
            `model`'s.
        TypeError: `config` is no Transformers config, or an option that the policy does not have.

    Example:
        ```python
        cache = SpectrumCache(config=model.config, policy="sink_protect", budget=0.3)
        output = model.generate(**inputs, cache=cache)  # past_key_values=cache before Transformers 5.24
        print(cache.memory())
        ```
    """

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: Any = None,
        budget: float | None = None,
        policy: str | Policy | None = None,
        codec: str = DEFAULT_CODEC,
        probe: "str | Probe | None" = "auto",
        max_cache_len: int | None = None,
        **policy_options: Any,
    ) -> Self:
        """A cache for `model` by the policy that a probe names at `budget`.

        The model is probed when this process, and the disk, hold no verdict on it (`spectrumkv_hf.probe`), under a
        progress bar (`transformers.utils.logging.disable_progress_bar()` turns it off). The probe plans: it measures
        what rounding each layer costs, which takes a forward of 128 tokens for each layer over three texts of 896, and
        the policy is `calibrated`, which gives each layer its own shares of tokens in 8, 4, 3 and 2 bits so that all
        bytes together are `budget` of FP16. For a model that can't be probed it is `sink_protect`, with a warning.

        With another codec than `spectrum2` the probe calibrates, by a few forwards of 640 tokens, and the policy is
        `sink_protect`, with a floor for layers or at a higher budget where it would otherwise cost more than the
        probe's loss; a warning says so.

        Args:
            model: The model that will use the cache, with its weights.
            tokenizer: Its tokenizer, for the text that the probe reads; None: it reads random tokens.
            budget: All bytes that tiered tokens take, as a fraction of FP16; of other policies than a plan the mean
                nominal cost of a token. None: .5, or that of `policy`.
            policy: Name of a policy or a policy, with which nothing is probed; None: the probe chooses it.
            codec: As in the class.
            probe: `"auto"`: with `spectrum2` the plan, else the calibration. `"plan"`, by which the policy is
                `calibrated`; `"calibration"`; `"paper"`, by whose verdict the policy is `adaptive`; a `PlanProbe`,
                `CalibrationProbe` or `PaperProbe` of the cache's codec; None for no probe.
            max_cache_len: As in the class.
            policy_options: Further fields of the policy.

        Raises:
            ValueError: an unknown policy, codec or probe, a probe of another codec, a value out of range, an
                encoder-decoder model.
            TypeError: an option that the policy does not have.
        """
        if policy is None:
            budget = 0.5 if budget is None else budget
            if probe is not None and "floors" in policy_options:
                raise TypeError("floors come from the probe: give a policy too, or probe=None")
            if probe == "auto":
                probe = usual_probe(codec)
            # Complains before anything is measured.
            kind = getattr(probe, "kind", probe)
            if kind == "plan":
                get_policy("calibrated", budget, layers={0: LayerShares.shares}, **policy_options)
            least = "two_tier" if kind in ("paper", "plan") else "sink_protect"
            cls(model.config, least, budget, codec, max_cache_len=max_cache_len, **policy_options)
            if probe is None:
                policy = "sink_protect"
            else:
                from spectrumkv_hf.probe.auto import probed_policy  # which takes a while to import

                policy, policy_options = probed_policy(model, tokenizer, probe, codec, budget, policy_options), {}
                budget = None
        return cls(model.config, policy, budget, codec, model=model, max_cache_len=max_cache_len, **policy_options)

    def serialize(self, *, key: bytes | None = None) -> torch.Tensor:
        """The cache as bytes, a contiguous uint8 tensor on its device; docs/wire-format.md describes them.

        Args:
            key: 16 to 64 random bytes. Each frame gets a MAC of it, and the bytes differ from call to call. MACs are
                computed on the host, by one core at half a gigabyte a second or a little more. None: there are none.

        Raises:
            WireError: a layer or policy that can't be serialised, or layers of different lengths.
            RuntimeError: an operation ended before it had reached all layers.
            ValueError: the key is of another length, or no bytes.
        """
        return wire.serialize(self, key=key)

    @classmethod
    def deserialize(
        cls,
        buffer: Any,
        config: PreTrainedConfig,
        device: torch.device | str | None = None,
        model: torch.nn.Module | None = None,
        *,
        key: bytes | None = None,
    ) -> Self:
        """The cache that `serialize` wrote.

        Where the buffer begins at a multiple of 64 bytes and lies on `device`, tensors are views of it. Nothing writes
        into it, and it must not change while the cache is in use.

        Args:
            buffer: bytes, bytearray, memoryview, mmap, or a contiguous uint8 tensor `[bytes]`.
            config: Of the model that will use the cache.
            device: Where the cache will lie; None: where the buffer does.
            model: That model, if its weights are to be compared with those that made the cache. Caches from
                `from_model`, or made with `model`, say which these were; others are not compared.
            key: That they were written with; bytes without a MAC of it are refused. Nobody else may be able to write
                into the buffer then, or what was checked need not be what is used; a mapped file is copied. None:
                bytes with a MAC are refused.

        Raises:
            WireError: the bytes are damaged, of another version, or of another model, or a MAC is wrong.
            KeyRefused, one of them: there is a key and no MAC of it, or no key and a MAC.
            TypeError: `buffer` is none.
            ValueError: the key is of another length, or no bytes.
        """
        return wire.deserialize(cls, buffer, config, device, model, key)

    def apply_patch(self, frame: Any, *, key: bytes | None = None) -> None:
        """Lift tokens to a higher tier, as a patch frame says that `spectrumkv_hf.wire.request` has asked for.

        Args:
            frame: bytes, bytearray, memoryview, mmap, or a contiguous uint8 tensor; its tensors are copied.
            key: As in `deserialize`: of the MAC that `ExactCopy.patch` has given it.

        Raises:
            WireError: the frame is damaged, its MAC is wrong, or the tokens have changed since they were asked for
                (batch operations, `crop`, another patch). The cache is as it was.
            KeyRefused, ValueError: as in `deserialize`.
        """
        patch.apply(self, frame, key)

    def save(self, path: str | os.PathLike[str], *, key: bytes | None = None) -> None:
        """Write what `serialize` gives into a file, which appears at `path` whole or not at all.

        A regular file there is replaced and keeps its permissions, a symbolic link is followed; a new file has those
        that the umask leaves of 0666. Caches of others who have mapped the old file stay as they are.

        Args:
            path: Of the file.
            key: As in `serialize`.

        Raises:
            WireError: a layer or policy that can't be serialised, or layers of different lengths.
            OSError: it can't be written, or something else than a regular file is there.
            ValueError: the key is of another length, or no bytes.
        """
        wire.save(self, path, key)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig,
        device: torch.device | str | None = None,
        mmap: bool = True,
        model: torch.nn.Module | None = None,
        *,
        key: bytes | None = None,
    ) -> Self:
        """The cache that `save` wrote.

        Args:
            path: Of the file.
            config: Of the model that will use the cache.
            device: Where the cache will lie; None: on the CPU.
            model: That model, if its weights are to be compared with those that made the cache.
            mmap: On the CPU the cache's tensors are the mapped file, of which only what is used is read. `save` may
                replace it meanwhile, but who writes into it changes the cache, and who shortens it ends this process
                with SIGBUS. False: the file is read into memory, for files that others can write into. With a key it
                always is, so that what was checked is what is used.
            key: That it was written with; a file without a MAC of it is refused. None: one with a MAC is refused.

        Raises:
            WireError: the bytes are damaged, of another version, or of another model, or there are none, or a MAC is
                wrong.
            KeyRefused, one of them: there is a key and no MAC of it, or no key and a MAC.
            OSError: it can't be read, or is no regular file.
            ValueError: the key is of another length, or no bytes.
        """
        return wire.load(cls, path, config, device, mmap, model, key)
