// Texts that nobody vouches for become text nodes, never HTML.

function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") node.className = value;
    else if (key.includes("-") || key === "role") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children);
  return node;
}

const phi = (u) => 0.5 * (Math.max(u, 0) + Math.log1p(Math.exp(-Math.abs(u))) - Math.LN2);
const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const signed = (value, digits) => (value === null ? "–" : (value > 0 ? "+" : "") + value.toFixed(digits));

// Characters that show nothing or turn the direction of what follows.
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const visible = (text) => text.replace(CONTROL, (c) => "⟨U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
const quoted = (text) => visible(text.replaceAll("\n", "↵").replaceAll("\t", "→").replaceAll(" ", "␣"));
const shownText = (vocabulary, id) => vocabulary.text(id) || "⟨" + id + "⟩";

// Newlines and tabs stay what they are; a style puts a sign before them.
function appendMarked(node, text) {
  for (const part of visible(text).split(/(\n|\t)/)) {
    if (part === "\n") node.append(element("span", { class: "newline" }, "\n"));
    else if (part === "\t") node.append(element("span", { class: "tab" }, "\t"));
    else if (part) node.append(part);
  }
}

// Plain text of ids, special tokens marked; ids from `from` to `to` stand in a mark.
function promptNodes(vocabulary, ids, from, to) {
  const pre = element("pre");
  let place = pre, text = "";
  const flush = () => { if (text) place.append(visible(text)); text = ""; };
  for (let i = 0; i <= ids.length; i++) {
    if (i === from && to > from) { flush(); place = element("mark"); pre.append(place); }
    if (i === to && place !== pre) { flush(); place = pre; }
    if (i === ids.length) break;
    const shown = shownText(vocabulary, ids[i]);
    if (vocabulary.words && i) text += " ";
    if (vocabulary.isSpecial(ids[i])) { flush(); place.append(element("span", { class: "special" }, visible(shown))); }
    else text += shown;
  }
  flush();
  return pre;
}
