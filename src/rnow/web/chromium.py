"""Finding a Chromium and saying how it is to be started: through the proxy, with nothing that could go around it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from rnow.errors import InputError
from rnow.text.install import install_command

_NAMES = (
    "chromium",
    "google-chrome-stable",
    "google-chrome",
    "chromium-browser",
    "chrome",
)
_USUAL_FOLDERS = ("/usr/bin", "/usr/local/bin", "/snap/bin")
_NOWHERE = "http://127.0.0.1:9/"
_INSTALL = "run crawl4ai-setup, or install the system's own (Debian: apt-get install chromium)"


def require_packages() -> None:
    """Raises InputError when crawl4ai, or the playwright that comes with it, is not installed. Imports neither."""
    missing = [name for name in ("crawl4ai", "playwright") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(
            f"browsing needs the package {missing[0]}",
            title="Missing package",
            fix=f"{install_command('agents')}; then crawl4ai-setup fetches a browser",
        )


def find_chromium(executable: str | None = None) -> str:
    """Path of the browser: ``executable`` if given, else the newest that playwright has installed, else the system's.

    Raises InputError: there is none; the message says how to get one.
    """
    if executable:
        found = shutil.which(executable)
        if found is None:
            raise InputError(f"{executable} is no browser that can be run", fix=_INSTALL)
        return found
    for path in _from_playwright():
        if os.access(path, os.X_OK):
            return str(path)
    folders = os.pathsep.join([os.environ.get("PATH", ""), *_USUAL_FOLDERS])
    for name in _NAMES:
        if found := shutil.which(name, path=folders):
            return found
    raise InputError("browsing needs Chromium, and none is installed", fix=_INSTALL)


def _from_playwright() -> list[Path]:
    chosen = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    cache = (
        Path(chosen) if chosen and chosen != "0" else Path("~/.cache/ms-playwright").expanduser()
    )

    def revision(path: Path) -> int:
        digits = path.parents[1].name.rpartition("-")[2]
        return int(digits) if digits.isdigit() else 0

    return sorted(cache.glob("chromium-*/chrome-linux*/chrome"), key=revision, reverse=True)


def chromium_arguments(proxy: str) -> list[str]:
    """Command line for a browser whose only way out is the proxy at ``proxy`` (a URL on loopback)."""
    return [
        f"--proxy-server={proxy}",
        # Without this, loopback addresses and names would be dialled directly.
        "--proxy-bypass-list=<-loopback>",
        # Chromium itself can resolve nothing: whatever forgets the proxy fails.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--disable-quic",
        "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
        "--webrtc-ip-handling-policy=disable_non_proxied_udp",
        "--dns-prefetch-disable",
        "--no-pings",
        "--disable-background-networking",
        "--disable-component-update",
        # What Chromium asks its makers for all the same goes to an address that the proxy refuses.
        f"--gaia-url={_NOWHERE}",
        f"--component-updater=url-source={_NOWHERE}",
        f"--variations-server-url={_NOWHERE}",
        "--disable-domain-reliability",
        "--disable-sync",
        "--disable-extensions",
        "--disable-notifications",
        "--disable-remote-fonts",
        "--blink-settings=imagesEnabled=false",
        "--disable-crash-reporter",
        "--mute-audio",
    ]
