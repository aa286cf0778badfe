"""One Chromium for a process, and text out of its pages.

The browser, its driver and the proxy live on an event loop of their own, in a thread of their own: callers may use any
loop, one after the other, and a caller that blocks its loop blocks no page. Chromium is started at the first visit and
talks to its driver over a pipe: there is no debugging port that other programs could use, and when this process ends,
however it ends, the pipe closes and Chromium with it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import logging
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar
from urllib.parse import urlsplit

from rnow.web.addresses import Guard, Refused, Resolver, parse_allowed, parse_url, resolve
from rnow.web.chromium import chromium_arguments, find_chromium, require_packages
from rnow.web.converter import ConversionError, Converter
from rnow.web.page_text import render_page
from rnow.web.proxy import PinningProxy

if TYPE_CHECKING:
    from playwright.async_api import (  # pyright: ignore[reportMissingImports]
        Browser as ChromiumBrowser,
    )
    from playwright.async_api import (  # pyright: ignore[reportMissingImports]
        BrowserContext,
        Frame,
        Page,
        Playwright,
        Request,
        Response,
    )

T = TypeVar("T")

_log = logging.getLogger(__name__)

MAX_HTML = 400_000
"""Characters of cleaned HTML that are turned into text."""

_HOME = "rnow-browser-"
_CONTEXT_SECONDS = 10.0  # a Chromium that needs longer for a new context has stopped answering
_LAUNCH_SECONDS = 30.0
_CLOSE_SECONDS = 5.0
_CONVERT_SECONDS = 10.0
_READ_SECONDS = 10.0
_ANSWER_SECONDS = 0.5  # kept back to tell what went wrong
_QUIET_SECONDS = 1.5  # patience with pages that keep loading after they have loaded
_LOAD_SHARE = 0.6  # of a visit's time; the rest is for reading the page

# Runs in a world of its own: what the page has done to its own JavaScript does not reach it. Leaves out what is no text,
# and the attributes but for addresses and the shape of tables; prefers the main part of a page that marks one.
_READ_PAGE = """
((limit) => {
  const junk = 'script,style,noscript,template,svg,math,canvas,iframe,frame,object,embed,link,meta,audio,video';
  const kept = new Set(['href', 'colspan', 'rowspan', 'start']);
  const clean = (root) => {
    const copy = root.cloneNode(true);
    copy.querySelectorAll(junk).forEach((node) => node.remove());
    copy.querySelectorAll('*').forEach((node) => {
      for (const {name, value} of [...node.attributes])
        if (!kept.has(name) || (name === 'href' && /^\\s*(javascript|data|blob):/i.test(value)))
          node.removeAttribute(name);
    });
    return copy;
  };
  const answer = {url: location.href.slice(0, 4096), base: document.baseURI.slice(0, 4096),
                  title: document.title.slice(0, 1000), html: '', cut: false};
  if (!document.body) return answer;
  const main = document.querySelector('main, [role=main]');
  let copy = main && clean(main);
  if (!copy || copy.textContent.trim().length < 500) copy = clean(document.body);
  const html = copy.outerHTML.replace(/[ \\t\\n]{64,}/g, ' ');
  return {...answer, html: html.slice(0, limit), cut: html.length > limit};
})(%d)
"""

_NETWORK_ERRORS = {
    "ERR_TUNNEL_CONNECTION_FAILED": "it cannot be reached",
    "ERR_EMPTY_RESPONSE": "it sent nothing",
    "ERR_CONNECTION_RESET": "it broke off, or is too big",
    "ERR_TOO_MANY_REDIRECTS": "it redirects in circles",
    "ERR_UNSAFE_REDIRECT": "it redirects to an address that is not on the web",
    "ERR_ABORTED": "it is a file to download, or no page",
    "ERR_INVALID_RESPONSE": "it sent no valid answer",
}


class BrowseError(Exception):
    """A page could not be read; the message is short and meant for the model."""


class _Gone(Exception):
    """Chromium died or stopped answering."""


class _Found(TypedDict):
    """What ``_READ_PAGE`` answers."""

    url: str
    base: str
    title: str
    html: str
    cut: bool


@dataclass(frozen=True, slots=True)
class _Visit:
    found: _Found
    status: int | None
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Chromium:
    driver: Playwright
    browser: ChromiumBrowser
    pid: int


class Browser:
    """Reads web pages. One per process is enough; any number of visits may run at once.

    Args:
        allow: ``host:port`` entries, separated by commas, that may be visited although they are not on the public web.
        executable: path or name of a Chromium; None looks for one.
        max_pages: visits at one time; others wait their turn.
        resolver: how names become addresses (tests).

    Raises:
        InputError: crawl4ai or a Chromium is missing.
        ValueError: ``allow`` is not a list of ``host:port``.
    """

    def __init__(
        self,
        *,
        allow: str = "",
        executable: str | None = None,
        max_pages: int = 8,
        resolver: Resolver = resolve,
    ) -> None:
        require_packages()
        self._executable = find_chromium(executable)
        self._guard = Guard(parse_allowed(allow), resolver=resolver)
        self._max_pages = max_pages
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    async def fetch_text(self, url: str, *, timeout: float = 45.0, max_chars: int = 12_000) -> str:
        """The text of the page at ``url`` as markdown, links included, after its scripts have run.

        Args:
            timeout: seconds for everything, waiting for a free page included.
            max_chars: of text; a longer page is cut, and says so.

        Raises:
            BrowseError: the address is refused, or the page could not be read in time.
        """
        try:
            address = parse_url(url)
            self._guard.check_port(address.host, address.port)
        except Refused as error:
            raise BrowseError(f"this address is not visited: {error}") from None
        worker = self._running()
        return await asyncio.wrap_future(
            worker.submit(worker.visits.fetch(address.url, timeout, max_chars))
        )

    def close(self) -> None:
        """End Chromium, its driver and the proxy, and remove the profile. The next visit would start them again."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def _running(self) -> _Worker:
        with self._lock:
            if self._worker is None or not self._worker.alive:
                self._worker = _Worker(_Visits(self._executable, self._guard, self._max_pages))
            return self._worker


