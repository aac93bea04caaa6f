// A heatmap on a canvas: a byte for each value, tokens from left to right, the dims of each head from top to bottom.
// Of values that share a pixel, the one furthest from zero is shown, so that no outlier is lost. Knows no kernel. The
// bytes are those of quantise.py.

const NAN_CODE = 0, ZERO_CODE = 126, PLUS_INF = 252, MINUS_INF = 253, MISSING_CODE = 255;
const MARGIN = { left: 46, top: 16, right: 4, bottom: 4 };
const MAP_PIXELS = 380, SMALLEST = 8;
const TEXT_PIXELS = 58; // below the values, for the texts of tokens
const TEXT_APART = 11;
const CLOSE = 40; // tokens, and rows, that are seen of a place that somebody was led to
const APART = 12; // pixels between the lines of chunks, of which some are left out: they would cover the values
// from −scale over zero to +scale; the two ends differ in hue
const ENDS = {
  light: { low: [33, 102, 172], zero: [247, 247, 247], high: [179, 88, 6], nan: [0, 0, 0], missing: [214, 218, 223] },
  dark: { low: [110, 180, 255], zero: [24, 27, 31], high: [255, 168, 76], nan: [255, 255, 255], missing: [58, 64, 71] },
};

class Heatmap {
  // `onPoint([head, token, dim] or null)` is called as the mouse moves, `onPick` at a click and with Enter.
  constructor(parent, root, onPoint, onPick = () => {}) {
    Object.assign(this, { root, onPoint, onPick, shown: null, zoom: null });
    this.canvas = make("canvas", "heatmap", parent);
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", "heatmap of values: arrow keys move from value to value, Enter watches one, + − 0 zoom");
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(parent);
    this.canvas.onmousemove = (event) => this.move(event);
    this.canvas.onmouseleave = () => this.leave();
    this.canvas.onpointerdown = (event) => {
      this.canvas.setPointerCapture(event.pointerId); // a drag continues and ends outside, too
      this.drag = this.place(event);
    };
    this.canvas.onmouseup = (event) => this.drop(event);
    this.canvas.ondblclick = () => this.zoomTo(null);
    this.canvas.onkeydown = (event) => this.key(event);
  }

  close() {
    this.resized.disconnect();
    cancelAnimationFrame(this.frame);
  }

  // `head` describes `codes`: heads, tokens, dims, `first`, the token of the first column, …
  show(head, codes) {
    const same = this.shown && this.shown.head.tokens === head.tokens && this.shown.head.first === head.first
      && this.shown.head.heads.length === head.heads.length;
    if (!same) this.zoom = null;
    this.shown = { head, codes };
    this.draw();
  }

  // -- positions: x in tokens from the first column, y in rows, which are the dims of all heads

  whole() {
    const { tokens, heads, dims } = this.shown.head;
    return { x: 0, y: 0, wide: tokens, high: heads.length * dims };
  }

  size() {
    const width = this.canvas.parentElement.clientWidth, below = this.shown?.head.texts?.some(Boolean) ? TEXT_PIXELS : 0;
    return { width, height: MAP_PIXELS + below, wide: width - MARGIN.left - MARGIN.right,
      high: MAP_PIXELS - MARGIN.top - MARGIN.bottom };
  }

  place(event) {
    const { wide, high } = this.size();
    const within = (value, most) => Math.max(0, Math.min(most - 1e-6, value));
    return [within(event.offsetX - MARGIN.left, wide) / wide, within(event.offsetY - MARGIN.top, high) / high];
  }

  at([across, down]) {
    const view = this.zoom ?? this.whole(), { dims, heads, first } = this.shown.head;
    const token = first + Math.floor(view.x + across * view.wide), row = Math.floor(view.y + down * view.high);
    return [heads[Math.floor(row / dims)], token, row % dims];
  }

  move(event) {
    if (!this.shown?.head.tokens) return;
    if (this.drag) this.dragged = this.place(event);
    this.spot = this.place(event);
    this.onPoint(this.at(this.spot));
    this.draw();
  }

