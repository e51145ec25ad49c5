"""What is compared: ways to hold a KV cache, by name."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from spectrumkv_hf.policy import POLICIES, Calibrated, Policy, get_policy
from spectrumkv_hf.probe import PlanProbe, PlanVerdict, probe_model
from spectrumkv_hf.probe.paper import RELEASED
from spectrumkv_hf.spectrum_cache import SpectrumCache
from spectrumkv_hf.tiered.memory import MemoryReport, storage_bytes
from spectrumkv_kernels import DEFAULT_CODEC


def cache_memory(cache: Cache) -> MemoryReport:
    """Bytes of a `SpectrumCache`, or of the tensors of a stock cache, whose tokens all cost 1."""
    if isinstance(cache, SpectrumCache):
        return cache.memory()
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    stored = storage_bytes(held)
    return MemoryReport(stored, exact=stored, fp16=sum(2 * t.numel() for t in held), nominal_ratio=1.0)


class Method:
    """A way to hold a KV cache.

    Attributes:
        spec: What names it on a command line and in tables.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def prepare(self, model: PreTrainedModel, tokenizer: Any) -> None:  # noqa: B027  # most need nothing
        """Find out what the method has to know of a model, once before its caches are made.

        Raises:
            ValueError: it can't be found out.
        """

    def cache(self, model: PreTrainedModel) -> Cache:
        """An empty cache for `model`.

        Raises:
            ValueError: the model can't have one.
            ImportError: a package is missing that it needs.
        """
        raise NotImplementedError

    def prefilling(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """Where the prefill of its cache runs, for methods that watch the model while it does."""
        return nullcontext()

    def memory(self, cache: Cache) -> MemoryReport:
        """Bytes of one of its caches: everything stored, over two bytes for each element of the tokens seen."""
        return cache_memory(cache)


class Exact(Method):
    """`DynamicCache`: what all others are measured against."""

    def cache(self, model: PreTrainedModel) -> Cache:
        return DynamicCache(config=model.config)


class Tiered(Method):
    """A `SpectrumCache`.

    Args:
        policy: Of the cache.
        codec: Of the cache.
    """

    def __init__(self, spec: str, policy: Policy, codec: str = DEFAULT_CODEC) -> None:
        super().__init__(spec)
        self.policy, self.codec, self.budget = policy, codec, policy.budget

    def cache(self, model: PreTrainedModel) -> Cache:
        return SpectrumCache(config=model.config, policy=self.policy, codec=self.codec)


class Planned(Method):
    """A `SpectrumCache` by the plan of a probe, for `prepare` with the model.

    Args:
        budget: Fraction of the FP16 bytes.
        codec: Of the cache.
        options: Further fields of the policy.
    """

    def __init__(self, spec: str, budget: float, codec: str, options: dict[str, Any]) -> None:
        super().__init__(spec)
        self.budget, self._probe, self._options = budget, PlanProbe(codec=codec), options
        self.policy: Policy | None = None

    def prepare(self, model: PreTrainedModel, tokenizer: Any) -> None:
        verdict = probe_model(model, tokenizer, self._probe)
        assert isinstance(verdict, PlanVerdict)
        self.policy = verdict.policy(self.budget, **self._options)

    def cache(self, model: PreTrainedModel) -> Cache:
        if self.policy is None:
            raise RuntimeError(f"method {self.spec!r} was not prepared for the model")
        return SpectrumCache(config=model.config, policy=self.policy, codec=self._probe.codec)


def _family(module: str) -> Callable[[str, str], Method]:
    """The parser of a module of `baselines`, imported when it is called."""

    def parse(spec: str, rest: str) -> Method:
        return importlib.import_module(f"spectrumkv_hf.evaluation.subjects.baselines.{module}").parse(spec, rest)

    return parse


BASELINES: dict[str, Callable[[str, str], Method]] = {
    "exact": lambda spec, _: Exact(spec),
    **dict.fromkeys(("quanto", "hqq", "fp8"), _family("quantized")),
    **dict.fromkeys(("nf4", "fp4"), _family("blocks")),
    **dict.fromkeys(("fp8_e4m3", "fp8_e5m2"), _family("float8")),
    "kivi": _family("kivi"),
    "turboquant": _family("turboquant"),
    **dict.fromkeys(("snapkv", "expected_attention"), _family("presses")),
}
"""Methods other than `SpectrumCache`: name to a function of the whole spec and of what follows the name."""


OPTIONS: dict[str, type] = {"sinks": int, "recent_window": int, "decay": float, "seed": int}
"""Fields of a policy that a spec sets by name."""


def parse_method(spec: str, recent_window: int | None = None) -> Method:
    """The method that a spec names.

    * `exact`; `quanto[:BITS]`, `hqq[:BITS[:AXIS]]`, `fp8`: Transformers' `QuantizedCache`;
      `nf4[:SINKS[:RECENT]]` and `fp4`, the same; `fp8_e4m3[:unscaled]` and `fp8_e5m2`, the same;
      `kivi[:BITS[:GROUP[:RESIDUAL]]]`; `turboquant[:BITS]`;
      `snapkv:BUDGET` and `expected_attention:BUDGET`; see `baselines`;
    * `NAME[:BUDGET[:CODEC[:IMPORTANCE[:SCOPE]]]]`, a policy of `spectrumkv_hf.POLICIES`, an empty field being the
      default;
    * `paper_NAME[:BUDGET]`, that policy as the paper's released code runs it: codec `absmax`, options `RELEASED`.

    `calibrated` has the codec `spectrum2`, and its plan comes from a probe of the model.

    Policies also take fields `OPTION=VALUE`, by the names in `OPTIONS`, after the others: `sink_protect:0.3:sinks=16`.

    Args:
        spec: As above.
        recent_window: For every policy but the paper's, where the spec does not say; None: its default.

    Raises:
        ValueError: too many fields, an unknown name, a value out of range.
    """
    name, _, rest = spec.partition(":")
    if name in BASELINES:
        return BASELINES[name](spec, rest)
    paper = name.removeprefix("paper_") in POLICIES and name.startswith("paper_")
    if not paper and name not in POLICIES:
        raise ValueError(
            f"unknown method {name!r}: choose from {', '.join((*BASELINES, *POLICIES))}, or paper_ and a policy"
        )
    fields = rest.split(":") if rest else []
    named = [field for field in fields if "=" in field]
    fields = [field for field in fields if "=" not in field]
    if len(fields) > (1 if paper else 4):
        raise ValueError(f"method {spec!r} has too many fields")
    budget, codec, importance, scope = (*fields, "", "", "", "")[:4]
    try:
        value = float(budget) if budget else None
    except ValueError:
        raise ValueError(f"method {spec!r}: budget {budget!r} is no number") from None
    options: dict[str, Any] = {} if recent_window is None or paper else {"recent_window": recent_window}
    if paper:
        name, codec = name.removeprefix("paper_"), "absmax"
        options |= RELEASED
        if POLICIES[name].importance != Policy.importance:  # random and recency rank by themselves
            del options["importance"]
    options |= {key: field for key, field in (("importance", importance), ("scope", scope)) if field}
    options |= dict(_option(spec, field) for field in named)
    if name == Calibrated.name:
        return Planned(spec, Calibrated.budget if value is None else value, codec or "spectrum2", options)
    return Tiered(spec, get_policy(name, value, **options), codec or DEFAULT_CODEC)


def _option(spec: str, field: str) -> tuple[str, int | float]:
    key, _, value = field.partition("=")
    if key not in OPTIONS:
        raise ValueError(f"method {spec!r}: unknown option {key!r}, choose from {', '.join(OPTIONS)}")
    try:
        return key, OPTIONS[key](value)
    except ValueError:
        raise ValueError(f"method {spec!r}: {key} is a {OPTIONS[key].__name__}, got {value!r}") from None


def at_budgets(families: Sequence[str], budgets: Sequence[float]) -> list[str]:
    """Specs of every family at every budget; a family is a spec whose field for the budget is empty or missing."""
    specs = []
    for family in families:
        name, *fields = family.split(":")
        if fields and (not fields[0] or "=" in fields[0]):
            fields = fields if "=" in fields[0] else fields[1:]
        elif fields:
            raise ValueError(f"family {family!r} has a budget of its own: leave its field empty")
        specs += [":".join((name, f"{budget:g}", *fields)) for budget in budgets]
    return specs


def family_of(spec: str) -> str:
    """A spec without its budget: what `at_budgets` made it of."""
    name, *fields = spec.split(":")
    named = [field for field in fields if "=" in field]
    others = [field for field in fields if "=" not in field][1:]
    return ":".join((name, *([""] if others else []), *others, *named))
