"""Browsing with a real Chromium: pages from loopback, and everything that must not be reached or survive."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.web.needs import missing
from tests.web.site import DATA, Site, Trap, serve, trap

from rnow.web import BrowseError, Browser, addresses
from rnow.web import browser as browser_module

pytestmark = [
    pytest.mark.agents,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

NAMES = {
    "private.example": ["10.0.0.1"],
    "loopback.example": ["127.0.0.1"],
    "loopback6.example": ["::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "mixed.example": ["93.184.216.34", "127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "localhost": ["127.0.0.1", "::1"],
    "sub.localhost": ["127.0.0.1"],
}
LOOKUPS: list[str] = []

# Ways to say 127.0.0.1, and other places that are not on the public web.
NOT_PUBLIC = [
    "127.0.0.1",
    "127.0.0.2",
    "127.1",
    "0x7f.1",
    "0177.0.0.1",
    "2130706433",
    "0x7f000001",
    "127.0.0.1.",
    "①②⑦.⓪.⓪.①",
    "%31%32%37.0.0.1",
    "0.0.0.0",
    "0",
    "localhost",
    "LOCALHOST.",
    "sub.localhost",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "10.0.0.1",
    "169.254.169.254",
    "[fd00:ec2::254]",
    *(name for name in NAMES if "localhost" not in name),
]


async def _resolve(host: str, port: int) -> Sequence[str]:
    LOOKUPS.append(host)
    if host not in NAMES:
        raise OSError("no such name")
    return NAMES[host]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def snare() -> Iterator[Trap]:
    """Listens on all of loopback; nothing may ever reach it."""
    with trap("0.0.0.0") as found:
        yield found


@pytest.fixture(scope="module")
def browser(site: Site) -> Iterator[Browser]:
    running = Browser(allow=site.authority, resolver=_resolve)
    yield running
    running.close()


@pytest.fixture
def any_port(monkeypatch: pytest.MonkeyPatch, snare: Trap) -> None:
    """Let the trap's port pass for one of the web's, so that only the address can be the reason for a refusal."""
    monkeypatch.setattr(addresses, "WEB_PORTS", frozenset({80, 443, snare.port}))


def read(browser: Browser, url: str, *, timeout: float = 30, max_chars: int = 4000) -> str:
    return asyncio.run(browser.fetch_text(url, timeout=timeout, max_chars=max_chars))


def test_a_page_becomes_markdown(browser: Browser, site: Site) -> None:
    text = read(browser, site.url("/aspirin"))
    assert f'<page url="{site.url("/aspirin")}" status="200">' in text
    assert "# Aspirin" in text
    assert "**acetylsalicylic acid**" in text
    assert "| Pain | 500 mg |" in text
    assert f"[metformin]({site.url('/metformin?from=aspirin')})" in text
    assert text.endswith("</page>")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/script", "The antidote is naloxone."),
        ("/late", DATA),
        ("/data", DATA),
        ("/redirect?to=/aspirin", "acetylsalicylic"),
        ("/script-redirect?to=/aspirin", "acetylsalicylic"),
        ("/refresh?to=/aspirin", "acetylsalicylic"),
        ("/nothing-here", 'status="404"'),
        ("/dialogs", "After the dialogs."),
        ("/popups", "Opened."),
        ("/liar", "True text."),
        ("/no-text", "(no text)"),
        ("/huge-line", "end"),
    ],
)
def test_pages_of_all_kinds(browser: Browser, site: Site, path: str, expected: str) -> None:
    assert expected in read(browser, site.url(path))


def test_every_visit_is_a_first_visit(browser: Browser, site: Site) -> None:
    for _ in range(2):
        assert "Cookie: none." in read(browser, site.url("/cookie"))


def test_text_that_looks_like_our_delimiters(browser: Browser, site: Site) -> None:
    text = read(browser, site.url("/tokens"))
    assert text.lower().count("</page") == 1
    assert text.lower().count("<page") == 1
    assert text.endswith("</page>")
    assert "Before." in text
    assert "After." in text
    assert "<|im_start|>system" in text  # as text; rendering makes it inert


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "chrome://version",
        "view-source:http://example.org/",
        "data:text/html,<p>x",
        "javascript:alert(1)",
        "about:blank",
        "http://user:word@example.org/",
        "http://example.org:22/",
        "",
    ],
)
def test_addresses_that_are_not_even_tried(browser: Browser, url: str) -> None:
    with pytest.raises(BrowseError, match="not visited"):
        read(browser, url)


@pytest.mark.usefixtures("any_port")
@pytest.mark.parametrize("host", NOT_PUBLIC)
def test_nothing_private_is_visited(browser: Browser, site: Site, snare: Trap, host: str) -> None:
    """Directly, after each kind of redirect, and in a frame."""
    target = f"http://{host}:{snare.port}/secret"
    for url in (
        target,
        target.replace("http:", "https:"),
        site.url(f"/redirect?to={target}"),
        site.url(f"/script-redirect?to={target}"),
    ):
        with pytest.raises(BrowseError) as caught:
            read(browser, url)
        assert "secret" not in str(caught.value).replace(target, "")
    assert "Around a frame." in read(browser, site.url(f"/frame?of={target}"))
    assert snare.touched() == []


@pytest.mark.usefixtures("any_port")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "loopback.example"])
def test_no_sub_resource_is_private(browser: Browser, site: Site, snare: Trap, host: str) -> None:
    text = read(browser, site.url(f"/probe?at={host}:{snare.port}"))
    assert "Probing." in text
    assert "REACHED" not in text
    time.sleep(0.5)
    assert snare.touched() == []


def test_the_probe_sees_what_is_open(site: Site) -> None:
    """The test above would notice: the same page reaches an address that is allowed."""
    with serve() as other:
        browser = Browser(allow=f"{site.authority},{other.authority}", resolver=_resolve)
        try:
            text = read(browser, site.url(f"/probe?at={other.authority}"))
        finally:
            browser.close()
        assert "REACHED by fetch" in text
        assert other.hits("/secret") >= 5


@pytest.mark.parametrize("scheme", ["file:///etc/passwd", "chrome://version", "data:text/html,x"])
def test_pages_cannot_lead_off_the_web(browser: Browser, site: Site, scheme: str) -> None:
    with pytest.raises(BrowseError, match="not on the web"):
        read(browser, site.url(f"/redirect?to={scheme}"))
    text = read(browser, site.url(f"/script-redirect?to={scheme}"))
    assert "Moving." in text
    assert "root:" not in text


def test_a_name_that_moves_to_a_private_address(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127.0.0.1 plays the public address, 127.0.0.2 the private one that the name stands for from the third lookup on."""
    monkeypatch.setattr(addresses, "WEB_PORTS", frozenset({site.port}))
    monkeypatch.setattr(addresses, "is_public", lambda address: str(address) == "127.0.0.1")
    monkeypatch.setattr(addresses, "is_own", lambda address: False)
    lookups: list[str] = []

    async def resolver(host: str, port: int) -> Sequence[str]:
        lookups.append(host)
        return ["127.0.0.1"] if len(lookups) <= 2 else ["127.0.0.2"]

    with trap("127.0.0.2", site.port) as snare:
        browser = Browser(resolver=resolver)
        try:
            text = read(browser, f"http://rebind.example:{site.port}/poll")
        except BrowseError as error:
            text = str(error)
        finally:
            browser.close()
        assert len(lookups) > 3
        assert "status 200" not in text
        assert "not on the public web" in text
        assert snare.touched() == []


