"""The tool of this project: reading a web page in a real browser."""

import os

from rnow.core import tool
from rnow.web import Browser

# One Chromium for all attempts, started at the first visit. Pages see the public web only; RNOW_BROWSE_ALLOW in .env
# names what else may be visited (host:port, separated by commas), RNOW_BROWSER the Chromium to use.
browser = Browser(
    allow=os.environ.get("RNOW_BROWSE_ALLOW", ""),
    executable=os.environ.get("RNOW_BROWSER") or None,
)


@tool
async def browse(url: str) -> str:
    """Open a web page and read its text as markdown, links included.

    Args:
        url: address of the page, starting with https:// or http://
    """
    # About 3,000 tokens: eight such pages fit the conversation's window with room to think.
    return await browser.fetch_text(url, timeout=45, max_chars=12_000)
