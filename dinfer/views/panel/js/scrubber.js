// Time: a strip of the run's trace on which one goes back to any moment, and selects a stretch for its totals. The kernel
// answers a question at a time; between two answers only the newest question counts. Knows no map: it has `cells` and
// `cut` of its moment, null for now, and calls `panel` when they have changed.

const STRIP = { left: 72, ruler: 16, row: 13, lane: 9, tall: 320, mark: 7 };
const STEPS = 200; // arrow keys go by this part of what is seen
const LEAST_NS = 1000; // of what is seen
const PART_COLOURS = { compute: "compute", wire: "wire", wait: "wait", bubble: "bubble", data: "data" };
const NOTABLE_SIGNS = { "slow op": "▲", "slow message": "▶", late: "◆", bubble: "●" };
const TIME_KEYS = "Arrow keys move the time, PageUp and PageDown further, Home and End to the begin and to now; with Shift they select "
  + "a stretch; + − 0 zoom; n and N go to the next and the last of what is late, slow or a bubble; Escape leaves";

class TimeStrip {
  // `bar`: where its button goes; `panel`: { send(message), select([layer, chunk]), rank(rank), changed() }.
  constructor(bar, parent, root, board, name, panel) {
    Object.assign(this, { root, board, name, panel, at: null, window: null, rank: null, stretch: null, number: 0, cells: null, cut: null });
    this.button = make("button", "", bar, "time");
    this.button.dataset.time = "open";
    this.button.title = "the run at any moment of its trace, and the totals of a stretch  [t]";
    this.button.onclick = () => this.toggle();
    this.said = make("span", "faint clock", bar);
    this.nowButton = this.act(bar, "now", "back to now: the live view  [End]", () => this.go(null));
    this.box = make("div", "time", parent);
    this.box.hidden = this.nowButton.hidden = true;
    this.build();
    this.resized = new ResizeObserver(() => this.open && this.ask());
    this.resized.observe(this.box);
  }

  get open() {
    return !this.box.hidden;
  }

  build() {
    const bar = make("div", "fields", this.box);
    this.picker = make("select", "", bar);
    this.picker.setAttribute("aria-label", "the rank whose lanes are shown");
    fill(this.picker, [["", "lanes of …"], ...Array.from({ length: this.board.ranks }, (_, rank) => [String(rank), `rank ${rank}`])]);
    this.picker.onchange = () => this.openRank(this.picker.value === "" ? null : Number(this.picker.value));
    this.selecting = this.act(bar, "select a stretch", "then drag; or drag with Shift: totals of what is between", () => this.select());
    this.act(bar, "+", "zoom in around the time", () => this.zoom(0.5));
    this.act(bar, "−", "zoom out", () => this.zoom(2));
    this.act(bar, "all", "see all of the trace", () => this.zoom(Infinity));
    this.legend = make("span", "legend", bar);
    this.scroller = make("div", "strip", this.box);
    this.canvas = make("canvas", "", this.scroller);
    this.canvas.tabIndex = 0;
    for (const [name, value] of [["role", "slider"], ["aria-label", "time of the trace"], ["aria-valuemin", "0"]]) {
      this.canvas.setAttribute(name, value);
    }
    this.canvas.title = TIME_KEYS;
    this.canvas.onpointerdown = (event) => this.press(event);
    this.canvas.onpointermove = (event) => this.move(event);
    this.canvas.onpointerup = this.canvas.onpointercancel = () => { this.dragged = null; };
    this.canvas.onkeydown = (event) => this.key(event);
    const calls = make("div", "fields", this.box);
    this.callAt = copyable(make("span", "copy-call", calls), "this moment");
    this.callStretch = copyable(make("span", "copy-call", calls), "this stretch");
    this.pan = make("div", "pan", this.box);
    this.panned = make("div", "", this.pan);
    this.pan.tabIndex = 0;
    this.pan.setAttribute("aria-label", "what of the trace is seen; scroll to move it");
    this.pan.onscroll = () => this.scrolled();
    const parts = make("div", "moment", this.box);
    this.totals = this.section(parts, "totals", "totals of the stretch");
    this.lanes = this.section(parts, "lanes", "lanes in an op");
    this.links = this.section(parts, "links", "links, by then");
    for (const { list: scrolled } of [this.totals, this.links]) scrolled.tabIndex = 0;
    this.notable = this.section(parts, "notable", "late, slow, bubbles");
    this.totals.box.hidden = true;
  }

