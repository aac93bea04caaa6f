// What stands beside the heatmap of the KV page: the next difference, values that are watched over steps, a histogram,
// heads over layers, the drift from the reference, and files to take along. kv_tools.py answers.

const HISTOGRAM_STEPS = 5; // of the 251 of a heatmap's byte, that share a bar
const WATCHED_LINES = 6; // of a watched value: the last ones
const GRID = { left: 34, top: 16, cell: 18, most: 300 }; // pixels of a map of layers
const LARGEST = 3; // places that are named below such a map
const TENSOR_LETTERS = ["K", "V"];

class KvTools {
  // `inspector` has what is shown; the parts are put into `bar`, `side` and `below`.
  constructor(bar, side, below, inspector) {
    Object.assign(this, { inspector, pins: [], history: new Map(), at: null });
    this.button(bar, "◀ difference", "the value before that differs between ranks", () => this.step(false)).dataset.tool = "before";
    this.button(bar, "difference ▶", "the next value that differs between ranks, in any layer", () => this.step(true)).dataset.tool = "next";
    make("span", "gap", bar);
    this.button(bar, "heads × layers", "each head of each layer in one figure, of rank A", () => this.ask("heads", {
      tensor: this.inspector.want.tensor, rank: this.inspector.want.a })).dataset.tool = "heads";
    this.button(bar, "drift", 'run.compare("reference"): how far each block is from transformers’ own', () => this.ask("drift"))
      .dataset.tool = "drift";
    make("span", "gap", bar);
    make("span", "faint", bar, "take along");
    for (const form of ["csv", "safetensors"]) {
      this.button(bar, form === "csv" ? "CSV" : form, `run.kv(layer=…, rank=A).to_${form}(…): K and V of this layer as a file`,
        () => this.ask("export", { form, layer: this.inspector.want.layer, rank: this.inspector.want.a })).dataset.tool = form;
    }
    const frame = make("span", "copy-call", bar);
    this.frame = copyable(frame, "");
    this.said = make("div", "faint said-tool", below);
    this.said.setAttribute("role", "status");
    this.grid = make("div", "grid", below);
    this.grid.hidden = true;
    this.bars = make("div", "histogram", side);
    this.list = make("div", "pins", side);
    this.list.setAttribute("role", "group");
    this.list.setAttribute("aria-label", "watched values");
  }

  button(bar, text, title, onclick) {
    return Object.assign(make("button", "", bar, text), { title, onclick });
  }

  ask(tool, fields = {}) {
    this.say(tool === "drift" ? "comparing with the reference …" : "");
    this.inspector.send({ do: "kv_tool", tool, view: this.inspector.name, ...fields });
  }

  say(text, severity = "") {
    this.said.textContent = text;
    this.said.dataset.severity = severity;
  }

  hear({ kv_tool: found }, buffers) {
    if (found?.view !== this.inspector.name) return;
    if (found.error) this.say(found.error, found.severity);
    else ({ difference: () => this.lead(found), pins: () => this.watched(found), export: () => this.keep(found, buffers[0]),
      heads: () => this.heads(found), drift: () => this.drift(found) })[found.tool]?.();
  }

  // -- differences

  step(forward) {
    this.ask("difference", { at: this.at, forward });
  }

  lead({ none, severity, place, a, b, show, which, count, chunk, text }) {
    if (none) return this.say(none, severity);
    this.at = [place.layer, place.tensor, place.token, place.head, place.dim];
    this.say(`${number(which)} of ${number(count)}: ${text}`);
    this.inspector.go({ layer: place.layer, tensor: TENSOR_LETTERS[place.tensor], a, b, show, chunk, head: null },
      [place.head, place.token, place.dim]);
  }

  // -- watched values

  pin([head, token, dim]) {
    const { layer, tensor } = this.inspector.want, one = [layer, TENSOR_LETTERS.indexOf(tensor), token, head, dim];
    this.setPins(this.pins.some((pin) => String(pin) === String(one)) ? this.pins : [...this.pins, one]);
  }

  setPins(pins) {
    this.pins = pins;
    for (const key of this.history.keys()) if (!pins.some((pin) => String(pin) === key)) this.history.delete(key);
    this.inspector.send({ do: "kv_tool", tool: "pins", view: this.inspector.name, pins });
    if (!pins.length) this.list.replaceChildren();
  }

  watched({ pins, values, call }) {
    pins.forEach((pin, n) => {
      if (!this.pins.some((one) => String(one) === String(pin))) return; // it was let go meanwhile
      const lines = this.history.get(String(pin)) ?? [], last = lines.at(-1);
      if (String(last?.values) !== String(values[n])) lines.push({ call, values: values[n] });
      this.history.set(String(pin), lines.slice(-WATCHED_LINES));
    });
    this.list.replaceChildren();
    if (this.pins.length) make("b", "", this.list, "watched");
    for (const pin of this.pins) this.showPin(pin, this.history.get(String(pin)) ?? []);
  }

