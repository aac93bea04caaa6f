// The map of the panel: layers × chunks on a canvas, each cell split by rank, the cut as a line. Knows no kernel.

const [COMPUTING, HERE, IN_FLIGHT, EVERYWHERE] = [1, 2, 3, 4];
const LEFT = 52, TOP = 18, MAP_HEIGHT = 400;

class BlockMap {
  // `look()` gives what is to be drawn: { bytes, cut, hover, selected }; colours come from `root`'s style.
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
    const across = Math.max(4, Math.min(64, Math.floor((width - LEFT - 2) / chunks.length))); // whole pixels are crisp
    const down = Math.max(4, Math.min(34, Math.floor(MAP_HEIGHT / layers)));
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
    const style = getComputedStyle(this.root), { bytes, cut, hover, selected } = this.look();
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
    this.frameCell(pen, shape, hover, 1);
    this.frameCell(pen, shape, selected, 2.5);
    // For tests: what has just been drawn, and where.
    Object.assign(this.canvas.dataset, {
      cells: bytes.join(""),
      cut: cut.join(" "),
      selected: selected?.join(" ") ?? "",
      geometry: JSON.stringify({ ...shape, left: LEFT, top: TOP }),
    });
  }

  drawCells(pen, { across, down }, bytes) {
    const { layers, chunks, ranks } = this.board, gap = across > 6 && down > 5 ? 1 : 0;
    const colours = this.board.states.map((_, state) => this.colour(state));
    const edges = Array.from({ length: ranks + 1 }, (_, rank) => Math.round((rank * (across - gap)) / ranks));
    let n = 0;
    for (let layer = 0; layer < layers; layer++) {
      for (let chunk = 0; chunk < chunks.length; chunk++) {
        const x = LEFT + chunk * across, y = TOP + layer * down;
        for (let rank = 0; rank < ranks;) {
          let end = rank + 1; // neighbours alike are one rectangle
          while (end < ranks && bytes[n + end] === bytes[n + rank]) end++;
          pen.fillStyle = colours[bytes[n + rank]];
          pen.fillRect(x + edges[rank], y, edges[end] - edges[rank], down - gap);
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
    for (let layer = 0; layer < layers; layer += Math.ceil(13 / down)) {
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

  drawCut(pen, { across, down }, cut) {
    const points = cut.flatMap((depth, chunk) => {
      const x = LEFT + chunk * across, y = TOP + depth * down;
      return [[x, y], [x + across, y]];
    });
    line(pen, points, this.colour("back"), 3.5);
    line(pen, points, this.colour("cut"), 2);
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
