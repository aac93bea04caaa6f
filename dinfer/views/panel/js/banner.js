// The banner: what the user should know at once, each line with its severity as icon, word and colour, and what gets a run
// on its way again that cannot go on. A verdict can be unfolded; errors and answers can be dismissed.

class Banner {
  // `icons`: by the word of a severity, from the least grave on; `send(message)` sends to the kernel; `changed()` redraws the
  // panel.
  constructor(parent, icons, send, changed) {
    this.icons = icons;
    this.root = make("div", "banner", parent);
    this.root.setAttribute("role", "status");
    this.lines = make("div", "lines", this.root);
    this.lines.tabIndex = 0; // to be scrolled by key
    this.remedy = make("div", "remedy", this.root);
    make("span", "", this.remedy, "to go on:");
    this.call = make("code", "", this.remedy);
    this.mend = make("button", "", this.remedy);
    this.mend.dataset.do = "mend";
    this.mend.onclick = () => send({ do: "mend" });
    const buttons = make("div", "buttons", this.root);
    this.more = make("button", "", buttons, "more");
    this.more.onclick = () => {
      this.unfolded = !this.unfolded;
      changed();
    };
    this.close = make("button", "", buttons, "dismiss");
    this.close.dataset.do = "dismiss";
    this.close.onclick = () => send({ do: "dismiss" });
  }

  // `shown`: the kernel's trait; `ended`: why the run cannot move any more; `lost`: no kernel; `hint`: the panel's own line,
  // [severity, text].
  show(shown, ended, lost, hint) {
    const verdict = this.unfolded ? shown.verdict : "";
    const said = verdict.startsWith(shown.message) ? verdict : shown.message;
    const isGrave = ["warning", "error"].includes(shown.state_severity);
    const lines = [
      [lost ? "warning" : "note", ended],
      [shown.error_severity, shown.error],
      [shown.severity, said, isGrave && shown.state],
      [shown.answer_severity, shown.answer],
      hint,
    ].filter(([, text]) => text);
    this.write(lines);
    this.root.hidden = !lines.length;
    const order = Object.keys(this.icons), ranked = lines.map(([severity]) => order.indexOf(severity));
    this.root.dataset.severity = order[Math.max(...ranked)] ?? "";
    this.root.classList.toggle("dinfer-unfolded", Boolean(verdict));
    this.call.textContent = ended ? "" : shown.remedy;
    this.remedy.hidden = !this.call.textContent;
    Object.assign(this.mend, { textContent: shown.mend, title: shown.remedy, hidden: !shown.mend });
    this.mend.disabled = this.remedy.hidden || shown.working.includes(shown.remedy);
    this.close.hidden = !shown.error && !shown.answer;
    this.more.hidden = !shown.verdict;
    this.more.textContent = this.unfolded ? "less" : "more";
  }

  // Only if they have changed: what is selected in them stays selected.
  write(lines) {
    const text = JSON.stringify(lines);
    if (text === this.written) return;
    this.written = text;
    this.lines.replaceChildren();
    for (const [severity, said, word] of lines) {
      const line = make("div", "line", this.lines);
      line.dataset.severity = severity;
      make("b", "", line, `${this.icons[severity]} ${word || severity}`);
      make("span", "said", line, said);
    }
  }
}
