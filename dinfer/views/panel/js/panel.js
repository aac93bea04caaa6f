// The panel in the browser: shows what the kernel sends and reports which button was pressed. It knows a run only by the
// traits of panel.py: `board` (what does not change), `shown` (what does), `cells` (the states, packed), `marks`.
// panel.py puts the other scripts before it; together they are one module.

const KERNEL_SILENT_MS = 700;
const SILENT = "The kernel has not answered yet";
const NOTES = 3; // on blocks that share a cell, the first
const ZOOMS = [["+", "zoom in", (map, block) => map.zoomBy(0.5, block)], ["−", "zoom out", (map, block) => map.zoomBy(2, block)],
  ["all", "see all", (map) => map.zoomBy(Infinity)]];
const ZOOM_KEYS = { "+": "+", "=": "+", "-": "−", 0: "all" };

class View {
  constructor(model, el) {
    this.model = model;
    this.board = model.get("board");
    this.name = Math.random().toString(36).slice(2);
    this.asked = 0;
    this.unit = "layer";
    this.hover = null;
    this.resting = this.mouse = ""; // where the mouse was when a key moved the selection, and where it is now
    this.hint = "";
    this.silent = new Map(); // message → timer that reports that the kernel has not answered
    this.tab = "map";
    this.build(el);
    this.map = new BlockMap(this.canvas, this.root, this.board, () => this.look(), (text) => this.scope(text));
    this.follow();
    this.themed = new Theme(this.root, () => this.theme());
    this.update();
  }

  // -- the page

  build(el) {
    this.root = make("div", "panel", el);
    this.root.classList.toggle("dinfer-readonly", Boolean(this.board.read_only)); // panel.css hides what moves a run
    this.root.tabIndex = -1; // a click anywhere gives it the keyboard
    const bar = make("div", "bar", this.root);
    for (const button of BUTTONS) button ? this.button(bar, ...button) : make("span", "gap", bar);
    this.pace = make("select", "", bar);
    this.pace.title = "how fast ▶ play goes, and by what: the unit of the last step";
    this.pace.setAttribute("aria-label", "speed of play");
    bar.querySelector("[data-do=pause]").before(this.pace);
    bar.querySelector("[data-do=undo]").setAttribute("aria-label", "undo");
    const send = (message) => this.send(message), leave = () => this.root.focus({ preventScroll: true });
    if (this.board.verbs) {
      this.actions = new ActionBar(this.root, this.board, { send, leave, selected: () => this.model.get("selected") });
    }
    this.banner = new Banner(this.root, this.board.severities, (message) => this.send(message), () => this.update());
    this.why = new WhySection(this.root, this.name, (message) => this.send(message));
    this.nonfinite = make("div", "nonfinite", this.root);
    this.nonfinite.dataset.severity = "warning";
    this.faults = make("div", "faults", this.root);
    this.faults.dataset.severity = "warning";
    make("b", "", this.faults, `${this.board.severities.warning} warning`);
    this.faultLines = make("span", "", this.faults);
    const disarm = make("button", "", this.faults, "disarm");
    Object.assign(disarm, { title: "run.faults.clear()", onclick: () => this.send({ do: "clear_faults" }) });
    this.tabs = make("div", "tabs", this.root);
    this.tabs.setAttribute("role", "tablist");
    const asking = make("div", "fields asking", this.root), answers = make("div", "answers", this.root);
    this.pages = Object.fromEntries(TABS.map((name) => [name, this.page(name)]));
    this.state = make("span", "state", this.tabs);
    make("span", "keys", this.tabs, "keys ⓘ").title = this.board.read_only ? READING_KEYS : KEYS;
    this.buildMap(make("div", "body", this.pages.map));
    this.runs = new RunsView(this.pages.runs, this.name, send, (block) => this.lead(block));
    this.tabs.querySelector("[data-tab=runs]").hidden = !this.board.runs;
    this.inspector = new Inspector(this.pages.KV, this.root, this.board, this.name, send);
    this.communication = new Communication(this.pages.communication, this.root, this.board, this.name, send);
    this.buildTime(asking, answers, send);
    const call = make("div", "call last", this.root);
    this.call = copyable(call, "last call");
    this.working = make("span", "working", call);
    this.log = this.board.verbs ? new CallLogView(this.root, this.name, send) : null;
    this.open("map");
  }

