// The panel in the browser: shows what the kernel sends and says which button was pressed. It knows no more of a run
// than panel.py tells: `board` (what does not change), `shown` (what does), `cells` (a byte per layer, chunk, rank).
// panel.py puts map.js before it: together they are one module.

const KERNEL_SILENT_MS = 700;

const BUTTONS = [
  ["◀ back", "step_back", "go back by one unit of the last step"],
  ["op", "step:op", 'run.step("op")'],
  ["layer", "step:layer", 'run.step("layer")'],
  ["wave", "step:wave", 'run.step("wave")'],
  ["chunk", "step:chunk", 'run.step("chunk")'],
  null,
  ["▶ play", "resume", "run.resume()"],
  ["❚❚ pause", "pause", "run.pause()"],
  ["run to block", "run_to", "run.run_to(chunk=…, layer=…): stop just after the selected block is everywhere"],
  null,
  ["restart", "restart", "run.restart()"],
];

function make(tag, name, parent, text = "") {
  const node = document.createElement(tag);
  if (name) node.className = name.split(" ").map((part) => `dinfer-${part}`).join(" ");
  if (text) node.textContent = text;
  parent?.append(node);
  return node;
}

class View {
  constructor(model, el) {
    this.model = model;
    this.board = model.get("board");
    this.name = Math.random().toString(36).slice(2);
    this.asked = 0;
    this.unit = "layer";
    this.hover = null;
    this.hint = "";
    this.silent = new Map(); // message → timer that tells that the kernel has not answered
    this.build(el);
    this.map = new BlockMap(this.canvas, this.root, this.board, () => this.look());
    this.follow();
    this.theme();
    this.update();
  }

  // -- the page

  build(el) {
    this.root = make("div", "panel", el);
    const bar = make("div", "bar", this.root);
    for (const button of BUTTONS) button ? this.button(bar, ...button) : make("span", "gap", bar);
    this.state = make("span", "state", bar);
    this.banner = make("div", "banner", this.root);
    this.banner.setAttribute("role", "status");
    this.bannerText = make("span", "", this.banner);
    this.bannerClose = make("button", "", this.banner, "dismiss");
    this.bannerClose.onclick = () => this.send({ do: "dismiss" });
    this.faults = make("div", "faults", this.root);
    const body = make("div", "body", this.root);
    const map = make("div", "map", body);
    this.canvas = make("canvas", "", map);
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("aria-label", "map of blocks by layer and chunk; arrow keys move the selection");
    this.legend(make("div", "legend", map));
    const side = make("div", "side", body);
    this.block = make("div", "block", side);
    this.text = make("div", "text", side);
    this.ranks = make("div", "ranks", side);
    this.buildRanks();
    const call = make("div", "call", this.root);
    make("span", "", call, "last call");
    this.call = make("code", "", call);
    this.copy = make("button", "", call, "copy");
    this.copy.onclick = () => this.copyCall();
    this.working = make("span", "working", call);
  }

  button(bar, text, action, title) {
    const button = make("button", "", bar, text);
    button.title = title;
    button.dataset.do = action;
    button.onclick = () => this.press(action);
  }

  buildRanks() {
    this.ranks.classList.toggle("dinfer-many", this.board.ranks > 4);
    this.rankLines = Array.from({ length: this.board.ranks }, (_, rank) => {
      const line = make("div", "rank", this.ranks);
      const head = make("div", "", line);
      make("b", "", head, `rank ${rank}`);
      const device = make("span", "", head);
      const word = make("span", "word", head);
      const bar = make("progress", "", line);
      const where = make("div", "where", line);
      return { line, device, word, bar, where };
    });
  }

  legend(node) {
    this.board.states.forEach((name, state) => {
      const item = make("span", "", node);
      make("i", "", item).style.background = `var(--dinfer-${state})`;
      item.append(name);
    });
    const item = make("span", "", node);
    make("i", "line", item);
    item.append("the cut");
    make("span", "", node, `a cell's parts are ranks 0–${this.board.ranks - 1}, left to right`);
  }

  follow() {
    const canvas = this.canvas;
    this.onState = () => this.update();
    this.onAnswer = (message) => this.heard(message.heard);
    this.onSelected = () => this.update();
    this.model.on("change:shown", this.onState);
    this.model.on("change:cells", this.onState);
    this.model.on("change:selected", this.onSelected);
    this.model.on("msg:custom", this.onAnswer);
    canvas.onmousemove = (event) => this.point(this.map.cellAt(event));
    canvas.onmouseleave = () => this.point(null);
    canvas.onclick = (event) => this.select(this.map.cellAt(event));
    canvas.onkeydown = (event) => this.key(event);
    this.themed = new MutationObserver(() => this.theme());
    this.themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
    this.preference = window.matchMedia("(prefers-color-scheme: dark)");
    this.onPreference = () => this.theme();
    this.preference.addEventListener("change", this.onPreference);
  }

  close() {
    this.model.off("change:shown", this.onState);
    this.model.off("change:cells", this.onState);
    this.model.off("change:selected", this.onSelected);
    this.model.off("msg:custom", this.onAnswer);
    this.map.close();
    this.themed.disconnect();
    this.preference.removeEventListener("change", this.onPreference);
    this.silent.forEach(clearTimeout);
  }

