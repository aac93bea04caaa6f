// The page of runs: the session's last runs, and two of them side by side. The kernel's side is runs.py.

class RunsView {
  // `send(message)` sends to the kernel, with this view's `name`; `lead([layer, chunk])` shows a block on the map.
  constructor(parent, name, send, lead) {
    Object.assign(this, { name, send, lead, chosen: [], asked: "" });
    const bar = make("div", "fields", parent);
    this.compare = make("button", "", bar, "compare");
    this.compare.onclick = () => this.ask();
    this.compare.dataset.runs = "compare";
    make("span", "faint", bar, "two runs of the list, live or over; all of a run that is over answers, but what needs values");
    this.scroll = make("div", "runs", parent);
    this.result = make("div", "sides", parent);
    this.result.setAttribute("role", "status");
    this.call = copyable(make("div", "call", parent), "");
    this.call("");
    this.choose();
  }

  open() {
    this.isOpen = true;
    this.refresh();
  }

  close() {
    this.isOpen = false;
  }

  // The kernel is gone: what it has told stays, and where it has not, `why` is shown.
  end(why) {
    if (this.scroll.hasChildNodes() && !this.waits) return;
    this.result.replaceChildren();
    make("span", "faint", this.result, why);
  }

  // The panel shows another moment of its run: its line may be another.
  follow(shown) {
    const key = `${shown.state} ${shown.done} ${shown.decoded} ${shown.call}`;
    if (!this.isOpen || key === this.asked) return;
    this.asked = key;
    this.refresh();
  }

  refresh() {
    this.send({ do: "runs", view: this.name });
  }

  ask() {
    this.waits = true;
    this.result.replaceChildren();
    make("span", "faint", this.result, "comparing …");
    this.send({ do: "compare_runs", view: this.name, names: this.chosen });
  }

  hear({ runs, compared }, severities) {
    if (runs?.view === this.name) runs.error ? this.refuse(this.scroll, runs.error, severities) : this.list(runs);
    if (compared?.view !== this.name) return;
    this.waits = false;
    if (compared.error) {
      this.refuse(this.result, compared.error, severities);
      this.call("");
    } else this.show(compared, severities);
  }

  // What was asked could not be done.
  refuse(parent, error, severities) {
    parent.replaceChildren();
    this.say(parent, "error", error, severities);
  }

  say(parent, severity, text, severities) {
    const line = make("div", "line", parent);
    line.dataset.severity = severity;
    make("b", "", line, `${severities[severity]} ${severity}`);
    make("span", "said", line, text);
  }

  list({ columns, rows, about, mine }) {
    const names = rows.map(([name]) => name);
    this.chosen = this.chosen.filter((name) => names.includes(name));
    if (!this.chosen.length && names.length > 1) this.chosen = names.slice(-2);
    this.scroll.replaceChildren();
    const table = make("table", "", this.scroll), head = make("tr", "", make("thead", "", table)), body = make("tbody", "", table);
    make("td", "", head);
    for (const column of columns) make("th", "", head, column).title = about[column] ?? "";
    for (const cells of rows) {
      const [name] = cells, line = make("tr", name === mine ? "mine" : "", body), box = make("input", "", make("td", "", line));
      Object.assign(box, { type: "checkbox", checked: this.chosen.includes(name), onchange: () => this.choose(name, box.checked) });
      box.dataset.runs = "choose";
      box.setAttribute("aria-label", `compare ${name}`);
      cells.forEach((cell, n) => make("td", "", line, n || name !== mine ? cell : `${cell} (here)`));
    }
    this.choose();
  }

  // The two chosen last.
  choose(name, isChosen) {
    if (name) this.chosen = [...this.chosen.filter((one) => one !== name), ...(isChosen ? [name] : [])].slice(-2);
    for (const box of this.scroll.querySelectorAll("input")) {
      box.checked = this.chosen.includes(box.getAttribute("aria-label").replace("compare ", ""));
    }
    this.compare.disabled = this.chosen.length !== 2;
    this.compare.title = this.compare.disabled ? "choose two runs" : `session.runs.compare("${this.chosen[0]}", "${this.chosen[1]}")`;
  }

  show({ said, columns, rows, call, block }, severities) {
    this.result.replaceChildren();
    for (const [severity, text] of said) this.say(this.result, severity, text, severities);
    if (block) {
      const [chunk, layer] = block, button = make("button", "", this.result.firstChild, `show c${chunk} l${layer}`);
      Object.assign(button, { title: "this block on the map", onclick: () => this.lead([layer, chunk]) });
    }
    if (rows.length) {
      const table = make("table", "", this.result), head = make("tr", "", make("thead", "", table)), body = make("tbody", "", table);
      for (const column of columns.slice(0, 3)) make("th", "", head, column);
      for (const [what, one, other, mark] of rows) {
        const line = make("tr", mark ? "differs" : "", body);
        for (const cell of [what, one, other]) make("td", "", line, cell);
        if (mark) line.title = "differs";
      }
    }
    this.call(call ?? "");
  }
}
