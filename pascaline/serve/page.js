// Draws the conversation (conversation.py: Conversation) into `element`. Whatever people or models said gets into the page as text nodes
// only, never as HTML: nothing in here may use innerHTML. Gradio calls this file as the body of a function of (element, props, watch, ...).

const LABELS = {cut: "cut off: the limit of tokens was reached", stopped: "stopped"};

function make(tag, name, ...children) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children);
  return node;
}

// ---- a little Markdown: code, headings, lists, bold, italics. No links, no images: they would be loaded from elsewhere. ----

const INLINE = /(`+)(.+?)\1|\*\*(?=\S)(.+?)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]+?)\*(?![\w*])/gs;

function inline(parent, text) {
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    parent.append(text.slice(end, found.index));
    if (found[1]) parent.append(make("code", "", found[2]));
    else inline(parent.appendChild(make(found[3] ? "strong" : "em")), found[3] || found[4]);
    end = found.index + found[0].length;
  }
  parent.append(text.slice(end));
}

function written(text) {
  const page = document.createDocumentFragment();
  let block = null, kind = "";
  const open = (tag) => {
    if (kind !== tag) page.append((block = make((kind = tag))));
    return block;
  };
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = line.match(/^\s*(`{3,}|~{3,})/), heading = line.match(/^(#{1,6})\s+(.*)/);
    const item = line.match(/^\s*(?:([-*+])|(\d{1,9})[.)])\s+(.*)/);
    if (fence) {
      const code = [];
      while (++i < lines.length && !lines[i].trim().startsWith(fence[1])) code.push(lines[i]);
      page.append(make("pre", "", make("code", "", code.join("\n"))));
      kind = "";
    } else if (heading) {
      inline(page.appendChild(make("h" + Math.min(6, heading[1].length + 2))), heading[2]);
      kind = "";
    } else if (item) {
      const list = open(item[1] ? "ul" : "ol");
      if (item[2] && !list.children.length) list.start = Number(item[2]);
      inline(list.appendChild(make("li")), item[3]);
    } else if (!line.trim()) {
      kind = "";
    } else if (kind === "ul" || kind === "ol") {
      inline(block.lastChild, "\n" + line.trim());
    } else {
      const paragraph = open("p");
      if (paragraph.hasChildNodes()) paragraph.append("\n");
      inline(paragraph, line);
    }
  }
  return page;
}

// ---- branches and turns ----

function seconds(value) {
  if (value < 0.95) return value.toFixed(1) + " s";
  const whole = Math.round(value);
  return whole < 60 ? whole + " s" : Math.floor(whole / 60) + " min " + (whole % 60) + " s";
}

function over(branch) {
  return !["waiting", "thinking", "answering"].includes(branch.state);
}

function label(branch) {
  if (branch.state === "thinking") return branch.seconds < 1 ? "Thinking..." : "Thinking... " + seconds(branch.seconds);
  return "Thought for " + seconds(branch.seconds);
}

class BranchView {
  constructor(name) {
    this.title = make("div", "branch-title", make("span", "", name), make("span", "tokens"));
    this.summary = make("summary");
    this.thought = make("div", "thought-text");
    this.details = make("details", "thought", this.summary, this.thought);
    this.answer = make("div", "answer");
    this.note = make("div", "note");
    this.node = make("div", "branch", this.title, this.details, this.answer, this.note);
    // Open while it thinks and closed when it is done, unless the reader has decided otherwise.
    this.summary.addEventListener("click", () => (this.touched = true));
  }

