// The list of rollouts: filters, order, and rows for the visible part alone.

const ROW_HEIGHT = 26;
const COLUMNS = [
  { key: "step", title: "step", width: 8 }, { key: "problem", title: "problem", width: 17, search: true },
  { key: "index", title: "index", width: 8 }, { key: "reward", title: "reward", width: 10, digits: 2 },
  { key: "truncated", title: "truncated", width: 13, choice: true }, { key: "tokens", title: "tokens", width: 9 },
  { key: "mean", title: "mean u", width: 11, digits: 3, sign: true }, { key: "share", title: "u < 0", width: 10, digits: 3 },
  { key: "source", title: "solution", width: 14, choice: true },
];

// "3", "=3", "<0.5", ">=2", "1..4"; null for what is none of these.
function numberTest(text) {
  const number = "([-+]?(?:\\d+\\.?\\d*|\\.\\d+)(?:e[-+]?\\d+)?)";
  const range = text.match(new RegExp(`^\\s*${number}\\s*\\.\\.\\s*${number}\\s*$`, "i"));
  if (range) return (value) => value >= Number(range[1]) && value <= Number(range[2]);
  const one = text.match(new RegExp(`^\\s*(<=|>=|<|>|=)?\\s*${number}\\s*$`, "i"));
  if (!one) return null;
  const limit = Number(one[2]);
  return { "<": (v) => v < limit, ">": (v) => v > limit, "<=": (v) => v <= limit, ">=": (v) => v >= limit }[one[1]] || ((v) => v === limit);
}

class RolloutList {
  constructor(root, rows, choose) {
    Object.assign(this, { root, rows, choose, shown: rows, chosen: null, filters: new Map(), order: { key: "step", way: 1 } });
    this.head = root.querySelector("thead");
    this.body = root.querySelector("tbody");
    this.makeHead();
    root.addEventListener("scroll", () => this.draw(), { passive: true });
    root.addEventListener("keydown", (event) => this.key(event));
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("tr[data-row]");
      if (row) this.choose(this.rows[row.dataset.row]);
    });
    new ResizeObserver(() => this.draw()).observe(root);
    this.apply();
  }

  makeHead() {
    const titles = element("tr"), filters = element("tr");
    for (const column of COLUMNS) {
      const button = element("button", { title: "sort by " + column.title }, column.title);
      button.addEventListener("click", () => this.sort(column.key));
      column.head = element("th", { scope: "col", "aria-sort": "none" }, button);
      column.head.style.width = column.width + "%";
      titles.append(column.head);
      filters.append(element("td", {}, this.filterBox(column)));
    }
    this.head.replaceChildren(titles, filters);
  }

  filterBox(column) {
    const label = "filter by " + column.title;
    const box = column.choice ? element("select", { "aria-label": label }) : element("input", { "aria-label": label });
    if (column.choice) {
      const values = [...new Set(this.rows.map((row) => this.cell(row, column)))].sort();
      box.append(element("option", { value: "" }, "all"), ...values.map((value) => element("option", { value }, value)));
    } else {
      box.placeholder = column.search ? "search" : "e.g. >1";
      box.title = column.search ? "part of the problem's id" : "a number, <n, >n, <=n, >=n or a..b";
    }
    box.name = column.key;
    box.addEventListener("input", () => this.filter(column, box));
    return box;
  }

  filter(column, box) {
    const text = box.value;
    let test = null;
    if (column.choice) test = (row) => this.cell(row, column) === text;
    else if (column.search) test = (row) => row.problem.toLowerCase().includes(text.toLowerCase());
    else {
      const passes = numberTest(text);
      test = passes && ((row) => row[column.key] !== null && passes(row[column.key]));
    }
    box.setAttribute("aria-invalid", String(text.trim() !== "" && test === null));
    if (text.trim() === "" || test === null) this.filters.delete(column.key);
    else this.filters.set(column.key, test);
    this.apply();
  }

  sort(key) {
    this.order = { key, way: this.order.key === key ? -this.order.way : 1 };
    this.apply();
  }

  apply() {
    const { key, way } = this.order;
    const compare = (a, b) => {
      if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null); // missing values last, both ways
      return way * (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0);
    };
    this.shown = this.rows.filter((row) => [...this.filters.values()].every((test) => test(row))).sort(compare);
    for (const column of COLUMNS) column.head.setAttribute("aria-sort", column.key !== key ? "none" : way > 0 ? "ascending" : "descending");
    document.getElementById("none").hidden = this.shown.length > 0;
    this.root.dataset.count = this.shown.length;
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.root.scrollTop / ROW_HEIGHT) - 10);
    const last = Math.min(this.shown.length, first + Math.ceil(this.root.clientHeight / ROW_HEIGHT) + 20);
    const gap = (rows) => { const row = element("tr", { "aria-hidden": "true" }); row.style.height = rows * ROW_HEIGHT + "px"; return row; };
    const rows = this.shown.slice(first, last).map((row, i) => this.row(row, first + i));
    this.body.replaceChildren(gap(first), ...rows, gap(this.shown.length - last));
  }

  row(row, place) {
    const cells = COLUMNS.map((column) => element("td", { title: column.search ? row.problem : "" }, this.cell(row, column)));
    const node = element("tr", { class: row === this.chosen ? "chosen" : "", "aria-rowindex": String(place + 1) }, ...cells);
    if (row === this.chosen) node.setAttribute("aria-current", "true");
    node.dataset.row = row.number;
    return node;
  }

  cell(row, column) {
    const value = row[column.key];
    if (column.key === "truncated") return value ? "yes" : "no";
    if (column.search) return visible(value);
    if (value === null || column.digits === undefined) return value === null ? "–" : String(value);
    return column.sign ? signed(value, column.digits) : fixed(value, column.digits);
  }

  mark(row) {
    this.chosen = row;
    const place = this.shown.indexOf(row);
    const head = this.head.offsetHeight, view = this.root.clientHeight - head;
    if (place >= 0) {
      const top = place * ROW_HEIGHT;
      if (top < this.root.scrollTop) this.root.scrollTop = top;
      else if (top + ROW_HEIGHT > this.root.scrollTop + view) this.root.scrollTop = top + ROW_HEIGHT - view;
    }
    this.draw();
  }

  key(event) {
    if (event.target !== this.root || !this.shown.length) return;
    const at = this.shown.indexOf(this.chosen), last = this.shown.length - 1;
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: last, PageDown: at + 20, PageUp: at - 20 }[event.key];
    if (to === undefined) return;
    this.choose(this.shown[Math.min(Math.max(to, 0), last)]);
    event.preventDefault();
  }
}
