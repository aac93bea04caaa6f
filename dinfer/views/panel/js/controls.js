// What stands around the map: controls that move the run, breakpoints, the ranks. Each control shows its
// Python call.

const BUTTONS = [
  ["◀ back", "step_back", "", "b"],
  ["↶", "undo", "run.undo(): undo the last action, whatever it was; again: the one before it", "u"],
  null,
  ["op", "step:op", 'run.step("op")', "o"],
  ["layer", "step:layer", 'run.step("layer")', "l"],
  ["wave", "step:wave", 'run.step("wave")', "w"],
  ["chunk", "step:chunk", 'run.step("chunk")', "c"],
  null,
  ["▶ play", "resume", "run.resume(), or run.play(…) at a pace", "p"],
  ["❚❚ pause", "pause", "run.pause()", "s"],
  ["run to", "run_to", "run.run_to(chunk=…, layer=…): stop once all ranks hold the selected block", "r"],
  ["restart", "restart", "run.restart()", ""],
  null,
  ["compare ranks", "diff", "run.kv().diff(): where the ranks' KV differs; the map shows it", "d"],
  ["why?", "why", "run.verdict(): why the run does not move", "y"],
];
const PACES = ["", "1", "2", "5", "10"]; // steps a second; "": run.resume()
const KEYS = "Keys, while the panel has the focus: o l w c step, b back, u undo, p play, s pause, r run to the selected block, d "
  + "compare ranks, y why, Enter or double-click sets or removes a breakpoint at a block, arrows move the selection, + − 0 "
  + "zoom, 1 2 3 the tabs, t the time, / find. In the form of breakpoints, Enter sets one and Escape leaves it.";
const READING_KEYS = "Keys, while the panel has the focus: d compare ranks, y why, arrows move the selection, + − 0 zoom, 1 2 3 the "
  + "tabs, t the time, / find.";
const ASKING = ["diff", "why"]; // what a saved run answers, too
const TABS = ["map", "KV", "communication", "runs"];
// Controls that are disabled for a run that is over, and without a kernel.
const NEED_RANKS = ".dinfer-bar :is(button, select), .dinfer-verb :is(button, input, select), .dinfer-stops :is(button, input), "
  + ".dinfer-faults button, [data-field], [data-show], [data-tool], .dinfer-moves button";
const NEED_KERNEL = "[data-do=dismiss], [data-do=mend], [data-figure], [data-time], [data-runs], "
  + ".dinfer-time :is(.dinfer-fields button, select), .dinfer-find input, .dinfer-log form :is(button, input)";
const WHENS = ["nan", "inf", "absmax > 100", "digest differs", "slower than 5 ms"];

function make(tag, name, parent, text = "") {
  const node = document.createElement(tag);
  if (name) node.className = name.split(" ").map((part) => `dinfer-${part}`).join(" ");
  if (text) node.textContent = text;
  parent?.append(node);
  return node;
}

// A call that can be copied. Returns a function that shows another call.
function copyable(parent, title) {
  const label = title && make("span", "faint", parent, title);
  const code = make("code", "", parent), button = make("button", "", parent, "copy");
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {
      window.getSelection().selectAllChildren(code); // no clipboard: select it for Ctrl-C
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1200);
  };
  return (call) => {
    code.textContent = call;
    code.hidden = button.hidden = !call;
    if (label) label.hidden = !call;
  };
}

// Keys pressed in the panel go to the panel, except with Ctrl, Alt or Meta. JupyterLab's shortcuts depend on the focused
// element, and Notebook 7 receives keys before the panel does. Returns a function that ends this.
function keepKeys(root) {
  const mark = (event) => {
    if (!root.contains(event.target)) return;
    event.target.toggleAttribute("data-lm-suppress-shortcuts", !(event.ctrlKey || event.metaKey || event.altKey));
  };
  window.addEventListener("keydown", mark, true);
  return () => window.removeEventListener("keydown", mark, true);
}

function shorten(text) {
  return text.length > 90 ? `${text.slice(0, 90)}…` : text;
}

// The list of breakpoints: show, remove, change, add.
class BreakpointList {
  // `send(message)` sends to the kernel; `leave()` gives the keyboard back to the panel.
  constructor(parent, board, send, leave) {
    Object.assign(this, { send, leave, drawn: "", instead: null, sent: null });
    this.box = make("details", "stops", parent);
    this.title = make("summary", "", this.box, "breakpoints");
    this.list = make("div", "list", this.box);
    const form = this.form = make("form", "fields", this.box);
    const most = { layer: board.owners.length, chunk: board.chunks.length, rank: board.ranks };
    this.fields = Object.keys(most).map((name) => {
      const input = make("input", "", form);
      Object.assign(input, { type: "number", name, min: 0, max: most[name] - 1, placeholder: name, title: `${name}; empty for any` });
      return input;
    });
    this.when = make("input", "when", form);
    Object.assign(this.when, { name: "when", placeholder: "when …", title: `empty, or one of: ${WHENS.join(", ")}` });
    this.hit = make("input", "", form);
    Object.assign(this.hit, { type: "number", name: "hit", min: 1, placeholder: "hit", title: "stop only at its hit of this number, from 1; empty: at each" });
    for (const input of [...this.fields, this.when, this.hit]) input.setAttribute("aria-label", input.name);
    this.submit = make("button", "", form);
    form.onsubmit = (event) => this.add(event);
    form.onkeydown = (event) => this.key(event);
    this.edit(null);
  }

