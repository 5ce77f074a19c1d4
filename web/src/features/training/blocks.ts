/** Blocks of a UNet as a person types them: `all`, `first:2`, `down`, `mid`, `up.1-3`. In the order of a pass. */
import type { Parsed } from './layers';

const ITEM = /^(?:all|(first|last):(\d{1,3})|(down|mid|up)|(down|up)\.(\d{1,3})(?:-(\d{1,3}))?)$/;

/** Which of `blocks` a text names, by their places. Without blocks, as of a gpu that is away, only how it is written. */
export function parseBlocks(text: string, blocks: readonly string[]): Parsed {
  const chosen = new Set<number>();
  if (!text.trim()) return { ok: false, reason: 'empty', item: '' };
  for (const item of text.split(',').map((piece) => piece.trim())) {
    const found = ITEM.exec(item);
    if (!found) return { ok: false, reason: 'grammar', item };
    const [, end, count, side, ofSide, low, high = low] = found;
    if (Number(low) > Number(high)) return { ok: false, reason: 'order', item };
    if (blocks.length === 0) continue;
    const named = ofSide
      ? Array.from({ length: Number(high) - Number(low) + 1 }, (_, i) => blocks.indexOf(`${ofSide}.${Number(low) + i}`))
      : [...blocks.keys()].filter((at) => {
          if (side) return blocks[at]?.split('.')[0] === side;
          if (end) return end === 'first' ? at < Number(count) : at >= blocks.length - Number(count);
          return true;
        });
    if (named.length === 0 || named.includes(-1) || Number(count) > blocks.length)
      return { ok: false, reason: 'range', item };
    for (const at of named) chosen.add(at);
  }
  return { ok: true, layers: chosen };
}

/** The shortest text that names these: what clicking writes into the field. */
export function writeBlocks(chosen: ReadonlySet<number>, blocks: readonly string[]): string {
  if (blocks.length > 0 && chosen.size === blocks.length) return 'all';
  const sides = [...new Set(blocks.map((name) => name.split('.')[0] ?? ''))];
  return sides.flatMap((side) => ofSide(side, chosen, blocks)).join(',');
}

function ofSide(side: string, chosen: ReadonlySet<number>, blocks: readonly string[]): string[] {
  const places = [...blocks.keys()].filter((at) => blocks[at]?.split('.')[0] === side);
  const taken = places.flatMap((at, number) => (chosen.has(at) ? [number] : []));
  if (taken.length === places.length) return [side];
  const runs: [number, number][] = [];
  for (const number of taken) {
    const last = runs.at(-1);
    if (last && last[1] === number - 1) last[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([low, high]) => (low === high ? `${side}.${low}` : `${side}.${low}-${high}`));
}
