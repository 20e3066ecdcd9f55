"""`ernie data preview FILES`: rows as the model will see them; `ernie data check FILES`: every row read, counted and measured.

ernie data preview rows.jsonl                      the first rows in the terminal; what is learned is marked
ernie data preview rows.jsonl --html rows.html     the same as a page
ernie data check train/ --model starter            kinds, lengths, and every bad row by file, line and field
"""

import base64
import html
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from ernie45.config import Environment
from ernie45.errors import ConfigError, DataError, TokenizerError
from ernie45.models.load import find_model
from ernie45.recipes.learning import BadRows
from ernie45.recipes.seeing import open_gallery, vision_of
from ernie45.recipes.terminal import clean
from ernie45.tokens.images import load_pillow
from ernie45.tokens.messages import Video
from ernie45.tokens.template import IGNORED, PLACEHOLDER, ChatTemplate, load_template
from ernie45.tokens.tokenizer import Tokenizer, load_tokenizer
from ernie45.train.batch import Example, KnownPicture
from ernie45.train.examples import as_document, as_example
from ernie45.train.picture_rows import Interleaved
from ernie45.train.preference import as_pair
from ernie45.train.records import Document, Judgement, Preference, Record, read_records
from ernie45.train.sighted import Gallery, PictureConfig
from ernie45.train.unpaired import as_judged

_QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Read all training rows: count kinds and lengths, and name every bad row."""

    data: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")]
    """Files, folders or patterns of rows."""
    model: str = "starter"
    """Whose tokenizer and template: folder, Hub name, or `starter`."""
    chat_format: str | None = None
    """How conversations are written, for a base model that has no template of its own."""
    pictures: PictureConfig = field(default_factory=PictureConfig)
    """How the pictures of rows are read."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("ernie data needs files, folders or patterns of rows")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(CheckConfig):
    """Look at training rows as a model will see them; what is learned is marked."""

    first: int = 1
    """Number of the first row that is shown, from 1."""
    rows: int = 3
    """Rows that are shown."""
    html: Path | None = None
    """Write the rows as a page instead of showing them here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Part:
    """A piece of a rendered row: its text, whether training learns it, and what is learned in its place where that differs."""

    text: str
    learned: bool
    instead: str = ""


@dataclass(frozen=True)
class Shown:
    """A row as the model sees it: sections by name (one, or prompt, chosen and rejected), tokens, how many are learned, and pictures."""

    where: str
    kind: str
    sections: tuple[tuple[str, tuple[Part, ...]], ...]
    tokens: int
    learned: int
    pictures: tuple[KnownPicture, ...] = ()


def run(config: CheckConfig, environment: Environment) -> int:
    """Preview or check, as the config says. Returns 1 when a check found bad rows. Raises DataError when there is nothing to show."""
    folder = find_model(config.model, environment)
    tokenizer = load_tokenizer(folder)
    try:
        template: ChatTemplate | None = load_template(folder, tokenizer, config.chat_format)
    except TokenizerError:
        template = None  # plain texts need none
    gallery = open_gallery(folder, vision_of(folder), config.pictures)
    if not isinstance(config, PreviewConfig):
        return _check(config, tokenizer, template, gallery)
    bad = BadRows()
    rows = list(islice(shown(config.data, tokenizer, template, bad, gallery), config.first - 1, config.first - 1 + config.rows))
    if not rows:
        raise DataError(f"there is no row {config.first}; bad rows: {len(bad.errors)}")
    if config.html is not None:
        try:
            config.html.write_text(as_page(rows, config.model, gallery), "utf-8")
        except OSError as error:
            raise DataError(f"{config.html}: cannot be written: {error.strerror or error}") from error
        print(f"{config.html}: {len(rows)} rows")
        return 0
    console = Console(highlight=False)
    for row in rows:
        _show(row, console)
    return 0


def shown(
    paths: Sequence[Path], tokenizer: Tokenizer, template: ChatTemplate | None, bad: BadRows, gallery: Gallery | None = None
) -> Iterator[Shown]:
    """Every row of the files, rendered; bad ones go to `bad`."""
    for record in read_records(paths, bad):
        try:
            yield render(record, tokenizer, template, gallery)
        except DataError as error:
            bad(error)


def render(record: Record, tokenizer: Tokenizer, template: ChatTemplate | None, gallery: Gallery | None = None) -> Shown:
    """One row as training renders it. Raises DataError naming the row."""
    if isinstance(record, Document) or (isinstance(record, Interleaved) and not record.is_conversation):
        kind = "text" if isinstance(record, Document) else "text with pictures"
        return _shown(record, kind, as_document(record, tokenizer, gallery), tokenizer)
    if template is None:
        raise DataError(f"{record.where}: is a conversation, and the model has no chat template; name one with --chat-format")
    if isinstance(record, Preference):
        pair = as_pair(record, template, gallery)
        sections = (
            ("prompt", parts(pair.prefix, (IGNORED,) * len(pair.prefix), tokenizer)),
            ("chosen", parts(pair.chosen, pair.chosen_labels, tokenizer)),
            ("rejected", parts(pair.rejected, pair.rejected_labels, tokenizer)),
        )
        learned = sum(label != IGNORED for label in (*pair.chosen_labels, *pair.rejected_labels))
        return Shown(record.where, "pair", sections, pair.num_tokens, learned, pair.pictures)
    if isinstance(record, Judgement):
        [judged] = as_judged(record, template, gallery)
        sections = (
            ("prompt", parts(judged.prefix, (IGNORED,) * len(judged.prefix), tokenizer)),
            ("good" if judged.good else "bad", parts(judged.answer, judged.labels, tokenizer)),
        )
        learned = sum(label != IGNORED for label in judged.labels)
        return Shown(record.where, "judged answer", sections, len(judged.prefix) + len(judged.answer), learned, judged.pictures)
    return _shown(record, "conversation", as_example(record, template, tokenizer, gallery=gallery), tokenizer)


def _shown(record: Record, kind: str, example: Example, tokenizer: Tokenizer) -> Shown:
    sections = (("", parts(example.ids, example.labels, tokenizer)),)
    return Shown(record.where, kind, sections, len(example.ids), example.learned, example.pictures)


def parts(ids: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer) -> tuple[Part, ...]:
    """Ids as runs of text that are learned, or not, or learned as another token; the tokens of a picture are counted."""
    made, placeholder = [], tokenizer.id_of(PLACEHOLDER)

    def alike(pair: tuple[int, int]) -> tuple[bool, int | None, bool]:
        return pair[1] != IGNORED, pair[1] if pair[1] not in (IGNORED, pair[0]) else None, pair[0] == placeholder

    for (learned, instead, seen), group in groupby(zip(ids, labels, strict=True), key=alike):
        run = [id for id, _ in group]
        text = f"⟨{len(run):,} tokens of a picture⟩" if seen else tokenizer.decode(run, skip_special=False)
        made.append(Part(text, learned, "" if instead is None else tokenizer.decode([instead], skip_special=False)))
    return tuple(made)


def _check(config: CheckConfig, tokenizer: Tokenizer, template: ChatTemplate | None, gallery: Gallery | None) -> int:
    bad = BadRows()
    kinds: Counter[str] = Counter()
    lengths: list[int] = []
    learned = pictures = 0
    live = sys.stderr.isatty()
    for row in shown(config.data, tokenizer, template, bad, gallery):
        kinds[row.kind] += 1
        pictures += len(row.pictures)
        lengths.append(row.tokens)
        learned += row.learned
        if live and len(lengths) % 1000 == 0:
            print(f"\r\x1b[K{len(lengths):,} rows", end="", file=sys.stderr, flush=True)
    if live:
        print("\r\x1b[K", end="", file=sys.stderr)
    lengths.sort()
    print(f"rows      {len(lengths):,}  ({', '.join(f'{count:,} {kind}' for kind, count in kinds.items()) or 'none'})")
    if lengths:
        print(f"tokens    {sum(lengths):,}, of which {learned:,} are learned")
        marks = [f"{lengths[min(len(lengths) - 1, int(q * len(lengths)))]:,} ({'longest' if q == 1 else f'{q:.0%}'})" for q in _QUANTILES]
        print(f"a row     {', '.join(marks)} tokens")
    if pictures:
        print(f"pictures  {pictures:,}")
    print(f"bad rows  {len(bad.errors):,}" + (f", of which {bad.SHOWN} are shown above" if len(bad.errors) > bad.SHOWN else ""))
    return 1 if bad.errors or not lengths else 0


def _show(row: Shown, console: Console) -> None:
    console.print(
        Text(f"── {clean(row.where)} · {row.kind} · {row.tokens:,} tokens, {row.learned:,} learned", style="bold"), soft_wrap=True
    )
    for number, picture in enumerate(row.pictures, 1):
        console.print(Text(f"picture {number}: {_caption(picture)}", style="cyan"), soft_wrap=True)
    for name, pieces in row.sections:
        if name:
            console.print(Text(name, style="bold"))
        text = Text()
        for piece in pieces:
            if piece.learned and not console.color_system:  # a pipe has no colours: brackets mark what is learned
                text.append(f"⟦{clean(piece.text)}⟧")
                continue
            text.append(clean(piece.text), style="black on green" if piece.learned else "dim")
            if piece.instead:
                text.append(f" learned as {clean(piece.instead)} ", style="green italic")
        console.print(text, soft_wrap=True)
    console.print()


def _caption(known: KnownPicture) -> str:
    """Where a picture comes from, and how large it is in patches."""
    frames, rows, columns = known.grid
    source = "inline" if known.part.source.startswith("data:") else known.part.source
    times = f"{frames} frames of " if isinstance(known.part, Video) else ""
    return f"{clean(source)}, {times}{rows} x {columns} patches"


_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.55 ui-sans-serif, system-ui, sans-serif; }
article { margin: 1.5rem 0; padding: 1rem 1.25rem; border: 1px solid light-dark(#ddd6cb, #3a3632); border-radius: 0.75rem; }
h2 { margin: 0 0 0.5rem; font-size: 0.9rem; font-weight: 500; color: light-dark(#67615a, #a8a198); }
h3 { margin: 0.75rem 0 0.25rem; font-size: 0.85rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; }
mark { background: light-dark(#cdeadb, #1f4a3a); color: inherit; border-radius: 3px; }
i { color: light-dark(#1f6b5a, #76c2ab); }
figure { display: inline-block; margin: 0.5rem 1rem 0.5rem 0; font-size: 0.8rem; }
img { display: block; max-width: 16rem; max-height: 16rem; border-radius: 0.25rem; }
"""


