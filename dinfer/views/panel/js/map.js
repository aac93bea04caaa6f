// The map of the panel: layers × chunks on a canvas, each cell split by rank, the cut as a line. Knows no kernel.
//
// A map larger than its place is drawn in bins: a cell is then some chunks, layers or ranks. A click on one zooms in. What
// a bin shows is decided as in bins.py: all marks, and the most urgent state.

const [NOT_YET, COMPUTING, HERE, IN_FLIGHT, EVERYWHERE] = [0, 1, 2, 3, 4];
const BASE = 7, DIFFERS = 8, ARMED = 16, NONFINITE = 32;
const EVERY_MARK = [DIFFERS, ARMED, NONFINITE]; // in the order of the board's names of them
const URGENT = [EVERYWHERE, NOT_YET, HERE, IN_FLIGHT, COMPUTING]; // the most urgent last
const LEFT = 52, MAP_HEIGHT = 440, TOP = 18, WIDEST = 110, BESIDE = 44, ABOVE = 12, LETTERS = 60;
// Pixels of the smallest cell, of its parts, which are at most so many, and of marks; then of cells that were zoomed in to.
const LEAST = 4, LEAST_PART = 2, MOST_PARTS = 8, SMALLEST_MARK = 9;
const ZOOMED = 18, ZOOMED_PART = 4, ZOOMED_DOWN = 10;
const NARROWEST = 8; // layers and chunks that are seen at least

class BlockMap {
  // `look()` returns what to draw: { bytes, cut, breakpoints, hover, selected }; colours come from `root`'s style.
  // `tell(text)` is called with what a cell is, and what is not seen: "" if each block has a cell.
  // `zoom`: the blocks to draw, as { layers: [first, end], chunks: [first, end] }; null for all.
  constructor(canvas, root, board, look, tell) {
    Object.assign(this, { canvas, root, board, look, tell, zoom: null });
    this.all = { layers: [0, board.layers], chunks: [0, board.chunks.length] };
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(canvas.parentElement);
  }

  close() {
    this.resized.disconnect();
    cancelAnimationFrame(this.frame);
  }

  // Where cells are: pixels of a cell (`across`, `down`), and how many chunks, layers and ranks share one.
  geometry() {
    const { chunks, layers } = this.zoom ?? this.all, { ranks } = this.board;
    const width = this.canvas.parentElement.clientWidth, room = Math.max(0, width - LEFT - 2);
    const [perChunk, across] = fitted(chunks, room, this.least(LEAST, LEAST_PART), WIDEST);
    const perRank = Math.ceil(ranks / Math.max(1, Math.floor(across / LEAST_PART)));
    const labelled = perChunk === 1 && across >= ABOVE && this.board.labels.some(Boolean);
    const top = TOP + (!labelled ? 0 : across >= BESIDE ? 13 : LETTERS); // texts of chunks: horizontal or vertical
    const [perLayer, down] = fitted(layers, MAP_HEIGHT - top, LEAST, 34);
    const columns = binsIn(chunks, perChunk), rows = binsIn(layers, perLayer);
    return { width, height: top + down * rows + 4, across, down, top, left: LEFT, columns, rows,
      chunk: chunks[0], layer: layers[0], perChunk, perLayer, perRank };
  }

  // The narrowest width of a cell whose parts can be distinguished.
  least(pixels, part) {
    return Math.max(pixels, part * Math.min(this.board.ranks, MOST_PARTS));
  }

  // The blocks under the mouse, as { layers, chunks }; null beside the map.
  blocksAt(event) {
    const { across, down, top, columns, rows } = this.geometry();
    const column = Math.floor((event.offsetX - LEFT) / across), row = Math.floor((event.offsetY - top) / down);
    return row >= 0 && row < rows && column >= 0 && column < columns ? this.blocksOf(row, column) : null;
  }

  blocksOf(row, column) {
    const { chunk, layer, perChunk, perLayer } = this.geometry(), { chunks, layers } = this.zoom ?? this.all;
    const from = (first, per, end) => [first, Math.min(first + per, end)];
    return {
      layers: from(layer + row * perLayer, perLayer, layers[1]),
      chunks: from(chunk + column * perChunk, perChunk, chunks[1]),
    };
  }

  // The block that these are shown as: one with a mark, or else in the most urgent state.
  tellingOf({ layers, chunks }) {
    const { bytes } = this.look(), { ranks } = this.board;
    let best = -1, found = null;
    for (let layer = layers[0]; layer < layers[1]; layer++) {
      for (let chunk = chunks[0]; chunk < chunks[1]; chunk++) {
        const first = (layer * this.board.chunks.length + chunk) * ranks;
        for (let n = first; n < first + ranks; n++) {
          const urgency = (bytes[n] & (DIFFERS | NONFINITE) ? 20 : bytes[n] & ARMED ? 10 : 0) + URGENT.indexOf(bytes[n] & BASE);
          if (urgency > best) [best, found] = [urgency, [layer, chunk]];
        }
      }
    }
    return found;
  }

