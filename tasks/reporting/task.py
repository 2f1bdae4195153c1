"""The report as Prefect tasks: the HTML file, and what the UI shows of it."""

import base64
import re
from pathlib import Path

from prefect import task
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from tasks.reporting.figures import purity_png
from tasks.reporting.run import report_run
from tasks.reporting.table import results_markdown
from tasks.selection.ledger import open_ledger, rows


@task(name="report")
def report(directory: Path) -> str:
    """report.html of a run."""
    return str(report_run(directory))


@task(name="publish")
def publish(directory: Path) -> None:
    """Results, purity and its curve as artifacts of the flow run."""
    name = re.sub(r"[^a-z0-9-]+", "-", directory.name.lower()).strip("-") or "run"
    book = directory / "study.duckdb"
    with open_ledger(book) as con:
        purity = rows(con, """
            SELECT p.method, p.k, round(100 * purity, 1) AS "purity %", round(auprc, 3) AS auprc,
                   round(auroc, 3) AS auroc
            FROM purity p JOIN (SELECT method, max(rank) AS k FROM selections GROUP BY method) s USING (method, k)
            ORDER BY purity DESC, p.method
        """)  # fmt: skip
    create_table_artifact(purity, key=f"{name}-purity", description="Selection of every arm")
    create_markdown_artifact(
        f"{results_markdown(book)}\n\nReport: `{(directory / 'report.html').resolve()}`", key=f"{name}-results",
        description="Table 4 of this run",
    )  # fmt: skip
    picture = base64.b64encode(purity_png(book)).decode()
    create_image_artifact(f"data:image/png;base64,{picture}", key=f"{name}-purity-curve",
                          description="Purity against the number selected")  # fmt: skip