def as_page(rows: Sequence[Shown], model: str, gallery: Gallery | None = None) -> str:
    """The rows as one HTML page that asks for nothing from outside; what is learned is marked. All text is escaped, pictures lie in it."""
    body = []
    for row in rows:
        body.append(f"<article><h2>{html.escape(row.where)} · {row.kind} · {row.tokens:,} tokens, {row.learned:,} learned</h2>")
        body += [_figure(picture, gallery) for picture in row.pictures if gallery is not None]
        for name, pieces in row.sections:
            body.append((f"<h3>{name}</h3>" if name else "") + "<pre>" + "".join(map(_as_html, pieces)) + "</pre>")
        body.append("</article>")
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{policy}<title>Rows</title><style>{_STYLE}</style></head><body>'
        f"<h1>Rows as {html.escape(model)} sees them</h1><p><mark>Marked</mark> text is learned.</p>{''.join(body)}</body></html>\n"
    )


def _figure(known: KnownPicture, gallery: Gallery) -> str:
    """A picture as the model sees it, resized; of a video the first frame."""
    picture = gallery.picture(known)
    size = (picture.width, picture.height)
    file = io.BytesIO()
    load_pillow().frombytes("RGB", size, picture.rgb[: picture.width * picture.height * 3]).save(file, "PNG")
    source = base64.b64encode(file.getvalue()).decode()
    caption = html.escape(_caption(known))
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'


def _as_html(piece: Part) -> str:
    text = html.escape(piece.text)
    marked = f"<mark>{text}</mark>" if piece.learned else text
    return marked + (f"<i> learned as {html.escape(piece.instead)} </i>" if piece.instead else "")
