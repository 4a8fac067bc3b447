"""What the runs of `distill_speed.py` show, in lines."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from distill_parts import fastest


def report(done: Mapping[str, Any], rows: Mapping[str, Any]) -> Iterator[str]:
    """Say what each row shows, as far as its jobs were done."""
    for key, found in done.items():
        yield f"{key}: {summary(found)}"
    for name, row in rows.items():
        forms = {k.partition(":")[2]: v for k, v in done.items() if k.partition(":")[0] == name}
        forms = {form: found for form, found in forms.items() if "error" not in found}
        yield from (f"{name}: {line}" for line in _row(forms, row.batch))


def _row(forms: Mapping[str, Any], batch: int) -> Iterator[str]:
    fast = [forms[form] for form in ("auto", "cold") if form in forms]
    plain = forms.get("plain")
    if fast and "parts" in forms:
        yield from _efficiency(forms["parts"]["parts"], batch, fast)
    if fast and plain:
        yield f"{fast[0]['images_per_s'] / plain['images_per_s']:.2f} x plain"
    if "auto" in forms and plain:
        yield _gaps(forms["auto"], plain)
    if fast and plain and plain["peak_gib"]:
        for found in fast[:1]:
            yield f"peak {found['peak_gib'] / plain['peak_gib']:.2f} x plain's"
    for line in forms.get("dry", {}).get("held", ()):
        yield f"--dry-run: {line}"
    if "spread" in forms:
        yield _spread(forms["spread"]["runs"])


def _efficiency(parts: Any, batch: int, fast: list[Any]) -> Iterator[str]:
    best = fastest(parts)
    yield "fastest forms: " + ", ".join(f"{p} {ms:.1f} ms {form}" for p, (form, ms) in best.items())
    step = 1e3 * batch / max(found["images_per_s"] for found in fast)
    resizing = best.pop("resize", ("", 0.0))[1]
    models = sum(ms for _, ms in best.values())
    yield (
        f"models alone {models:.1f} ms / step {step:.1f} ms = {models / step:.3f}; with copy and "
        f"resizing, {resizing:.1f} ms, {(models + resizing) / step:.3f}"
    )


def _gaps(auto: Any, plain: Any) -> str:
    theirs = dict(map(tuple, plain["losses"]))
    gaps = [(abs(x / theirs[s] - 1), s) for s, x in auto["losses"] if theirs.get(s)]
    if not gaps:
        return "no losses to compare"
    late = [gap for gap, step in gaps if step > max(s for _, s in gaps) // 6] or [0.0]
    worst, at = max(gaps)
    begun = (auto["speed"].get("compiled_from") or ["none"])[-1]
    return (
        f"losses of {gaps[-1][1]} steps, compiled from {begun}: largest gap to plain {worst:.2%} "
        f"(step {at}), {max(late):.2%} after the first sixth, {gaps[-1][0]:.2%} at the end"
    )


def _spread(runs: list[Any]) -> str:
    def last(run: Any) -> float:
        losses = [loss for _, loss in run["losses"]][-5:]
        return sum(losses) / max(1, len(losses))

    *three, resumed = map(last, runs)
    within = min(three) <= resumed <= max(three)
    begun = [run["speed"].get("compiled_from") for run in runs]
    return (
        f"mean of the last five losses: three runs {', '.join(f'{x:.5f}' for x in three)} (spread "
        f"{max(three) - min(three):.5f}), killed and resumed {resumed:.5f}: "
        f"{'within' if within else 'NOT within'}; compiled from {begun}"
    )


def summary(found: Mapping[str, Any]) -> str:
    """Say what a job found, in one line."""
    if "error" in found or ("images_per_s" not in found and "runs" not in found):
        return json.dumps(found)[:1500]
    if "runs" in found:
        return f"{found['seconds']:.0f} s; {_spread(found['runs'])}"
    lines = found.get("profile") or ()
    return (
        f"{found['images_per_s']:,.0f} img/s (mean {found['images_per_s_mean']:,.0f}), 95 % after "
        f"{found['to_95']:.0f} s (first log {found['first']:.0f} s, ended {found['ended']:.0f} s), "
        f"waited {found['waited']:.1%}, peak {found['peak_gib'] or 0:.1f} GiB "
        f"({found['reserved_gib'] or 0:.1f} reserved), {found['speed']}"
        + "".join(f"; {line}" for line in lines[:3])
    )
