/* The page of a comparison: every chart has the same runs in the same order, so that a run keeps its colour. */
(function () {
  "use strict";

  const { data, byId, figure, interval, make, plural, short, show, table, theme, written } = rnowPage;

  function curves() {
    show("curves");
    byId("width").textContent = data.width > 1 ? `Each point is the mean of up to ${data.width} steps.` : "One point for each step.";
    byId("charts").append(...data.charts.map(figure));
  }

  function courses() {
    show("courses");
    const best = (found) => (found ? `${short(found.value)} (step ${found.step.toLocaleString("en")})` : "");
    const rows = data.courses.map((row) => [row.metric, row.run, { number: short(row.first) }, { number: short(row.last) }, { number: best(row.best) }]);
    byId("course-table").append(table("First, last and best", ["metric", "run", ...["first", "last", "best"].map((number) => ({ number }))], rows));
  }

  function evaluations() {
    if (!data.evaluations.length) return;
    show("evaluation");
    byId("how").textContent = `In brackets: ${data.how}.`;
    const rows = data.evaluations.flatMap((row) => {
      const measured = [row.name, ...row.runs.map((cell) => interval(cell))];
      if (!row.minusFirst.some(Boolean)) return [measured];
      return [measured, [`minus ${data.runs[0].label}`, "", ...row.minusFirst.map((cell) => interval(cell, true))]];
    });
    byId("evaluations").append(table("Evaluations", ["evaluation", ...data.runs.map((run) => ({ number: run.label }))], rows));
  }

  function settings() {
    show("settings");
    const labels = data.runs.map((run) => run.label);
    const rows = data.settings.map((row) => [make("code", null, row.key), ...row.values]);
    byId("changed").append(rows.length ? table("Differing settings", ["key", ...labels], rows) : "The configs are the same.");
    if (data.contents.length) byId("contents-differ").textContent = `Other contents: ${data.contents.join(", ")}.`;
  }

  byId("state").textContent = data.runs.map((run) => `${run.label}: ${plural(run.steps, "step")}`).join("; ");
  written("Logarithms are natural.");
  curves();
  courses();
  evaluations();
  settings();
  theme();
})();
