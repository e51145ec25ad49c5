"""Probing a model once: in a process, and on a disk."""

import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from spectrumkv_hf.policy import Calibrated, Policy, SinkProtect
from spectrumkv_hf.probe import storage
from spectrumkv_hf.probe.calibration import CalibrationProbe
from spectrumkv_hf.probe.measurement import ProbeError
from spectrumkv_hf.probe.paper import PaperProbe
from spectrumkv_hf.probe.plan import PlanProbe
from spectrumkv_hf.probe.verdict import CalibrationVerdict, PaperVerdict, Verdict
from spectrumkv_hf.tiered.identity import fingerprint
from spectrumkv_kernels import CODECS

logger = logging.getLogger(__name__)

Probe = CalibrationProbe | PaperProbe | PlanProbe
PROBES: dict[str, type[Probe]] = {probe.kind: probe for probe in (CalibrationProbe, PaperProbe, PlanProbe)}
"""Kinds of probe by name."""

VERSION = 2
"""Of what the probes measure: a change makes stored verdicts stale."""

POLICY_OF = {
    CalibrationProbe.kind: SinkProtect.name,
    PaperProbe.kind: "paper_greedy",
    PlanProbe.kind: Calibrated.name,
}
"""What each measures."""

_remembered: dict[str, Verdict] = {}


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode and without gradients; its modes and the random state are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def shown(model: PreTrainedModel, probe: Probe) -> Iterator[None]:
    """A progress bar on stderr that counts the model's forwards, among those of Transformers and disabled with them."""
    title = f"Probing once which tiers {type(model).__name__} tolerates"
    numbers, least = itertools.count(1), probe.forwards(model)
    with transformers_logging.tqdm(total=least, desc=title, unit=" forwards") as bar:

        def count(*_: Any) -> None:
            bar.total = max(least, next(numbers))  # where a tier is not safe there are more
            bar.update()

        hook = model.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def key_of(model: PreTrainedModel, probe: Probe, ids: torch.Tensor) -> dict[str, Any]:
    """What a verdict depends on, as JSON has it."""
    return {
        "probe": probe.kind,
        "version": VERSION,
        "settings": json.loads(json.dumps(asdict(probe))),
        "policy": POLICY_OF[probe.kind],
        "codec_version": CODECS[probe.codec].version,
        "ids": storage.digest(ids),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": fingerprint(model),
    }


def probe_model(
    model: PreTrainedModel, tokenizer: Any = None, probe: Probe | None = None, fresh: bool = False
) -> Verdict:
    """The verdict on a model: remembered in this process or on disk, else measured, under a progress bar, and stored.

    Args:
        model: A decoder. Its modes, gradients and the random state are left as they are.
        tokenizer: Its tokenizer; None: calibrate on random tokens.
        probe: What to measure; None: `PlanProbe()`.
        fresh: Measure also where a verdict is remembered.

    Raises:
        ProbeError: the model can't be probed.
    """
    probe = probe or PlanProbe()
    if model.config.is_encoder_decoder:
        raise ProbeError(f"{type(model).__name__} is an encoder-decoder: the probe continues a text, as decoders do")
    ids = probe.inputs(model, tokenizer)
    key = key_of(model, probe, ids)
    name = storage.name_of(key)
    if not fresh:
        if name in _remembered:
            return _remembered[name]
        if (stored := storage.read(key)) is not None:
            try:
                _remembered[name] = probe.parse(stored)
                return _remembered[name]
            except ValueError as problem:
                logger.warning("ignoring a stored verdict of the probe: %s", problem)
    logger.info("probing %s once: %s", type(model).__name__, probe)
    with undisturbed(model), shown(model, probe):
        verdict = probe.measure(model, tokenizer, ids)
    storage.write(key, verdict.to_json())
    _remembered[name] = verdict
    return verdict


def probed_policy(
    model: PreTrainedModel, tokenizer: Any, probe: str | Probe, codec: str, budget: float, options: dict[str, Any]
) -> Policy:
    """The policy that a probe names for a model at a budget; see `SpectrumCache.from_model`.

    Where the model can't be probed, or can't retrieve even over the exact cache, a warning says what stands in.

    Raises:
        ValueError: an unknown probe, or one of another codec than the cache's.
    """
    if isinstance(probe, str):
        if probe not in PROBES:
            raise ValueError(f"unknown probe {probe!r}: choose from auto, {', '.join(PROBES)}, or None for no probe")
        probe = PROBES[probe](codec=codec)
    if probe.codec != codec:
        raise ValueError(f"{probe} measures codec {probe.codec!r}, the cache has {codec!r}")
    verdict: Verdict | None = None
    for attempt in dict.fromkeys((probe, CalibrationProbe(codec=codec))):
        try:
            verdict = probe_model(model, tokenizer, attempt)
        except ProbeError as problem:
            logger.warning("the model can't be probed (%s): %s", attempt.kind, problem)
            if attempt.kind == CalibrationProbe.kind:
                break
            continue
        if not isinstance(verdict, PaperVerdict) or verdict.conclusive:
            break
        logger.warning("the model does not retrieve over the exact cache either: calibrating instead")
    if verdict is None or isinstance(verdict, PaperVerdict) and not verdict.conclusive:
        least = max(budget, float(SinkProtect.minimum))
        logger.warning("taking the default policy, sink_protect at b=%g", least)
        return SinkProtect(budget=least, **options)
    policy = verdict.policy(budget, **options)
    if isinstance(verdict, CalibrationVerdict) and isinstance(policy, SinkProtect) and verdict.cost(policy) > budget:
        logger.warning(
            "b=%g would cost this model more than %g nats: taking b=%g with floors %s, a nominal cost of %.3f",
            budget, verdict.loss, policy.budget, dict(policy.floors), verdict.cost(policy),
        )  # fmt: skip
    return policy