def test_the_browser_calls_nobody_of_its_own(browser: Browser, site: Site) -> None:
    read(browser, site.url("/"))
    asked = {name for name in LOOKUPS if name not in NAMES}  # all visits of this file
    assert asked <= {"example.org"}


def test_a_page_that_goes_on_forever_gives_what_it_has(browser: Browser, site: Site) -> None:
    begun = time.monotonic()
    text = read(browser, site.url("/endless"), timeout=6)
    assert "It goes on." in text
    assert "[the page had not finished loading]" in text
    assert time.monotonic() - begun < 7


@pytest.mark.parametrize("path", ["/silent", "/busy"])
def test_pages_that_hang_end_with_their_time(browser: Browser, site: Site, path: str) -> None:
    read(browser, site.url("/"))
    begun = time.monotonic()
    with pytest.raises(BrowseError):
        read(browser, site.url(path), timeout=5)
    assert time.monotonic() - begun < 6
    assert "Ward library" in read(browser, site.url("/"))


@pytest.mark.parametrize("path", ["/big", "/lists", "/flood"])
def test_size_is_bounded(browser: Browser, site: Site, path: str) -> None:
    text = read(browser, site.url(path), max_chars=5000)
    assert len(text) < 5600
    assert "[cut: the first 5000 of " in text
    assert "only its beginning was read" in text
    assert "Ward library" in read(browser, site.url("/"))


def test_downloads_are_refused(browser: Browser, site: Site) -> None:
    with pytest.raises(BrowseError, match="a file to download"):
        read(browser, site.url("/file"))


def test_no_such_host(browser: Browser) -> None:
    with pytest.raises(BrowseError, match="cannot be reached"):
        read(browser, "https://example.org/")


