// Which matches are shown, and under which heads: filter, facets, near-duplicates.
const bag = (text) => new Set(text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? []);

// Two texts are near-duplicates where they share four of five of all their words.
export function alike(a, b) {
  let common = 0;
  for (const word of a) common += b.has(word);
  return common >= 0.8 * (a.size + b.size - common);
}

export function grouped(matches) {
  const heads = [];
  for (const match of matches) {
    match.bag ??= bag(match.prompt + " " + match.response);
    const head = heads.find((one) => alike(one.match.bag, match.bag));
    if (head) head.same.push(match);
    else heads.push({match, same: []});
  }
  return heads;
}

export function fits(match, wanted) {
  const text = wanted.trim().toLowerCase();
  if (!text) return true;
  const [, column, value] = text.match(/^([^=\s]+)=(.*)$/) ?? [];
  if (column) return Object.entries(match.meta).some(([key, one]) => key.toLowerCase() === column && one.toLowerCase() === value.trim());
  return [match.prompt, match.response, match.id, ...Object.values(match.meta)].some((one) => one.toLowerCase().includes(text));
}

// Values that at least two of the matches share, the most frequent first: [column, value, count].
export function facets(matches) {
  const counts = new Map();
  for (const match of matches) {
    for (const [column, value] of Object.entries(match.meta)) {
      if (value && value.length <= 40) counts.set(`${column}\u0000${value}`, (counts.get(`${column}\u0000${value}`) ?? 0) + 1);
    }
  }
  return [...counts].filter(([, count]) => count > 1).sort((a, b) => b[1] - a[1]).slice(0, 6)
    .map(([key, count]) => [...key.split("\u0000"), count]);
}
