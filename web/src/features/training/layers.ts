/** The layer-spec language as a person types it: `all`, `first:4`, `last:8`, `3`, `8-15,31`. Layers count from 0. */

export type Parsed =
  | { ok: true; layers: ReadonlySet<number> }
  | { ok: false; reason: 'empty' | 'grammar' | 'order' | 'range'; item: string };

/** Which layers a text names in a model of `n` layers. */
export function parseLayers(text: string, n: number): Parsed {
  const layers = new Set<number>();
  if (!text.trim()) return { ok: false, reason: 'empty', item: '' };
  for (const item of text.split(',').map((piece) => piece.trim())) {
    let low = 0;
    let high = n - 1;
    const some = /^(first|last):(\d+)$/.exec(item);
    const range = /^(\d+)(?:-(\d+))?$/.exec(item);
    if (some) {
      const count = Number(some[2]);
      if (count < 1 || count > n) return { ok: false, reason: 'range', item };
      [low, high] = some[1] === 'first' ? [0, count - 1] : [n - count, n - 1];
    } else if (range) {
      low = Number(range[1]);
      high = Number(range[2] ?? range[1]);
    } else if (item !== 'all') {
      return { ok: false, reason: 'grammar', item };
    }
    if (low > high) return { ok: false, reason: 'order', item };
    if (high >= n) return { ok: false, reason: 'range', item };
    for (let layer = low; layer <= high; layer++) layers.add(layer);
  }
  return { ok: true, layers };
}

/** The shortest text that names these layers: what clicking writes into the field. */
export function writeLayers(layers: ReadonlySet<number>, n: number): string {
  const sorted = [...layers].sort((a, b) => a - b);
  if (sorted.length === n && n > 0) return 'all';
  const runs: [number, number][] = [];
  for (const layer of sorted) {
    const last = runs.at(-1);
    if (last && last[1] === layer - 1) last[1] = layer;
    else runs.push([layer, layer]);
  }
  const only = runs.length === 1 ? runs[0] : undefined;
  if (only && only[1] === n - 1 && only[0] > 0 && only[0] < n - 1) return `last:${n - only[0]}`;
  return runs.map(([low, high]) => (low === high ? `${low}` : `${low}-${high}`)).join(',');
}

/** Click toggles one layer; with shift, everything from the one clicked before becomes as this one does. */
export function toggle(layers: ReadonlySet<number>, layer: number, from: number | null): Set<number> {
  const next = new Set(layers);
  const on = !layers.has(layer);
  const [low, high] = from === null ? [layer, layer] : [Math.min(from, layer), Math.max(from, layer)];
  for (let each = low; each <= high; each++) {
    if (on) next.add(each);
    else next.delete(each);
  }
  return next;
}