  // -- what of the map is seen

  // Zoom in to these blocks and as many around them as have room.
  zoomTo({ layers, chunks }) {
    const room = this.geometry().width - LEFT - 2;
    const fit = (pixels, least) => Math.floor(pixels / least);
    this.see(around(layers, fit(MAP_HEIGHT - TOP, ZOOMED_DOWN), this.all.layers),
      around(chunks, fit(room, this.least(ZOOMED, ZOOMED_PART)), this.all.chunks));
  }

  // See `factor` times as many layers and chunks, around a block or the middle.
  zoomBy(factor, block) {
    const { layers, chunks } = this.zoom ?? this.all;
    const part = ([first, end], at, all) => {
      const inside = at >= first && at < end, middle = inside ? at : Math.floor((first + end) / 2);
      return around([middle, middle + 1], Math.max(NARROWEST, Math.round((end - first) * factor)), all);
    };
    this.see(part(layers, block?.[0], this.all.layers), part(chunks, block?.[1], this.all.chunks));
  }

  see(layers, chunks) {
    const whole = String([layers, chunks]) === String([this.all.layers, this.all.chunks]);
    this.zoom = whole ? null : { layers, chunks };
    this.draw();
  }

  // Move what is seen, if need be, so that a block is.
  reveal([layer, chunk]) {
    if (!this.zoom) return;
    const shifted = ([first, end], at, all) =>
      (at >= first && at < end ? [first, end] : around([at, at + 1], end - first, all));
    this.see(shifted(this.zoom.layers, layer, this.all.layers), shifted(this.zoom.chunks, chunk, this.all.chunks));
  }

  isSeen(layer, chunk) {
    const { layers, chunks } = this.zoom ?? this.all;
    return isIn(layer, layers) && isIn(chunk, chunks);
  }

  scope({ perChunk, perLayer, perRank }) {
    const shared = [perChunk > 1 && `${perChunk} chunks`, perLayer > 1 && `${perLayer} layers`].filter(Boolean);
    return [
      this.zoom && `chunks ${between(this.zoom.chunks)} of ${number(this.board.chunks.length)}, layers ${
        between(this.zoom.layers)} of ${number(this.board.layers)}${this.outside()}`,
      shared.length && `each cell is ${shared.join(" × ")}: click one to zoom in`,
      perRank > 1 && `each part of a cell is ${perRank} ranks`,
    ].filter(Boolean).join(" · ");
  }

  outside() {
    const { bytes, breakpoints } = this.look(), { ranks, chunks, marks } = this.board;
    const found = EVERY_MARK.map(() => new Set());
    bytes.forEach((byte, n) => {
      if (byte <= BASE) return;
      const block = Math.floor(n / ranks);
      if (this.isSeen(Math.floor(block / chunks.length), block % chunks.length)) return;
      EVERY_MARK.forEach((mark, which) => byte & mark && found[which].add(block));
    });
    const stops = breakpoints.filter((one) => !this.isSeen(one.layer ?? this.zoom.layers[0], one.chunk ?? this.zoom.chunks[0]));
    const listed = found.map((blocks, which) => blocks.size && `${marks[which]} in ${plural(blocks.size, "block")}`);
    const text = [...listed, stops.length && plural(stops.length, "breakpoint")].filter(Boolean).join(", ");
    return text && `; outside: ${text}`;
  }

