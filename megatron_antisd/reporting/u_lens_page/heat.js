// (pi_S, pi_T) of all tokens as a 2-D histogram.

const CELL = 6, LEFT = 56, BOTTOM = 40, TOP = 10, RIGHT = 90;

class HeatMap {
  constructor(panel, data) {
    Object.assign(this, { data, heat: data.heat, counts: null, cell: null });
    this.side = this.heat.bins * CELL;
    this.scale = element("select", { id: "heat-scale" }, element("option", { value: "probability" }, "probabilities"), element("option", { value: "log" }, "log-probs"));
    this.step = element("select", { id: "heat-step" }, element("option", { value: 0 }, "all steps"));
    data.steps.forEach((step, i) => this.step.append(element("option", { value: i + 1 }, "step " + step)));
    this.canvas = element("canvas", { id: "heat", tabIndex: 0, role: "img", width: LEFT + this.side + RIGHT, height: TOP + this.side + BOTTOM });
    this.readout = element("p", { id: "heat-readout", role: "status" });
    for (const box of [this.scale, this.step]) box.addEventListener("change", () => this.load());
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    const controls = element("div", { id: "heat-controls" }, element("label", {}, "axes ", this.scale), element("label", {}, "tokens of ", this.step));
    panel.replaceChildren(element("h2", {}, "Where student and teacher put the sampled tokens"), controls, this.canvas, this.readout,
      element("p", { class: "note" }, "Counts on a log scale. Above the diagonal the teacher finds a token more likely than the student (u > 0), below it less. " +
        `With log-probs the first bins hold everything below ${this.heat.floor} nats too. Arrow keys move over the bins.`));
    this.load();
  }

  async load() {
    const name = this.scale.value, chunk = this.heat[name][this.step.value];
    const counts = await inflateNumbers(this.data.chunks[chunk]);
    if (chunk !== this.heat[this.scale.value][this.step.value]) return; // another was chosen meanwhile
    this.counts = counts;
    this.total = counts.reduce((sum, count) => sum + count, 0);
    this.highest = counts.reduce((most, count) => Math.max(most, count), 0);
    this.canvas.dataset.total = this.total;
    this.canvas.setAttribute("aria-label", `2-D histogram of ${this.total} tokens by the student's and the teacher's ${name === "log" ? "log-prob" : "probability"}; the fullest bin holds ${this.highest}`);
    this.draw();
    this.tell();
  }

  value(bin) {
    return this.scale.value === "log" ? this.heat.floor * (1 - bin / this.heat.bins) : bin / this.heat.bins;
  }

  colour(share) {
    const parse = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
    const style = getComputedStyle(document.documentElement);
    const [low, high] = ["--heat-low", "--heat-high"].map((name) => parse(style.getPropertyValue(name).trim()));
    return low.map((from, i) => Math.round(from + (high[i] - from) * share));
  }

  draw() {
    if (!this.counts) return;
    const { bins } = this.heat, pen = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const text = style.getPropertyValue("--text").trim();
    const ramp = Array.from({ length: 65 }, (_, i) => `rgb(${this.colour(i ? 0.12 + (0.88 * i) / 64 : 0).join(",")})`);
    const most = Math.log1p(this.highest);
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.counts.forEach((count, place) => {
      if (!count) return;
      pen.fillStyle = ramp[Math.max(1, Math.round((64 * Math.log1p(count)) / most))];
      pen.fillRect(LEFT + Math.floor(place / bins) * CELL, TOP + (bins - 1 - (place % bins)) * CELL, CELL, CELL);
    });
    pen.strokeStyle = style.getPropertyValue("--faint").trim();
    pen.strokeRect(LEFT - 0.5, TOP - 0.5, this.side + 1, this.side + 1);
    pen.save();
    pen.strokeStyle = "#d97706"; pen.setLineDash([6, 4]);
    pen.beginPath(); pen.moveTo(LEFT, TOP + this.side); pen.lineTo(LEFT + this.side, TOP); pen.stroke();
    pen.restore();
    pen.fillStyle = text; pen.font = "12px system-ui, sans-serif";
    for (let i = 0; i <= 4; i++) {
      const label = String(this.value((bins * i) / 4));
      pen.textAlign = "center"; pen.fillText(label, LEFT + (this.side * i) / 4, TOP + this.side + 16);
      pen.textAlign = "right"; pen.fillText(label, LEFT - 6, TOP + this.side * (1 - i / 4) + 4);
    }
    const log = this.scale.value === "log" ? "log " : "";
    pen.textAlign = "center"; pen.fillText(log + "π_S (student)", LEFT + this.side / 2, TOP + this.side + 34);
    pen.save(); pen.translate(14, TOP + this.side / 2); pen.rotate(-Math.PI / 2); pen.fillText(log + "π_T (teacher)", 0, 0); pen.restore();
    this.drawScale(pen, ramp, most, text);
    if (this.cell) {
      pen.strokeStyle = text;
      pen.strokeRect(LEFT + this.cell[0] * CELL - 1, TOP + (bins - 1 - this.cell[1]) * CELL - 1, CELL + 2, CELL + 2);
    }
  }

  drawScale(pen, ramp, most, text) {
    const x = LEFT + this.side + 18, height = this.side / 2;
    for (let i = 1; i <= 64; i++) { pen.fillStyle = ramp[i]; pen.fillRect(x, TOP + height * (1 - i / 64), 14, height / 64 + 1); }
    pen.fillStyle = text; pen.textAlign = "left";
    for (let count = 1; count <= this.highest; count *= 10) pen.fillText(count.toLocaleString("en"), x + 18, TOP + height * (1 - Math.log1p(count) / most) + 4);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect(), zoom = this.canvas.width / box.width;
    const x = Math.floor(((event.clientX - box.left) * zoom - LEFT) / CELL), y = this.heat.bins - 1 - Math.floor(((event.clientY - box.top) * zoom - TOP) / CELL);
    if (x >= 0 && y >= 0 && x < this.heat.bins && y < this.heat.bins) this.choose([x, y]);
  }

  key(event) {
    const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!way) return;
    const at = this.cell || [this.heat.bins - 1, this.heat.bins - 1];
    this.choose(at.map((place, i) => Math.min(Math.max(place + way[i], 0), this.heat.bins - 1)));
    event.preventDefault();
  }

  choose(cell) {
    this.cell = cell;
    this.draw();
    this.tell();
  }

  tell() {
    if (!this.cell) { this.readout.textContent = `${this.total} tokens`; return; }
    const [x, y] = this.cell, log = this.scale.value === "log" ? "log " : "", digits = log ? 2 : 4;
    const span = (bin) => `${this.value(bin).toFixed(digits)} to ${this.value(bin + 1).toFixed(digits)}`;
    this.readout.textContent = `${log}π_S ${span(x)}, ${log}π_T ${span(y)}: ${this.counts[x * this.heat.bins + y]} of ${this.total} tokens`;
  }
}
