// The map of the panel: layers × chunks on a canvas, each cell split by rank, the cut as a line. Knows no kernel.

const [COMPUTING, HERE, IN_FLIGHT, EVERYWHERE] = [1, 2, 3, 4];
const BASE = 7, DIFFERS = 8, ARMED = 16;
const LEFT = 52, MAP_HEIGHT = 380, WIDEST = 110, BESIDE = 44, ABOVE = 12, LETTERS = 60;

class BlockMap {
  // `look()` returns what to draw: { bytes, cut, breakpoints, hover, selected }; colours come from `root`'s style.
  constructor(canvas, root, board, look) {
    Object.assign(this, { canvas, root, board, look });
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(canvas.parentElement);
  }

  close() {
    this.resized.disconnect();
    cancelAnimationFrame(this.frame);
  }

  geometry() {
    const { layers, chunks } = this.board;
    const width = this.canvas.parentElement.clientWidth;
    const across = Math.max(4, Math.min(WIDEST, Math.floor((width - LEFT - 2) / chunks.length))); // whole pixels look crisp
    const down = Math.max(4, Math.min(34, Math.floor(MAP_HEIGHT / layers)));
    const labelled = across >= ABOVE && this.board.labels.some(Boolean);
    const top = 18 + (!labelled ? 0 : across >= BESIDE ? 13 : LETTERS); // texts of chunks: horizontal or vertical
    return { width, height: top + down * layers + 4, across, down, top };
  }

  cellAt(event) {
    const { across, down, top } = this.geometry();
    const chunk = Math.floor((event.offsetX - LEFT) / across), layer = Math.floor((event.offsetY - top) / down);
    const { layers, chunks } = this.board;
    return layer >= 0 && layer < layers && chunk >= 0 && chunk < chunks.length ? [layer, chunk] : null;
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    const shape = this.geometry(), scale = window.devicePixelRatio || 1;
    const style = getComputedStyle(this.root), { bytes, cut, breakpoints, hover, selected } = this.look();
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
    this.drawCut(pen, shape, cut);
    this.drawBreakpoints(pen, shape, breakpoints);
    this.frameCell(pen, shape, hover, 1);
    this.frameCell(pen, shape, selected, 2.5);
    // For tests: what has just been drawn, and where.
    Object.assign(this.canvas.dataset, {
      cells: Array.from(bytes, (byte) => byte.toString(32)).join(""),
      cut: cut.join(" "),
      selected: selected?.join(" ") ?? "",
      geometry: JSON.stringify({ ...shape, left: LEFT }),
    });
  }

  drawCells(pen, { across, down, top }, bytes) {
    const { layers, chunks, ranks } = this.board, gap = across > 6 && down > 5 ? 1 : 0;
    const colours = this.board.states.map((_, state) => this.colour(state));
    const edges = Array.from({ length: ranks + 1 }, (_, rank) => Math.round((rank * (across - gap)) / ranks));
    let n = 0;
    for (let layer = 0; layer < layers; layer++) {
      for (let chunk = 0; chunk < chunks.length; chunk++) {
        const x = LEFT + chunk * across, y = top + layer * down;
        for (let rank = 0; rank < ranks;) {
          let end = rank + 1; // equal neighbours are one rectangle
          while (end < ranks && bytes[n + end] === bytes[n + rank]) end++;
          const byte = bytes[n + rank], box = [x + edges[rank], y, edges[end] - edges[rank], down - gap];
          pen.fillStyle = colours[byte & BASE];
          pen.fillRect(...box);
          if (byte > BASE) this.drawMarks(pen, byte, ...box);
          rank = end;
        }
        n += ranks;
      }
    }
  }