  // -- drawing

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    const shape = this.geometry(), scale = window.devicePixelRatio || 1;
    const style = getComputedStyle(this.root), { bytes, cut, breakpoints, hover, selected, found } = this.look();
    if (shape.width <= 0 || !bytes.length) return;
    this.colour = (name) => style.getPropertyValue(`--dinfer-${name}`).trim();
    this.canvas.width = Math.round(shape.width * scale);
    this.canvas.height = Math.round(shape.height * scale);
    this.canvas.style.height = `${shape.height}px`;
    const pen = this.canvas.getContext("2d"), cells = binned(bytes, this.board, this.zoom ?? this.all, shape);
    pen.scale(scale, scale);
    pen.font = "10px sans-serif";
    this.drawCells(pen, shape, cells);
    this.drawNames(pen, shape);
    this.drawStages(pen, shape);
    this.drawCut(pen, shape, cut);
    this.drawMarks(pen, shape, cells);
    this.drawBreakpoints(pen, shape, breakpoints);
    for (const block of found ?? []) this.frameCells(pen, shape, justBlock(block), 1);
    this.frameCells(pen, shape, hover, 1);
    this.frameCells(pen, shape, selected && justBlock(selected), 2.5);
    this.tell(this.scope(shape));
    // For tests: what has just been drawn, and where.
    Object.assign(this.canvas.dataset, {
      cells: Array.from(cells, (byte) => byte.toString(16).padStart(2, "0")).join(""),
      cut: cut.join(" "),
      selected: selected?.join(" ") ?? "",
      geometry: JSON.stringify(shape),
    });
  }

  // The parts of a cell, as [byte, x, y, wide, high]; equal neighbours are one.
  *boxes({ across, down, top, columns, rows, perRank }, cells, gap) {
    const parts = Math.ceil(this.board.ranks / perRank);
    const edges = Array.from({ length: parts + 1 }, (_, part) => Math.round((part * (across - gap)) / parts));
    for (let n = 0; n < columns * rows; n++) {
      const x = LEFT + (n % columns) * across, y = top + Math.floor(n / columns) * down;
      for (let part = 0, end; part < parts; part = end) {
        const byte = cells[n * parts + part];
        for (end = part + 1; end < parts && cells[n * parts + end] === byte;) end++;
        yield [byte, x + edges[part], y, edges[end] - edges[part], down - gap];
      }
    }
  }

  drawCells(pen, shape, cells) {
    const colours = this.board.states.map((_, state) => this.colour(state));
    for (const [byte, ...box] of this.boxes(shape, cells, gapOf(shape))) {
      pen.fillStyle = colours[byte & BASE];
      pen.fillRect(...box);
    }
  }

  // After the cells, since the mark of a small cell is larger than it, so that it is seen.
  drawMarks(pen, shape, cells) {
    for (const [byte, x, y, wide, high] of this.boxes(shape, cells, gapOf(shape))) {
      if (byte <= BASE) continue;
      const [left, across] = grown(x, wide, LEFT, shape.columns * shape.across);
      const [upper, down] = grown(y, high, shape.top, shape.rows * shape.down);
      this.drawMark(pen, byte, left, upper, across, down, across > wide || down > high);
    }
  }

  // Differs: another colour, crossed out; armed: a corner; NaN or Inf: a square. Shape and colour both distinguish them.
  drawMark(pen, byte, x, y, wide, high, isLarger) {
    if (byte & DIFFERS) {
      if (isLarger) {
        pen.fillStyle = this.colour("back");
        pen.fillRect(x - 1, y - 1, wide + 2, high + 2);
      }
      pen.fillStyle = this.colour("differs");
      pen.fillRect(x, y, wide, high);
      if (wide > 6 && high > 6) {
        const [left, right, upper, lower] = [x + 2, x + wide - 2, y + 2, y + high - 2];
        line(pen, [[left, upper], [right, lower]], this.colour("back"), 1.5);
        line(pen, [[left, lower], [right, upper]], this.colour("back"), 1.5);
      }
    }
    if (byte & NONFINITE) this.drawRing(pen, x, y, wide, high);
    if (byte & ARMED) {
      const size = Math.min(wide, high, 12);
      pen.beginPath();
      [[x, y], [x + size, y], [x, y + size]].forEach((point) => pen.lineTo(...point));
      pen.closePath();
      pen.fillStyle = this.colour("armed");
      pen.fill();
      pen.lineWidth = 1;
      pen.strokeStyle = this.colour("back");
      pen.stroke();
    }
  }

  // NaN or Inf: a square within the cell, of another colour; where it differs too, both are seen.
  drawRing(pen, x, y, wide, high) {
    const size = Math.max(3, Math.min(wide, high, 14) - 4), left = x + (wide - size) / 2, upper = y + (high - size) / 2;
    pen.fillStyle = this.colour("back");
    pen.fillRect(left - 1, upper - 1, size + 2, size + 2);
    pen.fillStyle = this.colour("nonfinite");
    pen.fillRect(left, upper, size, size);
  }

  // A breakpoint: a dot on the block, or on the name of the layer or chunk.
  drawBreakpoints(pen, { across, down, top, chunk: firstChunk, layer: firstLayer, perChunk, perLayer }, breakpoints) {
    for (const { layer, chunk } of breakpoints) {
      if (!this.isSeen(layer ?? firstLayer, chunk ?? firstChunk)) continue;
      const column = Math.floor((chunk - firstChunk) / perChunk), row = Math.floor((layer - firstLayer) / perLayer);
      const x = chunk === null ? LEFT - 3 : LEFT + (column + 1) * across - Math.min(7, across / 2);
      const y = layer === null ? top - 3 : top + (row + 1) * down - Math.min(7, down / 2);
      pen.beginPath();
      pen.arc(x, y, Math.max(3, Math.min(4.5, across / 2, down / 2)), 0, 7);
      pen.fillStyle = this.colour("stop");
      pen.fill();
      pen.lineWidth = 1.5;
      pen.strokeStyle = this.colour("back");
      pen.stroke();
    }
  }

  // Of a bin, the first chunk or layer.
  drawNames(pen, { across, down, top, columns, rows, chunk, layer, perChunk, perLayer }) {
    pen.fillStyle = this.colour("faint");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (let row = 0; row < rows; row += Math.ceil(13 / down)) {
      pen.fillText(`l${layer + row * perLayer}`, LEFT - 8, top + (row + 0.5) * down);
    }
    pen.textAlign = "center";
    const longest = Math.max(26, 8 + pen.measureText(`c${this.board.chunks.length - 1}`).width);
    for (let column = 0; column < columns; column += Math.ceil(longest / across)) {
      pen.fillText(`c${chunk + column * perChunk}`, LEFT + (column + 0.5) * across, top - 9);
    }
    if (top === TOP) return;
    for (let column = 0; column < columns; column++) {
      this.drawLabel(pen, LEFT + (column + 0.5) * across, top, across, this.board.labels[chunk + column]);
    }
  }

  drawLabel(pen, x, top, across, label) {
    const flat = across >= BESIDE, text = shortened(pen, label.trim().replace(/\s+/g, " "), flat ? across - 4 : LETTERS - 4);
    pen.fillStyle = this.colour("text");
    if (flat) {
      pen.fillText(text, x, top - 22);
      return;
    }
    pen.save();
    pen.translate(x, top - 18);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "left";
    pen.fillText(text, 0, 0);
    pen.restore();
    pen.textAlign = "center";
  }

  drawStages(pen, { across, down, top, columns, rows, layer: begin, perLayer }) {
    const { owners } = this.board, [, end] = (this.zoom ?? this.all).layers;
    const right = LEFT + columns * across;
    let first = begin;
    for (let layer = begin + 1; layer <= end; layer++) {
      if (layer < end && owners[layer] === owners[first]) continue;
      const y = top + ((first - begin) / perLayer) * down;
      const high = Math.min(((layer - first) / perLayer) * down, top + rows * down - y);
      pen.fillStyle = this.colour("soft");
      pen.fillRect(4, y, 18, high - 2);
      pen.save();
      pen.translate(13, y + high / 2 - 1);
      pen.rotate(-Math.PI / 2);
      pen.fillStyle = this.colour("text");
      pen.textAlign = "center";
      pen.fillText(high > 44 ? `rank ${owners[first]}` : high > 12 ? `${owners[first]}` : "", 0, 0);
      pen.restore();
      if (layer < end && high > 12) line(pen, [[LEFT, y + high], [right, y + high]], this.colour("text"), 1, [3, 3]);
      first = layer;
    }
  }

  // Where each chunk has got to, also within a bin.
  drawCut(pen, { across, down, top, columns, rows, chunk: begin, layer, perChunk, perLayer }, cut) {
    const [, end] = (this.zoom ?? this.all).chunks, right = LEFT + columns * across;
    const points = cut.slice(begin, end).flatMap((depth, n) => {
      const x = LEFT + (n / perChunk) * across, y = top + Math.max(0, Math.min(rows, (depth - layer) / perLayer)) * down;
      return [[x, y], [Math.min(right, x + across / perChunk), y]];
    });
    line(pen, points, this.colour("back"), 3.5);
    line(pen, points, this.colour("cut"), 2);
  }

  // A frame around the cell of these blocks, if it is seen.
  frameCells(pen, { across, down, top, chunk, layer, perChunk, perLayer }, blocks, wide) {
    if (!blocks || !this.isSeen(blocks.layers[0], blocks.chunks[0])) return;
    const column = Math.floor((blocks.chunks[0] - chunk) / perChunk), row = Math.floor((blocks.layers[0] - layer) / perLayer);
    const box = [LEFT + column * across - 1, top + row * down - 1, across + 1, down + 1];
    pen.lineWidth = wide + 2;
    pen.strokeStyle = this.colour("back");
    pen.strokeRect(...box);
    pen.lineWidth = wide;
    pen.strokeStyle = this.colour("text");
    pen.strokeRect(...box);
  }
}