  showPin(pin, lines) {
    const [layer, tensor, token, head, dim] = pin, name = `${TENSOR_LETTERS[tensor]} layer ${layer} head ${head} token ${token} dim ${dim}`;
    const box = make("div", "pin", this.list), first = make("div", "value", box);
    make("span", "", first, name);
    const copy = this.button(first, "copy", "copy the values", () => {
      navigator.clipboard?.writeText([name, ...lines.map((line) => [line.call, ...line.values].join("\t"))].join("\n"))
        .then(() => this.say(`copied: ${name}`), () => this.say("the page may not write to the clipboard", "warning"));
    });
    copy.setAttribute("aria-label", `copy ${name}`);
    this.button(first, "×", `stop watching ${name}`, () => this.setPins(this.pins.filter((one) => one !== pin)))
      .setAttribute("aria-label", `stop watching ${name}`);
    const table = make("table", "", box), top = make("tr", "", table);
    make("th", "", top, "after");
    (lines[0]?.values ?? []).forEach((_, rank) => make("th", "", top, `rank ${rank}`));
    for (const { call, values } of lines) {
      const row = make("tr", "", table);
      make("td", "", row, call || "the beginning");
      values.forEach((value) => make("td", values.some((one) => one !== values[0]) ? "nan" : "", row, value));
    }
  }

  // -- the histogram of what is shown

  show(head, codes) {
    this.frame(`run.kv(layer=${head.layer}, rank=${head.show === "b" ? head.b : head.a}).to_frame()`);
    const counts = new Uint32Array(256), bars = new Array(Math.ceil(251 / HISTOGRAM_STEPS)).fill(0);
    for (let n = 0; n < codes.length; n++) counts[codes[n]]++;
    for (let code = NAN_CODE + 1; code < PLUS_INF; code++) bars[Math.floor((code - 1) / HISTOGRAM_STEPS)] += counts[code];
    const most = Math.max(1, ...bars), all = bars.reduce((sum, count) => sum + count, 0), top = Number(head.top.toPrecision(3));
    this.bars.replaceChildren();
    const row = make("div", "bars", this.bars);
    row.setAttribute("role", "img");
    const beyond = bars[0] + bars.at(-1);
    row.setAttribute("aria-label", `histogram of ${number(all)} values from −${top} to +${top}; most are near `
      + `${((bars.indexOf(most) - (bars.length - 1) / 2) * HISTOGRAM_STEPS / 125 * top).toPrecision(2)}; ${number(beyond)} at or beyond the ends`);
    row.title = row.getAttribute("aria-label");
    for (const count of bars) {
      make("i", "", row).style.height = `${count ? Math.max(2, (100 * Math.log1p(count)) / Math.log1p(most)) : 0}%`;
    }
    make("div", "faint", this.bars, "how many values, by size (logarithmic)");
  }

  // -- maps of layers

  heads({ fields, values, rank, letter, call }) {
    const draw = (field) => this.map({
      rows: values[field].map((row) => row ?? []), column: "head", short: (n) => `h${n}`, long: (n) => `head ${n}`, top: `${field} of ${letter} on rank ${rank}`, call,
      lead: (layer, head) => this.inspector.go({ layer, head, tensor: letter, show: "a" }),
    });
    draw(fields[0]);
    const choose = make("select", "", this.gridBar);
    choose.setAttribute("aria-label", "figure of heads");
    fill(choose, fields.map((field) => [field, field]));
    choose.onchange = () => {
      draw(choose.value);
      this.gridBar.append(choose);
    };
  }

  drift({ shares, verdict, severity, call }) {
    this.say(verdict, severity);
    const { owners, chunks } = this.inspector.board;
    const rows = owners.map(() => new Array(chunks.length).fill(null));
    for (const [layer, chunk, k, v] of shares) if (rows[layer]) rows[layer][chunk] = larger(k, v);
    this.map({ rows, column: "chunk", short: (n) => (n < chunks.length ? `c${n}` : "new"), long: (n) => (n < chunks.length ? `chunk ${n}` : "new tokens"),
      top: "largest difference from the reference, as a share of the block’s largest value", call,
      lead: (layer, chunk) => this.inspector.go({ layer, chunk }) });
  }

