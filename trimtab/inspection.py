"""A bundle's contents as the plain data that ``trimtab inspect --json`` prints: a contract."""

from __future__ import annotations

import json
from typing import Any

from trimtab.bundle import Bundle
from trimtab.errors import BundleError
from trimtab.manifest import REMOVAL_PLAN, SCHEMA


def inspect(bundle: Bundle) -> dict[str, Any]:
    """Segments, schedules, passes and files of a bundle.

    Args:
        bundle: Opened.

    Returns:
        ``schema``; ``segments`` (``name``, ``parameters``, ``weight_bytes``, ``engines`` with ``target``,
        ``backend`` and ``bytes``); ``schedules`` (``task``, ``name``, ``steps`` and ``calls``: the segments that
        every step runs, in order); ``passes``; ``removal``: the plan of the layers that were removed, or None;
        ``files`` (``path``, ``bytes``, ``sha256``); and what the program says of itself.
    """
    contents = bundle.contents
    return {
        "schema": SCHEMA,
        "trimtab": contents.version,
        "metadata": dict(contents.metadata),
        "size": list(contents.size),
        "tasks": list(contents.tasks),
        "segments": [
            {
                "name": segment.name,
                "parameters": segment.parameters,
                "weight_bytes": segment.weight_bytes,
                "inputs": [
                    {"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in segment.inputs
                ],
                "outputs": [
                    {"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in segment.outputs
                ],
                "engines": [vars(engine) for engine in segment.engines],
            }
            for segment in contents.segments.values()
        ],
        "schedules": [
            {
                "task": task_name,
                "name": name,
                "steps": len(schedule.steps),
                "calls": [[call.segment for call in step.calls] for step in schedule.steps],
            }
            for task_name, task in contents.tasks.items()
            for name, schedule in task.schedules.items()
        ],
        "passes": [vars(entry) for entry in contents.passes],
        "removal": _removal(bundle),
        "files": [vars(file) for file in contents.files],
    }


def _removal(bundle: Bundle) -> dict[str, Any] | None:
    """A `trimtab.passes.removal.RemovalPlan` as data."""
    if all(file.path != REMOVAL_PLAN for file in bundle.contents.files):
        return None
    try:
        plan = dict(json.loads(bundle.path(REMOVAL_PLAN).read_text(encoding="utf-8")))
        _check_removal(plan)
        return plan
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{bundle.folder / REMOVAL_PLAN} cannot be read ({error}): compile again") from None


def _check_removal(plan: dict[str, Any]) -> None:
    """Raises TypeError for what is missing or of another type: whoever made the bundle may have written anything."""

    def need(name: str, value: object, *kinds: type, what: str) -> None:
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r:.60} and must be {what}")

    need("removed", plan.get("removed"), list, what="a list")
    need("details", plan.get("details"), dict, what="a table")
    texts = {f"removed[{index}]": name for index, name in enumerate(plan["removed"])}
    texts |= {name: plan.get(name) for name in ("method", "measure")}
    if plan.get("measure") == "time":
        texts["details.device"] = plan["details"].get("device")
    for name, value in texts.items():
        need(name, value, str, what="a text")
        if not value.isprintable():  # it is shown on a terminal
            raise TypeError(f"{name} is {value!r:.60} and must be a line of text")
    for name in ("share", "reached", "predicted_loss", "joint_loss", "rank_correlation"):
        need(name, plan.setdefault(name, None), int, float, type(None), what="a number or null")
        float(plan[name] or 0)  # a whole number of JSON may be larger than any
    if (plan["joint_loss"] is None) != (plan["predicted_loss"] is None):
        raise TypeError("of joint_loss and predicted_loss one is missing")
    if plan["rank_correlation"] is not None:
        need("details.random_sets", plan["details"].get("random_sets"), int, what="a whole number")
