// Shows both distributions of the token that is pointed at, or reached with the keyboard. The columns of the data are
// described in passages.py; texts of tokens only ever become text nodes.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const UNKNOWN = -1;
  const SHOWN = 12; // candidates of a token: all of those of the teacher and two students
  let columns = null; // parsed when it is first needed
  let active = null; // the token that is shown

  const data = () => (columns ??= JSON.parse(document.getElementById("data").textContent));
  const percent = (value) => `${(value / 100).toFixed(1)}%`;
  const below = (value) => `<${percent(Math.max(value, 10))}`;
  const nats = (value) => (value / 1000).toFixed(3);

  function element(name, text, kind) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function place(token) { // number of its prediction
    let count = 0;
    for (const each of token.parentNode.getElementsByTagName("b")) {
      if (each === token) break;
      count += 1;
    }
    return Number(token.closest("article").dataset.first) + count;
  }

  // token -> [probability of the teacher, of each student], as text with a number for the bar
  function candidates(n) {
    const { label, top, topProbs, labelProbs, students } = data();
    const known = new Map();
    const entry = (id) => {
      if (!known.has(id)) known.set(id, [null, ...students.map(() => null)]);
      return known.get(id);
    };
    const width = top.length / label.length;
    let least = null; // the last of the teacher's candidates, if all are exact: other tokens are less likely
    for (let k = 0; k < width; k += 1) {
      const [id, prob] = [top[n * width + k], topProbs[n * width + k]];
      least = id === UNKNOWN || prob < 0 ? null : prob;
      if (id === UNKNOWN) continue;
      const weight = -2 - prob;
      entry(id)[0] = prob >= 0 ? { value: prob, text: percent(prob) } : { sampled: weight, text: `~${percent(weight)}` };
      students.forEach((student, s) => {
        const q = student.atTeacher[n * width + k];
        entry(id)[s + 1] = { value: q, text: percent(q) };
      });
    }
    if (labelProbs[n] !== UNKNOWN) entry(label[n])[0] = { value: labelProbs[n], text: percent(labelProbs[n]) };
    students.forEach((student, s) => {
      entry(label[n])[s + 1] = { value: student.labelProbs[n], text: percent(student.labelProbs[n]) };
      const own = student.top.length / label.length;
      for (let k = 0; k < own; k += 1) {
        const q = student.topProbs[n * own + k];
        entry(student.top[n * own + k])[s + 1] = { value: q, text: percent(q) };
      }
    });
    for (const probs of known.values()) {
      probs[0] ??= { text: least === null ? "in the tail" : below(least) };
      students.forEach((student, s) => {
        const own = student.top.length / label.length;
        probs[s + 1] ??= { text: below(student.topProbs[(n + 1) * own - 1]) };
      });
    }
    const largest = (probs) => Math.max(...probs.map((each) => each.value ?? each.sampled ?? 0));
    const sorted = [...known].sort((a, b) => largest(b[1]) - largest(a[1]));
    return sorted.filter(([id], i) => i < SHOWN || id === label[n]);
  }

  function describe(n) {
    const { texts, label, entropy, entropyName, tail, students } = data();
    const facts = [`${entropyName} ${nats(entropy[n])} nats`];
    facts.push(tail === null ? "tail mass unknown" : `tail mass ${percent(tail[n])}`);
    students.forEach((each) => facts.push(`${each.name}: KL ${nats(each.kl[n])}, CE ${nats(each.ce[n])} nats`));
    const table = element("table");
    const head = table.createTHead().insertRow();
    for (const name of ["token", "teacher", ...students.map((each) => each.name)]) {
      head.appendChild(element("th")).append(element("span", name)); // a long name is cut after a few lines
    }
    const body = table.createTBody();
    const rest = [null, ...students].map(() => 10000);
    const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
    for (const [id, probs] of candidates(n)) {
      const row = body.insertRow();
      if (id === label[n]) row.className = "true";
      row.append(element("th", visible(texts[id]) + (id === label[n] ? " ◀ true" : "")));
      probs.forEach((each, model) => {
        rest[model] -= each.value ?? 0;
        const cell = element("td", each.text);
        const bar = element("span", undefined, "bar");
        bar.style.width = `${(each.value ?? 0) / 100}%`;
        cell.append(bar);
        row.append(cell);
      });
    }
    const row = body.insertRow();
    row.className = "rest";
    row.append(element("th", "all other tokens"));
    rest.forEach((each) => row.append(element("td", percent(Math.max(0, each)))));
    return [element("p", facts.join(" · ")), table];
  }

  function show(token) {
    if (active === token && !tip.hidden) return;
    hide();
    active = token;
    token.classList.add("active");
    tip.replaceChildren(...describe(place(token)));
    tip.hidden = false;
    const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const [above, under] = [at.top - 16, innerHeight - at.bottom - 16]; // room for it, with 8 pixels on both sides
    tip.style.maxHeight = `${Math.max(above, under)}px`;
    tip.style.left = "0";
    const size = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
    tip.style.top = `${size.height <= under ? at.bottom + 8 : at.top - size.height - 8}px`;
  }

  function hide() {
    active?.classList.remove("active");
    tip.hidden = true;
  }

  function move(passage, key) {
    const tokens = [...passage.getElementsByTagName("b")];
    const now = passage.contains(active) ? tokens.indexOf(active) : -1;
    const last = tokens.length - 1;
    const next = { ArrowRight: Math.min(now + 1, last), ArrowLeft: Math.max(now - 1, 0), Home: 0, End: last }[key];
    if (next === undefined) return false;
    tokens[next].scrollIntoView({ block: "nearest" });
    show(tokens[next]);
    return true;
  }

  document.documentElement.classList.add("scripted");
  for (const passage of document.querySelectorAll(".tokens")) {
    passage.tabIndex = 0;
    passage.setAttribute("role", "group");
  }
  document.addEventListener("mouseover", (event) => {
    const token = event.target.closest?.(".tokens b");
    if (token) show(token);
    else if (tip.contains(event.target)) return;
    else if (!document.activeElement?.matches(".tokens")) hide();
  });
  document.addEventListener("focusin", (event) => {
    if (event.target.matches(".tokens") && !event.target.contains(active)) move(event.target, "Home");
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    else if (event.target.matches?.(".tokens") && move(event.target, event.key)) event.preventDefault();
  });
})();
