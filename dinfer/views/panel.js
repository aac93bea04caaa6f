// The panel in the browser: draws what the kernel sends and says which button was pressed. It knows no more of a run
// than panel.py tells: `board` (what does not change), `shown` (what does), `cells` (a byte per layer, chunk, rank).

const STATES = ["not yet", "computing", "here, not everywhere", "in flight to here", "on every rank"];
const [COMPUTING, HERE, IN_FLIGHT, EVERYWHERE] = [1, 2, 3, 4];
const KERNEL_SILENT_MS = 700;
const LEFT = 52, TOP = 18, MAP_HEIGHT = 400;

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
    STATES.forEach((name, state) => {
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
    canvas.onmousemove = (event) => this.point(this.cellAt(event));
    canvas.onmouseleave = () => this.point(null);
    canvas.onclick = (event) => this.select(this.cellAt(event));
    canvas.onkeydown = (event) => this.key(event);
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(canvas.parentElement);
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
    this.resized.disconnect();
    this.themed.disconnect();
    this.preference.removeEventListener("change", this.onPreference);
    this.silent.forEach(clearTimeout);
  }

  theme() {
    const body = document.body, said = body.dataset.jpThemeLight;
    const dark = said !== undefined ? said === "false"
      : body.classList.contains("vscode-dark") || (!body.classList.contains("vscode-light") && this.preference.matches);
    this.root.classList.toggle("dinfer-dark", dark);
    this.draw();
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
    this.root.querySelector("[data-do=step_back]").title = `run.step_back("${this.unit}")`;
    this.text.textContent = shown.text;
    this.text.hidden = !shown.text;
    this.call.textContent = shown.call;
    this.call.hidden = this.copy.hidden = this.call.previousSibling.hidden = !shown.call;
    const waiting = shown.waiting ? `, then ${shown.waiting}` : "";
    this.working.textContent = shown.working.length ? `at work: ${shown.working.join(", ")}${waiting}` : "";
    shown.ranks.forEach((rank, n) => this.updateRank(this.rankLines[n], rank));
    this.describe();
    this.draw();
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

  // -- the map

  geometry() {
    const { layers, chunks } = this.board;
    const width = this.canvas.parentElement.clientWidth;
    const across = Math.min(64, (width - LEFT - 2) / chunks.length);
    const down = Math.max(4, Math.min(22, Math.floor(MAP_HEIGHT / layers)));
    return { width, height: TOP + down * layers + 4, across, down };
  }

  cellAt(event) {
    const { across, down } = this.geometry();
    const chunk = Math.floor((event.offsetX - LEFT) / across), layer = Math.floor((event.offsetY - TOP) / down);
    const { layers, chunks } = this.board;
    return layer >= 0 && layer < layers && chunk >= 0 && chunk < chunks.length ? [layer, chunk] : null;
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    const shape = this.geometry(), scale = window.devicePixelRatio || 1;
    const style = getComputedStyle(this.root), bytes = this.bytes();
    if (shape.width <= 0 || !bytes.length) return;
    this.colour = (name) => style.getPropertyValue(`--dinfer-${name}`).trim();
    this.canvas.width = Math.round(shape.width * scale);
    this.canvas.height = Math.round(shape.height * scale);
    this.canvas.style.height = `${shape.height}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = "10px sans-serif";
    this.drawCells(pen, shape, bytes);
    this.drawNames(pen, shape);
    this.drawStages(pen, shape);
    this.drawCut(pen, shape);
    this.frameCell(pen, shape, this.hover, 1);
    this.frameCell(pen, shape, this.model.get("selected"), 2.5);
    // For tests: what has just been drawn, and where.
    Object.assign(this.canvas.dataset, {
      cells: bytes.join(""), cut: this.model.get("shown").cut.join(" "),
      geometry: JSON.stringify({ ...shape, left: LEFT, top: TOP }),
      selected: this.model.get("selected")?.join(" ") ?? "",
    });
  }

  drawCells(pen, { across, down }, bytes) {
    const { layers, chunks, ranks } = this.board, gap = across > 8 && down > 6 ? 1 : 0.5;
    const colours = STATES.map((_, state) => this.colour(state)), part = (across - gap) / ranks;
    let n = 0;
    for (let layer = 0; layer < layers; layer++) {
      for (let chunk = 0; chunk < chunks.length; chunk++) {
        const x = LEFT + chunk * across, y = TOP + layer * down;
        for (let rank = 0; rank < ranks;) {
          let end = rank + 1; // neighbours alike are one rectangle
          while (end < ranks && bytes[n + end] === bytes[n + rank]) end++;
          pen.fillStyle = colours[bytes[n + rank]];
          pen.fillRect(x + rank * part, y, (end - rank) * part, down - gap);
          rank = end;
        }
        n += ranks;
      }
    }
  }

  drawNames(pen, { across, down }) {
    const { layers, chunks } = this.board;
    pen.fillStyle = this.colour("faint");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (let layer = 0; layer < layers; layer += Math.ceil(11 / down)) {
      pen.fillText(`l${layer}`, LEFT - 5, TOP + (layer + 0.5) * down);
    }
    pen.textAlign = "center";
    for (let chunk = 0; chunk < chunks.length; chunk += Math.ceil(26 / across)) {
      pen.fillText(`c${chunk}`, LEFT + (chunk + 0.5) * across, TOP - 8);
    }
  }

  drawStages(pen, { across, down }) {
    const { owners, layers, chunks } = this.board;
    let first = 0;
    for (let layer = 1; layer <= layers; layer++) {
      if (layer < layers && owners[layer] === owners[first]) continue;
      const y = TOP + first * down, high = (layer - first) * down;
      pen.fillStyle = this.colour("soft");
      pen.fillRect(4, y, 18, high - 2);
      pen.save();
      pen.translate(13, y + high / 2 - 1);
      pen.rotate(-Math.PI / 2);
      pen.fillStyle = this.colour("text");
      pen.textAlign = "center";
      pen.fillText(high > 44 ? `rank ${owners[first]}` : high > 12 ? `${owners[first]}` : "", 0, 0);
      pen.restore();
      if (layer < layers) line(pen, [[LEFT, TOP + layer * down], [LEFT + chunks.length * across, TOP + layer * down]],
        this.colour("text"), 1, [3, 3]);
      first = layer;
    }
  }

  drawCut(pen, { across, down }) {
    const points = [[LEFT, TOP]];
    this.model.get("shown").cut.forEach((depth, chunk) => {
      points.push([LEFT + chunk * across, TOP + depth * down], [LEFT + (chunk + 1) * across, TOP + depth * down]);
    });
    line(pen, points, this.colour("back"), 5);
    line(pen, points, this.colour("cut"), 2.5);
  }

  frameCell(pen, { across, down }, cell, wide) {
    if (!cell) return;
    const box = [LEFT + cell[1] * across - 1, TOP + cell[0] * down - 1, across + 1, down + 1];
    pen.lineWidth = wide + 2;
    pen.strokeStyle = this.colour("back");
    pen.strokeRect(...box);
    pen.lineWidth = wide;
    pen.strokeStyle = this.colour("text");
    pen.strokeRect(...box);
  }
}

function line(pen, points, colour, wide, dash = []) {
  pen.beginPath();
  pen.setLineDash(dash);
  points.forEach(([x, y]) => pen.lineTo(x, y));
  pen.lineWidth = wide;
  pen.strokeStyle = colour;
  pen.stroke();
  pen.setLineDash([]);
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