// A byte for each part of each cell, row by row: all marks of its blocks, and the most urgent of their states.
function binned(bytes, board, { layers, chunks }, { columns, rows, perChunk, perLayer, perRank }) {
  const { ranks } = board, parts = Math.ceil(ranks / perRank), found = new Uint8Array(rows * columns * parts).fill(EVERYWHERE);
  const partOf = Uint16Array.from({ length: ranks }, (_, rank) => Math.floor(rank / perRank));
  for (let layer = layers[0]; layer < layers[1]; layer++) {
    const row = Math.floor((layer - layers[0]) / perLayer) * columns;
    for (let chunk = chunks[0]; chunk < chunks[1]; chunk++) {
      const cell = (row + Math.floor((chunk - chunks[0]) / perChunk)) * parts;
      let n = (layer * board.chunks.length + chunk) * ranks;
      for (let rank = 0; rank < ranks; rank++, n++) {
        const at = cell + partOf[rank];
        found[at] = JOINED[(found[at] << 6) | bytes[n]];
      }
    }
  }
  return found;
}

// For each two bytes, that of a bin of both.
const JOINED = Uint8Array.from({ length: 4096 }, (_, both) => {
  const [one, other] = [both >> 6, both & 63].sort((a, b) => URGENT.indexOf(a & BASE) - URGENT.indexOf(b & BASE));
  return (other & BASE) | ((one | other) & ~BASE);
});