  // What the form edits: a new breakpoint, or an existing one.
  edit(one) {
    this.instead = one?.number ?? null;
    this.sent = null;
    for (const field of this.fields) field.value = one?.[field.name] ?? "";
    this.when.value = one?.when ?? "";
    this.hit.value = one?.hit ?? "";
    this.submit.textContent = one ? `change #${one.number}` : "add";
    this.submit.title = `run.break_at(layer=…, chunk=…, rank=…, when=…, hit=…)${one ? `; run.breakpoints.remove(${one.number})` : ""}`;
    if (one) this.when.focus();
  }

  // Enter submits the form, which a notebook's own keys would prevent; Escape forgets what was typed, and leaves.
  key(event) {
    if (event.key === "Enter" && event.target !== this.submit) this.form.requestSubmit();
    else if (event.key === "Escape") this.forget();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  forget() {
    this.edit(null);
    this.leave();
  }

  add(event) {
    event.preventDefault();
    const places = [...this.fields, this.hit].filter((field) => field.value !== "").map((field) => [field.name, Number(field.value)]);
    this.sent = this.numbers;
    this.send({ do: "break_at", ...Object.fromEntries(places), when: this.when.value.trim(), instead: this.instead });
  }

  show(breakpoints) {
    const text = JSON.stringify(breakpoints);
    if (text === this.drawn) return;
    this.drawn = text;
    this.title.textContent = breakpoints.length ? `breakpoints (${breakpoints.length})` : "breakpoints";
    if (breakpoints.length) this.box.open = true;
    this.numbers = breakpoints.map(({ number }) => number);
    const isNew = this.sent && this.numbers.some((number) => !this.sent.includes(number)); // the sent breakpoint is set
    if (isNew || (this.instead !== null && !this.numbers.includes(this.instead))) this.edit(null);
    this.list.replaceChildren();
    for (const one of breakpoints) {
      const { number } = one, line = make("div", "", this.list);
      const box = make("input", "", line);
      Object.assign(box, { type: "checkbox", checked: one.enabled, title: `run.breakpoints.${one.enabled ? "disable" : "enable"}(${number})` });
      box.setAttribute("aria-label", `breakpoint ${number} is enabled`);
      box.onchange = () => this.send({ do: "verb", verb: `breakpoints.${box.checked ? "enable" : "disable"}`, given: { number } });
      make("span", one.enabled ? "" : "off", line, one.text);
      if (one.hits) make("small", "faint", line, `${plural(one.hits, "hit")}`).title = "how often it has stopped the run";
      if (one.plain) this.button(line, "✎", `change breakpoint ${number}`, "change it", () => this.edit(one));
      this.button(line, "×", `remove breakpoint ${number}`, `run.breakpoints.remove(${number})`,
        () => this.send({ do: "remove_breakpoint", number }));
    }
  }

  button(line, text, label, title, onclick) {
    const button = Object.assign(make("button", "", line, text), { title, onclick });
    button.setAttribute("aria-label", label);
  }
}

// The ranks: device, memory and state of each; and which ranks hold a block, in words.

class RankList {
  constructor(parent, board) {
    this.icons = board.severities;
    const list = make("div", "ranks", parent);
    list.classList.toggle("dinfer-many", board.ranks > 4);
    this.lines = Array.from({ length: board.ranks }, (_, rank) => {
      const line = make("div", "rank", list);
      const head = make("div", "", line);
      make("b", "", head, `rank ${rank}`);
      const device = make("span", "faint", head);
      const word = make("span", "word", head);
      const bar = make("progress", "", line);
      const where = make("div", "where", line);
      return { line, device, word, bar, where };
    });
  }

  show(ranks) {
    ranks.forEach((rank, n) => this.showOne(this.lines[n], rank));
  }

  // Lead the eye to a rank.
  point(rank) {
    this.lines.forEach(({ line }, n) => line.classList.toggle("dinfer-pointed", n === rank));
    this.lines[rank]?.line.scrollIntoView({ block: "nearest" });
  }

  showOne({ line, device, word, bar, where }, rank) {
    const tokens = rank.tokens ? `${rank.tokens} new token${rank.tokens === 1 ? "" : "s"}` : "";
    device.textContent = [rank.device, rank.memory, tokens].filter(Boolean).join(" · ");
    device.title = rank.about_memory;
    word.textContent = rank.state === "lost" ? `${this.icons.error} lost` : rank.state;
    word.dataset.severity = rank.state === "lost" ? "error" : "";
    bar.max = rank.total;
    bar.value = rank.done;
    where.textContent = where.title = rank.where;
  }
}

function holders(states) {
  const ranks = (wanted) => states.flatMap((state, rank) => (wanted.includes(state) ? [rank] : []));
  const held = ranks([HERE, EVERYWHERE]), waits = ranks([IN_FLIGHT]), computing = ranks([COMPUTING]);
  const named = (list) => `rank${list.length > 1 ? "s" : ""} ${list.join(", ")}`;
  if (computing.length) return `${named(computing)} computes it`;
  if (!held.length) return "not computed yet";
  if (!waits.length) return "on every rank";
  return `held by ${named(held)}; ${named(waits)} wait${waits.length > 1 ? "" : "s"} for it`;
}