  leave() {
    this.spot = this.drag = this.dragged = null;
    this.onPoint(null);
    this.draw();
  }

  drop(event) {
    const from = this.drag, to = this.place(event);
    this.drag = this.dragged = null;
    if (!from || !this.shown?.head.tokens) return;
    if (Math.abs(from[0] - to[0]) + Math.abs(from[1] - to[1]) < 0.02) {
      if (event.detail < 2) this.onPick(this.at(to));
      return;
    }
    const view = this.zoom ?? this.whole();
    const [left, right] = [from[0], to[0]].sort((a, b) => a - b), [upper, lower] = [from[1], to[1]].sort((a, b) => a - b);
    this.zoomTo({ x: view.x + left * view.wide, y: view.y + upper * view.high,
      wide: (right - left) * view.wide, high: (lower - upper) * view.high });
  }

  zoomBy(factor) {
    if (!this.shown?.head.tokens) return;
    const view = this.zoom ?? this.whole(), [across, down] = this.spot ?? [0.5, 0.5];
    this.zoomTo({ x: view.x + across * view.wide * (1 - factor), y: view.y + down * view.high * (1 - factor),
      wide: view.wide * factor, high: view.high * factor });
  }

  zoomTo(wanted) {
    if (!this.shown) return;
    const all = this.whole();
    if (wanted) {
      const wide = Math.min(all.wide, Math.max(SMALLEST, wanted.wide));
      const high = Math.min(all.high, Math.max(SMALLEST, wanted.high));
      this.zoom = { x: Math.max(0, Math.min(all.wide - wide, wanted.x)), y: Math.max(0, Math.min(all.high - high, wanted.y)),
        wide, high };
    }
    if (!wanted || (this.zoom.wide === all.wide && this.zoom.high === all.high)) this.zoom = null;
    this.draw();
  }

  // The part of the picture around a value, and the value itself.
  lookAt([head, token, dim]) {
    if (!this.shown?.head.tokens) return;
    const { heads, dims, first } = this.shown.head, all = this.whole();
    const column = token - first, row = heads.indexOf(head) * dims + dim;
    this.zoomTo({ x: column - CLOSE / 2, y: row - CLOSE / 2, wide: Math.min(CLOSE, all.wide), high: Math.min(CLOSE, all.high) });
    this.spotOn(column, row);
  }

  // Point at a column and a row, which are brought into the picture.
  spotOn(column, row) {
    const all = this.whole(), within = (value, most) => Math.max(0, Math.min(most - 1, value));
    const [x, y] = [within(column, all.wide), within(row, all.high)], seen = this.zoom ?? all;
    if (!isIn(x, [seen.x, seen.x + seen.wide]) || !isIn(y, [seen.y, seen.y + seen.high])) {
      this.zoomTo({ ...seen, x: x - seen.wide / 2, y: y - seen.high / 2 });
    }
    const view = this.zoom ?? all;
    this.spot = [(x + 0.5 - view.x) / view.wide, (y + 0.5 - view.y) / view.high];
    this.onPoint(this.at(this.spot));
    this.draw();
  }

  // By key from the value that is pointed at, or from the first that is seen.
  walk([right, down]) {
    const view = this.zoom ?? this.whole(), [across, along] = this.spot ?? [0, 0];
    const here = [Math.floor(view.x + across * view.wide), Math.floor(view.y + along * view.high)];
    if (this.spot) this.spotOn(here[0] + right, here[1] + down);
    else this.spotOn(...here);
  }

