"""When a page has come to rest after an action: seen from its requests and its frames, never from a fixed wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from playwright.async_api import Error as PlaywrightError
from playwright.async_api import Frame, Page, Request

QUIET = 0.05
"""Seconds without a request in flight after which none is expected."""
LIMIT = 1.0
"""Seconds after which a page that does not come to rest is taken as it is."""

_LOADING = frozenset({"document", "fetch", "xhr"})

# A style that a script changes from frame to frame is an animation and says nothing new. A page that draws no frames,
# hidden behind another, still has timers.
_QUIET_FRAMES = """() => new Promise(done => {
  const until = performance.now() + 1000;
  let changed = false, quiet = 0;
  const note = records => { changed ||= records.some(record => record.attributeName !== "style"); };
  const observer = new MutationObserver(note);
  const watch = root => {
    observer.observe(root, {subtree: true, childList: true, characterData: true, attributes: true});
    for (const element of root.querySelectorAll("*")) {
      if (element.shadowRoot) watch(element.shadowRoot);
      if (element.localName === "iframe" && element.contentDocument) watch(element.contentDocument);
    }
  };
  watch(document);
  const next = () => {
    const timer = setTimeout(frame, 50), drawn = requestAnimationFrame(frame);
    function frame() {
      clearTimeout(timer);
      cancelAnimationFrame(drawn);
      note(observer.takeRecords());
      quiet = changed ? 0 : quiet + 1;
      changed = false;
      if (quiet < 2 && performance.now() < until) return next();
      observer.disconnect();
      done();
    }
  };
  next();
})"""


class Traffic:
    """The page's requests that may still change it, those that began earlier left out: an old poll says nothing."""

    def __init__(self, page: Page) -> None:
        self.unanswered: Request | None = None
        """The request for the page's next document, while the server has not begun to answer it."""
        self._page = page
        self._open: set[Request] = set()
        self._windows = 0
        self._since = 0.0
        self.seen = 0
        """Grows with whatever is heard."""
        self._changed = asyncio.Event()

    def restart(self) -> None:
        """Count quiet time from now on."""
        self._since = asyncio.get_running_loop().time()

    async def quiet(self) -> None:
        """Wait until no request has been in flight for `QUIET` seconds."""
        loop = asyncio.get_running_loop()
        while True:
            left = None if self._open or self._windows else self._since + QUIET - loop.time()
            if left is not None and left <= 0:
                return
            await self._news(left)

    async def answered(self, seconds: float) -> bool:
        """Whether the document that is under way, if any, has begun to arrive, waiting for it for some seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.unanswered:
                    await self._news(None)
        return self.unanswered is None

    async def _news(self, seconds: float | None) -> None:
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def started(self, request: Request) -> None:
        """A request was sent."""
        if request.resource_type not in _LOADING:
            return
        self._open.add(request)
        if request.is_navigation_request() and self._is_main(request):
            self.unanswered = request
        self._moved()

    def ended(self, request: Request) -> None:
        """A request has its answer, or never will."""
        self._open.discard(request)
        if request == self.unanswered:
            self.unanswered = None
        self._moved()

    def navigated(self, frame: Frame) -> None:
        """A frame shows another document, or another part of its own."""
        if frame == self._page.main_frame:
            self.unanswered = None
            self._moved()

    def window_opening(self, _: object) -> None:
        """The page asked for a window, which is heard of as a page only when its document begins to arrive."""
        self._windows += 1
        self._moved()

    def window_opened(self, _: object) -> None:
        """That window is there."""
        self._windows = max(0, self._windows - 1)
        self._moved()

    def _is_main(self, request: Request) -> bool:
        with suppress(PlaywrightError):  # a frame that is only being made is not the main one
            return request.frame == self._page.main_frame
        return False

    def _moved(self) -> None:
        self.restart()
        self.seen += 1
        self._changed.set()


@asynccontextmanager
async def traffic_of(page: Page) -> AsyncIterator[Traffic]:
    """The page's requests from now on."""
    traffic = Traffic(page)
    page.on("request", traffic.started)
    page.on("requestfinished", traffic.ended)
    page.on("requestfailed", traffic.ended)
    page.on("framenavigated", traffic.navigated)
    page.context.on("page", traffic.window_opened)
    try:
        yield traffic
    finally:
        page.remove_listener("request", traffic.started)
        page.remove_listener("requestfinished", traffic.ended)
        page.remove_listener("requestfailed", traffic.ended)
        page.remove_listener("framenavigated", traffic.navigated)
        page.context.remove_listener("page", traffic.window_opened)


async def settled(page: Page, traffic: Traffic) -> bool:
    """Whether the page came to rest within `LIMIT`: two quiet frames, and no document or data under way."""
    traffic.restart()
    with suppress(TimeoutError):
        async with asyncio.timeout(LIMIT):
            while not page.is_closed():
                before = traffic.seen
                try:
                    await page.evaluate(_QUIET_FRAMES)
                except PlaywrightError:
                    # The document was replaced, so there is another one to come to rest; or the page has crashed.
                    before = -1
                await traffic.quiet()
                # What has come in meanwhile is drawn only now.
                if traffic.seen == before:
                    return True
    return page.is_closed()
