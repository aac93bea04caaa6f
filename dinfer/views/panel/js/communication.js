// Live figures of the links: the kernel makes figures, and plotly's own script, which it sends once, draws them. Nothing
// here can upload data.

const TITLES = { latency: "latency", distribution: "distribution", matrix: "rank × rank", gantt: "lanes", exposure: "exposed", predicted: "predicted" };
const MAY_COME = ["preparing", "running", "decoding", "paused", "done"]; // states of runs whose events may still arrive
const TALLEST = 480; // of what is seen of a figure, as in panel.css; a taller one scrolls
const TOOLS = 46; // the margin at the right, in which plotly's tools stand: above, they would lie over legends and titles
const EXPLAINED = {
  latency: "each transfer as it arrives: on the wire, and waiting for the peer",
  distribution: "the share of a link's transfers that took no longer",
  matrix: "bytes, bandwidth and latency from each rank to each other",
  gantt: "what each lane did when; bubble: there was nothing to do",
  exposure: "communication is exposed unless computing hides it",
  predicted: "seconds that the planner predicted, beside those measured: a rank computes, a link carries data",
};

class Communication {
  constructor(parent, root, board, name, send) {
    Object.assign(this, { root, name, send, have: -1, figure: board.figures[0], told: { caption: "", events: 0, ops: 0 }, done: 0 });
    const bar = make("div", "fields", parent);
    this.tabs = board.figures.map((figure) => {
      const button = make("button", "", bar, TITLES[figure] ?? figure);
      button.dataset.figure = figure;
      button.onclick = () => this.choose(figure);
      return button;
    });
    this.about = make("span", "faint about", bar);
    this.caption = make("span", "faint caption", bar);
    this.place = make("div", "figure", parent);
    this.resized = new ResizeObserver(() => this.drawn && this.fit());
    this.resized.observe(this.place);
  }

  // The width of its place, but the figure's height, which plotly's own resizing would change.
  fit() {
    const width = this.place.clientWidth;
    if (width) globalThis.dinferPlotly.relayout(this.drawn, { width });
  }

  open() {
    this.shown = true;
    if (globalThis.dinferPlotly) this.choose(this.figure);
    else this.send({ do: "plotly", view: this.name });
  }

  close() {
    this.shown = false;
  }

  remove() {
    this.resized.disconnect();
    this.wipe();
  }

  wipe() {
    if (this.drawn) globalThis.dinferPlotly.purge(this.drawn);
    this.place.replaceChildren();
    this.drawn = null;
  }

  // Each figure gets an element of its own: plotly never frees the nodes of figures drawn over one another.
  plotOf(name) {
    if (this.drawn && this.place.dataset.name === name) return this.drawn;
    this.wipe();
    this.drawn = make("div", "", this.place);
    return this.drawn;
  }

  choose(figure) {
    this.figure = figure;
    this.have = -1;
    this.tabs.forEach((button) => button.classList.toggle("dinfer-on", button.dataset.figure === figure));
    this.about.textContent = EXPLAINED[figure] ?? "";
    this.ask();
  }

  theme() {
    this.have = -1;
    this.ask();
  }

  ask() {
    const ready = this.shown && globalThis.dinferPlotly;
    if (ready) this.send({ do: "figure", view: this.name, name: this.figure, have: this.have, dark: this.isDark() });
  }

  isDark() {
    return this.root.classList.contains("dinfer-dark");
  }

  hear(message, buffers) {
    if (message.plotly === this.name) this.learn(message.config, buffers[0]);
    if (message.figure?.view === this.name && message.figure.name === this.figure) this.take(message.figure);
  }

  // Loaded as a script, plotly would register in window or in the page's module loader, so it gets a module of its own.
  learn(config, buffer) {
    const text = new TextDecoder().decode(new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength));
    const module = { exports: {} };
    new Function("module", "exports", "define", text)(module, module.exports, undefined);
    globalThis.dinferPlotly = module.exports.react ? module.exports : globalThis.Plotly;
    globalThis.dinferPlotlyConfig = config;
    this.choose(this.figure);
  }

  // What the panel shows of the run is newer than the figure: what the figure lacks is said at once. `shown`: panel.py's
  // trait; null once nothing more can come.
  follow(shown) {
    this.done = MAY_COME.includes(shown?.state) ? shown.ranks.reduce((sum, { done }) => sum + done, 0) : 0;
    this.say();
  }

  say() {
    const { caption, error, events, ops } = this.told, missing = this.done - ops;
    const behind = missing > 0 && `catching up: ${number(events)} of ${number(events + missing)} events of prefill`;
    const text = error || behind || caption;
    if (this.caption.textContent !== text) this.caption.textContent = text;
  }

  async take({ seen, caption, events, ops, json, error, name }) {
    this.have = seen;
    if (json) {
      const { data, layout } = JSON.parse(json);
      const paper = getComputedStyle(this.root).getPropertyValue("--dinfer-back").trim();
      const shown = { ...layout, autosize: true, paper_bgcolor: paper, plot_bgcolor: paper, uirevision: name };
      layout.annotations?.forEach((one) => { one.font = { size: 12 }; });
      shown.margin = { t: 34, ...layout.margin, r: TOOLS };
      shown.modebar = { orientation: "v", remove: ["select", "lasso"] }; // nothing here is selected
      if (layout.height > TALLEST) caption += " · scroll to see all";
      this.place.style.minHeight = `${Math.min(layout.height, TALLEST)}px`; // until it is drawn, panel.css sets the height
      await globalThis.dinferPlotly.react(this.plotOf(name), data, shown, globalThis.dinferPlotlyConfig);
      this.place.dataset.name = name;
      this.place.dataset.points = data.reduce((sum, { x }) => sum + (x?.length ?? x?._inputArray?.length ?? 0), 0);
    } else if (this.place.dataset.name !== name) this.wipe(); // else another tab's figure would stand under this one's name
    Object.assign(this.place.dataset, { seen, events });
    this.told = { caption, error, events, ops };
    this.say();
    this.ask();
  }
}
