"""The page, from top to bottom."""

import re
from collections.abc import Sequence

from distil_jax.page import benchmarks, facts, inside, results, strip, training
from distil_jax.page.elements import paragraph, text
from distil_jax.page.figures import Plots
from distil_jax.page.record import Record
from distil_jax.page.style import BASE, REPORT

# Nothing is loaded and nothing runs: no script, no font, no address. Images stand in the page itself.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
RESEARCH = "Research only: nothing here has been evaluated for clinical use."


def page(records: Sequence[Record], plots: Plots) -> str:
    """One self-contained HTML file about one work folder, or about several beside each other."""
    sections = [
        results.results(records, plots),
        results.specialties(records, plots),
        benchmarks.benchmarks(records, plots),
        benchmarks.next_token(records, plots),
        training.training(records, plots),
        facts.speed(records),
        inside.projection(records, plots),
        inside.alignment(records),
        inside.attention(records, plots),
        facts.answers(records),
        facts.data(records),
        facts.settings(records),
    ]
    sections = [part for part in sections if part]
    title = text(", ".join(record.name for record in records))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{BASE}{REPORT}{strip.STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{paragraph(RESEARCH)}
{_contents(sections)}
<main>
{"".join(sections)}
</main>
</body>
</html>
"""


def _contents(sections: Sequence[str]) -> str:
    """Links to the sections, by their anchors and titles, which are ours."""
    found = [re.match(r'<section id="([a-z]+)"><h2>([^<]*)</h2>', part) for part in sections]
    return "<nav>" + "".join(f'<a href="#{m[1]}">{m[2]}</a>' for m in found if m) + "</nav>"