  // Differs: another colour, crossed out; armed: a corner. Shape and colour both distinguish them.
  drawMarks(pen, byte, x, y, wide, high) {
    if (byte & DIFFERS) {
      pen.fillStyle = this.colour("differs");
      pen.fillRect(x, y, wide, high);
      if (wide > 7 && high > 7) {
        const [left, right, upper, lower] = [x + 2, x + wide - 2, y + 2, y + high - 2];
        line(pen, [[left, upper], [right, lower]], this.colour("back"), 1.5);
        line(pen, [[left, lower], [right, upper]], this.colour("back"), 1.5);
      }
    }
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

  // A breakpoint: a dot on the block, or on the name of the layer or chunk.
  drawBreakpoints(pen, { across, down, top }, breakpoints) {
    for (const { layer, chunk } of breakpoints) {
      const x = chunk === null ? LEFT - 3 : LEFT + (chunk + 1) * across - Math.min(7, across / 2);
      const y = layer === null ? top - 3 : top + (layer + 1) * down - Math.min(7, down / 2);
      pen.beginPath();
      pen.arc(x, y, Math.max(2, Math.min(4.5, across / 2, down / 2)), 0, 7);
      pen.fillStyle = this.colour("stop");
      pen.fill();
      pen.lineWidth = 1.5;
      pen.strokeStyle = this.colour("back");
      pen.stroke();
    }
  }

  drawNames(pen, { across, down, top }) {
    const { layers, chunks, labels } = this.board;
    pen.fillStyle = this.colour("faint");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (let layer = 0; layer < layers; layer += Math.ceil(13 / down)) {
      pen.fillText(`l${layer}`, LEFT - 8, top + (layer + 0.5) * down);
    }
    pen.textAlign = "center";
    for (let chunk = 0; chunk < chunks.length; chunk += Math.ceil(26 / across)) {
      pen.fillText(`c${chunk}`, LEFT + (chunk + 0.5) * across, top - 9);
    }
    if (top > 18) labels.forEach((label, chunk) => this.drawLabel(pen, LEFT + (chunk + 0.5) * across, top, across, label));
  }

  drawLabel(pen, x, top, across, label) {
    const flat = across >= BESIDE, text = fitted(pen, label.trim().replace(/\s+/g, " "), flat ? across - 4 : LETTERS - 4);
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

  drawStages(pen, { across, down, top }) {
    const { owners, layers, chunks } = this.board;
    let first = 0;
    for (let layer = 1; layer <= layers; layer++) {
      if (layer < layers && owners[layer] === owners[first]) continue;
      const y = top + first * down, high = (layer - first) * down;
      pen.fillStyle = this.colour("soft");
      pen.fillRect(4, y, 18, high - 2);
      pen.save();
      pen.translate(13, y + high / 2 - 1);
      pen.rotate(-Math.PI / 2);
      pen.fillStyle = this.colour("text");
      pen.textAlign = "center";
      pen.fillText(high > 44 ? `rank ${owners[first]}` : high > 12 ? `${owners[first]}` : "", 0, 0);
      pen.restore();
      if (layer < layers) line(pen, [[LEFT, top + layer * down], [LEFT + chunks.length * across, top + layer * down]],
        this.colour("text"), 1, [3, 3]);
      first = layer;
    }
  }

  drawCut(pen, { across, down, top }, cut) {
    const points = cut.flatMap((depth, chunk) => {
      const x = LEFT + chunk * across, y = top + depth * down;
      return [[x, y], [x + across, y]];
    });
    line(pen, points, this.colour("back"), 3.5);
    line(pen, points, this.colour("cut"), 2);
  }

  frameCell(pen, { across, down, top }, cell, wide) {
    if (!cell) return;
    const box = [LEFT + cell[1] * across - 1, top + cell[0] * down - 1, across + 1, down + 1];
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

// The longest beginning of a text that is no wider than that.
function fitted(pen, text, wide) {
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
  ["differs", "armed"].forEach((name, n) => item(board.marks[n], name));
  item("the cut", "line");
  item("breakpoint", "stop");
  make("span", "", node, `a cell's parts are ranks 0–${board.ranks - 1}, left to right`);
}
