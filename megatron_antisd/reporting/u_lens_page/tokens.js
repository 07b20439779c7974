// A response as coloured tokens. Only chunks near the window hold nodes; the others keep their height.

const CHUNK_LEAST = 128, CHUNK_MOST = 384;
const MARGIN = 600; // pixels above and below the window

// [start, end) of each chunk: it ends after a line break where there is one, so that lines stay whole.
function chunksOf(ids, vocabulary) {
  const chunks = [];
  for (let start = 0; start < ids.length; ) {
    const most = Math.min(start + CHUNK_MOST, ids.length);
    let end = most, whole = most === ids.length;
    for (let i = start + CHUNK_LEAST; i <= most; i++) {
      if (vocabulary.text(ids[i - 1]).endsWith("\n")) { end = i; whole = true; break; }
    }
    chunks.push({ start, end, whole, filled: false, node: null });
    start = end;
  }
  return chunks;
}

class TokenView {
  constructor(root, scroller, numbers, vocabulary) {
    Object.assign(this, { root, scroller, numbers, vocabulary, cursor: -1, chunks: [], response: null });
    this.observer = new IntersectionObserver((entries) => this.update(entries), { root: scroller, rootMargin: MARGIN + "px 0px" });
    root.addEventListener("pointerover", (event) => this.hover(event.target));
    root.addEventListener("pointerleave", () => this.hide());
    root.addEventListener("click", (event) => { const i = this.indexOf(event.target); if (i >= 0) this.move(i); });
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("focus", () => { if (this.response && root.matches(":focus-visible")) this.move(Math.max(this.cursor, 0)); });
    root.addEventListener("blur", () => this.hide());
    scroller.addEventListener("scroll", () => this.hide(), { passive: true });
  }

  show(response) {
    this.observer.disconnect();
    this.hide();
    this.response = response;
    this.cursor = -1;
    this.chunks = chunksOf(response.ids, this.vocabulary);
    const perLine = Math.max(20, this.root.clientWidth / 8);
    this.chunks.forEach((chunk, number) => {
      chunk.node = element("div", { class: number && !this.chunks[number - 1].whole ? "chunk joined" : "chunk" });
      chunk.node.dataset.number = number;
      let lines = 1, letters = 0;
      for (let i = chunk.start; i < chunk.end; i++) {
        const text = this.vocabulary.text(response.ids[i]);
        letters += text.length;
        lines += text.split("\n").length - 1;
      }
      chunk.node.style.height = Math.ceil(lines * 0.6 + letters / perLine) * 21 + "px";
    });
    this.root.replaceChildren(...this.chunks.map((chunk) => chunk.node));
    if (this.chunks.length) this.fill(this.chunks[0]);
    for (const chunk of this.chunks) this.observer.observe(chunk.node);
  }

  update(entries) {
    if (!this.scroller.clientHeight) return; // another tab is open: nothing has a height, and this comes again
    const gone = [];
    for (const entry of entries) {
      const chunk = this.chunks[entry.target.dataset.number];
      if (!chunk || chunk.node !== entry.target) continue;
      if (entry.isIntersecting) this.fill(chunk);
      else if (chunk.filled) gone.push([chunk, entry.boundingClientRect.height]);
    }
    for (const [chunk, height] of gone) {
      chunk.node.style.height = height + "px";
      chunk.node.replaceChildren();
      chunk.filled = false;
    }
  }

  fill(chunk) {
    if (chunk.filled) return;
    const nodes = document.createDocumentFragment();
    for (let i = chunk.start; i < chunk.end; i++) nodes.append(this.token(i));
    chunk.node.style.height = "";
    chunk.node.replaceChildren(nodes);
    chunk.filled = true;
  }

  token(i) {
    const id = this.response.ids[i], u = this.response.u && this.response.u[i];
    const special = this.vocabulary.isSpecial(id);
    const node = element("span", { id: "t" + i, class: "t" + (u < 0 ? " neg" : u > 0 ? " pos" : "") + (special ? " special" : "") });
    if (u) node.style.setProperty("--a", Math.abs(u));
    if (i === this.cursor) node.classList.add("cursor");
    appendMarked(node, shownText(this.vocabulary, id));
    return node;
  }

  indexOf(target) {
    const node = target.closest(".t");
    return node ? Number(node.id.slice(1)) : -1;
  }

  nodeOf(i) {
    this.fill(this.chunks.find((chunk) => i < chunk.end));
    return document.getElementById("t" + i);
  }

  hover(target) {
    const i = this.indexOf(target);
    if (i >= 0) this.tell(i);
  }

  move(i) {
    const to = Math.min(Math.max(i, 0), this.response.ids.length - 1);
    document.getElementById("t" + this.cursor)?.classList.remove("cursor");
    this.cursor = to;
    const node = this.nodeOf(to);
    node.classList.add("cursor");
    node.scrollIntoView({ block: "nearest" });
    // The scrolling just asked for hides the numbers with its event, which comes before the next frame is drawn.
    this.tell(to);
    requestAnimationFrame(() => { if (this.cursor === to && document.activeElement === this.root) this.tell(to); });
  }

  // The token nearest in the line above (-1) or below (1).
  beside(way) {
    const middle = (r) => (r.left + r.right) / 2;
    const here = this.nodeOf(this.cursor).getClientRects()[0];
    let best = this.cursor, distance = Infinity, line = null;
    for (let i = this.cursor + way; i >= 0 && i < this.response.ids.length; i += way) {
      const rect = this.nodeOf(i).getClientRects()[0];
      if (Math.abs(rect.top - here.top) < 5) continue;
      if (line !== null && Math.abs(rect.top - line) >= 5) break;
      line = rect.top;
      if (Math.abs(middle(rect) - middle(here)) < distance) { distance = Math.abs(middle(rect) - middle(here)); best = i; }
    }
    return best;
  }

  key(event) {
    if (!this.response || event.ctrlKey || event.altKey || event.metaKey) return;
    const last = this.response.ids.length - 1;
    const from = Math.max(this.cursor, 0);
    const to = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.hide();
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (this.cursor < 0) this.move(0);
      this.move(this.beside(event.key === "ArrowDown" ? 1 : -1));
    } else if (to !== undefined) this.move(to);
    else return;
    event.preventDefault();
  }

  tell(i) {
    const { ids, student, teacher, u } = this.response;
    const probability = (logs) => (logs ? `${logs[i].toFixed(4)} (π ${Math.exp(logs[i]).toPrecision(3)})` : "–");
    const rows = [
      ["token", quoted(shownText(this.vocabulary, ids[i])) + (this.vocabulary.isSpecial(ids[i]) ? "  (special)" : "")],
      ["id", String(ids[i])], ["position", `${i} of 0 to ${ids.length - 1}`],
      ["log π_S", probability(student)], ["log π_T", probability(teacher)],
      ["u", u ? signed(u[i], 4) : "–"], ["φ(u)", u ? signed(phi(u[i]), 4) : "–"],
    ];
    const list = element("dl");
    for (const [name, value] of rows) list.append(element("dt", {}, name), element("dd", {}, value));
    this.numbers.replaceChildren(list);
    this.numbers.hidden = false;
    const at = this.nodeOf(i).getClientRects()[0], box = this.numbers.getBoundingClientRect();
    const below = at.bottom + 6 + box.height < innerHeight;
    this.numbers.style.left = Math.max(4, Math.min(at.left, innerWidth - box.width - 8)) + "px";
    this.numbers.style.top = Math.max(4, below ? at.bottom + 6 : at.top - 6 - box.height) + "px";
  }

  hide() {
    this.numbers.hidden = true;
  }
}