class _Worker:
    """A thread with an event loop, and the visits that live on it."""

    def __init__(self, visits: _Visits) -> None:
        self.visits = visits
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rnow-browser", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    @property
    def alive(self) -> bool:
        # After a fork the thread exists only in the parent.
        return self._thread.is_alive()

    def submit(self, work: Coroutine[object, object, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        atexit.unregister(self.stop)
        if not self.alive:
            return
        with contextlib.suppress(Exception):
            self.submit(self.visits.close()).result(timeout=4 * _CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_CLOSE_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


class _Visits:
    """Everything that runs on the browser's own loop."""

    def __init__(self, executable: str, guard: Guard, max_pages: int) -> None:
        self._executable = executable
        self._proxy = PinningProxy(guard)
        self._converter = Converter()
        self._slots = asyncio.Semaphore(max_pages)
        self._starting = asyncio.Lock()
        self._chromium: _Chromium | None = None
        self._background: set[asyncio.Task[object]] = set()
        self._home: str | None = None
        self._home_lock = -1
        self._closed = False

    async def fetch(self, url: str, timeout: float, max_chars: int) -> str:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                visit = await self._visit_twice(url, deadline)
                markdown = await self._converter.convert(
                    visit.found["html"],
                    visit.found["base"],
                    timeout=min(_CONVERT_SECONDS, deadline - loop.time() - _ANSWER_SECONDS),
                )
        except TimeoutError:
            raise BrowseError(f"no page within {timeout:g} seconds") from None
        except ConversionError as error:
            raise BrowseError(f"the page could not be read: {error}") from None
        return render_page(
            url=visit.found["url"],
            status=visit.status,
            title=visit.found["title"],
            markdown=markdown,
            max_chars=max_chars,
            notes=visit.notes,
        )

    async def close(self) -> None:
        self._closed = True
        async with self._starting:
            await self._stop_chromium()
        if self._background:
            await asyncio.wait(self._background, timeout=_CLOSE_SECONDS)
        await self._converter.close()
        await self._proxy.close()
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            os.close(self._home_lock)
            self._home = None

    async def _visit_twice(self, url: str, deadline: float) -> _Visit:
        """A visit, and a second one with a new Chromium when the first lost its own."""
        for last in (False, True):
            chromium = await self._ready()
            try:
                return await self._visit(chromium, url, deadline)
            except _Gone:
                await self._replace(chromium)
                if last:
                    break
        raise BrowseError("the browser broke down twice over this page")

    async def _visit(self, chromium: _Chromium, url: str, deadline: float) -> _Visit:
        await self._slots.acquire()
        context = None
        try:
            try:
                async with asyncio.timeout(_CONTEXT_SECONDS):
                    context = await chromium.browser.new_context(
                        accept_downloads=False, service_workers="block", locale="en-US"
                    )
                    page = await context.new_page()
            except TimeoutError:
                raise _Gone from None
            return await self._read(page, url, deadline)
        except Exception as error:
            if not _is_playwrights(error):
                raise
            if await _disconnected(chromium.browser):
                raise _Gone from None
            raise BrowseError("the page broke down") from None
        finally:
            # Not waited for: a page that does not want to go must not keep its visitor.
            self._keep(self._close_context(chromium, context))

    async def _close_context(self, chromium: _Chromium, context: BrowserContext | None) -> None:
        try:
            if context is not None and chromium.browser.is_connected():
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await context.close()
        except TimeoutError:
            await self._replace(chromium)
        except Exception as error:
            if not _is_playwrights(error):
                _log.exception("closing a page")
        finally:
            self._slots.release()

    async def _read(self, page: Page, url: str, deadline: float) -> _Visit:
        clock = asyncio.get_running_loop().time
        begun = clock()
        trail = _Trail(page, url)
        notes: list[str] = []
        status = None
        try:
            async with asyncio.timeout_at(begun + (deadline - begun) * _LOAD_SHARE):
                response = await page.goto(url, wait_until="commit", timeout=0)
                status = response.status if response is not None else None
                await page.wait_for_load_state("load", timeout=0)
        except TimeoutError:
            if not trail.committed:
                raise BrowseError("it did not answer in time") from None
            notes.append("the page had not finished loading")
        except Exception as error:
            if not _is_playwrights(error) or page.is_closed():
                raise
            raise BrowseError(self._why(trail, str(error))) from None
        else:
            with contextlib.suppress(Exception):
                await page.wait_for_load_state("networkidle", timeout=_QUIET_SECONDS * 1000)
        found = await self._contents(page, deadline)
        if urlsplit(found["url"]).scheme not in ("http", "https"):
            raise BrowseError(self._why(trail, ""))
        if reason := self._refusal(found["url"]):
            raise BrowseError(f"the page could not be reached: {reason}")
        if found["cut"]:
            notes.append("the page is very long; only its beginning was read")
        return _Visit(found, trail.status or status, tuple(notes))

    async def _contents(self, page: Page, deadline: float) -> _Found:
        """What ``_READ_PAGE`` says. A page that moves on while it is read is read again."""
        clock = asyncio.get_running_loop().time
        end = min(deadline - _ANSWER_SECONDS, clock() + _READ_SECONDS)
        try:
            async with asyncio.timeout_at(end):
                session = await page.context.new_cdp_session(page)
                while True:
                    try:
                        tree = await session.send("Page.getFrameTree")
                        world = await session.send(
                            "Page.createIsolatedWorld",
                            {"frameId": tree["frameTree"]["frame"]["id"]},
                        )
                        answer = await session.send(
                            "Runtime.evaluate",
                            {
                                "expression": _READ_PAGE % MAX_HTML,
                                "contextId": world["executionContextId"],
                                "returnByValue": True,
                            },
                        )
                        return answer["result"]["value"]
                    except Exception as error:
                        if not (_is_playwrights(error) or isinstance(error, KeyError)):
                            raise
                        if not page.context.browser.is_connected() or page.is_closed():
                            raise
                        await asyncio.sleep(0.2)
        except TimeoutError:
            raise BrowseError("the page keeps the browser too busy to be read") from None

    def _refusal(self, url: str) -> str | None:
        try:
            address = parse_url(url)
        except Refused as error:
            return str(error)
        return self._proxy.failure(address.host, address.port)

    def _why(self, trail: _Trail, message: str) -> str:
        if trail.download or "Download is starting" in message:
            return "it is a file to download, not a page"
        if reason := self._refusal(trail.last):
            moved = "" if trail.last == trail.first else f" (it leads to {trail.last[:200]})"
            return f"the page could not be reached: {reason}{moved}"
        for code, reason in _NETWORK_ERRORS.items():
            if code in message:
                return f"the page could not be reached: {reason}"
        code = next((word for word in message.split() if word.startswith("net::ERR_")), "")
        shown = code.removeprefix("net::ERR_").replace("_", " ").lower()
        return "the page could not be reached" + (f": {shown}" if shown else "")

    async def _ready(self) -> _Chromium:
        # A visitor who gives up does not stop what the others wait for.
        return await asyncio.shield(self._keep(self._begin()))

    async def _begin(self) -> _Chromium:
        async with self._starting:
            if self._closed:
                raise BrowseError("the browser has been closed")
            if self._chromium is not None and self._chromium.browser.is_connected():
                return self._chromium
            await self._stop_chromium()
            if self._home is None:
                await self._proxy.start()
                _remove_orphans()
                self._home = tempfile.mkdtemp(prefix=_HOME)
                self._home_lock = _lock(self._home)
            self._keep(self._converter.start())
            self._chromium = await self._start_chromium(self._home)
            return self._chromium

    def _keep(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Run in the background; whoever awaits it gets its error, and nobody else hears of it."""
        task = asyncio.ensure_future(work)
        self._background.add(task)

        def done(_: asyncio.Task[T]) -> None:
            self._background.discard(task)
            if not task.cancelled():
                task.exception()

        task.add_done_callback(done)
        return task

    async def _replace(self, broken: _Chromium) -> None:
        """End ``broken``, if nobody has done so yet; the next visit starts another."""
        async with self._starting:
            if self._chromium is broken:
                await self._stop_chromium()

    async def _start_chromium(self, home: str) -> _Chromium:
        from playwright.async_api import async_playwright  # pyright: ignore[reportMissingImports]

        driver = None
        try:
            async with asyncio.timeout(_LAUNCH_SECONDS):
                with _room():
                    driver = await async_playwright().start()
                browser = await self._launch(driver, home)
                session = await browser.new_browser_cdp_session()
                found = await session.send("SystemInfo.getProcessInfo")
                await session.detach()
        except Exception as error:
            if driver is not None:
                self._keep(driver.stop())
            if isinstance(error, TimeoutError):
                raise BrowseError("the browser does not start") from None
            if not _is_playwrights(error):
                raise
            first = str(error).strip().partition("\n")[0][:300]
            raise BrowseError(f"the browser does not start: {first}") from None
        pid = next(entry["id"] for entry in found["processInfo"] if entry["type"] == "browser")
        return _Chromium(driver=driver, browser=browser, pid=pid)

    async def _launch(self, driver: Playwright, home: str) -> ChromiumBrowser:
        """Chromium with its own sandbox where it can have one: not as root, and not where the kernel or a container
        forbids user namespaces."""
        options = {
            "executable_path": self._executable,
            "headless": True,
            "args": chromium_arguments(self._proxy.url),
            # Pages run in there: it needs no secret of ours.
            "env": {
                "HOME": home,
                "TMPDIR": home,
                "PATH": os.environ.get("PATH", os.defpath),
                "LANG": "C.UTF-8",
            },
        }
        if os.geteuid() != 0:
            try:
                return await driver.chromium.launch(chromium_sandbox=True, **options)
            except Exception as error:
                if not _is_playwrights(error):
                    raise
                _log.warning("Chromium does not start with its sandbox; it runs without")
        return await driver.chromium.launch(chromium_sandbox=False, **options)

    async def _stop_chromium(self) -> None:
        chromium, self._chromium = self._chromium, None
        if chromium is None:
            return
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await chromium.browser.close()
        # Chromium leads a process group of its own; what is left of it now did not want to go.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(chromium.pid) == chromium.pid:
                os.killpg(chromium.pid, signal.SIGKILL)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await chromium.driver.stop()


class _Trail:
    """Where the main frame of a page went."""

    def __init__(self, page: Page, url: str) -> None:
        self.first = url
        self.last = url
        self.status: int | None = None
        self.committed = False
        self.download = False
        self._page = page
        page.on("request", self._request)
        page.on("response", self._response)
        page.on("framenavigated", self._navigated)
        page.on("download", self._downloads)
        page.on("popup", self._popup)

    def _mine(self, request: Request) -> bool:
        return request.is_navigation_request() and request.frame == self._page.main_frame

    def _request(self, request: Request) -> None:
        if self._mine(request):
            self.last = request.url

    def _response(self, response: Response) -> None:
        if self._mine(response.request):
            self.status = response.status

    def _navigated(self, frame: Frame) -> None:
        if frame == self._page.main_frame:
            self.committed = True

    def _downloads(self, _: object) -> None:
        self.download = True

    async def _popup(self, popup: Page) -> None:
        with contextlib.suppress(Exception):
            await popup.close()


def _lock(folder: str | Path) -> int:
    """A descriptor that marks the folder as in use until it is closed, or this process ends. Raises OSError when another
    process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_orphans() -> None:
    """Remove the folders of processes that were killed before they could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_HOME}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            # A minute's grace: a new folder is locked a moment after it is made.
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > 60:
                descriptor = _lock(folder)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)


async def _disconnected(browser: ChromiumBrowser) -> bool:
    """Whether Chromium is gone. A moment's patience: its pages are reported closed before it is."""
    for _ in range(10):
        if not browser.is_connected():
            return True
        await asyncio.sleep(0.1)
    return False


def _is_playwrights(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "playwright"


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """Lift this process's soft limits to the hard ones while children are started: Chromium reserves far more address
    space than it uses, and opens many files."""
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_NOFILE)
    before = [resource.getrlimit(kind) for kind in kinds]
    try:
        for kind, (_, hard) in zip(kinds, before, strict=True):
            resource.setrlimit(kind, (hard, hard))
        yield
    finally:
        for kind, limits in zip(kinds, before, strict=True):
            resource.setrlimit(kind, limits)
