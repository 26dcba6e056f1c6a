"""The report as one page of HTML: what was found first, then pictures, then how it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from onestill.evaluate.report import pieces
from onestill.evaluate.report.model import About, Report, Sheet, Target, Tried
from onestill.evaluate.run import Evaluation

__all__ = ["render"]

_HERO_PICTURES = 10
_DEFINITIONS = {
    "Fréchet distance": "Squared Fréchet distance between Gaussians fitted to the network's features of drawn and of "
    "real pictures. It falls with the number of pictures. It is no FID, which is by InceptionV3: no number here "
    "compares with one from another set size or network.",
    "kernel distance": "Squared maximum mean discrepancy of the same features, kernel "
    "(x.y/D + 1)^3, unbiased: no set-size effect.",
    "coverage": "Share of real pictures with a drawn one in their neighbourhood (out to the 5th nearest real one).",
    "CLIP score": "100 times the mean cosine between a picture's embedding and its caption's; not clipped.",
    "retrieval": "How often a picture's own caption is the nearest of {among} different captions; chance is {chance}.",
    "style": "How often the asked style's words are nearest to the picture, among all styles of the set.",
    "diversity": "Mean feature distance between seeds of one prompt, as a share of the mean distance between real "
    "pictures of different prompts. Noise raises it too: read it beside the Fréchet distance.",
    "colours": "Share of “a colour shape” pictures whose named colour covers more of the foreground than any other.",
    "±": "Half a 95 % interval: for the Fréchet distance a jackknife over ten blocks of prompts, for the CLIP score a "
    "bootstrap, for shares Wilson's.",
}


def render(report: Report, created: str) -> str:
    """The whole page; `created` is its date."""
    about, evaluation = report.about, report.evaluation
    css = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    sections = [("figures", "Figures", _figures(evaluation))]
    sections += [(name, name.capitalize(), _sheet(name, sheet)) for name, sheet in report.sheets.items()]
    if report.tried:
        sections.append(("tried", "Tried", _tried(report.tried)))
    sections.append(("method", "Method", _method(evaluation)))
    sections.append(("repeat", "Repeat", _repeat(about)))
    index = "".join(f'<li><a href="#{escape(name)}">{escape(title)}</a></li>' for name, title, _ in sections)
    body = "".join(part for _, _, part in sections)
    targets = (
        f'<ul class="targets">{"".join(_target(target) for target in report.targets)}</ul>' if report.targets else ""
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(about.title)}</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
<header><div>
<p class="kicker">onestill · evaluation</p>
<h1>{escape(about.title)}</h1>
<p class="lead">{escape(about.lead)}</p>
{_hero(report)}
{targets}
</div></header>
<nav aria-label="Sections"><ul>{index}</ul></nav>
<main>
{body}
<footer>Made {escape(created)} by onestill. This page holds everything it shows; the figures are also in
<a href="report.json">report.json</a>.</footer>
</main>
</body>
</html>
"""


def _hero(report: Report) -> str:
    if not report.hero:
        return ""
    protocol, kept = report.evaluation.protocol, report.evaluation.pictures(report.hero).kept
    first = next(iter(protocol.sheets.values()), ())[:_HERO_PICTURES]
    pictures = [kept[protocol.kept.index(index)] for index in first]
    return pieces.strip(pictures, [protocol.prompts[index] for index in first])


def _target(target: Target) -> str:
    kind = "met" if target.met else "missed"
    note = f"<small>{escape(target.note)}</small>" if target.note else ""
    verdict = f'<span class="verdict {kind}">{kind} · {escape(target.limit)}</span>'
    return f'<li><b>{escape(target.measured)}</b><span class="what">{escape(target.what)}</span>{verdict}{note}</li>'


def _figures(evaluation: Evaluation) -> str:
    text = (
        f"{len(evaluation.protocol.prompts):,} held-out captions, one seed each, the same for every contender; all by "
        f"the network “{evaluation.network}”. Best of each column in bold."
    )
    body = pieces.section("figures", "Figures", text, pieces.charts(evaluation) + pieces.figures_table(evaluation))
    heads = tuple(evaluation.reference.features)
    if len(heads) < 2 or not evaluation.results:
        return body
    rows = [(r.name, *(f"{r.frechet_by_network[name]:.3g}" for name in heads)) for r in evaluation.results]
    text = (
        "A model looks better to a network that it was trained against. Fréchet distance by each network, the "
        "evaluation-only one first; scales differ between networks, so compare ratios within a column."
    )
    table = pieces.table(("contender", *heads), rows)
    return body + pieces.section("networks", "The same pictures, seen by other networks", text, table)


def _sheet(name: str, sheet: Sheet) -> str:
    return pieces.section(name, sheet.title, sheet.text, pieces.sheet_html(sheet))


def _tried(tried: Sequence[Tried]) -> str:
    heads = [f"<h3>{escape(one.title)}</h3><p>{escape(one.text)}</p>" for one in tried]
    tables = [pieces.table(one.heads, one.rows) for one in tried]
    body = "".join(head + table for head, table in zip(heads, tables, strict=True))
    return pieces.section("tried", "What was tried", "", body)


def _method(evaluation: Evaluation) -> str:
    among = evaluation.retrieval_among
    facts = {"{among}": str(among), "{chance}": f"{100 / among:.2g} %"}
    terms = []
    for term, text in _DEFINITIONS.items():
        for mark, fact in facts.items():
            text = text.replace(mark, fact)
        terms.append(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>")
    text = "The definitions of docs/evaluation.md, in short."
    if evaluation.floor is not None:
        text += f" The dashed floor, {evaluation.floor:.3g}, is the Fréchet distance of as many other real pictures."
    return pieces.section("method", "How it was measured", text, f"<dl>{''.join(terms)}</dl>")


def _repeat(about: About) -> str:
    parts = [f"<pre>{escape(about.command)}</pre>", "<dl>"]
    facts = {**about.sets, "first seed": str(about.seed)}
    facts["machine"] = ", ".join(f"{key} {value}" for key, value in about.machine.items())
    facts["versions"] = ", ".join(f"{key} {value}" for key, value in about.versions.items())
    parts += [f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items()]
    parts.append("</dl>")
    if about.caveats:
        notes = "".join(f"<li>{escape(note)}</li>" for note in about.caveats)
        parts.append(f'<h3>What these figures do not say</h3><ul class="plain">{notes}</ul>')
    return pieces.section("repeat", "Sets, machine, command", "", "".join(parts))