  key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const shift = { ArrowLeft: [-0.2, 0], ArrowRight: [0.2, 0], ArrowUp: [0, -0.2], ArrowDown: [0, 0.2] }[event.key];
    if (event.key === "+" || event.key === "=") this.zoomBy(0.5);
    else if (event.key === "-") this.zoomBy(2);
    else if (event.key === "0") this.zoomTo(null);
    else if (event.key === "Enter" && this.spot) this.onPick(this.at(this.spot));
    else if (step && !event.shiftKey && this.shown?.head.tokens) this.walk(step);
    else if (shift && this.zoom) {
      this.zoomTo({ ...this.zoom, x: this.zoom.x + shift[0] * this.zoom.wide, y: this.zoom.y + shift[1] * this.zoom.high });
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // -- drawing

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    const { width, height, wide, high } = this.size(), scale = window.devicePixelRatio || 1;
    if (wide <= 0 || !this.shown) return;
    const style = getComputedStyle(this.root);
    this.colour = (name) => style.getPropertyValue(`--dinfer-${name}`).trim();
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const pen = this.canvas.getContext("2d");
    const box = [MARGIN.left, MARGIN.top, wide, high].map((value) => Math.round(value * scale));
    if (this.shown.head.tokens) pen.putImageData(this.pixels(pen, box[2], box[3]), box[0], box[1]);
    pen.scale(scale, scale);
    pen.font = "10px sans-serif";
    this.drawAxes(pen, wide, high);
    this.drawSpecial(pen, wide, high);
    this.drawDrag(pen, wide, high);
    this.canvas.dataset.stamp = this.shown.head.stamp; // for tests: what has just been drawn
    this.canvas.dataset.view = JSON.stringify({ ...(this.zoom ?? this.whole()), left: MARGIN.left, top: MARGIN.top,
      across: wide, down: high, dims: this.shown.head.dims, first: this.shown.head.first });
  }

  // The value shown by each pixel: NaN and Inf first, then the one furthest from zero.
  pixels(pen, wide, high) {
    const { head: { tokens, dims }, codes } = this.shown, view = this.zoom ?? this.whole();
    const image = pen.createImageData(wide, high), found = new Uint32Array(image.data.buffer);
    const colours = this.lut(), rank = this.ranks();
    const edges = (first, size, count) => Array.from({ length: count + 1 }, (_, n) => Math.floor(first + (n * size) / count));
    const columns = edges(view.x, view.wide, wide), rows = edges(view.y, view.high, high);
    for (let y = 0; y < high; y++) {
      const low = rows[y], up = Math.max(low + 1, rows[y + 1]);
      for (let x = 0; x < wide; x++) {
        const left = columns[x], right = Math.max(left + 1, columns[x + 1]);
        let best = -1, code = ZERO_CODE;
        for (let row = low; row < up; row++) {
          let at = (Math.floor(row / dims) * tokens + left) * dims + (row % dims);
          for (let token = left; token < right; token++, at += dims) {
            if (rank[codes[at]] > best) best = rank[code = codes[at]];
          }
        }
        found[y * wide + x] = colours[code];
      }
    }
    return image;
  }

  ranks() {
    return this.order ??= Uint8Array.from({ length: 256 }, (_, code) => {
      if (code === MISSING_CODE) return 0;
      return code === NAN_CODE || code > 251 ? 255 : 1 + Math.abs(code - ZERO_CODE);
    });
  }

  lut() {
    const { low, zero, high, nan, missing } = ENDS[this.root.classList.contains("dinfer-dark") ? "dark" : "light"];
    const mixed = (end, part) => zero.map((value, n) => Math.round(value + (end[n] - value) * part));
    const colourOf = (code) => {
      if (code === MISSING_CODE) return missing;
      if (code === NAN_CODE || code > 251) return nan;
      const part = (code - ZERO_CODE) / 125;
      return mixed(part < 0 ? low : high, Math.abs(part));
    };
    return Uint32Array.from({ length: 256 }, (_, code) => {
      const [red, green, blue] = colourOf(code);
      return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
    });
  }

