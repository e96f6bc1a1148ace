"""How pages look: on paper and on black, on a wide screen and on a phone."""

# The colours of plots by name: in light, in dark. figures.py draws with the first.
COLORS = {
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "line": ("#d1d9e0", "#3d444d"),
    "teacher": ("#6e7781", "#a9b4bf"),
    "untouched": ("#9a6700", "#d29922"),
    "control": ("#0969da", "#58a6ff"),
    "smoothing": ("#bc4c00", "#f0883e"),
    "distilled": ("#1a7f37", "#3fb950"),
    "other0": ("#cf222e", "#ff7b72"),
    "other1": ("#8250df", "#bc8cff"),
    "other2": ("#7d4e57", "#d3a5ab"),
    "other3": ("#bf3989", "#f778ba"),
    "other4": ("#1b7c83", "#39c5cf"),
    "other5": ("#6a7000", "#c3cc50"),
    "other6": ("#24292f", "#f0f6fc"),
    "other7": ("#57ab5a", "#a4e2a7"),
}
# Of the page besides: background, a darker one, and the roles of tokens.
_PAGE = {
    "paper": ("#ffffff", "#0d1117"),
    "shade": ("#f6f8fa", "#1c2128"),
    "link": ("#0969da", "#58a6ff"),
    "warn": ("#fff1d6", "#3a2c0a"),
    "root": ("#c9ecc9", "#1f4a2a"),
    "interior": ("#fbe9a6", "#574709"),
    "crossing": ("#f6c9ee", "#572c50"),
    "none": ("#d5ebf5", "#1d4152"),
}


def _variables(shade: int) -> str:
    return " ".join(f"--{name}: {pair[shade]};" for name, pair in (COLORS | _PAGE).items())


# Of every page of ours.
BASE = f"""
:root {{ color-scheme: light dark; {_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}
* {{ box-sizing: border-box }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: break-word }}
table {{ border-collapse: collapse; font-size: 14px }}
td, th {{ padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }}
.scroll {{ overflow-x: auto; margin: .4rem 0 1rem; max-width: 100% }}
"""

REPORT = """
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem;
  padding-top: .6rem; border-top: 1px solid var(--line) } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
a { color: var(--link) } p { margin: .4rem 0 .8rem; max-width: 48rem }
nav { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: 14px; margin: .8rem 0 }
.scroll table td:not(:first-child), .scroll table th:not(:first-child) { text-align: right; white-space: nowrap }
.scroll table.words td, .scroll table.words th { text-align: left; white-space: normal }
.scroll td:first-child { min-width: min(14rem, 34vw); max-width: 22rem; overflow-wrap: anywhere }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem;
  align-items: start }
figure { margin: 0; min-width: 0; max-width: 34rem }
figcaption { font-size: 13px; color: var(--muted); overflow-wrap: anywhere }
svg { display: block; width: 100%; height: auto } svg * { stroke-linejoin: round }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: 14px; margin: .3rem 0 .8rem }
.key span { display: inline-flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; min-width: 0 }
.key svg { width: 28px; flex: none }
.warn { background: var(--warn);
  border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .6rem 0 }
.warn p { margin: 0 0 .3rem }
.asked { border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; padding: .2rem .8rem .6rem }
.asked pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; font-weight: 600; margin: .4rem 0 }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .6rem }
.answers div { background: var(--shade); border-radius: 6px; padding: .4rem .6rem; font-size: 14px; min-width: 0;
  white-space: pre-wrap; overflow-wrap: anywhere }
.answers b { display: block; font-size: 12px; color: var(--muted) }
details { margin: .4rem 0 } summary { cursor: pointer; color: var(--link) }
.scroll .words td:first-child { min-width: min(13rem, 40vw) }
.scroll .words td:not(:first-child) { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere }
"""
