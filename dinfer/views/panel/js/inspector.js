// The KV inspector: choices of layer, head and ranks, the heatmap, and facts about it. It asks the kernel for a picture
// and says which one it has; the kernel answers once there is a newer one.

const SHOWS = [["a", "rank A"], ["b", "rank B"], ["a-b", "A − B"]];
const COLUMNS = ["head", "min", "max", "mean", "NaN, Inf", "zeros"];

class Inspector {
  // `send(message)` sends to the kernel.
  constructor(parent, root, board, name, send) {
    Object.assign(this, { root, board, name, send, have: "", asking: null, question: 0 });
    this.want = { layer: 0, chunk: 0, tensor: "K", head: null, a: 0, b: board.ranks - 1, show: "a", scale: "robust" };
    this.build(parent);
    this.map = new Heatmap(this.picture, root, (place) => this.point(place), (place) => this.tools.pin(place));
  }

  build(parent) {
    const bar = make("div", "fields", parent);
    const layers = this.board.owners.map((_, layer) => [layer, `layer ${layer}`]);
    const ranks = Array.from({ length: this.board.ranks }, (_, rank) => [rank, `rank ${rank}`]);
    this.layer = this.choice(bar, "layer", layers, Number);
    this.choice(bar, "tensor", [["K", "K"], ["V", "V"]], String);
    this.headField = this.choice(bar, "head", [["", "all heads"]], (value) => (value === "" ? null : Number(value)));
    make("span", "gap", bar);
    make("span", "faint", bar, "A");
    this.choice(bar, "a", ranks, Number);
    make("span", "faint", bar, "B");
    this.choice(bar, "b", ranks, Number).value = this.want.b;
    this.shows = SHOWS.map(([show, text]) => {
      const button = make("button", "", bar, text);
      button.dataset.show = show;
      button.onclick = () => this.change("show", show);
      return button;
    });
    make("span", "gap", bar);
    make("span", "faint", bar, "scale");
    this.choice(bar, "scale", [["robust", "robust"], ["full", "full"], ["own", "± …"]], String);
    this.own = make("input", "", bar);
    this.own.dataset.field = "own";
    Object.assign(this.own, { type: "number", min: 0, step: "any", value: 1, hidden: true, title: "the value at the end of the colours" });
    this.own.onchange = () => this.change("scale", Number(this.own.value));
    for (const [text, title, act] of [["+", "zoom in", () => this.map.zoomBy(0.5)], ["−", "zoom out", () => this.map.zoomBy(2)],
      ["all", "see all", () => this.map.zoomTo(null)]]) {
      const button = make("button", "", bar, text);
      Object.assign(button, { title, onclick: act });
    }
    this.moves = make("span", "moves", bar);
    for (const [text, title, chunk] of [["◀", "earlier tokens", () => this.chunks()[0] - 1],
      ["▶", "later tokens", () => this.chunks()[1]]]) {
      Object.assign(make("button", "", this.moves, text), { title, onclick: () => this.change("chunk", chunk()) });
    }
    this.moves.hidden = true;
    const body = make("div", "body", parent);
    this.picture = make("div", "map", body);
    const side = make("div", "side", body);
    this.hover = make("div", "spot", side);
    this.hover.setAttribute("role", "status");
    this.verdict = make("div", "verdict", side);
    this.colours = make("div", "scale", side);
    this.summary = make("div", "summary", side);
    this.summary.tabIndex = 0; // it may scroll
    this.summary.setAttribute("role", "region");
    this.summary.setAttribute("aria-label", "figures of each head");
    const tools = make("div", "fields tools", parent), below = make("div", "", parent);
    this.tools = new KvTools(tools, side, below, this);
    this.callText = make("div", "call", parent);
    this.call = copyable(this.callText, "");
    this.tell(null);
  }

  choice(bar, name, options, read) {
    const select = make("select", "", bar);
    select.dataset.field = name;
    select.setAttribute("aria-label", name.length === 1 ? `rank ${name.toUpperCase()}` : name);
    (this.fields ??= {})[name] = select;
    fill(select, options);
    select.onchange = () => this.change(name, read(select.value));
    return select;
  }

