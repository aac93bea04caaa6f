// The ranks: device, memory and state of each; and which ranks hold a block, in words.

class RankList {
  constructor(parent, board) {
    const list = make("div", "ranks", parent);
    list.classList.toggle("dinfer-many", board.ranks > 4);
    this.lines = Array.from({ length: board.ranks }, (_, rank) => {
      const line = make("div", "rank", list);
      const head = make("div", "", line);
      make("b", "", head, `rank ${rank}`);
      const device = make("span", "faint", head);
      const word = make("span", "word", head);
      const bar = make("progress", "", line);
      const where = make("div", "where", line);
      return { line, device, word, bar, where };
    });
  }

  show(ranks) {
    ranks.forEach((rank, n) => this.showOne(this.lines[n], rank));
  }

  showOne({ line, device, word, bar, where }, rank) {
    const tokens = rank.tokens ? `${rank.tokens} new token${rank.tokens === 1 ? "" : "s"}` : "";
    device.textContent = [rank.device, rank.memory, tokens].filter(Boolean).join(" · ");
    device.title = rank.about_memory;
    word.textContent = rank.state;
    line.classList.toggle("dinfer-lost", rank.state === "lost");
    bar.max = rank.total;
    bar.value = rank.done;
    where.textContent = where.title = rank.where;
  }
}

function holders(states) {
  const ranks = (wanted) => states.flatMap((state, rank) => (wanted.includes(state) ? [rank] : []));
  const held = ranks([HERE, EVERYWHERE]), waits = ranks([IN_FLIGHT]), computing = ranks([COMPUTING]);
  const named = (list) => `rank${list.length > 1 ? "s" : ""} ${list.join(", ")}`;
  if (computing.length) return `${named(computing)} computes it`;
  if (!held.length) return "not computed yet";
  if (!waits.length) return "on every rank";
  return `held by ${named(held)}; ${named(waits)} wait${waits.length > 1 ? "" : "s"} for it`;
}
