"""Pages of the key-value cache as numbers: who holds which, and which hold a known prefix. No tensors here.

A page holds `page_size` consecutive positions of one sequence. A full page is known by the SHA-256 of its own tokens, of the pictures that
some of them stand for, and of its parent's digest (the first page's parent is the salt), so equal digests mean equal prefixes; a
cryptographic hash leaves no room for a crafted collision to read another's prompt. A page that nobody holds any more stays known until its
place is needed; the one unused for longest goes first. Every operation takes constant time.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_digest(salt: str, adapter: str = "") -> bytes:
    """The parent of a first page. Sequences with different salts, or of different adapters, never share."""
    network = hashlib.sha256(adapter.encode("utf-8", "surrogatepass")).digest()
    return hashlib.sha256(b"ernie45 prefix\0" + network + salt.encode("utf-8", "surrogatepass")).digest()


def page_digest(parent: bytes, tokens: Sequence[int], seen: bytes = b"") -> bytes:
    """The name of a full page: SHA-256 over the parent's digest, the page's token ids (32 bits each), and the pictures among them."""
    return hashlib.sha256(parent + array("I", tokens).tobytes() + seen).digest()


class PagePool:
    """Counts holders of each page, and finds pages by digest.

    A page is in exactly one of three states: held (one or more holders), blank (free, content worthless), kept (free, content known).
    """

    def __init__(self, num_pages: int, page_size: int, prefix_sharing: bool = True) -> None:
        assert num_pages > 0
        assert page_size > 0
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_sharing = prefix_sharing
        self._holders = [0] * num_pages
        self._digest: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        # Taken from the end: what was freed last is reused first, so memory that was never touched stays untouched.
        self._blank: OrderedDict[int, None] = OrderedDict.fromkeys(reversed(_scattered(num_pages)))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """How many pages `allocate` can still give."""
        return len(self._blank) + len(self._kept)

    @property
    def kept(self) -> int:
        """How many of the free pages are known, and found again by who begins alike."""
        return len(self._kept)

    def holders(self, page: int) -> int:
        """How many sequences hold a page; 0 when it is free."""
        return self._holders[page]

    def allocate(self, after: int | None = None) -> int:
        """A page with one holder. The page behind `after` is preferred: consecutive pages are read without a copy."""
        assert self.free, "the caller checks `free` first"
        following = None if after is None else after + 1
        if following in self._blank:
            page = following
            del self._blank[page]
        elif self._blank:
            page, _ = self._blank.popitem(last=True)
        else:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Pages of the longest known prefix. They are not taken: call `hold` before anything else is allocated."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def hold(self, page: int) -> None:
        """One more holder of a page that is held or kept."""
        if self._holders[page] == 0:
            del self._kept[page]
        self._holders[page] += 1

    def publish(self, page: int, digest: bytes) -> None:
        """Makes a full page known. Of two pages with equal content the first stays known."""
        assert self._holders[page] > 0
        if self.prefix_sharing and self._digest[page] is None and digest not in self._page_of:
            self._digest[page] = digest
            self._page_of[digest] = page

    def release(self, pages: Sequence[int], *, spoiled: bool = False) -> None:
        """One holder less for each page of a sequence, last page first, so that a prefix outlives what follows it.

        spoiled: the content cannot be trusted, nobody may find it any more.
        """
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} was released twice"
            if spoiled:
                self._forget(page)
            self._holders[page] -= 1
            if self._holders[page] == 0:
                (self._blank if self._digest[page] is None else self._kept)[page] = None

    def check(self) -> None:
        """Proves that every page is in exactly one state and every digest leads to its page. For tests and for idle moments."""
        for page in range(self.num_pages):
            states = (self._holders[page] > 0) + (page in self._blank) + (page in self._kept)
            assert states == 1, f"page {page} is in {states} states"
            assert self._holders[page] >= 0
            assert not (page in self._blank and self._digest[page] is not None), f"blank page {page} is still known"
            assert not (page in self._kept and self._digest[page] is None), f"kept page {page} is not known"
        known = {page: digest for page, digest in enumerate(self._digest) if digest is not None}
        assert {digest: page for page, digest in known.items()} == self._page_of
        assert len(known) == len(self._page_of)

    def _forget(self, page: int) -> None:
        digest = self._digest[page]
        if digest is not None:
            del self._page_of[digest]
            self._digest[page] = None


def _scattered(count: int) -> list[int]:
    """0 .. count-1 in bit-reversed order: sequences that start one after another start far apart and have room to grow in a row."""
    width = (count - 1).bit_length()
    order = (int(f"{i:0{width}b}"[::-1], 2) if width else 0 for i in range(1 << width))
    return [page for page in order if page < count]