  buildTime(bar, parent, send) {
    this.time = new TimeStrip(bar, parent, this.root, this.board, this.name, {
      send,
      select: (block) => this.lead(block),
      rank: (rank) => this.ranks.point(rank),
      changed: () => this.update(),
    });
    this.finder = new FindBox(bar, parent, this.board, this.name, {
      send,
      lead: (hit) => this.time.lead(hit),
      found: (blocks) => {
        this.found = blocks;
        this.map?.draw();
      },
      leave: () => this.root.focus({ preventScroll: true }),
    });
  }

  // To a block on the map, from a hit or from something on the strip.
  lead(block) {
    if (this.tab !== "map") this.open("map");
    this.rest();
    this.select(block);
  }

  page(name) {
    const button = make("button", "", this.tabs, name), page = make("div", "page", this.root);
    button.dataset.tab = name;
    button.setAttribute("role", "tab");
    button.onclick = () => this.open(name);
    page.setAttribute("role", "tabpanel");
    page.setAttribute("aria-label", name);
    return page;
  }

  open(name) {
    this.tab = name;
    this.keepFocus(() => {
      for (const tab of TABS) this.pages[tab].hidden = tab !== name;
    });
    this.tabs.querySelectorAll("[data-tab]").forEach((button) => {
      button.classList.toggle("dinfer-on", button.dataset.tab === name);
      button.setAttribute("aria-selected", button.dataset.tab === name);
    });
    const pages = { KV: this.inspector, communication: this.communication, runs: this.runs };
    for (const tab of Object.keys(pages)) if (tab !== name) pages[tab].close();
    pages[name]?.open();
  }

  // If the focused element disappears, the panel gets the focus, so that its keys keep working.
  keepFocus(change) {
    const focused = document.activeElement, had = this.root.contains(focused);
    change();
    if (had && (!this.root.contains(focused) || focused.disabled || focused.closest("[hidden]"))) {
      this.root.focus({ preventScroll: true });
    }
  }

  buildMap(body) {
    const map = make("div", "map", body);
    this.canvas = make("canvas", "", map);
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("aria-label", "map of blocks by layer and chunk; arrow keys move the selection");
    this.scopeLine = make("div", "scope", map);
    this.scopeText = make("span", "", this.scopeLine);
    for (const [text, title, act] of ZOOMS) {
      Object.assign(make("button", "", this.scopeLine, text), { title, onclick: () => act(this.map, this.model.get("selected")) });
    }
    drawLegend(make("div", "legend", map), this.board);
    const side = make("div", "side", body);
    this.block = make("div", "block", side);
    this.stops = new BreakpointList(side, this.board, (message) => this.send(message), () => this.root.focus({ preventScroll: true }));
    this.text = make("div", "text", side);
    this.ranks = new RankList(side, this.board);
  }

  button(bar, text, action, title, key) {
    const button = make("button", "", bar, text);
    button.title = key ? `${title}  [${key}]` : title;
    button.dataset.do = action;
    button.onclick = () => this.press(action);
  }

  follow() {
    const canvas = this.canvas;
    const onState = () => this.keepFocus(() => this.update());
    this.listeners = Object.entries({
      "change:shown": onState,
      "change:cells": onState,
      "change:marks": onState,
      "change:log": onState,
      "change:selected": () => this.update(),
      "msg:custom": (message, buffers) => this.hear(message, buffers),
      comm_live_update: () => this.lose(), // sent by ipywidgets when its kernel restarts
    });
    this.listeners.forEach(([event, listener]) => this.model.on(event, listener));
    canvas.onmousemove = (event) => this.move(event);
    canvas.onmouseleave = () => this.point(null);
    canvas.onclick = (event) => this.click(event);
    canvas.ondblclick = () => this.toggleBreakpoint(this.clicked);
    this.root.onkeydown = (event) => this.key(event);
    this.releaseKeys = keepKeys(this.root);
  }

