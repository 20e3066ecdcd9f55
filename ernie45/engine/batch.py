"""A plan as tensors: the one place where ids, positions, slots and row ranges are built, once per step and for all layers.

Letters: T tokens of the step. A slot is a place in the cache: page * page_size + place in the page.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ernie45.engine.scheduler import Plan

FEW_ROWS = 16  # of a request: up to here each attends alone, as it would without the others and so with the same rounding


@dataclass(frozen=True, slots=True)
class Span:
    """One request's rows: `first` .. `end` of the step's T rows, at positions `start` .. `length` - 1 of its sequence.

    Its `length` keys lie in the cache's pages from `run` on when they are consecutive; else `pages` lists them and `run` is -1.
    """

    first: int
    end: int
    start: int
    length: int
    run: int
    pages: Tensor | None


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens, positions and slots are int64 [T]; spans are in the order of the plan's rows.

    For native calls the R requests once more as int64 tensors: places [R, 3] are first, end and start of each span, pages [R, P] its page
    table, padded with page 0.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    spans: tuple[Span, ...]
    places_R3: Tensor
    pages_RP: Tensor

    @property
    def few_rows(self) -> bool:
        """Whether every request computes one token, or few with drafted ones."""
        return len(self.tokens_T) == len(self.spans) or all(span.end - span.first <= FEW_ROWS for span in self.spans)

    def by_row(self) -> tuple[Tensor, Tensor]:
        """As if each row were a request of its own: page tables [T, P] and how many keys each sees [T]."""
        if len(self.tokens_T) == len(self.spans):
            return self.pages_RP, self.places_R3[:, 2] + 1
        counts_R = self.places_R3[:, 1] - self.places_R3[:, 0]
        ahead_R = self.places_R3[:, 2] - self.places_R3[:, 0] + 1
        lengths_T = torch.arange(len(self.tokens_T)) + ahead_R.repeat_interleave(counts_R)
        return self.pages_RP.repeat_interleave(counts_R, dim=0), lengths_T


class BatchBuilder:
    """Builds batches for one cache; remembers each request's page table as a tensor for as long as the table does not grow."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._tables: dict[str, tuple[tuple[int, ...], int, Tensor | None]] = {}

    def build(self, plan: Plan) -> Batch:
        """The tensors of a plan that has rows."""
        size = self._page_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans = []
        tables: dict[str, tuple[tuple[int, ...], int, Tensor | None]] = {}
        for row in plan.rows:
            first, count = len(tokens), len(row.tokens)
            end = row.start + count
            tokens.extend(row.tokens)
            positions.extend(range(row.start, end))
            slots.extend(row.pages[p // size] * size + p % size for p in range(row.start, end))
            table = self._tables.get(row.request_id)
            if table is None or table[0] is not row.pages:
                table = _table(row.pages)
            tables[row.request_id] = table
            spans.append(Span(first, first + count, row.start, end, table[1], table[2]))
        self._tables = tables
        longest = max(len(row.pages) for row in plan.rows)
        pages = [[*row.pages, *[0] * (longest - len(row.pages))] for row in plan.rows]
        places = [[span.first, span.end, span.start] for span in spans]
        tokens_T, positions_T, slots_T = torch.tensor([tokens, positions, slots]).unbind()  # faster than three tensors
        return Batch(tokens_T, positions_T, slots_T, tuple(spans), torch.tensor(places), torch.tensor(pages))


def causal_mask(rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """[rows, length] of 0 and -inf: the last `rows` of `length` positions see themselves and everything before."""
    return torch.full((rows, length), float("-inf"), dtype=dtype).triu_(length - rows + 1)


def _table(pages: tuple[int, ...]) -> tuple[tuple[int, ...], int, Tensor | None]:
    if pages == tuple(range(pages[0], pages[0] + len(pages))):
        return pages, pages[0], None
    return pages, -1, torch.tensor(pages)