  section(parent, name, title) {
    const box = make("section", name, parent), head = make("b", "", box, title), list = make("div", "list", box);
    box.setAttribute("aria-label", title);
    return { box, head, list };
  }

  act(bar, text, title, onclick) {
    return Object.assign(make("button", "", bar, text), { title, onclick });
  }

  close() {
    this.resized.disconnect();
  }

  // The kernel is gone: what is shown of another time would never become that of now. The strip stays, and does not move.
  end() {
    if (!this.then?.now) this.then = null;
    Object.assign(this, { ended: true, asked: false, again: false, dragged: null });
    this.go(null);
  }

  toggle() {
    if (this.ended) return;
    this.box.hidden = this.open;
    this.button.classList.toggle("dinfer-on", this.open);
    this.button.setAttribute("aria-expanded", this.open);
    if (this.open) this.ask();
    else this.go(null);
  }

  // -- what is asked of the kernel

  // The run may have changed.
  follow(shown) {
    if (shown === this.followed) return;
    this.followed = shown;
    if (this.open) this.ask();
  }

  ask() {
    if (this.ended) {
      this.draw();
      return;
    }
    if (this.asked) {
      this.again = true;
      return;
    }
    this.asked = true;
    this.askedAt = this.at;
    const [begin, end] = this.window ?? [null, null];
    this.panel.send({ do: "time", view: this.name, number: ++this.number, at: this.at, begin, end, bins: Math.max(1, Math.floor(this.wide())),
      rank: this.rank, stretch: this.stretch, have: this.strip?.key ?? "" });
  }

  hear({ time }, buffers) {
    if (time?.view !== this.name || this.ended) return;
    this.asked = false;
    this.take(time, buffers);
    if (this.again) {
      this.again = false;
      this.ask();
    }
  }

  take(time, buffers) {
    this.trouble = time.error ?? (time.moving ? "the run moves: pause it to look back" : time.span === 0 ? "nothing has run yet" : "");
    if (this.trouble) {
      [this.at, this.cells, this.cut, this.then] = [null, null, null, null];
    } else {
      if (time.strip !== undefined) this.strip = { ...time, bytes: bytesOf(buffers[time.strip]) };
      [this.span, this.paused] = [time.span, time.paused];
      this.parts = time.parts;
      this.then = time.moment;
      if (time.moment.now && this.at === this.askedAt) this.at = null; // else somebody has gone elsewhere since
      if (this.at === null) [this.cells, this.cut] = [null, null];
      else if (!time.moment.now) [this.cells, this.cut] = [unpacked(buffers[time.cells], this.board), time.moment.cut];
      this.found = time.stretch ?? null;
    }
    this.show();
    this.panel.changed();
  }

  // What ranks did then, over what is known of them now.
  ranksOf(ranks) {
    const then = this.cells && this.then?.ranks;
    return then ? ranks.map((rank, n) => ({ ...rank, ...then[n], tokens: 0 })) : ranks;
  }

  // -- what a user does

  go(at) {
    const [begin, end] = this.seen(), last = this.span - (end - begin) / (10 * STEPS); // the last pixels are now
    this.at = at === null || at >= last || this.ended ? null : Math.max(0, Math.round(at));
    if (this.at === null) [this.cells, this.cut] = [null, null];
    if (this.at !== null) this.reveal(this.at);
    if (this.open) this.ask();
    this.show();
    this.panel.changed();
  }

  openRank(rank) {
    this.rank = rank;
    this.picker.value = rank === null ? "" : String(rank);
    this.ask();
  }

  // Go to a hit or to something notable: its time, its rank and lane, its block.
  lead({ at, rank, lane, layer, chunk }) {
    this.lane = lane || null;
    if (at !== null && at !== undefined && !this.ended) {
      if (!this.open) this.toggle();
      this.go(at);
    }
    if (rank !== null && rank !== undefined) {
      if (this.open && !this.ended) this.openRank(rank);
      this.panel.rank(rank);
    }
    if (layer !== null && chunk !== null && layer !== undefined && chunk !== undefined) this.panel.select([layer, chunk]);
  }

  select() {
    this.isSelecting = !this.isSelecting;
    if (!this.isSelecting) this.stretch = null;
    this.selecting.classList.toggle("dinfer-on", this.isSelecting);
    this.selecting.setAttribute("aria-pressed", Boolean(this.isSelecting));
    this.ask();
  }