  theme() {
    const body = document.body, said = body.dataset.jpThemeLight;
    const dark = said !== undefined ? said === "false"
      : body.classList.contains("vscode-dark") || (!body.classList.contains("vscode-light") && this.preference.matches);
    this.root.classList.toggle("dinfer-dark", dark);
    this.map.draw();
  }

  // -- what the user does

  press(action) {
    const [verb, unit] = action.split(":");
    const block = this.model.get("selected");
    this.hint = "";
    if (unit) this.unit = unit;
    if (verb === "run_to") {
      if (block) this.send({ do: verb, layer: block[0], chunk: block[1] });
      else this.hint = "Click a block of the map first: the run then goes to where that block is everywhere.";
    } else {
      this.send({ do: verb, unit: this.unit });
    }
    this.update();
  }

  send(message) {
    const id = `${this.name}:${this.asked++}`;
    this.silent.set(id, setTimeout(() => {
      this.hint = "The kernel has not answered yet: it is busy with a cell, or gone. What was pressed waits for it.";
      this.update();
    }, KERNEL_SILENT_MS));
    this.model.send({ ...message, id });
  }

  heard(id) {
    if (!this.silent.has(id)) return;
    clearTimeout(this.silent.get(id));
    this.silent.delete(id);
    if (this.silent.size === 0 && this.hint.startsWith("The kernel")) this.hint = "";
    this.update();
  }

  point(cell) {
    if (String(cell) === String(this.hover)) return;
    this.hover = cell;
    this.update();
  }

  select(cell) {
    if (!cell) return;
    this.hint = "";
    this.model.set("selected", cell); // not saved: the kernel has no use for it, other views of this panel do
    this.update();
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const [layer, chunk] = this.model.get("selected") ?? [0, 0];
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.select([within(layer + step[0], this.board.layers), within(chunk + step[1], this.board.chunks.length)]);
  }

  async copyCall() {
    try {
      await navigator.clipboard.writeText(this.call.textContent);
      this.copy.textContent = "copied";
    } catch {
      window.getSelection().selectAllChildren(this.call); // no clipboard here: Ctrl-C does it
      this.copy.textContent = "selected";
    }
    setTimeout(() => { this.copy.textContent = "copy"; }, 1200);
  }

  // -- what the kernel says

  update() {
    const shown = this.model.get("shown");
    if (!shown.ranks) return;
    const tokens = shown.decoded ? ` · ${shown.decoded} token${shown.decoded === 1 ? "" : "s"}` : "";
    this.state.textContent = `${shown.state}${tokens}`;
    this.root.dataset.state = shown.state;
    const alarm = shown.error || (shown.state === "failed" && shown.message);
    this.bannerText.textContent = [shown.error, shown.message, this.hint].filter(Boolean).join("\n");
    this.banner.hidden = !this.bannerText.textContent;
    this.banner.classList.toggle("dinfer-alarm", Boolean(alarm));
    this.bannerClose.hidden = !shown.error;
    this.faults.textContent = shown.faults.join("\n");
    this.faults.hidden = !shown.faults.length;
    this.root.querySelector("[data-do=step_back]").title = `run.step_back("${this.unit}")`;
    this.text.hidden = !shown.text;
    if (this.text.textContent !== shown.text) {
      this.text.textContent = shown.text;
      this.text.scrollTop = this.text.scrollHeight;
    }
    this.call.textContent = shown.call;
    this.call.hidden = this.copy.hidden = this.call.previousSibling.hidden = !shown.call;
    const waiting = shown.waiting ? `, then ${shown.waiting}` : "";
    this.working.textContent = shown.working.length ? `at work: ${shown.working.join(", ")}${waiting}` : "";
    shown.ranks.forEach((rank, n) => this.updateRank(this.rankLines[n], rank));
    this.describe();
    this.map.draw();
  }

  updateRank({ line, device, word, bar, where }, rank) {
    device.textContent = rank.device;
    word.textContent = rank.state;
    line.classList.toggle("dinfer-lost", rank.state === "lost");
    bar.max = rank.total;
    bar.value = rank.done;
    where.textContent = where.title = rank.where;
  }

  cellStates(layer, chunk) {
    const bytes = this.bytes(), { ranks, chunks } = this.board;
    const first = (layer * chunks.length + chunk) * ranks;
    return [...bytes.subarray(first, first + ranks)];
  }

  bytes() {
    const view = this.model.get("cells");
    return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  }

  look() {
    const selected = this.model.get("selected"), { cut } = this.model.get("shown");
    return { bytes: this.bytes(), cut, selected, hover: this.hover };
  }

  describe() {
    const cell = this.hover ?? this.model.get("selected");
    this.block.replaceChildren();
    if (!cell) {
      make("span", "", this.block, "Point at a block to see who holds it; click to select it.");
      return;
    }
    const [layer, chunk] = cell, { owners, chunks, labels } = this.board;
    const [begin, end] = chunks[chunk], states = this.cellStates(layer, chunk);
    const line = make("div", "", this.block);
    make("b", "", line, `block c${chunk} l${layer}`);
    line.append(` · tokens ${begin}–${end - 1} · owner rank ${owners[layer]}${this.hover ? "" : " · selected"}`);
    make("div", "", this.block, holders(states));
    if (labels[chunk]) make("q", "", this.block, shorten(labels[chunk]));
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

function shorten(text) {
  return text.length > 90 ? `${text.slice(0, 90)}…` : text;
}

function render({ model, el }) {
  const view = new View(model, el);
  return () => view.close();
}

export default { render };