  close() {
    this.listeners.forEach(([event, listener]) => this.model.off(event, listener));
    this.releaseKeys();
    this.map.close();
    this.inspector.remove();
    this.communication.remove();
    this.time.close();
    this.finder.close();
    this.themed.close();
    this.silent.forEach(clearTimeout);
  }

  // The kernel was restarted, or this panel was saved with the notebook: it stays disconnected.
  lose() {
    this.lost = true;
    this.hint = "";
    this.silent.forEach(clearTimeout);
    this.keepFocus(() => {
      this.time.end();
      this.runs.end(this.ended);
      this.finder.close();
      this.update();
    });
  }

  get ended() {
    return this.lost ? this.model.lost ?? LOST : this.model.get("shown").over;
  }

  // Disable what cannot work any more: controls that need ranks and, without a kernel, those that need it.
  disable() {
    this.root.querySelectorAll(this.lost ? `${NEED_RANKS}, ${NEED_KERNEL}` : NEED_RANKS).forEach((one) => { one.disabled = true; });
    this.inspector.end(this.ended);
  }

  theme() {
    this.map.draw();
    this.inspector.theme();
    this.communication.theme();
    this.time.draw();
  }

  // -- user actions

  press(action) {
    if (this.ended || (this.board.read_only && !ASKING.includes(action))) return;
    const [verb, unit] = action.split(":");
    const block = this.model.get("selected");
    this.hint = "";
    if (unit) this.unit = unit;
    if (verb === "run_to") {
      if (block) this.send({ do: verb, layer: block[0], chunk: block[1] });
      else this.hint = "Click a block of the map first: the run then stops once all ranks hold that block.";
    } else if (verb === "resume" && this.pace.value) {
      this.send({ do: "play", unit: this.unit, per_second: Number(this.pace.value) });
    } else {
      this.send({ do: verb, unit: this.unit });
    }
    this.update();
  }

  send(message) {
    if (this.lost) return;
    const id = `${this.name}:${this.asked++}`;
    this.silent.set(id, setTimeout(() => {
      this.hint = `${SILENT}: it is busy with a cell, or has ended. Your action is waiting for it.`;
      this.update();
    }, KERNEL_SILENT_MS));
    this.model.send({ ...message, id });
  }

  hear(message, buffers) {
    if (message.heard) this.heard(message.heard);
    this.inspector.hear(message, buffers);
    this.communication.hear(message, buffers);
    this.time.hear(message, buffers);
    this.finder.hear(message);
    this.runs.hear(message, this.board.severities);
    this.log?.hear(message);
    this.why.hear(message);
  }

  heard(id) {
    if (!this.silent.has(id)) return;
    clearTimeout(this.silent.get(id));
    this.silent.delete(id);
    if (this.silent.size || !this.hint.startsWith(SILENT)) return;
    this.hint = "";
    this.update();
  }

  // A page that scrolls under a resting mouse sends this event, too; only real moves count.
  move(event) {
    this.mouse = `${event.screenX} ${event.screenY}`;
    if (this.mouse === this.resting) return;
    this.resting = "";
    this.point(this.map.blocksAt(event));
  }

  // Describe the selection until the mouse moves.
  rest() {
    this.hover = null;
    this.resting = this.mouse;
  }

  point(blocks) {
    if (JSON.stringify(blocks) === JSON.stringify(this.hover)) return;
    this.hover = blocks;
    this.update();
  }

  // Select a block; of a cell of several, zoom in to it. A double click then ends with its first, and sets no breakpoint.
  click(event) {
    if (event.detail > 1 && !this.clicked) return;
    const blocks = this.map.blocksAt(event), block = blocks && this.map.tellingOf(blocks);
    this.clicked = blocks && isOne(blocks) ? block : null;
    if (blocks && !this.clicked) {
      this.map.zoomTo(blocks);
      this.rest();
    }
    this.select(block);
  }

  select(cell) {
    if (!cell) return;
    this.hint = "";
    this.model.set("selected", cell); // not saved: only other views of this panel need it
    this.inspector.look(...cell);
    this.map.reveal(cell);
    this.update();
  }

