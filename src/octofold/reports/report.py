"""The report: one page that says where a competition stands, how sure that is, and what to do next.

Everything is read back from MLflow; the page holds no script and asks for nothing from the network. Markup, styles and
charts are in ``report.html``, the numbers in `page`.
"""

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from octofold.commands import Report
from octofold.data import manifest
from octofold.errors import UserError
from octofold.files import ROOT, write_text
from octofold.metrics import METRICS, adopt
from octofold.reports import advice, boards, chronicle
from octofold.reports.page import Facts, analyse, unscored
from octofold.track import tracking


def write(config: Report, run: tracking.Run) -> dict[str, Any]:
    """Make the page; return what the entry point prints.

    Raises:
        UserError: no manifest, or nothing trained yet.
    """
    facts = collect(config)
    page = analyse(facts, config.seed)
    page["advice"] = advice.next_steps(page, facts)
    out = config.out or ROOT / "runs" / "report" / config.competition
    path = write_text(out / "report.html", render(page))
    run.log_artifact(path)
    run.set_tags({"manifest_hash": facts.manifest.hash})
    shown = {key: value for key, value in page["headline"].items() if isinstance(value, float) and math.isfinite(value)}
    run.log_metrics(shown)
    return {"run_id": run.id, "report": path, **shown}


def render(page: dict[str, Any]) -> str:
    """Fill the template; every text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["signed"] = lambda value: f"{value:+.4f}"
    environment.filters["day"] = lambda when: when.strftime("%Y-%m-%d %H:%M") if when else ""
    return environment.get_template("report.html").render(page)


def _metric(config: Report, main: chronicle.Blended | None, task: str) -> str:
    """The metric asked for, else the newest blend's (if its file is still there), else the task's own."""
    if config.metric:
        return adopt(config.metric, task)
    try:
        return adopt(main.settings.get("metric", "") if main else "", task)
    except UserError:
        return "accuracy" if task == "classify" else "mse"


def collect(config: Report) -> Facts:
    """Read the competition back from MLflow.

    Raises:
        UserError: the manifest is missing or that of the test images, or the metric is of the other task.
    """
    table = manifest.read(config.manifest or ROOT / "data" / config.competition / "manifest.csv")
    if not table.is_labelled or "fold" not in table.table:
        raise UserError(
            table.file, expected="the manifest of the training images, with labels and folds", got="one without (test?)"
        )
    blends = chronicle.blends(config.competition)
    main = next((blended for blended in reversed(blends) if blended.manifest_hash == table.hash), None)
    name = _metric(config, main, table.task)
    views = chronicle.common_views(config.competition, main.views if main else "")
    oof = chronicle.blend_oof(main, table) if main else None
    members = chronicle.members(config.competition, table, views)
    within = chronicle.blended_members(main, table, members) if main else {}
    others = {
        blended.run: found.values
        for blended in unscored(blends, name, METRICS[name])
        if blended is not main and (found := chronicle.blend_oof(blended, table)) is not None
    }
    return Facts(
        competition=config.competition,
        manifest=table,
        metric_name=name,
        metric=METRICS[name],
        members=members,
        blends=blends,
        tuned=chronicle.studies(config.competition),
        probed=chronicle.probes(config.competition),
        recorded=boards.recorded(config.competition, config.metric),
        main=main,
        blend_oof=oof.values if oof is not None else None,
        weights=chronicle.blend_weights(main) if main else {},
        text=chronicle.blend_text(main, "report.txt") if main else "",
        within={name: own.values for name, own in within.items()},
        others=others,
    )