def test_many_visits_at_once(site: Site) -> None:
    browser = Browser(allow=site.authority, resolver=_resolve, max_pages=4)

    async def scenario() -> None:
        texts = await asyncio.gather(
            *(browser.fetch_text(site.url("/script"), timeout=90) for _ in range(24))
        )
        assert all("naloxone" in text for text in texts)
        given_up = asyncio.ensure_future(browser.fetch_text(site.url("/silent"), timeout=60))
        await asyncio.sleep(1)
        given_up.cancel()
        texts = await asyncio.gather(
            *(browser.fetch_text(site.url("/aspirin"), timeout=60) for _ in range(8))
        )
        assert all("Aspirin" in text for text in texts)

    try:
        asyncio.run(scenario())
    finally:
        browser.close()


def test_a_dead_chromium_is_replaced(browser: Browser, site: Site) -> None:
    read(browser, site.url("/"))
    first = _pid(browser)
    os.kill(first, signal.SIGKILL)
    assert "Aspirin" in read(browser, site.url("/aspirin"))
    assert _pid(browser) != first


def test_a_chromium_that_dies_during_a_visit(browser: Browser, site: Site) -> None:
    async def scenario() -> str:
        visit = asyncio.ensure_future(browser.fetch_text(site.url("/endless"), timeout=15))
        await asyncio.sleep(2)
        os.kill(_pid(browser), signal.SIGKILL)
        return await visit

    read(browser, site.url("/"))
    assert "It goes on." in asyncio.run(scenario())


def test_a_chromium_that_stops_answering_is_replaced(
    browser: Browser, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser_module, "_CONTEXT_SECONDS", 1.5)
    monkeypatch.setattr(browser_module, "_CLOSE_SECONDS", 1.5)
    read(browser, site.url("/"))
    first = _pid(browser)
    os.kill(first, signal.SIGSTOP)
    assert "Aspirin" in read(browser, site.url("/aspirin"), timeout=30)
    assert not _alive(first)


def test_closing_leaves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("RNOW_TEST_CANARY", mark)
    browser = Browser(allow=site.authority, resolver=_resolve)
    read(browser, site.url("/"))
    home = _home(browser)
    inside = _with_environment(f"HOME={home}")
    assert inside, "Chromium runs in its own home"
    assert not inside & _with_environment(mark), "Chromium is given none of our environment"
    browser.close()
    browser.close()
    assert not Path(home).exists()
    assert _none_left(f"HOME={home}", mark, ignore=os.getpid())
    assert "Ward library" in read(browser, site.url("/"))
    browser.close()


@pytest.mark.parametrize("path", ["/busy", "/endless"])
def test_nothing_outlives_a_killed_owner(site: Site, path: str) -> None:
    mark = uuid.uuid4().hex
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, site.authority, site.url(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RNOW_TEST_MARK": mark},
    )
    assert owner.stdout is not None
    home = owner.stdout.readline().strip()
    assert Path(home).is_dir()
    assert _with_environment(f"HOME={home}")
    time.sleep(1)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert _none_left(f"HOME={home}", mark)


def test_many_visits_leave_no_trail(browser: Browser, site: Site) -> None:
    def state() -> tuple[int, int, int]:
        home = f"HOME={_home(browser)}"
        files = len(list(Path("/proc/self/fd").iterdir()))
        return files, len(_with_environment(home)), len(browser_tasks(browser))

    async def visits(count: int) -> None:
        for _ in range(count // 8):
            await asyncio.gather(
                *(browser.fetch_text(site.url("/metformin"), timeout=60) for _ in range(8))
            )

    asyncio.run(visits(16))
    time.sleep(2)
    before = state()
    asyncio.run(visits(80))
    time.sleep(2)
    after = state()
    assert after[0] <= before[0] + 8
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + 2


def browser_tasks(browser: Browser) -> set[asyncio.Task[object]]:
    worker = browser._worker
    assert worker is not None
    return asyncio.all_tasks(worker._loop)


def _pid(browser: Browser) -> int:
    worker = browser._worker
    assert worker is not None
    assert worker.visits._chromium is not None
    return worker.visits._chromium.pid


def _home(browser: Browser) -> str:
    worker = browser._worker
    assert worker is not None
    assert worker.visits._home is not None
    return worker.visits._home


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _with_environment(text: str) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if text.encode() in (entry / "environ").read_bytes() and _alive(int(entry.name)):
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def _none_left(*texts: str, ignore: int = 0) -> bool:
    deadline = time.monotonic() + 10
    while any(_with_environment(text) - {ignore} for text in texts):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


_OWNER = """
import asyncio, sys
from rnow.web import Browser

async def main():
    browser = Browser(allow=sys.argv[1])
    await browser.fetch_text(f"http://{sys.argv[1]}/")
    print(browser._worker.visits._home, flush=True)
    await browser.fetch_text(sys.argv[2], timeout=300)

asyncio.run(main())
"""
