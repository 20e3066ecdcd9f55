"""The page's pictures: losses over the steps of every stage, and a sheet of pictures with the questions and answers about them."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_INK, _PALE, _LINE, _HELD = (40, 44, 52), (222, 225, 230), (38, 104, 199), (214, 90, 30)
_GOOD, _BAD = (30, 130, 60), (190, 40, 40)
_WIDE, _HIGH, _EDGE = 300, 210, 34
_CARD_WIDE, _PICTURE = 300, 168


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_losses(curves: Mapping[str, Sequence[Mapping[str, float]]], target: Path) -> None:
    """One small chart for each stage: the loss of every step, smoothed, and the held-out loss where it was measured."""
    sheet = Image.new("RGB", (_WIDE * len(curves), _HIGH), "white")
    for number, (name, steps) in enumerate(curves.items()):
        sheet.paste(_chart(name, steps), (_WIDE * number, 0))
    sheet.save(target, optimize=True)


def _chart(name: str, steps: Sequence[Mapping[str, float]]) -> Image.Image:
    chart = Image.new("RGB", (_WIDE, _HIGH), "white")
    draw = ImageDraw.Draw(chart)
    smooth, value = [], steps[0]["loss"]
    for step in steps:
        value = 0.9 * value + 0.1 * step["loss"]
        smooth.append(value)
    held = [(number, step["held_out_loss"]) for number, step in enumerate(steps) if "held_out_loss" in step]
    seen = smooth + [loss for _, loss in held]
    low, high = min(seen), max(max(seen), min(seen) + 1e-3)
    left, right, top, bottom = _EDGE + 6, _WIDE - 10, 30, _HIGH - 26

    def at(number: int, loss: float) -> tuple[float, float]:
        across = number / max(1, len(steps) - 1)
        return left + (right - left) * across, bottom - (bottom - top) * (loss - low) / (high - low)

    for share in (0.0, 0.5, 1.0):
        loss = low + (high - low) * share
        y = at(0, loss)[1]
        draw.line((left, y, right, y), fill=_PALE)
        draw.text((2, y - 7), f"{loss:.2f}", fill=_INK, font=_font(12))
    draw.line([at(number, loss) for number, loss in enumerate(smooth)], fill=_LINE, width=2)
    for number, loss in held:
        x, y = at(number, loss)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_HELD)
    draw.text((left, 6), name, fill=_INK, font=_font(15))
    draw.text((left, bottom + 6), f"{len(steps)} steps", fill=_INK, font=_font(12))
    return chart


def draw_answers(answers: Sequence[Mapping[str, Any]], pictures: Path, target: Path) -> None:
    """A sheet of cards: picture, question, thought, answer; right answers are green."""
    columns = 3
    rows = -(-len(answers) // columns)
    high = _PICTURE + 170
    sheet = Image.new("RGB", (columns * _CARD_WIDE, rows * high), "white")
    for number, answer in enumerate(answers):
        sheet.paste(_card(answer, pictures, high), (number % columns * _CARD_WIDE, number // columns * high))
    sheet.save(target, optimize=True)


def _card(answer: Mapping[str, Any], pictures: Path, high: int) -> Image.Image:
    card = Image.new("RGB", (_CARD_WIDE, high), "white")
    draw = ImageDraw.Draw(card)
    shown = Image.open(pictures / answer["picture"]).resize((_PICTURE, _PICTURE), Image.Resampling.LANCZOS)
    card.paste(shown, (12, 10))
    y = _PICTURE + 18
    thought = " ".join(str(answer["thought"]).split())
    parts = [(answer["group"], _INK, 11), (answer["asked"], _INK, 15)]
    parts += [(f"thinks: {thought[:150]}", (120, 120, 128), 11)] if thought else []
    parts.append((f"{answer['said']}".strip()[:90] or "(nothing)", _GOOD if answer["right"] else _BAD, 15))
    for text, colour, size in parts:
        for line in textwrap.wrap(text, width=46 if size < 15 else 34)[:4]:
            draw.text((12, y), line, fill=colour, font=_font(size))
            y += size + 5
    return card