  change(name, value) {
    if (name === "scale") {
      this.own.hidden = typeof value === "string" && value !== "own";
      this.want.scale = value === "own" ? Number(this.own.value) : value;
    } else this.want[name] = value;
    this.ask(true);
  }

  // Show the block that is selected on the map.
  look(layer, chunk) {
    if (this.ended) return;
    const isSeen = this.head && (!this.head.seen || isIn(chunk, this.chunks()));
    if (!isSeen) this.want.chunk = chunk; // else the picture stays where it is
    if (isSeen && layer === this.want.layer) return;
    this.layer.value = layer;
    this.change("layer", layer);
  }

  // Show something else, and then, if it is given, a value of it: [head, token, dim].
  go(want, place = null) {
    if (this.ended) return;
    Object.assign(this.want, want);
    for (const [name, value] of Object.entries(this.want)) if (this.fields[name] && name !== "scale") this.fields[name].value = value ?? "";
    this.wanted = place;
    this.ask(true);
  }

  theme() {
    this.map.draw();
    this.tools.draw();
  }

  // The chunks of the picture, from the first until before the last.
  chunks() {
    const { starts, seen } = this.head, last = this.board.chunks.length;
    const end = starts.findIndex((start) => start >= seen[1]);
    return [starts.indexOf(seen[0]), end < 0 ? last : Math.min(last, end)];
  }

  open() {
    this.shown = true;
    this.ask(true);
  }

  close() {
    this.shown = false;
  }

  remove() {
    this.map.close();
  }

  // The kernel answers no more: the picture stays, or `why` is shown if there is none.
  end(why) {
    this.ended = why;
    if (!this.head) this.judge({ text: why, severity: "note" });
  }

  ask(anew = false) {
    if (!this.shown || this.ended) return;
    this.shows.forEach((button) => button.classList.toggle("dinfer-on", button.dataset.show === this.want.show));
    if (anew) {
      this.have = "";
      this.question++;
    }
    if (!this.head && !this.error) this.judge({ text: "The picture appears once the run has stopped.", severity: "note" });
    this.send({ do: "inspect", view: this.name, ...this.want, have: this.have, question: this.question });
  }

  hear(message, buffers) {
    const { kv, kv_diff: diff, value } = message;
    const isOurs = (answer) => answer?.view === this.name && answer.question === this.question; // not the answer to an earlier question
    if (isOurs(kv)) this.take(kv, buffers[0]);
    if (isOurs(diff)) this.judge(diff);
    this.tools.hear(message, buffers);
    if (value?.view === this.name) this.tell(value);
  }

