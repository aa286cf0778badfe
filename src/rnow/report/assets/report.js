/* The page of a run. Texts of models, tools and users reach the document as text nodes and never as markup. */
(function () {
  "use strict";

  const { data, byId, figure, fill, forget, interval, known, make, percent, plural, short, show, table, theme, written } = rnowPage;
  const PER_PAGE = 10;
  const LARGE = 1; // nats: what the keys for large ones stop at

  // ---- small things -------------------------------------------------------------------------------------------------

  const probability = (logprob) => (known(logprob) ? percent(Math.exp(Math.min(0, logprob))) : "-");

  /** What cannot be seen, made visible: line ends, tabs, letters without width. */
  function visible(text) {
    return text
      .replace(/\n/g, "\u21b5\n")
      .replace(/\t/g, "\u21e5\t")
      .replace(/[\u00ad\u200b-\u200d\u2060\ufeff]/g, (letter) => `<${letter.charCodeAt(0).toString(16)}>`);
  }

  /** The same on one line, in quotes. */
  const quoted = (text) => `"${visible(text).replace(/\n/g, "")}"`;

  // ---- curves -------------------------------------------------------------------------------------------------------

  function curves() {
    if (!data.charts.length) return;
    show("curves");
    byId("width").textContent = data.width > 1 ? `Each point is the mean of ${data.width} steps.` : "One point for each step.";
    byId("charts").append(...data.charts.map(figure));
    const names = Object.keys(data.more).sort();
    if (!names.length) return;
    byId("more").hidden = false;
    const select = byId("metric");
    select.append(...names.map((name) => make("option", { value: name }, name)));
    const one = () => {
      forget(byId("more-chart"));
      const chart = { title: select.value, unit: "", about: "", series: [{ label: select.value, values: data.more[select.value] }] };
      fill(byId("more-chart"), figure(chart));
    };
    select.addEventListener("change", one);
    one();
  }

  // ---- overview -----------------------------------------------------------------------------------------------------

  function overview() {
    byId("state").textContent = data.state;
    written("Logarithms are natural; KL is of the student from the teacher.");
    if (!data.tiles.length && !data.health.length) return;
    show("overview");
    byId("tiles").append(...data.tiles.map(([label, value, note]) => make("li", null, make("span", null, label), make("b", null, value), note ? make("span", null, note) : null)));
    byId("health").append(...data.health.map((item) => make("li", { class: item.verdict }, make("b", null, item.verdict === "well" ? "well" : "look at"), item.text)));
  }

  // ---- evaluation, plan, settings -----------------------------------------------------------------------------------

  function evaluation() {
    const found = data.evaluation;
    if (!found) return;
    show("evaluation");
    const differs = found.rows.some((row) => row.difference);
    const intervals = found.rows.some((row) => row.cells.some((cell) => cell && known(cell.low)));
    byId("how").textContent = [
      found.prompts ? `${plural(found.prompts, "held-out prompt")}.` : "",
      intervals ? `In brackets: ${found.how}.` : "",
      found.columns.some((column) => column.other) ? "Columns marked * were measured with other settings and cannot be compared." : "",
    ].filter(Boolean).join(" ");
    const head = ["metric", ...found.columns.map((column) => ({ number: `${column.name}${column.other ? "*" : ""} (step ${column.step})` }))];
    if (differs) head.push({ number: "after - before" });
    const rows = found.rows.map((row) => [row.metric, ...row.cells.map((cell) => interval(cell)), ...(differs ? [interval(row.difference, true)] : [])]);
    byId("evaluations").append(table("Evaluation", head, rows));
  }

  function plan() {
    if (!data.plan.length) return;
    show("plan");
    const planned = data.plan.some((row) => row[1]);
    const rows = data.plan.map(([what, expected, used]) => (planned ? [what, expected, used] : [what, used]));
    byId("used").append(table("Plan and use", planned ? ["what", "planned", "used"] : ["what", "used"], rows));
  }

  function settings() {
    if (!data.facts.length && !data.settings) return;
    show("settings");
    byId("facts").append(...data.facts.flatMap(([label, text]) => [make("dt", null, label), make("dd", null, text)]));
    if (!data.settings) return;
    byId("changed-title").textContent = data.settings.whole ? "All settings (of another version)" : "Settings that are not the defaults";
    const rows = data.settings.keys.map((item) => [make("code", { title: item.about }, item.key), item.value, item.default]);
    byId("changed").append(table("Settings", ["key", "value", "default"], rows));
  }

  // ---- tokens -------------------------------------------------------------------------------------------------------

  const THRESHOLDS = [0.05, 0.2, 0.5, 1, 2];

  /** The class that colours a token: p1..p5 where the teacher finds it less likely than the student, n1..n3 where more. */
  function shade(kl) {
    if (!known(kl)) return "unknown";
    const level = THRESHOLDS.filter((least) => Math.abs(kl) >= least).length;
    return kl >= 0 ? (level ? `p${level}` : "") : level ? `n${Math.min(3, level)}` : "";
  }

  const at = (list, index) => (list && known(list[index]) ? list[index] / 1000 : null);

  /** What is known of a token of a packed rollout. */
  function tokenOf(rollout, index) {
    const others = [];
    const pairs = (rollout.a && rollout.a[index]) || [];
    for (let place = 0; place < pairs.length; place += 2) {
      others.push({ text: data.texts[pairs[place]], logprob: known(pairs[place + 1]) ? pairs[place + 1] / 1000 : null });
    }
    return {
      text: data.texts[rollout.x[index]],
      student: at(rollout.l, index),
      teacher: at(rollout.q, index),
      kl: at(rollout.kl, index),
      entropy: at(rollout.h, index),
      others,
    };
  }

  const rolloutOf = new WeakMap();

  function describe(element) {
    const rollout = rolloutOf.get(element.closest(".tokens"));
    const index = Number(element.dataset.at);
    const token = tokenOf(rollout, index);
    const parts = [make("b", null, quoted(token.text)), ` token ${index + 1} of ${rollout.n}`];
    const second = [];
    if (known(token.kl)) second.push("KL ", make("b", null, short(token.kl)));
    if (known(token.student)) second.push(`${second.length ? ", " : ""}student ${short(token.student)} (${probability(token.student)})`);
    if (known(token.teacher)) second.push(`, teacher ${short(token.teacher)} (${probability(token.teacher)})`);
    if (known(token.entropy)) second.push(`, entropy ${short(token.entropy)}`);
    const lines = [make("p", null, parts), make("p", null, second)];
    if (token.others.length) {
      lines.push(make("p", null, "The teacher's likeliest: ", token.others.map((other) => `${quoted(other.text)} ${probability(other.logprob)}`).join(", ")));
    }
    fill(byId("token"), lines).hidden = false;
  }

  function hideToken() {
    byId("token").hidden = true;
  }

  /** Where a key leads from a token among those of its rollout; undefined for another key. */
  function neighbour(key, tokens, from) {
    const large = (token) => Math.abs(tokenOf(rolloutOf.get(token.closest(".tokens")), Number(token.dataset.at)).kl || 0) >= LARGE;
    if (key === "ArrowRight") return tokens[from + 1];
    if (key === "ArrowLeft") return tokens[from - 1];
    if (key === "Home") return tokens[0];
    if (key === "End") return tokens[tokens.length - 1];
    if (key === "ArrowDown") return tokens.slice(from + 1).find(large);
    if (key === "ArrowUp") return tokens.slice(0, from).reverse().find(large);
    return undefined;
  }

  function listen(area) {
    const token = (event) => event.target.closest(".t");
    area.addEventListener("mouseover", (event) => token(event) && describe(token(event)));
    area.addEventListener("focusin", (event) => token(event) && describe(token(event)));
    area.addEventListener("click", (event) => token(event) && describe(token(event)));
    area.addEventListener("mouseleave", hideToken);
    area.addEventListener("focusout", hideToken);
    area.addEventListener("keydown", (event) => {
      const here = token(event);
      if (!here) return;
      if (event.key === "Escape") return hideToken();
      const tokens = [...here.closest("article").querySelectorAll(".t")];
      const to = neighbour(event.key, tokens, tokens.indexOf(here));
      if (to === undefined && !["ArrowDown", "ArrowUp", "ArrowLeft", "ArrowRight"].includes(event.key)) return;
      event.preventDefault();
      if (!to) return;
      here.tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
    });
  }

  function tokenList(rollout, start, count, label) {
    const list = make("div", { class: "tokens", role: "listbox", "aria-label": label, "aria-orientation": "horizontal" });
    rolloutOf.set(list, rollout);
    for (let index = start; index < start + count; index++) {
      const element = make("span", { class: `t ${shade(at(rollout.kl, index))}`, role: "option", "aria-selected": "false", "data-at": index });
      element.tabIndex = index === start ? 0 : -1;
      element.textContent = visible(data.texts[rollout.x[index]]);
      list.append(element);
    }
    return list;
  }

  // ---- rollouts -----------------------------------------------------------------------------------------------------

  const ENDINGS = {
    answer: "ended by an answer",
    max_turns: "ended by rollout.max_turns",
    length: "cut by rollout.max_tokens",
    window: "cut by the context window",
    horizon: "ended by algorithm.kl_horizon",
  };

  function prompt(messages) {
    const last = messages.length ? messages[messages.length - 1][1] : "";
    const line = visible(last).replace(/\n/g, " ");
    return make(
      "details",
      { class: "prompt" },
      make("summary", null, `Prompt: ${line.length > 100 ? `${line.slice(0, 97)}...` : line}`),
      messages.map(([role, text]) => [make("p", { class: "who" }, role), make("p", { class: "said" }, text)]),
    );
  }

  function other([, who, text, failed]) {
    return make("div", { class: `tool${failed ? " failed" : ""}` }, make("p", { class: "who" }, failed ? `${who} (failed)` : who), make("p", { class: "said" }, text));
  }

  function article(rollout, withPrompt) {
    const facts = [rollout.st];
    if (ENDINGS[rollout.e]) facts.push(ENDINGS[rollout.e]);
    if (known(rollout.r)) facts.push(`reward ${short(rollout.r)}`);
    const rewards = Object.entries(rollout.rs || {});
    if (rewards.length > 1) facts.push(rewards.map(([name, value]) => `${name} ${short(value)}`).join(", "));
    if (known(rollout.k)) facts.push(`mean KL ${short(rollout.k)}`);
    if (known(rollout.w)) facts.push(`worst token ${short(rollout.w)}`);
    const turns = rollout.tn || [];
    facts.push(`${plural(rollout.n || 0, "token")} in ${plural(turns.length, "turn")}`);
    if (rollout.t && rollout.t !== "teacher") facts.push(`judged by ${rollout.t}`);
    const element = make(
      "article",
      { "aria-label": `step ${rollout.s}, ${rollout.i}` },
      make("h3", null, `Step ${rollout.s}: ${rollout.i}`),
      make("p", { class: "meta" }, facts.join(" \u00b7 ")),
      rollout.er ? make("p", { class: "failed" }, rollout.er) : null,
      Object.entries(rollout.re || {}).map(([name, said]) => make("p", { class: "failed" }, `reward ${name}: ${said}`)),
      withPrompt ? prompt(data.prompts[rollout.p] || []) : null,
    );
    const between = rollout.m || [];
    let start = 0;
    turns.forEach((count, turn) => {
      const kept = Math.max(0, Math.min(count, rollout.x.length - start));
      if (kept) {
        const name = turns.length > 1 ? `student, turn ${turn + 1}` : "student";
        element.append(make("p", { class: "who" }, name), tokenList(rollout, start, kept, `tokens of the ${name}`));
      }
      start += kept;
      element.append(...between.filter((said) => said[0] === turn).map(other));
    });
    const hidden = (rollout.n || 0) - (rollout.x || []).length;
    if (hidden > 0) element.append(make("p", { class: "meta" }, `${plural(hidden, "more token")} are in the transcript.`));
    return element;
  }

  const distinct = (name) => [...new Set(data.rollouts.map((rollout) => rollout[name]).filter((value) => value !== undefined))];

  /** The fields that this run's rollouts can be told apart by. */
  function fields() {
    const choice = (name, label, values, all) =>
      values.length > 1 ? { name, label, input: make("select", { id: `f-${name}` }, make("option", { value: "" }, all), values.map((value) => make("option", { value }, value))) } : null;
    const number = (name, label, there, step) => (there ? { name, label, input: make("input", { id: `f-${name}`, type: "number", step: step || "any" }) } : null);
    const rewarded = data.rollouts.some((rollout) => known(rollout.r));
    const judged = data.rollouts.some((rollout) => known(rollout.w));
    const sorts = [["step", "step"], ...(judged ? [["worst", "worst token"], ["mean", "largest mean KL"]] : []), ...(rewarded ? [["reward", "lowest reward"]] : []), ["length", "longest"]];
    return [
      choice("s", "Step", distinct("s"), "all"),
      choice("d", "Dataset", distinct("d").sort(), "all"),
      choice("t", "Teacher", distinct("t").sort(), "all"),
      choice("st", "Status", distinct("st").sort(), "all"),
      number("least", "Reward at least", rewarded),
      number("most", "Reward at most", rewarded),
      number("worst", "Worst KL at least", judged),
      { name: "text", label: "Has the text", input: make("input", { id: "f-text", type: "search" }) },
      { name: "sort", label: "Order", input: make("select", { id: "f-sort" }, sorts.map(([value, text]) => make("option", { value }, text))) },
    ].filter(Boolean);
  }

  const textOf = (rollout) => (rollout.x || []).map((place) => data.texts[place]).join("");

  function chosen(values) {
    const same = (rollout, name) => !values[name] || String(rollout[name]) === values[name];
    const number = (text) => (text && text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : null);
    const [least, most, worst] = [number(values.least), number(values.most), number(values.worst)];
    const found = data.rollouts.filter(
      (rollout) =>
        ["s", "d", "t", "st"].every((name) => same(rollout, name)) &&
        (least === null || (known(rollout.r) && rollout.r >= least)) &&
        (most === null || (known(rollout.r) && rollout.r <= most)) &&
        (worst === null || (known(rollout.w) && rollout.w >= worst)) &&
        (!values.text || textOf(rollout).includes(values.text)),
    );
    const largest = (name) => (one, two) => (known(two[name]) ? two[name] : -Infinity) - (known(one[name]) ? one[name] : -Infinity);
    const orders = {
      worst: largest("w"),
      mean: largest("k"),
      reward: (one, two) => (known(one.r) ? one.r : Infinity) - (known(two.r) ? two.r : Infinity),
      length: largest("n"),
    };
    const order = orders[values.sort];
    return order ? found.sort((one, two) => order(one, two) || 0) : found;
  }

  let look = () => {};

  function rollouts() {
    if (!data.rollouts.length) return;
    show("rollouts");
    byId("rule").textContent = `${data.rule}. All of them: rnow rollouts.`;
    const form = byId("filters");
    const inputs = fields();
    form.append(...inputs.map((field) => make("div", null, make("label", { for: field.input.id }, field.label), field.input)));
    form.addEventListener("submit", (event) => event.preventDefault());
    if (data.rollouts.some((rollout) => rollout.kl)) {
      const swatch = (name, text) => [make("span", { class: `swatch ${name}` }, text), " "];
      fill(
        byId("legend"),
        "KL of a token in nats: ",
        ["p1", "p2", "p3", "p4", "p5"].map((name, place) => swatch(name, `${THRESHOLDS[place]}`)),
        data.sampled ? "or more: the teacher finds it less likely than the student. " : "or more, over all tokens that could stand there. ",
        data.sampled ? [["n1", "n2", "n3"].map((name, place) => swatch(name, `-${THRESHOLDS[place]}`)), "the teacher finds it likelier. "] : null,
        "Point at a token, or walk with the arrow keys (down and up: to the next of 1 nat or more).",
      );
    }
    const list = byId("list");
    const more = byId("more-rollouts");
    listen(list);
    let found = [];
    const page = () => {
      const next = found.slice(list.children.length, list.children.length + PER_PAGE);
      list.append(...next.map((rollout) => article(rollout, true)));
      more.hidden = list.children.length >= found.length;
      more.textContent = `Show more (${(found.length - list.children.length).toLocaleString("en")} left)`;
    };
    const apply = () => {
      found = chosen(Object.fromEntries(inputs.map((field) => [field.name, field.input.value])));
      byId("found").textContent = plural(found.length, "rollout");
      list.replaceChildren();
      hideToken();
      page();
    };
    form.addEventListener("input", apply);
    more.addEventListener("click", page);
    const sort = byId("f-sort");
    if ([...sort.options].some((option) => option.value === "worst")) sort.value = "worst";
    apply();
    look = (text) => {
      byId("f-text").value = text;
      apply();
      byId("rollouts").scrollIntoView();
    };
  }

  function disagreement() {
    if (!data.tokens.length && !data.places.length) return;
    show("disagreement");
    const { steps, ofSteps, tokens } = data.lookedAt;
    byId("disagreement-note").textContent = `From ${plural(tokens, "token")} of all rollouts of ${steps === ofSteps ? plural(steps, "step") : `${steps} of ${ofSteps.toLocaleString("en")} steps, evenly spread`}. ${data.sampled ? "KL of a token: how much likelier the student finds it than the teacher." : "KL of a token: how far the teacher's choice of the next token is from the student's."}`;
    byId("places").append(...data.places.map(figure));
    const place = byId("tokens");
    if (!data.tokens.length) {
      place.append(make("p", { class: "note" }, "No token of this run was judged by a teacher."));
      return;
    }
    const names = [["mean", "mean KL"], ["early", "first half"], ["late", "second half"], ["share", "of all KL"], ["count", "times"]];
    const build = (by) => {
      const rows = [...data.tokens].sort((one, two) => (two[by] ?? -Infinity) - (one[by] ?? -Infinity)).map((row) => [
        make("button", { type: "button", class: "token-text", title: "Rollouts with this token", onclick: () => look(row.text) }, quoted(row.text)),
        { number: short(row.mean) },
        { number: short(row.early) },
        { number: short(row.late) },
        { number: percent(row.share) },
        { number: row.count.toLocaleString("en") },
      ]);
      const head = ["token", ...names.map(([name, text]) => ({ number: make("button", { type: "button", title: "Order by this", onclick: () => build(name) }, by === name ? `${text} \u2193` : text) }))];
      const had = place.contains(document.activeElement);
      fill(place, table("Tokens with the largest mean KL", head, rows));
      if (had) place.querySelectorAll("thead button")[names.findIndex(([name]) => name === by)].focus();
    };
    build("mean");
  }

  // ---- side by side -------------------------------------------------------------------------------------------------

  function lastWords(messages) {
    const text = messages.length ? visible(messages[messages.length - 1][1]).replace(/\s+/g, " ") : "";
    return text.length > 90 ? `${text.slice(0, 87)}...` : text;
  }

  function pairs() {
    if (!data.pairs.length) return;
    show("pairs");
    const select = byId("pair");
    select.append(...data.pairs.map((pair, place) => make("option", { value: place }, lastWords(data.prompts[pair.first[0].p] || []))));
    listen(byId("sides"));
    const one = () => {
      const pair = data.pairs[Number(select.value)];
      fill(byId("pair-prompt"), prompt(data.prompts[pair.first[0].p] || []));
      const side = (title, rollouts) => make("div", { class: "side" }, make("h3", null, title), rollouts.map((rollout) => article(rollout, false)));
      fill(byId("sides"), side(`Step ${pair.first[0].s}`, pair.first), side(`Step ${pair.last[0].s}`, pair.last));
    };
    select.addEventListener("change", one);
    one();
  }

  function heldOut() {
    if (!data.heldOut.length) return;
    show("held-out");
    const select = byId("held");
    select.append(...data.heldOut.map((entry, place) => make("option", { value: place }, lastWords(entry.messages))));
    const one = () => {
      const entry = data.heldOut[Number(select.value)];
      fill(byId("held-prompt"), prompt(entry.messages));
      const side = ([name, answer]) =>
        make("div", { class: "side" }, make("h3", null, name), known(answer.reward) ? make("p", { class: "meta" }, `reward ${short(answer.reward)}`) : null, make("p", { class: "said" }, answer.text));
      fill(byId("answers"), Object.entries(entry.answers).map(side));
    };
    select.addEventListener("change", one);
    one();
  }

  // ---- all of it ----------------------------------------------------------------------------------------------------

  overview();
  disagreement();
  rollouts();
  pairs();
  heldOut();
  curves();
  evaluation();
  plan();
  settings();
  theme();
})();
