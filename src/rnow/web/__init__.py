"""The web for tools: a browser whose every connection goes through a proxy that dials public addresses only.

from rnow.web import Browser
browser = Browser()
text = await browser.fetch_text("https://example.org/")
"""

from __future__ import annotations

from rnow.web.browser import BrowseError, Browser

__all__ = ["BrowseError", "Browser"]
