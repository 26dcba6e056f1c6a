"""The report as one page of HTML: what was found first, then pictures, then how it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from onestill.evaluate.report.model import About, Report, Target, Tried
from onestill.evaluate.report.pieces import charts, figures_table, section, sheet_html, strip, table
from onestill.evaluate.run import Evaluation

_HERO_PICTURES = 10


def render(report: Report, created: str) -> str:
    """The whole page; `created` is its date."""
    about, evaluation = report.about, report.evaluation
    sections = [("figures", "Figures", _figures(evaluation))]
    for name, sheet in report.sheets.items():
        sections.append((name, name.capitalize(), section(name, sheet.title, sheet.text, sheet_html(sheet))))
    if report.tried:
        sections.append(("tried", "Tried", _tried(report.tried)))
    sections.append(("method", "Method", _method(evaluation)))
    sections.append(("repeat", "Repeat", _repeat(about)))
    targets = "".join(_target(target) for target in report.targets)
    return _filled(
        "page.html",
        title=escape(about.title),
        css=_read("report.css"),
        lead=escape(about.lead),
        hero=_hero(report),
        targets=f'<ul class="targets">{targets}</ul>' if targets else "",
        index="".join(f'<li><a href="#{escape(name)}">{escape(title)}</a></li>' for name, title, _ in sections),
        body="".join(part for _, _, part in sections),
        created=escape(created),
    )


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _filled(name: str, **values: str) -> str:
    """The template `name` of this folder with its `$places` filled by HTML."""
    return Template(_read(name)).substitute(values)


def _hero(report: Report) -> str:
    if not report.hero:
        return ""
    protocol, kept = report.evaluation.protocol, report.evaluation.pictures(report.hero).kept
    first = next(iter(protocol.sheets.values()), ())[:_HERO_PICTURES]
    pictures = [kept[protocol.kept.index(index)] for index in first]
    return strip(pictures, [protocol.prompts[index] for index in first])


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
    body = section("figures", "Figures", text, charts(evaluation) + figures_table(evaluation))
    heads = tuple(evaluation.reference.features)
    if len(heads) < 2 or not evaluation.results:
        return body
    rows = [(r.name, *(f"{r.frechet_by_network[name]:.3g}" for name in heads)) for r in evaluation.results]
    text = (
        "A model looks better to a network that it was trained against. Fréchet distance by each network, the "
        "evaluation-only one first; scales differ between networks, so compare ratios within a column."
    )
    by_network = table(("contender", *heads), rows)
    return body + section("networks", "The same pictures, seen by other networks", text, by_network)


def _tried(tried: Sequence[Tried]) -> str:
    parts = [f"<h3>{escape(one.title)}</h3><p>{escape(one.text)}</p>{table(one.heads, one.rows)}" for one in tried]
    return section("tried", "What was tried", "", "".join(parts))


def _method(evaluation: Evaluation) -> str:
    among = evaluation.retrieval_among
    terms = _filled("definitions.html", among=str(among), chance=f"{100 / among:.2g} %").replace("\n", "")
    text = "The definitions of docs/evaluation.md, in short."
    if evaluation.floor is not None:
        text += f" The dashed floor, {evaluation.floor:.3g}, is the Fréchet distance of as many other real pictures."
    return section("method", "How it was measured", text, f"<dl>{terms}</dl>")


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
    return section("repeat", "Sets, machine, command", "", "".join(parts))