  zoom(factor) {
    if (!this.span) return;
    const [begin, end] = this.seen(), size = Math.max(LEAST_NS, (end - begin) * factor);
    if (size >= this.span) {
      this.window = null;
    } else {
      const at = this.at ?? this.span, middle = at >= begin && at <= end ? at : (begin + end) / 2;
      const first = Math.max(0, Math.min(this.span - size, middle - size / 2));
      this.window = [Math.round(first), Math.round(first + size)];
    }
    this.ask();
  }

  // Move what is seen, if need be, so that a time is.
  reveal(at) {
    if (!this.window) return;
    const [begin, end] = this.window, size = end - begin;
    if (at >= begin && at <= end) return;
    const first = Math.max(0, Math.min(this.span - size, Math.round(at - size / 2)));
    this.window = [first, first + size];
  }

  scrolled() {
    if (!this.window || this.isPanning || this.ended) return;
    const [begin, end] = this.window, size = end - begin, most = this.pan.scrollWidth - this.pan.clientWidth;
    const first = Math.round((this.pan.scrollLeft / Math.max(1, most)) * (this.span - size));
    if (Math.abs(first - begin) < size / 500) return;
    this.window = [first, first + size];
    this.ask();
  }

  press(event) {
    if (this.ended) return;
    const { offsetX: x, offsetY: y } = event;
    this.canvas.focus({ preventScroll: true });
    if (x < STRIP.left) {
      const rank = this.rowAt(y);
      if (rank !== null) this.openRank(rank === this.rank ? null : rank);
      return;
    }
    const sign = this.signAt(x, y);
    if (sign && !event.shiftKey) {
      this.leadTo(sign);
      return;
    }
    this.canvas.setPointerCapture?.(event.pointerId);
    this.dragged = event.shiftKey || this.isSelecting ? this.timeAt(x) : "time";
    this.move(event);
  }

  move(event) {
    if (this.dragged === null || this.dragged === undefined) return;
    const at = this.timeAt(event.offsetX);
    if (this.dragged === "time") this.go(at);
    else this.setStretch(this.dragged, at);
  }