  drawAxes(pen, wide, high) {
    const { heads, dims, starts, tokens, first } = this.shown.head, view = this.zoom ?? this.whole();
    const x = (token) => MARGIN.left + ((token - first - view.x) / view.wide) * wide;
    const y = (row) => MARGIN.top + ((row - view.y) / view.high) * high;
    pen.fillStyle = this.colour("faint");
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    heads.forEach((head, n) => {
      const upper = Math.max(y(n * dims), MARGIN.top), lower = Math.min(y((n + 1) * dims), MARGIN.top + high);
      if (lower - upper > 11) pen.fillText(`head ${head}`, MARGIN.left - 4, (upper + lower) / 2);
      if (n && upper > MARGIN.top && upper < MARGIN.top + high) {
        line(pen, [[MARGIN.left - 30, upper], [MARGIN.left + wide, upper]], this.colour("faint"), 0.7);
      }
    });
    pen.textAlign = "left";
    this.drawTexts(pen, wide, high, x);
    pen.textAlign = "left";
    let free = 0, next = 0;
    starts.forEach((start, chunk) => {
      const at = x(start);
      if (at < Math.max(MARGIN.left - 1, next) || at > MARGIN.left + wide || start >= first + tokens) return;
      next = at + APART;
      line(pen, [[at, MARGIN.top - 5], [at, MARGIN.top + high]], this.colour("faint"), 0.4);
      const text = `c${chunk}`, size = pen.measureText(text).width;
      if (at < free || at + size + 2 > MARGIN.left + wide) return;
      pen.fillText(text, at + 2, 7);
      free = at + size + 12;
    });
  }

  // The texts of tokens, upwards; where there is no room for each, of every second, third, …
  drawTexts(pen, wide, high, x) {
    const { texts, first } = this.shown.head, view = this.zoom ?? this.whole();
    this.canvas.dataset.texts = "";
    if (!texts?.some(Boolean)) return;
    const every = Math.max(1, Math.ceil(TEXT_APART / (wide / view.wide))), drawn = [];
    pen.textAlign = "right";
    for (let n = Math.ceil(view.x / every) * every; n < Math.min(texts.length, view.x + view.wide); n += every) {
      const text = shortened(pen, texts[n].replace(/\n/g, "⏎").trim() || "␣", TEXT_PIXELS - 12);
      pen.save();
      pen.translate(x(first + n + 0.5), MARGIN.top + high + 6);
      pen.rotate(-Math.PI / 2);
      pen.fillText(text, 0, 0);
      pen.restore();
      drawn.push(text);
    }
    this.canvas.dataset.texts = JSON.stringify(drawn); // for tests
  }

  // Rings around NaN and Inf, since a single pixel is easily missed.
  drawSpecial(pen, wide, high) {
    const { special, heads, dims, first } = this.shown.head, view = this.zoom ?? this.whole();
    pen.lineWidth = 1.5;
    pen.strokeStyle = this.colour("cut");
    for (const [head, token, dim] of special) {
      const x = (token - first + 0.5 - view.x) / view.wide, y = (heads.indexOf(head) * dims + dim + 0.5 - view.y) / view.high;
      if (x < 0 || x > 1 || y < 0 || y > 1) continue;
      pen.beginPath();
      pen.arc(MARGIN.left + x * wide, MARGIN.top + y * high, 6, 0, 7);
      pen.stroke();
    }
  }

  drawDrag(pen, wide, high) {
    const from = this.drag && this.dragged ? this.drag : null;
    pen.strokeStyle = this.colour("text");
    pen.lineWidth = 1;
    if (from) {
      pen.strokeRect(MARGIN.left + from[0] * wide, MARGIN.top + from[1] * high,
        (this.dragged[0] - from[0]) * wide, (this.dragged[1] - from[1]) * high);
    } else if (this.spot) {
      const [x, y] = [MARGIN.left + this.spot[0] * wide, MARGIN.top + this.spot[1] * high];
      pen.globalAlpha = 0.35;
      line(pen, [[x, MARGIN.top], [x, MARGIN.top + high]], this.colour("text"), 1);
      line(pen, [[MARGIN.left, y], [MARGIN.left + wide, y]], this.colour("text"), 1);
      pen.globalAlpha = 1;
    }
  }
}
