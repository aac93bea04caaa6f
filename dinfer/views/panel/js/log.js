// The log of a run's calls: what was called, and what was refused; copied as a cell, or saved as a notebook, that makes the
// run and its calls again.

const NO_CALLS = { count: 0, calls: [], undo: "" };

class CallLogView {
  // `send(message)` sends to the kernel, with this view's `name`.
  constructor(parent, name, send) {
    Object.assign(this, { name, send, drawn: "" });
    this.box = make("details", "log", parent);
    this.title = make("summary", "", this.box, "calls");
    this.list = make("ol", "", this.box);
    this.list.tabIndex = 0;
    this.list.setAttribute("aria-label", "calls made on this run");
    const form = make("form", "fields", this.box);
    const copy = make("button", "", form, "copy as a cell");
    Object.assign(copy, { type: "button", title: "run.calls.cell(): one cell that makes the run and these calls again", onclick: () => send({ do: "cell", view: name }) });
    this.copy = copy;
    this.path = make("input", "", form);
    Object.assign(this.path, { name: "path", value: "replay.ipynb", title: "the notebook's file" });
    this.path.setAttribute("aria-label", "the notebook's file");
    make("button", "", form, "save as a notebook").title = 'run.calls.save("replay.ipynb"): a cell for each call; it holds the prompt';
    form.onsubmit = (event) => {
      event.preventDefault();
      send({ do: "verb", verb: "calls.save", given: { path: this.path.value } });
    };
    form.onkeydown = (event) => {
      if (event.key !== "Enter" || event.target !== this.path) return;
      event.preventDefault();
      event.stopPropagation();
      form.requestSubmit();
    };
    this.refused = make("div", "refused", this.box);
    this.refused.hidden = true;
    this.refused.setAttribute("role", "status");
    this.text = make("textarea", "", this.box);
    Object.assign(this.text, { readOnly: true, hidden: true });
    this.text.setAttribute("aria-label", "the cell");
  }

  show({ count, calls }) {
    const last = calls[calls.length - 1], key = `${count} ${last?.error}`;
    if (key === this.drawn) return;
    this.drawn = key;
    this.title.textContent = `calls (${count})`;
    const atEnd = this.list.scrollTop + this.list.clientHeight >= this.list.scrollHeight - 4;
    this.list.replaceChildren();
    for (const one of calls) {
      const line = make("li", "", this.list);
      line.value = one.number;
      make("time", "faint", line, one.at);
      make("code", "", line, one.call);
      if (one.error) make("span", "refused", line, one.error);
    }
    if (atEnd) this.list.scrollTop = this.list.scrollHeight;
  }

  async hear({ cell }) {
    if (cell?.view !== this.name) return;
    this.refused.hidden = !cell.error;
    this.refused.textContent = cell.error ?? "";
    if (cell.error) {
      this.text.hidden = true;
      return;
    }
    this.text.value = cell.text;
    try {
      await navigator.clipboard.writeText(cell.text);
      this.copy.textContent = "copied";
    } catch {
      this.text.hidden = false; // no clipboard: selected for Ctrl-C
      this.text.select();
      this.copy.textContent = "selected";
    }
    setTimeout(() => { this.copy.textContent = "copy as a cell"; }, 1200);
  }
}