  setStretch(one, other) {
    this.stretch = one === other ? null : [Math.min(one, other), Math.max(one, other)].map(Math.round);
    this.ask();
    this.draw();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.span || this.ended) return;
    const [begin, end] = this.seen(), step = (end - begin) / STEPS, at = this.at ?? this.span;
    const to = { ArrowLeft: at - step, ArrowRight: at + step, ArrowDown: at - step, ArrowUp: at + step, PageDown: at - 20 * step,
      PageUp: at + 20 * step, Home: 0, End: this.span }[event.key];
    if (to !== undefined) {
      if (event.shiftKey) this.setStretch(this.stretch && this.anchor !== undefined ? this.anchor : (this.anchor = at), within(to, 0, this.span));
      else this.anchor = undefined;
      this.go(to);
    } else if (["+", "=", "-", "−", "0"].includes(event.key)) {
      this.zoom({ "+": 0.5, "=": 0.5, 0: Infinity }[event.key] ?? 2);
    } else if (event.key === "n" || event.key === "N") {
      this.leadBy(event.key === "n" ? 1 : -1, at);
    } else if (event.key === "Escape") {
      this.stretch = null;
      this.go(null);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  leadBy(way, at) {
    const middle = (one) => (one.begin + one.end) / 2, ordered = [...(this.strip?.notable ?? [])].sort((a, b) => middle(a) - middle(b));
    const found = way > 0 ? ordered.find((one) => middle(one) > at + 1) : ordered.findLast((one) => middle(one) < at - 1);
    const first = this.at === null && way > 0 ? ordered[0] : found;
    if (first) this.leadTo(first);
  }

  leadTo(one) {
    this.lead({ ...one, at: (one.begin + one.end) / 2 });
  }

  // -- where things are

  wide() {
    return Math.max(40, this.scroller.clientWidth - STRIP.left - 4);
  }

  seen() {
    return this.window ?? [0, this.span ?? 1];
  }

  timeAt(x) {
    const [begin, end] = this.seen();
    return within(begin + ((x - STRIP.left) / this.wide()) * (end - begin), 0, this.span ?? 0);
  }

  xOf(time) {
    const [begin, end] = this.seen();
    return STRIP.left + ((time - begin) / (end - begin)) * this.wide();
  }

  // The rows, from above: [{ rank, lane, y, high }].
  rows() {
    const found = [];
    let y = STRIP.ruler;
    for (let rank = 0; rank < this.board.ranks; rank++) {
      found.push({ rank, lane: "", y, high: STRIP.row, number: rank });
      y += STRIP.row + 1;
      if (rank !== this.strip?.rank) continue;
      this.strip.lanes.forEach((lane, n) => {
        found.push({ rank, lane, y, high: STRIP.lane, number: this.board.ranks + n });
        y += STRIP.lane + 1;
      });
    }
    return found;
  }

  rowAt(y) {
    return this.rows().find((row) => y >= row.y && y <= row.y + row.high)?.rank ?? null;
  }

  signAt(x, y) {
    const rank = this.rowAt(y);
    const near = (this.strip?.notable ?? []).filter((one) => one.rank === rank && Math.abs(this.xOf((one.begin + one.end) / 2) - x) <= STRIP.mark);
    return near.sort((a, b) => b.end - b.begin - (a.end - a.begin))[0];
  }

  // -- what is shown

  show() {
    const clock = this.trouble || (this.span ? `${this.at === null ? "now" : timeText(this.at)} of ${timeText(this.span)}` : "");
    this.said.textContent = this.open ? clock + (this.paused && !this.trouble ? `, without ${timeText(this.paused)} of pauses` : "") : "";
    this.nowButton.hidden = this.at === null;
    this.root.dataset.past = this.at === null ? "" : "yes";
    if (!this.open) return;
    this.canvas.setAttribute("aria-valuemax", Math.round((this.span ?? 0) / 1000));
    this.canvas.setAttribute("aria-valuenow", Math.round((this.at ?? this.span ?? 0) / 1000));
    this.canvas.setAttribute("aria-valuetext", clock);
    this.callAt(this.at === null ? "" : `run.at(${secondsText(this.at)})`);
    this.callStretch(this.stretch ? `run.stretch(${this.stretch.map(secondsText).join(", ")})` : "");
    this.showLegend();
    this.showLanes();
    this.showLinks();
    this.showTotals();
    this.showNotable();
    this.showPan();
    this.draw();
  }

  showLegend() {
    if (!this.parts || this.legend.children.length) return;
    for (const [name, about] of Object.entries(this.parts)) {
      if (name === "rest") continue;
      const item = make("span", "", this.legend);
      make("i", "", item).style.background = `var(--dinfer-part-${PART_COLOURS[name]})`;
      item.append(name === "data" ? "own data" : name);
      item.title = about;
    }
    for (const [kind, sign] of Object.entries(NOTABLE_SIGNS)) make("span", "", this.legend, `${sign} ${kind}`);
  }

  showLanes() {
    const lanes = this.then?.lanes ?? [];
    this.lanes.box.hidden = !lanes.length && this.at === null;
    this.lanes.head.textContent = this.at === null ? `lanes in an op now (${lanes.length})` : `lanes in an op (${lanes.length})`;
    list(this.lanes.list, lanes, (one) => [`rank ${one.rank} ${one.lane}: ${one.op}`, one.since === null ? one.phase : `${one.phase}, ${timeText(one.since)}`],
      (one) => this.lead({ ...one, at: null }), "between two ops");
    const led = this.lanes.list.children[lanes.findIndex((one) => one.rank === this.rank && one.lane === this.lane)];
    led?.classList.add("dinfer-on");
    if (led) this.lanes.list.scrollTop = led.offsetTop - this.lanes.list.offsetTop;
  }

  // The link whose messages take longest on the wire is the first; its name leads to the longest of them.
  showLinks() {
    const slowest = new Map((this.strip?.slowest ?? []).map((one) => [`${one.source}→${one.target}`, one]));
    const links = (this.then?.links ?? []).map(([source, target, ...rest]) => [`${source}→${target}`, ...rest]);
    links.sort(([one], [other]) => (slowest.get(other)?.usual ?? 0) - (slowest.get(one)?.usual ?? 0));
    this.links.box.hidden = !this.then;
    table(this.links.list, ["link", "median wire", "MB", "messages", "on the wire", "waiting"],
      links.map(([link, arrived, size, moving, waiting]) => [link, slowest.has(link) ? timeText(slowest.get(link).usual) : "",
        megabytes(size), number(arrived), number(moving), number(waiting)]),
      ["", "how long a message of the whole trace usually is on the wire"]);
    [...this.links.list.querySelectorAll("tbody td:first-child")].forEach((cell, n) => {
      const [link] = links[n], one = slowest.get(link);
      if (!one) return;
      cell.replaceChildren();
      const button = make("button", "lead", cell, one.is_slow ? `⚠ ${link}` : link);
      if (one.is_slow) button.dataset.severity = "warning";
      button.title = `${one.is_slow ? "slow: " : ""}${one.text} took longest on the wire, ${timeText(one.took)}: go there`;
      button.onclick = () => this.lead(one);
    });
  }

  showTotals() {
    this.totals.box.hidden = !this.stretch;
    if (!this.found || !this.stretch) return;
    const { begin, end, rows, links } = this.found, names = Object.keys(this.parts).filter((name) => name !== "data");
    this.totals.head.textContent = `${timeText(begin)} – ${timeText(end)}: ${timeText(end - begin)}`;
    const cells = rows.map((row) => [row.name, ...row.parts.map((part, n) => `${timeText(part)}  ${row.shares[n] ?? ""}`)]);
    table(this.totals.list, ["rank", ...names], cells, ["", ...names.map((name) => this.parts[name])]);
    const more = make("div", "", this.totals.list);
    table(more, ["link", "MB", "messages", "on the wire", "waiting"],
      links.map(([source, target, count, size, moving, waiting]) => [`${source}→${target}`, megabytes(size), number(count), timeText(moving), timeText(waiting)]),
      ["", "of the messages that arrived in the stretch", "that arrived in the stretch", "time in which any message was on the wire", "time in which any message lay ready for a rank that had not come"]);
  }

  showNotable() {
    const found = this.strip?.notable;
    if (!found || found === this.listed) return;
    this.listed = found;
    this.notable.head.textContent = `late, slow, bubbles (${found.length})`;
    list(this.notable.list, [...found].sort((a, b) => b.end - b.begin - (a.end - a.begin)), (one) => [unbroken(`${NOTABLE_SIGNS[one.kind]} ${one.text}`), timeText(one.begin)],
      (one) => this.leadTo(one), "nothing took unusually long");
  }

  showPan() {
    this.pan.hidden = !this.window || this.ended;
    if (this.pan.hidden) return;
    const [begin, end] = this.window, size = end - begin;
    this.isPanning = true;
    this.panned.style.width = `${Math.min(200000, this.pan.clientWidth * (this.span / size))}px`;
    this.pan.scrollLeft = (begin / Math.max(1, this.span - size)) * (this.pan.scrollWidth - this.pan.clientWidth);
    requestAnimationFrame(() => { this.isPanning = false; });
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    if (!this.open || !this.strip || !this.span) return;
    const rows = this.rows(), scale = window.devicePixelRatio || 1, width = this.scroller.clientWidth, last = rows.at(-1);
    const style = getComputedStyle(this.root), colour = (name) => style.getPropertyValue(`--dinfer-${name}`).trim();
    const height = last.y + last.high + 2, pen = this.canvas.getContext("2d");
    Object.assign(this.canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    Object.assign(this.canvas.style, { height: `${height}px`, width: `${width}px` });
    pen.scale(scale, scale);
    pen.font = "10px sans-serif";
    pen.textBaseline = "middle";
    const { bins, bytes, codes } = this.strip, colours = codes.map((name) => name && colour(`part-${PART_COLOURS[name]}`));
    const from = this.xOf(this.strip.begin), per = (this.xOf(this.strip.end) - from) / bins;
    pen.save();
    pen.beginPath();
    pen.rect(STRIP.left, 0, width - STRIP.left, height);
    pen.clip();
    for (const row of rows) {
      for (let bin = 0, end; bin < bins; bin = end) {
        const code = bytes[row.number * bins + bin];
        for (end = bin + 1; end < bins && bytes[row.number * bins + end] === code;) end++;
        if (!code) continue;
        pen.fillStyle = colours[code];
        pen.fillRect(from + bin * per, row.y, Math.max(1, (end - bin) * per), row.high);
      }
    }
    this.drawRuler(pen, colour, width);
    this.drawSigns(pen, colour, rows);
    this.drawTimes(pen, colour, height);
    pen.restore();
    this.drawNames(pen, colour, rows);
    Object.assign(this.canvas.dataset, { at: this.at ?? "now", seen: this.seen().join(" "), rows: rows.map((row) => row.lane || `rank ${row.rank}`).join(","),
      left: STRIP.left, wide: this.wide() });
  }

  drawNames(pen, colour, rows) {
    pen.textAlign = "right";
    for (const row of rows) {
      pen.fillStyle = colour(!row.lane ? "text" : row.rank === this.rank && row.lane === this.lane ? "cut" : "faint");
      pen.fillText(shortened(pen, row.lane || `rank ${row.rank}`, STRIP.left - 8), STRIP.left - 6, row.y + row.high / 2);
    }
  }

  drawRuler(pen, colour, width) {
    const [begin, end] = this.seen(), rough = ((end - begin) / this.wide()) * 110, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
    pen.fillStyle = colour("faint");
    pen.strokeStyle = colour("line");
    pen.textAlign = "left";
    for (let time = Math.ceil(begin / step) * step; time <= end; time += step) {
      const x = this.xOf(time);
      pen.fillRect(x, STRIP.ruler - 4, 1, 4);
      if (x < width - 40) pen.fillText(timeText(time), x + 3, 7);
    }
  }

  // After the rows, so that no bin hides them.
  drawSigns(pen, colour, rows) {
    pen.textAlign = "center";
    pen.lineWidth = 3;
    for (const one of this.strip.notable) {
      const row = rows.find(({ rank, lane }) => rank === one.rank && !lane), x = this.xOf((one.begin + one.end) / 2);
      if (!row) continue;
      pen.strokeStyle = colour("back");
      pen.strokeText(NOTABLE_SIGNS[one.kind], x, row.y + row.high / 2 + 1);
      pen.fillStyle = colour("cut");
      pen.fillText(NOTABLE_SIGNS[one.kind], x, row.y + row.high / 2 + 1);
    }
    pen.font = "10px sans-serif";
  }

  drawTimes(pen, colour, height) {
    if (this.stretch) {
      const [left, right] = this.stretch.map((time) => this.xOf(time));
      pen.globalAlpha = 0.22;
      pen.fillStyle = colour("text");
      pen.fillRect(left, 0, right - left, height);
      pen.globalAlpha = 1;
      line(pen, [[left, 0], [left, height]], colour("text"), 1, [3, 2]);
      line(pen, [[right, 0], [right, height]], colour("text"), 1, [3, 2]);
    }
    const x = Math.min(this.xOf(this.at ?? this.span), STRIP.left + this.wide());
    line(pen, [[x, 0], [x, height]], colour("back"), 4);
    line(pen, [[x, 0], [x, height]], colour("cut"), 2);
  }
}

function within(value, least, most) {
  return Math.max(least, Math.min(most, value));
}

function bytesOf(view) {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

function timeText(nanoseconds) {
  if (Math.abs(nanoseconds) >= 1e9) return `${(nanoseconds / 1e9).toFixed(3)} s`;
  return nanoseconds >= 1e6 ? `${Number((nanoseconds / 1e6).toPrecision(4))} ms` : `${Math.round(nanoseconds / 1e3)} µs`;
}

// A number and its unit on one line.
function unbroken(text) {
  return text.replaceAll(/(\d) (ms|µs|s|×)/g, "$1\u00a0$2");
}

function megabytes(count) {
  return (count / 1e6).toFixed(count < 1e7 ? 3 : 1);
}

// Lines that lead somewhere: `texts(one)` is what a line says, and how much of it is beside.
function list(node, items, texts, onclick, none) {
  node.replaceChildren();
  for (const one of items) {
    const [text, beside] = texts(one), button = make("button", "lead", node, text);
    if (beside) make("span", "faint", button, beside);
    button.onclick = () => onclick(one);
  }
  if (!items.length) make("div", "faint", node, none);
}

function table(node, heads, rows, titles = []) {
  node.replaceChildren();
  const made = make("table", "", node), head = make("tr", "", make("thead", "", made)), body = make("tbody", "", made);
  heads.forEach((text, n) => { make("th", "", head, text).title = titles[n] ?? ""; });
  for (const row of rows) {
    const line = make("tr", "", body);
    row.forEach((text) => make("td", "", line, text));
  }
}

// Nanoseconds as seconds, exactly.
function secondsText(time) {
  return String(Number((time / 1e9).toFixed(9)));
}