  // `rows[layer][column]`: numbers, null where there is nothing, a text for NaN and Inf.
  map(shown) {
    this.shown = shown;
    this.grid.hidden = false;
    this.grid.replaceChildren();
    this.gridBar = make("div", "fields", this.grid);
    make("b", "", this.gridBar, shown.top);
    copyable(make("span", "copy-call", this.gridBar), "")(shown.call);
    this.button(this.gridBar, "close", "close this map", () => { this.grid.hidden = true; });
    this.canvas = make("canvas", "", this.grid);
    this.canvas.setAttribute("role", "img");
    this.canvas.onclick = (event) => this.placed(event, (row, column) => shown.lead(row, column));
    this.canvas.onmousemove = (event) => this.placed(event, (row, column, value) => {
      this.canvas.title = `layer ${row}, ${shown.long(column)}: ${value ?? "nothing"}`;
    });
    const places = shown.rows.flatMap((row, layer) => row.map((value, column) => [sized(value), layer, column, value]))
      .filter(([, , , value]) => value !== null).sort((a, b) => b[0] - a[0]).slice(0, LARGEST);
    this.canvas.setAttribute("aria-label", `map of layers by ${shown.column}: ${shown.top}`);
    const list = make("div", "fields", this.grid);
    make("span", "faint", list, "largest");
    for (const [, layer, column, value] of places) {
      this.button(list, `layer ${layer}, ${shown.long(column)}: ${typeof value === "number" ? shortNumber(value) : value}`,
        "show it above", () => shown.lead(layer, column));
    }
    this.draw();
  }

  size() {
    const { rows } = this.shown, columns = Math.max(1, ...rows.map((row) => row.length));
    const wide = Math.max(1, Math.min(GRID.cell * 3, (this.grid.clientWidth - GRID.left - 8) / columns));
    return { columns, wide, high: Math.max(1, Math.min(GRID.cell, GRID.most / rows.length)) };
  }

  placed(event, tell) {
    const { columns, wide, high } = this.size(), { rows } = this.shown;
    const column = Math.floor((event.offsetX - GRID.left) / wide), row = Math.floor((event.offsetY - GRID.top) / high);
    if (column >= 0 && column < columns && row >= 0 && row < rows.length) tell(row, column, rows[row][column]);
  }

  draw() {
    if (!this.shown || this.grid.hidden) return;
    const { rows } = this.shown, { columns, wide, high } = this.size(), scale = window.devicePixelRatio || 1;
    const style = getComputedStyle(this.inspector.root), colour = (name) => style.getPropertyValue(`--dinfer-${name}`).trim();
    const width = GRID.left + columns * wide + 2, height = GRID.top + rows.length * high + 2;
    Object.assign(this.canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    const pen = this.canvas.getContext("2d"), numbers = rows.flat().filter((value) => typeof value === "number").map(Math.abs);
    const most = numbers.reduce((one, other) => Math.max(one, other), 0) || 1;
    pen.scale(scale, scale);
    pen.font = "10px sans-serif";
    pen.textBaseline = "middle";
    // Small cells overlap by less than a pixel; the largest are drawn last, so that none of them is lost.
    const cells = rows.flatMap((row, layer) => row.map((value, column) => ({ value, layer, column })));
    cells.filter(({ value }) => value !== null && value !== undefined).sort((a, b) => sized(a.value) - sized(b.value)).forEach(({ value, layer, column }) => {
      const box = [GRID.left + column * wide, GRID.top + layer * high, Math.max(1, wide - (wide > 6)), Math.max(1, high - (high > 5))];
      pen.fillStyle = colour("0");
      pen.fillRect(...box);
      pen.globalAlpha = typeof value === "number" ? Math.abs(value) / most : 1;
      pen.fillStyle = colour(typeof value === "number" ? (value < 0 ? "2" : "3") : "nonfinite");
      pen.fillRect(...box);
      pen.globalAlpha = 1;
    });
    pen.fillStyle = colour("faint");
    pen.textAlign = "right";
    const everyRow = Math.ceil(11 / high), everyColumn = Math.ceil(26 / wide);
    for (let layer = 0; layer < rows.length; layer += everyRow) pen.fillText(`l${layer}`, GRID.left - 4, GRID.top + (layer + 0.5) * high);
    pen.textAlign = "center";
    for (let n = 0; n < columns; n += everyColumn) pen.fillText(this.shown.short(n), GRID.left + (n + 0.5) * wide, 8);
    this.canvas.dataset.drawn = `${rows.length} ${columns}`; // for tests
  }

  // -- files

  keep({ file, call }, buffer) {
    const address = URL.createObjectURL(new Blob([buffer], { type: "application/octet-stream" }));
    const link = make("a", "", this.said);
    Object.assign(link, { href: address, download: file, hidden: true });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
    this.say(`${file}: ${call}`);
  }
}

// By size; what is not finite is larger than all that is.
function sized(value) {
  return typeof value === "number" ? Math.abs(value) : value === null || value === undefined ? -1 : Infinity;
}

function larger(one, other) {
  return sized(one) >= sized(other) ? one : other;
}

// Three digits; small ones as in 8.6e-5, not 0.000086.
function shortNumber(value) {
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : value.toPrecision(3);
}
