// The panel of watched programs in the browser: parts of HTML that the kernel has made, each replaced when it changes.
// watched.py puts controls.js and slots.js before it; together they are one module.

class View {
  constructor(model, el) {
    this.model = model;
    this.parts = new Map();
    this.root = make("div", "panel watched", el);
    this.lost = make("div", "lost", this.root, LOST);
    this.lost.hidden = true;
    this.onChange = () => this.update();
    this.onLost = () => this.lose();
    model.on("change:parts", this.onChange);
    model.on("comm_live_update", this.onLost);
    this.themed = new Theme(this.root, () => {});
    this.update();
  }

  close() {
    this.model.off("change:parts", this.onChange);
    this.model.off("comm_live_update", this.onLost);
    this.themed.close();
  }

  lose() {
    this.lost.hidden = false;
  }

  // What has not changed stays as it is: a selection of text, too. Stacks that were unfolded stay so.
  update() {
    for (const [name, html] of Object.entries(this.model.get("parts"))) {
      const part = this.parts.get(name) ?? { node: make("div", name, this.root), html: "" };
      this.parts.set(name, part);
      if (part.html === html) continue;
      const open = new Set([...part.node.querySelectorAll("details[open]")].map((one) => one.dataset.rank));
      part.node.innerHTML = part.html = html;
      for (const one of part.node.querySelectorAll("details")) if (open.has(one.dataset.rank)) one.open = true;
    }
  }
}