// The map's bytes, [layers, chunks, ranks], from what `packed` of bins.py has made of them.
function unpacked(view, { layers, chunks, ranks }) {
  const runs = view.byteLength / 5, blocks = layers * chunks.length;
  const found = new Uint8Array(runs && blocks * ranks);
  let rank = 0, block = 0;
  for (let run = 0; run < runs; run++) {
    const byte = view.getUint8(4 * runs + run);
    for (let left = view.getUint32(4 * run, true); left; left--) {
      found[block * ranks + rank] = byte;
      if (++block === blocks) [block, rank] = [0, rank + 1];
    }
  }
  return found;
}

// How many share a cell, and its pixels.
function fitted([first, end], room, least, most) {
  const per = Math.max(1, Math.ceil((end - first) / Math.max(1, Math.floor(room / least))));
  return [per, Math.max(1, Math.min(most, Math.floor(room / binsIn([first, end], per))))]; // whole pixels look crisp
}

// Where a mark begins, and its pixels: at least SMALLEST_MARK, around its part of a cell, inside the map.
function grown(begin, size, first, all) {
  const most = Math.max(size, Math.min(SMALLEST_MARK, all));
  return [Math.max(first, Math.min(first + all - most, begin - (most - size) / 2)), most];
}

function binsIn([first, end], per) {
  return Math.ceil((end - first) / per);
}

// A range of `count`, or of all if there are not so many, with [first, end) in its middle.
function around([first, end], count, all) {
  const size = Math.min(all[1], Math.max(count, end - first));
  const begin = Math.max(0, Math.min(all[1] - size, Math.floor((first + end - size) / 2)));
  return [begin, begin + size];
}

function isIn(value, [first, end]) {
  return value >= first && value < end;
}

// The blocks that are only this one.
function justBlock([layer, chunk]) {
  return { layers: [layer, layer + 1], chunks: [chunk, chunk + 1] };
}

function isOne({ layers, chunks }) {
  return layers[1] - layers[0] === 1 && chunks[1] - chunks[0] === 1;
}

function gapOf({ across, down }) {
  return across > 6 && down > 5 ? 1 : 0;
}

function between([first, end]) {
  return end - first === 1 ? number(first) : `${number(first)}–${number(end - 1)}`;
}

function number(value) {
  return value.toLocaleString("en");
}

function plural(count, name) {
  return `${number(count)} ${name}${count === 1 ? "" : "s"}`;
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

// The longest beginning of a text that is no wider than that.
function shortened(pen, text, wide) {
  if (pen.measureText(text).width <= wide) return text;
  let shown = text.slice(0, 40);
  while (shown && pen.measureText(`${shown}…`).width > wide) shown = shown.slice(0, -1);
  return shown && `${shown}…`;
}

// The legend of colours and signs.
function drawLegend(node, board) {
  const item = (text, name, colour = "") => {
    const one = make("span", "", node);
    make("i", name, one).style.background = colour;
    one.append(text);
  };
  board.states.forEach((name, state) => item(name, "", `var(--dinfer-${state})`));
  ["differs", "armed", "nonfinite"].forEach((name, n) => item(board.marks[n], name));
  item("the cut", "cutline");
  item("breakpoint", "stop");
  if (board.ranks > 1) make("span", "", node, `a cell's parts are ranks 0–${board.ranks - 1}, left to right`);
}
