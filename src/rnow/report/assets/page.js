/* What every page draws with: elements, tables, charts. Texts of others reach the document as text nodes and never as markup. */
const rnowPage = (function () {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  const SERIES = 8;

  // ---- small things -------------------------------------------------------------------------------------------------

  const byId = (id) => document.getElementById(id);

  /** An element with properties (class, attributes, on... listeners) and children: elements, or anything else as text. */
  function make(tag, properties, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name in element && name !== "role" && typeof value === "boolean") element[name] = value;
      else element.setAttribute(name, value === true ? "" : String(value));
    }
    append(element, children);
    return element;
  }

  function append(element, children) {
    for (const child of children.flat(Infinity)) {
      if (child === null || child === undefined) continue;
      element.append(child instanceof Node ? child : String(child));
    }
  }

  function fill(element, ...children) {
    element.replaceChildren();
    append(element, children);
    return element;
  }

  const known = (value) => typeof value === "number" && Number.isFinite(value);

  /** A number in a few characters, never 0.000 for a small one. */
  function short(value) {
    if (!known(value)) return "-";
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 1e6 || size < 1e-4) return value.toExponential(1);
    if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    if (size >= 100) return value.toFixed(0);
    if (size >= 10) return value.toFixed(1);
    return String(Number(value.toPrecision(3)));
  }

  /** A number of an axis whose numbers are so far apart. */
  function tick(value, apart) {
    if (Math.abs(value) >= 1e6) return short(value);
    let digits = 0;
    while (digits < 9 && Math.abs(apart * 10 ** digits - Math.round(apart * 10 ** digits)) > 1e-6) digits++;
    return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  }

  const percent = (value) => (known(value) ? `${short(100 * value)} %` : "-");
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  function show(id) {
    const section = byId(id);
    section.hidden = false;
    const title = section.querySelector("h2").textContent;
    byId("contents").append(make("li", null, make("a", { href: `#${id}` }, title)));
  }

  /** A table in a frame that scrolls sideways, by keyboard too. Cells: text, an element, or {number: text}. */
  function table(label, head, rows) {
    const cell = (tag, value, attributes) => {
      const number = value !== null && typeof value === "object" && !(value instanceof Node);
      return make(tag, { ...attributes, class: number ? "number" : null }, number ? value.number : value);
    };
    const body = rows.map((row) => make("tr", null, row.map((value, at) => cell(at ? "td" : "th", value, at ? {} : { scope: "row" }))));
    return make(
      "div",
      { class: "wide", tabindex: 0, role: "region", "aria-label": `Table: ${label}` },
      make("table", null, make("thead", null, make("tr", null, head.map((value) => cell("th", value, { scope: "col" })))), make("tbody", null, body)),
    );
  }

  /** A cell with a mean, and the ends of its interval where it has one. */
  function interval(cell, signed) {
    if (!cell) return { number: "" };
    const sign = signed && cell.mean > 0 ? "+" : "";
    const found = [sign + short(cell.mean)];
    if (known(cell.low)) found.push(" ", make("small", null, `[${short(cell.low)}, ${short(cell.high)}]`));
    return { number: found };
  }

  // ---- charts -------------------------------------------------------------------------------------------------------

  const plots = [];
  const colours = new Map();

  /** A colour of the page as it is now, for a canvas. */
  function colour(name) {
    if (!colours.has(name)) {
      const probe = make("span");
      probe.style.color = `var(${name})`;
      document.body.append(probe);
      colours.set(name, getComputedStyle(probe).color);
      probe.remove();
    }
    return colours.get(name);
  }

  // A chart is drawn when it comes near: most are far below, and a page should open at once.
  const near = new IntersectionObserver(
    (changes) => changes.filter((change) => change.isIntersecting).forEach((change) => plots.filter((entry) => entry.host === change.target && !entry.plot).forEach(draw)),
    { rootMargin: "300px" },
  );

  function ends(values) {
    const there = values.filter(known);
    return there.length ? { first: there[0], last: there[there.length - 1], low: Math.min(...there), high: Math.max(...there) } : null;
  }

  function figure(chart) {
    const along = chart.along || "step";
    const xs = chart.x || data.steps;
    const said = chart.series.map((series) => {
      const found = ends(series.values);
      return found ? `${series.label} from ${short(found.first)} to ${short(found.last)}` : series.label;
    });
    const host = make("div", { class: "plot", role: "img", "aria-label": `${chart.title}: ${said.join("; ")}` });
    const rows = chart.series.map((series) => {
      const found = ends(series.values);
      return [series.label, ...["first", "last", "low", "high"].map((name) => ({ number: found ? short(found[name]) : "-" }))];
    });
    const numbers = table(`${chart.title} in numbers`, ["curve", ...["first", "last", "lowest", "highest"].map((number) => ({ number }))], rows);
    const element = make(
      "figure",
      null,
      make("figcaption", null, make("h3", null, chart.title, chart.unit ? make("small", null, ` ${chart.unit}`) : null), chart.about ? make("p", null, chart.about) : null),
      host,
      make("details", null, make("summary", null, "In numbers"), numbers),
    );
    plots.push({ host, chart, xs, along, plot: null });
    near.observe(host);
    return element;
  }

  function range(low, high) {
    if (!known(low) || !known(high)) return [0, 1];
    const room = high > low ? 0.08 * (high - low) : Math.abs(high) * 0.1 || 1;
    return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
  }

  function draw(entry) {
    if (entry.plot) entry.plot.destroy();
    entry.host.replaceChildren();
    const { chart, xs } = entry;
    const grid = { stroke: colour("--line"), width: 1 };
    const axis = { stroke: colour("--muted"), grid, ticks: grid, font: "12px system-ui, sans-serif" };
    const whole = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];
    const lines = chart.series.map((series, at) => ({
      label: series.label,
      stroke: colour(`--s${at % SERIES}`),
      ...(at < SERIES ? {} : { dash: [6, 4] }),
      width: 1.6,
      spanGaps: true,
      points: { show: xs.length < 30, size: 5 },
      value: (plot, value) => short(value),
    }));
    const options = {
      width: Math.max(200, entry.host.clientWidth),
      height: 200,
      scales: {
        x: { time: false, range: (plot, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: { range: (plot, low, high) => range(low, high) },
      },
      axes: [
        { ...axis, incrs: whole, size: 34 },
        { ...axis, size: 58, values: (plot, values, axis, space, apart) => values.map((value) => tick(value, apart)) },
      ],
      series: [{ label: entry.along, value: (plot, value) => (known(value) ? value.toLocaleString("en") : "-") }, ...lines],
      cursor: { y: false, drag: { x: false, y: false }, ...(chart.x ? {} : { sync: { key: "steps" } }) },
      legend: { live: true },
    };
    entry.plot = new uPlot(options, [xs, ...chart.series.map((series) => series.values)], entry.host);
    entry.width = entry.host.clientWidth;
  }

  function drawAgain() {
    colours.clear();
    for (const entry of plots) if (entry.plot) draw(entry);
  }

  function fit() {
    for (const entry of plots) {
      if (!entry.plot || Math.abs(entry.host.clientWidth - entry.width) <= 1) continue;
      entry.width = entry.host.clientWidth;
      entry.plot.setSize({ width: Math.max(200, entry.width), height: 200 });
    }
  }

  /** Remove the charts of an area: what draws itself again would draw them too. */
  function forget(area) {
    for (const entry of plots.filter((one) => area.contains(one.host))) {
      plots.splice(plots.indexOf(entry), 1);
      near.unobserve(entry.host);
      entry.plot?.destroy();
    }
  }

  // ---- the page -----------------------------------------------------------------------------------------------------

  function written(more) {
    byId("made").textContent = `Written by rnow, ${data.made.replace("T", " ").replace("+00:00", " UTC")}. ${more}`;
  }

  /** The switch of light and dark; charts that follow it, the width and the printer. */
  function theme() {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    byId("theme").addEventListener("click", () => {
      const now = document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
      document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
      drawAgain();
    });
    dark.addEventListener("change", drawAgain);
    addEventListener("beforeprint", () => plots.filter((entry) => !entry.plot).forEach(draw));
    new ResizeObserver(fit).observe(document.body);
  }

  return { data, byId, figure, fill, forget, interval, known, make, percent, plural, short, show, table, theme, written };
})();
