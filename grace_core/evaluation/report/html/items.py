"""The worst items: picture, question, what is right, and what two models said."""

from __future__ import annotations

from html import escape

from grace_core.evaluation.report.document import Report
from grace_core.evaluation.report.mistakes import Mistake, Mistakes, Thumbnail


def mistakes(report: Report) -> str:
    return "".join(_pair(pair, len(report.models)) for pair in report.mistakes)


def _pair(pair: Mistakes, models: int) -> str:
    counts = ", ".join(f"{escape(name)} {count:,}" for name, count in pair.counts.items())
    heading = f"<h3>{escape(pair.right)} right, {escape(pair.wrong)} wrong</h3>"
    text = f'{heading}<p class="soft">Items: {counts}. First those that most models have right.</p>'
    if pair.without_questions is not None and pair.items:
        text += f'<p class="notice">{escape(pair.without_questions)}</p>'
    cards = "".join(_card(item, pair, models) for item in pair.items)
    return text + (f'<div class="items">{cards}</div>' if cards else "")


def _card(item: Mistake, pair: Mistakes, models: int) -> str:
    asked = []
    for part in item.content:
        if isinstance(part, Thumbnail):
            asked.append(
                f'<img src="{part.address}" width="{part.width}" height="{part.height}" '
                'loading="lazy" alt="picture of the question">'
            )
        elif part.strip():
            asked.append(f'<p class="asked">{escape(part.strip())}</p>')
    lines = {"right is": " / ".join(item.gold)} if item.gold else {}
    if item.gold and item.gold[0] in item.choices:
        lines["right is"] = f"{item.gold[0]}. {item.choices[item.gold[0]]}".rstrip(". ")
    said = {pair.right: item.right.response, pair.wrong: item.wrong.response}
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in lines.items())
    facts += "".join(
        f'<dt>{escape(key)}</dt><dd class="{kind}">{escape(text or "(nothing)")}</dd>'
        for (key, text), kind in zip(said.items(), ("good", "bad"), strict=True)
    )
    unread = " (unreadable)" if item.wrong.answer == "" else ""
    place = f"{escape(item.benchmark)} · <code>{escape(item.id)}</code>{unread}"
    return (
        f'<article class="item">{"".join(asked)}<dl>{facts}</dl>'
        f'<p class="soft">{place} · right by {item.others_right} of {models} models</p></article>'
    )
