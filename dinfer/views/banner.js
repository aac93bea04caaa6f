// The banner: what the user should know at once. Its verdict can be unfolded, errors and answers can be dismissed.

class Banner {
  // `send(message)` sends to the kernel; `changed()` redraws the panel.
  constructor(parent, send, changed) {
    this.root = make("div", "banner", parent);
    this.root.setAttribute("role", "status");
    this.text = make("span", "", this.root);
    this.more = make("button", "", this.root, "more");
    this.more.onclick = () => {
      this.unfolded = !this.unfolded;
      changed();
    };
    this.close = make("button", "", this.root, "dismiss");
    this.close.dataset.do = "dismiss";
    this.close.onclick = () => send({ do: "dismiss" });
  }

  // `shown`: the kernel's trait; `ended`: why the run cannot move any more; `lost`: no kernel; `hint`: the panel's own.
  show(shown, ended, lost, hint) {
    const verdict = this.unfolded ? shown.verdict : "";
    const said = verdict.startsWith(shown.message) ? verdict : shown.message;
    this.text.textContent = [ended, shown.error, said, shown.answer, hint].filter(Boolean).join("\n");
    this.root.hidden = !this.text.textContent;
    const alarm = lost || shown.error || shown.verdict || (shown.state === "failed" && shown.message);
    this.root.classList.toggle("dinfer-alarm", Boolean(alarm));
    this.root.classList.toggle("dinfer-unfolded", Boolean(verdict));
    this.close.hidden = !shown.error && !shown.answer;
    this.more.hidden = !shown.verdict;
    this.more.textContent = this.unfolded ? "less" : "more";
  }
}
