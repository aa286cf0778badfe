"""``report.html``: one page that shows a run, made from its folder alone."""
