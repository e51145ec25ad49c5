"""`spectrumkv probe MODEL`: which tiers a model tolerates; the verdict is stored for `SpectrumCache.from_model`."""

import argparse
import json
from typing import Any

from spectrumkv_hf.evaluation.report.tables import print_table
from spectrumkv_hf.evaluation.subjects.models import add_model_arguments, load_from
from spectrumkv_hf.policy import INT2, TIERS, Adaptive, Policy
from spectrumkv_hf.policy.calibrated import ERRORS, PLANNED, Shares
from spectrumkv_hf.probe import storage
from spectrumkv_hf.probe.auto import PROBES, Probe, key_of, probe_model
from spectrumkv_hf.probe.calibration import CalibrationProbe
from spectrumkv_hf.probe.paper import PaperProbe
from spectrumkv_hf.probe.plan import PlanProbe
from spectrumkv_hf.probe.verdict import CalibrationVerdict, PaperVerdict, PlanVerdict, Verdict
from spectrumkv_hf.spectrum_cache import usual_probe
from spectrumkv_kernels import CODECS, DEFAULT_CODEC


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `run` reads."""
    add_model_arguments(parser, positional=True)
    parser.add_argument("--probe", choices=PROBES, help="default: plan, for codecs that have none calibration")
    parser.add_argument(
        "--codec", choices=CODECS, help=f"default: {DEFAULT_CODEC}; for the paper's probe {PaperProbe.codec}"
    )
    parser.add_argument(
        "--budget", type=float, action="append", help="also name the policy at this budget (repeatable)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again where a verdict is stored")
    parser.add_argument("--json", action="store_true", help="everything, on stdout")
    ours = parser.add_argument_group("calibration and plan")
    ours.add_argument("--loss", type=float, help=f"nats a safe tier may cost; default: {CalibrationProbe.loss:g}")
    ours.add_argument(
        "--context", type=int, help=f"tokens coded; default: {CalibrationProbe.context}, of a plan {PlanProbe.context}"
    )
    ours.add_argument(
        "--continuation",
        type=int,
        help=f"tokens predicted; default: {CalibrationProbe.continuation}, of a plan {PlanProbe.continuation}",
    )
    theirs = parser.add_argument_group("paper")
    theirs.add_argument("--tokens", type=int, help=f"of each prompt; default: {PaperProbe.tokens}")


def probe_from(args: argparse.Namespace) -> Probe:
    """The probe that the arguments describe.

    Raises:
        ValueError: a value out of range, or an option of the other probe.
    """
    chosen = args.probe or usual_probe(args.codec or DEFAULT_CODEC)
    names = {
        "calibration": ("loss", "context", "continuation"),
        "plan": ("context", "continuation"),
        "paper": ("tokens",),
    }
    for kind, options in names.items():
        foreign = [n for n in options if n not in names[chosen] and getattr(args, n) is not None]
        if kind != chosen and foreign:
            raise ValueError(f"--{foreign[0]} is an option of --probe {kind}")
    given = {name: getattr(args, name) for name in ("codec", *names[chosen])}
    return PROBES[chosen](**{name: value for name, value in given.items() if value is not None})


def run(args: argparse.Namespace) -> None:
    """Probe, store and show.

    Raises:
        ValueError: as of `probe_from`, or the model can't be probed.
    """
    probe = probe_from(args)
    model, tokenizer = load_from(args)
    verdict = probe_model(model, tokenizer, probe, fresh=args.fresh)
    file = storage.stored_at(key_of(model, probe, probe.inputs(model, tokenizer)))
    path = str(file) if file else None
    budgets = args.budget or []
    if args.json:
        print(json.dumps(_described(verdict, budgets) | {"model": args.model, "stored": path}, indent=1))
        return
    if isinstance(verdict, CalibrationVerdict):
        _show_calibration(verdict)
    elif isinstance(verdict, PlanVerdict):
        _show_plan(verdict, budgets)
    else:
        _show_paper(verdict)
    for budget in budgets:
        print(f"policy at b={budget:g}: {_named(verdict.policy(budget))}")
    if path:  # else a warning has said why not
        print(f"stored in {path}")


def _described(verdict: Verdict, budgets: list[float]) -> dict[str, Any]:
    def policy(chosen: Any) -> dict[str, Any]:
        return {"name": chosen.name, **vars(chosen)}

    more: dict[str, Any] = {"policies": {f"{budget:g}": policy(verdict.policy(budget)) for budget in budgets}}
    if isinstance(verdict, CalibrationVerdict):
        more |= {"probe": CalibrationProbe.kind, "safe": verdict.safe, "cheapest": policy(verdict.cheapest)}
        more["cheapest"]["cost"] = verdict.cost(verdict.cheapest)
    elif isinstance(verdict, PlanVerdict):
        more |= {"probe": PlanProbe.kind}
    else:
        more |= {"probe": PaperProbe.kind, "passed": verdict.passed, "conclusive": verdict.conclusive}
    return more | {"verdict": verdict.to_json()}


def _named(policy: Policy) -> str:
    """A policy by what the probe decides of it."""
    name = f"{policy.name} b={policy.budget:g}"
    if isinstance(policy, Adaptive):
        name += ", three tiers" if policy.probe_passed else ", two tiers"
    for tier in TIERS:
        if layers := [str(layer) for layer, least in policy.floors if least == tier.name]:
            name += f", {tier.name} or better in layers {', '.join(layers)}"
    return name


def _show_calibration(verdict: CalibrationVerdict) -> None:
    print(
        f"codec {verdict.codec}, {verdict.continuation} tokens over the cache of {verdict.context} ({verdict.text}), "
        f"loss {verdict.loss:g} nats, {len(verdict.tiered)} layers tiered, {verdict.seconds:.1f} s"
    )
    rows = [["fp16 (control)", f"{verdict.control:.5f}", "", "", "", "", "yes"]]
    for report in (verdict.int8, verdict.int4):
        worst = [
            max(((getattr(error, side), error.layer) for error in report.layers), default=None)
            for side in ("keys", "values")
        ]
        rows.append(
            [
                report.tier,
                *(f"{kl:.5f}" for kl in (report.kl, report.kl_keys, report.kl_values)),
                *(f"{at[0]:.4f} (layer {at[1]})" if at else "" for at in worst),
                "but for some layers" if report.unsafe else "yes",
            ]
        )
    print_table(("tier", "KL", "keys only", "values only", "worst key error", "worst value error", "safe"), rows)
    for report in (verdict.int8, verdict.int4):
        if report.unsafe:
            layers = ", ".join(map(str, report.unsafe))
            print(
                f"{report.tier} is not safe in layers {layers}; with more precise ones there KL {report.kl_floored:.5f}"
            )
    cheapest = verdict.cheapest
    print(f"cheapest policy: {_named(cheapest)}, nominal cost {verdict.cost(cheapest):.3f}")
    print(f"without floors: sink_protect from b={verdict.plain_budget:g} on, KL {verdict.plain_kl:.5f}")


def _show_plan(verdict: PlanVerdict, budgets: list[float]) -> None:
    print(
        f"codec {verdict.codec}, {verdict.continuation} tokens over the cache of {verdict.context} "
        f"({', '.join(verdict.texts)}), {len(verdict.layers)} layers tiered, {verdict.seconds:.1f} s"
    )
    plans = [(f"b={budget:g}", dict(verdict.policy(budget).layers)) for budget in budgets]
    rows = []
    for layer in verdict.layers:
        shares = [", ".join(_shares(plan[layer.layer])) for _, plan in plans]
        rows.append([str(layer.layer), str(layer.window or "-"), f"{layer.sensitivity * ERRORS[INT2]:.5f}", *shares])
    print_table(("layer", "window", "KL at 2 bits", *(name for name, _ in plans)), rows)


def _shares(shares: Shares) -> list[str]:
    """Percent of the tokens in each tier that has some."""
    return [f"{tier.name} {100 * share:.0f} %" for tier, share in zip(PLANNED, shares, strict=True) if share >= 0.005]


def _show_paper(verdict: PaperVerdict) -> None:
    answer = {True: "found", False: "-"}
    print(f"codec {verdict.codec}, three-tier greedy at b=.3, {verdict.tokens} tokens, {verdict.seconds:.1f} s")
    rows = [(t.answer, f"{t.depth:g}", answer[t.exact], answer[t.tiered]) for t in verdict.trials]
    print_table(("needle", "depth", "exact cache", "three tiers"), rows)
    if verdict.conclusive:
        print("passed: three tiers" if verdict.passed else "failed: two tiers")
    else:
        print("inconclusive: the model does not retrieve over the exact cache either")