  take(head, buffer) {
    this.have = head.stamp;
    this.error = head.error ?? "";
    if (head.error) this.judge({ text: head.error, severity: head.severity });
    else {
      const codes = new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength);
      this.head = Object.assign(head, { codes });
      if (this.headOptions !== head.all_heads) this.listHeads(head.all_heads);
      this.map.show(head, codes);
      this.describe(head);
      this.tools.show(head, codes);
      if (this.wanted) this.map.lookAt(this.wanted);
      this.wanted = null;
      if (this.pointed) this.point(this.pointed, true);
    }
    requestAnimationFrame(() => this.ask()); // once it has been drawn
  }

  listHeads(count) {
    this.headOptions = count;
    fill(this.headField, [["", "all heads"], ...Array.from({ length: count }, (_, head) => [head, `head ${head}`])]);
    this.headField.value = this.want.head ?? "";
  }

  judge({ text, severity }) {
    this.verdict.replaceChildren();
    this.verdict.dataset.severity = severity;
    if (!text) return;
    make("b", "", this.verdict, `${this.board.severities[severity]} ${severity}`);
    this.verdict.append(` ${text}`);
  }

  describe(head) {
    const what = { a: `rank ${head.a}`, b: `rank ${head.b}`, "a-b": `rank ${head.a} − rank ${head.b}` }[head.show];
    const [a, b] = head.held.map((count) => `${count} token${count === 1 ? "" : "s"}`);
    const held = head.a === head.b ? `rank ${head.a} holds ${a}`
      : a === b ? `ranks ${head.a} and ${head.b} both hold ${a}`
        : `rank ${head.a} holds ${a}, rank ${head.b} holds ${b}`;
    const marks = [head.nan && `${head.nan} NaN`, head.inf && `${head.inf} Inf`].filter(Boolean).join(", ");
    this.colours.replaceChildren();
    this.moves.hidden = !head.seen;
    if (head.seen) {
      const [first, end] = this.chunks(), all = this.board.chunks.length, [earlier, later] = this.moves.children;
      [earlier.disabled, later.disabled] = [first === 0, end === all];
      make("div", "", this.colours, `tokens ${between(head.seen)}: chunks ${between([first, end])} of ${number(all)}. `
        + "◀ ▶, or a block selected on the map, leads to others.");
    }
    make("div", "", this.colours, `${head.tensor} of layer ${head.layer}, ${what}, ${head.dtype}; ${held}`);
    const ramp = make("div", "ramp", this.colours);
    const top = Number(head.top.toPrecision(3));
    make("span", "", ramp, `−${top}`);
    make("i", "", ramp);
    make("span", "", ramp, `+${top}`);
    if (head.show === "a-b") {
      make("div", "", this.colours, differing(head.differ));
    }
    if (marks) make("div", "nan", this.colours, `${marks}: ringed`);
    this.summary.replaceChildren();
    const table = make("table", "", this.summary);
    const first = make("tr", "", table);
    COLUMNS.forEach((name) => make("th", "", first, name));
    for (const row of head.summary) {
      const cells = make("tr", "", table);
      row.forEach((text) => make("td", "", cells, text));
    }
    this.call(head.call);
  }

  // -- values

  point(place, anew = false) {
    if (!anew && String(place) === String(this.pointed)) return;
    this.pointed = place;
    if (!place) return this.tell(null);
    this.about(place);
    if (!this.asking) this.askValue();
  }

  askValue() {
    const [head, token, dim] = this.asking = this.pointed;
    this.send({ do: "value", view: this.name, head, token, dim });
  }

  // Until the exact values arrive: the value by its colour.
  about([head, token, dim]) {
    const { heads, tokens, dims, codes, top, show, first } = this.head;
    const code = codes[(heads.indexOf(head) * tokens + token - first) * dims + dim];
    const about = code === MISSING_CODE ? "not here" : code === NAN_CODE ? "NaN" : code === PLUS_INF ? "Inf"
      : code === MINUS_INF ? "−Inf" : `about ${(((code - ZERO_CODE) / 125) * top).toPrecision(2)}`;
    this.write([head, token, dim], "", [[{ a: "A", b: "B", "a-b": "A − B" }[show], about]]);
  }

  tell(value) {
    const asked = this.asking;
    this.asking = null;
    if (!value) {
      this.hover.replaceChildren();
      make("span", "", this.hover, "Point at a value to read it exactly. Click to watch it, drag to zoom in, double-click to see all; "
        + "arrows, Enter, + − 0 by key.");
      return;
    }
    if (String(value.at) !== String(this.pointed)) {
      if (asked && this.pointed) this.askValue();
      return;
    }
    this.write(value.at, value.text, [[`A, rank ${this.head.a}`, value.a], [`B, rank ${this.head.b}`, value.b],
      ["A − B", value.difference]]);
  }

  write([head, token, dim], text, lines) {
    this.hover.replaceChildren();
    const first = make("div", "", this.hover);
    make("b", "", first, `head ${head} · token ${token} · dim ${dim} `);
    if (text.trim()) make("q", "", first, shorten(text));
    for (const [name, number] of lines) {
      const row = make("div", "value", this.hover);
      make("span", "faint", row, name);
      make("code", "", row, number);
    }
  }
}

function differing(count) {
  return count ? `${count.toLocaleString()} value${count === 1 ? " differs" : "s differ"}` : "no value differs";
}

function fill(select, options) {
  select.replaceChildren();
  for (const [value, text] of options) Object.assign(make("option", "", select, text), { value });
}