  toggleBreakpoint(cell) {
    if (!cell || this.ended || this.board.read_only) return;
    const [layer, chunk] = cell;
    const here = this.model.get("shown").breakpoints.find((one) => one.layer === layer && one.chunk === chunk);
    this.send(here ? { do: "remove_breakpoint", number: here.number } : { do: "break_at", layer, chunk });
  }

  key(event) {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" && event.target.closest("button, summary")) return;
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const button = BUTTONS.find((one) => one && one[3] && one[3] === event.key);
    const zoom = this.tab === "map" && ZOOMS.find(([text]) => text === (ZOOM_KEYS[event.key] ?? ""));
    const tab = TABS[event.key - 1], isThere = tab && !this.tabs.querySelector(`[data-tab=${tab}]`).hidden;
    if (step) this.moveSelection(...step);
    else if (zoom) zoom[2](this.map, this.model.get("selected"));
    else if (button) this.press(button[1]);
    else if (event.key === "Enter") this.toggleBreakpoint(this.model.get("selected"));
    else if (event.key === "t") this.time.toggle();
    else if (event.key === "/") this.finder.focus();
    else if (isThere) this.open(tab);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  moveSelection(down, right) {
    this.rest();
    const [layer, chunk] = this.model.get("selected") ?? [0, 0], { perLayer, perChunk } = this.map.geometry(); // by a cell
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.select([within(layer + down * perLayer, this.board.layers), within(chunk + right * perChunk, this.board.chunks.length)]);
  }

  // -- updates from the kernel

  update() {
    const shown = this.model.get("shown");
    if (!shown.ranks) return;
    const tokens = shown.decoded ? ` · ${shown.decoded} token${shown.decoded === 1 ? "" : "s"}` : "";
    const isGrave = ["warning", "error"].includes(shown.state_severity);
    const state = shown.playing ? "playing" : shown.state;
    this.state.textContent = `${isGrave ? `${this.board.severities[shown.state_severity]} ` : ""}${state}${tokens}`;
    this.state.dataset.severity = isGrave ? shown.state_severity : "";
    Object.assign(this.root.dataset, { state: shown.state, done: shown.done });
    this.banner.show(shown, this.ended || this.board.read_only, this.lost, [this.hint.startsWith(SILENT) ? "warning" : "note", this.hint]);
    this.why.show(shown);
    this.nonfinite.textContent = `${this.board.severities.warning} ${shown.nonfinite}`;
    this.nonfinite.hidden = !shown.nonfinite;
    this.faultLines.textContent = shown.faults.join("\n");
    this.faults.hidden = !shown.faults.length;
    this.showUnit();
    this.text.hidden = !shown.text;
    if (this.text.textContent !== shown.text) {
      this.text.textContent = shown.text;
      this.text.scrollTop = this.text.scrollHeight;
    }
    this.call(shown.call);
    this.runs.follow(shown);
    this.communication.follow(this.ended ? null : shown);
    const log = this.model.get("log") ?? NO_CALLS, undo = this.root.querySelector("[data-do=undo]");
    this.log?.show(log);
    undo.title = `run.undo(): undo ${log.undo || "the last action, whatever it was"}; again: the one before it  [u]`;
    this.stops.show(shown.breakpoints);
    const waiting = shown.waiting ? `, then ${shown.waiting}` : "";
    const working = [shown.playing, ...shown.working].filter(Boolean).join(", ");
    this.working.textContent = working && `at work: ${working}${waiting}`;
    this.time.follow(shown);
    this.ranks.show(this.time.ranksOf(shown.ranks));
    this.describe();
    this.map.draw();
    if (this.ended) this.disable();
  }

  // The unit by which back and play go: that of the last step.
  showUnit() {
    if (this.unit === this.unitShown) return;
    this.unitShown = this.unit;
    const back = this.root.querySelector("[data-do=step_back]"), pace = this.pace.value;
    back.textContent = `◀ ${this.unit}`;
    back.setAttribute("aria-label", `back by one ${this.unit}`);
    back.title = `run.step_back("${this.unit}"): undo the last ${this.unit} in the global order; the unit is that of the last step  [b]`;
    fill(this.pace, PACES.map((count) => [count, count ? `${plural(Number(count), this.unit)}/s` : "full speed"]));
    this.pace.value = pace;
    this.root.querySelectorAll("[data-do^='step:']").forEach((button) => {
      button.classList.toggle("dinfer-unit", button.dataset.do === `step:${this.unit}`);
    });
  }

  // Unpacked once for each message.
  bytes() {
    if (this.time.cells) return this.time.cells;
    const view = this.model.get("cells");
    if (view !== this.packed) [this.packed, this.cells] = [view, unpacked(view, this.board)];
    return this.cells;
  }

  scope(text) {
    this.scopeText.textContent = text;
    this.keepFocus(() => { this.scopeLine.hidden = !text; });
  }

  look() {
    const selected = this.model.get("selected"), { cut, breakpoints } = this.model.get("shown");
    return { bytes: this.bytes(), cut: this.time.cut ?? cut, breakpoints, selected, hover: this.hover, found: this.found };
  }

  describe() {
    const selected = this.model.get("selected");
    const blocks = this.hover ?? (selected && justBlock(selected));
    this.block.replaceChildren();
    if (!blocks) make("span", "", this.block, "Point at a block to see who holds it; click to select it.");
    else if (isOne(blocks)) this.describeOne(blocks.layers[0], blocks.chunks[0]);
    else this.describeSeveral(blocks);
  }

  describeOne(layer, chunk) {
    const { owners, chunks, labels, ranks } = this.board, [begin, end] = chunks[chunk];
    const first = (layer * chunks.length + chunk) * ranks, bytes = [...this.bytes().subarray(first, first + ranks)];
    const line = make("div", "", this.block);
    make("b", "", line, `block c${chunk} l${layer}`);
    line.append(` · tokens ${begin}–${end - 1} · owner rank ${owners[layer]}${this.hover ? "" : " · selected"}`);
    make("div", "", this.block, holders(bytes.map((byte) => byte & BASE)));
    const told = this.time.cells ? null : this.model.get("marks")[`${layer} ${chunk}`]; // notes are of now, and not all are sent
    const notes = told ?? marksOf(bytes, this.board);
    for (const text of notes) make("div", "mark", this.block, text);
    if (labels[chunk]) make("q", "", this.block, shorten(labels[chunk]));
  }

  describeSeveral({ layers, chunks }) {
    const { chunks: spans, ranks } = this.board, bytes = this.bytes(), counts = new Map(), notes = [];
    for (let layer = layers[0]; layer < layers[1]; layer++) {
      for (let chunk = chunks[0]; chunk < chunks[1]; chunk++) {
        const first = (layer * spans.length + chunk) * ranks, own = bytes.subarray(first, first + ranks);
        const state = URGENT[Math.max(...own.map((byte) => URGENT.indexOf(byte & BASE)))];
        counts.set(state, (counts.get(state) ?? 0) + 1);
        for (const text of marksOf(own, this.board)) notes.push(`c${chunk} l${layer}: ${text}`);
      }
    }
    const line = make("div", "", this.block);
    make("b", "", line, `chunks ${between(chunks)}, ${layers[1] - layers[0] > 1 ? "layers" : "layer"} ${between(layers)}`);
    line.append(` · tokens ${spans[chunks[0]][0]}–${spans[chunks[1] - 1][1] - 1} · click to zoom in`);
    const words = [...counts].sort().map(([state, count]) => `${this.board.states[state]}: ${plural(count, "block")}`);
    make("div", "", this.block, words.join(", "));
    for (const text of notes.slice(0, NOTES)) make("div", "mark", this.block, text);
    if (notes.length > NOTES) make("div", "mark", this.block, `and ${number(notes.length - NOTES)} more`);
  }
}

// The marks that ranks have on a block, in words.
function marksOf(bytes, board) {
  return EVERY_MARK.flatMap((mark, which) => {
    const ranks = [...bytes.keys()].filter((rank) => bytes[rank] & mark);
    return ranks.length ? [`${board.marks[which]} on rank${ranks.length > 1 ? "s" : ""} ${ranks.join(", ")}`] : [];
  });
}