  /** wins: "", "leads" or "winner". */
  draw(branch, wins) {
    const now = JSON.stringify([branch, wins]);
    if (now === this.drawn) return;
    this.drawn = now;
    this.node.classList.toggle("wins", wins !== "");
    this.node.dataset.state = branch.state;
    this.title.lastChild.textContent = [wins, branch.tokens ? count(branch.tokens, "token") : ""].filter(Boolean).join(", ");
    this.details.hidden = !branch.thought;
    this.summary.textContent = label(branch);
    if (!this.touched) this.details.open = branch.state === "thinking" || (branch.state === "stopped" && !branch.answer);
    const low = this.thought.scrollHeight - this.thought.scrollTop - this.thought.clientHeight < 24;
    this.thought.textContent = branch.thought.trim();
    if (low) this.thought.scrollTop = this.thought.scrollHeight;
    this.answer.replaceChildren(written(branch.answer));
    this.answer.setAttribute("aria-busy", !over(branch));
    this.note.textContent = branch.state === "waiting" ? "..." : branch.error || LABELS[branch.state] || "";
    this.note.className = "note " + branch.state;
  }
}

function count(n, word) {
  return n.toLocaleString("en") + " " + word + (n === 1 ? "" : "s");
}

class TurnView {
  constructor(turn) {
    this.branches = turn.branches.map((_, i) => new BranchView("Branch " + (i + 1)));
    this.tally = make("div", "tally");
    this.node = make("section", "turn", make("div", "question", turn.question), this.tally);
    const many = this.branches.length > 1;
    this.node.append(make("div", many ? "branches" : "single", ...this.branches.map((view) => view.node)));
    this.tally.hidden = !many;
  }

  draw(turn) {
    const winner = turn.tally.length ? turn.tally[0].branches[0] : -1;
    const word = turn.branches.every(over) ? "winner" : "leads";
    turn.branches.forEach((branch, i) => this.branches[i].draw(branch, i === winner ? word : ""));
    if (turn.branches.length < 2) return;
    const spent = turn.branches.reduce((sum, branch) => sum + branch.tokens, 0);
    const ended = turn.branches.filter(over).length;
    const least = turn.branches.every((branch) => branch.tokens) ? ", " : ", at least "; // how many a stopped one took is not known
    const told = `${ended} ended` + (spent ? least + count(spent, "token") : "");
    const head = make("div", "tally-head", `Vote of ${turn.branches.length}`, make("span", "tokens", told));
    this.tally.replaceChildren(head, ...turn.tally.map((group, i) => this.row(group, i === 0, turn.branches.length)));
  }

  row(group, wins, all) {
    const bar = make("span", "bar");
    bar.style.setProperty("--share", group.branches.length / all);
    const who = group.branches.map((i) => i + 1).join(", ");
    const votes = make("span", "votes", `${count(group.branches.length, "vote")} (${who})`);
    return make("div", wins ? "vote wins" : "vote", make("span", "choice", group.answer), bar, votes);
  }
}

// ---- the whole ----

const views = [];
const empty = make("div", "empty", make("h1", "", props.model), make("p", "", "Ask something. You will see how it thinks."));
const list = element.appendChild(make("div", "talk"));
list.setAttribute("aria-live", "polite");

let shown = props.value;

function draw() {
  if (props.value.number < shown.number) { // the last words of a chat that was left for a new one
    props.value = shown;
    return;
  }
  if (props.value.number > shown.number) {
    views.length = 0;
    list.replaceChildren();
  }
  shown = props.value;
  const turns = shown.turns;
  const root = document.scrollingElement;
  const low = root.scrollHeight - root.scrollTop - root.clientHeight < 120;
  const asked = turns.length > views.length;
  turns.forEach((turn, i) => {
    if (!views[i]) list.append((views[i] = new TurnView(turn)).node);
    views[i].draw(turn);
  });
  if (turns.length) empty.remove();
  else list.append(empty);
  if (low || asked) root.scrollTop = root.scrollHeight;
}

watch("value", draw);
draw();

// The panel starts closed, and opens where there is room for it, as soon as it is there.
function openPanel() {
  const button = document.querySelector("#panel .toggle-button");
  if (button) button.click();
  else requestAnimationFrame(openPanel);
}
if (window.innerWidth >= 1100) openPanel();
