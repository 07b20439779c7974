// One rollout: what the teacher saw, where it came from, and the response.

const NO_TEACHER = {
  no_solution: "no_solution: no other rollout of the group is correct and the data set has no solution, so there is no teacher",
  no_room: "no_room: prompt, template and response left too little room for a solution in the model's context, so there is no teacher",
};

function reasonWithoutU(row) {
  if (row.mean !== null) return null;
  if (row.privileged === null) return NO_TEACHER[row.source] || `${row.source}: there is no teacher`;
  if (!row.student && !row.teacher) return "neither student nor teacher log-probs were written";
  return row.student ? "no teacher log-probs were written" : "no student log-probs were written (a dropped group or a skipped update)";
}

function solutionLine(data, row) {
  const line = element("p", { class: "facts", id: "origin" }, "Solution shown to the teacher: ");
  if (row.source === "peer") {
    if (row.shown === null) line.append(`peer rollout ${row.shownIndex} of its group (not in this file)`);
    else line.append(element("a", { href: "#r" + row.shown }, `peer rollout ${row.shownIndex}`), " of its group");
  } else if (row.source === "reference") line.append("the data set's");
  else line.append("none");
  if (row.privileged !== null) line.append(row.cut ? `; ${row.cut} tokens were cut from its beginning` : "; nothing was cut");
  return line;
}

// Filled when it is opened for the first time.
function later(title, fill) {
  const node = element("details", {}, element("summary", {}, title));
  node.addEventListener("toggle", async () => {
    if (node.open && node.childElementCount === 1) node.append(await fill());
  });
  return node;
}

async function promptText(data, own, other) {
  const ids = await inflateNumbers(data.chunks[data.prompts[own]]);
  if (other === null) return promptNodes(data.vocabulary, ids, -1, -1);
  // What the student's prompt does not have stands between the beginning and the end that both share.
  const plain = await inflateNumbers(data.chunks[data.prompts[other]]);
  let from = 0, same = 0;
  while (from < ids.length && from < plain.length && ids[from] === plain[from]) from++;
  while (same < Math.min(ids.length, plain.length) - from && ids[ids.length - 1 - same] === plain[plain.length - 1 - same]) same++;
  return promptNodes(data.vocabulary, ids, from, ids.length - same);
}

class RolloutView {
  constructor(root, numbers, data) {
    Object.assign(this, { root, data, asked: 0 });
    this.tokens = element("div", { id: "tokens", tabIndex: 0, role: "group", "aria-label": "Response tokens; arrow keys move between them" });
    if (data.vocabulary.words) this.tokens.className = "words";
    this.view = new TokenView(this.tokens, root, numbers, data.vocabulary);
  }

  async show(row) {
    const asked = ++this.asked;
    const response = await responseOf(this.data, row);
    if (asked !== this.asked) return; // another was chosen meanwhile
    const { data } = this, problem = data.problems[row.problemNumber], reason = reasonWithoutU(row);
    const facts = `reward ${fixed(row.reward, 3)}, ${row.tokens} tokens${row.truncated ? ", truncated" : ""}, ` +
      `mean u ${signed(row.mean, 4)}, share of u < 0 ${fixed(row.share, 4)}, policy version ${row.version}`;
    const parts = [
      element("h2", {}, visible(`step ${row.step}, problem ${row.problem}, rollout ${row.index}`)),
      element("p", { class: "facts" }, facts), solutionLine(data, row),
      element("p", { class: "facts", id: "feedback" }, "Feedback: " + visible(row.feedback ?? "none")),
      later("Problem and answer", () => element("pre", {}, visible(`${problem.prompt}\n\nanswer: ${problem.answer}\nfrom: ${problem.origin || "not said"}`))),
      later("Prompt of the student", () => promptText(data, row.prompt, null)),
    ];
    if (row.privileged !== null) parts.push(later("Prompt of the teacher (marked: what the student did not see)", () => promptText(data, row.privileged, row.prompt)));
    parts[4].id = "problem"; parts[5].id = "student-prompt";
    if (parts[6]) parts[6].id = "teacher-prompt";
    parts.push(element("h3", {}, "Response"));
    if (reason) parts.push(element("p", { class: "reason" }, "Not coloured. " + reason + "."));
    this.root.replaceChildren(...parts, this.tokens);
    this.root.scrollTop = 0;
    this.view.show(response);
    this.root.dataset.row = row.number;
  }
}
