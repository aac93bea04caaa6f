// The banner: what a person should know at once. A verdict in it can be unfolded, errors and answers be dismissed.

class Banner {
  // `send(message)` speaks to the kernel; `changed()` has the panel drawn again.
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

  // `shown`: what the kernel says; `ended`: why nothing moves any more; `lost`: there is no kernel; `hint`: the panel's own.
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
