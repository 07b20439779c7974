// Puts the parts together.

const byId = (id) => document.getElementById(id);

function fail(error) {
  const box = byId("failure");
  box.textContent = "This page could not be drawn: " + (error && error.message ? error.message : error);
  box.hidden = false;
}
addEventListener("error", (event) => fail(event.error || event.message));
addEventListener("unhandledrejection", (event) => fail(event.reason));

function setRange(nats) {
  document.documentElement.style.setProperty("--range", nats);
  byId("low").textContent = "−" + nats.toPrecision(2);
  byId("high").textContent = "+" + nats.toPrecision(2);
  byId("range").setAttribute("aria-valuetext", nats.toPrecision(2) + " nats");
}

function makeTabs(open) {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const choose = (tab) => {
    for (const each of tabs) {
      each.setAttribute("aria-selected", String(each === tab));
      each.tabIndex = each === tab ? 0 : -1;
      byId(each.getAttribute("aria-controls")).hidden = each !== tab;
    }
    byId("numbers").hidden = true;
    open(tab.id);
  };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!way) return;
      const next = tabs[(i + way + tabs.length) % tabs.length];
      next.focus();
      choose(next);
    });
  });
}

async function main() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser has no DecompressionStream; take one from 2023 or later");
  const data = await readData();
  const rows = data.rollouts.map((row, number) => ({ ...row, number, problemNumber: row.problem, problem: data.problems[row.problem].id }));
  const tokens = rows.reduce((sum, row) => sum + row.tokens, 0);
  byId("summary").textContent += `, ${data.steps.length > 1 ? "steps" : "step"} ${data.steps.join(", ")}; ${rows.length} rollouts, ${tokens} tokens, ${data.scored} with u`;
  const slider = byId("range");
  slider.value = Math.log2(data.range);
  slider.addEventListener("input", () => setRange(2 ** slider.value));
  setRange(data.range);
  const view = new RolloutView(byId("rollout"), byId("numbers"), data);
  const list = new RolloutList(byId("list"), rows, (row) => { location.hash = "r" + row.number; });
  const fromHash = async () => {
    const match = location.hash.match(/^#r(\d+)$/);
    const row = (match && rows[Number(match[1])]) || list.shown[0];
    list.mark(row);
    await view.show(row);
  };
  addEventListener("hashchange", fromHash);
  const drawn = new Set();
  makeTabs((id) => {
    if (drawn.has(id)) return;
    drawn.add(id);
    if (id === "tab-tokens") drawTokens(byId("panel-tokens"), data);
    if (id === "tab-heat") new HeatMap(byId("panel-heat"), data);
  });
  await fromHash();
  // Two frames: the first draws, the second runs after it was shown.
  requestAnimationFrame(() => requestAnimationFrame(() => { document.documentElement.dataset.painted = performance.now(); }));
}

main().catch(fail);
