// Tables of extreme tokens and curves over the steps, as SVG.

function svg(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const scaleOf = (low, high, from, to) => (value) => (high === low ? (from + to) / 2 : from + ((value - low) / (high - low)) * (to - from));

// Runs of neighbouring points that have a value: a missing one is a gap.
function curves(points, x, y) {
  const runs = [[]];
  for (const point of points) {
    if (point.value === null) runs.push([]);
    else runs[runs.length - 1].push(point);
  }
  const nodes = [];
  for (const run of runs) {
    if (run.length > 1) nodes.push(svg("polyline", { class: "curve", points: run.map((p) => `${x(p.step)},${y(p.value)}`).join(" ") }));
    for (const p of run) {
      if (p.error) nodes.push(svg("line", { class: "bar", x1: x(p.step), x2: x(p.step), y1: y(p.value - 2 * p.error), y2: y(p.value + 2 * p.error) }));
      const dot = svg("circle", { class: "dot", cx: x(p.step), cy: y(p.value), r: 2 });
      dot.append(svg("title", {}, `step ${p.step}: ${p.value.toPrecision(4)}${p.error ? " ± " + p.error.toPrecision(2) : ""} (${p.count} tokens)`));
      nodes.push(dot);
    }
  }
  return nodes;
}

function lineChart(title, points) {
  const width = 380, height = 190, left = 52, bottom = 24, top = 8;
  const known = points.filter((p) => p.value !== null);
  const figure = element("div", { class: "chart" }, element("h3", {}, title));
  if (!known.length) { figure.append(element("p", { class: "note" }, "No token has both log-probs.")); return figure; }
  const ends = known.flatMap((p) => [p.value - 2 * (p.error || 0), p.value + 2 * (p.error || 0)]);
  const low = Math.min(...ends), high = Math.max(...ends);
  const x = scaleOf(points[0].step, points[points.length - 1].step, left + 8, width - 12), y = scaleOf(low, high, height - bottom, top);
  const said = `${title}: ${known[0].value.toPrecision(4)} at step ${known[0].step}, ${known[known.length - 1].value.toPrecision(4)} at step ${known[known.length - 1].step}`;
  const drawing = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said });
  drawing.append(svg("line", { class: "axis", x1: left, x2: width, y1: height - bottom, y2: height - bottom }), svg("line", { class: "axis", x1: left, x2: left, y1: top, y2: height - bottom }));
  for (const value of high > low ? [low, (low + high) / 2, high] : [low]) {
    drawing.append(svg("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, value.toPrecision(3)));
  }
  for (const p of points.length > 1 ? [points[0], points[points.length - 1]] : [points[0]]) {
    drawing.append(svg("text", { x: x(p.step), y: height - 8, "text-anchor": "middle" }, "step " + p.step));
  }
  if (low < 0 && high > 0) drawing.append(svg("line", { class: "zero", x1: left, x2: width, y1: y(0), y2: y(0) }));
  drawing.append(...curves(points, x, y));
  figure.append(drawing);
  return figure;
}

function sparkline(steps, row, low, high) {
  const width = 150, height = 24;
  const x = scaleOf(steps[0], steps[steps.length - 1], 4, width - 4), y = scaleOf(low, high, height - 3, 3);
  const points = steps.map((step, i) => ({ step, value: row.means[i], count: row.counts[i] }));
  const known = points.filter((p) => p.value !== null);
  const said = `from ${signed(known[0].value, 3)} at step ${known[0].step} to ${signed(known[known.length - 1].value, 3)} at step ${known[known.length - 1].step}`;
  const drawing = svg("svg", { width, height, role: "img", "aria-label": said });
  drawing.append(svg("line", { class: "zero", x1: 0, x2: width, y1: y(0), y2: y(0) }), ...curves(points, x, y));
  return drawing;
}

function tokenTable(data, title, rows) {
  const table = element("table", { class: "extremes" }, element("caption", {}, title));
  if (!rows.length) {
    table.append(element("tbody", {}, element("tr", {}, element("td", {}, "none"))));
    return table;
  }
  const several = data.steps.length > 1;
  const names = ["token", "id", "count", "mean u", "standard error", ...(several ? ["first step", "last step", "over the steps"] : [])];
  table.append(element("thead", {}, element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)))));
  const every = rows.flatMap((row) => row.means).filter((mean) => mean !== null);
  const low = Math.min(0, ...every), high = Math.max(0, ...every);
  const body = element("tbody");
  for (const row of rows) {
    const cells = [String(row.token), String(row.count), signed(row.mean, 3), fixed(row.error, 3)];
    if (several) cells.push(signed(row.means[0], 3), signed(row.means[row.means.length - 1], 3));
    const text = element("td", { class: "text", title: quoted(shownText(data.vocabulary, row.token)) }, quoted(shownText(data.vocabulary, row.token)));
    const line = element("tr", {}, text, ...cells.map((cell) => element("td", {}, cell)));
    if (several) line.append(element("td", {}, sparkline(data.steps, row, low, high)));
    line.dataset.token = row.token;
    body.append(line);
  }
  table.append(body);
  return table;
}

function drawTokens(panel, data) {
  const points = (value, error) => data.overSteps.map((row) => ({ step: row.step, value: row[value], error: row[error], count: row.tokens }));
  panel.replaceChildren(
    element("div", { class: "beside" }, lineChart("Mean u, nats", points("mean", "error")), lineChart("Share of tokens with u < 0", points("share", "shareError"))),
    element("p", { class: "note" }, "Bars are two standard errors, tokens taken as independent; tokens of one rollout are not quite, so the true error is larger."),
    element("p", { class: "note" }, `Tokens with at least ${data.extremes.minimum} occurrences among the ${data.scored} that have both log-probs, by id. A dashed line is u = 0.`),
    element("div", { class: "beside" }, tokenTable(data, "Most negative mean u", data.extremes.negative), tokenTable(data, "Most positive mean u", data.extremes.positive)),
  );
}
